"""Write the conformance vectors of SHiRA adapter files 1.1.

    python make_vectors.py [FOLDER]        (default: vectors, beside this file)

`good/NAME.st` is a file that every reader must accept, `good/NAME.json` its content (SPEC.md, section 11).
`bad/RULE--what.st` is a file that every reader must refuse, and RULE is the only rule that it breaks.

The expected content is what this program put in, never what a reader found. Running it again changes no byte.
Standard library alone; it shares no code with reader.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

Json = dict[str, Any]

SIZE = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "U64": 8,
    "I32": 4,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
FLOATS = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"]
MAX_NUMEL = 2**53 - 1
ABSENT = object()  # in place of a value: the key is not there
HUGE = 10**40 + 7  # stands for a number of 5000 digits, which json.dumps would not write


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def noise(label: str, size: int) -> bytes:
    """Bytes that look random and are the same every time."""
    return hashlib.shake_256(label.encode()).digest(size)


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def elements(shape: Iterable[int]) -> int:
    numel = 1
    for dimension in shape:
        numel *= dimension
    return numel


def f32(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def bf16(*values: float) -> bytes:
    """Upper halves of binary32; only for values that BF16 holds exactly."""
    halves = [struct.pack("<f", value) for value in values]
    assert all(half[:2] == b"\0\0" for half in halves)
    return b"".join(half[2:] for half in halves)


def i64(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


# Indices


def gaps_of(indices: Sequence[int]) -> list[int]:
    return [index - before - 1 for before, index in pairwise([-1, *indices])]


def gap8_code(gap: int) -> bytes:
    return b"\xff" * (gap // 255) + bytes([gap % 255])


def varint_code(gap: int) -> bytes:
    code = bytearray()
    while gap > 127:
        code.append(gap & 127 | 128)
        gap >>= 7
    return bytes([*code, gap])


def encode(codec: str, indices: Sequence[int]) -> list[bytes]:
    """One code for each entry."""
    return [gap8_code(gap) if codec == "gap8" else varint_code(gap) for gap in gaps_of(indices)]


def directory(indices: Sequence[int], codes: Sequence[bytes], block_size: int) -> list[tuple[int, int]]:
    starts = [0]
    for code in codes:
        starts.append(starts[-1] + len(code))
    return [(indices[k], starts[k]) for k in range(0, len(indices), block_size)]


def bits_to_bytes(bits: Sequence[int]) -> bytes:
    """The first bit has the value 1 in its byte; the last byte is filled up with 0."""
    filled = [*bits, *[0] * (-len(bits) % 8)]
    return bytes(
        sum(bit << place for place, bit in enumerate(filled[at : at + 8])) for at in range(0, len(filled), 8)
    )


def runs_code(gaps: Sequence[int], low: int) -> bytes:
    lower = [gap >> place & 1 for gap in gaps for place in range(low)]
    upper = [bit for gap in gaps for bit in [*[0] * (gap >> low), 1]]
    return bits_to_bytes(lower) + bits_to_bytes(upper)


def run_entries(shape: Sequence[int], length: int, runs: Sequence[int]) -> list[int]:
    return [r * length + k for r in runs for k in range(length) if r * length + k < elements(shape)]


def rows(step: int, offset: int) -> Json:
    return {"kind": "rows", "step": step, "offset": offset}


def columns(step: int, offset: int) -> Json:
    return {"kind": "columns", "step": step, "offset": offset}


def diagonal(offset: int) -> Json:
    return {"kind": "diagonal", "offset": offset}


def chosen(part: Json, r: int, c: int) -> bool:
    if part["kind"] == "diagonal":
        return bool(c - r == part["offset"])
    return bool((r if part["kind"] == "rows" else c) % part["step"] == part["offset"])


def pattern_indices(shape: Sequence[int], pattern: Sequence[Json]) -> list[int]:
    """By the definition: every element of a small matrix view is asked whether a part has it."""
    height, width = (shape[0], elements(shape[1:])) if shape else (1, 1)
    return [
        r * width + c for r, c in product(range(height), range(width)) if any(chosen(p, r, c) for p in pattern)
    ]


# Files


class Maker:
    """A file in the making: streams, manifest, and the content that a reader must find."""

    def __init__(self) -> None:
        self.streams: dict[str, tuple[str, list[int], bytes]] = {}
        self.manifest: Json = {"format_version": "1.0", "features": [], "digest": "sha256", "tensors": []}
        self.content: Json = {"format_version": "1.0", "alpha": 1, "tensors": [], "whole": []}
        self.metadata: dict[str, str] = {}
        self.order: list[str] = []  # streams in the buffer; those that are not named follow as they were added
        self.last_base = (
            b""  # the base's values of the tensor that was added last, where the file does not hold them
        )
        self.spaces: int | None = None  # behind the header; None: up to a multiple of 8
        self.after = ""  # behind the manifest
        self.literals: dict[str, str] = {}  # JSON in place of these strings, which json.dumps would not write
        self.style: Json = {"separators": (",", ":"), "ensure_ascii": False}  # of the JSON texts

    def set(self, **keys: Any) -> Maker:
        self.manifest |= keys
        for key in ("alpha", "format_version"):
            if key in keys:
                self.content[key] = keys[key]
        return self

    def stream(self, name: str, dtype: str, shape: Sequence[int], data: bytes) -> str:
        self.streams[name] = (dtype, list(shape), data)
        return sha(data)

    def sparse(
        self,
        name: str,
        shape: Sequence[int],
        indices: Sequence[int],
        codec: str = "gap8",
        *,
        dtype: str = "F32",
        values: str = "target",
        value_dtype: str | None = None,
        value_bytes: bytes | None = None,
        base: bytes | None = None,
        base_digest: bool = True,
        store_base: bool = False,
        block_size: int | None = None,
        more: Json | None = None,
    ) -> Maker:
        """`more` goes into the object `indices`: what the codec needs, or keys that no reader knows."""
        nnz = len(indices)
        digests: dict[str, str] = {}
        item: Json = {"name": name, "shape": list(shape), "dtype": dtype, "nnz": nnz, "values": values}
        item |= {"indices": {"codec": codec} | (more or {}), "digests": digests}
        found: Json = {"name": name, "shape": list(shape), "dtype": dtype, "values": values, "nnz": nnz}
        found |= {"indices": list(indices), "value_dtype": None, "value_hex": None, "base_hex": None}
        found["base_digest"] = None
        if codec == "flat":
            digests["indices"] = self.stream(name + "#indices", "I64", [nnz], i64(*indices))
        elif codec in ("gap8", "varint"):
            codes = encode(codec, indices)
            data = b"".join(codes)
            digests["indices"] = self.stream(name + "#indices", "U8", [len(data)], data)
            if block_size is not None:
                item["indices"]["block_size"] = block_size
                if nnz > block_size:
                    table = directory(indices, codes, block_size)
                    data = b"".join(i64(*row) for row in table)
                    digests["blocks"] = self.stream(name + "#blocks", "I64", [len(table), 2], data)
        if values != "none":
            value_dtype = value_dtype or dtype
            if value_bytes is None:
                value_bytes = noise("values of " + name, nnz * SIZE[value_dtype])
            digests["values"] = self.stream(name + "#values", value_dtype, [nnz], value_bytes)
            found |= {"value_dtype": value_dtype, "value_hex": value_bytes.hex()}
        if values != "none" and base_digest:
            if base is None:
                base = noise("base of " + name, nnz * SIZE[dtype])
            digests["base"] = found["base_digest"] = sha(base)
            if store_base:
                item["base_values"] = True
                self.stream(name + "#base", dtype, [nnz], base)
                found["base_hex"] = base.hex()
        self.manifest["tensors"].append(item)
        self.content["tensors"].append(found)
        return self

    def mask(
        self, name: str, shape: Sequence[int], indices: Sequence[int], codec: str = "gap8", **more: Any
    ) -> Maker:
        return self.sparse(name, shape, indices, codec, values="none", **more)

    def structured(self, name: str, shape: Sequence[int], *pattern: Json, **more: Any) -> Maker:
        indices = pattern_indices(shape, pattern)
        return self.sparse(name, shape, indices, "structured", more={"pattern": list(pattern)}, **more)

    def runs(
        self,
        name: str,
        shape: Sequence[int],
        length: int,
        low: int,
        runs: Sequence[int],
        data: bytes | None = None,
        **more: Any,
    ) -> Maker:
        """The runs of these numbers; `data` in place of their code."""
        if "runs" not in self.manifest["features"]:
            self.manifest["features"].append("runs")
            self.set(format_version="1.1")
        indices = run_entries(shape, length, runs)
        self.sparse(name, shape, indices, "runs", more={"length": length, "low": low}, **more)
        code = runs_code(gaps_of(runs), low) if data is None else data
        self.tensor(-1)["digests"]["indices"] = self.stream(name + "#indices", "U8", [len(code)], code)
        return self

    def whole(
        self,
        name: str,
        dtype: str,
        shape: Sequence[int],
        *,
        data: bytes | None = None,
        base: bytes | None = None,
        store_base: bool = False,
    ) -> Maker:
        if data is None:
            data = noise("whole " + name, elements(shape) * SIZE[dtype])
        digests = {"values": self.stream(name, dtype, shape, data)}
        item: Json = {"name": name, "shape": list(shape), "dtype": dtype, "digests": digests}
        found: Json = {"name": name, "shape": list(shape), "dtype": dtype, "value_hex": data.hex()}
        found |= {"base_hex": None, "base_digest": None}
        if base is not None:
            digests["base"] = found["base_digest"] = sha(base)
            if store_base:
                item["base_values"] = True
                self.stream(name + "#base", dtype, shape, base)
                found["base_hex"] = base.hex()
        self.manifest.setdefault("whole", []).append(item)
        self.content["whole"].append(found)
        return self

    # Patches (section 3.5): the three below speak of the sparse tensor that was added last.

    def origin(self, name: str) -> Maker:
        item = self.patch().tensor(-1)
        item["from"] = name
        if name != item["name"]:
            self.content["tensors"][-1]["from"] = name
        return self

    def resize(self, size: int, data: bytes | None = None) -> Maker:
        item = self.patch().tensor(-1)
        item["rows"] = self.content["tensors"][-1]["rows"] = size
        further = [size - item["shape"][0], *item["shape"][1:]]
        if further[0] > 0:
            if data is None:
                data = noise("rows of " + item["name"], elements(further) * SIZE[item["dtype"]])
            item["digests"]["rows"] = self.stream(item["name"] + "#rows", item["dtype"], further, data)
            self.content["tensors"][-1]["rows_hex"] = data.hex()
        return self

    def result(self, data: bytes) -> Maker:
        self.tensor(-1)["digests"]["result"] = self.content["tensors"][-1]["result_digest"] = sha(data)
        return self

    def removed(self, *names: str) -> Maker:
        self.content["removed"] = list(names)
        return self.patch().set(removed=list(names))

    def patch(self) -> Maker:
        if "patch" not in self.manifest["features"]:
            self.manifest["features"].append("patch")
        return self

    def patched(
        self,
        name: str,
        shape: Sequence[int],
        indices: Sequence[int],
        codec: str = "gap8",
        *,
        dtype: str = "F32",
        origin: str | None = None,
        size: int | None = None,
        **more: Any,
    ) -> Maker:
        """A sparse tensor of targets, from a whole base tensor and so with the digest of the whole result."""
        width = SIZE[dtype]
        whole = bytearray(noise("base tensor " + (origin or name), elements(shape) * width))
        base = b"".join(whole[k * width : (k + 1) * width] for k in indices)
        self.sparse(name, shape, indices, codec, dtype=dtype, base=base, **more)
        values = bytes.fromhex(self.content["tensors"][-1]["value_hex"])
        for at, k in enumerate(indices):
            whole[k * width : (k + 1) * width] = values[at * width : (at + 1) * width]
        if origin is not None:
            self.origin(origin)
        if size is not None:
            self.resize(size)
            del whole[size * elements(shape[1:]) * width :]
            whole += bytes.fromhex(self.content["tensors"][-1].get("rows_hex", ""))
        return self.result(bytes(whole))

    def tensor(self, number: int = 0) -> Any:
        return self.manifest["tensors"][number]

    def replace(
        self, name: str, data: bytes, shape: Sequence[int] | None = None, dtype: str | None = None
    ) -> Maker:
        """Another stream of the same name, with the right digest, for a bad file."""
        old_dtype, _, _ = self.streams[name]
        dtype = dtype or old_dtype
        self.stream(name, dtype, [len(data) // SIZE[dtype]] if shape is None else shape, data)
        tensor, _, role = name.rpartition("#")
        for item in self.manifest["tensors"]:
            if item["name"] == tensor:
                item["digests"][role] = sha(data)
        for item in self.manifest.get("whole", []):
            if item["name"] == name:
                item["digests"]["values"] = sha(data)
            if item["name"] == tensor and role == "base":
                item["digests"]["base"] = sha(data)
        return self

    def layout(self) -> tuple[Json, bytes]:
        """The header as an object, and the buffer."""
        header: Json = {}
        buffer = b""
        rest = [name for name in self.streams if name not in self.order]
        for name in self.order + rest:
            dtype, shape, data = self.streams[name]
            header[name] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [len(buffer), len(buffer) + len(data)],
            }
            buffer += data
        text = json.dumps(self.manifest, **self.style) + self.after
        for mark, literal in self.literals.items():
            text = text.replace(json.dumps(mark), literal)
        return {"__metadata__": self.metadata | texts(text)} | header, buffer

    def file(self) -> bytes:
        header, buffer = self.layout()
        return assemble(json.dumps(header, **self.style), buffer, self.spaces)


def texts(manifest: str) -> dict[str, str]:
    """The metadata of an adapter: the manifest and its digest."""
    return {"shira": manifest, "shira_digest": sha(manifest.encode("utf-8", "surrogatepass"))}


def assemble(header: str | bytes, buffer: bytes, spaces: int | None = None) -> bytes:
    data = header if isinstance(header, bytes) else header.encode()
    data += b" " * (-len(data) % 8 if spaces is None else spaces)
    return struct.pack("<Q", len(data)) + data + buffer


GOOD: dict[str, Maker] = {}
BASES: dict[str, bytes] = {}  # safetensors files with the base's tensors, by the vector's name
BAD: dict[str, bytes] = {}
MASKS: dict[str, bytes] = {}  # mask files of bad files; they are good themselves, so no `.st`


def good(name: str) -> Maker:
    assert name not in GOOD
    GOOD[name] = Maker()
    return GOOD[name]


def bad(name: str, file: Maker | bytes) -> None:
    assert name not in BAD
    BAD[name] = file.file() if isinstance(file, Maker) else file


# Good files


def good_values() -> None:
    good("example").set(writer="spec/SPEC.md").sparse(
        "w",
        [4, 300],
        [0, 1, 256, 1199],
        block_size=4096,
        dtype="BF16",
        value_bytes=bf16(1.0, -2.0, 0.5, 3.140625),
        base=bf16(0.5, -1.0, 0.25, 3.0),
    )
    for dtype in FLOATS:
        good(f"target-{dtype}").sparse("w", [5, 7], [0, 3, 11, 34], dtype=dtype)
        good(f"base-values-{dtype}").sparse("w", [5, 7], [2, 33], dtype=dtype, store_base=True)
        file = good(f"delta-{dtype}")
        for other in FLOATS:
            file.sparse(f"to.{other}", [40], [1, 39], dtype=other, values="delta", value_dtype=dtype)
        file.sparse("no.base", [40], [0, 20], dtype=dtype, values="delta", base_digest=False)
    good("delta-base-values").sparse(
        "w", [6, 6], [7, 8, 9], dtype="BF16", values="delta", value_dtype="F32", store_base=True
    )
    good("mask").mask("w", [16, 16], [5, 100, 255])
    good("mask-beside-values").mask("m", [9], [8], "flat").sparse("w", [9], [1, 2], "varint")
    special = {
        "F64": "010000000000f07f 010000000000f8ff 0000000000000080 000000000000f07f 0100000000000000",
        "F32": "010080ff efbec07f 00000080 000080ff 01000000",
        "F16": "017c 01fe 0080 00fc 0100",
        "BF16": "81ff c17f 0080 80ff 0100",
        "F8_E4M3": "7f ff 80 7e 01",
        "F8_E5M2": "7d ff 80 fc 01",
    }
    file = good("nan-and-minus-zero")
    for dtype, text in special.items():
        data = bytes.fromhex(text)
        file.sparse(
            dtype,
            [8],
            [1, 2, 3, 5, 7],
            "flat",
            dtype=dtype,
            value_bytes=data,
            base=data[::-1],
            store_base=True,
        )
        file.whole("whole." + dtype, dtype, [5], data=data)


def good_codecs() -> None:
    wide = [0, 1, 2, 257, 513, 1023, 1279, 2000]  # gaps 0 0 0 254 255 509 255 720
    escapes = [255, 510, 766, 1021, 1532, 2043]  # gaps 255 254 255 254 510 510
    good("gap8-escapes").sparse("a", [3000], wide).sparse("b", [3000], escapes).sparse("c", [3000], [2999])
    good("gap8-every-gap").sparse("w", [200_000], [sum(range(n + 1)) + n for n in range(520)], dtype="F8_E5M2")
    many = [3 * k + 600 * (k // 16) for k in range(70)]  # blocks of 16 start with escapes, the last one is short
    good("gap8-directory").sparse("w", [60, 100], many, block_size=16)
    good("gap8-directory-full-last-block").sparse("w", [60, 100], many[:48], block_size=16)
    good("gap8-directory-one-more").sparse("w", [60, 100], many[:17], block_size=16, store_base=True)
    good("gap8-no-directory").sparse("w", [60, 100], many[:16], block_size=16)
    good("gap8-mask-directory").mask("w", [60, 100], many, block_size=17)
    good("varint").sparse("w", [2**40], [0, 127, 128, 257, 16_642, 300_000, 2**40 - 1], "varint")
    good("varint-of-page").sparse("a", [2**40], [0, 127, 128], "varint").sparse(
        "b", [2**40], [128], "varint"
    ).sparse("c", [2**40], [300, 2**40 - 1], "varint")
    sizes = [2 ** (7 * n) - d for n in range(1, 8) for d in (1, 0)]  # the last and first gap of each code length
    good("varint-every-length").sparse(
        "w", [2**51], [sum(sizes[: n + 1]) + n for n in range(len(sizes))], "varint"
    )
    sparse = [1000 * k + 100_000 * (k // 20) for k in range(50)]
    good("varint-directory").sparse("w", [1000, 1000], sparse, "varint", block_size=20)
    good("varint-no-directory").sparse("w", [1000, 1000], sparse, "varint", block_size=2**31 - 1)
    good("flat").sparse("w", [3, 5], [0, 7, 14], "flat").sparse("far", [MAX_NUMEL], [3, MAX_NUMEL - 1], "flat")
    for codec in ("gap8", "varint", "flat"):
        file = good(f"{codec}-counts").sparse("none", [3, 4], [], codec).sparse("one", [3, 4], [11], codec)
        file.sparse("all", [3, 4], range(12), codec).sparse("empty", [0, 5], [], codec)
        file.sparse("scalar", [], [0], codec).sparse("no.scalar", [], [], codec)
        file.sparse("rank5", [2, 1, 3, 2, 2], [0, 23], codec)


def good_structured() -> None:
    file = good("structured").structured("rows", [3, 4], rows(2, 1)).structured("columns", [3, 4], columns(3, 1))
    file.structured("all", [3, 4], rows(1, 0)).structured("all.columns", [3, 4], columns(1, 0))
    file.structured("wide.step", [3, 4], rows(100, 2), columns(MAX_NUMEL, 3))
    file.structured("main", [3, 4], diagonal(0)).structured("below", [3, 4], diagonal(-2))
    file.structured("above", [3, 4], diagonal(3)).structured(
        "tall", [5, 2], diagonal(-1), diagonal(1), diagonal(-4)
    )
    file.structured("empty.pattern", [3, 4])
    file = good("structured-unions").structured("page1", [3, 4], rows(3, 0), diagonal(0))
    file.structured("page2", [3, 2, 2], columns(4, 1), diagonal(-1)).structured(
        "twice", [3, 4], rows(2, 0), rows(2, 0)
    )
    file.structured("eight", [9, 9], *[diagonal(k) for k in range(-4, 2)], rows(5, 4), columns(7, 3))
    file = good("structured-ranks").structured("conv", [4, 2, 3, 3], rows(2, 1), columns(9, 4), diagonal(-1))
    file.structured("rank1.rows", [7], rows(3, 1)).structured("rank1.column", [7], columns(1, 0))
    file.structured("rank1.diagonal", [7], diagonal(-6), diagonal(0)).structured("scalar", [], diagonal(0))
    file.structured("scalar.row", [], rows(5, 0)).structured("scalar.none", [])
    file.structured("no.rows", [0, 5], columns(2, 1), diagonal(3)).structured("no.columns", [3, 0], rows(1, 0))
    file.structured("base", [2, 2], diagonal(0), store_base=True)
    good("structured-mask").structured("w", [6, 6], rows(3, 0), columns(3, 0), values="none")


def good_runs() -> None:
    file = good("runs-of-page").runs("a", [4, 8], 4, 0, [0, 1, 7]).runs("b", [4, 8], 8, 1, [1])
    file.runs("c", [3, 7], 2, 2, [3, 8, 10])
    file = good("runs").runs("w", [16, 100], 16, 3, [0, 1, 9, 40, 41, 99]).runs("v", [4096], 256, 0, [2, 15])
    file.runs("base", [64], 8, 2, [1, 6], dtype="BF16", store_base=True)
    for low in (0, 1, 7, 8, 9, 45):
        file.runs(f"low.{low}", [5000], 2, low, [0, 3, 5, 300, 301, 2499])
    file = good("runs-counts").runs("none", [3, 4], 4, 3, []).runs("all", [4, 8], 16, 0, [0, 1])
    file.runs("none.of.none", [0, 4], 4, 0, []).runs("cut", [3, 7], 4, 1, [0, 5]).runs("cut.alone", [5], 8, 0, [0])
    file.runs("scalar", [], 2, 5, [0]).runs("scalar.none", [], 2, 0, [])
    good("runs-far").runs("w", [MAX_NUMEL], 256, 45, [0, 2**44, MAX_NUMEL // 256])
    file = good("runs-mask").runs("w", [6, 32], 32, 0, [1, 5], values="none")
    file.sparse("v", [6, 32], run_entries([6, 32], 32, [1, 5]), "shared", more={"tensor": "w"})
    file = good("runs-delta").runs("w", [6, 32], 8, 2, [3, 11], values="delta", value_dtype="F16", dtype="F16")
    file.sparse("other", [40], [7])
    good("runs-every-length").runs("2", [2048], 2, 4, [0, 700]).runs("4", [2048], 4, 4, [1, 511]).runs(
        "8", [2048], 8, 4, [0, 255]
    ).runs("32", [2048], 32, 4, [63]).runs("64", [2048], 64, 4, [0, 31]).runs("128", [2048], 128, 4, [3, 4])
    file = good("runs-patch").runs("w", [8, 4], 4, 0, [0, 2]).resize(4)
    file.runs("longer", [4, 4], 8, 0, [1]).resize(5)


def good_shared() -> None:
    file = good("shared").sparse("q", [10, 10], [3, 50, 99]).structured("d", [2, 5, 2], diagonal(0), values="none")
    file.sparse("k", [10, 10], [3, 50, 99], "shared", more={"tensor": "q"}, dtype="BF16", store_base=True)
    file.sparse("e", [2, 5, 2], [0, 11], "shared", more={"tensor": "d"}, values="delta", base_digest=False)
    file.mask("m", [10, 10], [3, 50, 99], "shared", more={"tensor": "q"})
    file.sparse("before", [20], [1, 19], "shared", more={"tensor": "later"}).sparse(
        "later", [20], [1, 19], "varint"
    )
    file = (
        good("masks")
        .mask("q", [10, 10], [3, 50, 99])
        .structured("d", [8, 8], diagonal(0), rows(4, 1), values="none")
    )
    file.mask("long", [60, 100], range(0, 6000, 300), block_size=16).sparse("with.values", [5], [0, 4], "flat")
    file.mask("q.too", [10, 10], [3, 50, 99], "shared", more={"tensor": "q"})
    use_masks(good("mask-file"), "masks.st", GOOD["masks"].file())
    good("mask-file-unused").set(features=["mask-file"]).sparse("w", [4], [1])


def use_masks(file: Maker, name: str, data: bytes) -> Maker:
    """Tensors with the indices of the good file `masks`."""
    file.set(features=["mask-file"], mask_files={name: sha(data)})
    diagonal_and_rows = pattern_indices([8, 8], [diagonal(0), rows(4, 1)])
    file.sparse("a", [10, 10], [3, 50, 99], "shared", more={"tensor": "q", "file": name})
    file.sparse("b", [8, 8], diagonal_and_rows, "shared", more={"tensor": "d", "file": name}, dtype="F16")
    file.sparse(
        "q", [60, 100], range(0, 6000, 300), "shared", more={"tensor": "long", "file": name}, store_base=True
    )
    return file.sparse("own", [5], [0, 4], "shared", more={"tensor": "with.values", "file": name}, dtype="BF16")


def good_shapes() -> None:
    file = good("large-shapes").sparse("tall", [3_000_000_000, 2], [0, 4_294_967_296, 5_999_999_999], "varint")
    file.sparse("max", [MAX_NUMEL], [0, MAX_NUMEL - 1], "varint")
    file.sparse("max.product", [6361, 69_431, 20_394_401], [2**52, MAX_NUMEL - 1], "flat")
    file.sparse("zero.last", [2**17, 2**18, 2**17, 0], []).sparse("zero.first", [0, 0, MAX_NUMEL], [])
    file.sparse(
        "one.row",
        [3_000_000_000, 2],
        [6_000_000, 6_000_001],
        "structured",
        values="none",
        more={"pattern": [rows(3_000_000_000, 3_000_000)]},
    )
    file.sparse(
        "corner",
        [2, 3_000_000_000],
        [2_999_999_999, 5_999_999_999],
        "structured",
        more={"pattern": [columns(3_000_000_000, 2_999_999_999)]},
    )
    file.sparse("no.columns", [MAX_NUMEL, 0], [], "structured", more={"pattern": [rows(1, 0), diagonal(-5)]})
    good("rank-64").sparse("w", [1] * 62 + [3, 4], [0, 11]).whole("b", "F32", [1] * 64)
    good("empty")
    good("empty-whole-list").set(whole=[])


def good_whole() -> None:
    file = good("whole-every-dtype")
    for dtype in SIZE:
        data = bytes([1, 0, 1]) if dtype == "BOOL" else None
        file.whole("b." + dtype, dtype, [3], data=data)
    file = good("whole-base").whole("same", "BF16", [2, 2], base=noise("before", 8))
    file.whole("stored", "F32", [2, 3], base=noise("stored", 24), store_base=True)
    file.whole("ids", "I64", [2], base=i64(-1, 5), store_base=True)
    file = (
        good("whole-shapes").whole("scalar", "F32", []).whole("none", "F16", [0]).whole("zero", "I32", [3, 0, 2])
    )
    file.whole("rank5", "U8", [2, 1, 2, 1, 2]).whole("zero.base", "F32", [0], base=b"", store_base=True)
    good("whole-and-sparse").sparse("w", [4], [2], store_base=True).whole("b", "F32", [4]).whole(
        "w#other", "I8", [1]
    )


def good_names() -> None:
    file = (
        good("names").sparse("модель.слой.0.вес", [4], [1]).sparse("重み/🧠", [4], [2]).sparse("e\u0301", [4], [3])
    )
    file.sparse("é", [4], [0]).sparse(" ", [4], [1]).sparse("a#values", [4], [2]).sparse("a", [4], [3])
    file.sparse('"\\quoted\\"', [4], [0]).sparse("../../etc/passwd", [4], [1]).sparse(
        "C1\x85\u2028\u202e", [4], [2]
    )
    file.sparse("#", [4], [3]).whole("x#base#base", "U8", [1]).whole("shira", "U8", [1]).whole(
        "format_version", "U8", [1]
    )
    good("names-of-1024-bytes").sparse("n" * 1024, [4], [1]).sparse("é" * 512, [4], [2])
    # A tensor may bear the name of a stream that is not there.
    good("name-like-stream").structured("w", [2, 2], diagonal(0)).whole("w#indices", "U8", [2]).whole(
        "w#base", "U8", [2]
    )
    file = good("components").sparse("unet/w", [4], [1]).sparse("text/w", [4], [2]).whole("unet/b/c", "F32", [1])
    base_model = {"id": "someone/something", "revision": "abc"}
    file.set(components={"unet": {"base_model": base_model}, "text": {}, "not used": {}}, base_model=base_model)
    good("components-empty").set(components={}).manifest["tensors"] = []
    good("slash-without-components").sparse("a/b", [4], [1]).sparse("/", [4], [2]).sparse("a/", [4], [3])


def good_manifests() -> None:
    for name, alpha in {
        "alpha-half": 0.5,
        "alpha-zero": 0,
        "alpha-negative": -1.25,
        "alpha-large": 1e300,
    }.items():
        good(name).set(alpha=alpha).sparse("w", [4], [1])
    good("minor-7").set(format_version="1.7").sparse("w", [4], [1])
    good("minor-long").set(format_version="1." + "9" * 30).sparse("w", [4], [1])
    files = [{"name": "model.safetensors", "digest": sha(b"model")}, {"name": "without-digest"}]
    file = good("provenance").set(
        base_model={"id": "org/model", "revision": "main", "files": files},
        source={
            "kind": "lora",
            "dialect": "peft",
            "files": files,
            "rank": 16,
            "scale": 0.5,
            "nested": [[1], {"a": None}],
        },
        selection={
            "rule": "top-k",
            "scope": "tensor",
            "density": 0.02,
            "top_k": 1,
            "include": ["*.weight"],
            "exclude": [],
            "energy_kept": 0.75,
            "relative_error": 0.5,
        },
        mask={"rule": "snip", "seed": -7, "calibration_digest": sha(b"calibration")},
        license="Apache-2.0",
        writer="make_vectors.py",
        description="Every key.\nTwo lines, é, \u202e.",
        alpha=1,
    )
    file.sparse("w", [4], [1]).tensor().update(energy_kept=1, relative_error=0.0)
    file = good("unknown-keys").set(future={"a": [1, None, True, {"b": 1.5e-7}]}, zstd=False, null=None)
    file.sparse("w", [4], [1], more={"future": [], "file": 5, "pattern": "x", "tensor": {}})
    file.sparse("f", [4], [1], "flat", more={"block_size": "none of flat"})
    file.structured("s", [2, 2], diagonal(0) | {"width": 1, "step": 0}, rows(2, 1) | {"name": "x"})
    file.whole("b", "F32", [1])
    file.tensor(0).update(future=1, blocks=None)
    file.tensor(0)["digests"].update(future="not a digest")
    file.manifest["whole"][0].update(future=1, nnz="x", indices=5)
    file.manifest["whole"][0]["digests"].update(future=None)
    file.set(base_model={"future": 1}, source={"future": 1}, selection={"future": 1}, mask={"future": 1})
    selection = {"rule": "exact", "energy": 0.99, "min_change": 1e-8}
    good("provenance-exact").set(source={"kind": "full"}, selection=selection).sparse("w", [4], [1])
    good("large-numbers").set(seed=10**300, other=-(10**300), tiny=1e-300).sparse("w", [4], [1])
    file = good("depth-32").sparse("w", [4], [1])
    file.set(deep=nested(31), brackets="[" * 100 + "{" * 100 + '\\"[[[')
    good("base-values-false").sparse("w", [4], [1]).mask("m", [4], [1]).whole("b", "F32", [1])
    for item in GOOD["base-values-false"].manifest["tensors"] + GOOD["base-values-false"].manifest["whole"]:
        item["base_values"] = False


def good_provenance_of_any_type() -> None:
    """Each key of section 7 with values of other types: no reader refuses the file for them."""
    values: Json = {
        "null": None,
        "true": True,
        "number": "@",
        "text": "x",
        "list": [1],
        "object": {"id": []},
    }
    for what, value in values.items():
        file = good(f"provenance-{what}").sparse("w", [4], [1])
        file.literals["@"] = "1e999"
        for key in ("base_model", "source", "selection", "mask", "license", "writer", "description"):
            file.set(**{key: value})
        file.tensor().update(energy_kept=value, relative_error=value)
    file = good("provenance-inner-types").set(components={"a": {"base_model": 3}}).sparse("a/w", [4], [1])
    files = [{"digest": 5}, "x"]
    selection = {"rule": 1, "scope": [], "density": "1%", "top_k": -1, "energy": {}, "min_change": True}
    selection |= {"include": "*", "exclude": [1], "energy_kept": HUGE, "relative_error": None}
    file.set(
        base_model={"id": 5, "revision": {}, "files": files}, source={"kind": ["lora"], "dialect": 0, "files": {}}
    )
    file.set(selection=selection, mask={"rule": [], "seed": "7", "calibration_digest": None})


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth > 1 else []


def good_containers() -> None:
    good("numbers-of-5000-digits").set(future=[HUGE, -HUGE, {"a": HUGE}]).sparse("w", [4], [1])
    good("zero-dimensions").whole("a", "F64", [0, MAX_NUMEL]).whole("b", "U8", [2**52, 0, 1]).sparse(
        "w",
        [2**50, 0],
        [],
        "structured",
        values="none",
        more={"pattern": [rows(1, 0), rows(2**49, 7), diagonal(-(2**49))]},
    ).whole("c", "BF16", [2**26, 0, 2**27 - 1], base=b"", store_base=True)
    file = good("manifest-spaces").sparse("w", [4], [1])
    file.after = " " * 7
    file = good("other-metadata").sparse("w", [4], [1])
    file.metadata = {"format": "pt", "": "", "shira2": "{", "é": '\n\t"\\ \u0000'}
    file = good("header-spaces").sparse("w", [4], [1])
    file.spaces = 1000
    file = good("json-escapes").sparse("é/重み/🧠", [4], [1]).whole("\u20ac", "F32", [1])
    file.style = {"ensure_ascii": True}
    file = good("json-white-space").sparse("w", [4], [1])
    file.style = {"indent": "\t", "separators": (" ,\r", " : ")}
    file = good("unaligned").sparse("w", [40], [1, 3, 39], dtype="F64", store_base=True).whole("b", "F32", [1])
    file.sparse("f", [40], [1], "flat")
    file.order, file.spaces = ["w#indices", "b", "f#indices", "w#base", "w#values", "f#values"], 0
    if len(compact(file.layout()[0]).encode()) % 2 == 0:
        file.spaces = 1
    file = good("order").sparse("b", [40], [1, 3]).sparse("a", [40], [], store_base=True).whole("c", "U8", [1])
    file.order = ["c", "a#values", "b#values", "a#indices", "a#base", "b#indices"]


def good_patches() -> None:
    good("patch-rename").patched("w.new", [5, 7], [0, 3, 34], origin="w.old")
    good("patch-rename-and-nothing-else").patched("w.new", [5, 7], [], origin="w.old", dtype="BF16")
    good("patch-rename-and-remove").patched("w.new", [5, 7], [6], origin="w.old").removed("w.old")
    good("patch-swap").patched("a", [6], [1], origin="b").patched("b", [6], [2, 5], origin="a")
    good("patch-from-own-name").patched("w", [4], [3], origin="w")
    file = good("patch-tie").patched("head", [4, 6], [0, 23], "varint", origin="embed")
    file.patched("embed", [4, 6], [5], dtype="F32").patched("third", [4, 6], [], origin="embed", store_base=True)
    file = good("patch-tie-of-a-tensor-that-goes").patched("q", [3, 3], [8], origin="qkv", dtype="F16")
    file.patched("k", [3, 3], [0, 1, 2], "flat", origin="qkv", dtype="F16").removed("qkv")
    good("patch-delta").sparse("w", [9], [1, 8], values="delta", value_dtype="BF16").origin("v").sparse(
        "no.base", [9], [2], values="delta", base_digest=False
    ).origin("v")
    good("patch-mask").mask("m", [16], [2, 3]).origin("w").removed("v")
    for dtype in FLOATS:
        good(f"patch-rows-{dtype}").patched("w", [5, 3], [0, 7, 14], dtype=dtype, size=8).patched(
            "less", [5, 3], [0, 5], dtype=dtype, size=2
        )
    file = (
        good("patch-grown-ranks").patched("rank1", [5], [0, 4], size=7).patched("rank3", [2, 3, 2], [11], size=3)
    )
    file.patched("rank5", [1, 2, 1, 2, 2], [0], "varint", size=3, dtype="F8_E4M3")
    file.patched("no.columns", [4, 0], [], size=6).patched("by.one", [1, 1], [0], "flat", size=2)
    file.structured("structured", [3, 4], rows(2, 1), diagonal(3)).resize(5)
    good("patch-grown-from-no-rows").patched("w", [0, 4], [], size=3).patched("b", [0], [], size=2, dtype="F64")
    file = good("patch-grown-delta").sparse("w", [4, 2], [7], values="delta", value_dtype="F32", dtype="BF16")
    file.resize(5).sparse("no.base", [4], [1], values="delta", base_digest=False).resize(6)
    file.sparse("stored", [4], [1], values="delta", store_base=True).resize(6)
    file = good("patch-grown-everything").patched("w", [60, 100], range(0, 6000, 100), size=61, block_size=16)
    file.tensor()["base_values"] = True
    base = b"".join(noise("base tensor w", 24_000)[4 * k : 4 * k + 4] for k in range(0, 6000, 100))
    file.stream("w#base", "F32", [60], base)
    file.content["tensors"][0]["base_hex"] = base.hex()
    for codec in ("gap8", "varint", "flat"):
        file = good(f"patch-shrunk-{codec}").patched("last.kept", [6, 5], [0, 3, 19], codec, size=4)
        file.patched("to.nothing", [6, 5], [], codec, size=0).patched("rank1", [6], [1], codec, size=2)
        file.patched("rank3", [4, 2, 3], [0, 11], codec, size=2).patched("no.columns", [4, 0], [], codec, size=1)
        file.patched("directory", [6, 50], range(0, 100, 5), codec, size=2, block_size=16)
    file = good("patch-shrunk-structured").structured("rows", [6, 4], rows(9, 1)).resize(2)
    file.structured("below.the.main", [9, 3], diagonal(1)).resize(2)
    file.structured("to.nothing", [3, 3]).resize(0)
    file = good("patch-rows-shared").patched("long", [10, 10], [3, 50, 99])
    for size in (9, 10, 11):
        origin, shared = f"from.{size}", {"tensor": "long" if size > 9 else "short"}
        file.patched(f"w.{size}", [10, 10], [3, 50, 99] if size > 9 else [3, 50], "shared", size=size,
                     origin=origin, more=shared)  # fmt: skip
    file.patched("short", [10, 10], [3, 50])
    file = use_masks(good("patch-mask-file"), "masks.st", GOOD["masks"].file())
    file.patched("long", [60, 100], range(0, 6000, 300), "shared", origin="q", size=58,
                 more={"tensor": "long", "file": "masks.st"})  # fmt: skip
    good("patch-same-rows").patched("w", [5, 3], [0, 14], size=5).patched("none", [0, 3], [], size=0).patched(
        "v", [2], [1], size=2, origin="w.old"
    )
    good("patch-removed").removed("a", "b.c", "gone/with/a/slash").sparse("w", [4], [1])
    good("patch-removed-alone").removed("a")
    file = good("patch-removed-empty").removed().sparse("w", [4], [1])
    file.set(features=[])
    good("patch-feature-unused").set(features=["patch"]).sparse("w", [4], [1])
    good("patch-unused-digest").sparse("w", [4], [1]).tensor()["digests"]["rows"] = sha(b"")
    file = good("patch-names").patched("w", [4], [1], origin="w#rows").patched("v", [4], [2], origin="é" * 512)
    file.patched(" ", [4], [2], origin="rows").whole("w#rows", "U8", [2]).removed("w#values", "\u202e", "n" * 1024)
    file = good("patch-components").set(components={"unet": {}, "text": {}, "not used": {}})
    file.patched("unet/w", [4, 3], [2], origin="unet/down/w", dtype="F16")
    file.patched("unet/v", [4, 3], [], origin="unet/down/w", dtype="F16")
    file.patched("text/embed", [4, 3], [0, 11], size=6, dtype="BF16")
    file.patched("text/head", [4, 3], [5], origin="text/embed", size=6, dtype="BF16")
    file.patched("text/positions", [8, 2], [1, 3], "varint", size=2).sparse("unet/plain", [4], [0])
    file.whole("text/new", "I64", [2]).whole("unet/bias", "F32", [2], base=f32(1, 2), store_base=True)
    file.removed("unet/down/w", "text/a/b", "not used/x")
    file = good("patch-large").sparse("less", [3_000_000_000, 2], [0, 3_999_999_999], "varint").resize(2 * 10**9)
    file.sparse("one", [MAX_NUMEL], [0], "flat").resize(1).sparse("none", [MAX_NUMEL], []).resize(0)
    file.sparse("more", [MAX_NUMEL - 2], [MAX_NUMEL - 3], "varint").resize(MAX_NUMEL)
    file.sparse("same.rows", [3_002_399_751_580_330, 3], [5], "varint", dtype="F8_E5M2").resize(
        3_002_399_751_580_330
    )
    file = good("result-digest").patched("plain", [5, 7], [1, 2, 34]).patched("none", [5, 7], [], "varint")
    for dtype in FLOATS:
        file.patched(dtype, [2, 2, 2], [3, 7], "flat", dtype=dtype)
    file.patched("scalar", [], [0]).patched("empty", [0, 3], []).sparse("without", [4], [1])
    file = good("patch-of-page")
    for size, further in {3: bf16(5, 6), 2: b"", 1: b""}.items():
        file.sparse(f"rows.{size}", [2, 2], [1], dtype="BF16", value_bytes=bf16(-2), base=bf16(2))
        file.origin("w").resize(size, further).result(bf16(1, -2, 3, 4)[: 4 * size] + further)


# Bad files


def one() -> Maker:
    return Maker().sparse("w", [4, 300], [0, 1, 256, 1199])


def header_of(file: Maker) -> tuple[Json, str, bytes]:
    header, buffer = file.layout()
    return header, compact(header), buffer


# Halves of a pair: none of these is Unicode, though all are escapes that JSON's grammar allows.
SURROGATES = {
    "high": "\\ud83e",
    "low": "\\udde0",
    "turned": "\\udde0\\ud83e",
    "apart": "\\ud83e \\udde0",
    "upper-case": "\\uDBFF",
}


def bad_container() -> None:
    file = one().file()
    header, text, buffer = header_of(one())
    end = len(file)
    bad("file-truncated--empty", b"")
    bad("file-truncated--seven-bytes", file[:7])
    bad("file-truncated--no-header", file[:8])
    bad("file-truncated--short-header", file[:100])
    bad("file-truncated--no-buffer", file[: end - len(buffer)])
    bad("file-truncated--short-buffer", file[:-1])
    bad("file-trailing--one-byte", file + b"\0")
    bad("file-trailing--without-streams", Maker().file() + b" ")
    bad("header-too-large--2-to-60", struct.pack("<Q", 2**60))
    bad("header-too-large--all-ones", b"\xff" * 8 + file[8:])
    bad("header-too-large--one-more", struct.pack("<Q", 100_000_001) + file[8:])

    def header_json(what: str, data: str | bytes) -> None:
        bad("header-json--" + what, assemble(data, buffer))

    header_json("not-json", text[:-1] + ",}")
    header_json("unfinished", text[:-1])
    header_json("single-quotes", text.replace('"dtype"', "'dtype'"))
    header_json("comment", text[:-1] + "/* */}")
    header_json("leading-space", " " + text)
    header_json("bom", "\ufeff" + text)
    header_json("trailing-nul", text + "\0")
    header_json("second-object", text + "{}")
    header_json("array", "[" + text + "]")
    header_json("empty", "")
    header_json(
        "control-character-in-string",
        text[:-1].replace('"__metadata__":{', '"__metadata__":{"a":"\n",') + "}",
    )
    header_json("invalid-utf8", text.encode().replace(b'"__metadata__":{', b'"__metadata__":{"a":"\xff",'))
    header_json(
        "utf8-surrogate", text.encode().replace(b'"__metadata__":{', b'"__metadata__":{"a":"\xed\xa0\x80",')
    )
    header_json("utf8-overlong", text.encode().replace(b'"__metadata__":{', b'"__metadata__":{"a":"\xc1\xa1",'))
    for what, half in SURROGATES.items():
        header_json(f"surrogate-{what}", text.replace('"__metadata__":{', f'"__metadata__":{{"a":"{half}",'))
    header_json("surrogate-in-name", text[:-1] + f',"\\ud800":{compact(header["w#values"])}}}')
    header_json("trailing-line-feed", text + "\n")
    entry = compact(header["w#values"])
    header_json("duplicate-stream", text[:-1] + f',"w#values":{entry}}}')
    header_json("duplicate-stream-escaped", text[:-1] + f',"w#\\u0076alues":{entry}}}')
    header_json("duplicate-metadata", text[:-1] + ',"__metadata__":' + compact(header["__metadata__"]) + "}")
    header_json("duplicate-in-metadata", text.replace('"__metadata__":{', '"__metadata__":{"a":"","a":"",'))
    header_json("duplicate-in-entry", text.replace('"dtype":"F32"', '"dtype":"F32","dtype":"F32"'))
    # These break rule header-entry as well, as such a value would in any place. JSON comes first.
    header_json("nan", text[:-1] + ',"x":NaN}')
    header_json("minus-infinity", text[:-1] + ',"x":-Infinity}')
    header_json("deep", text[:-1] + ',"x":' + "[" * 40 + "]" * 40 + "}")
    header_json("very-deep", text[:-1] + ',"x":' + '[{"":' * 700 + "0" + "}]" * 700 + "}")

    def changed(name: str, key: str, value: Any, **more: Any) -> None:
        new, _, _ = header_of(one())
        new["w#values"] |= {key: value} | more
        bad(name, assemble(compact(new), buffer))

    changed("header-entry--shape-true", "shape", [True, 4])
    changed("header-entry--shape-float", "shape", [4.0])
    changed("header-entry--shape-string", "shape", ["4"])
    changed("header-entry--shape-number", "shape", 4)
    changed("header-entry--shape-null", "shape", None)
    changed("header-entry--shape-object", "shape", {})
    changed("header-entry--offsets-null", "data_offsets", None)
    changed("header-entry--offsets-object", "data_offsets", {"begin": 0, "end": 16})
    changed("header-entry--offset-string", "data_offsets", ["0", 16])
    changed("header-entry--dtype-null", "dtype", None)
    changed("header-entry--dtype-list", "dtype", ["F32"])
    bad(
        "header-entry--offset-minus-zero",
        assemble(text.replace('"data_offsets":[0,', '"data_offsets":[-0,'), buffer),
    )
    changed("header-entry--shape-negative", "shape", [-1, -4])
    changed("header-entry--rank-65", "shape", [1] * 64 + [4])
    changed("header-entry--one-offset", "data_offsets", [16])
    changed("header-entry--three-offsets", "data_offsets", [0, 16, 16])
    changed("header-entry--offset-false", "data_offsets", [False, 16])
    changed("header-entry--offset-float", "data_offsets", [0, 16.0])
    changed("header-entry--offset-negative", "data_offsets", [-16, 0])
    changed("header-entry--offsets-swapped", "data_offsets", [16, 0])
    changed("header-entry--dtype-number", "dtype", 32)
    changed("header-entry--unknown-key", "strides", [1])
    changed("unknown-dtype--F12", "dtype", "F12")
    changed("unknown-dtype--lower-case", "dtype", "f32")
    changed("unknown-dtype--fnuz", "dtype", "F8_E4M3FNUZ")
    changed("shape-overflow--stream", "shape", [2**52, 2], data_offsets=[0, 2**55])
    bad("shape-overflow--zero-and-2-to-53", Maker().whole("b", "U8", [0, 2**53]))
    bad("shape-overflow--zero-and-product", Maker().whole("b", "U8", [2**27, 0, 2**26]))
    bad("shape-overflow--zero-after-overflow", Maker().whole("b", "U8", [2**32, 2**32, 0]))
    bad("shape-overflow--zero-and-5000-digits", Maker().whole("b", "U8", [0, HUGE]))
    changed("shape-overflow--stream-wraps-to-4", "shape", [4, 2**32 + 1, 2**32, 2**32 - 1, 2**62 + 1])
    changed("shape-overflow--stream-5000-digits", "shape", [4, HUGE])
    longer = one()
    dtype, shape, data = longer.streams["w#values"]
    longer.stream("w#values", dtype, shape, data + b"\0")  # all else fits, the digest too
    longer.tensor()["digests"]["values"] = sha(data + b"\0")
    bad("dtype-length--one-byte-more", longer)
    changed("dtype-length--shape", "shape", [5])
    changed("dtype-length--dtype", "dtype", "BF16")
    changed("dtype-length--rank-0", "shape", [])
    changed("dtype-length--5000-digits", "data_offsets", [0, HUGE])

    def raw_header(name: str, change: Json, drop: str = "") -> None:
        new = {key: value for key, value in header.items() if key != drop} | change
        bad(name, assemble(compact(new), buffer))

    raw_header("header-entry--list", {"w#values": ["F32", [4], [0, 16]]})
    raw_header("header-entry--null", {"w#values": None})
    raw_header("header-entry--no-shape", {"w#values": {"dtype": "F32", "data_offsets": [0, 16]}})
    raw_header("header-entry--metadata-number", {"__metadata__": header["__metadata__"] | {"a": 1}})
    raw_header("header-entry--metadata-null", {"__metadata__": None})
    raw_header("header-entry--metadata-list", {"__metadata__": []})
    raw_header("no-manifest--no-metadata", {}, "__metadata__")
    raw_header("no-manifest--other-keys", {"__metadata__": {"format": "pt", "SHIRA": "{}"}})
    bad("no-manifest--empty-safetensors", assemble("{}", b""))


def bad_offsets() -> None:
    file = Maker().sparse("w", [10], [1, 2, 3, 4], "flat", store_base=True)
    header, _, buffer = header_of(file)  # 32 bytes of indices, 16 of values, 16 of base

    def place(what: str, data: bytes, **begins: int) -> None:
        new = json.loads(compact(header))
        for role, begin in begins.items():
            entry = new["w#" + role]
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            entry["data_offsets"] = [begin, begin + size]
        bad("offsets--" + what, assemble(compact(new), data))

    place("hole", buffer[:48] + bytes(8) + buffer[48:], base=56)
    place("hole-at-start", bytes(8) + buffer, indices=8, values=40, base=56)
    place("hole-at-start-one-stream-moved", buffer + buffer[:32], indices=64)
    place("overlap", buffer[:-8], base=40)
    file.replace("w#base", buffer[32:48])  # the same bytes, so that their digests stay right
    header, _, _ = header_of(file)
    place("same-bytes-twice", buffer[:48], base=32)
    empty = Maker().sparse("w", [10], [], "flat").sparse("v", [10], [3], "flat")
    header, text, buffer = header_of(empty)
    text = text.replace(compact(header["w#values"]), '{"dtype":"F32","shape":[0],"data_offsets":[5,5]}')
    bad("offsets--empty-stream-inside-another", assemble(text, buffer))
    text = header_of(empty)[1].replace(
        compact(header["w#values"]), '{"dtype":"F32","shape":[0],"data_offsets":[99,99]}'
    )
    bad("offsets--empty-stream-beyond", assemble(text, buffer))


def with_manifest(text: str, file: Maker | None = None) -> bytes:
    header, buffer = (file or one()).layout()
    header["__metadata__"] |= texts(text)
    return assemble(compact(header), buffer)


def bad_manifest_json() -> None:
    text = compact(one().manifest)

    def manifest_json(what: str, new: str) -> None:
        bad("manifest-json--" + what, with_manifest(new))

    manifest_json("empty", "")
    manifest_json("unfinished", text[:-1])
    manifest_json("array", "[" + text + "]")
    manifest_json("string", '"x"')
    manifest_json("second-object", text + text)
    manifest_json("nan", text[:-1] + ',"alpha":NaN}')
    manifest_json("infinity", text[:-1] + ',"unknown":[Infinity]}')
    manifest_json("duplicate-key", text[:-1] + ',"digest":"sha256"}')
    manifest_json("duplicate-unknown-key", text[:-1] + ',"a":{"b":1,"c":2,"b":1}}')
    manifest_json("duplicate-key-escaped", text.replace('"nnz":4', '"nnz":4,"\\u006enz":4'))
    manifest_json("depth-33", text[:-1] + ',"deep":' + "[" * 32 + "]" * 32 + "}")
    manifest_json("very-deep", text[:-1] + ',"deep":' + "[" * 1500 + "]" * 1500 + "}")
    manifest_json("deep-objects", text[:-1] + ',"deep":' + '{"":' * 1500 + "1" + "}" * 1500 + "}")
    for what, half in SURROGATES.items():
        manifest_json(f"surrogate-{what}", text[:-1] + f',"future":["{half}"]}}')
    manifest_json("surrogate-in-key", text[:-1] + ',"\\udc00":0}')
    manifest_json("surrogate-in-name", text.replace('"name":"w"', '"name":"w\\ud800"'))
    manifest_json("leading-space", " " + text)
    manifest_json("trailing-line-feed", text + "\n")
    manifest_json("trailing-nul", text + "\0")
    manifest_json("bom", "\ufeff" + text)
    manifest_json("leading-zero", text.replace('"nnz":4', '"nnz":04'))
    manifest_json("hexadecimal", text.replace('"nnz":4', '"nnz":0x4'))
    manifest_json("trailing-comma", text[:-1] + ",}")
    manifest_json("bad-escape", text[:-1] + ',"a":"\\x41"}')
    header, buffer = one().layout()
    plain = compact(header)
    quoted = compact(text)
    assert quoted in plain
    cut = quoted[:-2] + ',\\"a\\":\\"\\n\\"}"'  # a raw line feed inside a string of the manifest
    bad("manifest-json--control-character-in-string", assemble(plain.replace(quoted, cut), buffer))


def bad_manifest_digest() -> None:
    header, _, buffer = header_of(one())
    metadata = header["__metadata__"]
    right = metadata["shira_digest"]
    other = {"absent": None, "empty": "", "other": sha(b""), "upper-case": right.upper(), "short": right[:-1]}
    for what, digest in (
        other | {"long": right + "0", "prefix": "sha256:" + right, "line-feed": right + "\n"}
    ).items():
        header["__metadata__"] = {
            key: value for key, value in (metadata | {"shira_digest": digest}).items() if value is not None
        }
        bad(f"manifest-digest--{what}", assemble(compact(header), buffer))
    header["__metadata__"] = metadata
    for what, old, new in (
        ("strength", '"alpha":0.5', '"alpha":0.7'),
        ("shape", '"shape":[4,300]', '"shape":[8,300]'),
        ("space", '"alpha":0.5', '"alpha": 0.5'),
        ("writer", '"writer":"me"', '"writer":"us"'),
    ):
        header, _, buffer = header_of(one().set(alpha=0.5, writer="me"))
        assert header["__metadata__"]["shira"].count(old) == 1
        header["__metadata__"]["shira"] = header["__metadata__"]["shira"].replace(old, new)
        bad(f"manifest-digest--{what}", assemble(compact(header), buffer))


def bad_versions() -> None:
    for version in ("2.0", "0.9", "10.0", "9" * 40 + ".0"):
        bad(f"unknown-major--{version[:4]}", one().set(format_version=version))
    bad("unknown-major--rest-of-another-form", with_manifest('{"format_version":"2.0"}', Maker()))
    for version in ("1", "1.0.0", "01.0", "1.00", "1.", "", "v1.0", "1.0\n", " 1.0", "1,0", "1.-1", "１.0"):
        name = version.replace("\n", "n").replace(" ", "space").replace("１", "full-width-1") or "empty"
        bad(f"manifest-schema--format-version-{name}", one().set(format_version=version))
    bad("manifest-schema--format-version-number", one().set(format_version=1.0))
    for feature in ("zstd", "byte-planes", "xor-base", "shards", "x-experiment", "", "Mask-File"):
        bad(f"unknown-feature--{feature or 'empty'}", one().set(features=[feature]))
    bad("unknown-feature--second", one().set(features=["mask-file", "future"]))
    bad("unknown-feature--higher-minor", one().set(format_version="1.1", features=["future"]))
    rest = '{"format_version":"1.5","features":["future"],"tensors":"elsewhere"}'
    bad("unknown-feature--rest-of-another-form", with_manifest(rest, Maker()))
    bad("manifest-schema--features-string", one().set(features="mask-file"))
    bad("manifest-schema--features-object", one().set(features={}))
    bad("manifest-schema--features-number-inside", one().set(features=[1]))
    bad("manifest-schema--features-twice", one().set(features=["mask-file", "mask-file"]))
    for digest in ("sha512", "SHA256", "sha256 ", "blake3"):
        bad(f"unknown-digest--{digest.strip()}{'-space' * digest.endswith(' ')}", one().set(digest=digest))
    bad("manifest-schema--digest-null", one().set(digest=None))


# Names that no file can have on some common system (section 3.4).
NOT_FILES = {
    "empty": "",
    "dot": ".",
    "dots": "..",
    "slash": "a/m.st",
    "backslash": "a\\m.st",
    "colon": "c:m.st",
    "star": "m*.st",
    "question-mark": "m?.st",
    "quote": 'm".st',
    "less": "m<.st",
    "greater": "m>.st",
    "pipe": "m|.st",
    "nul": "m\0.st",
    "line-feed": "m\n.st",
    "delete": "m\x7f.st",
    "last-dot": "m.st.",
    "last-space": "m.st ",
    "device": "CON",
    "device-lower-case": "nul",
    "device-with-extension": "aux.tar.st",
    "device-with-space": "Prn .st",
    "device-with-number": "COM7.st",
    "device-with-superscript": "lpt¹",
    "device-conin": "CONIN$",
    "256-bytes": "m" * 256,
    "256-bytes-of-128-characters": "é" * 128,
}


def bad_schema() -> None:
    for key in ("format_version", "features", "digest", "tensors"):
        file = one() if key != "tensors" else Maker()
        del file.manifest[key]
        bad(f"manifest-schema--no-{key.replace('_', '-')}", file)
    for key in ("name", "shape", "dtype", "nnz", "values", "indices", "digests"):
        file = one()
        del file.tensor()[key]
        bad(f"manifest-schema--tensor-no-{key}", file)
    text = compact(one().set(alpha=0.5).manifest)
    for what, number in {
        "1e999": "1e999",
        "minus-1e999": "-1e999",
        "400-digits": "9" * 400,
        "1e309": "1e309",
    }.items():
        bad(f"manifest-schema--alpha-{what}", with_manifest(text.replace('"alpha":0.5', f'"alpha":{number}')))
    bad("manifest-schema--alpha-5000-digits", one().set(alpha=HUGE))
    text = compact(Maker().sparse("w", [4], []).manifest)
    bad(
        "manifest-schema--nnz-minus-zero",
        with_manifest(text.replace('"nnz":0', '"nnz":-0'), Maker().sparse("w", [4], [])),
    )
    bad(
        "manifest-schema--nnz-exponent",
        with_manifest(text.replace('"nnz":0', '"nnz":0e0'), Maker().sparse("w", [4], [])),
    )
    tops: Json = {
        "alpha-string": {"alpha": "1"},
        "alpha-true": {"alpha": True},
        "alpha-null": {"alpha": None},
        "whole-object": {"whole": {}},
        "whole-null": {"whole": None},
        "components-list": {"components": []},
        "mask-files-list": {"mask_files": []},
        "mask-file-digest": {"mask_files": {"m.st": "abc"}},
    }
    for what, keys in tops.items():
        bad(f"manifest-schema--{what}", one().set(**keys))
    bad("manifest-schema--tensors-object", Maker().set(tensors={}))
    bad("manifest-schema--tensor-list", Maker().set(tensors=[["w"]]))
    bad("manifest-schema--tensor-null", Maker().set(tensors=[None]))
    components: Json = {
        "string": {"a": "x"},
        "null": {"a": None},
        "list": {"a": []},
        "in-two-cases": {"unet": {}, "UNet": {}},
    }
    for what, value in components.items():
        bad(f"manifest-schema--component-{what}", Maker().set(components=value))
    for what, name in NOT_FILES.items():
        bad(f"manifest-schema--component-{what}", Maker().set(components={name: {}}))
        bad(f"manifest-schema--mask-file-{what}", one().set(mask_files={name: sha(b"")}))
    bad("manifest-schema--mask-file-in-two-cases", one().set(mask_files={"m.st": sha(b""), "M.st": sha(b"")}))
    items: Json = {
        "name-number": {"name": 5},
        "name-null": {"name": None},
        "shape-negative": {"shape": [-4, -300]},
        "shape-string": {"shape": "4x300"},
        "shape-true": {"shape": [True, 1200]},
        "shape-float": {"shape": [4.0, 300]},
        "shape-rank-65": {"shape": [1] * 63 + [4, 300]},
        "shape-null": {"shape": None},
        "dtype-number": {"dtype": 32},
        "nnz-negative": {"nnz": -1},
        "nnz-float": {"nnz": 4.0},
        "nnz-string": {"nnz": "4"},
        "nnz-null": {"nnz": None},
        "values-other": {"values": "sum"},
        "values-upper-case": {"values": "TARGET"},
        "values-list": {"values": ["target"]},
        "indices-string": {"indices": "gap8"},
        "indices-no-codec": {"indices": {}},
        "codec-number": {"indices": {"codec": 8}},
        "digests-list": {"digests": []},
        "digests-null": {"digests": None},
        "base-values-number": {"base_values": 0},
        "base-values-string": {"base_values": "false"},
        "base-values-null": {"base_values": None},
    }
    for what, keys in items.items():
        file = one()
        file.tensor().update(keys)
        bad(f"manifest-schema--{what}", file)
    file = Maker().sparse("w", [4], [2])
    file.tensor()["nnz"] = True
    bad("manifest-schema--nnz-true", file)
    sizes: Json = {
        "0": 0,
        "15": 15,
        "negative": -16,
        "2-to-31": 2**31,
        "float": 16.0,
        "true": True,
        "null": None,
    }
    for what, size in (sizes | {"string": "4096"}).items():
        file = one()
        file.tensor()["indices"]["block_size"] = size
        bad(f"manifest-schema--block-size-{what}", file)


def bad_types() -> None:
    """Every key that is no provenance with a value of every type that it must not have."""
    digest = sha(b"")
    values: Json = {
        "null": None,
        "true": True,
        "fraction": 1.5,
        "minus-1": -1,
        "7": 7,
        "text": "text",
        "digest": digest,
        "list": ["text"],
        "list-of-numbers": [2, 3],
        "object": {"text": digest},
    }
    words = {"name", "dtype", "from", "tensor", "file"}
    numbers = {"shape": {"list-of-numbers"}, "nnz": {"7"}, "rows": {"7"}, "alpha": {"fraction", "minus-1", "7"}}
    fine: dict[str, set[str]] = numbers | {"offset": {"minus-1", "7"}, "step": {"minus-1", "7"}, "low": {"7"}}
    fine |= {
        "base_values": {"true"},
        "removed": {"list"},
        "components": set(),
        "mask_files": {"object"},
        "features": {"list"},
    }
    fine |= {word: {"text", "digest"} for word in words} | {
        "digest": {"text", "digest"},
        "codec": {"text", "digest"},
    }
    fine |= {
        role: {"digest"}
        for role in ("digests.values", "digests.base", "digests.indices", "digests.result", "digests.rows")
    }

    def each(where: str, file: Callable[[], Maker], place: Callable[[Maker], Json], keys: Iterable[str]) -> None:
        for key in keys:
            for what, value in values.items():
                if what not in fine.get(f"{where}.{key}", fine.get(key, set())):
                    made = file()
                    place(made)[key] = value
                    bad(f"manifest-schema--type-{where}-{key.replace('_', '-')}-{what}", made)

    def patched() -> Maker:
        return Maker().sparse("w", [4, 3], [0, 11], store_base=True).origin("v").resize(6)

    def masked() -> Maker:
        return use_masks(Maker(), "mask-file.masks", GOOD["masks"].file())

    def whole() -> Maker:
        return Maker().whole("b", "F32", [1], base=f32(1), store_base=True)

    tops = ("format_version", "tensors", "whole", "alpha", "removed", "components")
    each("file", one, lambda file: file.manifest, tops)
    each("file", masked, lambda file: file.manifest, ["mask_files", "features"])
    each("file", Maker, lambda file: file.manifest, ["digest"])
    items = ("name", "shape", "dtype", "nnz", "values", "indices", "digests", "base_values", "from", "rows")
    each("sparse", patched, lambda file: file.tensor(), items)
    each("digests", patched, lambda file: file.tensor()["digests"], ["indices", "values", "base", "rows"])
    each("digests", one, lambda file: file.tensor()["digests"], ["result"])
    each("indices", one, lambda file: file.tensor()["indices"], ["codec", "block_size"])
    each("shared", masked, lambda file: file.tensor()["indices"], ["tensor", "file"])
    each(
        "structured",
        lambda: Maker().structured("w", [4, 4], rows(2, 1)),
        lambda file: file.tensor()["indices"],
        ["pattern"],
    )
    part = lambda file: file.tensor()["indices"]["pattern"][0]  # noqa: E731
    each("part", lambda: Maker().structured("w", [4, 4], rows(2, 1)), part, ["kind", "step", "offset"])
    each(
        "runs",
        lambda: Maker().runs("w", [32], 2, 2, [0, 3]),
        lambda file: file.tensor()["indices"],
        ["length", "low"],
    )
    wholes = ("name", "shape", "dtype", "digests", "base_values")
    each("whole", whole, lambda file: file.manifest["whole"][0], wholes)


def bad_schema_digests() -> None:
    def with_digest(what: str, value: Any, role: str = "base") -> None:
        file = one()
        file.tensor()["digests"][role] = value
        bad(f"manifest-schema--{what}", file)

    right = one().tensor()["digests"]["base"]
    with_digest("digest-upper-case", right.upper())
    with_digest("digest-short", right[:-1])
    with_digest("digest-long", right + "0")
    with_digest("digest-not-hex", "g" + right[1:])
    with_digest("digest-line-feed", right + "\n")
    with_digest("digest-prefix", "sha256:" + right)
    with_digest("digest-number", 5)
    with_digest("digest-of-tensor-null", None)
    with_digest("digest-of-blocks", "", "blocks")
    for role in ("indices", "values", "base"):
        file = one()
        del file.tensor()["digests"][role]
        bad(f"manifest-schema--target-no-digest-{role}", file)
    for codec in ("varint", "flat"):
        file = Maker().sparse("w", [40], [3], codec)
        del file.tensor()["digests"]["indices"]
        bad(f"manifest-schema--{codec}-no-digest-indices", file)
    file = Maker().sparse("w", [40], range(20), block_size=16)
    del file.tensor()["digests"]["blocks"]
    bad("manifest-schema--no-digest-blocks", file)
    file = Maker().sparse("w", [40], [3], values="delta")
    del file.tensor()["digests"]["values"]
    bad("manifest-schema--delta-no-digest-values", file)
    file = Maker().sparse("w", [40], [3], values="delta", store_base=True)
    del file.tensor()["digests"]["base"]
    bad("manifest-schema--delta-base-values-no-digest", file)
    for role in ("values", "base"):
        file = Maker().mask("w", [40], [3])
        file.tensor()["digests"][role] = sha(b"")
        bad(f"manifest-schema--mask-with-digest-{role}", file)
    file = Maker().mask("w", [40], [3])
    file.tensor()["base_values"] = True
    file.stream("w#base", "F32", [1], f32(1))
    bad("manifest-schema--mask-with-base-values", file)
    whole: Json = {
        "no-name": {"name": ABSENT},
        "no-shape": {"shape": ABSENT},
        "no-dtype": {"dtype": ABSENT},
        "no-digests": {"digests": ABSENT},
        "no-digest-values": {"digests": {"base": sha(b"")}},
        "base-values-string": {"base_values": "yes"},
    }
    bad("manifest-schema--whole-string", Maker().set(whole=["b"]))
    for what, change in whole.items():
        item = {"name": "b", "shape": [0], "dtype": "U8", "digests": {"values": sha(b"")}} | change
        file = Maker().set(whole=[{key: value for key, value in item.items() if value is not ABSENT}])
        file.stream("b", "U8", [0], b"")
        bad(f"manifest-schema--whole-{what}", file)
    file = Maker().whole("b", "F32", [1], base=f32(3), store_base=True)
    del file.manifest["whole"][0]["digests"]["base"]
    bad("manifest-schema--whole-base-values-no-digest", file)
    file = Maker().whole("b", "F32", [1], base=f32(3))
    file.manifest["whole"][0]["digests"]["base"] = "?"
    bad("manifest-schema--whole-digest-base", file)


def bad_schema_codecs() -> None:
    parts: Json = {
        "no-pattern": None,
        "pattern-object": diagonal(0),
        "part-string": ["diagonal"],
        "part-no-kind": [{"offset": 0}],
        "part-no-offset": [{"kind": "diagonal"}],
        "rows-no-step": [{"kind": "rows", "offset": 0}],
        "columns-no-step": [{"kind": "columns", "offset": 0}],
        "part-kind": [{"kind": "blocks", "offset": 0, "step": 1}],
        "kind-list": [{"kind": ["rows"], "offset": 0, "step": 1}],
        "offset-float": [diagonal(0) | {"offset": 0.0}],
        "offset-false": [diagonal(0) | {"offset": False}],
        "step-string": [rows(1, 0) | {"step": "1"}],
        "step-true": [rows(1, 0) | {"step": True}],
    }
    for what, pattern in parts.items():
        file = Maker().structured("w", [4, 4], diagonal(0))
        file.tensor()["indices"]["pattern"] = pattern
        if pattern is None:
            del file.tensor()["indices"]["pattern"]
        bad(f"manifest-schema--{what}", file)

    def shared(what: str, change: Json, drop: Sequence[str] = ()) -> None:
        file = Maker().sparse("v", [9], [1]).sparse("w", [9], [1], "shared", more={"tensor": "v"})
        file.tensor(1)["indices"].update(change)
        for key in drop:
            del file.tensor(1)["indices"][key]
        bad(f"manifest-schema--shared-{what}", file)

    shared("no-tensor", {}, ["tensor"])
    shared("tensor-number", {"tensor": 0})
    shared("tensor-null", {"tensor": None})
    shared("file-null", {"file": None})
    mask = GOOD["masks"].file()
    file = use_masks(Maker(), "mask-file.masks", mask).set(features=[])
    bad("manifest-schema--mask-file-no-feature", file)
    file = use_masks(Maker(), "mask-file.masks", mask)
    del file.manifest["mask_files"]
    bad("manifest-schema--no-mask-files", file)
    file = use_masks(Maker(), "mask-file.masks", mask)
    file.manifest["mask_files"] = {"MASK-FILE.masks": sha(mask)}
    bad("manifest-schema--mask-files-of-another-name", file)
    for what, name in {
        "slash": "../bad/mask-file.masks",
        "backslash": "..\\mask-file.masks",
        "dots": "..",
    }.items():
        bad(f"manifest-schema--shared-file-{what}", use_masks(Maker(), name, mask))


def bad_names() -> None:
    names = {
        "empty": "",
        "line-feed": "a\nb",
        "nul": "a\0",
        "delete": "\x7f",
        "unit-separator": "\x1f",
        "1025-bytes": "n" * 1025,
        "1026-bytes-of-513-characters": "é" * 513,
    }
    for what, name in names.items():
        bad(f"name--{what}", Maker().sparse(name, [4], [1]))
        if what != "empty":
            bad(f"name--whole-{what}", Maker().whole(name, "F32", [1]))
    bad("name--metadata", Maker().sparse("__metadata__", [4], [1]))
    bad("name--metadata-structured-mask", Maker().structured("__metadata__", [4], diagonal(0), values="none"))
    file = one()
    file.manifest["tensors"] *= 2
    bad("duplicate-name--sparse", file)
    file = Maker().whole("b", "F32", [1])
    file.manifest["whole"] *= 2
    bad("duplicate-name--whole", file)
    bad("duplicate-name--sparse-and-whole", one().whole("w", "F32", [1]))
    for role, dtype in {"values": "F32", "indices": "U8", "base": "F32"}.items():
        file = Maker().sparse("w", [4], [1], store_base=True)
        file.whole("w#" + role, dtype, [1], data=file.streams["w#" + role][2])
        bad(f"duplicate-name--stream-{role}", file)
    file = Maker().whole("b", "F32", [1], base=f32(2), store_base=True).whole("b#base", "F32", [1], data=f32(2))
    bad("duplicate-name--whole-base", file)
    components: Json = {"unet": {}, "text": {}}
    for what, name in {
        "unknown": "vae/w",
        "none": "w",
        "prefix": "unet2/w",
        "empty": "/w",
        "no-slash": "unet",
    }.items():
        bad(f"component--{what}", Maker().set(components=components).sparse(name, [4], [1]))
    bad(
        "component--whole",
        Maker().set(components=components).sparse("unet/w", [4], [1]).whole("b", "F32", [1]),
    )
    bad("component--no-components", Maker().set(components={}).sparse("unet/w", [4], [1]))
    bad("component--no-rest", Maker().set(components=components).sparse("unet/", [4], [1]))
    bad("component--whole-no-rest", Maker().set(components=components).whole("text/", "F32", [1]))


def bad_tensors() -> None:
    for dtype in ("I8", "BOOL", "U64", "F12", "bf16", ""):
        file = Maker().mask("w", [4], [1])
        file.tensor()["dtype"] = dtype
        bad(f"sparse-dtype--{dtype or 'empty'}", file)
    bad("sparse-dtype--values", Maker().sparse("w", [4], [1], dtype="I32"))
    for codec in ("gap16", "GAP8", "", "x-mine", "zstd"):
        file = Maker().mask("w", [4], [1])
        file.tensor()["indices"]["codec"] = codec
        bad(f"unknown-codec--{codec or 'empty'}", file)
    for what, shape in {
        "2-to-53": [2**53],
        "product": [2**27, 2**27],
        "wraps-to-0": [2**32, 2**32],
        "wraps-to-1200": [1200, 2**63 + 1, 2**63 + 1],
        "5000-digits": [HUGE],
    }.items():
        bad(f"shape-overflow--{what}", Maker().sparse("w", shape, [1]))


def bad_shared() -> None:
    def shared(
        what: str, target: str, file: Maker, shape: Sequence[int] = (9,), indices: Sequence[int] = (1,)
    ) -> None:
        bad(f"shared-target--{what}", file.sparse("w", shape, indices, "shared", more={"tensor": target}))

    shared("missing", "nothing", Maker())
    shared("self", "w", Maker())
    shared("whole", "b", Maker().whole("b", "F32", [9]))
    shared("stream-name", "v#indices", Maker().sparse("v", [9], [1]))
    shared("other-shape", "v", Maker().sparse("v", [10], [1]))
    shared("same-numel", "v", Maker().sparse("v", [3, 3], [1]))
    shared("other-rank", "v", Maker().sparse("v", [9, 1], [1]))
    shared("other-nnz", "v", Maker().sparse("v", [9], [1, 2]))
    shared("chain", "v", Maker().sparse("u", [9], [1]).sparse("v", [9], [1], "shared", more={"tensor": "u"}))
    shared("ring", "v", Maker().sparse("v", [9], [1], "shared", more={"tensor": "w"}))
    mask = GOOD["masks"].file()
    MASKS["mask-file.masks"] = mask

    def with_mask(name: str, tensor: str, shape: Sequence[int], indices: Sequence[int], **change: Any) -> None:
        file = Maker().set(features=["mask-file"], mask_files={"mask-file.masks": sha(mask)}).set(**change)
        bad(
            name,
            file.sparse("w", shape, indices, "shared", more={"tensor": tensor, "file": "mask-file.masks"}),
        )

    with_mask("shared-target--mask-file-missing", "w", [10, 10], [3, 50, 99])
    with_mask("shared-target--mask-file-shared", "q.too", [10, 10], [3, 50, 99])
    with_mask("shared-target--mask-file-other-shape", "q", [100], [3, 50, 99])
    with_mask("shared-target--mask-file-other-nnz", "q", [10, 10], [3, 50])
    wrong = {"mask-file.masks": sha(mask + b"\0")}
    with_mask("mask-file--other-digest", "q", [10, 10], [3, 50, 99], mask_files=wrong)
    file = Maker().set(features=["mask-file"], mask_files={"not-there.masks": sha(mask)})
    file.sparse("w", [10, 10], [3, 50, 99], "shared", more={"tensor": "q", "file": "not-there.masks"})
    bad("mask-file--missing", file)
    # Rules that the mask file breaks: of the file, and of the tensor that is used.
    header, _, buffer = header_of(one())
    faults = {
        "no-manifest": assemble(compact({key: header[key] for key in header if key != "__metadata__"}), buffer),
        "file-trailing": mask + b"\0",
        "header-json": struct.pack("<Q", 2) + b"[]",
        "manifest-schema": Maker().mask("q", [10, 10], [3, 50, 99]).set(alpha=None).file(),
        "manifest-digest": Maker().mask("q", [10, 10], [3, 50, 99]).file().replace(b"[10,10]", b"[10,19]", 1),
        "unknown-feature": Maker().mask("q", [10, 10], [3, 50, 99]).set(features=["future"]).file(),
        "digest-mismatch": Maker().mask("q", [10, 10], [3, 50, 99]).mask("other", [4], [1], "flat").file(),
        "out-of-range": Maker()
        .mask("q", [10, 10], [3, 50, 99], "flat")
        .replace("q#indices", i64(3, 50, 100))
        .file(),
        "stream-truncated": Maker().mask("q", [10, 10], [3, 50, 99]).replace("q#indices", b"\x03").file(),
    }
    damaged = bytearray(faults["digest-mismatch"])
    damaged[-9] ^= 1  # the last byte of `q#indices`, before the 8 of `other#indices`
    faults["digest-mismatch"] = bytes(damaged)
    for rule, data in faults.items():
        name = f"{rule}.masks"
        MASKS[name] = data
        file = Maker().set(features=["mask-file"], mask_files={name: sha(data)})
        file.sparse("w", [10, 10], [3, 50, 99], "shared", more={"tensor": "q", "file": name})
        bad(f"{rule}--in-mask-file", file)


def bad_limit() -> None:
    """More entries than the bytes of the file may stand for: 2^24, and 64 for each byte of the buffer."""
    most = 2**24

    def listed(name: str, nnz: int, file: Maker) -> Maker:
        file.sparse(
            name, [most * 4], [], "structured", values="none", more={"pattern": [columns(1, 0), rows(1, 0)]}
        )
        file.tensor(-1).update(nnz=nnz, shape=[nnz])
        return file

    bad("limit--structured", listed("w", most + 1, Maker()))
    bad("limit--structured-2-to-53", listed("w", MAX_NUMEL, Maker()))
    bad("limit--structured-beside-bytes", listed("w", most + 641, Maker().whole("b", "U8", [10])))
    bad("limit--structured-three", listed("c", 1, listed("b", most // 2, listed("a", most // 2, Maker()))))
    file = listed("b", most, Maker())
    shared = {"codec": "shared", "tensor": "b"}
    file.manifest["tensors"].append(file.tensor() | {"name": "a", "indices": shared})
    bad("limit--shared", file)
    file = Maker().runs("w", [most + 256 * 65], 256, 0, [], bytes([255]) * 2, values="none")
    file.tensor()["nnz"] = most + 256 * 65
    bad("limit--runs", file)
    for codec in ("gap8", "varint"):
        file = Maker().mask("w", [MAX_NUMEL], [0, 1, 2], codec)
        file.tensor()["nnz"] = 2**50
        bad(f"limit--{codec}", file)
    mask = listed("q", most, Maker()).mask("r", [4], [1]).file()
    MASKS["limit.masks"] = mask
    file = Maker().set(features=["mask-file"], mask_files={"limit.masks": sha(mask)}).whole("b", "U8", [1])
    for name in ("w", "v"):
        item: Json = {"name": name, "shape": [most], "dtype": "F32", "nnz": most, "values": "none", "digests": {}}
        file.manifest["tensors"].append(
            item | {"indices": {"codec": "shared", "tensor": "q", "file": "limit.masks"}}
        )
    bad("limit--mask-file", file)


def bad_streams() -> None:
    for role in ("indices", "blocks", "values", "base"):
        file = Maker().sparse("w", [40], range(20), block_size=16, store_base=True)
        del file.streams["w#" + role]
        bad(f"missing-stream--{role}", file)
    file = Maker().whole("b", "F32", [1], base=f32(1), store_base=True)
    del file.streams["b"]
    bad("missing-stream--whole", file)
    file = Maker().whole("b", "F32", [1], base=f32(1), store_base=True)
    del file.streams["b#base"]
    bad("missing-stream--whole-base", file)

    def stray(what: str, name: str, file: Maker, dtype: str = "F32", shape: Sequence[int] = (1,)) -> None:
        file.stream(name, dtype, shape, bytes(elements(shape) * SIZE[dtype]))
        bad(f"stray-stream--{what}", file)

    stray("other-name", "v#values", one())
    stray("tensor-name", "w", one())
    stray("empty-name", "", one())
    stray("empty-stream", "x", one(), "U8", [0])
    stray("without-tensors", "x", Maker())
    stray("base", "w#base", one(), "F32", [4])
    stray("blocks-without-block-size", "w#blocks", one(), "I64", [1, 2])
    stray(
        "blocks-nnz-is-block-size",
        "w#blocks",
        Maker().sparse("w", [40], range(16), block_size=16),
        "I64",
        [1, 2],
    )
    stray("blocks-of-flat", "w#blocks", Maker().sparse("w", [40], [1], "flat"), "I64", [1, 2])
    stray("values-of-mask", "w#values", Maker().mask("w", [40], [1]))
    stray("indices-of-structured", "w#indices", Maker().structured("w", [2, 2], diagonal(0)), "U8", [2])
    stray(
        "indices-of-shared",
        "v#indices",
        Maker().sparse("w", [9], [1]).sparse("v", [9], [1], "shared", more={"tensor": "w"}),
    )
    stray("base-of-whole", "b#base", Maker().whole("b", "F32", [1]))
    stray("role-in-upper-case", "w#VALUES", one(), "F32", [4])

    def other(
        what: str, role: str, dtype: str, shape: Sequence[int], file: Maker, rule: str = "stream-dtype"
    ) -> None:
        data = file.streams["w#" + role][2]
        assert len(data) == elements(shape) * SIZE[dtype]
        bad(f"{rule}--{what}", file.replace("w#" + role, data, shape, dtype))

    blocks = Maker().sparse("w", [40], range(20), block_size=16)
    other("target-dtype", "values", "I32", [4], one())
    other("target-other-float", "values", "BF16", [2], Maker().sparse("w", [9], [1, 2], dtype="F16"))
    other("values-rank-2", "values", "F32", [4, 1], one())
    other("values-rank-0", "values", "F32", [], Maker().sparse("w", [9], [1]))
    other("gap8-I8", "indices", "I8", [7], one())
    other("gap8-rank-2", "indices", "U8", [1, 7], one())
    other("varint-BOOL", "indices", "BOOL", [1], Maker().sparse("w", [9], [1], "varint"))
    other("flat-U64", "indices", "U64", [2], Maker().sparse("w", [9], [1, 2], "flat"))
    other("flat-rank-2", "indices", "I64", [2, 1], Maker().sparse("w", [9], [1, 2], "flat"))
    other("blocks-U64", "blocks", "U64", [2, 2], blocks)
    other("blocks-rank-1", "blocks", "I64", [4], Maker().sparse("w", [40], range(20), block_size=16))
    other("base-dtype", "base", "U32", [1], Maker().sparse("w", [9], [1], store_base=True))
    other("base-rank-2", "base", "F32", [1, 1], Maker().sparse("w", [9], [1], store_base=True))
    other("delta-integer", "values", "I32", [1], Maker().sparse("w", [9], [1], values="delta"))
    file = Maker().sparse("w", [9], [1], values="delta", value_dtype="F32", dtype="BF16", base_digest=False)
    bad("stream-dtype--delta-without-base-digest", file)
    file = Maker().whole("w", "F32", [2, 2], base=noise("x", 16), store_base=True)
    other("whole-base-dtype", "base", "I32", [2, 2], file)
    file = Maker().whole("w", "F32", [2, 2], base=noise("x", 16), store_base=True)
    other("whole-base-rank", "base", "F32", [4], file)
    file = Maker().whole("w", "F32", [1, 4], base=noise("x", 16), store_base=True)
    other("whole-base-shape", "base", "F32", [4, 1], file, "count-mismatch")
    file = Maker().sparse("w", [40], range(20), block_size=16)
    other("shape-swapped", "blocks", "I64", [1, 4], file, "block-directory")
    for what, change in {
        "dtype": {"dtype": "F16"},
        "dtype-unknown": {"dtype": "F12"},
        "rank": {"shape": [4]},
    }.items():
        file = Maker().whole("b", "BF16", [2, 2], base=noise("x", 8), store_base=True)
        file.manifest["whole"][0] |= change
        bad(f"stream-dtype--whole-{what}", file)
    for what, shape in {"turned": [3, 2], "larger": [2, 4], "none": [0, 3], "2-to-50": [2**50, 3]}.items():
        file = Maker().whole("b", "BF16", [2, 3])
        file.manifest["whole"][0]["shape"] = shape
        bad(f"count-mismatch--whole-{what}", file)
    file = Maker().whole("b", "BF16", [2, 3])
    file.manifest["whole"][0]["shape"] = [0, 2**53]
    bad("shape-overflow--whole-in-manifest", file)


def bad_counts() -> None:
    bad("count-mismatch--values-too-few", one().replace("w#values", f32(1, 2, 3)))
    bad("count-mismatch--values-too-many", one().replace("w#values", f32(1, 2, 3, 4, 5)))
    bad(
        "count-mismatch--base-too-few",
        Maker().sparse("w", [9], [1, 2], store_base=True).replace("w#base", f32(1)),
    )
    bad(
        "count-mismatch--base-too-many",
        Maker().sparse("w", [9], [1], store_base=True).replace("w#base", f32(1, 2)),
    )
    bad("count-mismatch--flat-too-few", Maker().sparse("w", [9], [1, 2], "flat").replace("w#indices", i64(1)))
    bad(
        "count-mismatch--flat-too-many",
        Maker().sparse("w", [9], [1, 2], "flat").replace("w#indices", i64(1, 2, 3)),
    )
    whole = Maker().whole("w", "F32", [3], base=f32(1, 2, 3), store_base=True)
    bad("count-mismatch--whole-base", whole.replace("w#base", f32(1, 2)))

    def structured(what: str, nnz: int, shape: Sequence[int], *pattern: Json) -> None:
        file = Maker().sparse("w", shape, range(nnz), "structured", more={"pattern": list(pattern)})
        bad(f"count-mismatch--{what}", file)

    structured("structured-too-few", 3, [3, 4], rows(3, 1))
    structured("structured-too-many", 5, [3, 4], rows(3, 1))
    structured("structured-overlap", 7, [3, 4], rows(3, 0), diagonal(0))
    structured("structured-union-larger", 4, [3, 4], rows(3, 0), diagonal(0))
    structured("structured-empty-pattern", 1, [3, 4])
    structured("structured-part-of-2-to-52", 4, [2**26, 2**26], diagonal(2**26 - 4), rows(1, 0))
    structured("structured-huge-part", 4, [MAX_NUMEL, 1], diagonal(0), columns(1, 0))
    empty = Maker().sparse("w", [0, 4], [], "structured", more={"pattern": []})
    empty.tensor()["nnz"] = 1
    bad("count-mismatch--nnz-of-empty-shape", empty.replace("w#values", f32(1)))

    def too_many(what: str, file: Maker, nnz: int) -> None:
        file.tensor()["nnz"] = nnz
        bad(f"count-mismatch--nnz-{what}", file)

    pattern = {"pattern": [rows(1, 0)]}
    too_many(
        "1-of-2-to-50-rows", Maker().sparse("w", [2**50, 0], [], "structured", values="none", more=pattern), 1
    )
    too_many(
        "5000-digits", Maker().sparse("w", [3, 4], range(12), "structured", values="none", more=pattern), HUGE
    )
    too_many("above-numel", Maker().sparse("w", [3, 4], range(12), "structured", values="none", more=pattern), 13)


def bad_digests() -> None:
    for role in ("indices", "blocks", "values", "base"):
        file = Maker().sparse("w", [40], range(20), block_size=16, store_base=True)
        file.tensor()["digests"][role] = sha(b"something else")
        bad(f"digest-mismatch--{role}", file)
    file = Maker().mask("w", [40], [7])
    file.tensor()["digests"]["indices"] = sha(b"something else")
    bad("digest-mismatch--mask", file)
    file = Maker().sparse("w", [40], [7], "flat", values="delta")
    file.tensor()["digests"]["values"] = sha(b"")
    bad("digest-mismatch--delta", file)
    file = Maker().sparse("w", [40], [])
    file.tensor()["digests"]["values"] = sha(b"\0")
    bad("digest-mismatch--empty-stream", file)
    file = Maker().sparse("v", [40], [1]).sparse("w", [40], [1], "shared", more={"tensor": "v"})
    file.tensor(1)["digests"]["values"] = sha(b"")
    bad("digest-mismatch--second-tensor", file)
    for role in ("values", "base"):
        file = Maker().whole("b", "F32", [2], base=f32(1, 2), store_base=True)
        file.manifest["whole"][0]["digests"][role] = sha(b"something else")
        bad(f"digest-mismatch--whole-{role}", file)
    data = bytearray(one().file())
    data[-1] ^= 1  # the last byte is one of the indices
    bad("digest-mismatch--one-bit", bytes(data))


def bad_codes() -> None:
    def stream(name: str, codec: str, text: str, nnz: int, shape: Sequence[int] = (4, 300)) -> None:
        file = Maker().sparse("w", shape, range(nnz), codec)
        bad(name, file.replace("w#indices", bytes.fromhex(text)))

    stream("stream-truncated--gap8-empty", "gap8", "", 1)
    stream("stream-truncated--gap8-too-few", "gap8", "000000", 4)
    stream("stream-truncated--gap8-in-escape", "gap8", "0000ff", 3)
    stream("stream-truncated--gap8-escapes-only", "gap8", "ffff", 1)
    for codec, text in {"gap8": "000000", "varint": "007e00"}.items():
        file = Maker().mask("w", [MAX_NUMEL], [0, 1, 2], codec)  # of many entries, but no more than are allowed
        file.tensor()["nnz"] = 2**24
        bad(f"stream-truncated--{codec}-nnz-2-to-24", file.replace("w#indices", bytes.fromhex(text)))
    file = Maker().runs("w", [2**24], 2, 0, [0], b"\x01", values="none")
    file.tensor()["nnz"] = 2**24
    bad("stream-truncated--runs-nnz-2-to-24", file)
    stream("stream-truncated--varint-empty", "varint", "", 1)
    stream("stream-truncated--varint-too-few", "varint", "0000", 3)
    stream("stream-truncated--varint-in-code", "varint", "00ac", 2)
    stream("stream-truncated--varint-in-long-code", "varint", "ffffff", 1, [2**40])
    stream("stream-trailing--gap8-one-entry", "gap8", "000000", 2)
    stream("stream-trailing--gap8-escape", "gap8", "0000ff", 2)
    stream("stream-trailing--gap8-nnz-0", "gap8", "00", 0)
    stream("stream-trailing--varint-one-entry", "varint", "007e00", 2)
    stream("stream-trailing--varint-unfinished", "varint", "0080", 1)
    stream("stream-trailing--varint-nnz-0", "varint", "00", 0)
    stream("varint--overlong-zero", "varint", "8000", 1)
    stream("varint--overlong-one", "varint", "008100", 2)
    stream("varint--overlong-three-bytes", "varint", "ac8200", 1)
    stream("varint--overlong-eight-bytes", "varint", "81" + "80" * 6 + "00", 1)
    stream("varint--nine-bytes", "varint", "80" * 8 + "01", 1, [MAX_NUMEL])
    stream("varint--endless", "varint", "ff" * 40, 1, [MAX_NUMEL])
    stream("out-of-range--gap8", "gap8", "0000feffffffb2", 4)
    stream("out-of-range--gap8-first", "gap8", "04", 1, [4])
    stream("out-of-range--varint", "varint", "ac02b507", 2, [1250])
    stream("out-of-range--varint-largest-code", "varint", "ff" * 7 + "7f", 1, [MAX_NUMEL])
    stream("out-of-range--varint-just", "varint", varint_code(MAX_NUMEL).hex(), 1, [MAX_NUMEL])
    stream("out-of-range--varint-2-to-32", "varint", varint_code(2**32).hex(), 1, [100])

    def flat(name: str, *indices: int, shape: Sequence[int] = (10,)) -> None:
        file = Maker().sparse("w", shape, range(len(indices)), "flat")
        bad(name, file.replace("w#indices", i64(*indices)))

    flat("out-of-range--flat", 0, 10)
    flat("out-of-range--flat-negative", -1, 3)
    flat("out-of-range--flat-2-to-32", 3, 2**32 + 4)
    flat("out-of-range--flat-largest", 3, 2**63 - 1)
    flat("out-of-range--flat-2-to-53", 3, 2**53, shape=[MAX_NUMEL])
    flat("unsorted--flat", 0, 5, 3, 9)
    flat("unsorted--flat-last", 0, 5, 4)
    flat("unsorted--flat-duplicate-apart", 1, 5, 1)
    flat("duplicate--flat", 0, 3, 3, 9)
    flat("duplicate--flat-zero", 0, 0)


def bad_runs() -> None:
    def code(name: str, text: str, runs: Sequence[int], length: int = 4, low: int = 0, numel: int = 32) -> None:
        bad(name, Maker().runs("w", [numel], length, low, runs, bytes.fromhex(text)))

    code("stream-truncated--runs-empty", "", [0])
    code("stream-truncated--runs-too-few", "03", [0, 1, 2])
    code("stream-truncated--runs-no-unary", "00", [0], low=1)
    code("stream-truncated--runs-low-bits", "00", [0, 1, 2], low=3)
    code("stream-truncated--runs-zeros", "00" * 40, [0])
    code("stream-trailing--runs-one-more", "07", [0, 1])
    code("stream-trailing--runs-byte", "0100", [0])
    code("stream-trailing--runs-byte-of-ones", "0101", [0])
    code("stream-trailing--runs-nnz-0", "00", [])
    code("stream-trailing--runs-low-bits", "0201", [0], low=1)
    code("out-of-range--runs", "0001", [0])
    code("out-of-range--runs-just", "8080", [7, 7])
    code("out-of-range--runs-first", "8001", [0], low=8, numel=512)
    code("out-of-range--runs-largest-gap", "ffffffffff1f01", [0], low=45)
    code("out-of-range--runs-beyond-2-to-53", "00" * 46 + "80", [0], low=45, numel=MAX_NUMEL)
    code("count-mismatch--runs-not-cut", "01", [7], numel=30)
    code("count-mismatch--runs-cut", "80", [0], numel=30)
    bad("count-mismatch--runs-cut-too-few", cut(Maker().runs("w", [30], 4, 0, [7]), 1))
    bad("count-mismatch--runs-part", cut(Maker().runs("w", [32], 4, 0, [1]), 3))
    for key in ("length", "low"):
        for what, value in {
            "missing": None,
            "negative": -1,
            "float": 2.0,
            "string": "2",
            "true": True,
            "large": 512,
        }.items():
            file = Maker().runs("w", [32], 2, 2, [0, 3])
            if value is None:
                del file.tensor()["indices"][key]
            else:
                file.tensor()["indices"][key] = value
            bad(f"manifest-schema--runs-{key}-{what}", file)
    for what, value in {"1": 1, "3": 3, "0": 0}.items():
        file = Maker().runs("w", [32], 2, 2, [0, 3])
        file.tensor()["indices"]["length"] = value
        bad(f"manifest-schema--runs-length-{what}", file)
    file = Maker().runs("w", [32], 2, 2, [0, 3])
    file.tensor()["indices"]["low"] = 46
    bad("manifest-schema--runs-low-46", file)
    bad("manifest-schema--runs-no-feature", Maker().runs("w", [32], 2, 2, [0, 3]).set(features=[]))
    file = Maker().runs("w", [32], 2, 2, [0, 3])
    del file.tensor()["digests"]["indices"]
    bad("manifest-schema--runs-no-digest", file)
    file = Maker().runs("w", [32], 2, 2, [0, 3])
    file.tensor()["digests"]["indices"] = sha(b"something else")
    bad("digest-mismatch--runs", file)
    bad("out-of-range--dropped-runs", Maker().runs("w", [8, 4], 4, 0, [0, 7]).resize(4))


def cut(file: Maker, nnz: int) -> bytes:
    """The only tensor with fewer entries than its runs have."""
    item = file.tensor()
    dtype, _, data = file.streams["w#values"]
    item["nnz"] = nnz
    item["digests"]["values"] = file.stream("w#values", dtype, [nnz], data[: nnz * SIZE[dtype]])
    return file.file()


def bad_directories() -> None:
    indices = [3 * k + 600 * (k // 16) for k in range(50)]
    for codec in ("gap8", "varint"):
        codes = encode(codec, indices)
        right = directory(indices, codes, 16)
        long = max(len(code) for code in codes)  # of a code that starts a block
        tables = {
            "first-index": [right[0], (right[1][0] + 1, right[1][1]), *right[2:]],
            "first-index-of-row-0": [(1, 0), *right[1:]],
            "first-index-negative": [(-1, 0), *right[1:]],
            "offset": [*right[:2], (right[2][0], right[2][1] + 1), right[3]],
            "offset-of-row-0": [(0, 1), *right[1:]],
            "offset-behind-escapes": [right[0], (right[1][0], right[1][1] + long - 1), *right[2:]],
            "offset-beyond-stream": [*right[:3], (right[3][0], 2**40)],
            "offset-negative": [*right[:3], (right[3][0], -1)],
            "next-entry": [right[0], (indices[17], right[1][1] + len(codes[16])), *right[2:]],
            "columns-swapped": [(offset, index) for index, offset in right],
            "rows-swapped": [right[0], right[2], right[1], right[3]],
            "of-another-block-size": directory(indices, codes, 17) + right[3:],
            "zeros": [(0, 0)] * 4,
            "one-row-too-few": right[:-1],
            "one-row-too-many": [*right, (indices[-1], sum(map(len, codes[:-1])))],
            "no-rows": [],
        }
        for what, table in tables.items():
            file = Maker().sparse("w", [60, 100], indices, codec, block_size=16)
            assert table != right
            file.replace("w#blocks", b"".join(i64(*row) for row in table), [len(table), 2])
            bad(f"block-directory--{codec}-{what}", file)


def bad_patterns() -> None:
    def pattern(what: str, part: Json, shape: Sequence[int] = (3, 4), nnz: int = 0) -> None:
        file = Maker().sparse("w", shape, range(nnz), "structured", values="none", more={"pattern": [part]})
        bad(f"pattern--{what}", file)

    pattern("step-0", rows(0, 0))
    pattern("step-negative", columns(-1, 0))
    pattern("offset-negative", rows(2, -1))
    pattern("offset-is-step", rows(2, 2))
    pattern("columns-offset-is-step", columns(2, 2))
    pattern("offset-above-rows", rows(9, 3))
    pattern("offset-above-columns", columns(9, 4))
    pattern("diagonal-above", diagonal(4))
    pattern("diagonal-below", diagonal(-3))
    pattern("diagonal-5000-digits", diagonal(HUGE))
    pattern("rank-0-diagonal", diagonal(1), [])
    pattern("rank-1-column", columns(2, 1), [7])
    pattern("no-rows", rows(1, 0), [0, 4])
    pattern("no-columns", columns(1, 0), [3, 0])
    pattern("step-2-to-53", columns(2**53, 1))
    pattern("step-5000-digits", rows(HUGE, 1))
    pattern("no-columns-2-to-50", columns(1, 0), [2**50, 0])
    pattern("diagonal-above-no-columns", diagonal(0), [2**50, 0])
    pattern("diagonal-below-no-columns", diagonal(-(2**50)), [2**50, 0])
    pattern("no-rows-2-to-50", rows(3, 1), [0, 2**50])
    file = Maker().structured("w", [20, 20], *[diagonal(k) for k in range(9)])
    bad("pattern--nine-parts", file)


def bad_patches_schema() -> None:
    def grown() -> Maker:
        return Maker().sparse("w", [4, 3], [0, 11]).resize(6)

    uses = {
        "from": Maker().sparse("w", [4, 3], [1]).origin("v"),
        "from-own-name": Maker().sparse("w", [4, 3], [1]).origin("w"),
        "grown": grown(),
        "shrunk": Maker().sparse("w", [4, 3], [1]).resize(2),
        "same-rows": Maker().sparse("w", [4, 3], [1]).resize(4),
        "removed": one().removed("v"),
        "removed-alone": Maker().removed("v"),
        "second-tensor": one().sparse("v", [4], [1]).origin("u"),
        "mask": Maker().mask("w", [4], [1]).origin("v"),
    }
    for what, file in uses.items():
        bad(f"manifest-schema--patch-no-feature-{what}", file.set(features=[]))
    bad("manifest-schema--patch-other-feature", grown().set(features=["mask-file"]))
    bad("unknown-feature--Patch", one().set(features=["Patch"]))
    wrong: Json = {
        "from-number": {"from": 5},
        "from-null": {"from": None},
        "from-list": {"from": ["v"]},
        "from-false": {"from": False},
        "rows-negative": {"rows": -1},
        "rows-negative-5000-digits": {"rows": -HUGE},
        "rows-true": {"rows": True},
        "rows-fraction": {"rows": 1.5},
        "rows-float": {"rows": 4.0},
        "rows-string": {"rows": "4"},
        "rows-null": {"rows": None},
        "rows-list": {"rows": [4, 300]},
    }
    for what, keys in wrong.items():
        file = one().patch()
        file.tensor().update(keys)
        bad(f"manifest-schema--{what}", file)
    lists: Json = {
        "string": "v",
        "object": {"v": {}},
        "null": None,
        "number-inside": ["v", 5],
        "list-inside": [["v"]],
    }
    for what, value in lists.items():
        bad(f"manifest-schema--removed-{what}", one().patch().set(removed=value))
    for what, file in {
        "rank-0": Maker().sparse("w", [], [0]),
        "rank-0-nothing": Maker().sparse("w", [], [], "varint"),
        "mask": Maker().mask("w", [4], [1]),
        "mask-structured": Maker().structured("w", [4], diagonal(0), values="none"),
    }.items():
        file.patch().tensor()["rows"] = 1
        bad(f"manifest-schema--rows-of-{what}", file)
    file = Maker().mask("w", [4], [1]).patch()
    file.tensor()["rows"] = 4
    bad("manifest-schema--rows-of-mask-as-in-base", file)
    file = grown()
    del file.tensor()["digests"]["rows"]
    bad("manifest-schema--no-digest-rows", file)
    file = Maker().sparse("w", [4, 0], [], values="delta").resize(5)
    del file.tensor()["digests"]["rows"]
    bad("manifest-schema--no-digest-rows-delta", file)
    right = sha(b"")
    wrong = {"upper-case": right.upper(), "short": right[1:], "long": right + "0", "line-feed": right + "\n"}
    for what, value in (wrong | {"not-hex": "g" * 64, "number": 5, "null": None, "empty": ""}).items():
        file = one()
        file.tensor()["digests"]["result"] = value
        bad(f"manifest-schema--digest-result-{what}", file)
        file = grown()
        file.tensor()["digests"]["rows"] = value
        bad(f"manifest-schema--digest-rows-{what}", file)
    file = one()
    file.tensor()["digests"]["rows"] = "?"
    bad("manifest-schema--digest-rows-without-rows", file)
    bad("manifest-schema--digest-result-of-delta", Maker().sparse("w", [4], [1], values="delta").result(b""))
    file = Maker().sparse("w", [4], [1], values="delta", store_base=True).resize(5)
    bad("manifest-schema--digest-result-of-grown-delta", file.result(b""))
    bad("manifest-schema--digest-result-of-mask", Maker().mask("w", [4], [1]).result(b""))


def bad_patches_names() -> None:
    names = {
        "empty": "",
        "line-feed": "a\nb",
        "nul": "\0",
        "delete": "a\x7f",
        "1025-bytes": "n" * 1025,
        "1026-bytes-of-513-characters": "é" * 513,
        "metadata": "__metadata__",
    }
    for what, name in names.items():
        bad(f"name--from-{what}", one().origin(name))
        bad(f"name--removed-{what}", one().removed("v", name))
    for what, name in {
        "unknown": "vae/w",
        "none": "w",
        "empty": "/w",
        "no-rest": "unet/",
        "prefix": "une/w",
    }.items():
        file = Maker().set(components={"unet": {}, "text": {}}).sparse("unet/v", [4], [1])
        bad(f"component--from-{what}", file.origin(name))
        file = Maker().set(components={"unet": {}, "text": {}}).sparse("unet/v", [4], [1])
        bad(f"component--removed-{what}", file.removed("unet/x", name))
    bad("component--removed-no-components", Maker().set(components={}).removed("unet/w"))
    bad("duplicate-name--removed-twice", one().removed("u", "v", "u"))
    bad("duplicate-name--removed-and-sparse", one().removed("v", "w"))
    bad("duplicate-name--removed-and-own-origin", one().origin("w").removed("w"))
    bad("duplicate-name--removed-and-whole", Maker().whole("b", "F32", [1]).removed("b"))
    file = Maker().sparse("w", [4], [1]).resize(5)
    bad("duplicate-name--stream-rows", file.whole("w#rows", "F32", [1], data=file.streams["w#rows"][2]))
    bad("duplicate-name--two-from-one", Maker().sparse("w", [4], [1]).origin("v").sparse("w", [4], [1]))
    file = Maker().sparse("w", [9], [1]).origin("v")
    bad("shared-target--name-in-base", file.sparse("x", [9], [1], "shared", more={"tensor": "v"}))
    file = Maker().sparse("v", [9], [1]).sparse("w", [10], [1], "shared", more={"tensor": "v"})
    bad("shared-target--shape-of-result", file.resize(9))


def bad_patches_streams() -> None:
    def grown(dtype: str = "F32", **more: Any) -> Maker:
        return Maker().sparse("w", [4, 3], [0, 11], dtype=dtype, **more).resize(6)

    file = grown()
    del file.streams["w#rows"]
    bad("missing-stream--rows", file)
    file = Maker().sparse("w", [4, 0], []).resize(6)
    del file.streams["w#rows"]
    bad("missing-stream--rows-without-bytes", file)
    file = grown()
    file.streams["v#rows"] = file.streams.pop("w#rows")
    file.origin("v")
    bad("missing-stream--rows-under-the-name-in-base", file)
    file = Maker().sparse("w", [4, 3], [1]).patch()
    file.tensor()["rows"] = 2**50
    file.tensor()["digests"]["rows"] = sha(b"")
    bad("missing-stream--rows-2-to-50", file)
    for what, size in {"no-key": None, "as-in-base": 4, "dropped": 2}.items():
        file = Maker().sparse("w", [4, 3], [1])
        if size is not None:
            file.resize(size)
        file.tensor()["digests"]["rows"] = file.stream("w#rows", "F32", [2, 3], noise("stray", 24))
        bad(f"stray-stream--rows-{what}", file)
    file = Maker().mask("w", [4, 3], [1]).origin("v")
    file.stream("w#rows", "F32", [1, 3], noise("stray", 12))
    bad("stray-stream--rows-of-mask", file)
    file = Maker().sparse("w", [4], [1]).resize(4)
    file.stream("w#rows", "F32", [0], b"")
    bad("stray-stream--rows-without-elements", file)

    def other(name: str, file: Maker, dtype: str, shape: Sequence[int]) -> None:
        bad(name, file.replace("w#rows", noise(name, elements(shape) * SIZE[dtype]), shape, dtype))

    other("stream-dtype--rows-integer", grown(), "I32", [2, 3])
    other("stream-dtype--rows-other-float", grown("BF16"), "F16", [2, 3])
    file = grown("BF16", values="delta", value_dtype="F32")
    other("stream-dtype--rows-in-dtype-of-deltas", file, "F32", [2, 3])
    other("stream-dtype--rows-flat", grown(), "F32", [6])
    other("stream-dtype--rows-rank-3", grown(), "F32", [2, 3, 1])
    other("stream-dtype--rows-rank-0", Maker().sparse("w", [4], [1]).resize(5), "F32", [])
    other("count-mismatch--rows-too-few", grown(), "F32", [1, 3])
    other("count-mismatch--rows-too-many", grown(), "F32", [3, 3])
    other("count-mismatch--rows-all-of-the-result", grown(), "F32", [6, 3])
    other("count-mismatch--rows-of-other-columns", grown(), "F32", [2, 4])
    other("count-mismatch--rows-turned", grown(), "F32", [3, 2])
    other("count-mismatch--rows-none", grown(), "F32", [0, 3])
    other("count-mismatch--rows-other-without-bytes", Maker().sparse("w", [4, 0], []).resize(6), "F32", [1, 0])
    file = grown()
    file.tensor()["rows"] = 2**50
    bad("count-mismatch--rows-2-to-50", file)
    file = Maker().sparse("w", [MAX_NUMEL], [1], "varint", dtype="BF16").resize(2**53)
    bad("shape-overflow--rows-one-more", file)
    file = Maker().sparse("w", [4, 2**26], [1], "varint", dtype="F8_E5M2").patch()
    # These three break other rules as well, because no stream is that large. The manifest comes first.
    for what, size in {"product": 2**27, "wraps-to-2-to-28": 2**38 + 4, "5000-digits": HUGE}.items():
        file.tensor()["rows"] = size
        file.tensor()["digests"]["rows"] = file.stream("w#rows", "F8_E5M2", [1, 1], b"\0")
        bad(f"shape-overflow--rows-{what}", file)
    file = grown()
    file.tensor()["digests"]["rows"] = sha(b"something else")
    bad("digest-mismatch--rows", file)
    file = grown()
    data = bytearray(file.streams["w#rows"][2])
    data[-1] ^= 1
    file.stream("w#rows", "F32", [2, 3], bytes(data))
    bad("digest-mismatch--rows-one-bit", file)
    file = Maker().sparse("w", [4, 0], []).resize(6)
    file.tensor()["digests"]["rows"] = sha(b"\0")
    bad("digest-mismatch--rows-without-bytes", file)


def bad_patches_indices() -> None:
    for codec in ("gap8", "varint", "flat"):
        bad(f"out-of-range--dropped-row-{codec}", Maker().sparse("w", [6, 5], [3, 20], codec).resize(4))
    bad("out-of-range--dropped-last-row", Maker().sparse("w", [6, 5], [29]).resize(5))
    bad("out-of-range--dropped-rank-1", Maker().sparse("w", [6], [1, 2], "flat").resize(2))
    bad("out-of-range--dropped-rank-3", Maker().sparse("w", [4, 2, 3], [12], "varint").resize(2))
    bad("out-of-range--dropped-all-rows", Maker().sparse("w", [6, 5], [0]).resize(0))
    bad("out-of-range--dropped-delta", Maker().sparse("w", [6, 5], [20], values="delta").resize(4))
    bad("out-of-range--dropped-from", Maker().sparse("w", [6, 5], [20]).origin("v").resize(4))
    bad("out-of-range--dropped-structured", Maker().structured("w", [4, 4], diagonal(0)).resize(3))
    bad("out-of-range--dropped-2-to-32", Maker().sparse("w", [2**33], [3, 2**32], "varint").resize(2**32))
    many = range(0, 300, 10)
    bad("out-of-range--dropped-directory", Maker().sparse("w", [6, 50], many, block_size=16).resize(5))
    file = Maker().sparse("v", [6, 5], [3, 20])
    bad(
        "out-of-range--dropped-shared", file.sparse("w", [6, 5], [3, 20], "shared", more={"tensor": "v"}).resize(4)
    )
    mask = MASKS["mask-file.masks"]
    file = Maker().set(features=["mask-file"], mask_files={"mask-file.masks": sha(mask)})
    shared = {"tensor": "q", "file": "mask-file.masks"}
    file.sparse("w", [10, 10], [3, 50, 99], "shared", more=shared)
    bad("out-of-range--dropped-mask-file", file.resize(9))
    for codec, data in {"gap8": gap8_code(12), "varint": varint_code(12), "flat": i64(12)}.items():
        file = Maker().sparse("w", [4, 3], [1], codec).resize(6)
        bad(f"out-of-range--further-row-{codec}", file.replace("w#indices", data))
    file = Maker().sparse("w", [0, 3], [], "flat").resize(2)
    file.tensor()["nnz"] = 1
    file.replace("w#indices", i64(0)).replace("w#values", f32(1))
    bad("count-mismatch--nnz-in-further-rows", file)


# Applying (section 4.1): cases with a base, adapters with their strengths, and the bytes of the result. The arithmetic here is that
# of binary64, rounded to binary32 by `struct`, and narrower types are looked up in the list of all their values.

APPLY: dict[str, Json] = {}
ADAPTERS: dict[str, Maker] = {}
Tensors = dict[str, tuple[str, list[int], bytes]]
NAN = {"F64": 0x7FF8 << 48, "F32": 0x7FC0 << 16, "F16": 0x7E00, "BF16": 0x7FC0, "F8_E4M3": 0x7F, "F8_E5M2": 0x7E}


def binary32(value: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def value_of(data: bytes, dtype: str) -> float:
    if dtype == "F8_E4M3":
        sign, exponent, fraction = data[0] >> 7, data[0] >> 3 & 15, data[0] & 7
        size = (
            math.nan
            if data[0] & 127 == 127
            else fraction / 8 * 2**-6
            if exponent == 0
            else (1 + fraction / 8) * 2.0 ** (exponent - 7)
        )
        return -size if sign else size
    text = {"F64": "<d", "F32": "<f", "BF16": "<f", "F16": "<e", "F8_E5M2": "<e"}[dtype]
    return float(struct.unpack(text, bytes(struct.calcsize(text) - len(data)) + data)[0])


@cache
def positive(dtype: str) -> list[tuple[float, int]]:
    """The finite values >= 0 of a type of one or two bytes, with their bits, which rise with them."""
    values = [
        (value_of(bits.to_bytes(SIZE[dtype], "little"), dtype), bits) for bits in range(1 << (8 * SIZE[dtype] - 1))
    ]
    return [(value, bits) for value, bits in values if math.isfinite(value)]


def bits_of(value: float, dtype: str) -> bytes:
    """The nearest value of the type: ties to even, infinity (or NaN) from half a step beyond the largest."""
    size = SIZE[dtype]
    if math.isnan(value):
        return NAN[dtype].to_bytes(size, "little")
    if size > 2:
        return struct.pack("<d" if dtype == "F64" else "<f", value if dtype == "F64" else binary32(value))
    table = positive(dtype)
    above = bisect_left(table, (abs(value), 0))
    if above == len(table):
        (below, _), (largest, bits) = table[-2:]
        beyond = Fraction(abs(value)) - Fraction(largest) if math.isfinite(value) else math.inf
        half = Fraction(largest - below) / 2
        if beyond > half or (beyond == half and bits & 1):
            if dtype == "F8_E4M3":
                return NAN[dtype].to_bytes(1, "little")
            bits += 1  # of infinity
    elif above == 0 or table[above][0] == abs(value):
        bits = table[above][1]
    else:
        (low, low_bits), (high, high_bits) = table[above - 1 : above + 1]
        down, up = Fraction(abs(value)) - Fraction(low), Fraction(high) - Fraction(abs(value))
        bits = low_bits if down < up or (down == up and low_bits % 2 == 0) else high_bits
    if math.copysign(1, value) < 0:
        bits |= 1 << (8 * size - 1)
    return bits.to_bytes(size, "little")


def under_one(base: bytes, dtype: str, item: Json, value: bytes, alpha: float) -> bytes:
    work = float if dtype == "F64" else binary32
    strength, is_target = work(alpha), item["values"] == "target"
    if strength == 0:
        return base
    if is_target and strength == 1:
        return value
    b, v = value_of(base, dtype), value_of(value, item["value_dtype"])
    step = work(v - b) if is_target else work(v)
    return bits_of(work(b + work(strength * step)), dtype)


def under_several(base: bytes, dtype: str, parts: Sequence[tuple[Json, bytes, float]]) -> bytes:
    b = value_of(base, dtype)
    steps = [
        alpha * (value_of(value, item["value_dtype"]) - (b if item["values"] == "target" else 0.0))
        for item, value, alpha in parts
    ]
    if any(map(math.isnan, steps)):
        return NAN[dtype].to_bytes(SIZE[dtype], "little")
    total = 0.0
    for step in sorted(steps):
        total += step
    return bits_of(b + total, dtype)


def outcome(base: Tensors, adapters: Sequence[tuple[Json, float]]) -> Tensors:
    """What the adapters, given by their contents, make of the base."""
    result = dict(base)
    touched: dict[str, dict[int, list[tuple[Json, bytes, float]]]] = {}
    items: dict[str, Json] = {}
    for content, alpha in adapters:
        if alpha == 0:
            continue
        for name in content.get("removed", []):
            del result[name]
        for item in content["whole"]:
            result[item["name"]] = (item["dtype"], item["shape"], bytes.fromhex(item["value_hex"]))
        for item in content["tensors"]:
            items[item["name"]] = item
            width, data = SIZE[item["value_dtype"]], bytes.fromhex(item["value_hex"])
            for place, index in enumerate(item["indices"]):
                part = (item, data[place * width : (place + 1) * width], alpha)
                touched.setdefault(item["name"], {}).setdefault(index, []).append(part)
    for name, item in items.items():
        dtype, shape, data = base[item.get("from", name)]
        width = SIZE[dtype]
        elements_of = [data[at : at + width] for at in range(0, len(data), width)]
        for index, parts in touched.get(name, {}).items():
            if len(parts) == 1:
                elements_of[index] = under_one(elements_of[index], dtype, *parts[0])
            else:
                elements_of[index] = under_several(elements_of[index], dtype, parts)
        shape = [item.get("rows", shape[0]), *shape[1:]] if shape else shape
        kept = b"".join(elements_of)[: elements(shape) * width] + bytes.fromhex(item.get("rows_hex", ""))
        result[name] = (dtype, shape, kept)
    return result


def as_case(tensors: Tensors) -> Json:
    return {
        name: {"dtype": dtype, "shape": shape, "hex": data.hex()} for name, (dtype, shape, data) in tensors.items()
    }


def apply_case(
    name: str,
    base: Tensors,
    *adapters: tuple[str, float | None],
    slices: Sequence[tuple[str, int, int]] = (),
    undo_from_file: bool = False,
    refused: str | None = None,
) -> None:
    """Adapters by the names of their files, each with a strength, or with its own."""
    assert name not in APPLY
    case: Json = {"base": as_case(base), "adapters": []}
    applied = []
    for file, alpha in adapters:
        maker = ADAPTERS[file]
        case["adapters"].append({"file": f"{file}.st"} | ({} if alpha is None else {"alpha": alpha}))
        applied.append((maker.content, maker.content["alpha"] if alpha is None else alpha))
    if refused is not None:
        APPLY[name] = case | {"refused": refused}
        return
    result = outcome(base, applied)
    if slices:
        case["slices"] = []
        for tensor, begin, end in slices:
            dtype, _, data = result[tensor]
            part = data[begin * SIZE[dtype] : end * SIZE[dtype]]
            case["slices"].append({"name": tensor, "begin": begin, "end": end, "hex": part.hex()})
    if undo_from_file:
        case["undo_from_file"] = True
    APPLY[name] = case | {"result": as_case(result)}


def adapter(name: str) -> Maker:
    ADAPTERS[name] = Maker()
    return ADAPTERS[name]


NUMBERS = {  # of each type: zeros, ordinary numbers, the smallest, the largest, infinities, NaN (quiet, signalling, negative)
    "F64": "0000000000000000 0000000000000080 000000000000f83f 9a9999999999b9bf 0100000000000000 ffffffffffffef7f "
    "000000000000f07f 000000000000f0ff 010000000000f07f 123456789abcf8ff",
    "F32": "00000000 00000080 0000c03f cdccccbd 01000000 ffff7f7f 0000807f 000080ff 0100807f 5634d2ff",
    "F16": "0000 0080 003e 66ae 0100 ff7b 007c 00fc 017c 34fe",
    "BF16": "0000 0080 c03f cdbd 0100 7f7f 807f 80ff 817f d2ff",
    "F8_E4M3": "00 80 3c 9d 01 7e 38 fe 7f ff",
    "F8_E5M2": "00 80 3e ae 01 7b 7c fc 7d fe",
}
STRENGTHS = {
    "1": 1,
    "0": 0,
    "minus-0": -0.0,
    "0.5": 0.5,
    "0.1": 0.1,
    "minus-1.25": -1.25,
    "3": 3,
    "1e-60": 1e-60,  # 0 in binary32, not in binary64
    "1e-40": 1e-40,  # subnormal in binary32
    "1-and-2-to-minus-30": 1 + 2**-30,  # 1 in binary32
    "1-less-2-to-minus-26": 1 - 2**-26,  # likewise
    "3e38": 3e38,
}


def crossed(dtype: str, other: str) -> tuple[bytes, bytes]:
    """Every number of one type beside every number of another."""
    left, right = ([bytes.fromhex(text) for text in NUMBERS[one].split()] for one in (dtype, other))
    pairs = list(product(left, right))
    return b"".join(one for one, _ in pairs), b"".join(two for _, two in pairs)


def around(dtype: str, entries: bytes) -> bytes:
    """A tensor whose elements at the odd indices are these."""
    width = SIZE[dtype]
    return b"".join(
        noise(f"{dtype} {at}", width) + entries[at : at + width] for at in range(0, len(entries), width)
    )


def apply_arithmetic() -> None:
    file, base = adapter("targets"), Tensors()
    for dtype in FLOATS:
        old, new = crossed(dtype, dtype)
        count = len(old) // SIZE[dtype]
        file.sparse(
            dtype, [2 * count], range(1, 2 * count, 2), dtype=dtype, value_bytes=new, base=old, store_base=True
        )
        base[dtype] = (dtype, [2 * count], around(dtype, old))
    for what, alpha in STRENGTHS.items():
        apply_case(f"targets-{what}", base, ("targets", alpha))
    file, base = adapter("deltas"), Tensors()
    for dtype, other in product(FLOATS, FLOATS):
        old, new = crossed(dtype, other)
        count = len(old) // SIZE[dtype]
        name = f"{other}.to.{dtype}"
        file.sparse(name, [2 * count], range(1, 2 * count, 2), dtype=dtype, values="delta", value_dtype=other,
                    value_bytes=new, base=old)  # fmt: skip
        base[name] = (dtype, [2 * count], around(dtype, old))
    for what in ("1", "0", "0.1", "minus-1.25", "1e-60"):
        apply_case(f"deltas-{what}", base, ("deltas", STRENGTHS[what]))
    # Every tie and its neighbours: half steps between the values of the narrow types.
    for dtype, other in {"F16": "F32", "BF16": "F32", "F8_E4M3": "F32", "F8_E5M2": "F32", "F32": "F64"}.items():
        halves = ties(dtype)
        text = "<f" if other == "F32" else "<d"
        old, count = bytes(SIZE[dtype]) * len(halves), len(halves)
        file = adapter(f"ties-{dtype}").sparse("w", [count], range(count), dtype=dtype, values="delta", value_dtype=other,
                                               value_bytes=b"".join(struct.pack(text, half) for half in halves), base=old)  # fmt: skip
        file.sparse("v", [count], range(count), dtype=dtype, values="delta", value_dtype=other,
                    value_bytes=b"".join(struct.pack(text, -half) for half in halves), base=old)  # fmt: skip
        apply_case(f"ties-{dtype}", {name: (dtype, [count], old) for name in ("w", "v")}, (f"ties-{dtype}", 1))
    # Deltas that fit any float: the type is the base's, whatever the manifest says.
    adapter("deltas-for-any").sparse(
        "w", [9], [0, 3, 8], values="delta", value_bytes=f32(0.1, 1e-3, 3e38), base_digest=False
    )
    for dtype in FLOATS:
        for what in ("1", "0.1", "3"):
            base = {"w": (dtype, [9], b"".join(bits_of(k / 7, dtype) for k in range(9)))}
            apply_case(f"deltas-for-any-{dtype}-{what}", base, ("deltas-for-any", STRENGTHS[what]))
    adapter("own-strength").set(alpha=0.25).sparse("w", [3], [1], value_bytes=f32(2), base=f32(1))
    apply_case("own-strength", {"w": ("F32", [3], f32(0, 1, 2))}, ("own-strength", None))


def ties(dtype: str) -> list[float]:
    """Half steps, and numbers just beside them, near the smallest, one, and the largest."""
    if dtype == "F32":
        steps = [2.0**-149, 1 + 2**-23, 1 + 2**-22, (2 - 2**-23) * 2.0**127]
        halves = [2.0**-150, 1 + 2**-24, 1 + 3 * 2**-24, (2 - 2**-24) * 2.0**127, *steps]
    else:
        values = [value for value, _ in positive(dtype)]
        values.append(2 * values[-1] - values[-2])
        one = values.index(1.0)
        near = [0, 1, 2, one - 1, one, one + 1, len(values) - 3, len(values) - 2]
        halves = [(values[k] + values[k + 1]) / 2 for k in near]
    found = []
    for half in halves:
        found += [half * (1 - 2**-20), half, half * (1 + 2**-20)]
    return [value for value in found if dtype == "F32" or value == binary32(value)] if dtype != "F32" else found


def apply_several() -> None:
    base: Tensors = {}
    names = {"one": adapter("one"), "two": adapter("two"), "three": adapter("three")}
    places = {"one": [0, 1, 2, 3, 4, 5], "two": [2, 3, 4, 5, 6, 7], "three": [4, 5, 8]}
    for dtype in FLOATS:
        values = [1.0, -2.0, 0.3, 1e-3, 7.0, 0.0, -0.0, 100.0, 5.0, -1.0]
        base[dtype] = (dtype, [10], b"".join(bits_of(value, dtype) for value in values))
        width = SIZE[dtype]
        for number, (name, file) in enumerate(names.items()):
            at = places[name]
            old = b"".join(base[dtype][2][k * width : (k + 1) * width] for k in at)
            new = b"".join(bits_of((0.37 * number - 0.11 * k) * (-3) ** (k % 4), dtype) for k in at)
            file.sparse(dtype, [10], at, dtype=dtype, value_bytes=new, base=old)
    old = f32(1.5, -0.0, 2.0)
    base["deltas"] = ("F32", [3], old)
    for name, value in {"one": 0.1, "two": -0.3, "three": 1e-9}.items():
        names[name].sparse("deltas", [3], [0, 1, 2], values="delta", value_bytes=f32(value, -0.0, value), base=old)
    numbers = bytes.fromhex(NUMBERS["F32"])
    for name, turn in {"one": 0, "two": 1, "three": 2}.items():
        names[name].sparse(
            "special", [10], range(10), value_bytes=numbers[4 * turn :] + numbers[: 4 * turn], base=numbers[::-1]
        )
    base["special"] = ("F32", [10], numbers[::-1])
    apply_case("two", base, ("one", 1), ("two", 1))
    apply_case("two-turned", base, ("two", 1), ("one", 1))
    apply_case("three", base, ("one", 0.7), ("two", -0.4), ("three", 0.1))
    apply_case("three-turned", base, ("three", 0.1), ("one", 0.7), ("two", -0.4))
    apply_case("twice", base, ("one", 0.5), ("one", 0.5))
    apply_case("two-of-which-one-at-0", base, ("one", 0.5), ("two", 0))
    apply_case("two-of-which-one-is-small", base, ("one", 0.5), ("two", 1e-60))
    apply_case("two-at-opposite-strengths", base, ("one", 3), ("one", -3))


def apply_whole() -> None:
    old, ids = bf16(1, 2), i64(7, -1)
    file = adapter("whole").whole("bias", "BF16", [2], data=bf16(3, -0.0), base=old, store_base=True)
    file.whole("ids", "I64", [2], data=i64(0, 2**53 - 1), base=ids, store_base=True)
    file.whole("new", "BOOL", [3], data=bytes([1, 0, 1])).whole("any", "F8_E4M3", [2], data=b"\x7f\xff")
    file.sparse("w", [2], [1], value_bytes=f32(4), base=f32(2), store_base=True)
    base: Tensors = {
        "bias": ("BF16", [2], old),
        "ids": ("I64", [2], ids),
        "w": ("F32", [2], f32(1, 2)),
        "other": ("U8", [1], b"x"),
    }
    for what in ("1", "0", "minus-0", "0.5", "1e-60", "minus-1.25"):
        apply_case(f"whole-{what}", base, ("whole", STRENGTHS[what]))
    apply_case("whole-undone", base, ("whole", 1), undo_from_file=True)
    apply_case("whole-twice", base, ("whole", 1), ("whole", 0.5))
    apply_case(
        "whole-of-another-base", base | {"ids": ("I64", [2], i64(7, 0))}, ("whole", 1), refused="base-mismatch"
    )
    apply_case(
        "whole-of-another-shape", base | {"ids": ("I64", [1, 2], ids)}, ("whole", 1), refused="base-mismatch"
    )
    apply_case("whole-of-another-dtype", base | {"ids": ("U64", [2], ids)}, ("whole", 1), refused="base-mismatch")
    apply_case("whole-missing", {"w": base["w"], "bias": base["bias"]}, ("whole", 1), refused="base-mismatch")
    adapter("whole-other").whole("bias", "BF16", [2], data=bf16(3, 0), base=old)
    apply_case("whole-by-other-values", base, ("whole", 1), ("whole-other", 1), refused="conflict")
    adapter("whole-changed").sparse("bias", [2], [0], dtype="BF16", value_bytes=bf16(9), base=bf16(1))
    apply_case("whole-and-entries", base, ("whole", 1), ("whole-changed", 1), refused="conflict")


def apply_patches() -> None:
    base: Tensors = {"w": ("BF16", [2, 2], bf16(1, 2, 3, 4))}
    ADAPTERS["patch"] = GOOD["patch-of-page"]
    for what in ("1", "0.5", "0", "minus-1.25"):
        apply_case(f"patch-{what}", base, ("patch", STRENGTHS[what]))
    swap = adapter("swap").sparse("a", [3], [1], value_bytes=f32(10), base=f32(5)).origin("b")
    swap.sparse("b", [3], [0, 2], value_bytes=f32(7, 8), base=f32(1, 3)).origin("a").removed("c")
    base = {"a": ("F32", [3], f32(1, 2, 3)), "b": ("F32", [3], f32(4, 5, 6)), "c": ("U8", [1], b"c")}
    apply_case("patch-swap", base, ("swap", 1))
    apply_case("patch-swap-at-half", base, ("swap", 0.5))
    apply_case("patch-swap-at-0", base, ("swap", 0))
    apply_case("patch-nothing-to-remove", {"a": base["a"], "b": base["b"]}, ("swap", 1), refused="base-mismatch")
    apply_case("patch-no-origin", {"a": base["a"], "c": base["c"]}, ("swap", 1), refused="base-mismatch")
    apply_case("patch-beside-another", base, ("swap", 1), ("swap", 1), refused="conflict")


def apply_slices() -> None:
    shape, count = [60, 100], 6000
    weight = b"".join(bits_of(k % 97 / 16 - 3, "BF16") for k in range(count))
    for codec, many in {"gap8": [3 * k + 600 * (k // 16) for k in range(120) if 3 * k + 600 * (k // 16) < count],
                        "varint": list(range(5, count, 91)), "flat": [0, 2999, 3000, 5999]}.items():  # fmt: skip
        old = b"".join(weight[2 * k : 2 * k + 2] for k in many)
        new = b"".join(bits_of(k / 1000, "BF16") for k in many)
        size = None if codec == "flat" else 16
        adapter(f"slices-{codec}").sparse("w", shape, many, codec, dtype="BF16", value_bytes=new, base=old, store_base=True,
                                          block_size=size)  # fmt: skip
        edges = [0, many[0], many[0] + 1, many[1], many[-2], many[-1], many[-1] + 1, count]
        ranges = [("w", a, b) for a, b in pairwise(sorted({*edges, 1500, 3000, 3001}))]
        for what in ("1", "0.1"):
            apply_case(f"slices-{codec}-{what}", {"w": ("BF16", shape, weight)}, (f"slices-{codec}", STRENGTHS[what]),
                       slices=[*ranges, ("w", 100, 100), ("w", 0, count)], undo_from_file=True)  # fmt: skip


def apply_refused() -> None:
    def base(dtype: str = "F32", shape: Sequence[int] = (2, 2), data: bytes = f32(1, 2, 3, 4)) -> Tensors:
        return {"w": (dtype, list(shape), data), "other": ("F32", [1], f32(0))}

    file = adapter("plain").sparse("w", [2, 2], [1, 3], value_bytes=f32(5, 6), base=f32(2, 4))
    apply_case("plain", base(), ("plain", None))
    apply_case("plain-other-value-elsewhere", base(data=f32(9, 2, 3, 4)), ("plain", None))
    mismatch = {
        "missing": {"other": ("F32", [1], f32(0))},
        "other-name": {"W": base()["w"]},
        "transposed": base(shape=[4, 1]),
        "flat": base(shape=[4]),
        "larger": base(shape=[3, 2], data=f32(1, 2, 3, 4, 5, 6)),
        "dtype-of-the-same-size": base("I32"),
        "narrower": base("BF16", data=bf16(1, 2, 3, 4)),
        "other-values": base(data=f32(1, 2, 3, 4.5)),
        "minus-0": base(data=f32(1, 2, 3, -4)),
    }
    for what, tensors in mismatch.items():
        apply_case(f"refused-{what}", tensors, ("plain", 1), refused="base-mismatch")
    adapter("any").sparse("w", [2, 2], [0], values="delta", value_bytes=f32(1), base_digest=False)
    apply_case("refused-integers", base("I32"), ("any", 1), refused="base-mismatch")
    adapter("mask").mask("w", [2, 2], [1]).sparse("other", [1], [0], value_bytes=f32(1), base=f32(0))
    apply_case("refused-mask", base(), ("mask", 1), refused="not-applicable")
    apply_case("refused-strength-1e39", base(), ("plain", 1e39), refused="strength")
    apply_case("refused-strength-minus-1e300", base(), ("plain", -1e300), refused="strength")
    apply_case("strength-3.4028235e38", base(), ("plain", 3.4028235e38))
    apply_case("refused-strength-just", base(), ("plain", 3.4028235677973366e38), refused="strength")
    apply_case("strength-just-less", base(), ("plain", 3.4028235677973362e38))
    file = adapter("double").sparse(
        "w", [2], [0], dtype="F64", value_bytes=struct.pack("<d", 2), base=struct.pack("<d", 1)
    )
    apply_case("strength-1e300-in-binary64", {"w": ("F64", [2], struct.pack("<2d", 1, 5))}, ("double", 1e300))
    file = adapter("second-differs").sparse("other", [1], [0], value_bytes=f32(8), base=f32(0))
    file.sparse("w", [2, 2], [3], value_bytes=f32(8), base=f32(-4))
    apply_case("refused-second-tensor", base(), ("second-differs", 1), refused="base-mismatch")
    apply_case("refused-second-adapter", base(), ("plain", 1), ("second-differs", 1), refused="base-mismatch")


# Writing


# Indices that something else implies (sections 5.7 and 5.8)


def permutation(seed: str, numel: int, count: int) -> list[int]:
    """Where the numbers below `count` go."""
    digest, word = hashlib.sha256(seed.encode()).digest(), 2**64 - 1
    bits = max(2, len(f"{numel - 1:b}"))
    narrow = bits // 2

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        return z ^ (z >> 31)

    def step(x: int) -> int:
        halves = [x >> narrow, x & ((1 << narrow) - 1)]
        for r in range(4):
            width = bits - narrow if r % 2 == 0 else narrow
            key = int.from_bytes(digest[8 * r : 8 * r + 8], "little")
            halves = [halves[1], halves[0] ^ (mix((halves[1] + key) & word) >> (64 - width))]
        return (halves[0] << narrow) + halves[1]

    found = []
    for number in range(count):
        y = step(number)
        while y >= numel:
            y = step(y)
        found.append(y)
    return found


def base_file(name: str, **tensors: tuple[str, Sequence[int], bytes]) -> None:
    """The base beside a vector."""
    header: Json = {}
    buffer = b""
    for tensor, (dtype, shape, data) in tensors.items():
        offsets = [len(buffer), len(buffer) + len(data)]
        header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        buffer += data
    BASES[name] = assemble(json.dumps(header), buffer)


def at_entries(data: bytes, dtype: str, indices: Iterable[int]) -> bytes:
    width = SIZE[dtype]
    return b"".join(data[k * width : (k + 1) * width] for k in indices)


def by_magnitude(data: bytes, dtype: str) -> list[int]:
    """The flat indices, those of the largest magnitudes first."""
    width = SIZE[dtype]
    count = len(data) // width
    sizes = [
        int.from_bytes(data[k * width : (k + 1) * width], "little") % (1 << (8 * width - 1)) for k in range(count)
    ]
    return sorted(range(count), key=lambda k: (-sizes[k], k))


def add_implied(
    file: Maker, name: str, shape: Sequence[int], indices: Sequence[int], codec: str, more: Json, **rest: Any
) -> Maker:
    if codec not in file.manifest["features"]:
        file.manifest["features"].append(codec)
        file.set(format_version="1.1")
    file.sparse(name, shape, indices, codec, more=more, **rest)
    file.tensor(-1)["digests"]["entries"] = sha(i64(*indices))
    return file


def add_random(
    file: Maker, name: str, shape: Sequence[int], seed: str, count: int, band: int | None = None, **rest: Any
) -> Maker:
    first = count * (band or 0)
    indices = sorted(permutation(seed, elements(shape), first + count)[first:])
    more: Json = {"seed": seed} if band is None else {"seed": seed, "band": band}
    return add_implied(file, name, shape, indices, "random", more, **rest)


def add_largest(
    file: Maker, name: str, shape: Sequence[int], data: bytes, dtype: str, count: int, band: int | None = None, **rest: Any
) -> Maker:  # fmt: skip
    first = count * (band or 0)
    indices = sorted(by_magnitude(data, dtype)[first : first + count])
    more: Json = {} if band is None else {"band": band}
    if rest.get("values", "target") != "none":
        rest["base"] = at_entries(data, dtype, indices)
    return add_implied(file, name, shape, indices, "magnitude", more, dtype=dtype, **rest)


def good_implied() -> None:
    file = add_random(good("random"), "w", [30, 40], "0 w", 12)
    add_random(file, "next", [30, 40], "0 w", 12, 1, values="delta", base_digest=False)
    add_random(file, "last", [30, 40], "0 w", 400, 2, dtype="BF16", store_base=True)
    for numel in (1, 2, 3, 4, 5, 16, 17, 1023):
        add_random(file, f"size.{numel}", [numel], f"\U0001f3b2 {numel}", (numel + 1) // 2, 0)
    add_random(file, "none", [3, 0], "x", 0)
    add_random(file, "all", [3, 5], "x", 15)
    add_random(file, "scalar", [], "", 1)
    add_random(file, "far", [MAX_NUMEL], "1 far", 5, 1000)
    add_random(file, "long", [7], "s" * 4096, 2)
    add_random(file, "patched", [6, 4], "0 patched", 3).resize(9)
    file = add_random(good("random-mask"), "w", [64], "0 w", 9, values="none")
    indices = file.content["tensors"][0]["indices"]
    file.sparse("v", [64], indices, "shared", more={"tensor": "w"})
    page = bytes.fromhex("803f40c000004040c07f0080")
    file = add_largest(good("magnitude"), "w", [2, 3], page, "BF16", 3)
    add_largest(file, "next", [2, 3], page, "BF16", 2, 1)
    add_largest(file, "mask", [2, 3], page, "BF16", 2, 2, values="none")
    tensors = {"w": ("BF16", [2, 3], page), "next": ("BF16", [2, 3], page), "mask": ("BF16", [2, 3], page)}
    for dtype in FLOATS:
        data = noise(f"magnitudes in {dtype}", 48 * SIZE[dtype])
        add_largest(file, dtype, [6, 8], data, dtype, 7)
        add_largest(file, f"{dtype}.2", [6, 8], data, dtype, 10, 2, values="delta")
        tensors |= {dtype: (dtype, [6, 8], data), f"{dtype}.2": (dtype, [6, 8], data)}
    zeros = bytes.fromhex("00000080") * 10
    add_largest(file, "zeros", [20], zeros, "BF16", 6, 1)
    add_largest(file, "scalar", [], page[2:4], "BF16", 1)
    add_largest(file, "empty", [0, 7], b"", "F16", 0)
    add_largest(file, "moved", [2, 3], page, "BF16", 2).origin("w").resize(4)
    tensors |= {"zeros": ("BF16", [20], zeros), "scalar": ("BF16", [], page[2:4]), "empty": ("F16", [0, 7], b"")}
    base_file("magnitude", **tensors)


def bad_implied() -> None:
    page = bytes.fromhex("803f40c000004040c07f0080")

    def largest() -> Maker:
        return add_largest(Maker(), "w", [2, 3], page, "BF16", 2)

    def drawn() -> Maker:
        return add_random(Maker(), "w", [50], "0 w", 4)

    for codec, one in (("random", drawn), ("magnitude", largest)):
        for what, value in {"negative": -1, "float": 1.0, "string": "1", "true": True, "null": None}.items():
            file = one()
            file.tensor()["indices"]["band"] = value
            bad(f"manifest-schema--{codec}-band-{what}", file)
        bad(f"manifest-schema--{codec}-no-feature", one().set(features=[]))
        file = one()
        del file.tensor()["digests"]["entries"]
        bad(f"manifest-schema--{codec}-no-digest", file)
        file = one()
        file.tensor()["digests"]["entries"] = "0"
        bad(f"manifest-schema--{codec}-digest-short", file)
        for what, value in {"just": 12 if codec == "random" else 2, "far": 2**53 - 1}.items():
            file = one()
            file.tensor()["indices"]["band"] = value + (what == "just" and codec == "magnitude")
            bad(f"count-mismatch--{codec}-band-{what}", file)
    for what, seed in {"missing": None, "number": 1, "long": "s" * 4097, "long-utf-8": "\u00e9" * 2049}.items():
        file = drawn()
        file.tensor()["indices"]["seed"] = seed
        if seed is None:
            del file.tensor()["indices"]["seed"]
        bad(f"manifest-schema--random-seed-{what}", file)
    file = drawn()
    file.tensor()["indices"]["seed"] = "1 w"
    bad("digest-mismatch--random-other-seed", file)
    file = drawn()
    file.tensor()["digests"]["entries"] = sha(b"")
    bad("digest-mismatch--random-entries", file)
    wide = add_random(Maker(), "w", [10, 5], "0 w", 10).resize(3)
    bad("out-of-range--dropped-random", wide)
    bases = {
        "other-values": {"w": ("BF16", [2, 3], page[2:] + page[:2])},
        "other-shape": {"w": ("BF16", [6], page)},
        "other-dtype": {"w": ("F16", [2, 3], page)},
        "other-name": {"v": ("BF16", [2, 3], page)},
    }
    for what, tensors in bases.items():
        bad(f"base-mismatch--magnitude-{what}", largest())
        base_file(f"base-mismatch--magnitude-{what}", **tensors)
    for name in list(BAD):
        if name.startswith("count-mismatch--magnitude"):
            base_file(name, w=("BF16", [2, 3], page))


# The compact profile (sections 4.3, 5.9 and 5.10)

EXPONENT = {"F64": 11, "F32": 8, "F16": 5, "BF16": 8, "F8_E4M3": 4, "F8_E5M2": 5}
Step = tuple[str, int, int]  # ("number", context, value) or ("bits", how many, value)


def token_of(value: int, split: int) -> tuple[int, int]:
    """A number's token, and how many of its lower bits follow."""
    rest = max(0, len(f"{value:b}") - 1 - split)
    return (rest << split) + (value >> rest), rest


class Tables:
    """Frequencies by context, as few bits as can be: of each context that is given as {token: frequency}."""

    def __init__(self, split: int, *tables: dict[int, int]) -> None:
        self.split, self.tables = split, tables

    @staticmethod
    def of(split: int, contexts: int, blocks: Sequence[Sequence[Step]]) -> Tables:
        """Frequencies in proportion to what the blocks hold, cut to four bits, at least 1."""
        counts: list[dict[int, int]] = [{} for _ in range(contexts)]
        for kind, context, value in (step for block in blocks for step in block):
            if kind == "number":
                token, _ = token_of(value, split)
                counts[context][token] = counts[context].get(token, 0) + 1
        found = []
        for count in (one or {0: 1} for one in counts):
            room = 4096 - 16 * len(count)
            found.append({t: cut_off(max(1, n * room // sum(count.values()))) for t, n in count.items()})
        return Tables(split, *found)

    def completed(self, context: int) -> dict[int, int]:
        table = dict(sorted(self.tables[context].items()))
        largest = max(table.values())
        table[next(t for t, f in table.items() if f == largest)] += 4096 - sum(table.values())
        return table

    def bits(self, *, only: Sequence[int] | None = None) -> str:
        """The tables as text of 0 and 1, the first bit first."""
        text = ""
        for table in self.tables if only is None else [self.tables[i] for i in only]:
            first, last = min(table), max(table)
            text += low_first(first, 12) + low_first(last - first, 8)
            for token in range(first, last + 1):
                digits = f"{table.get(token, 0):b}" if table.get(token, 0) else ""
                text += low_first(len(digits), 4)
                if len(digits) > 1:
                    text += digits[1:4][::-1]
        return text


def cut_off(frequency: int) -> int:
    digits = f"{frequency:b}"
    return int(digits[:4] + "0" * len(digits[4:]), 2)


def low_first(value: int, width: int) -> str:
    return f"{value:0{width}b}"[::-1] if width else ""


def rans(tables: Tables, steps: Sequence[Step], x: int = 1 << 16) -> list[int]:
    """The words of a block."""
    words: list[int] = []
    operations: list[tuple[int, int, int]] = []  # start, size, and the power of two that they are of
    for kind, context, value in steps:
        pieces = [(context, value)]
        if kind == "number":
            token, rest = token_of(value, tables.split)
            table = tables.completed(context)
            operations.append((sum(f for t, f in table.items() if t < token), table[token], 12))
            pieces = [(rest, value & ((1 << rest) - 1))]
        for width, low in pieces:
            for place in range(0, width, 16):
                some = min(16, width - place)
                operations.append(((low >> place) & ((1 << some) - 1), 1, some))
    for start, size, power in reversed(operations):
        if x >= size << (32 - power):
            words.append(x & 0xFFFF)
            x >>= 16
        x = ((x // size) << power) + x % size + start
    return [*reversed([*words, x >> 16, x & 0xFFFF])]


def coded(front: str, blocks: Sequence[Sequence[int]], more: Sequence[int] = ()) -> bytes:
    """A stream: the bits of the front, the words of the blocks, the further counts."""
    front += "0" * (-len(front) % 8)
    data = bytes(int(front[k : k + 8][::-1], 2) for k in range(0, len(front), 8))
    data += b"".join(varint_code(count) for count in [len(words) for words in blocks] + list(more))
    return data + b"".join(struct.pack("<H", word) for words in blocks for word in words)


def exponent_of(bits: int, dtype: str) -> int:
    width = 8 * SIZE[dtype]
    return (bits % (1 << (width - 1))) >> (width - 1 - EXPONENT[dtype])


def bits_at(data: bytes, dtype: str) -> list[int]:
    width = SIZE[dtype]
    return [int.from_bytes(data[k : k + width], "little") for k in range(0, len(data), width)]


def cut_to(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[k : k + size] for k in range(0, len(items), size)]


def bounds_text(bounds: Sequence[int]) -> str:
    return low_first(len(bounds) - 1, 6) + "".join(low_first(bound, 12) for bound in bounds)


def context_in(bounds: Sequence[int], number: int) -> int | None:
    return next((i for i, (low, high) in enumerate(pairwise(bounds)) if low <= number < high), None)


class Classes:
    """The stream of section 5.9, in the making: what is not given follows from the entries."""

    def __init__(
        self,
        shape: Sequence[int],
        indices: Sequence[int],
        bounds: Sequence[int] = (0, 1),
        *,
        split: int = 1,
        power: int = 12,
        base: tuple[bytes, str] | None = None,
        lines: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> None:
        numel = elements(shape)
        self.split, self.power, self.bounds, self.lines = split, power, list(bounds), lines
        wide = elements(shape[1:])
        self.contexts: list[int | None] = [0] * numel
        if base is not None or lines is not None:
            for k in range(numel):
                number = 0
                if base is not None:
                    number = (1 << EXPONENT[base[1]]) - 1 - exponent_of(bits_at(base[0], base[1])[k], base[1])
                if lines is not None:
                    number += lines[0][k // wide] + lines[1][k % wide]
                    number = -1 if 0 in (lines[0][k // wide], lines[1][k % wide]) else number
                self.contexts[k] = context_in(bounds, number)
        size = 1 << power
        self.entries: list[int] = []
        self.steps: list[list[Step]] = []
        for start in range(0, numel, size):
            stop = min(start + size, numel)
            inside = [k for k in indices if start <= k < stop]
            assert all(self.contexts[k] is not None for k in inside)
            block: list[Step] = []
            for context in range(len(bounds) - 1):
                members = (
                    [k for k in range(start, stop) if self.contexts[k] == context] if numel < 1 << 20 else None
                )
                ranks = [
                    k - start if members is None else members.index(k)
                    for k in inside
                    if self.contexts[k] == context
                ]
                block += [("number", context, rank - before) for before, rank in pairwise([-1, *ranks])]
                block.append(("number", context, 0))
            self.entries.append(len(inside))
            self.steps.append(block)
        self.ahead: list[list[Step]] = []
        if lines is not None:
            numbers = [("number", 0, n) for n in lines[0]] + [("number", 1, n) for n in lines[1]]
            self.ahead = [list(part) for part in cut_to(numbers, 4096)]
            self.line_tables = Tables.of(split, 2, self.ahead)
        self.tables = Tables.of(split, len(bounds) - 1, self.steps)

    def stream(
        self, *, x: int = 1 << 16, words: list[list[int]] | None = None, entries: list[int] | None = None
    ) -> bytes:
        front = low_first(self.split, 3) + low_first(self.power, 6) + ("1" if self.lines else "0")
        front += bounds_text(self.bounds) + (self.line_tables.bits() if self.lines else "") + self.tables.bits()
        blocks = [rans(self.line_tables, block) for block in self.ahead]
        blocks += [rans(self.tables, block, x) for block in self.steps] if words is None else words
        return coded(front, blocks, self.entries if entries is None else entries)


def mark_compact(file: Maker) -> Maker:
    if "compact" not in file.manifest["features"]:
        file.manifest["features"].append("compact")
        file.set(format_version="1.1")
    return file


def add_classes(
    file: Maker, name: str, shape: Sequence[int], indices: Sequence[int], data: bytes | None = None, *,
    form: Classes | None = None, on_base: bool = False, **rest: Any,
) -> Maker:  # fmt: skip
    mark_compact(file).sparse(name, shape, indices, "classes", more={"base": True} if on_base else {}, **rest)
    if data is None:
        data = (form or Classes(shape, indices)).stream() if indices else b""
    file.tensor(-1)["digests"]["indices"] = file.stream(name + "#indices", "U8", [len(data)], data)
    if on_base:
        file.tensor(-1)["digests"]["entries"] = sha(i64(*indices))
    return file


def step_blocks(values: bytes, base: bytes, dtype: str, bounds: Sequence[int], power: int) -> list[list[Step]]:
    top = 1 << (8 * SIZE[dtype] - 1)
    blocks: list[list[Step]] = []
    pairs = list(zip(bits_at(values, dtype), bits_at(base, dtype), strict=True))
    for part in cut_to(pairs, 1 << power):
        block: list[Step] = []
        for new, old in part:
            context = context_in(bounds, (1 << EXPONENT[dtype]) - 1 - exponent_of(old, dtype))
            assert context is not None
            step = new % top - old % top
            if (new ^ old) & top:
                block.append(("number", context, 0))
            block.append(("number", context, abs(step) + 1))
            if step:
                block.append(("bits", 1, int(step < 0)))
        blocks.append(block)
    return blocks


def steps_stream(
    blocks: Sequence[Sequence[Step]], bounds: Sequence[int], power: int, split: int, x: int = 1 << 16, **more: Any
) -> bytes:
    tables = more.get("tables") or Tables.of(split, len(bounds) - 1, blocks)
    front = low_first(split, 3) + low_first(power, 5) + bounds_text(bounds) + tables.bits()
    return coded(front, more.get("words") or [rans(tables, block, x) for block in blocks])


def float_blocks(values: bytes, dtype: str, power: int) -> list[list[Step]]:
    below = 8 * SIZE[dtype] - 1 - EXPONENT[dtype]
    steps: list[list[Step]] = []
    for bits in bits_at(values, dtype):
        sign = bits >> (8 * SIZE[dtype] - 1)
        steps.append(
            [("number", 0, exponent_of(bits, dtype)), ("bits", below + 1, (sign << below) + bits % (1 << below))]
        )
    return [[step for pair in part for step in pair] for part in cut_to(steps, 1 << power)]


def floats_stream(blocks: Sequence[Sequence[Step]], power: int, split: int, **more: Any) -> bytes:
    tables = more.get("tables") or Tables.of(split, 1, blocks)
    front = low_first(split, 3) + low_first(power, 5) + tables.bits()
    return coded(front, more.get("words") or [rans(tables, block, more.get("x", 1 << 16)) for block in blocks])


def recode(file: Maker, role: str, codec: str, data: bytes, **more: str) -> Maker:
    """Another stream of values of the tensor that was added last: coded."""
    item = mark_compact(file).tensor(-1)
    item.setdefault("coding", {})[role] = {"codec": codec, **more}
    digest = file.stream(f"{item['name']}#{role}", "U8", [len(data)], data)
    if role == "values":
        item["digests"]["values"] = digest
    return file


def whole_range(dtype: str) -> list[int]:
    return [0, 1 << EXPONENT[dtype]]


def with_steps(file: Maker, dtype: str, bounds: Sequence[int], power: int = 13, split: int = 1) -> Maker:
    """The values of the tensor that was added last, as steps from the base's values that its content has or has the digest of."""
    found = file.content["tensors"][-1]
    base = bytes.fromhex(found["base_hex"]) if found["base_hex"] else file.last_base
    blocks = step_blocks(bytes.fromhex(found["value_hex"]), base, dtype, bounds, power)
    return recode(file, "values", "steps", steps_stream(blocks, bounds, power, split) if blocks else b"")


def with_floats(file: Maker, role: str, of: str, power: int = 13, split: int = 7, **more: str) -> Maker:
    text = file.content["tensors"][-1]["value_hex" if role == "values" else "base_hex"]
    blocks = float_blocks(bytes.fromhex(text), of, power)
    return recode(file, role, "floats", floats_stream(blocks, power, split) if blocks else b"", **more)


def near(base: bytes, dtype: str, label: str) -> bytes:
    """Values a few steps from the base's, or with the other sign, or anywhere."""
    width, top = SIZE[dtype], 1 << (8 * SIZE[dtype] - 1)
    found = b""
    for number, old in enumerate(bits_at(base, dtype)):
        draw = noise(f"{label} {number}", 12)
        step = draw[0] % 7 - 3
        size = min(max(old % top + step, 0), top - 1)
        if draw[1] < 20:
            size = int.from_bytes(draw[2:10], "little") % top % (old % top + 2**40)
        sign = old & top
        found += ((sign if draw[10] > 30 else sign ^ top) + size).to_bytes(width, "little")
    return found


def small_floats(label: str, count: int, dtype: str) -> bytes:
    """Floats whose exponents are a few neighbouring ones."""
    width, below = SIZE[dtype], 8 * SIZE[dtype] - 1 - EXPONENT[dtype]
    middle = (1 << EXPONENT[dtype]) // 2 - 2
    found = b""
    for number in range(count):
        draw = int.from_bytes(noise(f"{label} {number}", 12), "little")
        exponent = middle - (draw % 16).bit_length() % 4
        found += ((draw >> 8) % 2 << (8 * width - 1) | exponent << below | (draw >> 16) % (1 << below)).to_bytes(
            width, "little"
        )
    return found


def step_mask(label: str, base: bytes, dtype: str, odds: int) -> list[int]:
    """Entries that are the likelier the smaller the exponent is."""
    largest = max(exponent_of(bits, dtype) for bits in bits_at(base, dtype))
    return [
        k for k, bits in enumerate(bits_at(base, dtype))
        if noise(f"{label} {k}", 1)[0] < min(250, odds << (largest - exponent_of(bits, dtype)))
    ]  # fmt: skip


def good_compact() -> None:
    page = good("compact-of-page")
    page_base = bf16(1, -2, 0.5, 3.140625)
    add_classes(page, "w", [2, 6], [0, 1, 5, 11], form=Classes([2, 6], [0, 1, 5, 11]), dtype="BF16", base=page_base,
                value_bytes=bytes.fromhex("813fffbfff3e4940"), store_base=True)  # fmt: skip
    with_steps(page, "BF16", [126, 130], 4)
    file = add_classes(good("classes"), "w", [30, 40], range(0, 1200, 17))
    add_classes(file, "none", [3, 4], [])
    add_classes(file, "one", [], [0])
    add_classes(file, "all", [20], range(20))
    add_classes(file, "blocks", [5, 2000], range(3, 10000, 100))
    add_classes(file, "far", [MAX_NUMEL], [0, 2**40, MAX_NUMEL - 1], form=far_classes([0, 2**40, MAX_NUMEL - 1]))
    for split in (0, 2, 3, 7):
        add_classes(
            file, f"split.{split}", [900], range(2, 900, 31), form=Classes([900], range(2, 900, 31), split=split)
        )
    add_classes(file, "mask", [64], [3, 9, 60], values="none")
    add_classes(file, "patched", [6, 4], [0, 7], dtype="F16").resize(3)
    file = good("classes-lines")
    lines = ([0, 1, 2, 4, 0], [1, 0, 3, 3, 1, 2])
    chosen_ones = [6, 8, 9, 12, 14, 15, 16, 17, 18, 20, 21, 22, 23]
    form = Classes([5, 6], chosen_ones, [2, 4, 6, 8], lines=lines)
    add_classes(file, "w", [5, 6], chosen_ones, form=form)
    tall = ([1 + k % 3 for k in range(4200)], [1, 2])
    some = [k for k in range(8400) if k % 11 == 0]
    add_classes(file, "tall", [4200, 2], some, form=Classes([4200, 2], some, [2, 4, 6], lines=tall))
    file = good("classes-base")
    tensors: dict[str, tuple[str, Sequence[int], bytes]] = {}
    for dtype in FLOATS:
        data = small_floats(f"base of {dtype}", 600, dtype)
        top = (1 << EXPONENT[dtype]) - 1
        present = sorted({top - exponent_of(bits, dtype) for bits in bits_at(data, dtype)})
        bounds = [*present[:2], present[-1] + 1]
        indices = step_mask(dtype, data, dtype, 20)
        own = at_entries(data, dtype, indices)
        form = Classes([20, 30], indices, bounds, base=(data, dtype))
        add_classes(
            file,
            dtype,
            [20, 30],
            indices,
            form=form,
            on_base=True,
            dtype=dtype,
            value_bytes=near(own, dtype, dtype),
        )
        file.tensor(-1)["digests"]["base"] = file.content["tensors"][-1]["base_digest"] = sha(own)
        file.last_base = own
        with_steps(file, dtype, whole_range(dtype), 6, 2)
        tensors[dtype] = (dtype, [20, 30], data)
    dtype, data = "BF16", tensors["BF16"][2]
    indices = step_mask("lines", data, dtype, 9)
    grid = ([1] * 20, [1 + k % 2 for k in range(30)])
    top = 255
    numbers = [
        top - exponent_of(bits, dtype) + grid[0][k // 30] + grid[1][k % 30]
        for k, bits in enumerate(bits_at(data, dtype))
    ]
    bounds = [min(numbers), min(numbers) + 2, max(numbers) + 1]
    form = Classes([20, 30], indices, bounds, base=(data, dtype), lines=grid)
    add_classes(file, "both", [20, 30], indices, form=form, on_base=True, dtype=dtype, values="none")
    tensors["both"] = (dtype, [20, 30], data)
    base_file("classes-base", **tensors)
    file = good("coded-values")
    for dtype in FLOATS:
        base = small_floats(f"values of {dtype}", 45, dtype)
        file.sparse(
            f"steps.{dtype}",
            [90],
            range(0, 90, 2),
            dtype=dtype,
            base=base,
            store_base=True,
            value_bytes=near(base, dtype, "v"),
        )
        with_steps(file, dtype, whole_range(dtype), 4, 0)
        with_floats(file, "base", dtype, 4)
        file.sparse(f"floats.{dtype}", [90], range(0, 90, 2), dtype=dtype, value_bytes=base)
        with_floats(file, "values", dtype, 5, 3)
    file.sparse(
        "delta",
        [9],
        [1, 2, 8],
        values="delta",
        value_dtype="F16",
        value_bytes=small_floats("d", 3, "F16"),
        base_digest=True,
    )
    with_floats(file, "values", "F16", dtype="F16")
    file.sparse(
        "delta.bare",
        [9],
        [1, 2, 8],
        values="delta",
        dtype="BF16",
        base_digest=False,
        value_bytes=small_floats("d", 3, "BF16"),
    )
    with_floats(file, "values", "BF16")
    file.sparse("none", [9], [], dtype="BF16", store_base=True)
    recode(file, "values", "steps", b"")
    recode(file, "base", "floats", b"")
    special = bytes.fromhex("0000008000ff807f807f807fc07fffff0100018080ff")
    others = bytes.fromhex("0080000080ff80ff0000c07f7fff0080ffff0100ff7f")
    file.sparse("special", [11], range(11), dtype="BF16", base=special, store_base=True, value_bytes=others)
    with_steps(file, "BF16", whole_range("BF16"))


def far_classes(indices: Sequence[int]) -> Classes:
    """Of a tensor that is too large to be listed."""
    form = Classes([1 << 13], [0, 1, 2], power=12)
    form.power = 45
    blocks = -(-MAX_NUMEL >> 45)
    form.steps, form.entries = [], []
    for number in range(blocks):
        start = number << 45
        inside = [k for k in indices if start <= k < start + (1 << 45)]
        block: list[Step] = [("number", 0, k - before) for before, k in pairwise([start - 1, *inside])]
        form.steps.append([*block, ("number", 0, 0)])
        form.entries.append(len(inside))
    form.tables = Tables.of(form.split, 1, form.steps)
    return form


def bad_compact() -> None:
    shape, indices = [30, 40], list(range(0, 1200, 17))

    def form(**options: Any) -> Classes:
        return Classes(shape, indices, **options)

    def stream(name: str, data: bytes, entries: Sequence[int] = indices, size: Sequence[int] = shape) -> None:
        bad(name, add_classes(Maker(), "w", size, entries, data))

    data = form().stream()
    words = [rans(form().tables, block) for block in form().steps]
    stream("stream-truncated--classes-empty", b"")
    stream("stream-truncated--classes-front", data[:4])
    stream("stream-truncated--classes-word", data[:-2])
    stream("stream-truncated--classes-half-a-word", data[:-1])
    stream("stream-trailing--classes", data + b"\0\0")
    stream("stream-trailing--classes-half-a-word", data + b"\0")
    stream("stream-trailing--classes-nnz-0", data, [])
    stream("coder-state--classes-begins-elsewhere", form().stream(x=(1 << 16) + 1))
    stream("coder-state--classes-word-left", form().stream(words=[[*words[0], 0]]))
    stream("coder-state--classes-one-word", form().stream(words=[[7]]))
    stream("coder-state--classes-state-below", coder_state_below(form()))
    stream("count-mismatch--classes-sum", form().stream(entries=[len(indices) - 1]))
    fewer, more = Classes(shape, indices[:-1]), Classes(shape, [*indices, 1199])
    stream("count-mismatch--classes-fewer", fewer.stream(entries=[len(indices)]))
    stream("count-mismatch--classes-more", more.stream(entries=[len(indices)]))
    far = Classes([9999], [*indices[:-1], 1200], power=12)
    far.steps, far.entries = far.steps[:1], [len(indices)]
    far.tables = Tables.of(1, 1, far.steps)
    stream("impossible--classes-rank", far.stream())
    huge = form()
    huge.steps = [[("number", 0, 2**61)] * len(indices) + [("number", 0, 0)]]
    huge.tables = Tables.of(1, 1, huge.steps)
    stream("impossible--classes-ranks-that-overflow", huge.stream())
    lines = ([0, 1, 2, 4, 0], [1, 0, 3, 3, 1, 2])
    some = [6, 8, 9, 12, 14, 15]
    beyond = Classes([5, 6], some, [2, 4, 6, 8], lines=lines)
    beyond.steps[0][0] = ("number", 0, 9)
    beyond.tables = Tables.of(1, 3, beyond.steps)
    stream("impossible--classes-lines", beyond.stream(), some, [5, 6])
    large = Classes([5, 6], some, [2, 4, 6, 8], lines=lines)
    large.ahead[0][2] = ("number", 0, 64)
    large.line_tables = Tables.of(1, 2, large.ahead)
    stream("coder--line-64", large.stream(), some, [5, 6])
    wide = Classes([5, 6], some, [2, 4, 6, 8], lines=lines).stream()
    stream("coder--too-many-lines", wide, some, [2**24, 2])
    for what, power in (("11", 11), ("46", 46), ("63", 63)):
        changed = form()
        changed.power = power
        stream(f"coder--block-{what}", changed.stream())
    changed = Classes([5, 6], some, [2, 4, 6, 8], lines=lines)
    changed.power = 21
    stream("coder--block-of-lines-21", changed.stream(), some, [5, 6])
    for what, bounds in {"equal": [0, 0], "falling": [1, 0], "none": [0]}.items():
        changed = form()
        changed.bounds = bounds
        stream(f"coder--bounds-{what}", changed.stream())
    for what, table in {"sum-0": {0: 0, 1: 0}, "sum-4608": {0: 4096, 1: 512}}.items():
        changed = form()
        changed.tables = Tables(1, table)
        stream(f"coder--table-{what}", changed.stream(words=words))
    changed = form()
    changed.tables = Tables(1, {0: 2048, 124: 1024, 125: 1024})
    stream("coder--table-token-of-63-bits", changed.stream(words=words))
    changed = form(split=7)
    changed.tables = Tables(7, {4000: 2048, 4095: 1024, 4096: 1024})
    stream("coder--table-token-4096", coded_as(changed, words, first=4095))
    front = form()
    text = low_first(1, 3) + low_first(12, 6) + "0" + bounds_text([0, 1]) + front.tables.bits()
    assert len(text) % 8
    filled = text + "1" * (-len(text) % 8)
    stream("coder--front-filled-with-ones", coded(filled, words, [len(indices)]))
    text += "0" * (-len(text) % 8)
    plain = coded(text, [], [])
    body = b"".join(struct.pack("<H", word) for word in words[0])
    stream("varint--count-too-long", plain + b"\x80\x80\x80\x80\x80\x01" + bytes([len(indices)]) + body)
    stream("varint--count-padded", plain + bytes([len(words[0]) | 128, 0, len(indices)]) + body)
    stream("stream-truncated--classes-no-counts", plain)
    stream("stream-truncated--classes-many-blocks", data, indices, [2**30, 2**20])
    file = add_classes(Maker(), "w", shape, indices)
    file.tensor()["digests"]["indices"] = sha(b"")
    bad("digest-mismatch--classes", file)
    bad("out-of-range--dropped-classes", add_classes(Maker(), "w", [6, 4], [0, 20]).resize(3))
    _bad_bases()
    _bad_values()


def coder_state_below(form: Classes) -> bytes:
    """A state that a reader would have to refill before it begins."""
    words = rans(form.tables, form.steps[0])
    x = words[0] + (words[1] << 16)
    return form.stream(words=[[x & 0xFFFF, 0, *words[1:]]])


def coded_as(form: Classes, words: list[list[int]], first: int) -> bytes:
    """A table of two tokens from ``first`` on."""
    front = low_first(form.split, 3) + low_first(form.power, 6) + "0" + bounds_text(form.bounds)
    front += low_first(first, 12) + low_first(1, 8) + low_first(12, 4) + "000" + low_first(12, 4) + "000"
    return coded(front, words, form.entries)


def _bad_bases() -> None:
    base = small_floats("base of BF16", 600, "BF16")
    indices = step_mask("BF16", base, "BF16", 20)
    present = sorted({255 - exponent_of(bits, "BF16") for bits in bits_at(base, "BF16")})
    bounds = [present[0], present[1], present[-1] + 1]
    coded_form = Classes([20, 30], indices, bounds, base=(base, "BF16"))

    def file() -> Maker:
        own = at_entries(base, "BF16", indices)
        made = mark_compact(Maker()).sparse(
            "w", [20, 30], indices, "classes", more={"base": True}, dtype="BF16", base=own
        )
        data = coded_form.stream()
        made.tensor()["digests"] |= {
            "indices": made.stream("w#indices", "U8", [len(data)], data),
            "entries": sha(i64(*indices)),
        }
        return made

    one = base[:2]
    other = next(
        at_entries(base, "BF16", [k]) for k in range(600) if base[2 * k : 2 * k + 2][1] & 127 != one[1] & 127
    )
    bases = {
        "other-exponent": ("BF16", [20, 30], other + base[2:]),
        "no-such-class": ("BF16", [20, 30], bytes.fromhex("0040") * 600),
        "other-shape": ("BF16", [30, 20], base),
        "other-dtype": ("F16", [20, 30], base),
    }
    for what, tensor in bases.items():
        bad(f"base-mismatch--classes-{what}", file())
        base_file(f"base-mismatch--classes-{what}", w=tensor)
    made = file()
    del made.tensor()["digests"]["entries"]
    bad("manifest-schema--classes-no-digest-entries", made)
    made = file()
    made.tensor()["digests"]["entries"] = sha(b"")
    bad("base-mismatch--classes-entries", made)
    base_file("base-mismatch--classes-entries", w=("BF16", [20, 30], base))
    own = small_floats("own", 40, "BF16")
    made = Maker().sparse("w", [80], range(0, 80, 2), dtype="BF16", base=own, value_bytes=near(own, "BF16", "x"))
    made.last_base = own
    with_steps(made, "BF16", whole_range("BF16"))
    bad("base-mismatch--steps", made)
    base_file("base-mismatch--steps", w=("BF16", [80], noise("another", 160)))


def _bad_values() -> None:
    base = small_floats("own", 40, "BF16")
    values = near(base, "BF16", "x")
    every = whole_range("BF16")
    blocks = step_blocks(values, base, "BF16", every, 4)

    def plain(**options: Any) -> Maker:
        return Maker().sparse(
            "w", [80], range(0, 80, 2), dtype="BF16", base=base, store_base=True, value_bytes=values, **options
        )

    def steps(name: str, data: bytes) -> None:
        bad(name, recode(plain(), "values", "steps", data))

    def floats(name: str, data: bytes, role: str = "values") -> None:
        bad(name, recode(plain(), role, "floats", data))

    good_steps = steps_stream(blocks, every, 4, 1)
    steps("stream-truncated--steps-empty", b"")
    steps("stream-truncated--steps", good_steps[:-2])
    steps("stream-trailing--steps", good_steps + b"\1")
    steps("coder-state--steps", steps_stream(blocks, every, 4, 1, (1 << 16) + 5))
    steps("coder--steps-block-3", steps_stream(blocks, every, 3, 1))
    steps("coder--steps-block-21", steps_stream(blocks, every, 21, 1))
    steps("coder--steps-bounds", steps_stream(blocks, [256, 0], 4, 1))
    classes = sorted({255 - exponent_of(bits, "BF16") for bits in bits_at(base, "BF16")})
    without = [classes[0], classes[-1]]  # the last class is in no context
    kept = [step_blocks(values, base, "BF16", every, 4)[0]]
    steps("impossible--steps-class-without-context", steps_stream([*kept, *blocks[1:]], without, 4, 1))
    for what, changed in {
        "two-flips": [("number", 0, 0), ("number", 0, 0)],
        "below-zero": [("number", 0, 40000), ("bits", 1, 1)],
        "beyond-the-sign": [("number", 0, 40000), ("bits", 1, 0)],
        "far-beyond": [("number", 0, 2**61), ("bits", 1, 0)],
    }.items():
        hostile: list[list[Step]] = [[*changed, *blocks[0][2:]], *blocks[1:]]
        steps(f"impossible--steps-{what}", steps_stream(hostile, every, 4, 1))
    parts = float_blocks(values, "BF16", 4)
    good_floats = floats_stream(parts, 4, 7)
    for role in ("values", "base"):
        floats(f"stream-truncated--floats-{role}", good_floats[:-2], role)
        floats(f"stream-trailing--floats-{role}", good_floats + b"\1", role)
        floats(f"coder-state--floats-{role}", floats_stream(parts, 4, 7, x=(1 << 16) + 1), role)
    floats("digest-mismatch--floats-base", good_floats, "base")
    floats("coder-state--floats-too-few-words", floats_stream(parts, 4, 7, words=[[0, 1]] * len(parts)))
    floats("coder--floats-block-3", floats_stream(parts, 3, 7))
    hostile = [[("number", 0, 256), *parts[0][1:]], *parts[1:]]
    floats("impossible--floats-exponent", floats_stream(hostile, 4, 7))
    for role, codec in (("values", "steps"), ("values", "floats"), ("base", "floats")):
        file = Maker().sparse("w", [80], [], dtype="BF16", store_base=True)
        bad(f"stream-trailing--{codec}-{role}-nnz-0", recode(file, role, codec, b"\0"))
    file = recode(plain(), "values", "steps", good_steps)
    file.tensor()["digests"]["values"] = sha(b"")
    bad("digest-mismatch--steps", file)


def bad_compact_manifests() -> None:
    base = small_floats("own", 40, "BF16")

    def coded_file(role: str = "values", codec: str = "floats", **options: Any) -> Maker:
        file = Maker().sparse(
            "w",
            [80],
            range(0, 80, 2),
            dtype="BF16",
            base=base,
            value_bytes=base,
            **{"store_base": True, **options},
        )
        return recode(file, role, codec, floats_stream(float_blocks(base, "BF16", 13), 13, 7))

    bad("manifest-schema--coding-no-feature", coded_file().set(features=[]))
    bad("manifest-schema--classes-no-feature", add_classes(Maker(), "w", [9], [1]).set(features=[]))
    wrong: Json = {"list": [], "null": None, "string": "floats"}
    for what, value in wrong.items():
        file = coded_file()
        file.tensor()["coding"] = value
        bad(f"manifest-schema--coding-{what}", file)
        file = coded_file()
        file.tensor()["coding"]["values"] = value
        bad(f"manifest-schema--coding-values-{what}", file)
    for what, given in {"missing": {}, "number": {"codec": 1}}.items():
        file = coded_file()
        file.tensor()["coding"]["values"] = given
        bad(f"manifest-schema--coding-codec-{what}", file)
    for what, dtype in {"integer": "I16", "number": 1}.items():
        file = coded_file()
        file.tensor()["coding"]["values"]["dtype"] = dtype
        bad(f"manifest-schema--coding-dtype-{what}", file)
    bad("unknown-codec--values", coded_file("values", "zstd"))
    bad("unknown-codec--base", coded_file("base", "steps"))
    bad("manifest-schema--steps-of-deltas", coded_file("values", "steps", values="delta"))
    file = add_classes(Maker(), "w", [80], range(0, 80, 2), values="none")
    file.tensor()["coding"] = {"values": {"codec": "floats"}}
    bad("manifest-schema--coding-of-a-mask", file)
    file = coded_file(store_base=False)
    file.tensor()["coding"]["base"] = {"codec": "floats"}
    bad("manifest-schema--coding-of-no-base", file)
    file = coded_file()
    file.tensor()["coding"]["values"]["dtype"] = "F16"
    bad("stream-dtype--coded-targets", file)
    file = coded_file(values="delta", store_base=False, base_digest=False)
    file.tensor()["coding"]["values"]["dtype"] = "F16"
    bad("stream-dtype--coded-deltas-without-base", file)
    file = coded_file()
    _, _, data = file.streams["w#values"]
    file.stream("w#values", "I8", [len(data)], data)
    bad("stream-dtype--coded-i8", file)
    wrong = {"string": "true", "number": 1, "null": None}
    for what, value in wrong.items():
        file = add_classes(Maker(), "w", [9], [1])
        file.tensor()["indices"]["base"] = value
        bad(f"manifest-schema--classes-base-{what}", file)
    file = add_classes(Maker(), "w", [9], [1])
    del file.tensor()["digests"]["indices"]
    bad("manifest-schema--classes-no-digest", file)


def enlarge(data: bytes) -> bytes:
    """Put a number of 5000 digits in place of HUGE, and mend the digest of the manifest and the header's length."""
    small, large = str(HUGE).encode(), b"9" * 5000
    if small not in data:
        return data
    (size,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + size].rstrip(b" ").replace(small, large)
    metadata = json.loads(header, parse_int=str)["__metadata__"]
    header = header.replace(metadata["shira_digest"].encode(), texts(metadata["shira"])["shira_digest"].encode())
    return assemble(header, data[8 + size :])


def make() -> dict[str, bytes]:
    """Every file by its path inside the folder."""
    for part in (
        good_values,
        good_codecs,
        good_structured,
        good_runs,
        good_shared,
        good_shapes,
        good_whole,
        good_names,
        good_manifests,
        good_provenance_of_any_type,
        good_containers,
        good_patches,
        bad_container,
        bad_offsets,
        bad_manifest_json,
        bad_manifest_digest,
        bad_versions,
        bad_schema,
        bad_types,
        bad_schema_digests,
        bad_schema_codecs,
        bad_names,
        bad_tensors,
        bad_shared,
        bad_limit,
        bad_streams,
        bad_counts,
        bad_digests,
        bad_codes,
        bad_runs,
        bad_directories,
        bad_patterns,
        bad_patches_schema,
        bad_patches_names,
        bad_patches_streams,
        bad_patches_indices,
        apply_arithmetic,
        apply_several,
        apply_whole,
        apply_patches,
        apply_slices,
        apply_refused,
        good_implied,
        bad_implied,
        good_compact,
        bad_compact,
        bad_compact_manifests,
    ):
        part()
    files: dict[str, bytes] = {}
    for name, maker in GOOD.items():
        files[f"good/{name}.st"] = enlarge(maker.file())
        files[f"good/{name}.json"] = (json.dumps(maker.content) + "\n").encode()
    for name, data in BAD.items():
        files[f"bad/{name}.st"] = enlarge(data)
    for name, data in MASKS.items():
        files[f"bad/{name}"] = data
    for name, maker in ADAPTERS.items():
        files[f"apply/{name}.st"] = maker.file()
    for name, case in APPLY.items():
        files[f"apply/{name}.json"] = (json.dumps(case) + "\n").encode()
    for name, data in BASES.items():
        files[f"base/{name}.safetensors"] = data
    return files


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "vectors"
    files = make()
    for old in [*folder.glob("good/*"), *folder.glob("bad/*"), *folder.glob("base/*"), *folder.glob("apply/*")]:
        if old.relative_to(folder).as_posix() not in files:
            old.unlink()
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    print(
        f"{len(GOOD)} good and {len(BAD)} bad files, {len(APPLY)} cases of applying, {sum(map(len, files.values()))} bytes"
    )


if __name__ == "__main__":
    main()
