"""Rounding values to the dtype of a weight, once."""

from __future__ import annotations

from typing import Any

import numpy as np

from shira_format._core.arrays import Array


def round_to(array: Array, dtype: np.dtype[Any]) -> Array:
    """``array`` in ``dtype``, each value rounded once, to nearest, ties to even; what overflows becomes Inf or NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        if array.dtype == np.float64 and dtype not in (np.float64, np.float32, np.float16):
            # ml_dtypes goes through float32, and would round twice. Rounded to odd there, no value can look like a tie.
            near = array.astype(np.float32)
            pattern = near.view(np.uint32)
            pattern -= np.abs(near) > np.abs(array)
            pattern |= (near != array) & ~np.isnan(array)
            array = near
        return array.astype(dtype, copy=False)
