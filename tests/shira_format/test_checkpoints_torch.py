"""Checkpoints of ``torch.save``: what torch wrote and loads, bit for bit, by ranges, and nothing that runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shira_format._core.arrays import as_array
from shira_format._core.dtypes import DTYPES
from shira_format.checkpoints import open_checkpoint
from shira_format.checkpoints.pickles import PickleError, load, ordered_dict
from shira_format.checkpoints.strided import boxes
from shira_format.errors import SourceError
from shira_format.tensors import numel, same_bits
from tests import models

TORCH_DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
]  # fmt: skip
FORMATS = pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])


def save(path: Path, found: Any, *, modern: bool = True) -> Path:
    torch.save(found, path, _use_new_zipfile_serialization=modern)
    return path


def check(path: Path, expected: dict[str, torch.Tensor]) -> None:
    """All tensors and some parts of each are what torch has."""
    checkpoint = open_checkpoint(path)
    assert list(expected) == list(checkpoint)
    rng = random.Random(0)
    for name, tensor in expected.items():
        array = as_array(tensor.detach().contiguous())
        found = checkpoint[name]
        assert same_bits(array, found), name
        assert not found.flags.writeable
        assert (array.shape, array.dtype) == (checkpoint.shape(name), checkpoint.dtype(name))
        flat = array.reshape(-1)
        for _ in range(8):
            start, stop = sorted(rng.choices(range(flat.size + 1), k=2))
            assert same_bits(flat[start:stop], checkpoint.part(name, start, stop)), (name, start, stop)
            out = np.zeros(flat.size, flat.dtype)
            part = checkpoint.part(name, start, stop, out)
            assert same_bits(flat[start:stop], part)
            assert same_bits(flat[start:stop], out[: stop - start])


def refused(path: Path, *reasons: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    for reason in reasons:
        assert reason in text


@FORMATS
@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_every_dtype_comes_bit_for_bit(dtype: torch.dtype, modern: bool, tmp_path: Path) -> None:
    tensor = (
        torch.arange(-6, 6).reshape(3, 4).to(torch.float32 if dtype.is_floating_point else torch.int64).to(dtype)
    )
    state = {"w": tensor, "turned": tensor.t(), "scalar": tensor[1, 2].clone(), "empty": tensor[:0].clone()}
    check(save(tmp_path / "w.bin", state, modern=modern), state)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_is_tested(dtype: np.dtype[Any]) -> None:
    assert dtype in {as_array(torch.zeros(1, dtype=d)).dtype for d in TORCH_DTYPES}


@FORMATS
def test_views_come_out_in_order(modern: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = torch.randn(40, 60)
    wide = torch.randn(700, 3000)
    tagged = nn.Parameter(torch.randn(3))
    tagged.tag = "a Parameter with attributes is pickled otherwise"
    state = {
        "whole": whole,
        "turned": whole.t(),
        "cut": whole[3:20, 5:50:7],
        "row": whole[7],
        "column": whole[:, 7],
        "turned.cube": torch.randn(3, 4, 5).permute(2, 0, 1),
        "expanded": torch.randn(1, 3).expand(4, 3),
        "one": whole[3:4, 4:5],
        "channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "wide": wide.t(),  # its strides are too wide for one read
        "wide.column": wide[:, 5],
        "parameter": nn.Parameter(whole),
        "tagged": tagged,
        "buffer": nn.Buffer(torch.randn(2)),
        "empty": torch.zeros(3, 0, 2),
    }
    check(save(tmp_path / "m.pt", state, modern=modern), state)


@given(st.data())
def test_boxes_divide_a_range(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=4)))
    start = data.draw(st.integers(0, numel(shape)))
    stop = data.draw(st.integers(start, numel(shape)))
    flat = np.arange(numel(shape))
    found: list[int] = []
    for offsets, sizes in boxes(shape, start, stop):
        cut = flat.reshape(shape)[(*(slice(n, n + s) for n, s in zip(offsets, sizes, strict=True)), ...)]
        assert sizes == cut.shape
        found += cut.reshape(-1).tolist()
    assert list(range(start, stop)) == found


@FORMATS
def test_the_state_of_a_real_model_with_ties(modern: bool, tmp_path: Path) -> None:
    model = models.gpt2()
    state = model.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    path = save(tmp_path / "pytorch_model.bin", state, modern=modern)
    check(tmp_path, state)
    checkpoint = open_checkpoint(tmp_path)
    assert path == checkpoint.path
    assert [path] == checkpoint.files
    assert () == checkpoint.notices
    assert {"model.safetensors": list(state)} == checkpoint.shards
    assert {"format": "pt"} == checkpoint.metadata("model.safetensors")
    assert tmp_path == checkpoint.folder


def test_no_torch_is_needed(tmp_path: Path) -> None:
    """Reading imports neither torch nor what it may run; the tensors are the same."""
    state = models.net().state_dict()
    path = save(tmp_path / "pytorch_model.bin", state)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from shira_format.checkpoints import open_checkpoint\n"
        "print(float(open_checkpoint(sys.argv[1])['square.weight'].sum(dtype='f8')))"
    )
    done = subprocess.run([sys.executable, "-c", program, path], check=True, capture_output=True, text=True)
    assert float(done.stdout) == as_array(state["square.weight"]).sum(dtype="f8")


def shards(folder: Path, stem: str = "pytorch_model") -> tuple[Path, dict[str, torch.Tensor]]:
    """Two shards with an index, as transformers used to write them."""
    state = models.net().state_dict()
    names = list(state)
    weight_map = {}
    for number, part in enumerate((names[:2], names[2:]), 1):
        file = f"{stem}-{number:05}-of-00002.bin"
        save(folder / file, OrderedDict((name, state[name]) for name in part))
        weight_map.update(dict.fromkeys(part, file))
    index = folder / f"{stem}.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index, state


def test_shards_with_an_index(tmp_path: Path) -> None:
    index, state = shards(tmp_path)
    for path in (tmp_path, index):
        check(path, state)
        checkpoint = open_checkpoint(path)
        assert index == checkpoint.path
        names = list(state)
        assert {
            "model-00001-of-00002.safetensors": names[:2],
            "model-00002-of-00002.safetensors": names[2:],
        } == checkpoint.shards
        assert 2 == len(checkpoint.files)


def test_missing_shards_and_false_indexes(tmp_path: Path) -> None:
    index, state = shards(tmp_path)
    text = index.read_text()
    (tmp_path / "outside.bin").write_bytes(b"")
    for old, new, reason in [
        ("pytorch_model-00002-of-00002.bin", "gone.bin", "the shard gone.bin is missing"),
        ("pytorch_model-00002-of-00002.bin", "../outside.bin", "which is not a file name"),
        ('"wide.weight"', '"narrow.weight"', "the index lists 'narrow.weight' in"),
    ]:
        index.write_text(text.replace(old, new))
        refused(index, reason)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model.fp16.bin", "model.fp16.safetensors"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("my.model.pt", "my.model.safetensors"),
        ("consolidated.00.pth", "consolidated.00.safetensors"),
        ("epoch=3.ckpt", "epoch=3.safetensors"),
    ],
)
def test_names_of_a_safetensors_copy(file: str, name: str, tmp_path: Path) -> None:
    save(tmp_path / file, {"a": torch.zeros(2)})
    save(tmp_path / "training_args.bin", {"lr": 1})
    save(tmp_path / "optimizer.pt", {"state": {}})
    for path in (tmp_path, tmp_path / file):
        checkpoint = open_checkpoint(path)
        assert tmp_path / file == checkpoint.path
        assert {name: ["a"]} == checkpoint.shards


def test_safetensors_and_usual_names_come_first(tmp_path: Path) -> None:
    save(tmp_path / "other.pt", {"other": torch.zeros(2)})
    save(tmp_path / "more.ckpt", {"more": torch.zeros(2)})
    refused(tmp_path, "several checkpoints (more.ckpt, other.pt, ...); name one")
    save(tmp_path / "pytorch_model.bin", {"usual": torch.zeros(2)})
    assert ["usual"] == list(open_checkpoint(tmp_path))
    save_file({"safe": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert ["safe"] == list(open_checkpoint(tmp_path))


@pytest.mark.parametrize("key", ["state_dict", "model", "params_ema"])
def test_one_dict_around_the_tensors(key: str, tmp_path: Path) -> None:
    model = models.net()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 24)).sum().backward()
    optimizer.step()
    state = model.state_dict()
    path = save(tmp_path / "last.ckpt", {"epoch": 3, key: state, "optimizer": optimizer.state_dict()})
    check(path, state)
    assert (f"last.ckpt: the tensors under {key!r} are read; left out: 'epoch', 'optimizer'",) == open_checkpoint(
        path
    ).notices
    path = save(tmp_path / "bare.ckpt", {key: state})
    assert (f"bare.ckpt: the tensors under {key!r} are read",) == open_checkpoint(path).notices


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ([torch.zeros(1)], "it contains a list, not a dict of tensors"),
        (torch.zeros(1), "it contains a tensor, not a dict of tensors"),
        ({}, "it holds no tensors"),
        ({"lr": 0.1}, "it holds no tensors"),
        ({"a": torch.zeros(1), "step": 3}, "'step' is a int, not a tensor"),
        ({"a": torch.zeros(1), "more": {"b": torch.zeros(1)}}, "'more' is a dict, not a tensor"),
        ({"model": {"a": torch.zeros(1), "b": None}}, "'b' under 'model' is a NoneType, not a tensor"),
        ({"model": {"a": torch.zeros(1)}, "ema": {"a": torch.zeros(1)}}, "several dicts of tensors ('model', 'ema')"),
        ({0: torch.zeros(1)}, "the key 0 is not a name"),
        ({"c": torch.zeros(1, dtype=torch.complex64)}, "tensor 'c': dtype complex64 is not known"),
        ({"m": torch.zeros(1, device="meta")}, "torch._utils._rebuild_meta_tensor_no_storage, which is not allowed"),
        ({"s": torch.zeros(2).to_sparse()}, "torch._utils._rebuild_sparse_tensor, which is not allowed"),
        ({"n": torch._neg_view(torch.zeros(2))}, "tensor 'n': it is a lazy view (neg)"),
    ],
)  # fmt: skip
def test_what_is_no_dict_of_tensors(found: Any, reason: str, tmp_path: Path) -> None:
    refused(save(tmp_path / "m.pt", found), reason)


class Hostile:
    """Runs a program when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"{sys.executable} -c \"open(r'{self.target}', 'w')\"",)


@FORMATS
def test_nothing_in_a_file_runs(modern: bool, tmp_path: Path) -> None:
    target = tmp_path / "ran"
    path = save(tmp_path / "m.bin", {"a": torch.zeros(1), "b": Hostile(target)}, modern=modern)
    refused(path, f"the pickle needs {os.system.__module__}.system, which is not allowed")
    path.write_bytes(pickle.dumps(Hostile(target)))
    refused(path, "not written by torch.save", "which is not allowed")
    assert not target.exists()
    torch.load(save(path, Hostile(target)), weights_only=False)  # the trap is a real one
    assert target.exists()


def test_modules_and_programs_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "m.pt", nn.Linear(2, 2))
    refused(tmp_path / "m.pt", "torch.nn.modules.linear.Linear, which is not allowed")
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:  # as torch.jit.save names its records
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"m/{name}", b"")
    refused(tmp_path / "m.pt", "a TorchScript archive")


@FORMATS
def test_truncated_files(modern: bool, tmp_path: Path) -> None:
    path = save(tmp_path / "m.bin", models.net().state_dict(), modern=modern)
    data = path.read_bytes()
    for size in (*range(0, len(data), 97), len(data) - 1):
        path.write_bytes(data[:size])
        refused(path)


def test_damaged_files(tmp_path: Path) -> None:
    """Any byte may be another: the file is refused, or read; never another error, never a crash."""
    path = save(tmp_path / "m.bin", {"a": torch.zeros(3), "b": torch.zeros(2, 2).t()})
    data = path.read_bytes()
    rng, bad = random.Random(1), 0
    for at in range(0, len(data), 2):
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(path)
            for name in checkpoint:
                checkpoint[name]
        except SourceError as error:
            assert str(path) in str(error)
            bad += 1
    assert bad > len(data) // 40


def rewritten(path: Path, **changes: Any) -> None:
    """Write the archive at ``path`` again by another program, with some records changed."""
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    method = changes.pop("method", zipfile.ZIP_STORED)
    folder = next(iter(records)).partition("/")[0]
    for name, data in changes.items():
        records[f"{folder}/{name}"] = data
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in records.items():
            if data is not None:
                archive.writestr(name, data)


def test_archives_by_other_programs(tmp_path: Path) -> None:
    """The directory of the archive says where storages are, not the order in which torch happens to write them."""
    state = {"a": torch.arange(5.0), "b": torch.arange(12).reshape(3, 4), "c": torch.ones(2)}
    path = tmp_path / "m.bin"
    rewritten(save(path, state))
    check(path, state)
    same = torch.load(path, weights_only=True)
    assert all(torch.equal(state[name], same[name]) for name in state)
    rewritten(path, method=zipfile.ZIP_DEFLATED)
    refused(path, "is compressed or encrypted")
    for record, data, reason in [
        ("byteorder", b"big", "its tensors are big-endian"),
        ("data.pkl", None, "a zip archive without data.pkl"),
        ("data/1", None, "tensor 'b': its storage 1 is missing"),
        ("data/1", b"short", "tensor 'b': its storage 1 is compressed, or shorter than 96 bytes"),
    ]:
        rewritten(save(path, state), **{record: data})
        refused(path, reason)


def tampered(
    path: Path, shape: tuple[Any, ...], strides: tuple[Any, ...], offset: Any = 0, count: Any = 4
) -> None:
    """A file whose tensor of four floats says that it has another shape."""

    class Lie:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (torch.zeros(4).storage(), offset, shape, strides, False, {})

    save(path, {"a": torch.zeros(4), "lie": Lie()})


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "reason"),
    [
        ((5,), (1,), 0, "shape [5] does not fit into its storage of 16 bytes"),
        ((2, 2), (3, 1), 0, "does not fit"),
        ((1,), (1,), 4, "does not fit"),
        ((2**40,), (0,), 0, "has more bytes than the file"),
        ((2**40, 2**40), (0, 0), 0, "more than 2^53 - 1 elements"),
        ((0, 2**60), (1, 1), 0, "more than 2^53 - 1 elements"),
        ((-1,), (1,), 0, "its shape, strides or offset are invalid"),
        ((2,), (-1,), 1, "its shape, strides or offset are invalid"),
        ((2,), (1,), -1, "its shape, strides or offset are invalid"),
        ((2,), (1, 1), 0, "its shape, strides or offset are invalid"),
        ((2.0,), (1,), 0, "its shape, strides or offset are invalid"),
        ((True,), (1,), 0, "its shape, strides or offset are invalid"),
        ((1,) * 65, (1,) * 65, 0, "its shape, strides or offset are invalid"),
    ],
)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensors_outside_of_their_storage(
    shape: tuple[Any, ...], strides: tuple[Any, ...], offset: Any, reason: str, tmp_path: Path
) -> None:
    tampered(tmp_path / "m.bin", shape, strides, offset)
    refused(tmp_path / "m.bin", "tensor 'lie': ", reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"\x80\x02", "a damaged pickle"),
        (b"N", "a damaged pickle"),
        (b".", "a damaged pickle"),
        (b"NN.", "a damaged pickle"),
        (b"R.", "a damaged pickle"),
        (b"Na.", "a damaged pickle"),
        (b"(Nt", "a damaged pickle"),
        (b"N\x87.", "too few values for a tuple"),
        (b"h\x05.", "a damaged pickle"),
        (b"NNa.", "appends to something other than a list"),
        (b"NNNs.", "sets items of something other than a dict"),
        (b"}(Nu.", "a damaged pickle"),
        (b"K\x01)R.", "calls something that is not a function"),
        (b"ccollections\nOrderedDict\nNR.", "calls something that is not a function"),
        (b"K\x01}b.", "sets the state of a plain value"),
        (b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.", "sets the state of a plain value"),
        (b"ccollections\nOrderedDict\nK\x01\x85R.", "a damaged pickle"),
        (b"NQ.", "persistent ids, which are not expected here"),
        (b"cbuiltins\neval\n.", "needs builtins.eval, which is not allowed"),
        (b"\x8c\x02os\x8c\x06system\x93.", "needs os.system, which is not allowed"),
        (b"NN\x93.", "imports something without a name"),
        (b"(S'a'\ni__main__\nA\n.", "the opcode STRING, which is not supported"),
        (b"\x82\x01.", "the opcode EXT1, which is not supported"),
        (b"B\xff\xff\xff\x7fshort.", "a damaged pickle"),
        (b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "a damaged pickle"),
        (b"}" + b")" + b"\x85" * 200_000 + b"Ns.", "a key of a dict is a tuple"),
    ],
)
def test_bad_pickles(text: bytes, reason: str) -> None:
    with pytest.raises(PickleError, match=reason):
        load(io.BytesIO(text), {("collections", "OrderedDict"): ordered_dict})


def test_a_pickle_that_wants_memory_gets_none() -> None:
    """``pickle.Unpickler`` would take 64 GiB for this memo; here it is a number like any other."""
    assert load(io.BytesIO(b"Nr" + struct.pack("<I", 2**32 - 1) + b"."), {}) is None


# A value with itself, twice, sixty times over: as a text it would have 2^60 parts.
_TUPLES = b")" + b"q\x07h\x07\x86" * 60
_LISTS = b"](]q\x07" + b"".join(b"]q%c(%be" % (n + 1, b"h%c" % n * 40) for n in range(7, 40)) + b"e"
_DICTS = b"}(K\xff}q\x07" + b"".join(
    b"K%c}q%c(%bu" % (n, n + 1, b"".join(b"K%ch%c" % (k, n) for k in range(40))) for n in range(7, 20)
) + b"u"  # fmt: skip


def zipped(path: Path, entry: bytes, more: bytes = b"") -> Path:
    """A checkpoint of a tensor "w" whose pickle ends in ``entry``, and of ``more`` beside a dict with it."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v"
        + entry[:1]
        + b"\n("
        + storage
        + b"K\x00K\x02\x85K\x01\x85\x89}"
        + entry[1:]
        + b"tR"
    )
    state = b"}X\x01\x00\x00\x00w" + tensor + b"s"
    root = state if not more else b"}(X\x01\x00\x00\x00m" + state + b"X\x01\x00\x00\x00o" + more + b"u"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02" + root + b".")
        archive.writestr("m/data/0", bytes(8))
    return path


def test_values_that_hold_themselves_many_times(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    good = open_checkpoint(zipped(path, b"3ctorch\nfloat32\n"))
    assert [0, 0] == good["w"].tolist()
    started = time.process_time()
    refused(zipped(path, b"3" + _TUPLES), "a tensor's dtype is not one")
    refused(zipped(path, b"2}X\x04\x00\x00\x00conj" + _TUPLES + b"s"), "a tensor's flags are not true or false")
    refused(zipped(path, b"2" + _TUPLES), "a tensor's flags are not true or false")
    for more in (_LISTS, _DICTS):
        assert [0, 0] == open_checkpoint(zipped(path, b"2", more))["w"].tolist()
    assert time.process_time() - started < 5


_LIMITED = """
import resource, sys
import numpy
from shira_format.checkpoints import open_checkpoint
resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
checkpoint = open_checkpoint(sys.argv[1])
for name in checkpoint:
    size = checkpoint.shape(name)[0] * checkpoint.shape(name)[1]
    parts = [checkpoint.part(name, start, start + 2**16) for start in range(0, size, size // 4)]
    print(name, size, *(float(part.sum(dtype="f8")) for part in parts))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold a process to RLIMIT_AS")
def test_a_file_larger_than_memory_is_read_by_parts(tmp_path: Path) -> None:
    """Address space for half of a tensor: neither reading nor mapping one would pass."""
    path = tmp_path / "big.bin"
    with FakeTensorMode():
        state = {"plain": torch.empty(2**15, 2**15), "turned": torch.empty(2**15, 2**15).t()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state, path)  # with holes in place of data
    with zipfile.ZipFile(path) as archive, open(path, "r+b") as file:
        for record, at in (("data/0", 2**28), ("data/1", 2**13)):
            entry = archive.getinfo(f"big/{record}")
            file.seek(entry.header_offset + 26)
            header = 30 + sum(struct.unpack("<HH", file.read(4)))
            file.seek(entry.header_offset + header + 4 * at)
            file.write(np.float32(7).tobytes())
    done = subprocess.run([sys.executable, "-c", _LIMITED, path], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"plain {2**30} 0.0 7.0 0.0 0.0\nturned {2**30} 0.0 7.0 0.0 0.0\n" == done.stdout
