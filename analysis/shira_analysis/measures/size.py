"""The size of an adapter's deltas and the layout of its mask: for one tensor, or several combined."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shira_analysis.measures.additive import attributes
from shira_analysis.measures.deltas import Float64s, delta_values
from shira_analysis.measures.uniform import (
    Compared,
    adjacent_entries,
    dispersion_of_counts,
    dispersion_of_gaps,
    lines_with_entries,
    mean_of,
)
from shira_format._core.arrays import distinct_counts
from shira_format.tensors import SparseTensor, density, matrix_shape


@dataclass(frozen=True)
class Mask:
    """The positions of an adapter's entries, regardless of values; for one tensor, or several combined.

    Rows and columns are those of the matrix view (spec, section 1). For several tensors, counts are sums, and the figures
    compared with uniform masks are means over the tensors, with an independent uniform mask for each.

    Attributes:
        nnz: number of entries.
        numel: number of elements.
        rows: rows with an entry.
        all_rows: all rows.
        columns: columns with an entry.
        all_columns: all columns.
        spread: figures compared with uniform masks: ``rows`` and ``columns`` (how many have an entry), ``row_dispersion`` and
            ``column_dispersion`` (index of dispersion of the entries in each; above uniform: clustered, below: even),
            ``gap_dispersion`` (the same for the gaps between entries in flat order, nearly geometric if uniform),
            ``neighbours`` (entries directly after another). A figure that is meaningless for a tensor, such as the dispersion
            of a single row, is omitted.
    """

    nnz: int
    numel: int
    rows: int
    all_rows: int
    columns: int
    all_columns: int
    spread: Mapping[str, Compared] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """``nnz / numel``; 0 without elements."""
        return density(self.nnz, self.numel)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return attributes(
            self, "nnz", "numel", "density", "rows", "all_rows", "columns", "all_columns"
        ) | {"spread": {name: figure.as_json() for name, figure in self.spread.items()}}  # fmt: skip


@dataclass(frozen=True)
class Norms:
    """The size of the deltas, in float64; for one tensor, or several combined.

    Attributes:
        zeros: entries whose delta is 0.
        frobenius: root of the sum of squares.
        l1: sum of magnitudes.
        largest: largest magnitude.
        histogram: number of magnitudes in [2^e, 2^(e + 1)), by increasing e; zeros are not counted.
    """

    zeros: int
    frobenius: float
    l1: float
    largest: float
    histogram: Mapping[int, int]

    @property
    def energy(self) -> float:
        """The sum of squares; infinite on overflow."""
        return self.frobenius * self.frobenius

    def mean(self, nnz: int) -> float:
        """The mean magnitude over ``nnz`` entries; 0 without entries."""
        return self.l1 / nnz if nnz else 0.0

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; infinite ones are None, as JSON has no infinity."""
        numbers = {"energy": self.energy, "frobenius": self.frobenius, "l1": self.l1, "largest": self.largest}
        return {
            "zeros": self.zeros,
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
            "histogram": [{"from": 2.0**e, "count": count} for e, count in self.histogram.items()],
        }


def mask_of(tensor: SparseTensor) -> Mask:
    """The positions of the entries of ``tensor``, which may be a mask. Memory is a few times its indices."""
    rows, columns = matrix_shape(tensor.shape)
    indices = tensor.indices
    row_counts = distinct_counts(indices // max(1, columns))[1]
    column_counts = distinct_counts(indices % max(1, columns))[1]
    figures: dict[str, Compared | None] = {}
    if indices.size:
        near = int(np.count_nonzero(np.diff(indices) == 1))
        figures = {
            "rows": lines_with_entries(row_counts.size, rows, columns, indices.size),
            "columns": lines_with_entries(column_counts.size, columns, rows, indices.size),
            "row_dispersion": dispersion_of_counts(row_counts, rows, columns),
            "column_dispersion": dispersion_of_counts(column_counts, columns, rows),
            "gap_dispersion": dispersion_of_gaps(indices, tensor.numel),
            "neighbours": adjacent_entries(near, indices.size, tensor.numel),
        }
    spread = {name: figure for name, figure in figures.items() if figure is not None}
    return Mask(tensor.nnz, tensor.numel, int(row_counts.size), rows, int(column_counts.size), columns, spread)


def norms_of(tensor: SparseTensor, base: Any = None) -> Norms:
    """The size of the deltas of ``tensor``; see :func:`shira_analysis.measures.deltas.delta_values` for ``base`` and errors."""
    return norms_of_values(delta_values(tensor, base))


def norms_of_values(deltas: Float64s) -> Norms:
    """Norms of finite numbers, ``[n]``."""
    size = np.abs(deltas)
    largest = float(size.max()) if size.size else 0.0
    if not largest:
        return Norms(int(size.size), 0.0, 0.0, 0.0, {})
    # Scaled exactly, by a power of two, so that the squares neither overflow nor all underflow.
    _, top = math.frexp(largest)
    scaled = np.ldexp(size, -top)
    positive = size[size > 0]
    exponents, counts = np.unique(np.frexp(positive)[1] - 1, return_counts=True)
    return Norms(
        int(size.size - positive.size),
        _ldexp(math.sqrt(float(np.dot(scaled, scaled))), top),
        _ldexp(float(scaled.sum()), top),
        largest,
        dict(zip(exponents.tolist(), counts.tolist(), strict=True)),
    )


def _ldexp(value: float, exponent: int) -> float:
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.inf


def combine_masks(masks: Iterable[Mask]) -> Mask:
    """Combine several tensors; see :class:`Mask`."""
    masks = list(masks)
    names = dict.fromkeys(name for mask in masks for name in mask.spread)
    means = {name: mean_of([mask.spread[name] for mask in masks if name in mask.spread]) for name in names}
    nnz, numel, rows, all_rows, columns, all_columns = (
        sum(getattr(mask, name) for mask in masks)
        for name in ("nnz", "numel", "rows", "all_rows", "columns", "all_columns")
    )
    spread = {name: figure for name, figure in means.items() if figure is not None}
    return Mask(nnz, numel, rows, all_rows, columns, all_columns, spread)


def combine_norms(norms: Iterable[Norms]) -> Norms:
    """Combine the norms of several tensors."""
    norms = list(norms)
    histogram: dict[int, int] = {}
    for one in norms:
        for exponent, count in one.histogram.items():
            histogram[exponent] = histogram.get(exponent, 0) + count
    return Norms(
        sum(one.zeros for one in norms),
        math.hypot(*(one.frobenius for one in norms)),
        sum(one.l1 for one in norms),
        max((one.largest for one in norms), default=0.0),
        dict(sorted(histogram.items())),
    )
