"""Distributed checkpoints: folders that ``torch.distributed.checkpoint`` wrote on one or many ranks. Needs no torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, read_only
from shira_format.checkpoints.base import IndexedCheckpoint
from shira_format.checkpoints.dcp_metadata import NAME, Chunk, Metadata, Sharded
from shira_format.checkpoints.pickles import PickleError
from shira_format.checkpoints.strided import Box, boxes
from shira_format.checkpoints.torch_file import TORCH_DTYPES, StoredTensor, TorchFile
from shira_format.errors import SourceError
from shira_format.storage.paths import LocalFile, Storage, open_storage
from shira_format.tensors import numel

# Names that training programs give to the optimizer's and to the model's dict.
_OPTIMIZERS = ("optim", "optimizer", "optimizers", "optimizer_state", "optimizer_states", "optimizer_state_dict")
_MODELS = ("model", "module", "state_dict", "model_state_dict")


class DcpCheckpoint(IndexedCheckpoint[Sharded]):
    """The model's tensors of a distributed checkpoint, assembled from their chunks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        metadata = Metadata(path / NAME)
        keys, notices = _model(metadata)
        self.notices = tuple(notices)
        read = set(keys.values())
        self.unused = tuple(
            key for key in metadata.tensors if key not in read and not _is_of_training(key, metadata)
        )
        self._where = {name: metadata.tensor(key) for name, key in keys.items()}
        # A checkpoint of thousands of ranks has more files than a process may open, and too many chunks to cache all.
        self._storage = functools.lru_cache(64)(functools.partial(_open_file, path))
        self._chunk = functools.lru_cache(4096)(functools.partial(_open_chunk, self._storage))
        names = sorted({chunk.file for tensor in self._where.values() for chunk in tensor.chunks})
        self.files = [path / name for name in names]
        sizes = {name: self._storage(name).size for name in names}
        for name, tensor in self._where.items():
            for chunk in tensor.chunks:
                if chunk.begin + chunk.length > sizes[chunk.file]:
                    raise SourceError(f"{path}: tensor {name!r}: {chunk.file} ends before its chunk at {list(chunk.offsets)}")  # fmt: skip

    def __getitem__(self, name: str) -> Array:
        shape = self.shape(name)
        return read_only(self.part(name, 0, numel(shape)).reshape(shape))

    def part(self, name: str, start: int, stop: int, out: Array | None = None) -> Array:
        tensor = self._where[name]
        part = (np.empty(stop - start, tensor.dtype) if out is None else out)[: stop - start]
        at = 0
        try:
            for box in boxes(tensor.shape, start, stop):
                count = numel(box[1])
                target = part[at : at + count].reshape(box[1])
                at += count
                for chunk in tensor.chunks:
                    self._fill(target, box, chunk, tensor.dtype)
        except PickleError as error:
            raise SourceError(f"{self.path}: tensor {name!r}: {error}") from None
        return part

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._where[name].dtype

    @property
    def folder(self) -> Path:
        return self.path

    def _fill(self, target: Array, box: Box, chunk: Chunk, dtype: np.dtype[Any]) -> None:
        """Fill the part of ``target``, which is ``box`` of the tensor, that ``chunk`` holds."""
        cuts, local, begin = [], [], 0
        for at, size, chunk_at, chunk_size in zip(*box, chunk.offsets, chunk.sizes, strict=True):
            low, high = max(at, chunk_at), min(at + size, chunk_at + chunk_size)
            if low >= high:
                return
            cuts.append(slice(low - at, high - at))
            local.append(high - low)
            begin = begin * chunk_size + low - chunk_at
        # The box is whole in all dimensions after the first whose size is not 1, so its part of a chunk is contiguous.
        file, stored = self._chunk(chunk, dtype)
        index: Any = (*cuts, ...)  # with the ellipsis, a scalar is a view as well
        place = target[index]
        count = numel(tuple(local))
        if place.flags.c_contiguous:
            file.read(stored, begin, begin + count, place.reshape(-1))
        else:
            place[...] = file.read(stored, begin, begin + count).reshape(place.shape)


def open_dcp(path: Path) -> DcpCheckpoint | None:
    """Open ``path`` if it is a folder of a distributed checkpoint, or the ``.metadata`` of one."""
    if path.name == NAME and path.is_file():
        path = path.parent
    return DcpCheckpoint(path) if path.is_dir() and (path / NAME).is_file() else None


def _model(metadata: Metadata) -> tuple[dict[str, str], list[str]]:
    """The keys of the model's tensors by their names in the model, and notices about the choice."""
    kept: dict[str, tuple[str | int, ...]] = {key: metadata.paths.get(key, (key,)) for key in metadata.tensors}
    if not kept:
        raise SourceError(f"{metadata.path}: it has no tensors")
    stripped: list[str] = []
    while True:
        flat = any(len(path) == 1 for path in kept.values())
        groups = {str(path[0]) for path in kept.values() if len(path) > 1}
        if flat or groups - set(_OPTIMIZERS):
            groups -= set(_OPTIMIZERS)
        models = groups if len(groups) == 1 else groups & set(_MODELS)
        if not flat and len(models) == 1:
            groups = models
        kept = {key: path for key, path in kept.items() if len(path) == 1 or str(path[0]) in groups}
        if flat or len(models) != 1:
            break
        stripped += models
        kept = {key: path[1:] for key, path in kept.items()}
    names: dict[str, str] = {}
    for key, steps in kept.items():
        name = ".".join(map(str, steps))
        if name in names:
            raise SourceError(f"{metadata.path}: {names[name]!r} and {key!r} are both named {name!r} in the model")
        names[name] = key
    notices = [f"the tensors under {'.'.join(stripped)!r} are read"] if stripped else []
    if others := [key for key in metadata.tensors if key not in kept]:
        notices.append(f"left out, not part of the model: {_some(others)}")
    if metadata.others:
        notices.append(f"left out, not tensors: {_some(metadata.others)}")
    return names, notices


def _is_of_training(key: str, metadata: Metadata) -> bool:
    return bool(set(map(str, metadata.paths.get(key, (key,)))) & set(_OPTIMIZERS))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _open_file(folder: Path, name: str) -> Storage:
    try:
        return open_storage(folder / name)
    except FileNotFoundError:
        raise SourceError(f"{folder}: the file {name} is missing") from None


def _open_chunk(
    storage: Callable[[str], Storage], chunk: Chunk, dtype: np.dtype[Any]
) -> tuple[TorchFile, StoredTensor]:
    """The part of a file that ``torch.save`` wrote for a chunk, and the tensor in it."""
    where = f"{chunk.file}, chunk at {list(chunk.offsets)}"
    try:
        file = TorchFile(_Window(functools.partial(storage, chunk.file), chunk.begin, chunk.length))
        if type(file.root) is not StoredTensor:
            raise PickleError("not a tensor")
        file.check(file.root)
    except PickleError as error:
        raise PickleError(f"{where}: {error}") from None
    if (found := (TORCH_DTYPES[file.root.dtype], file.root.shape)) != (dtype, chunk.sizes):
        raise PickleError(f"{where}: {found[0]} of shape {list(found[1])}, but {dtype} of {list(chunk.sizes)} in the metadata")  # fmt: skip
    return file, file.root


class _Window:
    """A part of a file as a storage of its own; the file is reopened if it was closed in between."""

    tile = LocalFile.tile

    def __init__(self, opener: Callable[[], Storage], begin: int, size: int) -> None:
        self._opener = opener
        self._begin = begin
        self.size = size

    @property
    def version(self) -> object:
        return self._opener().version

    def read_into(self, start: int, out: memoryview) -> None:
        self._opener().read_into(self._begin + start, out)

    def close(self) -> None:
        """The file is closed by its owner."""
