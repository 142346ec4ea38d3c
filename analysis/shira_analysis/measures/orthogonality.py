"""AWOM and AWOR, the paper's measures of how orthogonal two adapters' weights are, and what chance alone would give.

For the deltas ``A1, A2`` of one weight, ``[rows, columns]`` in the matrix view:

* ``AWOM = ||A1^T A2||``: how large the product is. By default in the Frobenius norm: the paper writes the l2 norm, but the
  axes of its figures 4 and 9 (about 10^2 at dimension 128, just under 10^6 at 8192, for dense normal entries) are those of
  the Frobenius norm, ``m^1.5`` (7.4e5 at 8192), and not of the spectral norm, about ``2.6 m`` (2.1e4).
* ``AWOR = 1 - ||A1^T A2||_0 / columns^2``: the share of zeros in the product.

**Which product.** A layer computes ``y = W x`` with ``W`` of ``[out, in]`` (Linear, convolutions): the product that meets is
``<A1 x, A2 x> = x^T (A1^T A2) x``, so ``A1^T A2`` is zero if and only if any output of the one is orthogonal to any of
the other. For inputs of independent normal features, the trace of ``A1^T A2`` is the mean of
that inner product, and its Frobenius norm says how far it scatters. The transposed product ``A1 A2^T`` is zero if the
adapters *read* orthogonal directions of the input; its trace is the same, ``<A1, A2>``. A weight that is stored as
``[in, out]`` (GPT-2's Conv1D, embeddings) has the two in exchanged roles: there ask for ``transposed=True``.

**Which zeros.** *Numerical*: a cell whose value, computed in float64, is not 0. *Structural*: a cell that at least one pair
of entries reaches, whether or not the terms cancel; entries are those that the matrices store, so an explicit zero counts.
Numerical zeros are never fewer. Both are all but equal for trained values, which cancel exactly only by rare chance.

No dense product is formed: a row at a time with numba (the extra ``fast``), else some rows at a time with scipy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from shira_analysis.measures.additive import Additive, attributes
from shira_analysis.measures.deltas import delta_matrix
from shira_analysis.measures.overlap import finite
from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.tensors import SparseTensor

_TERMS = 1 << 22  # of a product at a time: about 150 MB with scipy
_FAST = 2.5  # how many times as fast a product is with numba
_GRAM = 3  # how many times as long a term takes in the product of two sparse products
_UNRESOLVED = 1e-6  # of the terms' sum: where a sum that cancels more than this is computed in another way
_SPECTRAL = 1e-6  # relative, what the spectral norm is good to
_SMALL = 32  # rows or columns up to which a product is small enough for LAPACK

Norm = Literal["fro", "spectral"]


@dataclass(frozen=True)
class Orthogonality(Additive):
    """The product of two adapters' deltas of one weight, or of several: ``+`` joins them as blocks of one matrix.

    Attributes:
        cells: of the product.
        nonzero: cells whose value in float64 is not 0.
        reached: cells that entries of both reach; at least ``nonzero``.
        energy: the sum of the squares of all cells.
        reached_if_uniform: ``reached`` to expect of two uniform masks of these densities that know nothing of each other.
        reached_if_independent: the same, of masks that have the entries of each row (column, if transposed) that these have.
        energy_if_independent: ``energy`` to expect if the values' signs know nothing of each other.
        spectral: the largest singular value of the product; None if it was not asked for.
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
        """The share of cells that nothing reaches."""
        return self._zeros(self.reached)

    @property
    def awor_if_uniform(self) -> float | None:
        """The structural AWOR to expect of independent uniform masks: ``(1 - p1 p2)^rows`` for one weight."""
        return self._zeros(self.reached_if_uniform)

    @property
    def awor_if_independent(self) -> float | None:
        """The same with the rows' own numbers of entries: the product of ``1 - p1 p2`` over the rows."""
        return self._zeros(self.reached_if_independent)

    @property
    def awom_if_independent(self) -> float:
        """The AWOM to expect (root of the mean square) of values with independent random signs."""
        return math.sqrt(self.energy_if_independent)

    def _zeros(self, others: float) -> float | None:
        return 1 - others / self.cells if self.cells else None

    def _add(self, field: str, a: Any, b: Any) -> Any:
        if field != "spectral":
            return a + b
        known = [one for one in (a, b) if one is not None]
        return max(known) if known else None  # blocks of one matrix

    def as_json(self) -> dict[str, Any]:
        """All measures; what is undefined or unknown is null."""
        return attributes(
            self, "cells", "nonzero", "reached", "awom", "awom_spectral=spectral", "awor", "awor_structural",
            "awor_if_uniform", "awor_if_independent", "awom_if_independent",
        )  # fmt: skip


def orthogonality(a: Any, b: Any, *, transposed: bool = False, spectral: bool = False) -> Orthogonality:
    """All measures of ``A1^T A2``, or of ``A1 A2^T``; see the module.

    Args:
        a: the first adapter's :class:`SparseTensor`, or its deltas as a sparse matrix ``[rows, columns]`` in float64.
        b: the second's, of the same shape.
        transposed: measure ``A1 A2^T``, ``[rows, rows]``, in place of ``A1^T A2``, ``[columns, columns]``.
        spectral: the spectral norm as well.

    Raises:
        SourceError: the shapes differ, a mask, a delta that is not finite, or no scipy.
        BaseRequired: target values without those of the base.
    """
    first, second, (rows, columns) = _contracted(a, b, transposed)
    cells = columns * columns
    energy, nonzero, reached = _measure(first, second)
    finite(energy, "the energy of the product of the deltas")
    counts = [np.diff(matrix.indptr) / max(1, columns) for matrix in (first, second)]
    each = [float(matrix.nnz) / max(1, rows * columns) for matrix in (first, second)]
    found = np.dot(*(_energy_of_rows(matrix) for matrix in (first, second)))
    largest = (_spectral(first, second, math.sqrt(energy)) if energy else 0.0) if spectral else None
    return Orthogonality(
        cells, nonzero, reached, energy,
        -cells * math.expm1(rows * _log_of_rest(each[0] * each[1])),
        -cells * math.expm1(float(np.sum(_log_of_rest(counts[0] * counts[1])))),
        float(found), largest,
    )  # fmt: skip


def awom(a: Any, b: Any, norm: Norm = "fro", *, transposed: bool = False) -> float:
    """``||A1^T A2||``; see the module, and :func:`orthogonality` for the arguments.

    Args:
        a: the first adapter's tensor or deltas.
        b: the second's.
        norm: ``"fro"``, or ``"spectral"``, which is good to one part in a million.
        transposed: of ``A1 A2^T``.

    Raises:
        SourceError: another norm, and see :func:`orthogonality`.
        BaseRequired: target values without those of the base.
    """
    if norm not in ("fro", "spectral"):
        raise SourceError(f"the norm is 'fro' or 'spectral', not {norm!r}")
    first, second, _ = _contracted(a, b, transposed)
    energy = finite(_energy(first, second), "the energy of the product of the deltas")
    if norm == "fro" or not energy:
        return math.sqrt(energy)
    return _spectral(first, second, math.sqrt(energy))


def awor(a: Any, b: Any, *, transposed: bool = False, structural: bool = False) -> float:
    """``1 - ||A1^T A2||_0 / columns^2``; see the module, and :func:`orthogonality` for the arguments. 1 without cells.

    Args:
        a: the first adapter's tensor or deltas.
        b: the second's.
        transposed: of ``A1 A2^T``.
        structural: count the cells that entries of both reach, whether or not the terms cancel.

    Raises:
        SourceError: see :func:`orthogonality`.
        BaseRequired: target values without those of the base.
    """
    first, second, (_, columns) = _contracted(a, b, transposed)
    _, nonzero, reached = _measure(first, second, structural=structural, numerical=not structural)
    cells = columns**2
    return 1 - (reached if structural else nonzero) / cells if cells else 1.0


def _contracted(a: Any, b: Any, transposed: bool) -> tuple[Any, Any, tuple[int, int]]:
    """Both as CSR matrices, turned so that the product wanted is the first transposed times the second.

    Also their rows and columns; the matrices have fewer where most columns of the weight are empty, since what is allocated
    must not be more than what the files hold.
    """
    first, second = ((delta_matrix(s) if isinstance(s, SparseTensor) else s).tocsr() for s in (a, b))
    if first.shape != second.shape:
        raise SourceError(f"deltas of shapes {list(first.shape)} and {list(second.shape)} are of no common weight")
    rows, columns = first.shape
    if columns > first.nnz + second.nnz:
        kept = np.unique(np.concatenate([first.indices, second.indices, [0]]))
        first, second = (_of_columns(matrix, kept) for matrix in (first, second))
    if transposed:
        return first.T.tocsr(), second.T.tocsr(), (columns, rows)
    return first, second, (rows, columns)


def _of_columns(matrix: Any, kept: Array) -> Any:
    """The columns ``kept`` (rising; all that have entries are among them) of a CSR matrix."""
    places = np.searchsorted(kept, matrix.indices)
    from scipy.sparse import csr_array

    return csr_array((matrix.data, places, matrix.indptr), shape=(matrix.shape[0], kept.size))


def _measure(
    first: Any, second: Any, *, structural: bool = True, numerical: bool = True
) -> tuple[float, int, int]:
    """Energy, non-zero and reached cells of ``first^T second``; without numba, only what is asked for is not 0."""
    left = first.T.tocsr()
    try:
        from shira_analysis.measures.product_kernels import measure
    except ImportError:
        with np.errstate(over="ignore", invalid="ignore"):  # told by whoever asks
            return _measure_plainly(left, second, structural=structural, numerical=numerical)
    energy, nonzero, reached = measure(
        left.indptr, left.indices, left.data, second.indptr, second.indices, second.data, second.shape[1]
    )
    return float(energy), int(nonzero), int(reached)


def _measure_plainly(left: Any, right: Any, *, structural: bool = True, numerical: bool = True) -> tuple[float, int, int]:  # fmt: skip
    energy, nonzero, reached = 0.0, 0, 0
    ones = _ones(right)
    for start, stop in _pieces(_terms(left, right)):
        rows = left[start:stop]
        if numerical:
            product = rows @ right
            energy += float(product.data @ product.data)
            nonzero += int(np.count_nonzero(product.data))
        if structural:  # scipy leaves zeros out of a product: of ones there are none
            reached += int(np.count_nonzero((_ones(rows) @ ones).data))
    return energy, nonzero, reached


def _energy(first: Any, second: Any) -> float:
    """``||first^T second||_F^2``, in the cheaper of two ways."""
    direct = float(np.diff(first.indptr).astype(np.float64) @ np.diff(second.indptr))
    try:
        import shira_analysis.measures.product_kernels  # noqa: F401 - only whether it is there

        direct /= _FAST
    except ImportError:
        pass
    grams = sum(
        float((np.bincount(m.indices, minlength=1).astype(np.float64) ** 2).sum()) for m in (first, second)
    )
    if _GRAM * grams < direct:
        # ||A^T B||^2 = tr(A A^T B B^T): the sum of the cells of A A^T times those of B B^T, which are fewer here.
        energy, size = _energy_by_grams(first, second)
        if energy >= _UNRESOLVED * size:
            return energy
    return _measure(first, second, structural=False)[0]


def _energy_by_grams(first: Any, second: Any) -> tuple[float, float]:
    """The sum over all cells of ``(first first^T) * (second second^T)``, and that of their sizes."""
    energy = size = 0.0
    turned = first.T.tocsr(), second.T.tocsr()
    terms = np.maximum(_terms(first, turned[0]), _terms(second, turned[1]))
    for start, stop in _pieces(terms):
        cells = (first[start:stop] @ turned[0]).multiply(second[start:stop] @ turned[1])
        energy += float(cells.sum())
        size += float(abs(cells).sum())
    return energy, size


def _terms(left: Any, right: Any) -> Array:
    """How many products of two entries each row of ``left @ right`` sums up: float64 ``[rows]``."""
    return np.asarray(_ones(left) @ np.diff(right.indptr).astype(np.float64))


def _pieces(terms: Array) -> list[tuple[int, int]]:
    """Ranges of rows, of no more than so many terms each, or of one row."""
    total = np.cumsum(terms)
    found, start = [], 0
    while start < terms.size:
        before = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, before + _TERMS, side="right")))
        found.append((start, stop))
        start = stop
    return found


def _ones(matrix: Any) -> Any:
    """The pattern: 1 at every stored entry."""
    ones = np.ones(matrix.data.size)
    from scipy.sparse import csr_array

    return csr_array((ones, matrix.indices, matrix.indptr), shape=matrix.shape)


def _energy_of_rows(matrix: Any) -> Array:
    from scipy.sparse import csr_array

    squares = csr_array((matrix.data**2, matrix.indices, matrix.indptr), shape=matrix.shape)
    return np.asarray(squares.sum(axis=1))


def _log_of_rest(p: Any) -> Any:
    """``log(1 - p)``, for a p of 1 a number that stands for minus infinity and survives a product with 0."""
    return np.log1p(-np.minimum(p, 1 - np.finfo(np.float64).epsneg))


def _spectral(first: Any, second: Any, frobenius: float) -> float:
    """The largest singular value of ``first^T second``, from its products with vectors; the matrix is not zero."""
    from scipy.sparse.linalg import LinearOperator, svds

    left, back = first.T.tocsr(), second.T.tocsr()
    columns = first.shape[1]
    if min(first.shape) <= _SMALL:
        # As R1 R2^T of the triangular factors of what is thin, it is no larger than that, whatever it is multiplied by.
        if columns <= _SMALL:
            return float(np.linalg.norm((left @ second).toarray(), 2))
        factors: list[Any] = [np.linalg.qr(matrix.toarray(), mode="r") for matrix in (left, back)]
        return float(np.linalg.norm(factors[0] @ factors[1].T, 2))
    # Of a norm near 1, since ARPACK's tolerance is not relative where squared values are small.
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
