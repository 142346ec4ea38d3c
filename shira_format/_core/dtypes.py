"""The dtypes of checkpoints, by their safetensors names, as numpy dtypes; rounding to a narrower one, and up to a wider one.

``ml_dtypes`` adds bfloat16 and the 8-bit floats, which numpy lacks.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from shira_format._core.arrays import Array

FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
INTEGERS: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
DTYPES: dict[str, np.dtype[Any]] = {**FLOATS, **INTEGERS}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The safetensors name of ``dtype``, for example ``"BF16"``.

    Raises:
        TypeError: it has none.
    """
    try:
        return _NAMES[dtype]
    except KeyError:
        raise TypeError(f"dtype {dtype} has no safetensors name; known: {', '.join(DTYPES)}") from None


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a sparse tensor can have ``dtype``."""
    return dtype in FLOATS.values()


def working_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which deltas of ``dtype`` are computed: float64 for float64, else float32 (spec, 4.1)."""
    return FLOATS["F64"] if dtype == FLOATS["F64"] else FLOATS["F32"]


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


def with_one_nan(values: Array) -> Array:
    """``values``, of which each NaN becomes the one that arithmetic gives on every machine (spec, 4.1); in place."""
    nan = np.isnan(values)
    if nan.any():
        values[nan] = _nan(values.dtype)
    return values


@cache
def _nan(dtype: np.dtype[Any]) -> Any:
    """Positive and quiet, without a payload."""
    bits = {
        "F64": 0x7FF8 << 48,
        "F32": 0x7FC0 << 16,
        "F16": 0x7E00,
        "BF16": 0x7FC0,
        "F8_E4M3": 0x7F,
        "F8_E5M2": 0x7E,
    }
    return np.array([bits[dtype_name(dtype)]], f"<u{dtype.itemsize}").view(dtype)[0]


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
