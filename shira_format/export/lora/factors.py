"""The best factors of a few ranks for a sparse matrix, and exactly how far they are from it.

By Eckart and Young no matrix of rank r is nearer to S than its r largest singular triplets, in the spectral and in the
Frobenius norm, and the distances are

    ||S - B A||_2   = sigma_{r+1}
    ||S - B A||_F^2 = sum of sigma_i^2 over i > r

Lemma 4.2 of the paper prints the bound "sigma^2_{r+1}, the (r+1)-th singular value" and names no norm. That is not true as it
stands: sigma_{r+1} itself bounds the spectral norm, its square the square of that norm, and the Frobenius norm needs the
sum. Both true bounds stand beside what was measured; what was measured is a little larger, since factors are float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.export.lora.svd import Method, Triplets, largest, norm, reaching

_TILE = 1 << 20  # elements of the difference that are in memory at a time
_DENSE = 1 << 16  # elements up to which the difference is looked at whole
_EPSILON = float(np.finfo(np.float64).eps)
_HALF_ULP = 2.0**-24  # relative error of a number rounded to float32


@dataclass(frozen=True)
class Factors:
    """``up @ down`` is near a matrix S ``[rows, columns]``.

    Attributes:
        up: ``[rows, rank]`` float32.
        down: ``[rank, columns]`` float32; singular values are shared evenly between the two.
        full_rank: the smaller number of rows and columns that have an entry: no more ranks are of use.
        norm: Frobenius norm of S.
        error: Frobenius norm of S - up @ down, of the float32 factors, product and difference in float64.
        spectral_error: its spectral norm, likewise, to 1e-4 and from below.
        bound: sqrt of the sum of sigma_i^2 over i > rank, which ``error`` would be without rounding. From a difference,
            ``norm``^2 minus the squares that are kept, so that what is below about 3e-8 of ``norm`` is noise.
        spectral_bound: sigma_{rank+1}; 0 if there is none.
        energy_kept: the share of the kept squares in ``norm``^2.
        method: how the singular triplets were computed.
    """

    up: Array
    down: Array
    full_rank: int
    norm: float
    error: float
    spectral_error: float
    bound: float
    spectral_bound: float
    energy_kept: float
    method: Method

    @property
    def rank(self) -> int:
        """The rank of the factors."""
        return int(self.down.shape[0])


def check_amount(rank: int | None, energy: float | None) -> None:
    """Check how much is to be kept.

    Raises:
        ValueError: not exactly one of the two, or one that is out of range.
    """
    if (rank is None) == (energy is None):
        raise ValueError("give either rank or energy")
    if rank is not None and rank < 1:
        raise ValueError(f"rank {rank} is not positive")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy {energy} is not in (0, 1]")


def best_factors(
    shape: tuple[int, int],
    indices: Array,
    values: Array,
    *,
    rank: int | None = None,
    energy: float | None = None,
    method: Method | None = None,
) -> Factors:
    """The best factors of at most ``rank`` ranks, or the fewest ranks that keep a share of the sum of squares.

    The rank is lower than ``rank`` where the matrix has no more. Sparse memory, but for the factors, the smaller square
    matrix of the shorter side if more than a few ranks are asked for, and one tile; see :mod:`shira_format.export.lora.svd`. The
    same input gives the same bits: start vectors are fixed, and of each pair of vectors the largest element of the left one, the
    first of them if there are several, is positive.

    Args:
        shape: ``(rows, columns)`` of the matrix.
        indices: int64 ``[nnz]``, flat row-major, strictly increasing.
        values: ``[nnz]`` floats; finite, not all zero.
        rank: at least 1. Either this or ``energy``.
        energy: the share to keep, in (0, 1].
        method: of the singular value decomposition; by default the cheapest one.

    Raises:
        ValueError: neither or both of ``rank`` and ``energy``, or one that cannot be meant, or values of zeros or not finite.
        SourceError: the factors overflow float32.
    """
    check_amount(rank, energy)
    pattern = _Compressed(shape, indices, values)
    for attempt in (method, "gram"):
        triplets, kept = _triplets(pattern.matrix, rank, energy, attempt)
        found = _factors(pattern, triplets, kept)
        # From one start, Lanczos may see a singular value that occurs several times only once. Then the largest one that
        # remains is larger than the next one that it found.
        rounding = _HALF_ULP * 4 * math.sqrt(triplets.values[0] * triplets.values.sum()) * pattern.scale
        if triplets.method != "lanczos" or found.spectral_error <= found.spectral_bound * (1 + 1e-9) + rounding:
            break
    return found


class _Compressed:
    """A sparse matrix without its empty rows and columns, scaled by a power of two so that the largest entry is near 1."""

    def __init__(self, shape: tuple[int, int], indices: Array, values: Array) -> None:
        from scipy import sparse

        self.shape = shape
        kept = values != 0
        values = values[kept].astype(np.float64)
        if not values.size or not np.isfinite(values).all():
            raise ValueError("values are all zero, or not finite")
        rows, columns = np.divmod(indices[kept], shape[1])
        self.rows, row = np.unique(rows, return_inverse=True)
        self.columns, column = np.unique(columns, return_inverse=True)
        self.scale = math.ldexp(1.0, math.frexp(float(np.abs(values).max()))[1] - 1)
        size = (self.rows.size, self.columns.size)
        self.matrix: Any = sparse.csr_matrix((values / self.scale, (row, column)), shape=size)


def _triplets(matrix: Any, rank: int | None, energy: float | None, method: Any) -> tuple[Triplets, int]:
    """The triplets, with the next one if there is any, and how many of them to keep."""
    if energy is not None:
        triplets, kept = reaching(matrix, energy, method)
    else:
        assert rank is not None
        triplets = largest(matrix, min(rank, *matrix.shape) + 1, method)
        kept = min(rank, triplets.values.size)
    # Beyond the rank there is only rounding noise.
    noise = max(matrix.shape) * _EPSILON * triplets.values[0]
    return triplets, max(1, min(kept, int(np.count_nonzero(triplets.values > noise))))


def _factors(pattern: _Compressed, triplets: Triplets, kept: int) -> Factors:
    matrix, scale = pattern.matrix, pattern.scale
    values = triplets.values[:kept]
    left, right = triplets.left[:, :kept], triplets.right[:, :kept]
    size = np.abs(left)
    # Equal ones may differ by rounding: the first of those.
    first = left[(size >= size.max(axis=0) * (1 - 1e-6)).argmax(axis=0), np.arange(kept)]
    signed = np.where(first < 0, -1.0, 1.0) * np.sqrt(values)
    half = math.sqrt(scale)
    with np.errstate(over="ignore", under="ignore"):
        up = (left * (signed * half)).astype(np.float32)
        down = (right * (signed * half)).T.astype(np.float32)
    if not (np.isfinite(up).all() and np.isfinite(down).all()):
        raise SourceError("its factors overflow float32")
    difference = _Difference(matrix, up.astype(np.float64) / half, down.astype(np.float64) / half)
    squares = float(matrix.data @ matrix.data)
    held = float(values @ values)
    full_up, full_down = (
        _spread(up, pattern.rows, pattern.shape[0]),
        _spread(down.T, pattern.columns, pattern.shape[1]),
    )
    return Factors(
        full_up,
        np.ascontiguousarray(full_down.T),
        min(matrix.shape),
        math.sqrt(squares) * scale,
        math.sqrt(difference.squares()) * scale,
        difference.norm() * scale,
        math.sqrt(max(0.0, squares - held)) * scale,
        float(triplets.values[kept]) * scale if kept < triplets.values.size else 0.0,
        min(1.0, held / squares),
        triplets.method,
    )  # fmt: skip


def _spread(factor: Array, places: Array, size: int) -> Array:
    """Rows of a factor at their places among rows of zeros."""
    whole = np.zeros((size, factor.shape[1]), factor.dtype)
    whole[places] = factor
    return whole


class _Difference:
    """A sparse matrix minus a product of factors, computed tile by tile; transposed if it is wide."""

    def __init__(self, matrix: Any, up: Array, down: Array) -> None:
        wide = matrix.shape[0] < matrix.shape[1]
        self._matrix, self._up, self._down = (matrix.T.tocsr(), down.T, up.T) if wide else (matrix, up, down)

    def squares(self) -> float:
        """The sum of squares of all elements."""
        return math.fsum(float(np.dot(tile.reshape(-1), tile.reshape(-1))) for tile in self._tiles())

    def norm(self) -> float:
        """The spectral norm."""
        rows, side = self._matrix.shape
        transposed = self._matrix.T
        if rows * side > _DENSE:
            found = norm(
                lambda x: self._matrix @ x - self._up @ (self._down @ x),
                lambda y: transposed @ y - self._down.T @ (self._up.T @ y),
                side,
            )
            if found is not None:
                return found
        from scipy import linalg

        square = np.zeros((side, side))
        for tile in self._tiles():
            square += tile.T @ tile
        top = linalg.eigh(square, eigvals_only=True, subset_by_index=[side - 1, side - 1], overwrite_a=True)
        return math.sqrt(max(0.0, float(top[0])))

    def _tiles(self) -> Iterator[Array]:
        matrix = self._matrix
        rows, columns = matrix.shape
        step = max(1, _TILE // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            tile = self._up[start:stop] @ self._down
            first, last = matrix.indptr[start], matrix.indptr[stop]
            row = np.repeat(np.arange(stop - start), np.diff(matrix.indptr[start : stop + 1]))
            tile[row, matrix.indices[first:last]] -= matrix.data[first:last]
            yield tile
