"""The dtypes of checkpoints, by their safetensors names, as numpy dtypes.

``ml_dtypes`` adds bfloat16 and the 8-bit floats, which numpy lacks.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

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
