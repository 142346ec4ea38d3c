"""From one float type to another: rounding down to a narrower one, and up to a wider one exactly."""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from shira_format._core.arrays import Array


def round_to(array: Array, dtype: np.dtype[Any]) -> Array:
    """``array`` in ``dtype``, rounded once to nearest, ties to even; overflow becomes Inf or NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        if array.dtype == np.float64 and dtype not in (np.float64, np.float32, np.float16):
            # ml_dtypes converts through float32, which rounds twice. Rounding to odd in float32 makes no value look like a tie.
            near = array.astype(np.float32)
            pattern = near.view(np.uint32)
            pattern -= np.abs(near) > np.abs(array)
            pattern |= (near != array) & ~np.isnan(array)
            array = near
        return array.astype(dtype, copy=False)


def upcast(array: Array, out: Array) -> Array:
    """Write ``array`` to ``out``, of a wider float dtype, exactly; several times faster than ``astype``. Returns ``out``."""
    if array.dtype == ml_dtypes.bfloat16 and out.dtype == np.float32:
        upper = out.view(np.uint32)
        upper[...] = array.view(np.uint16)
        np.left_shift(upper, 16, out=upper)
    elif array.dtype.itemsize == 1:
        np.take(_table(array.dtype, out.dtype), array.view(np.uint8), out=out, mode="clip")
    else:
        out[...] = array
    return out


@cache
def _table(narrow: np.dtype[Any], wide: np.dtype[Any]) -> Array:
    return np.arange(256, dtype=np.uint8).view(narrow).astype(wide)
