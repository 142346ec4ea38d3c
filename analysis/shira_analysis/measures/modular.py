"""Exact linear algebra on floats: a finite float is an integer times a power of two, so it has a residue modulo any odd prime.

Residues of sums are sums of residues, and a determinant that is nonzero modulo a prime is nonzero. So the rank modulo a prime
is a lower bound of the exact rank, free of floating-point rounding; it is lower only if the prime divides all the largest
minors, about one chance in two billion unless the matrix was built for it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from shira_format._core.arrays import Array
from shira_format._core.optional import optional_import

Int64s = npt.NDArray[np.int64]

# Below 2^31, so products fit 64 bits. (p - 1) / 2 is prime too, so no small power of two is 1: modulo the more obvious prime
# 2^31 - 1, 2^31 would be 1, and weights that are powers of two would often coincide.
PRIMES = (2147483579, 2147483123, 2147482763)

_LEAST = -1074 - 52  # exponent of the lowest of the 53 mantissa bits of the smallest float64
_MOST = 1024 - 53


@cache
def _powers(prime: int) -> Int64s:
    return np.array([pow(2, k, prime) for k in range(_LEAST, _MOST + 1)], np.int64)


def residues(values: Array, prime: int) -> Int64s:
    """The residues of finite floats of any dtype modulo an odd ``prime`` below 2^31: int64, 0 to prime - 1."""
    mantissa, exponent = np.frexp(values.astype(np.float64))  # exact for every checkpoint dtype
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    return np.asarray(whole % prime * _powers(prime)[exponent.astype(np.int64) - 53 - _LEAST] % prime, np.int64)


def rank_modulo(rows: Int64s, columns: Int64s, values: Int64s, size: int, prime: int) -> int:
    """The rank modulo ``prime`` of a ``[size, size]`` matrix with ``values`` at ``rows`` and ``columns``, 0 elsewhere.

    Takes ``16 * size * size`` bytes and one core.

    Raises:
        SourceError: python-flint is missing.
    """
    matrix = _flint().nmod_mat(size, size, prime)
    for row, column, value in zip(rows.tolist(), columns.tolist(), values.tolist(), strict=True):
        matrix[row, column] = value
    return int(matrix.rank())


def _flint() -> Any:
    with optional_import("exact ranks need python-flint", "analysis"):
        import flint
    return flint
