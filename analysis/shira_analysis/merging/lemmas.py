"""Whether the paper's lemmas 4.4 and 4.5 apply to two adapters that are merged, weight by weight.

:mod:`shira_analysis.lemmas` shows which part of each is true, with counterexamples to the rest. Here a lemma *applies* to
two adapters of one weight if the condition of its true part holds exactly; the margin is the distance from that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from shira_analysis.measures.orthogonality import Orthogonality
from shira_analysis.measures.overlap import Overlap
from shira_format._core.arrays import Array
from shira_format.tensors import SparseTensor, matrix_shape

Struct = Literal["no", "shared rows", "yes"]

_ROUNDING = 1e-12  # relative to both norms: a product this small may be 0 up to rounding
_TERMS = 50_000  # the most products of two entries that are summed as fractions


@dataclass(frozen=True)
class TensorLemmas:
    """Two adapters of one weight that both change.

    Attributes:
        name: of the weight.
        zero: whether ``A1^T A2`` is exactly 0, as lemma 4.4 needs; None if it is 0 up to rounding and was not computed exactly.
        apart: whether no row is changed by both: then the two do not interfere, even after a non-linearity.
        margin: ``||A1^T A2|| / (||A1|| ||A2||)``, from 0 to 1: how far from 0 the product is; None if an adapter changes nothing.
        struct: for lemma 4.5: whether both masks are the main diagonal and whole rows, and no row is in both.
        bound: non-zero cells of ``A1^T A2`` that lemma 4.5 allows, ``nnz(I) + nnz(S1) + nnz(S2)``; None if it does not apply.
        nonzero: its non-zero cells.
        cells: all its cells.
    """

    name: str
    zero: bool | None
    apart: bool
    margin: float | None
    struct: Struct
    bound: int | None
    nonzero: int
    cells: int

    @property
    def bound_margin(self) -> float | None:
        """The margin of lemma 4.5: ``density(I) + density(S1) + density(S2) - (1 - AWOR)``; None if it does not apply."""
        return None if self.bound is None or not self.cells else (self.bound - self.nonzero) / self.cells

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "lemma_4_4": {"zero": self.zero, "disjoint_rows": self.apart, "margin": self.margin},
            "lemma_4_5": {
                "struct": self.struct,
                "one_less_awor": self.nonzero / self.cells if self.cells else None,
                "bound": None if self.bound is None or not self.cells else self.bound / self.cells,
                "margin": self.bound_margin,
            },
        }


@dataclass(frozen=True)
class PairLemmas:
    """The weights, of two dimensions or more, that both adapters change."""

    tensors: tuple[TensorLemmas, ...]

    @property
    def zero(self) -> int:
        """The number of weights to which lemma 4.4 applies."""
        return sum(one.zero is True for one in self.tensors)

    @property
    def unclear(self) -> int:
        """The number for which this is not known."""
        return sum(one.zero is None for one in self.tensors)

    @property
    def apart(self) -> int:
        """The number in which no row is changed by both."""
        return sum(one.apart for one in self.tensors)

    @property
    def worst(self) -> TensorLemmas | None:
        """The weight with the largest margin of lemma 4.4; None if there is none."""
        known = [one for one in self.tensors if one.margin is not None]
        return max(known, key=lambda one: one.margin or 0.0, default=None)

    @property
    def struct(self) -> int:
        """The number of weights to which lemma 4.5 applies."""
        return sum(one.struct == "yes" for one in self.tensors)

    @property
    def shared_rows(self) -> int:
        """The number to which it would apply if no row were in both."""
        return sum(one.struct == "shared rows" for one in self.tensors)

    @property
    def tightest(self) -> TensorLemmas | None:
        """The weight with the smallest margin of lemma 4.5; None if it applies to none."""
        known = [one for one in self.tensors if one.bound_margin is not None]
        return min(known, key=lambda one: one.bound_margin or 0.0, default=None)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        worst, tightest = self.worst, self.tightest
        return {
            "tensors": len(self.tensors),
            "lemma_4_4": {
                "applies": self.zero,
                "unknown": self.unclear,
                "disjoint_rows": self.apart,
                "worst": None if worst is None else {"name": worst.name, "margin": worst.margin},
            },
            "lemma_4_5": {
                "applies": self.struct,
                "shared_rows": self.shared_rows,
                "tightest": None if tightest is None else {"name": tightest.name, "margin": tightest.bound_margin},
            },
        }


def struct_rows(tensor: SparseTensor) -> Array | None:
    """The whole rows, strictly increasing, of a mask that consists of the main diagonal and whole rows; None for other masks."""
    rows, columns = matrix_shape(tensor.shape)
    diagonal = min(rows, columns)
    if not diagonal or tensor.nnz < diagonal:
        return None
    row = tensor.indices // columns
    starts = np.flatnonzero(np.diff(row, prepend=-1))
    used, counts = row[starts], np.diff(np.append(starts, row.size))
    whole = counts == columns
    single = used[~whole]
    if (counts[~whole] != 1).any() or (tensor.indices[starts[~whole]] != single * (columns + 1)).any():
        return None
    if used.size < diagonal or used[diagonal - 1] != diagonal - 1:  # a row without its diagonal
        return None
    return np.asarray(used[whole])


def tensor_lemmas(
    tensors: tuple[SparseTensor, SparseTensor],
    matrices: tuple[Any, Any],
    structs: tuple[Array | None, Array | None],
    measured: tuple[Overlap, Orthogonality],
) -> TensorLemmas:
    """Whether the lemmas apply to one weight.

    Args:
        tensors: the two adapters' entries, of a weight of two dimensions or more.
        matrices: their deltas as CSR matrices; rows without entries may be left out of both.
        structs: of each, see :func:`struct_rows`.
        measured: overlap and orthogonality of the two.
    """
    overlap, product = measured
    # The root of each: the product of two small energies may underflow.
    sizes = [math.sqrt(energy or 0.0) for energy in (overlap.first_energy, overlap.second_energy)]
    margin = product.awom / sizes[0] / sizes[1] if all(sizes) else None
    apart = product.reached == 0
    if apart:
        zero: bool | None = True
    elif product.nonzero == 0 or (margin is not None and margin < _ROUNDING):
        zero = _vanishes(*matrices)
    else:
        zero = False
    struct: Struct = "no"
    bound = None
    first, second = structs
    if first is not None and second is not None:
        struct = "shared rows" if np.intersect1d(first, second, assume_unique=True).size else "yes"
        if struct == "yes":
            diagonal = min(matrix_shape(tensors[0].shape))
            bound = tensors[0].nnz + tensors[1].nnz - diagonal  # nnz(S) is that of the mask without its diagonal
    return TensorLemmas(
        tensors[0].name, zero, apart, None if margin is None else min(margin, 1.0), struct, bound,
        product.nonzero, product.cells,
    )  # fmt: skip


def _vanishes(first: Any, second: Any) -> bool | None:
    """Whether ``first^T second`` is 0, in exact arithmetic; None if that takes too long."""
    counts = [np.diff(matrix.indptr) for matrix in (first, second)]
    if float(counts[0].astype(np.float64) @ counts[1]) > _TERMS:
        return None
    cells: dict[tuple[int, int], Fraction] = {}
    for row in np.flatnonzero((counts[0] > 0) & (counts[1] > 0)).tolist():
        right = list(_entries(second, row))
        for i, a in _entries(first, row):
            for j, b in right:
                cells[i, j] = cells.get((i, j), Fraction(0)) + a * b
    return not any(cells.values())


def _entries(matrix: Any, row: int) -> Iterable[tuple[int, Fraction]]:
    some = slice(matrix.indptr[row], matrix.indptr[row + 1])
    return zip(matrix.indices[some].tolist(), map(Fraction, matrix.data[some].tolist()), strict=True)
