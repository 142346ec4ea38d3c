"""Proven lower and upper bounds of the rank of a sparse matrix; where they are equal, the rank is exact.

*Upper bound*: the structural rank, the largest number of entries no two of which share a row or a column. No values at these
positions can give a higher rank.

*Lower bound*: the rank modulo a prime of a square matrix of that size, *folded* from the exact matrix A: every row and column
of the matching keeps its own position; every other one is multiplied by a random number and added to one of these. The result
is L A R for some L and R, so its rank is at most A's. Elimination is dense: a matrix of 4096 rows takes 4096 x 4096 numbers,
however many columns it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_analysis.measures.deltas import without_empty
from shira_analysis.measures.modular import PRIMES, Int64s, rank_modulo

LARGEST = 1 << 14  # side of the largest elimination: 4 GB


@dataclass(frozen=True)
class Bounds:
    """The exact rank is at least ``lower`` and at most ``upper``.

    Attributes:
        lower: the lower bound; 0 if the matrix was too large for elimination.
        upper: the upper bound.
        primes: the primes tried for ``lower``; empty if none was needed.
    """

    lower: int
    upper: int
    primes: tuple[int, ...] = ()

    @property
    def exact(self) -> int | None:
        """The rank, if the bounds prove it."""
        return self.lower if self.lower == self.upper else None


def bounds_of(matrix: Any, images: Callable[[int], Int64s], *, primes: int = len(PRIMES)) -> Bounds:
    """Bounds of the rank of an exact matrix.

    Args:
        matrix: a ``csr_array`` with the nonzero positions of the exact matrix, without explicit zeros; its values are ignored.
        images: maps a prime to the exact matrix modulo that prime: int64 ``[nnz]``, in the order of ``matrix.data``.
        primes: how many primes to try, at most, until the bounds are equal.

    Raises:
        SourceError: scipy or python-flint is missing.
    """
    from scipy.sparse import csgraph

    pattern = without_empty(matrix)  # the matching wants 32-bit indices
    if not pattern.nnz:
        return Bounds(0, 0)
    rows, columns = pattern.shape
    row, column = np.repeat(np.arange(rows), np.diff(pattern.indptr)), pattern.indices
    partner = np.asarray(csgraph.maximum_bipartite_matching(pattern, perm_type="column"), np.int64)
    matched = np.flatnonzero(partner >= 0)
    upper = int(matched.size)
    if upper > LARGEST:
        return Bounds(0, upper)
    lower, tried = 0, []
    for prime in PRIMES[:primes]:
        tried.append(prime)
        random = np.random.default_rng(prime)  # the same folds every time
        row_place, row_factor = _fold(rows, matched, random, prime)
        column_place, column_factor = _fold(columns, partner[matched], random, prime)
        values = images(prime) * row_factor[row] % prime * column_factor[column] % prime
        places, where = np.unique(row_place[row] * upper + column_place[column], return_inverse=True)
        sums = np.zeros(places.size, np.int64)
        np.add.at(sums, where, values)  # each below 2^31, so 2^32 of them fit
        lower = max(lower, rank_modulo(places // upper, places % upper, sums % prime, upper, prime))
        if lower == upper:
            break
    return Bounds(lower, upper, tuple(tried))


def _fold(count: int, own: Int64s, random: np.random.Generator, prime: int) -> tuple[Int64s, Int64s]:
    """A position and a factor for each of ``count`` rows or columns; those in ``own`` keep a position of their own, with factor 1."""
    place = random.integers(0, own.size, count)
    factor = random.integers(1, prime, count)
    place[own] = np.arange(own.size)
    factor[own] = 1
    return place, factor


def of_product(left: Bounds, right: Bounds, inner: int) -> Bounds:
    """Bounds of the rank of ``left @ right`` with inner dimension ``inner`` (Sylvester's inequality)."""
    return Bounds(
        max(0, left.lower + right.lower - inner),
        min(left.upper, right.upper),
        tuple(dict.fromkeys((*left.primes, *right.primes))),
    )


def of_kronecker(left: Bounds, right: Bounds) -> Bounds:
    """Bounds of the rank of a Kronecker product: the product of the ranks."""
    primes = tuple(dict.fromkeys((*left.primes, *right.primes)))
    return Bounds(left.lower * right.lower, left.upper * right.upper, primes)
