"""Streams of each codec, good ones and changed ones and random bytes: compiled and plain decoders find the same, or refuse alike."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzz.guard import Guards
from fuzz.kernels import both
from fuzz.mutate import SIZES, mutated_bytes
from fuzz.oracle import Violation
from shira_format._core.arrays import Array, Indices
from shira_format._core.dtypes import FLOATS, dtype_name
from shira_format.format.codecs import CODECS, Encoded
from shira_format.format.codecs.classes import encode_classes
from shira_format.format.compact.values import decode_floats, decode_steps, encode_floats, encode_steps
from shira_format.tensors import check_increasing, numel

_DTYPES = ["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F64"]
_SHAPES = [(4096,), (64, 64), (3, 700), (2**40,), (2**20, 2**20), (16, 16, 16), (17,), (257, 129)]


def make(random: Random, folder: Path) -> None:
    """A stream in hex, and what a manifest says of it."""
    generator = np.random.default_rng(random.getrandbits(48))
    kind = random.choice(["gap8", "varint", "flat", "runs", "classes", "classes", "steps", "steps", "floats"])
    case = _values(random, generator, kind) if kind in ("steps", "floats") else _indices(random, generator, kind)
    stream = bytes.fromhex(case["stream"])
    how = random.random()
    if how < 0.75:
        stream = mutated_bytes(random, stream, most=random.choice([1, 1, 2, 4]))
    elif how < 0.85:
        stream = stream[: random.randint(0, 24)] + random.randbytes(random.randint(0, 400))
    case["stream"] = (stream if kind != "flat" else stream[: len(stream) // 8 * 8]).hex()
    if random.random() < 0.15:
        case["count"] = max(0, case["count"] + random.choice([-1, 1, 5, -5]))
    (folder / "case.json").write_text(json.dumps({"kind": kind} | case), "utf-8")


def _indices(random: Random, generator: np.random.Generator, kind: str) -> dict[str, Any]:
    shape = random.choice(
        _SHAPES if kind in ("varint", "classes", "flat") else [one for one in _SHAPES if numel(one) < 1 << 20]
    )
    size, count = numel(shape), random.choice([0, 1, 5, 60, 700, 5000])
    indices = np.unique(generator.integers(0, size, min(count, size)))
    if kind == "runs":
        length = random.choice([2, 8, 64])
        starts = np.unique(indices // length)[: size // length] * length
        indices = (starts[:, None] + np.arange(length)).reshape(-1)
        indices = indices[indices < size]
    dtype = random.choice(_DTYPES)
    base = (
        _bits(generator, FLOATS[dtype], size)
        if kind == "classes" and size <= 1 << 16 and random.random() < 0.5
        else None
    )
    if kind == "classes":
        made = encode_classes(indices, shape, base)
    elif kind == "runs" and CODECS[kind].size(indices, shape) is None:
        made = Encoded({"codec": "runs", "length": 2, "low": 0}, np.empty(0, np.uint8))
    else:
        made = CODECS[kind].encode(indices, shape, random.choice([16, 64, 4096]))
    blocks = made.blocks
    if blocks is not None and random.random() < 0.3:
        blocks.reshape(-1)[random.randrange(blocks.size)] = np.uint64(random.choice(SIZES)).astype(np.int64)
    params = {key: int(value) if isinstance(value, np.integer) else value for key, value in made.params.items()}
    return {
        "shape": shape, "count": int(indices.size), "params": params, "stream": _hex(made.stream), "blocks": None if blocks is None else blocks.tolist(),
        "base": _hex(base) if params.get("base") else None, "dtype": dtype,
    }  # fmt: skip


def _values(random: Random, generator: np.random.Generator, kind: str) -> dict[str, Any]:
    dtype = FLOATS[random.choice(_DTYPES)]
    count = random.choice([0, 1, 5, 60, 700, 9000])
    base = (
        _bits(generator, dtype, count) if random.random() < 0.1 else generator.standard_normal(count).astype(dtype)
    )
    if kind == "floats":
        stream = encode_floats(base)
        base = base[:0]
    else:
        unsigned = base.view(f"u{dtype.itemsize}")
        steps = generator.integers(0, 3, count).astype(unsigned.dtype)
        stream = encode_steps((unsigned ^ steps).view(dtype), base)
    stream = np.empty(0, np.uint8) if stream is None else stream
    return {"count": count, "stream": _hex(stream), "base": _hex(base), "dtype": dtype_name(dtype)}


def _bits(generator: np.random.Generator, dtype: np.dtype[Any], size: int) -> Array:
    return generator.integers(0, 256, size * dtype.itemsize, np.uint8).view(dtype)


def _hex(array: Array | None) -> str:
    return "" if array is None else array.tobytes().hex()


def check(folder: Path) -> None:
    """Decode it both ways; ranges of what is right are those of the whole."""
    case = json.loads((folder / "case.json").read_text("utf-8"))
    kind, count, dtype = case["kind"], case["count"], FLOATS[case["dtype"]]
    stream = _array(case["stream"], np.dtype(np.int64 if kind == "flat" else np.uint8))
    base = None if case["base"] is None else _array(case["base"], dtype)
    if kind == "floats":
        both(lambda: decode_floats(stream, dtype, count))
    elif kind == "steps":
        assert base is not None
        both(lambda: decode_steps(stream, base))
    else:
        _decode_indices(case, stream, base)


def _array(text: str, dtype: np.dtype[Any]) -> Array:
    return Guards().copy(np.frombuffer(bytes.fromhex(text), dtype), at_end=True)


def _decode_indices(case: dict[str, Any], stream: Array, base: Array | None) -> None:
    codec, shape, count = CODECS[case["kind"]], tuple(case["shape"]), case["count"]
    blocks = None if case["blocks"] is None else np.array(case["blocks"], np.int64).reshape(-1, 2)
    codec.check_params(case["params"], "w")
    declared = codec.streams(case["params"], count)
    if ("blocks" in declared) != (blocks is not None) or (
        blocks is not None and declared["blocks"][1] != blocks.shape
    ):
        return  # which is refused when a file is opened
    if (wanted := declared["indices"][1]) is not None and wanted != stream.shape:
        return
    stored = Encoded(case["params"], stream, blocks)

    def decode() -> Indices:
        found = codec.decode(stored, shape, count, base)
        check_increasing(found, numel(shape))
        return found

    indices = both(decode)
    size = numel(shape)
    for start, stop in ((0, size), (size // 3, size // 2), (size - 1, size)):
        part = both(lambda: _range(codec.decode_range(stored, shape, count, start, stop)))  # noqa: B023 - called at once
        first, last = np.searchsorted(indices, [start, stop])
        if part is not None and not (part[0] == first and np.array_equal(part[1], indices[first:last])):
            raise Violation(f"the entries from {start} to {stop} are others than those of the whole")


def _range(found: Any) -> Any:
    return None if found is None else (found.first, found.indices)
