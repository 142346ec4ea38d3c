"""AWOM and AWOR, the paper's measures of how orthogonal two adapters' weights are, with their values for random masks.

For the deltas ``A1, A2`` of one weight, ``[rows, columns]`` in the matrix view:

* ``AWOM = ||A1^T A2||``: the norm of the product, by default Frobenius. The paper writes the l2 norm, but the axes of its
  figures 4 and 9 (about 10^2 at dimension 128, just under 10^6 at 8192, for dense normal entries) match the Frobenius norm,
  ``m^1.5`` (7.4e5 at 8192), not the spectral norm, about ``2.6 m`` (2.1e4).
* ``AWOR = 1 - ||A1^T A2||_0 / columns^2``: the share of zeros in the product.

**Which product.** A layer computes ``y = W x`` with ``W`` of ``[out, in]`` (Linear, convolutions). Its outputs have the inner
product ``<A1 x, A2 x> = x^T (A1^T A2) x``, so ``A1^T A2`` is zero if and only if every output of one adapter is orthogonal to
every output of the other. For inputs of independent normal features, the trace of ``A1^T A2`` is the mean of that inner
product, and its Frobenius norm measures the spread. The transposed product ``A1 A2^T`` is zero if the adapters *read*
orthogonal directions of the input; its trace is the same, ``<A1, A2>``. For a weight stored as ``[in, out]`` (GPT-2's Conv1D,
embeddings) the two swap roles: use ``transposed=True``.

**Which zeros.** A cell is *numerically* nonzero if its float64 value is not 0, and *structurally* nonzero if at least one pair
of stored entries (explicit zeros included) contributes to it, whether or not the terms cancel. There are at least as many
numerical zeros as structural ones; for trained values, which rarely cancel exactly, the two nearly agree.

No dense product is formed: one row at a time with numba (the extra ``fast``), else a batch of rows with scipy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from shira_analysis.measures.additive import Additive, attributes
from shira_analysis.measures.deltas import delta_matrix
from shira_analysis.measures.overlap import finite
from shira_format._core.arrays import Array, distinct
from shira_format.errors import SourceError
from shira_format.tensors import SparseTensor

_TERMS = 1 << 22  # terms of a product per batch: about 150 MB with scipy
_FAST = 2.5  # speedup of a product with numba
_GRAM = 3  # relative cost of a term in the product of two Gram matrices
_UNRESOLVED = 1e-6  # a sum below this share of its absolute terms has cancelled too far and is recomputed
_SPECTRAL = 1e-6  # relative accuracy of the spectral norm
_SMALL = 32  # at most this many rows or columns: use LAPACK

Norm = Literal["fro", "spectral"]


@dataclass(frozen=True)
class Orthogonality(Additive):
    """The product of two adapters' deltas of one weight, or of several: ``+`` combines them as blocks of one matrix.

    Attributes:
        cells: number of cells of the product.
        nonzero: cells whose float64 value is not 0.
        reached: structurally nonzero cells; at least ``nonzero``.
        energy: the energy (the sum of squares) of all cells.
        reached_if_uniform: expected ``reached`` for two independent uniform masks of these densities.
        reached_if_independent: the same for independent masks with these entry counts per row (column, if transposed).
        energy_if_independent: expected ``energy`` if the values' signs were independent.
        spectral: the largest singular value of the product; None if not requested.
    """

    cells: int = 0
    nonzero: int = 0
    reached: int = 0
    energy: float = 0.0
    reached_if_uniform: float = 0.0
    reached_if_independent: float = 0.0
    energy_if_independent: float = 0.0
    spectral: float | None = None

    @property
    def awom(self) -> float:
        """``||A1^T A2||`` in the Frobenius norm."""
        return math.sqrt(self.energy)

    @property
    def awor(self) -> float | None:
        """The share of zeros in ``A1^T A2``; None without cells."""
        return self._zeros(self.nonzero)

    @property
    def awor_structural(self) -> float | None:
        """The share of structural zeros; None without cells."""
        return self._zeros(self.reached)

    @property
    def awor_if_uniform(self) -> float | None:
        """The expected structural AWOR of independent uniform masks: ``(1 - p1 p2)^rows`` for one weight."""
        return self._zeros(self.reached_if_uniform)

    @property
    def awor_if_independent(self) -> float | None:
        """The same with the actual density of each row: the product of ``1 - p1 p2`` over the rows."""
        return self._zeros(self.reached_if_independent)

    @property
    def awom_if_independent(self) -> float:
        """The expected AWOM (root mean square) for independent random signs."""
        return math.sqrt(self.energy_if_independent)

    def _zeros(self, others: float) -> float | None:
        return 1 - others / self.cells if self.cells else None

    def _add(self, field: str, a: Any, b: Any) -> Any:
        if field != "spectral":
            return a + b
        known = [one for one in (a, b) if one is not None]
        return max(known) if known else None  # blocks of one matrix

    def as_json(self) -> dict[str, Any]:
        """All measures; undefined or unknown ones are null."""
        return attributes(
            self, "cells", "nonzero", "reached", "awom", "awom_spectral=spectral", "awor", "awor_structural",
            "awor_if_uniform", "awor_if_independent", "awom_if_independent",
        )  # fmt: skip


def orthogonality(a: Any, b: Any, *, transposed: bool = False, spectral: bool = False) -> Orthogonality:
    """All measures of ``A1^T A2``, or of ``A1 A2^T``; see the module docstring.

    Args:
        a: the first adapter's :class:`SparseTensor`, or its deltas as a sparse matrix ``[rows, columns]`` in float64.
        b: the second's, of the same shape.
        transposed: measure ``A1 A2^T``, ``[rows, rows]``, instead of ``A1^T A2``, ``[columns, columns]``.
        spectral: compute the spectral norm as well.

    Raises:
        SourceError: the shapes differ, an adapter is a mask, a delta is not finite, or scipy is missing.
        BaseRequired: target values without base values.
    """
    first, second, (rows, columns) = _oriented(a, b, transposed)
    cells = columns * columns
    energy, nonzero, reached = _measure(first, second)
    finite(energy, "the energy of the product of the deltas")
    counts = [np.diff(matrix.indptr) / max(1, columns) for matrix in (first, second)]
    each = [float(matrix.nnz) / max(1, rows * columns) for matrix in (first, second)]
    found = np.dot(*(_energy_of_rows(matrix) for matrix in (first, second)))
    largest = (_spectral(first, second, math.sqrt(energy)) if energy else 0.0) if spectral else None
    return Orthogonality(
        cells, nonzero, reached, energy,
        -cells * math.expm1(rows * _log_complement(each[0] * each[1])),
        -cells * math.expm1(float(np.sum(_log_complement(counts[0] * counts[1])))),
        float(found), largest,
    )  # fmt: skip


def awom(a: Any, b: Any, norm: Norm = "fro", *, transposed: bool = False) -> float:
    """``||A1^T A2||``; see the module docstring, and :func:`orthogonality` for the arguments.

    Args:
        a: the first adapter's tensor or deltas.
        b: the second's.
        norm: ``"fro"``, or ``"spectral"``, which is accurate to one part in a million.
        transposed: measure ``A1 A2^T``.

    Raises:
        SourceError: unknown norm; see also :func:`orthogonality`.
        BaseRequired: target values without base values.
    """
    if norm not in ("fro", "spectral"):
        raise SourceError(f"the norm must be 'fro' or 'spectral', not {norm!r}")
    first, second, _ = _oriented(a, b, transposed)
    energy = finite(_energy(first, second), "the energy of the product of the deltas")
    if norm == "fro" or not energy:
        return math.sqrt(energy)
    return _spectral(first, second, math.sqrt(energy))


def awor(a: Any, b: Any, *, transposed: bool = False, structural: bool = False) -> float:
    """``1 - ||A1^T A2||_0 / columns^2``, 1 without cells; see the module docstring, and :func:`orthogonality` for the arguments.

    Args:
        a: the first adapter's tensor or deltas.
        b: the second's.
        transposed: measure ``A1 A2^T``.
        structural: count structural zeros instead of numerical ones.

    Raises:
        SourceError: see :func:`orthogonality`.
        BaseRequired: target values without base values.
    """
    first, second, (_, columns) = _oriented(a, b, transposed)
    _, nonzero, reached = _measure(first, second, structural=structural, numerical=not structural)
    cells = columns**2
    return 1 - (reached if structural else nonzero) / cells if cells else 1.0


def _oriented(a: Any, b: Any, transposed: bool) -> tuple[Any, Any, tuple[int, int]]:
    """Both as CSR matrices, oriented so that the product is ``first^T second``, and their full rows and columns.

    Empty columns are dropped if the columns outnumber the entries, so that memory stays proportional to the entries.
    """
    first, second = ((delta_matrix(s) if isinstance(s, SparseTensor) else s).tocsr() for s in (a, b))
    if first.shape != second.shape:
        raise SourceError(f"the deltas have different shapes: {list(first.shape)} and {list(second.shape)}")
    rows, columns = first.shape
    if columns > first.nnz + second.nnz:
        kept = distinct(np.concatenate([first.indices, second.indices, [0]]))
        first, second = (_select_columns(matrix, kept) for matrix in (first, second))
    if transposed:
        return first.T.tocsr(), second.T.tocsr(), (columns, rows)
    return first, second, (rows, columns)


def _select_columns(matrix: Any, kept: Array) -> Any:
    """The columns ``kept`` (strictly increasing, including all nonempty ones) of a CSR matrix."""
    places = np.searchsorted(kept, matrix.indices)
    from scipy.sparse import csr_array

    return csr_array((matrix.data, places, matrix.indptr), shape=(matrix.shape[0], kept.size))


def _measure(
    first: Any, second: Any, *, structural: bool = True, numerical: bool = True
) -> tuple[float, int, int]:
    """Energy, nonzero and reached cells of ``first^T second``; without numba, results not requested are 0."""
    left = first.T.tocsr()
    try:
        from shira_analysis.measures.product_kernels import measure
    except ImportError:
        with np.errstate(over="ignore", invalid="ignore"):  # the caller checks
            return _measure_scipy(left, second, structural=structural, numerical=numerical)
    energy, nonzero, reached = measure(
        left.indptr, left.indices, left.data, second.indptr, second.indices, second.data, second.shape[1]
    )
    return float(energy), int(nonzero), int(reached)


def _measure_scipy(left: Any, right: Any, *, structural: bool = True, numerical: bool = True) -> tuple[float, int, int]:  # fmt: skip
    energy, nonzero, reached = 0.0, 0, 0
    ones = _ones(right)
    for start, stop in _row_ranges(_terms(left, right)):
        rows = left[start:stop]
        if numerical:
            product = rows @ right
            energy += float(product.data @ product.data)
            nonzero += int(np.count_nonzero(product.data))
        if structural:  # scipy drops zeros from a product; a product of ones has none
            reached += int(np.count_nonzero((_ones(rows) @ ones).data))
    return energy, nonzero, reached


def _energy(first: Any, second: Any) -> float:
    """``||first^T second||_F^2``, by the cheaper of two methods."""
    direct = float(np.diff(first.indptr).astype(np.float64) @ np.diff(second.indptr))
    try:
        import shira_analysis.measures.product_kernels  # noqa: F401 - only to test that numba is installed

        direct /= _FAST
    except ImportError:
        pass
    grams = sum(
        float((np.bincount(m.indices, minlength=1).astype(np.float64) ** 2).sum()) for m in (first, second)
    )
    if _GRAM * grams < direct:
        # ||A^T B||^2 = tr(A A^T B B^T), the sum of A A^T * B B^T cell by cell: fewer terms here.
        energy, size = _energy_by_grams(first, second)
        if energy >= _UNRESOLVED * size:
            return energy
    return _measure(first, second, structural=False)[0]


def _energy_by_grams(first: Any, second: Any) -> tuple[float, float]:
    """The sum of all cells of ``(first first^T) * (second second^T)``, and of their absolute values."""
    energy = size = 0.0
    turned = first.T.tocsr(), second.T.tocsr()
    terms = np.maximum(_terms(first, turned[0]), _terms(second, turned[1]))
    for start, stop in _row_ranges(terms):
        cells = (first[start:stop] @ turned[0]).multiply(second[start:stop] @ turned[1])
        energy += float(cells.sum())
        size += float(abs(cells).sum())
    return energy, size


def _terms(left: Any, right: Any) -> Array:
    """The number of products of two entries in each row of ``left @ right``: float64 ``[rows]``."""
    return np.asarray(_ones(left) @ np.diff(right.indptr).astype(np.float64))


def _row_ranges(terms: Array) -> list[tuple[int, int]]:
    """Ranges of rows with at most ``_TERMS`` terms each; a range has at least one row."""
    total = np.cumsum(terms)
    found, start = [], 0
    while start < terms.size:
        before = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, before + _TERMS, side="right")))
        found.append((start, stop))
        start = stop
    return found


def _ones(matrix: Any) -> Any:
    """The sparsity pattern: 1 at every stored entry."""
    ones = np.ones(matrix.data.size)
    from scipy.sparse import csr_array

    return csr_array((ones, matrix.indices, matrix.indptr), shape=matrix.shape)


def _energy_of_rows(matrix: Any) -> Array:
    from scipy.sparse import csr_array

    squares = csr_array((matrix.data**2, matrix.indices, matrix.indptr), shape=matrix.shape)
    return np.asarray(squares.sum(axis=1))


def _log_complement(p: Any) -> Any:
    """``log(1 - p)``; for p = 1 a finite stand-in for minus infinity, so that its product with 0 is 0."""
    return np.log1p(-np.minimum(p, 1 - np.finfo(np.float64).epsneg))


def _spectral(first: Any, second: Any, frobenius: float) -> float:
    """The largest singular value of the nonzero matrix ``first^T second``, from its products with vectors."""
    from scipy.sparse.linalg import LinearOperator, svds

    left, back = first.T.tocsr(), second.T.tocsr()
    columns = first.shape[1]
    if min(first.shape) <= _SMALL:
        # With triangular factors R1, R2 of the thin matrices, R1 R2^T is small and has the same singular values.
        if columns <= _SMALL:
            return float(np.linalg.norm((left @ second).toarray(), 2))
        factors: list[Any] = [np.linalg.qr(matrix.toarray(), mode="r") for matrix in (left, back)]
        return float(np.linalg.norm(factors[0] @ factors[1].T, 2))
    # Scaled to a norm near 1: ARPACK's tolerance is not relative where squared values are small.
    operator = LinearOperator(
        (columns, columns),
        dtype=np.float64,
        matvec=lambda x: left @ (second @ x) / frobenius,
        rmatvec=lambda x: back @ (first @ x) / frobenius,
    )
    start = np.random.default_rng(0).standard_normal(columns)
    values = svds(
        operator, k=1, tol=_SPECTRAL / 10, v0=start, maxiter=100 * columns, return_singular_vectors=False
    )
    return float(values[0]) * frobenius
