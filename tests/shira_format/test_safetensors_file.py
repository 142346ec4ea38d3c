"""The strict reader of safetensors files, against files of the safetensors package and hand-made ones."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from shira_format._core.arrays import Array, as_array
from shira_format._core.dtypes import DTYPES, FLOATS
from shira_format.errors import FormatError
from shira_format.storage import safetensors_header
from shira_format.storage.safetensors_file import SafetensorsFile
from shira_format.storage.safetensors_header import Stream
from shira_format.tensors import same_bits
from tests.strategies import any_bits, small_shapes


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def write(path: Path, header: Any, buffer: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + buffer)
    return path


def refused(path: Path) -> FormatError:
    with pytest.raises(FormatError) as caught:
        SafetensorsFile(path)
    assert path == caught.value.file
    return caught.value


@st.composite
def torch_tensors(draw: st.DrawFn) -> torch.Tensor:
    kinds = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
    name = draw(st.sampled_from(sorted(kinds)))
    array = draw(any_bits(DTYPES[name], draw(small_shapes(max_numel=64))))
    if array.size == 0:
        return torch.empty(array.shape, dtype=kinds[name])
    flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())
    return flat.view(kinds[name]).reshape(array.shape)


@given(
    tensors=st.dictionaries(st.text("abc.é/", min_size=1, max_size=5), torch_tensors(), max_size=5),
    # An empty dictionary beside no tensors makes the package write a header that it cannot read itself.
    metadata=st.none() | st.dictionaries(st.text("abé", max_size=4), st.text("xyé\n", max_size=4), min_size=1),
)
def test_files_of_the_safetensors_package(
    folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None
) -> None:
    path = folder / "theirs.safetensors"
    save_file(tensors, path, metadata)
    file = SafetensorsFile(path)
    assert tensors.keys() == file.keys()
    assert len(tensors) == len(file)
    assert (metadata or {}) == file.metadata
    assert path.stat().st_size == file.size
    for name, tensor in tensors.items():
        found = file.read(name)
        assert same_bits(as_array(tensor), found)
        assert not found.flags.writeable
        assert tensor.numel() * tensor.element_size() == file[name].nbytes


def test_arrays_outlive_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.st", {"w": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}, b"abc")
    file = SafetensorsFile(path)
    array = file.read("w")
    file.close()
    path.unlink()
    assert b"abc" == array.tobytes()
    assert Stream("U8", (3,), 0, 3) == file["w"]
    with pytest.raises(KeyError):
        file.read("v")


def test_files_are_closed_without_being_asked_to(tmp_path: Path) -> None:
    path = write(tmp_path / "a.st", {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        file = SafetensorsFile(path)
        handle = file._storage._file
        del file
    assert handle.closed
    assert [] == caught
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refused(write(tmp_path / "b.st", []))
    assert [] == caught


def test_each_read_has_memory_of_its_own(tmp_path: Path) -> None:
    size = 3 * 65536 + 5
    data = np.random.default_rng(0).bytes(2 * size)
    header = {
        n: {"dtype": "U8", "shape": [size], "data_offsets": [k * size, (k + 1) * size]} for k, n in enumerate("ab")
    }
    file = SafetensorsFile(write(tmp_path / "a.st", header, data))
    first, second = file.read("a"), file.read("a")
    assert data == first.tobytes() + file.read("b").tobytes()
    assert not np.shares_memory(first, second)


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("header", "buffer", "rule"),
    [
        (entry(), bytes(7), "file-truncated"),
        (entry(), bytes(9), "file-trailing"),
        ({}, b"x", "file-trailing"),
        (entry(dtype="F12"), bytes(8), "unknown-dtype"),
        (entry(dtype=["F32"]), bytes(8), "header-entry"),
        (entry(shape=[3]), bytes(8), "dtype-length"),
        (entry(shape=[2.0]), bytes(8), "header-entry"),
        (entry(shape=[True, 2]), bytes(8), "header-entry"),
        (entry(shape=[-2]), bytes(8), "header-entry"),
        (entry(shape=[1] * 65), bytes(8), "header-entry"),
        (entry(shape=[2**32, 2**32]), bytes(8), "shape-overflow"),
        (entry(shape=[2**64 // 3, 3]), bytes(8), "shape-overflow"),
        (entry(shape=[10**300] * 64), bytes(8), "shape-overflow"),
        (entry(data_offsets=[8, 0]), bytes(8), "header-entry"),
        (entry(data_offsets=[0, 8, 8]), bytes(8), "header-entry"),
        (entry(data_offsets={"0": 1, "8": 2}), bytes(8), "header-entry"),
        (entry(data_offsets="08"), bytes(8), "header-entry"),
        (entry(data_offsets=[1, 9]), bytes(9), "offsets"),
        (entry(x=1), bytes(8), "header-entry"),
        (entry() | {"v": None}, bytes(8), "header-entry"),
        (entry() | {"v": "abc"}, bytes(8), "header-entry"),
        (entry() | {"v": []}, bytes(8), "header-entry"),
        (entry() | {"__metadata__": {"a": 1}}, bytes(8), "header-entry"),
        (entry() | {"__metadata__": []}, bytes(8), "header-entry"),
        (entry() | {"v": entry()["w"]}, bytes(8), "offsets"),
        (b"[]", b"", "header-json"),
        (b"", b"", "header-json"),
        (b" {}", b"", "header-json"),
        (b"{}\n", b"", "header-json"),
        (b"{}\x00", b"", "header-json"),
        (b'{"a":"\xff"}', b"", "header-json"),
        (b'{"w":1,"w":2}', b"", "header-json"),
        (b'{"w":' * 40 + b"1" + b"}" * 40, b"", "header-json"),
        (b'{"w":' * 100_000, b"", "header-json"),
    ],
)
def test_what_is_refused(tmp_path: Path, header: Any, buffer: bytes, rule: str) -> None:
    assert rule == refused(write(tmp_path / "a.st", header, buffer)).rule


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"", "file-truncated"),
        (b"\x02\0\0\0\0\0\0", "file-truncated"),
        (b"\x03\0\0\0\0\0\0\0{}", "file-truncated"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "header-too-large"),
        ((100_000_000).to_bytes(8, "little") + b"{}", "file-truncated"),
        (b"\xff" * 8, "header-too-large"),
    ],
)
def test_lengths_are_checked_before_anything_is_read(tmp_path: Path, data: bytes, rule: str) -> None:
    (tmp_path / "a.st").write_bytes(data)
    assert rule == refused(tmp_path / "a.st").rule


@pytest.mark.parametrize("data", [b"A plain text file.\n", b"PK\3\4\x14\0\0\0" + bytes(40), b"hi"])
def test_files_of_other_kinds_are_called_so(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.st").write_bytes(data)
    assert str(refused(tmp_path / "a.st")).startswith(f"{tmp_path / 'a.st'}: not a safetensors file")


def test_empty_streams_lie_anywhere(tmp_path: Path) -> None:
    def empty(at: int, shape: list[int]) -> dict[str, Any]:
        return {"dtype": "F32", "shape": shape, "data_offsets": [at, at]}

    header = entry() | {"x": empty(0, [0]), "y": empty(8, [0, 2**40]), "z": empty(8, [5, 0, 2])}
    file = SafetensorsFile(write(tmp_path / "a.st", header, bytes(8)))
    assert [(0,), (0, 2**40), (5, 0, 2)] == [file.read(name).shape for name in "xyz"]


@pytest.mark.parametrize("shape", [[0, 2**62], [2**63, 0], [0, 10**30], [2**27, 0, 2**26], [0, 2**53]])
def test_a_zero_excuses_no_other_dimension(tmp_path: Path, shape: list[int]) -> None:
    header = {"w": {"dtype": "F64", "shape": shape, "data_offsets": [0, 0]}}
    assert "shape-overflow" == refused(write(tmp_path / "a.st", header)).rule


def test_every_dtype_is_read_bit_for_bit(tmp_path: Path) -> None:
    arrays: dict[str, Array] = {
        name: np.arange(24).astype("u1")[: 3 * d.itemsize].view(d) for name, d in DTYPES.items()
    }
    arrays["BOOL"] = np.array([True, False, True])
    header, buffer = {}, b""
    for name, array in arrays.items():
        header[name] = {"dtype": name, "shape": [3, 1], "data_offsets": [len(buffer), len(buffer) + array.nbytes]}
        buffer += array.tobytes()
    file = SafetensorsFile(write(tmp_path / "a.st", header, buffer))
    for name, array in arrays.items():
        assert same_bits(array.reshape(3, 1), file.read(name))
    assert set(FLOATS) < set(file)


NAMES = ["w", "v", "v", "a.b", "é", "", "__metadata__", '\\"', "\\u0061"]
FORMS = [
    'F32","shape":[2',
    'U8","shape":[8',
    'BF16","shape":[0,7',
    'F64","shape":[',
    'F12","shape":[1',
    'U8","shape":[08',
    'U8","shape":[8,',
]
SPANS = ["0,8", "8,16", "16,24", "0,0", "8,8", "00,8", "8,0", "0,9"]
METADATA = ['"__metadata__":{"a":"b"},', '"__metadata__":{},', "", "", '"__metadata__":{"a":"\\ud83e\\udde0"},']
METADATA += [
    '"__metadata__":{"a":"\\ud83e"},',
    '"__metadata__":{"a":"b","a":"c"},',
    '"__metadata__":{"a":1},',
    '"__metadata__":{}',
]
arrays = st.tuples(st.sampled_from(NAMES), st.sampled_from(FORMS), st.sampled_from(SPANS)).map(
    lambda one: f'"{one[0]}":{{"dtype":"{one[1]}],"data_offsets":[{one[2]}]}}'
)


@given(
    before=st.sampled_from(METADATA),
    found=st.lists(arrays, max_size=3),
    change=st.none() | st.tuples(st.floats(0, 1), st.integers(0, 1), st.sampled_from(["", ",", "}", '"', " ", "1", "x", "é", "\t"])),
    spaces=st.integers(0, 2),
)  # fmt: skip
def test_arrays_looked_at_together_are_those_looked_at_one_by_one(
    before: str, found: list[str], change: tuple[float, int, str] | None, spaces: int
) -> None:
    text = f"{{{before}{','.join(found)}}}"
    if change is not None:
        at = int(change[0] * len(text))
        text = text[:at] + change[2] + text[at + change[1] :]
    data = (text + " " * spaces).encode()
    for size in (0, 8, 16, 24):
        together = safetensors_header._parse_usual(data, size)
        if together is not None:
            alone = safetensors_header._parse_any(data, size)
            assert list(alone.items()) == list(together.items())
            assert alone.metadata == together.metadata
            assert alone.forms == together.forms


@pytest.mark.parametrize("ordered", [True, False])
def test_usual_headers_are_looked_at_together(ordered: bool) -> None:
    arrays = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": [8 * at, 8 * at + 8]} for at, name in enumerate("abc")
    }
    if not ordered:
        arrays = dict(reversed(arrays.items()))
    for metadata in ({}, {"__metadata__": {"shira": json.dumps({"x": ["é", 1]})}}):
        text = json.dumps(metadata | arrays, separators=(",", ":"))
        assert safetensors_header._parse_usual(text.encode(), 24) is not None


@pytest.mark.parametrize("size", [0, 3, (1 << 18) - 20, 1 << 19])
def test_the_digest_is_that_of_the_file_that_was_opened(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(size, dtype=torch.float32)}, path)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    file = SafetensorsFile(path)
    assert expected == file.digest()
    if os.name != "nt":  # there an open file cannot be replaced
        (tmp_path / "b").write_bytes(b"another")
        (tmp_path / "b").replace(path)
        assert expected == file.digest()
    file.close()
