"""Distributed checkpoints: what ``torch.distributed.checkpoint`` wrote, bit for bit, from the chunks that are needed."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from shira_format._core.arrays import as_array
from shira_format.checkpoints import open_checkpoint
from shira_format.errors import SourceError
from shira_format.tensors import same_bits
from tests import models

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

Box = tuple[tuple[int, ...], tuple[int, ...]]


def save(folder: Path, state: dict[str, Any]) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def check(path: Path, expected: dict[str, torch.Tensor]) -> None:
    """All tensors and some parts of each are the expected ones."""
    checkpoint = open_checkpoint(path)
    assert set(expected) == set(checkpoint)
    rng = random.Random(0)
    for name, tensor in expected.items():
        array = as_array(tensor.detach().contiguous())
        assert same_bits(array, checkpoint[name]), name
        assert not checkpoint[name].flags.writeable
        assert (array.shape, array.dtype) == (checkpoint.shape(name), checkpoint.dtype(name))
        flat = array.reshape(-1)
        for _ in range(8):
            start, stop = sorted(rng.choices(range(flat.size + 1), k=2))
            assert same_bits(flat[start:stop], checkpoint.part(name, start, stop)), (name, start, stop)
            out = flat.copy()
            out.fill(0)
            assert same_bits(flat[start:stop], checkpoint.part(name, start, stop, out))
            assert same_bits(flat[start:stop], out[: stop - start])


def refused(path: Path, *reasons: str) -> None:
    with pytest.raises(SourceError) as caught:
        checkpoint = open_checkpoint(path)
        for name in checkpoint:
            checkpoint[name]
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    for reason in reasons:
        assert reason in text


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    whole = torch.randn(6, 8)
    dtypes = [
        torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    ]  # fmt: skip
    return {
        "whole": whole,
        "turned": whole.t(),
        "cut": whole[1:4, 2:7],
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        **{f"of.{dtype}": torch.arange(6).reshape(2, 3).float().to(dtype) for dtype in dtypes},
    }


def test_one_process(tmp_path: Path) -> None:
    state = tensors()
    folder = save(tmp_path / "c", dict(state))
    check(folder, state)
    check(folder / ".metadata", state)
    checkpoint = open_checkpoint(folder)
    assert () == checkpoint.notices
    assert [folder / "__0_0.distcp"] == checkpoint.files
    assert checkpoint.shards is None
    assert folder == checkpoint.folder


def test_a_model_beside_its_optimizer(tmp_path: Path) -> None:
    model = models.llama()
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    state = model.state_dict()
    folder = save(tmp_path / "c", {"model": state, "optim": optimizer.state_dict(), "step": 3})
    check(folder, state)
    first, second, third = open_checkpoint(folder).notices
    assert first == "the tensors under 'model' are read"
    assert second.startswith("left out, not part of the model: optim.state.0.step, optim.state.0.exp_avg, ")
    assert third.startswith("left out, not tensors: ")
    assert third.endswith(" more")


@pytest.mark.parametrize(
    ("wrap", "names", "notices"),
    [
        (lambda w: {"model": {"w": w}}, ["w"], ("the tensors under 'model' are read",)),
        (lambda w: {"net": {"w": w}}, ["w"], ("the tensors under 'net' are read",)),
        (lambda w: {"app": {"model": {"a.w": w}, "optim": {"w": w}}}, ["a.w"],
         ("the tensors under 'app.model' are read", "left out, not part of the model: app.optim.w")),
        (lambda w: {"model.w": w}, ["model.w"], ()),
        (lambda w: {"model.w": w, "optimizer": {"w.exp": w}, "step": 3}, ["model.w"],
         ("left out, not part of the model: optimizer.w.exp", "left out, not tensors: step")),
        (lambda w: {"one": {"w": w}, "two": {"w": w}}, ["one.w", "two.w"], ()),
        (lambda w: {"w": w, "list": [w, w]}, ["w", "list.0", "list.1"], ()),
        (lambda w: {"optim": {"w": w}}, ["w"], ("the tensors under 'optim' are read",)),
    ],
)  # fmt: skip
def test_names(
    wrap: Callable[[torch.Tensor], dict[str, Any]], names: list[str], notices: tuple[str, ...], tmp_path: Path
) -> None:
    w = torch.arange(6.0).reshape(2, 3)
    folder = save(tmp_path / "c", wrap(w))
    check(folder, dict.fromkeys(names, w))
    assert notices == open_checkpoint(folder).notices


_RANK = """
import os
import sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from tests import models

store, folder, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
model = models.net().to(torch.bfloat16)
fully_shard(model.square, mesh=mesh)
fully_shard(model, mesh=mesh)
state = dict(model.state_dict())
whole = torch.arange(105.0).reshape(3, 5, 7)
for name, placement in [("rows", Shard(0)), ("columns", Shard(1)), ("last", Shard(2)), ("copies", Replicate())]:
    state[name] = distribute_tensor(whole, mesh, [placement])
state["few"] = distribute_tensor(whole[:1], mesh, [Shard(0)])  # nothing of it on the second rank
state["plain"] = whole
dcp.save({"model": state, "optim": {"state": {"rows": {"exp": state["rows"]}}}}, checkpoint_id=folder)
dist.barrier()
os._exit(0)  # all is written; gloo's threads sometimes abort a process that takes itself apart
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes(tmp_path: Path) -> None:
    """FSDP2 and DTensor over gloo: what one rank has and what the other has make the tensors."""
    folder = tmp_path / "c"
    command = [sys.executable, "-W", "ignore", "-c", _RANK, str(tmp_path / "store"), str(folder)]
    root = str(Path(__file__).parents[2])
    ranks = [
        subprocess.Popen([*command, str(rank)], cwd=root, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=300)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()
    whole = torch.arange(105.0).reshape(3, 5, 7)
    expected = dict(models.net().to(torch.bfloat16).state_dict())
    expected |= dict.fromkeys(("rows", "columns", "last", "copies", "plain"), whole) | {"few": whole[:1]}
    check(folder, expected)
    checkpoint = open_checkpoint(folder)
    assert [folder / "__0_0.distcp", folder / "__1_0.distcp"] == checkpoint.files
    assert (
        "the tensors under 'model' are read", "left out, not part of the model: optim.state.rows.exp",
    ) == checkpoint.notices  # fmt: skip


class Written:
    """A checkpoint made by hand from torch's own classes: any chunks, any lies."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.metadata = Metadata({}, storage_data={})

    def add(self, name: str, tensor: torch.Tensor, boxes: Iterable[Box], file: str = "__0_0.distcp") -> None:
        """``file`` may have a place for the number of the chunk."""
        chunks = []
        for number, (offsets, sizes) in enumerate(boxes):
            cut = tensor[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))].clone()
            path = self.folder / file.format(number)
            begin = path.stat().st_size if path.exists() else 0
            with open(path, "ab") as out:
                torch.save(cut, out)
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            place = _StorageInfo(path.name, begin, path.stat().st_size - begin)
            self.metadata.storage_data[MetadataIndex(name, offsets)] = place
        self.metadata.state_dict_metadata[name] = TensorStorageMetadata(
            TensorProperties(tensor.dtype), tensor.size(), chunks
        )

    def done(self, protocol: int | None = None) -> Path:
        (self.folder / ".metadata").write_bytes(pickle.dumps(self.metadata, protocol))
        return self.folder


def grid(*cuts: list[int]) -> list[Box]:
    """Boxes between the cuts of each dimension."""
    spans = [list(itertools.pairwise(positions)) for positions in cuts]
    return [
        (tuple(low for low, _ in box), tuple(high - low for low, high in box)) for box in itertools.product(*spans)
    ]


# Five boxes around a middle one: no cut goes across the whole.
PINWHEEL: list[Box] = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_chunks_of_any_layout(protocol: int, tmp_path: Path) -> None:
    whole = torch.arange(210).reshape(5, 6, 7)
    state = {
        "grid": whole,
        "shuffled": whole,
        "pinwheel": torch.arange(9.0).reshape(3, 3),
        "many": torch.arange(200),
    }
    made = Written(tmp_path / "c")
    boxes = grid([0, 2, 5], [0, 1, 4, 6], [0, 3, 7])
    made.add("grid", whole, boxes)
    made.add("shuffled", whole, random.Random(0).sample(boxes, len(boxes)), "__{}_0.distcp")
    made.add("pinwheel", state["pinwheel"], PINWHEEL)
    made.add("many", state["many"], grid(list(range(201))), "__{}_1.distcp")  # more files than stay open
    folder = made.done(protocol)
    check(folder, state)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(loaded, checkpoint_id=folder, no_dist=True)  # torch reads the same from what was made by hand
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        (grid([0, 2], [0, 4]), "its chunks do not cover shape [3, 4] exactly once"),
        ([*grid([0, 3], [0, 4]), ((0, 0), (1, 1))], "exactly once"),
        ([((0, 0), (2, 4)), ((1, 0), (1, 4))], "exactly once"),  # as many elements as there are, some twice
        ([((0, 0), (2, 3)), ((1, 2), (2, 2)), ((0, 3), (1, 1)), ((2, 0), (1, 1))], "exactly once"),
        ([], "exactly once"),
        ([((0, 0), (4, 4))], "the chunk at [0, 0] of shape [4, 4] is not within shape [3, 4]"),
        ([((1, 0), (3, 4))], "is not within shape [3, 4]"),
        ([((0,), (3,))], "a chunk of rank 1 of a tensor of shape [3, 4]"),
    ],
)
def test_chunks_that_are_no_tensor(boxes: list[Box], reason: str, tmp_path: Path) -> None:
    made = Written(tmp_path / "c")
    made.add("w", torch.zeros(3, 4), boxes)
    refused(made.done(), "tensor 'w': ", reason)


def written(folder: Path) -> Written:
    made = Written(folder)
    made.add("w", torch.arange(12.0).reshape(3, 4), grid([0, 2, 3], [0, 4]), "__{}_0.distcp")
    return made


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (_StorageInfo("../outside.distcp", 0, 10), "in '../outside.distcp', which is not the name of a file"),
        (_StorageInfo("/etc/passwd", 0, 10), "in '/etc/passwd', which is not the name of a file"),
        (_StorageInfo("..\\outside.distcp", 0, 10), "which is not the name of a file"),
        (_StorageInfo("sub/__0_0.distcp", 0, 10), "which is not the name of a file"),
        (_StorageInfo(3, 0, 10), "which is not the name of a file"),
        (_StorageInfo("\ud800", 0, 10), r"in '\ud800', which is not the name of a file"),
        (_StorageInfo("a\0b", 0, 10), r"in 'a\x00b', which is not the name of a file"),
        (_StorageInfo("__0_0.distcp", -1, 10), "the offset or length of a chunk is invalid"),
        (_StorageInfo("__0_0.distcp", 0, 2**40), "__0_0.distcp ends before its chunk at [0, 0]"),
        (_StorageInfo("__0_0.distcp", 0, 10), "__0_0.distcp, chunk at [0, 0]: "),
        (_StorageInfo("__0_0.distcp", 0, 0), "__0_0.distcp, chunk at [0, 0]: "),
        (_StorageInfo("gone.distcp", 0, 10), "the file gone.distcp is missing"),
        (_StorageInfo("__0_0.distcp", 0, 10, ["zstd"]), "compressed or otherwise transformed"),
        (3, "not a _StorageInfo with relative_path"),
    ],
)
def test_places_that_are_wrong(place: Any, reason: str, tmp_path: Path) -> None:
    made = written(tmp_path / "c")
    (tmp_path / "outside.distcp").write_bytes(bytes(10))
    made.metadata.storage_data[MetadataIndex("w", (0, 0))] = place
    refused(made.done(), reason)


def _replace(made: Written, found: Any) -> None:
    path = made.folder / "__0_0.distcp"
    torch.save(found, path)
    made.metadata.storage_data[MetadataIndex("w", (0, 0))] = _StorageInfo(path.name, 0, path.stat().st_size)


class Hostile:
    """Runs a program when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"{sys.executable} -c \"open(r'{self.target}', 'w')\"",)


def test_chunks_that_are_not_what_the_metadata_says(tmp_path: Path) -> None:
    made = written(tmp_path / "c")
    where = "tensor 'w': __0_0.distcp, chunk at [0, 0]: "
    for found, reason in [
        (torch.zeros(2, 5), "float32 of shape [2, 5], but float32 of [2, 4] in the metadata"),
        (torch.zeros(2, 4).bfloat16(), "bfloat16 of shape [2, 4], but float32 of [2, 4] in the metadata"),
        ({"w": torch.zeros(2, 4)}, "not a tensor"),
        (Hostile(tmp_path / "ran"), f"the pickle needs {os.system.__module__}.system, which is not allowed"),
    ]:
        _replace(made, found)
        refused(made.done(), where, reason)
    assert not (tmp_path / "ran").exists()


def test_only_the_chunks_of_a_part_are_read(tmp_path: Path) -> None:
    made = written(tmp_path / "c")
    path = made.folder / "__1_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    checkpoint = open_checkpoint(made.done())
    assert list(range(1, 8)) == checkpoint.part("w", 1, 8).tolist()
    with pytest.raises(SourceError, match="__1_0.distcp, chunk at"):
        checkpoint.part("w", 1, 9)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.storage_data.clear(), "storage_data does not say where the chunk at [0, 0] is"),
        (lambda m: m.storage_data.update({"w": 1}), "a key that is not a MetadataIndex"),
        (lambda m: m.state_dict_metadata.update(w=3), "items that are neither tensors nor bytes"),
        (lambda m: m.state_dict_metadata.update({3: BytesStorageMetadata()}), "items that are neither tensors nor bytes"),
        (lambda m: m.state_dict_metadata.clear(), "it has no tensors"),
        (lambda m: setattr(m, "storage_data", None), "storage_data of Metadata is not a dict"),
        (lambda m: setattr(m.state_dict_metadata["w"], "chunks", None), "its chunks are not a list"),
        (lambda m: setattr(m.state_dict_metadata["w"], "size", (3, -4)), "size of TensorStorageMetadata is not a size"),
        (lambda m: setattr(m.state_dict_metadata["w"], "size", (2**60, 4)), "more than 2^53 - 1 elements"),
        (lambda m: setattr(m.state_dict_metadata["w"], "size", 3), "size of TensorStorageMetadata is not a size"),
        (lambda m: setattr(m.state_dict_metadata["w"], "properties", 3), "its properties are not a TensorProperties"),
        (lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", torch.complex64), "dtype complex64 is not known"),
        (lambda m: setattr(m.state_dict_metadata["w"].properties, "layout", torch.sparse_coo), "only dense tensors are read"),
        (lambda m: setattr(m, "planner_data", {"w": ("a",), "v": ("a",)}), "'w' and 'v' are both named 'a' in the model"),
    ],
)  # fmt: skip
def test_metadata_that_is_wrong(change: Callable[[Metadata], None], reason: str, tmp_path: Path) -> None:
    made = written(tmp_path / "c")
    made.add("v", torch.zeros(2), grid([0, 2]))
    change(made.metadata)
    refused(made.done(), str(made.folder / ".metadata"), reason)


def test_a_hostile_pickle_does_not_run(tmp_path: Path) -> None:
    made = written(tmp_path / "c")
    made.metadata.planner_data = Hostile(tmp_path / "ran")
    refused(made.done(), f"the pickle needs {os.system.__module__}.system, which is not allowed")
    assert not (tmp_path / "ran").exists()
    dcp.FileSystemReader(made.folder).read_metadata()  # torch itself falls into the trap
    assert (tmp_path / "ran").exists()


def test_damaged_metadata(tmp_path: Path) -> None:
    """Any byte may be another, or the end: refused, or read; never another error."""
    path = written(tmp_path / "c").done() / ".metadata"
    data = path.read_bytes()
    rng, bad = random.Random(1), 0
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.randrange(8)
        for text in (bytes(damaged), data[:at]):
            path.write_bytes(text)
            try:
                checkpoint = open_checkpoint(path.parent)
                for name in checkpoint:
                    checkpoint[name]
            except SourceError as error:
                assert str(path.parent) in str(error)
                bad += 1
    assert bad > len(data)


_LIMITED = """
import resource, sys
import numpy
from shira_format.checkpoints import open_checkpoint
resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
checkpoint = open_checkpoint(sys.argv[1])
print(checkpoint.shape("w"), *(float(checkpoint.part("w", at, at + 2**20).sum()) for at in range(0, 2**30, 2**28)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold a process to RLIMIT_AS")
def test_a_chunk_larger_than_memory_is_read_by_parts(tmp_path: Path) -> None:
    made = Written(tmp_path / "c")
    made.add("w", torch.zeros(1, 1), grid([0, 1], [0, 1]))
    size, path = torch.Size((2**15, 2**15)), made.folder / "__0_0.distcp"
    with FakeTensorMode():
        large = torch.empty(size)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(large, path)  # with a hole in place of data
    with zipfile.ZipFile(path) as archive, open(path, "r+b") as file:
        entry = archive.getinfo(f"{path.stem}/data/0")
        file.seek(entry.header_offset + 26)
        begin = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        file.seek(begin + 4 * 2**28)
        file.write(np.float32(7).tobytes())
    made.metadata.state_dict_metadata["w"].size = size
    made.metadata.state_dict_metadata["w"].chunks[0].sizes = size
    made.metadata.storage_data[MetadataIndex("w", (0, 0))].length = path.stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, made.done()], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(32768, 32768) 0.0 7.0 0.0 0.0\n"
