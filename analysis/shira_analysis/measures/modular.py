"""Exact linear algebra on floats: a finite float is an integer times a power of two, so it has an image modulo any odd prime.

The image of a sum is the sum of the images, and a determinant that is not 0 modulo a prime is not 0. So the rank modulo a prime
is a lower bound of the rank of the exact matrix, whatever rounding its entries would suffer in floating point; it is less only
if the prime divides all the largest minors, one chance in two thousand million for a matrix that was not made for it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from shira_format._core.arrays import Array
from shira_format._core.optional import optional_import

Int64s = npt.NDArray[np.int64]

# Below 2^31, so that products fit 64 bits. (p - 1) / 2 is prime too, so that no small power of two is 1: modulo the prime
# 2^31 - 1, which is nearer at hand, 2^31 would be 1, and weights that are powers of two would often coincide.
PRIMES = (2147483579, 2147483123, 2147482763)

_LEAST = -1074 - 52  # the exponent of the last bit of the mantissa's 53 that the smallest float64 may have
_MOST = 1024 - 53


@cache
def _powers(prime: int) -> Int64s:
    return np.array([pow(2, k, prime) for k in range(_LEAST, _MOST + 1)], np.int64)


def residues(values: Array, prime: int) -> Int64s:
    """The images of finite floats of any dtype modulo an odd ``prime`` below 2^31: int64, 0 to prime - 1."""
    mantissa, exponent = np.frexp(values.astype(np.float64))  # exact: all dtypes of checkpoints fit
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    return np.asarray(whole % prime * _powers(prime)[exponent.astype(np.int64) - 53 - _LEAST] % prime, np.int64)


def rank_modulo(rows: Int64s, columns: Int64s, values: Int64s, size: int, prime: int) -> int:
    """The rank modulo ``prime`` of a ``[size, size]`` matrix with ``values`` at ``rows`` and ``columns``, others 0.

    Takes 16 bytes for each of ``size`` times ``size`` elements, on one core.

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
