"""Small safetensors files, written by hand, so that they can be wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from random import Random
from typing import Any

import numpy as np

from fuzz.mutate import mutated_bytes, mutated_json

Arrays = Mapping[str, Any]
_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "float64": "F64",
    "uint16": "BF16",
    "int64": "I64",
    "uint8": "U8",
    "int8": "F8_E4M3",
    "bool": "BOOL",
}


def content(arrays: Arrays, metadata: Mapping[str, str] | None = None, random: Random | None = None) -> bytes:
    """A file; with ``random`` its header is changed. uint16 stands for bfloat16, int8 for float8."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    if random is not None:
        header = mutated_json(
            random, header, ["dtype", "shape", "data_offsets"], ["F16", "I64", "U8", [0, 4], [2]]
        )
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
    return len(text).to_bytes(8, "little") + text + data


def some(random: Random, *shape: int) -> Any:
    """An array at random, in one of several dtypes, now and then with values that are no numbers or huge."""
    generator = np.random.default_rng(random.getrandbits(32))
    found = generator.standard_normal(shape).astype(random.choice(["float32", "float32", "float16", "float64"]))
    if random.random() < 0.01 and found.size:
        found.reshape(-1)[random.randrange(found.size)] = random.choice([np.nan, np.inf, -np.inf, 6e4])
    if random.random() < 0.01:
        return generator.integers(0, 256, found.shape, np.uint8).view(random.choice(["uint8", "bool", "int8"])) % 2
    return found


def damaged(random: Random, arrays: Arrays, metadata: Mapping[str, str] | None = None) -> bytes:
    """A file that is right most of the time, or has another header, or other bytes."""
    how = random.random()
    found = content(arrays, metadata, random if how < 0.05 else None)
    return mutated_bytes(random, found) if 0.05 < how < 0.1 else found
