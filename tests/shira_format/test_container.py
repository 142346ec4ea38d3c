"""Adapter files: written and read again, opened by the safetensors package, shared masks, damage, laziness, memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import shira_format
from shira_format._core.arrays import Array, array_digest, as_array, as_bytes
from shira_format._core.dtypes import DTYPES
from shira_format.adapter import Adapter
from shira_format.errors import FormatError
from shira_format.format import AdapterFile, AdapterWriter, load, save
from shira_format.format import reader as reader_module
from shira_format.format import writer as writer_module
from shira_format.format.codecs import CODECS, encode_smallest
from shira_format.format.items import stream_name
from shira_format.format.manifest import DIGEST_KEY, METADATA_KEY
from shira_format.storage.paths import LocalFile
from shira_format.storage.safetensors_file import SafetensorsFile
from shira_format.tensors import DenseTensor, SparseTensor
from tests.strategies import adapters, any_bits, json_values, sparse_tensors

BLOCK_SIZES = st.sampled_from([16, 64, 4096])


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


def entries(name: str, count: int, shape: tuple[int, ...] = (100, 100), seed: int = 0) -> SparseTensor:
    """Targets at scattered entries."""
    random = np.random.default_rng(seed)
    indices = np.sort(random.choice(int(np.prod(shape)), count, replace=False)).astype(np.int64)
    values = random.standard_normal(count).astype(np.float32)
    return SparseTensor(name, shape, indices, values, base=values * 2)


def grown(name: str) -> SparseTensor:
    """A patch from a tensor of another name, with a row more."""
    return SparseTensor(
        name, (2, 3), [1], f32(5), base=f32(4), base_name="old", rows=3, new_rows=f32(7, 8, 9).reshape(1, 3),
        result_digest="0" * 64,
    )  # fmt: skip


def read_all(path: Path, *, verify: bool = True) -> Adapter:
    adapter = load(path, verify=verify)
    return Adapter(dict(adapter), dense=dict(adapter.dense), manifest=adapter.manifest)


# Round trips


@settings(max_examples=200)
@given(adapter=adapters(), block_size=BLOCK_SIZES)
def test_what_is_saved_is_loaded(folder: Path, adapter: Adapter, block_size: int) -> None:
    path, again = folder / "a.st", folder / "b.st"
    save(adapter, path, block_size=block_size)
    for verify in (True, False):
        found = load(path, verify=verify)
        assert adapter == found
        assert list(adapter) == list(found)
        assert list(adapter.dense) == list(found.dense)
    assert adapter.manifest == {key: value for key, value in found.manifest.items() if key in adapter.manifest}
    save(adapter, again, block_size=block_size)
    assert path.read_bytes() == again.read_bytes()
    save(found, again, block_size=block_size)
    assert path.read_bytes() == again.read_bytes()
    assert {"a.st", "b.st"} == {file.name for file in folder.iterdir()}
    again.unlink()


@given(adapter=adapters())
def test_streams_looked_at_together_are_those_looked_at_one_by_one(folder: Path, adapter: Adapter) -> None:
    path = folder / "kinds.st"
    save(adapter, path)
    file = AdapterFile(path)
    assume(file.manifest.kinds is not None)
    sparse = [
        stream_name(entry.name, role) for entry in file.manifest.tensors.values() for role in entry.streams()
    ]
    forms = file.streams.header.forms
    assert len(sparse) == file._fitting()
    for name in sparse:
        dtype, shape = forms[name]
        del forms[name]
        assert file._fitting() is None
        for other in (("I16", shape), (dtype, (*shape, 1))):
            forms[name] = other
            assert file._fitting() is None
        forms[name] = dtype, shape
    path.unlink()


@given(adapter=adapters(), extra=json_values, note=json_values)
def test_what_nobody_knows_is_kept(folder: Path, adapter: Adapter, extra: Any, note: Any) -> None:
    path = folder / "notes.st"
    with AdapterWriter(path, {"x-1": extra, "source": {"kind": "lora", "x": extra}}) as writer:
        for tensor in adapter.values():
            writer.add(tensor, {"x-2": note, "energy_kept": 0.5, "nnz": -1, "name": "not this"})
        for whole in adapter.dense.values():
            writer.add_dense(whole, {"x-2": note})
    save(load(path), path)
    manifest = load(path).manifest
    assert extra == manifest["x-1"]
    assert {"kind": "lora", "x": extra} == manifest["source"]
    for item in (*manifest["tensors"], *manifest.get("whole", ())):
        assert note == item["x-2"]
    assert list(adapter) == [item["name"] for item in manifest["tensors"]]
    assert [tensor.nnz for tensor in adapter.values()] == [item["nnz"] for item in manifest["tensors"]]
    path.unlink()


def test_the_manifest_of_a_new_file(tmp_path: Path) -> None:
    save(Adapter([entries("w", 5)], manifest={"alpha": 2, "features": ["x"], "digest": "md5"}), tmp_path / "a.st")
    manifest = load(tmp_path / "a.st").manifest
    assert ["format_version", "features", "digest", "writer", "alpha", "tensors"] == list(manifest)
    assert ("1.0", [], "sha256") == (manifest["format_version"], manifest["features"], manifest["digest"])
    assert f"shira-format {shira_format.__version__}" == manifest["writer"]
    save(Adapter([], manifest={"writer": "me"}), tmp_path / "b.st")
    assert "me" == load(tmp_path / "b.st").manifest["writer"]
    assert Adapter() == load(tmp_path / "b.st")


def test_the_manifest_of_a_patch(tmp_path: Path) -> None:
    path = tmp_path / "a.st"
    plain = SparseTensor("w", (2, 3), [1], f32(5), base=f32(4), result_digest="1" * 64)
    save(Adapter([plain], manifest={"features": ["patch"], "removed": []}), path)
    manifest = load(path).manifest
    assert ([], "1" * 64) == (manifest["features"], manifest["tensors"][0]["digests"]["result"])
    assert not {"from", "rows"} & manifest["tensors"][0].keys()
    save(Adapter([plain, grown("r")]), path)
    item = load(path).manifest["tensors"][1]
    assert (["patch"], "old", 3, [2, 3]) == (
        load(path).manifest["features"],
        item["from"],
        item["rows"],
        item["shape"],
    )
    assert hashlib.sha256(f32(7, 8, 9).tobytes()).hexdigest() == item["digests"]["rows"]
    assert (1, 3) == SafetensorsFile(path)["r#rows"].shape
    save(Adapter(manifest={"removed": ["x", "y"]}), path)
    assert (["patch"], ("x", "y")) == (load(path).manifest["features"], load(path).removed)


@pytest.mark.parametrize(
    ("tensors", "manifest", "rule"),
    [
        ([grown("r")], {"removed": ["r"]}, "duplicate-name"),
        ([], {"removed": ["x", "x"]}, "duplicate-name"),
        ([], {"removed": [""]}, "name"),
        ([SparseTensor("w", (1,), [0], f32(1), base=f32(0), base_name="\n")], {}, "name"),
        ([grown("c/r")], {"components": {"c": {}}}, "component"),
    ],
)
def test_patches_that_the_format_cannot_hold(
    tmp_path: Path, tensors: list[SparseTensor], manifest: dict[str, Any], rule: str
) -> None:
    with pytest.raises(FormatError) as caught:
        save(Adapter(tensors, manifest=manifest), tmp_path / "a.st")
    assert rule == caught.value.rule
    assert [] == list(tmp_path.iterdir())


def test_the_result_of_add_is_the_bytes_of_the_streams(tmp_path: Path) -> None:
    with AdapterWriter(tmp_path / "a.st") as writer:
        added = [writer.add(entries("w", 300)), writer.add(entries("v", 7, seed=1)), writer.add(grown("r"))]
    streams = SafetensorsFile(tmp_path / "a.st")
    sizes = [sum(s.nbytes for name, s in streams.items() if name.startswith(f"{t}#")) for t in "wvr"]
    assert sizes == added


@given(adapter=adapters(), block_size=BLOCK_SIZES)
def test_the_safetensors_package_reads_our_files(folder: Path, adapter: Adapter, block_size: int) -> None:
    path = folder / "peer.st"
    save(adapter, path, block_size=block_size)
    ours = SafetensorsFile(path)
    with safe_open(path, framework="pt") as theirs:
        assert ours.metadata == theirs.metadata()
        assert sorted(ours) == sorted(theirs.keys())
        for name, stream in ours.items():
            tensor = theirs.get_tensor(name)
            found = tensor.contiguous().flatten().view(torch.uint8).numpy() if tensor.numel() else f32()
            assert stream.shape == tuple(tensor.shape)
            assert as_bytes(ours.read(name)).tobytes() == found.tobytes()
            assert str(ours.read(name).dtype) == str(as_array(tensor).dtype)


@given(adapter=adapters(), block_size=BLOCK_SIZES)
def test_the_file_can_be_taken_in_one_pass(folder: Path, adapter: Adapter, block_size: int) -> None:
    """The streams of a tensor follow each other in the order of the specification, and arrays are aligned all the same."""
    path = folder / "ordered.st"
    save(adapter, path, block_size=block_size)
    file = AdapterFile(path)
    lying = sorted(file.streams, key=lambda name: (file.streams[name].begin, file.streams[name].end))
    sizes = {name: file.streams[name].nbytes for name in file.streams}
    expected = [name for name in file.manifest.stream_names() if sizes[name]]
    assert expected == [name for name in lying if sizes[name]]
    for tensor in load(path).values():
        for array in (tensor.indices, tensor.base, tensor.new_rows, tensor._values):
            assert array is None or (array.flags.aligned and not array.flags.writeable)


def test_what_was_read_does_not_depend_on_the_file_any_more(tmp_path: Path) -> None:
    adapter = Adapter(same_entries("a", "b"), dense=[DenseTensor("d", np.arange(5000.0))])
    save(adapter, tmp_path / "a.st")
    for verify in (True, False):
        path = tmp_path / "b.st"
        shutil.copy(tmp_path / "a.st", path)
        lazy = load(path, verify=verify)
        read = Adapter(list(lazy.values()), dense=list(lazy.dense.values()))
        with open(path, "r+b") as file:  # in place: a file that is mapped would show it, or kill the process
            file.seek(-4000, 2)
            file.write(bytes(4000))
            file.flush()
            assert adapter == read
            file.truncate(10)
        assert adapter == read
        with pytest.raises(OSError, match="has become shorter"):
            lazy["a"]


# Lookups


def test_loaded_tensors_are_read_when_asked_for(tmp_path: Path) -> None:
    whole = DenseTensor("b", f32(1, 2))
    save(Adapter([entries("w", 5), entries("v", 5, seed=1)], dense=[whole]), tmp_path / "a.st")
    damage(tmp_path / "a.st", "w#values")
    adapter = load(tmp_path / "a.st")
    assert ["w", "v"] == list(adapter)
    assert ["b"] == list(adapter.dense)
    assert (2, 1) == (len(adapter), len(adapter.dense))
    assert ("w" in adapter, "b" in adapter, "b" in adapter.dense) == (True, False, True)
    assert whole == adapter.dense["b"]
    assert entries("v", 5, seed=1) == adapter["v"]
    for mapping in (adapter, adapter.dense):
        with pytest.raises(KeyError):
            mapping["missing"]
    with pytest.raises(FormatError) as caught:
        adapter["w"]
    assert ("digest-mismatch", "w", tmp_path / "a.st") == (
        caught.value.rule,
        caught.value.tensor,
        caught.value.file,
    )
    assert entries("w", 5) != load(tmp_path / "a.st", verify=False)["w"]


def damage(path: Path, stream: str, byte: int = 0) -> None:
    """Change one byte of one stream."""
    streams = SafetensorsFile(path)
    data = bytearray(path.read_bytes())
    data[streams._start + streams[stream].begin + byte] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("stream", ["w#values", "w#base", "w#indices", "w#blocks", "r#rows", "b", "b#base"])
def test_damage_is_found_by_digest(tmp_path: Path, stream: str) -> None:
    path = tmp_path / "a.st"
    whole = DenseTensor("b", f32(1, 2), base=f32(3, 4))
    save(Adapter([entries("w", 50), grown("r")], dense=[whole]), path, block_size=16)
    read_all(path)
    damage(path, stream)
    with pytest.raises(FormatError) as caught:
        read_all(path)
    assert "digest-mismatch" == caught.value.rule
    assert str(caught.value).startswith(f"{path}: tensor '{stream[0]}': ")
    if stream in {"w#indices", "w#blocks"}:  # what decoding finds, it finds without digests, too
        with pytest.raises(FormatError):
            read_all(path, verify=False)


# Fuzzing


@pytest.fixture(scope="module")
def seeds() -> list[bytes]:
    """Small files with every codec, meaning and kind of stream."""
    rows = np.arange(40, 60, dtype=np.int64)
    few = np.array([3, 900_000_000], np.int64)
    one = entries("g", 40)
    tensors = [
        one,
        SparseTensor("v", (30_000, 40_000), few, f32(1, 2), value_kind="delta"),
        SparseTensor("s", (30, 20), rows, value_kind="none"),
        SparseTensor("h", one.shape, one.indices, one.values, base_digest=one.base_digest),
        grown("r"),
        SparseTensor("d", (4, 2), [0, 3], f32(1, 2), base=f32(3, 4), rows=2),
    ]
    found = []
    with tempfile.TemporaryDirectory() as name:
        for some in (tensors, tensors[1:2], []):
            manifest = {"removed": ["x"]} if some else {}
            save(
                Adapter(some, dense=[DenseTensor("b", f32(1))], manifest=manifest),
                Path(name) / "a.st",
                block_size=16,
            )
            found.append((Path(name) / "a.st").read_bytes())
    return found


@st.composite
def damaged(draw: st.DrawFn) -> tuple[int, Callable[[bytes], bytes]]:
    edits = draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4))
    how = draw(st.sampled_from(["flip", "set", "insert", "delete", "truncate"]))

    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        for place, byte in edits:
            at = min(int(place * len(changed)), len(changed) - 1)
            if how == "flip":
                changed[at] ^= 1 << byte % 8
            elif how == "set":
                changed[at] = byte
            elif how == "insert":
                changed.insert(at, byte)
            elif how == "delete" and len(changed) > 1:
                del changed[at]
        return bytes(changed[: int(edits[0][0] * len(data))] if how == "truncate" else changed)

    return draw(st.integers(0, 2)), change


@settings(max_examples=1500)
@given(case=damaged(), verify=st.booleans())
def test_damaged_files_are_refused_or_valid(
    folder: Path, seeds: list[bytes], case: tuple[int, Callable[[bytes], bytes]], verify: bool
) -> None:
    which, change = case
    path = folder / "fuzz.st"
    path.write_bytes(change(seeds[which]))
    try:
        found = read_all(path, verify=verify)
    except FormatError as error:
        assert str(path) in str(error)
        return
    for tensor in found.values():
        assert tensor == SparseTensor(
            name=tensor.name,
            shape=tensor.shape,
            indices=tensor.indices,
            values=tensor._values,
            value_kind=tensor.value_kind,
            dtype=tensor.dtype,
            base=tensor.base,
            base_digest=tensor.base_digest,
            base_name=tensor.base_name,
            rows=tensor.rows,
            new_rows=tensor.new_rows,
            result_digest=tensor.result_digest,
        )


@pytest.mark.parametrize("which", [0, 1, 2])
def test_every_prefix_is_refused(folder: Path, seeds: list[bytes], which: int) -> None:
    path = folder / "prefix.st"
    for length in range(len(seeds[which])):
        path.write_bytes(seeds[which][:length])
        with pytest.raises(FormatError) as caught:
            load(path)
        assert "file-truncated" == caught.value.rule
    path.write_bytes(seeds[which])
    read_all(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing.st")
    with pytest.raises(OSError, match="directory"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError):
        save(Adapter([entries("w", 3)]), tmp_path / "missing" / "a.st")
    with pytest.raises(OSError, match="directory"):
        save(Adapter([entries("w", 3)]), tmp_path)
    assert [] == list(tmp_path.iterdir())


# Laziness and memory


HUGE = 1 << 33  # bytes of one stream; the file is sparse and takes no disk


def huge_file(path: Path) -> SparseTensor:
    """A valid file of more than 16 GB in which `small` lies between two tensors that nobody can afford to read."""
    indices = np.sort(np.random.default_rng(0).choice(10**6, 1000, replace=False))
    small = SparseTensor("small", (10**6,), indices, np.zeros(1000, np.float32), base_digest="0" * 64)
    encoded = encode_smallest(small.indices, small.shape)
    assert encoded.stream is not None
    sizes = {
        "first#values": ("F32", [HUGE // 4], HUGE),
        "small#values": ("F32", [small.nnz], 4 * small.nnz),
        "small#indices": ("U8", [encoded.stream.size], encoded.stream.size),
        "last": ("U8", [HUGE], HUGE),
    }
    digest = hashlib.sha256
    items = [
        {"name": "first", "shape": [HUGE, 2], "dtype": "F32", "nnz": HUGE // 4, "values": "delta"}
        | {"indices": {"codec": "structured", "pattern": []}, "digests": {"values": "0" * 64}},
        {"name": "small", "shape": [10**6], "dtype": "F32", "nnz": small.nnz, "values": "target"}
        | {"indices": encoded.params}
        | {
            "digests": {
                "values": digest(small.values.tobytes()).hexdigest(),
                "indices": digest(encoded.stream.tobytes()).hexdigest(),
                "base": "0" * 64,
            }
        },
    ]
    manifest = {"format_version": "1.0", "features": [], "digest": "sha256", "tensors": items}
    manifest["whole"] = [{"name": "last", "shape": [HUGE], "dtype": "U8", "digests": {"values": "0" * 64}}]
    text = json.dumps(manifest)
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: text, DIGEST_KEY: digest(text.encode()).hexdigest()}}
    at = 0
    for name, (dtype, shape, size) in sizes.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(8 + len(text) + header["small#indices"]["data_offsets"][0])
        file.write(encoded.stream.tobytes())
        file.truncate(8 + len(text) + at)
    return small


if sys.platform == "linux":  # elsewhere files are not sparse of themselves

    def resident() -> int:
        """Bytes of memory that the process has touched."""
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def test_one_tensor_of_a_huge_file_costs_only_its_own_bytes(tmp_path: Path) -> None:
        small = huge_file(tmp_path / "huge.st")
        assert (tmp_path / "huge.st").stat().st_size > 2 * HUGE
        before, started = resident(), time.monotonic()
        adapter = load(tmp_path / "huge.st")
        assert small == adapter["small"]
        assert ["first", "small"] == list(adapter)
        assert (adapter.alpha, len(adapter.dense)) == (1.0, 1)
        assert resident() - before < 32 << 20
        assert time.monotonic() - started < 5
        unverified = load(tmp_path / "huge.st", verify=False)
        with pytest.raises(FormatError) as caught:
            unverified["first"]
        assert "count-mismatch" == caught.value.rule
        assert resident() - before < 32 << 20


def peak(write: Callable[[], None]) -> int:
    tracemalloc.start()
    try:
        write()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_writer_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    count, size = 1 << 17, (1 << 17) * (8 + 4 + 4)
    values = np.ones(count, np.float32)

    def tensors(number: int) -> Iterator[SparseTensor]:
        for seed in range(number):
            indices = np.arange(count, dtype=np.int64) * 7 + seed
            yield SparseTensor(f"w{seed}", (1024, 1024), indices, values + seed, base=values - seed)

    def write(number: int) -> None:
        with AdapterWriter(tmp_path / "a.st") as writer:
            for tensor in tensors(number):
                writer.add(tensor)

    def write_whole(number: int) -> None:
        with AdapterWriter(tmp_path / "b.st") as writer:
            for seed in range(number):
                writer.add_dense(DenseTensor(f"b{seed}", np.full(4 * count, seed, np.float32)))

    write(1)
    few, many = (peak(lambda n=n: write(n)) for n in (3, 50))  # type: ignore[misc]
    assert many - few < size / 2
    assert peak(lambda: write_whole(50)) < 3 * 16 * count
    assert (tmp_path / "a.st").stat().st_size > 50 * 8 * count

    def copy() -> None:
        save(load(tmp_path / "a.st"), tmp_path / "c.st")

    assert peak(copy) - few < size
    assert (tmp_path / "a.st").read_bytes() == (tmp_path / "c.st").read_bytes()


# Shared indices


def same_entries(*names: str, count: int = 400) -> list[SparseTensor]:
    first = entries("-", count)
    values = [first.values + k for k in range(len(names))]
    return [
        SparseTensor(name, first.shape, first.indices, v, base=v) for name, v in zip(names, values, strict=True)
    ]


def test_equal_indices_are_stored_once(tmp_path: Path) -> None:
    tensors = [*same_entries("a", "b", "c"), entries("d", 400, seed=9)]
    save(Adapter(tensors), tmp_path / "a.st")
    found = load(tmp_path / "a.st")
    assert Adapter(tensors) == found
    codecs = [item["indices"] for item in found.manifest["tensors"]]
    assert [{"codec": "shared", "tensor": "a"}] * 2 == codecs[1:3]
    assert ["gap8"] * 2 == [codecs[0]["codec"], codecs[3]["codec"]]
    assert {"a#indices", "d#indices"} == {name for name in SafetensorsFile(tmp_path / "a.st") if "indices" in name}
    assert all("indices" not in item["digests"] for item in found.manifest["tensors"][1:3])


def test_equal_indices_of_other_shapes_are_not_shared(tmp_path: Path) -> None:
    (one,) = same_entries("a")
    other = SparseTensor("b", (50, 200), one.indices, one.values, base=one.base)
    save(Adapter([one, other]), tmp_path / "a.st")
    assert ["gap8"] * 2 == [item["indices"]["codec"] for item in load(tmp_path / "a.st").manifest["tensors"]]
    few = [SparseTensor(name, (9,), [0, 5], f32(1, 2), base=f32(0, 0)) for name in ("a-long-name", "other")]
    save(Adapter(few), tmp_path / "a.st")  # the reference would be longer than the indices
    assert ["gap8"] * 2 == [item["indices"]["codec"] for item in load(tmp_path / "a.st").manifest["tensors"]]


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """An adapter of three tensors, two of them with the entries of a mask file."""
    masks = [SparseTensor(t.name, t.shape, t.indices, value_kind="none") for t in same_entries("a", "b")]
    masks[1] = SparseTensor("b", (100, 100), np.arange(0, 10_000, 101), value_kind="none")  # the diagonal
    save(Adapter([*masks, entries("c", 9)]), tmp_path / "style.masks")
    (a,) = same_entries("a")
    b = SparseTensor("b", (100, 100), masks[1].indices, np.ones(100, np.float32), value_kind="delta")
    save(Adapter([a, b, entries("c", 10)]), tmp_path / "a.st", masks=tmp_path / "style.masks")
    return tmp_path / "a.st"


def test_a_mask_file_holds_the_indices(masked: Path, tmp_path: Path) -> None:
    found = load(masked)
    assert ["mask-file"] == found.manifest["features"]
    digest = hashlib.sha256((tmp_path / "style.masks").read_bytes()).hexdigest()
    assert {"style.masks": digest} == found.manifest["mask_files"]
    shared = [{"codec": "shared", "tensor": name, "file": "style.masks"} for name in ("a", "b")]
    assert shared == [item["indices"] for item in found.manifest["tensors"][:2]]
    assert "varint" == found.manifest["tensors"][2]["indices"]["codec"]
    expected = {"a#values", "a#base", "b#values", "c#values", "c#base", "c#indices"}
    assert expected == set(SafetensorsFile(masked))
    assert same_entries("a")[0] == found["a"]
    assert list(range(0, 10_000, 101)) == found["b"].indices.tolist()
    # Written without the mask file, it stands alone again.
    save(found, tmp_path / "alone.st")
    assert found == load(tmp_path / "alone.st")
    alone = load(tmp_path / "alone.st").manifest
    assert ([], False) == (alone["features"], "mask_files" in alone)
    # And it can be written with it once more.
    save(found, tmp_path / "again.st", masks=tmp_path / "style.masks")
    assert masked.read_bytes() == (tmp_path / "again.st").read_bytes()


def test_a_mask_file_is_needed_and_checked(masked: Path, tmp_path: Path) -> None:
    masks = tmp_path / "style.masks"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    masks.rename(elsewhere / "style.masks")
    with pytest.raises(FormatError, match=r"style\.masks") as caught:
        load(masked)["a"]
    assert ("mask-file", masked, "a") == (caught.value.rule, caught.value.file, caught.value.tensor)
    assert entries("c", 10) == load(masked)["c"]
    assert same_entries("a")[0] == load(masked, masks=elsewhere)["a"]
    data = bytearray((elsewhere / "style.masks").read_bytes())
    masks.write_bytes(data + b" ")
    with pytest.raises(FormatError, match="not the one that the adapter needs") as caught:
        load(masked)["a"]
    assert "mask-file" == caught.value.rule
    assert same_entries("a")[0] == load(masked, masks=elsewhere)["a"]


def test_a_mask_file_that_is_overwritten_after_its_digest_was_checked(masked: Path, tmp_path: Path) -> None:
    masks = tmp_path / "style.masks"
    found = load(masked)
    assert same_entries("a")[0] == found["a"]
    with open(masks, "r+b") as file:  # in place, as a mapped file would show it
        file.seek(-500, 2)
        file.write(b"\xff" * 500)
    assert same_entries("a")[0] == found["a"]
    with open(masks, "r+b") as file:
        file.truncate(100)
    assert same_entries("a")[0] == found["a"]
    with pytest.raises(FormatError, match="not the one that the adapter needs"):
        load(masked)["a"]


def test_a_mask_file_that_is_swapped_while_it_is_read(
    masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = [SparseTensor(t.name, t.shape, t.indices + 1, value_kind="none") for t in same_entries("a", "b")]
    save(Adapter(other), tmp_path / "other.masks")
    masks, reads = tmp_path / "style.masks", []
    real = LocalFile.close

    def swapping(self: LocalFile) -> None:
        real(self)
        if self._path == masks:
            reads.append(masks)
            os.replace(tmp_path / "other.masks", masks)

    monkeypatch.setattr(LocalFile, "close", swapping)
    found = load(masked)
    assert same_entries("a")[0] == found["a"]  # what was hashed, not what is there now
    assert [masks] == reads


def test_a_mask_file_that_is_swapped_while_an_adapter_is_written(masked: Path, tmp_path: Path) -> None:
    masks = tmp_path / "style.masks"
    before, digest = masks.read_bytes(), hashlib.sha256(masks.read_bytes()).hexdigest()
    with AdapterWriter(tmp_path / "new.st", masks=masks) as writer:
        masks.write_bytes(b"x" * len(before))
        writer.add(same_entries("a")[0])
    masks.write_bytes(before)
    found = load(tmp_path / "new.st")
    assert {"style.masks": digest} == found.manifest["mask_files"]
    assert same_entries("a")[0] == found["a"]


def test_a_mask_file_that_is_a_pipe_or_a_device_is_not_read(masked: Path, tmp_path: Path) -> None:
    masks = tmp_path / "style.masks"
    masks.unlink()
    os.mkfifo(masks)
    with pytest.raises(FormatError, match="not a regular file"):
        load(masked)["a"]
    masks.unlink()
    masks.symlink_to("/dev/zero")
    with pytest.raises(FormatError, match="not a regular file"):
        load(masked)["a"]


def test_a_mask_file_that_fits_nothing_is_not_named(tmp_path: Path) -> None:
    save(Adapter([SparseTensor("x", (9,), [1], value_kind="none")]), tmp_path / "m.masks")
    save(Adapter(same_entries("a")), tmp_path / "a.st", masks=tmp_path / "m.masks")
    save(Adapter(same_entries("a")), tmp_path / "b.st")
    assert (tmp_path / "a.st").read_bytes() == (tmp_path / "b.st").read_bytes()


def test_shared_tensors_of_a_mask_file_are_no_target(tmp_path: Path) -> None:
    masks = [SparseTensor(t.name, t.shape, t.indices, value_kind="none") for t in same_entries("a", "b")]
    save(Adapter(masks), tmp_path / "m.masks")
    save(Adapter(same_entries("a", "b")), tmp_path / "a.st", masks=tmp_path / "m.masks")
    found = load(tmp_path / "a.st")
    assert Adapter(same_entries("a", "b")) == found
    assert ["m.masks", None] == [item["indices"].get("file") for item in found.manifest["tensors"]]


# What the writer refuses


@pytest.mark.parametrize("name", ["", "a\nb", "\x7f", "__metadata__", "x" * 1025, "é" * 513, "\ud800"])
def test_names_that_are_not_allowed(tmp_path: Path, name: str) -> None:
    for adapter in (
        Adapter([SparseTensor(name, (2,), [0], f32(1), base=f32(0))]),
        Adapter(dense=[DenseTensor(name, f32(1))]),
    ):
        with pytest.raises(FormatError) as caught:
            save(adapter, tmp_path / "a.st")
        assert "name" == caught.value.rule
    assert [] == list(tmp_path.iterdir())


def unknown_base() -> SparseTensor:
    return SparseTensor("w", (2,), [0], f32(1))


@pytest.mark.parametrize(
    ("add", "rule"),
    [
        (lambda writer: writer.add(entries("w", 3)), "duplicate-name"),
        (lambda writer: writer.add(SparseTensor("w", (2,), [0], value_kind="none")), "duplicate-name"),
        (lambda writer: writer.add_dense(DenseTensor("w", f32(1))), "duplicate-name"),
        (lambda writer: writer.add_dense(DenseTensor("w#values", f32(1))), "duplicate-name"),
        (lambda writer: writer.add(SparseTensor("v", (2,), [0], f32(1))), "manifest-schema"),
        (
            lambda writer: writer.add(SparseTensor("v", (2,), [0], f32(1), base_digest="0" * 63)),
            "manifest-schema",
        ),
        (lambda writer: writer.manifest.update(alpha=float("nan")), "manifest-json"),
        (lambda writer: writer.manifest.update(alpha="1"), "manifest-schema"),
        (lambda writer: writer.manifest.update(x=Path()), "manifest-json"),
        (lambda writer: writer.manifest.update(description="\ud800"), "manifest-json"),
        (lambda writer: writer.manifest.update(description=1), "manifest-schema"),
        (lambda writer: writer.manifest.update(components={"unet": {}}), "component"),
        (lambda writer: writer.manifest.update(base_model="me/base"), "manifest-schema"),
    ],
)
def test_what_no_reader_would_accept_is_not_written(
    tmp_path: Path, add: Callable[[AdapterWriter], object], rule: str
) -> None:
    (tmp_path / "a.st").write_bytes(b"old")

    def write() -> None:
        with AdapterWriter(tmp_path / "a.st") as writer:
            writer.add(entries("w", 3))
            add(writer)

    with pytest.raises(FormatError) as caught:
        write()
    assert rule == caught.value.rule
    assert b"old" == (tmp_path / "a.st").read_bytes()
    assert ["a.st"] == [file.name for file in tmp_path.iterdir()]


def test_a_block_size_below_16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        save(Adapter([entries("w", 3)]), tmp_path / "a.st", block_size=8)
    assert ("manifest-schema", tmp_path / "a.st") == (caught.value.rule, caught.value.file)


@given(tensor=sparse_tensors("v"))
def test_a_refused_tensor_leaves_nothing_behind(folder: Path, tensor: SparseTensor) -> None:
    def write(path: Path, refused: list[Callable[[AdapterWriter], object]]) -> bytes:
        with AdapterWriter(path, block_size=16) as writer:
            writer.add(entries("w", 3))
            for add in refused:
                with pytest.raises(FormatError):
                    add(writer)
            writer.add(tensor)
            writer.add_dense(DenseTensor("b", f32(1)))
        return path.read_bytes()

    digest_only = SparseTensor("u", (100, 100), entries("", 300).indices, entries("", 300).values)
    taken = SparseTensor("w", tensor.shape, tensor.indices, np.ones(tensor.nnz, np.float16), value_kind="delta")
    refused: list[Callable[[AdapterWriter], object]] = [
        lambda writer: writer.add(digest_only),
        lambda writer: writer.add(taken),
        lambda writer: writer.add_dense(DenseTensor("w#values", f32(1), base=f32(2))),
    ]
    assert write(folder / "clean.st", []) == write(folder / "clean.st", refused)
    assert tensor == load(folder / "clean.st")["v"]


def test_a_header_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "MAX_HEADER", 1000)
    with pytest.raises(FormatError) as caught:
        save(Adapter(manifest={"description": "x" * 1000}), tmp_path / "a.st")
    assert "header-too-large" == caught.value.rule


# Others


def test_files_of_components(tmp_path: Path) -> None:
    adapter = Adapter([entries("unet/w", 3)], manifest={"components": {"unet": {"base_model": {"id": "x/y"}}}})
    save(adapter, tmp_path / "a.st")
    assert adapter == load(tmp_path / "a.st")
    assert {"unet": {"base_model": {"id": "x/y"}}} == load(tmp_path / "a.st").manifest["components"]


def test_a_file_can_be_replaced_by_what_was_loaded_from_it(tmp_path: Path) -> None:
    adapter = Adapter([entries("w", 300)])
    save(adapter, tmp_path / "a.st")
    loaded = load(tmp_path / "a.st")
    loaded.manifest["alpha"] = 0.5
    save(loaded, tmp_path / "a.st")
    assert (0.5, adapter["w"]) == (load(tmp_path / "a.st").alpha, load(tmp_path / "a.st")["w"])
    assert adapter["w"] == loaded["w"]


@given(data=st.data())
def test_unaligned_streams_are_read(folder: Path, data: st.DataObject) -> None:
    """What we write is aligned; what others write need not be."""
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    array = data.draw(any_bits(DTYPES[dtype], (3,)))
    header = {
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "w": {"dtype": dtype, "shape": [3], "data_offsets": [1, 1 + array.nbytes]},
    }
    text = json.dumps(header).encode()
    (folder / "u.st").write_bytes(len(text).to_bytes(8, "little") + text + b"\x00" + array.tobytes())
    found = SafetensorsFile(folder / "u.st")
    assert array.tobytes() == found.read("w").tobytes()
    assert array.tobytes() == as_bytes(found.read("w")).tobytes()


def test_an_open_file_gives_tensors_one_by_one(tmp_path: Path) -> None:
    save(Adapter([entries("w", 30)], dense=[DenseTensor("b", f32(1))]), tmp_path / "a.st")
    file = AdapterFile(tmp_path / "a.st")
    assert entries("w", 30) == file.sparse("w")
    assert DenseTensor("b", f32(1)) == file.dense("b")
    assert entries("w", 30).indices.tolist() == file.indices(file.manifest.tensors["w"]).tolist()
    assert set(CODECS) >= {file.manifest.tensors["w"].codec}


@pytest.mark.parametrize("module", ["torch", "scipy", "matplotlib", "transformers", "safetensors", "peft"])
def test_importing_the_package_is_light(module: str) -> None:
    program = f"import sys, shira_format; sys.exit({module!r} in sys.modules)"
    assert 0 == subprocess.run([sys.executable, "-c", program], check=False).returncode


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("license", 5, "'license'"),
        ("base_model", {"files": [{"digest": "x"}]}, "'base_model.files'"),
        ("selection", {"density": math.inf}, "manifest-json"),
        ("selection", {"top_k": -1}, "'selection.top_k'"),
        ("components", {"a": {"base_model": {"id": 1}}}, "'components.a.base_model.id'"),
    ],
)
def test_provenance_of_another_form_is_not_written(tmp_path: Path, key: str, value: Any, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        save(Adapter(manifest={key: value}), tmp_path / "a.st")
    assert [] == list(tmp_path.iterdir())


def test_a_mask_that_would_pass_the_limit_is_stored_entry_by_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (writer_module, reader_module):
        monkeypatch.setattr(module, "FREE_ENTRIES", 100)
        monkeypatch.setattr(module, "ENTRIES_PER_BYTE", 2)
    rows = np.flatnonzero(np.arange(400) // 20 % 5 == 0)  # 80 entries
    masks = [SparseTensor(name, (20, 20), rows, value_kind="none") for name in "abcd"]
    path = tmp_path / "masks.st"
    save(Adapter(masks), path)
    file = AdapterFile(path)
    assert ["structured", "gap8", "structured", "gap8"] == [
        entry.codec for entry in file.manifest.tensors.values()
    ]
    assert Adapter(masks) == load(path)
    monkeypatch.setattr(reader_module, "ENTRIES_PER_BYTE", 1)
    with pytest.raises(FormatError) as caught:
        load(path)
    assert "limit" == caught.value.rule


def test_coded_values_that_would_pass_the_limit_are_stored_uncoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 4000
    base = np.linspace(1, 2, size, dtype=np.float32)
    same = SparseTensor(
        "w", (size,), np.arange(size), base, dtype=np.dtype(np.float32), base_digest=array_digest(base)
    )
    adapter, path = Adapter([same]), tmp_path / "a.st"

    def saved() -> AdapterFile:
        save(adapter, path, compact=True, base={"w": base})
        assert adapter == load(path, base={"w": base})
        return AdapterFile(path)

    assert "steps" == saved().manifest.tensors["w"].value_codec(
        "values"
    )  # next to no bytes: the values are the base's
    for module in (writer_module, reader_module):
        monkeypatch.setattr(module, "FREE_ENTRIES", 100)
        monkeypatch.setattr(module, "ENTRIES_PER_BYTE", 2)
    entry = saved().manifest.tensors["w"]
    assert (None, "gap8") == (entry.value_codec("values"), entry.codec)
