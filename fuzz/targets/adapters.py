"""Adapter files: good vectors of the specification, changed, through the library and the plain reader, which must say the same.

Lengths, offsets and digests are put right after most changes, so that these reach the rules behind the outer checks.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from fuzz.content import content
from fuzz.mutate import TEXTS, mutated_bytes, mutated_json
from fuzz.oracle import Violation, aside
from shira_format.checkpoints import open_checkpoint
from shira_format.errors import BaseRequired, ShiraError
from shira_format.format import load, save
from spec import reader, run_vectors

FILE, BASE = "a.st", "base.safetensors"
_MOST_ENTRIES = 100_000  # of a file that the plain reader reads: it needs a microsecond for each, and more
_KEYS = [
    "name", "shape", "nnz", "values", "indices", "digests", "base", "blocks", "base_values", "file", "tensor", "step", "block_size",
    "pattern", "components", "whole", "codec", "offset", "kind", "dtype", "seed", "band", "digest", "from", "rows", "removed", "result",
    "entries", "coding", "length", "low", "mask_files", "features", "alpha", "x-new",
]  # fmt: skip
_VALUES: list[Any] = [
    "target", "delta", "none", "gap8", "varint", "flat", "structured", "shared", "runs", "random", "magnitude", "classes", "steps",
    "floats", "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "BOOL", "1.0", "1.7", "2.0", "sha256", "0" * 64,
    "compact", "mask-file", "patch", ["compact", "magnitude", "mask-file", "patch", "random", "runs"], [2, 3], [4, 4], [],
    {"codec": "flat"}, {"codec": "random", "seed": "1"}, {"codec": "magnitude"}, {"codec": "classes", "base": True},
    {"codec": "structured", "pattern": [{"kind": "rows", "step": 2, "offset": 0}]}, {"kind": "diagonal", "offset": 1},
    {"values": {"codec": "steps"}}, {"values": {"codec": "floats"}}, {"base": {"codec": "floats"}},
]  # fmt: skip


@functools.cache
def _vectors() -> list[Path]:
    small = [file for file in run_vectors.vectors(only="^good/") if file.stat().st_size < 1 << 16]
    return [file for file in small if len(file.with_suffix(".json").read_bytes()) < 1 << 18]


def make(random: Random, folder: Path) -> None:
    """An adapter, its base if it needs one, and the mask files that it may name."""
    vector = random.choice(_vectors())
    data = vector.read_bytes()
    base = run_vectors.base_of(vector)
    if base is not None:
        tensors = base.read_bytes()
        (folder / BASE).write_bytes(mutated_bytes(random, tensors) if random.random() < 0.1 else tensors)
    if b"mask_files" in data:
        for masks in vector.parent.glob("masks*.st"):
            shutil.copy(masks, folder)
    how = random.choice(
        ["bytes", "header", "manifest", "manifest", "manifest", "streams", "streams", "streams", "both"]
    )
    changed = mutated_bytes(random, data) if how == "bytes" else _changed(random, data, folder, how)
    (folder / FILE).write_bytes(changed)


def check(folder: Path) -> None:
    """Both readers; and what the library accepts it writes again, with the same content."""
    base = folder / BASE
    library, error = None, None
    try:
        library = load(folder / FILE, base=open_checkpoint(base) if base.exists() else None)
        found = content(library)
    except (ShiraError, OSError) as caught:
        error, found = caught, {}
    with aside():
        plain = _plainly(folder)
        if plain is not None:
            _compare(plain, found, error)
    if error is not None:
        raise error
    assert library is not None
    save(library, folder / "again.st")
    with aside():
        again = content(load(folder / "again.st"))
        if (text := run_vectors.difference(again["tensors"], found["tensors"])) is not None:
            raise Violation(f"written again, {text}")


def _plainly(folder: Path) -> Any:
    """What the plain reader says: the content, ``"refused"`` or ``"base needed"``; None of files that are too much for it."""
    base = folder / BASE
    data = (folder / FILE).read_bytes()
    try:
        file = reader.open_file(memoryview(data))
        if sum(item["nnz"] for item in file.manifest["tensors"]) > _MOST_ENTRIES:
            return None
        return reader.read(str(folder / FILE), base=str(base) if base.exists() else None)
    except (reader.Refused, OSError):
        return "refused"
    except reader.BaseNeeded:
        return "base needed"


def _compare(plain: Any, found: Any, error: Exception | None) -> None:
    if isinstance(plain, str):
        if error is None:
            raise Violation(f"accepted; the plain reader says: {plain}")
        if (plain == "base needed") != isinstance(error, BaseRequired):
            raise Violation(f"the plain reader says: {plain}; the library: {error}") from error
    elif error is not None:
        raise Violation(f"the plain reader accepts it; the library says: {error}") from error
    elif (text := run_vectors.difference(found, plain)) is not None:
        raise Violation(f"the library's {text}")


def _changed(random: Random, data: bytes, folder: Path, how: str) -> bytes:
    """An adapter with changes of its header, its manifest or its streams, and most lengths and digests put right."""
    size = int.from_bytes(data[:8], "little")
    header, buffer = json.loads(data[8 : 8 + size], parse_int=reader.integer), data[8 + size :]
    metadata = header.pop("__metadata__", {})
    manifest = json.loads(metadata["shira"], parse_int=reader.integer)
    streams = {
        name: [one["dtype"], one["shape"], buffer[slice(*one["data_offsets"])]] for name, one in header.items()
    }
    if how in ("streams", "both") and streams:
        for name in random.sample(sorted(streams), k=min(len(streams), random.choice([1, 1, 2]))):
            streams[name] = _mutated_stream(random, *streams[name])
    if how in ("manifest", "both"):
        manifest = mutated_json(random, manifest, _KEYS, [*_VALUES, *TEXTS, *header])
    if random.random() < 0.95:
        _put_right(manifest, streams)
    file = _file(streams, metadata, manifest, random if how == "header" else None)
    if b'"entries"' in file and random.random() < 0.9:
        _put_entries_right(file, manifest, folder)
        file = _file(streams, metadata, manifest, None)
    return file


def _mutated_stream(random: Random, dtype: str, shape: list[int], data: bytes) -> list[Any]:
    changed = mutated_bytes(random, data)
    width = reader.SIZES[dtype]
    changed = changed[: len(changed) // width * width]
    if len(changed) != len(data):
        row = width
        for side in shape[1:]:
            row *= side
        if len(shape) > 1 and row:
            changed = changed[: len(changed) // row * row]
        shape = [len(changed) // max(1, row), *shape[1:]] if shape else shape
    return [dtype, shape, changed]


def _items(manifest: Any, key: str) -> list[Any]:
    found = manifest.get(key) if isinstance(manifest, dict) else None
    listed = found if isinstance(found, list) else []
    return [item for item in listed if isinstance(item, dict) and isinstance(item.get("digests"), dict)]


def _put_right(manifest: Any, streams: dict[str, list[Any]]) -> None:
    """Digests of streams as they are now; those of coded base values, which are of the values, stay."""
    for key, suffixes in (
        ("tensors", ("indices", "blocks", "values", "base", "rows")),
        ("whole", ("values", "base")),
    ):
        for item in _items(manifest, key):
            coding = item.get("coding")
            coded = isinstance(coding, dict) and "base" in coding
            for role in suffixes:
                stream = item.get("name") if key == "whole" and role == "values" else f"{item.get('name')}#{role}"
                if (
                    role in item["digests"]
                    and isinstance(stream, str)
                    and stream in streams
                    and not (coded and role == "base")
                ):
                    item["digests"][role] = hashlib.sha256(streams[stream][2]).hexdigest()


def _put_entries_right(file: bytes, manifest: Any, folder: Path) -> None:
    """The digests of entries that something beside the streams tells."""
    found: dict[str, str] = {}

    def note(item: Any, indices: list[int], _rule: str) -> None:
        found[item["name"]] = hashlib.sha256(struct.pack(f"<{len(indices)}q", *indices)).hexdigest()

    base = folder / BASE
    with mock.patch.object(reader, "check_entries", note), contextlib.suppress(reader.Refused, reader.BaseNeeded):
        opened = reader.open_file(memoryview(file), reader.open_base(str(base)) if base.exists() else None)
        for item in opened.manifest["tensors"]:
            if "entries" in item["digests"] and item["nnz"] < _MOST_ENTRIES:
                reader.find_indices(opened, item, "", {})
    for item in _items(manifest, "tensors"):
        if isinstance(item.get("name"), str) and item["name"] in found:
            item["digests"]["entries"] = found[item["name"]]


def _file(streams: dict[str, list[Any]], metadata: dict[str, str], manifest: Any, random: Random | None) -> bytes:
    """The file's bytes; with ``random`` its header is changed."""
    text = json.dumps(manifest)
    header: dict[str, Any] = {"__metadata__": metadata | {"shira": text, "shira_digest": _text_digest(text)}}
    at = 0
    for name, (dtype, shape, data) in streams.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    if random is not None:
        header = mutated_json(
            random, header, ["dtype", "shape", "data_offsets", "__metadata__"], ["F16", "U8", [0, 4], [2]]
        )
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + b"".join(data for *_, data in streams.values())


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
