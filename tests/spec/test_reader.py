"""The library against the plain reader: files that the library wrote, and manifests that were changed at random."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shira_format._core.arrays import Indices
from shira_format._core.dtypes import dtype_name
from shira_format.adapter import Adapter
from shira_format.errors import FormatError
from shira_format.format import load, save
from shira_format.format.codecs import CODECS
from spec import reader, run_vectors
from tests.spec.test_text import SCHEMA, manifest_of
from tests.spec.test_vectors import content
from tests.strategies import adapters

VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@settings(max_examples=150)
@given(adapter=adapters(), block_size=st.sampled_from([16, 4096]))
def test_the_plain_reader_finds_what_the_library_wrote(folder: Path, adapter: Adapter, block_size: int) -> None:
    path = folder / "a.st"
    save(adapter, path, block_size=block_size)
    expected = content(
        Adapter(adapter, dense=adapter.dense, manifest={"format_version": "1.0"} | adapter.manifest)
    )
    assert run_vectors.difference(reader.read(str(path)), expected) is None
    VALIDATOR.validate(manifest_of(path))


# Manifests that were changed


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def encoded(codec: str, indices: list[int], shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Indices]]:
    made = CODECS[codec].encode(np.array(indices, np.int64), shape, 16)
    streams = {"indices": made.stream, "blocks": made.blocks}
    return made.params, {role: array for role, array in streams.items() if array is not None}


def metadata(manifest: str) -> dict[str, str]:
    """The manifest and its digest; half of a surrogate pair has no UTF-8, and so no digest that a reader could compute."""
    return {"shira": manifest, "shira_digest": sha(manifest.encode("utf-8", "surrogatepass"))}


class Maker:
    """A file with one tensor of every kind, whose manifest is then changed."""

    def __init__(self) -> None:
        self.streams: dict[str, tuple[str, list[int], bytes]] = {}
        tensors = [
            self.sparse("g", "gap8", [4, 30], range(0, 60, 3), "target", ["base"]),
            self.sparse("v", "varint", [4, 30], [0, 119], "delta", []),
            self.sparse("f", "flat", [7], [1, 6], "delta", ["digest"]),
            self.sparse("s", "structured", [3, 4], [0, 5, 10], "none", []),
            self.sparse("h", "shared", [4, 30], range(0, 60, 3), "target", ["digest"]),
            self.sparse("p", "gap8", [3, 5], [0, 7, 14], "target", ["digest"]),
            self.sparse("q", "varint", [3, 5], [1, 9], "delta", ["base"]),
        ]
        more = hashlib.shake_256(b"rows").digest(2 * 10)
        self.streams["p#rows"] = ("F16", [2, 5], more)
        tensors[5]["digests"] |= {"rows": sha(more), "result": sha(b"")}
        tensors[5] |= {"from": "old", "rows": 5}
        tensors[6] |= {"from": "p", "rows": 2}
        self.streams["b"] = ("I8", [2], b"\x01\x02")
        self.streams["b#base"] = ("I8", [2], b"\x03\x04")
        whole = {
            "name": "b",
            "shape": [2],
            "dtype": "I8",
            "digests": {"values": sha(b"\x01\x02"), "base": sha(b"\x03\x04")},
            "base_values": True,
        }
        self.manifest: dict[str, Any] = {
            "format_version": "1.0",
            "features": ["mask-file", "patch"],
            "digest": "sha256",
            "alpha": 0.5,
            "tensors": tensors,
            "whole": [whole],
            "mask_files": {"m.masks": "0" * 64},
            "removed": ["old", "gone"],
            "base_model": {"id": "a/b", "revision": "r", "files": [{"name": "x", "digest": "y"}]},
            "source": {"kind": "lora", "dialect": "peft", "files": [{"name": "x"}]},
            "selection": {"rule": "top-k", "scope": "tensor", "density": 0.01, "top_k": 3, "include": ["*"]}
            | {"exclude": [], "energy_kept": 0.5, "relative_error": 0.1, "energy": 0.9, "min_change": 0},
            "mask": {"rule": "rand", "seed": 1, "calibration_digest": "z"},
            "license": "MIT",
            "writer": "me",
            "description": "text",
        }

    def sparse(
        self, name: str, codec: str, shape: list[int], indices: Any, values: str, base: list[str]
    ) -> dict[str, Any]:
        item: dict[str, Any] = {
            "name": name,
            "shape": shape,
            "dtype": "F16",
            "nnz": len(indices),
            "values": values,
        }
        digests: dict[str, str] = {}
        if codec == "shared":
            item["indices"] = {"codec": "shared", "tensor": "g"}
        else:
            item["indices"], streams = encoded(codec, list(indices), tuple(shape))
            for role, array in streams.items():
                digests[role] = sha(array.tobytes())
                self.streams[f"{name}#{role}"] = (dtype_name(array.dtype), list(array.shape), array.tobytes())
        data = hashlib.shake_256(name.encode()).digest(2 * len(indices))
        if values != "none":
            digests["values"] = sha(data)
            self.streams[f"{name}#values"] = ("F16", [len(indices)], data)
        if base:
            digests["base"] = sha(data)
        if base == ["base"]:
            self.streams[f"{name}#base"] = ("F16", [len(indices)], data)
            item["base_values"] = True
        return item | {"digests": digests, "energy_kept": 1, "relative_error": 0.5}

    def header(self) -> dict[str, Any]:
        header: dict[str, Any] = {}
        at = 0
        for name, (dtype, shape, data) in self.streams.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        return header

    def file(self, manifest: str, header: dict[str, Any]) -> bytes:
        text = dumped({"__metadata__": metadata(manifest)} | header)
        return len(text).to_bytes(8, "little") + text + b"".join(data for *_, data in self.streams.values())


RAW: dict[str, str] = {"@1e999": "1e999", "@-1e999": "-1e999", "@1.0": "1.0", "@1e2": "1e2", "@NaN": "NaN"}


def dumped(value: Any) -> bytes:
    """As JSON, with literals that json.dumps does not write in place of their marks."""
    text = json.dumps(value)
    for mark, literal in RAW.items():
        text = text.replace(json.dumps(mark), literal)
    return text.encode()


MAKER = Maker()
SIZES = [0, 1, 2, 3, 5, 7, 15, 16, 17, 30, 2**31 - 1, 2**31, 2**32, 2**53 - 1, 2**53, 2**63, 2**64 - 1, -1]
WORDS = [
    "",
    "g",
    "v",
    "f",
    "s",
    "h",
    "b",
    "g#values",
    "target",
    "delta",
    "none",
    "gap8",
    "varint",
    "flat",
    "structured",
]
WORDS += [
    "shared",
    "rows",
    "columns",
    "diagonal",
    "F16",
    "F32",
    "I8",
    "BOOL",
    "1.0",
    "1.7",
    "2.0",
    "sha256",
    "mask-file",
    "patch",
]
WORDS += [
    "p",
    "q",
    "old",
    "gone",
    "p#rows",
    "m.masks",
    "..",
    "\n",
    "__metadata__",
    "x/y",
    "\ud800",
    "0" * 64,
    "A" * 64,
    "é",
    *RAW,
]
KEYS = [
    "name",
    "shape",
    "nnz",
    "values",
    "indices",
    "digests",
    "base",
    "blocks",
    "base_values",
    "file",
    "tensor",
    "step",
]
KEYS += [
    "block_size",
    "pattern",
    "components",
    "whole",
    "codec",
    "x-new",
    "offset",
    "kind",
    "dtype",
    "seed",
    "digest",
    "from",
    "rows",
    "removed",
    "result",
]
PARTS: list[Any] = [
    {"kind": kind, "step": s, "offset": o} for kind in ("rows", "columns") for s, o in ((1, 0), (3, 2))
]
PARTS += [{"kind": "diagonal", "offset": offset} for offset in (0, 1, -2, 9)]
OBJECTS: list[Any] = [
    {},
    [],
    [[]],
    {"x": {}},
    {"x": {"base_model": 3}},
    {"codec": "flat"},
    {"codec": "shared", "tensor": "g"},
]
OBJECTS += [
    {"codec": "shared", "tensor": "g", "file": "m.masks"},
    {"codec": "structured", "pattern": []},
    PARTS,
    [0, 4],
]
new_values: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, False, 0.5, -0.0, *SIZES, *WORDS, *PARTS, *OBJECTS]
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def changed(draw: st.DrawFn, original: Any, most: int = 3) -> Any:
    """The JSON value with up to three places set, removed, added or exchanged."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, most))):
        *path, last = draw(st.sampled_from(sorted(places(value), key=str)))
        holder = value
        for key in path:
            holder = holder[key]
        how = draw(st.sampled_from(["set", "set", "set", "remove", "add", "other", "twice"]))
        new = copy.deepcopy(draw(new_values))
        if how == "set":
            holder[last] = new
        elif how == "remove":
            del holder[last]
        elif how == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(KEYS))] = new
        elif how == "add" or (how == "twice" and isinstance(holder, list)):
            holder.append(new if how == "add" else copy.deepcopy(holder[last]))
        elif how == "other":
            *there, end = draw(st.sampled_from(sorted(places(value), key=str)))
            source = value
            for key in there:
                source = source[key]
            holder[last] = copy.deepcopy(source[end])
        if not any(places(value)):
            break
    return value


def answers(path: Path) -> tuple[Any, Any]:
    """What the two readers find: content, or that the file is refused."""
    found: list[Any] = []
    reads: list[Callable[[], Any]] = [lambda: content(load(path)), lambda: reader.read(str(path))]
    for read in reads:
        try:
            found.append(read())
        except (FormatError, reader.Refused):
            found.append("refused")
    return found[0], found[1]


def check_agreement(folder: Path, data: bytes) -> None:
    path = folder / "changed.st"
    path.write_bytes(data)
    library, plain = answers(path)
    assert run_vectors.difference(library, plain) is None


def test_the_original_is_accepted(folder: Path) -> None:
    data = MAKER.file(json.dumps(MAKER.manifest), MAKER.header())
    check_agreement(folder, data)
    assert 7 == len(load(folder / "changed.st"))
    assert list(range(0, 60, 3)) == load(folder / "changed.st")["h"].indices.tolist()


def put(*path_and_value: Any) -> Any:
    *path, last, value = path_and_value
    manifest = copy.deepcopy(MAKER.manifest)
    holder: Any = manifest
    for key in path:
        holder = holder[key]
    holder[last] = value
    return manifest


@settings(max_examples=1500)
@given(manifest=changed(MAKER.manifest))
@example(manifest=put("whole", 0, "digests", "indices", 5))
@example(manifest=put("tensors", 0, "energy_kept", "@1e999"))
@example(manifest=put("selection", "density", "@-1e999"))
@example(manifest=put("alpha", "@1e999"))
@example(manifest=put("tensors", 3, "nnz", "@1e2"))
@example(manifest=put("mask", "seed", 10**350))
@example(manifest=put("features", ["mask-file"]))
@example(manifest=put("tensors", 5, "rows", "@1e2"))
@example(manifest=put("tensors", 5, "rows", 2**53))
@example(manifest=put("tensors", 5, "rows", 3))
@example(manifest=put("tensors", 6, "rows", 1))
@example(manifest=put("tensors", 6, "from", "__metadata__"))
@example(manifest=put("tensors", 6, "digests", "result", "0" * 64))
@example(manifest=put("removed", ["p"]))
def test_both_readers_accept_the_same_manifests(folder: Path, manifest: Any) -> None:
    check_agreement(folder, MAKER.file(dumped(manifest).decode(), MAKER.header()))


@settings(max_examples=600)
@given(header=changed(MAKER.header()))
def test_both_readers_accept_the_same_headers(folder: Path, header: Any) -> None:
    check_agreement(folder, MAKER.file(json.dumps(MAKER.manifest), header))


@settings(max_examples=600)
@given(data=st.data())
def test_both_readers_accept_the_same_streams(folder: Path, data: st.DataObject) -> None:
    """Digests are made to fit, so that the decoders see what was changed."""
    maker = copy.deepcopy(MAKER)
    name = data.draw(st.sampled_from([name for name in maker.streams if name.endswith(("#indices", "#blocks"))]))
    dtype, shape, stream = maker.streams[name]
    if dtype == "I64":
        array = np.frombuffer(stream, "<i8").copy()
        for _ in range(data.draw(st.integers(1, 2))):
            array[data.draw(st.integers(0, array.size - 1))] = data.draw(st.sampled_from([*SIZES[:14], -1, 2, 20]))
        stream = array.tobytes()
    else:
        at = data.draw(st.integers(0, len(stream)))
        cut = data.draw(st.integers(0, 2))
        piece = bytes(data.draw(st.lists(st.sampled_from([0, 1, 2, 127, 128, 254, 255]), max_size=4)))
        stream = stream[:at] + piece + stream[at + cut :]
        shape = [len(stream)]
    maker.streams[name] = (dtype, shape, stream)
    owner, _, role = name.partition("#")
    item = next(item for item in maker.manifest["tensors"] if item["name"] == owner)
    item["digests"][role] = sha(stream)
    check_agreement(folder, maker.file(json.dumps(maker.manifest), maker.header()))


HEADER_ENDS = [b"", b" ", b"\n", b"\t", b"\r\n", b" \x00", b"x", b"}", b",", b"\xff", b"{}"]


@pytest.mark.parametrize("end", HEADER_ENDS, ids=repr)
def test_only_spaces_may_follow_the_header(folder: Path, end: bytes) -> None:
    manifest = json.dumps({**MAKER.manifest, "tensors": [], "whole": []})
    text = json.dumps({"__metadata__": metadata(manifest)}).encode()
    path = folder / "end.st"
    path.write_bytes((len(text) + len(end)).to_bytes(8, "little") + text + end)
    library, plain = answers(path)
    assert library == plain
    assert (library != "refused") == (end.strip(b" ") == b"")


@pytest.mark.parametrize(("spare", "accepted"), [(0, True), (1, True), (-1, False)])
def test_both_readers_have_the_same_limit_of_entries(folder: Path, spare: int, accepted: bool) -> None:
    """Opened, not read: nobody wants the list of so many entries in a vector."""
    entries = 2**24 + 64 * 10 - spare
    mask = {"name": "m", "shape": [entries], "dtype": "F32", "nnz": entries, "values": "none", "digests": {}}
    mask |= {"indices": {"codec": "structured", "pattern": [{"kind": "rows", "step": 1, "offset": 0}]}}
    whole = {"name": "b", "shape": [10], "dtype": "U8", "digests": {"values": sha(bytes(10))}}
    maker = copy.deepcopy(MAKER)
    maker.manifest |= {"tensors": [mask], "whole": [whole], "removed": []}
    maker.streams = {"b": ("U8", [10], bytes(10))}
    path = folder / "limit.st"
    path.write_bytes(maker.file(json.dumps(maker.manifest), maker.header()))
    for read in (load, lambda path: reader.open_file(reader.map_file(str(path)))):
        if accepted:
            read(path)
            continue
        with pytest.raises((FormatError, reader.Refused)) as caught:
            read(path)
        assert "limit" == caught.value.rule


def mask_of(path: Path) -> Path:
    """A good adapter that names a mask file `masks.st`, which it is not beside."""
    path.mkdir()
    shutil.copy(run_vectors.VECTORS / "good" / "mask-file.st", path / "a.st")
    return path / "a.st"


def refusals(path: Path) -> list[str]:
    rules = []
    for read in (lambda: content(load(path)), lambda: reader.read(str(path))):
        with pytest.raises((FormatError, reader.Refused)) as caught:
            read()
        rules.append(caught.value.rule)
    return rules


def test_mask_files_are_regular_files(tmp_path: Path) -> None:
    path = mask_of(tmp_path / "folder")
    (path.parent / "masks.st").mkdir()
    assert ["mask-file"] * 2 == refusals(path)
    path = mask_of(tmp_path / "nothing")
    (path.parent / "masks.st").symlink_to("gone.st")
    assert ["mask-file"] * 2 == refusals(path)
    if hasattr(os, "mkfifo"):
        path = mask_of(tmp_path / "pipe")
        os.mkfifo(path.parent / "masks.st")
        assert ["mask-file"] * 2 == refusals(path)
        (tmp_path / "link").mkdir()
        shutil.copy(path, tmp_path / "link")
        (tmp_path / "link" / "masks.st").symlink_to(path.parent / "masks.st")
        assert ["mask-file"] * 2 == refusals(tmp_path / "link" / "a.st")


def test_links_to_mask_files_are_followed(tmp_path: Path) -> None:
    path = mask_of(tmp_path / "a")
    (path.parent / "masks.st").symlink_to(run_vectors.VECTORS / "good" / "masks.st")
    expected = run_vectors.expected_content(run_vectors.VECTORS / "good" / "mask-file.st")
    assert [expected] * 2 == list(answers(path))
    elsewhere = tmp_path / "b"
    elsewhere.mkdir()
    (elsewhere / "a.st").symlink_to(path)  # the folder is that of the path, not of what it leads to
    assert ["mask-file"] * 2 == refusals(elsewhere / "a.st")
