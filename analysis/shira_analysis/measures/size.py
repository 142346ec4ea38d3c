"""How large an adapter's change is, and where it lies: of one tensor, or of several together."""

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
from shira_format.tensors import SparseTensor, density, matrix_shape


@dataclass(frozen=True)
class Mask:
    """Which entries an adapter has, whatever their values; of one tensor, or of several together.

    Rows and columns are those of the matrix view (spec, section 1). Of several tensors, counts are sums, and the figures that
    are compared with uniform masks are means over the tensors; uniform masks are taken as drawn for each tensor apart.

    Attributes:
        nnz: entries.
        numel: elements.
        rows: rows that have an entry.
        all_rows: rows.
        columns: columns that have an entry.
        all_columns: columns.
        spread: figures beside those of uniform masks: ``rows`` and ``columns`` (how many have an entry), ``row_dispersion`` and
            ``column_dispersion`` (index of dispersion of how many entries each has; more than uniform: clustered, less: even),
            ``gap_dispersion`` (of the elements left out between entries in flat order, close to the geometric law if uniform),
            ``adjacent_entries`` (entries right after another). A figure that says nothing of a tensor, such as that of its one row,
            is left out.
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
        """Entries over elements; 0 without elements."""
        return density(self.nnz, self.numel)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return attributes(
            self, "nnz", "numel", "density", "rows", "all_rows", "columns", "all_columns"
        ) | {"spread": {name: figure.as_json() for name, figure in self.spread.items()}}  # fmt: skip


@dataclass(frozen=True)
class Norms:
    """How large the deltas are, in float64; of one tensor, or of several together.

    Attributes:
        zeros: entries whose delta is 0.
        frobenius: root of the sum of squares.
        l1: sum of magnitudes.
        largest: largest magnitude.
        histogram: how many magnitudes lie in [2^e, 2^(e + 1)), by e, rising; zeros are in none.
    """

    zeros: int
    frobenius: float
    l1: float
    largest: float
    histogram: Mapping[int, int]

    @property
    def energy(self) -> float:
        """The sum of squares; infinite if float64 cannot hold it."""
        return self.frobenius * self.frobenius

    def mean(self, nnz: int) -> float:
        """The mean magnitude over ``nnz`` entries; 0 of none."""
        return self.l1 / nnz if nnz else 0.0

    def as_json(self) -> dict[str, Any]:
        """Plain values; what float64 cannot hold is None, as JSON has no infinity."""
        numbers = {"energy": self.energy, "frobenius": self.frobenius, "l1": self.l1, "largest": self.largest}
        return {
            "zeros": self.zeros,
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
            "histogram": [{"from": 2.0**e, "count": count} for e, count in self.histogram.items()],
        }


def mask_of(tensor: SparseTensor) -> Mask:
    """Where the entries of ``tensor`` lie; also of a mask. Memory stays at a few times its indices."""
    rows, columns = matrix_shape(tensor.shape)
    indices = tensor.indices
    row_counts = np.unique(indices // max(1, columns), return_counts=True)[1]
    column_counts = np.unique(indices % max(1, columns), return_counts=True)[1]
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
    """How large the deltas of ``tensor`` are; see :func:`shira_analysis.measures.deltas.delta_values` for ``base`` and errors."""
    return norms_of_values(delta_values(tensor, base))


def norms_of_values(deltas: Float64s) -> Norms:
    """Norms of finite numbers, ``[n]``."""
    size = np.abs(deltas)
    largest = float(size.max()) if size.size else 0.0
    if not largest:
        return Norms(int(size.size), 0.0, 0.0, 0.0, {})
    # Scaled by a power of two, exactly, so that no square overflows or vanishes.
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
    """Several tensors together; see :class:`Mask`."""
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
    """Norms of several tensors together."""
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
