"""Entries of a product of two matrices, compiled by numba; imported only if numba is installed.

For ``outer[T, m]`` and ``inner[T, n]`` entry ``(i, j)`` of ``outer^T inner`` is the scalar product of two columns. A part of the
tokens is transposed at a time, so that columns become rows, and stay in the second-level cache for all entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from shira_format.training.transposing import SIDE, transpose

TOKENS = 128  # of a part, a multiple of SIDE
_ROWS = 256  # of the transposed outer factor, which are used up before the next ones


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})  # type: ignore[untyped-decorator]
def _products(outer: Any, inner: Any, first: int, starts: Any, places: Any, out: Any) -> None:
    for row in range(outer.shape[0]):
        one = outer[row]
        for entry in range(starts[first + row], starts[first + row + 1]):
            other = inner[places[entry]]
            total = np.float32(0)
            for token in range(TOKENS):
                total += one[token] * other[token]
            out[entry] = total


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _transposed(matrix: Any, first: int, low: int, high: int, out: Any) -> None:
    """``out[j, t] = matrix[first + t, low + j]`` for columns ``low`` to ``high``, as the bits of float32."""
    width = matrix.shape[1]
    whole = low + (high - low) // SIDE * SIDE
    for column in range(low, whole, SIDE):
        for token in range(0, TOKENS, SIDE):
            transpose(
                matrix, (first + token) * width + column, width, out, (column - low) * TOKENS + token, TOKENS
            )
    shift = np.uint32(16 if matrix.itemsize == 2 else 0)
    for column in range(whole, high):
        for token in range(TOKENS):
            out[column - low, token] = np.uint32(matrix[first + token, column]) << shift


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def products(outer: Any, inner: Any, first: int, starts: Any, places: Any, out: Any) -> None:
    """The sums over the tokens ``first`` to ``first + TOKENS``.

    Args:
        outer: ``[T, m]``, the bits of float32 as uint32 or of bfloat16 as uint16; contiguous.
        inner: ``[T, n]``, likewise, of the same dtype.
        first: a row of both, from which on there are :data:`TOKENS` or more.
        starts: ``[m + 1]``, where the entries of each row start.
        places: ``[K]``, the columns of the entries.
        out: ``[K]`` float32, which gets the sums.
    """
    columns = np.empty((inner.shape[1], TOKENS), np.uint32)
    rows = np.empty((_ROWS, TOKENS), np.uint32)
    _transposed(inner, first, 0, inner.shape[1], columns)
    for low in range(0, outer.shape[1], _ROWS):
        high = min(low + _ROWS, outer.shape[1])
        _transposed(outer, first, low, high, rows)
        _products(rows[: high - low].view(np.float32), columns.view(np.float32), low, starts, places, out)


def is_supported() -> bool:
    """Whether this numba's LLVM compiles it, and right."""
    factor = np.arange(TOKENS * 17, dtype=np.float32).reshape(TOKENS, 17) % 7
    starts, places = np.arange(18, dtype=np.int32), np.arange(17, dtype=np.int32)[::-1].copy()
    expected = np.einsum("ti,ti->i", factor, factor[:, ::-1])
    found = np.empty(17, np.float32)
    try:
        for bits in (factor.view(np.uint32), (factor.view(np.uint32) >> 16).astype(np.uint16)):
            found[:] = 0
            products(bits, bits, 0, starts, places, found)
            if not np.array_equal(expected, found):
                return False
    except Exception:  # other versions of LLVM raise different errors
        return False
    return True
