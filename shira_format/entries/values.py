"""Values and deltas in the type in which they are computed (spec, section 4.1)."""

from __future__ import annotations

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.dtypes import upcast, working_dtype


def wide(values: Array) -> Array:
    """``values`` in their working dtype (float32, or float64 for float64 values), exactly."""
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return upcast(values, np.empty(values.shape, working_dtype(values.dtype)))


def difference(target: Array, base: Array) -> Array:
    """``target - base`` in their working dtype."""
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are values like any other
        return np.asarray(wide(target) - wide(base))
