"""Checkpoints of ``torch.save``: one file, or shards with an index, or a folder with one of these. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, read_only
from shira_format.checkpoints.base import IndexedCheckpoint
from shira_format.checkpoints.index import (
    check_weight_map,
    find,
    listed_files,
    merged_weight_map,
    read_weight_map,
    shards_of,
)
from shira_format.checkpoints.pickles import PickleError
from shira_format.checkpoints.torch_file import TORCH_DTYPES, StoredTensor, TorchFile
from shira_format.errors import SourceError
from shira_format.storage.paths import open_storage
from shira_format.storage.weight_files import TRAINING
from shira_format.tensors import numel

_INDEX = ".bin.index.json"
_FILES = (".bin", ".pt", ".pth", ".ckpt")
# File names of transformers and diffusers.
# Entries of a trainer's state, beside the model's.
_OF_TRAINING = re.compile(
    r"optim|sched|scaler|rng|(^|_)(epoch|step|loops|args|config|hyper_parameters)", re.IGNORECASE
)
_OF_OPTIMIZER = re.compile(r"optim|sched|scaler|rng", re.IGNORECASE)
_DEEPEST = 50
_USUAL = ("pytorch_model", "diffusion_pytorch_model")


class TorchBinCheckpoint(IndexedCheckpoint["_File"]):
    """The tensors of one or more files of ``torch.save``."""

    def __init__(self, path: Path, files: list[Path], weight_map: dict[str, str] | None = None) -> None:
        """Args: ``weight_map``: that of an index, from tensor name to file name."""
        self.path = path
        self.files = files
        opened = {file.name: _File(file) for file in files}
        names = {file: found.tensors for file, found in opened.items()}
        if weight_map is None:
            weight_map = merged_weight_map(path, names)
        check_weight_map(path, weight_map, names)
        self._where = {name: opened[file] for name, file in weight_map.items()}
        self.notices = tuple(found.notice for found in opened.values() if found.notice)
        self.unused = tuple(key for found in opened.values() for key in found.unused)
        self.beside = tuple(key for found in opened.values() for key in found.beside)

    def __getitem__(self, name: str) -> Array:
        shape = self.shape(name)
        return read_only(self.part(name, 0, numel(shape)).reshape(shape))

    def part(self, name: str, start: int, stop: int, out: Array | None = None) -> Array:
        return self._where[name].part(name, start, stop, out)

    @property
    def shards(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {_safetensors_name(file.name): [] for file in self.files}
        for name, file in self._where.items():
            found[_safetensors_name(file.path.name)].append(name)
        return found

    @property
    def folder(self) -> Path:
        return self.path.parent

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].tensors[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return TORCH_DTYPES[self._where[name].tensors[name].dtype]


class _File:
    """One file, with its tensors checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notice = ""
        self.unused: list[str] = []
        self.beside: list[str] = []
        try:
            self._file = TorchFile(open_storage(path))
        except PickleError as error:
            raise SourceError(f"{path}: {error}") from None
        self.tensors = self._state_dict(self._file.root)
        for name, tensor in self.tensors.items():
            try:
                self._file.check(tensor)
            except PickleError as error:
                raise SourceError(f"{path}: tensor {name!r}: {error}") from None

    def part(self, name: str, start: int, stop: int, out: Array | None) -> Array:
        try:
            return self._file.read(self.tensors[name], start, stop, out)
        except PickleError as error:  # some headers are read only now
            raise SourceError(f"{self.path}: tensor {name!r}: {error}") from None

    def _state_dict(self, root: Any) -> dict[str, StoredTensor]:
        """The tensors by name: those of ``root``, or of the only dict of tensors in it."""
        if type(root) is not dict:
            raise SourceError(f"{self.path}: it contains a {_kind(root)}, not a dict of tensors")
        if _has_tensors(root):
            return self._tensors(root, "")
        inner = [key for key, value in root.items() if type(value) is dict and _has_tensors(value)]
        if not inner:
            raise SourceError(f"{self.path}: it holds no tensors")
        if len(inner) > 1:
            names = ", ".join(map(repr, inner))
            raise SourceError(f"{self.path}: several dicts of tensors ({names}); save only one of them")
        self.unused = [
            str(key) for key, value in root.items()
            if key != inner[0] and not _OF_TRAINING.search(str(key)) and _holds_tensors(value)
        ]  # fmt: skip
        self.beside = [
            found for key, value in root.items()
            if key != inner[0] and not _OF_OPTIMIZER.search(str(key))
            for found in _paths(key, value)
        ]  # fmt: skip
        others = ", ".join(sorted(f"{key!r}" for key in root if key != inner[0]))
        self.notice = f"{self.path.name}: the tensors under {inner[0]!r} are read" + (
            f"; left out: {others}" if others else ""
        )
        return self._tensors(root[inner[0]], f" under {inner[0]!r}")

    def _tensors(self, found: Mapping[Any, Any], where: str) -> dict[str, StoredTensor]:
        for key, value in found.items():
            if type(key) is not str:
                raise SourceError(f"{self.path}: the key {key!r}{where} is not a name")
            if type(value) is not StoredTensor:
                raise SourceError(f"{self.path}: {key!r}{where} is a {_kind(value)}, not a tensor")
        return dict(found)


def open_torch_bin(path: Path) -> TorchBinCheckpoint | None:
    """Open ``path`` if it is, or holds, a checkpoint of ``torch.save``."""
    if path.is_dir():
        # Single files in a distributed checkpoint are the trainer's.
        if (path / ".metadata").is_file():
            return None
        found = find(path, _USUAL, _INDEX, _FILES, TRAINING)
        return None if found is None else open_torch_bin(found)
    if path.name.endswith(_INDEX):
        weight_map = read_weight_map(path)
        return TorchBinCheckpoint(path, listed_files(path, weight_map), weight_map)
    if not path.name.endswith(_FILES):
        return None
    files = shards_of(path)
    return TorchBinCheckpoint(path, files) if isinstance(files, list) else open_torch_bin(files)


def _safetensors_name(file: str) -> str:
    """The file name of transformers and diffusers for the same weights as safetensors."""
    stem = file.rpartition(".")[0] or file
    if stem.startswith("pytorch_model"):
        stem = stem.removeprefix("pytorch_")
    return f"{stem}.safetensors"


def _has_tensors(found: Mapping[Any, Any]) -> bool:
    return any(type(value) is StoredTensor for value in found.values())


def _holds_tensors(value: Any, depth: int = 0, seen: set[int] | None = None) -> bool:
    """Whether there is a tensor anywhere in ``value``; what is nested deeper than anyone's checkpoint counts as one.

    Each part is looked at once, however often it occurs: ``seen`` holds the parts without a tensor, which live as long as the root.
    """
    seen = set() if seen is None else seen
    if id(value) in seen:
        return False
    if type(value) is StoredTensor or depth > _DEEPEST:
        return getattr(value, "shape", None) not in ((), (1,))  # a number, such as a best score, is no weight
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    if any(_holds_tensors(item, depth + 1, seen) for item in inner):
        return True
    seen.add(id(value))
    return False


def _paths(key: Any, value: Any, depth: int = 0, seen: set[int] | None = None) -> Iterator[str]:
    """The paths of keys of an entry and of those in it; a part that occurs several times is followed once."""
    yield str(key)
    seen = set() if seen is None else seen
    if isinstance(value, dict) and depth < _DEEPEST and id(value) not in seen:
        seen.add(id(value))
        for inner, item in value.items():
            yield from (f"{key}/{path}" for path in _paths(inner, item, depth + 1, seen))


def _kind(value: Any) -> str:
    return "tensor" if type(value) is StoredTensor else type(value).__name__
