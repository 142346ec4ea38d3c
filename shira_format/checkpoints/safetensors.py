"""Safetensors checkpoints: one file, or shards with an index, or a folder with one of these."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shira_format.arrays import Array
from shira_format.checkpoints.base import Checkpoint
from shira_format.dtypes import DTYPES
from shira_format.errors import SourceError
from shira_format.safetensors_file import SafetensorsFile

_INDEX = ".safetensors.index.json"
_FILE = ".safetensors"
# Names that transformers and diffusers give to the weights of a folder.
_USUAL = ("model", "diffusion_pytorch_model")


class SafetensorsCheckpoint(Checkpoint):
    """The tensors of one or more safetensors files under one roof."""

    def __init__(self, path: Path, files: list[Path], weight_map: dict[str, str] | None = None) -> None:
        """Args: ``weight_map`` is that of an index, from tensor name to file name; it must tell the truth."""
        self.path = path
        self.files = files
        opened = {file.name: SafetensorsFile(file) for file in files}
        if weight_map is None:
            weight_map = {name: file for file, streams in opened.items() for name in streams}
        for name, file in weight_map.items():
            if name not in opened[file]:
                raise SourceError(f"{path}: the index puts {name!r} in {file}, which lacks it")
        self._where = {name: opened[file] for name, file in weight_map.items()}

    def __getitem__(self, name: str) -> Array:
        return self._where[name].read_apart(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name][name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return DTYPES[self._where[name][name].dtype]


def open_safetensors(path: Path) -> SafetensorsCheckpoint | None:
    """Open ``path`` if it is, or holds, a safetensors checkpoint."""
    if path.is_dir():
        found = _find(path)
        return None if found is None else open_safetensors(found)
    if path.name.endswith(_INDEX):
        weight_map = _weight_map(path)
        return SafetensorsCheckpoint(
            path, [path.parent / file for file in dict.fromkeys(weight_map.values())], weight_map
        )
    return SafetensorsCheckpoint(path, [path]) if path.name.endswith(_FILE) else None


def _find(folder: Path) -> Path | None:
    for stem in _USUAL:
        for ending in (_INDEX, _FILE):
            if (path := folder / f"{stem}{ending}").is_file():
                return path
    for ending in (_INDEX, _FILE):
        found = sorted(path for path in folder.iterdir() if path.name.endswith(ending))
        if len(found) > 1:
            raise SourceError(f"{folder}: several checkpoints ({found[0].name}, {found[1].name}, ...); name one")
        if found:
            return found[0]
    return None


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map: Any = json.loads(path.read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceError(f"{path}: not an index of shards: {error!r}") from None
    if not isinstance(weight_map, dict):
        raise SourceError(f"{path}: weight_map is not an object")
    for name, file in weight_map.items():
        # An index from a stranger must not lead outside its folder.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file:
            raise SourceError(f"{path}: weight_map puts {name!r} in {file!r}, which is not a file name")
        if not (path.parent / file).is_file():
            raise SourceError(f"{path}: the shard {file} is missing")
    return weight_map
