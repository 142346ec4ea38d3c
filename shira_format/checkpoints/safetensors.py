"""Safetensors checkpoints: one file, or shards with an index, or a folder with one of these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.dtypes import DTYPES
from shira_format.checkpoints.base import IndexedCheckpoint
from shira_format.checkpoints.index import (
    check_weight_map,
    find,
    listed_files,
    merged_weight_map,
    read_weight_map,
    shards_of,
)
from shira_format.storage.safetensors_file import SafetensorsFile
from shira_format.storage.weight_files import is_index

_INDEX = ".safetensors.index.json"
_FILE = ".safetensors"
# File names of transformers and diffusers.
_USUAL = ("model", "diffusion_pytorch_model")


class SafetensorsCheckpoint(IndexedCheckpoint[SafetensorsFile]):
    """The tensors of one or more safetensors files."""

    def __init__(self, path: Path, files: list[Path], weight_map: dict[str, str] | None = None) -> None:
        """Args: ``weight_map``: that of an index, from tensor name to file name."""
        self.path = path
        self.files = files
        opened = {file.name: SafetensorsFile(file) for file in files}
        self._opened = opened
        if weight_map is None:
            weight_map = merged_weight_map(path, opened)
        check_weight_map(path, weight_map, opened)
        self._where = {name: opened[file] for name, file in weight_map.items()}

    def __getitem__(self, name: str) -> Array:
        return self._where[name].read(name)

    def part(self, name: str, start: int, stop: int, out: Array | None = None) -> Array:
        return self._where[name].read_part(name, start, stop, out)

    def _tile(self, name: str) -> int:
        return self._where[name].tile

    @property
    def shards(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {file.name: [] for file in self.files}
        for name, file in self._where.items():
            found[file.path.name].append(name)
        return found

    @property
    def folder(self) -> Path:
        return self.path.parent

    def metadata(self, shard: str) -> dict[str, str]:
        return self._opened[shard].metadata

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name][name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return DTYPES[self._where[name][name].dtype]


def open_safetensors(path: Path) -> SafetensorsCheckpoint | None:
    """Open ``path`` if it is, or holds, a safetensors checkpoint."""
    if path.is_dir():
        found = find(path, _USUAL, _INDEX, (_FILE,))
        return None if found is None else open_safetensors(found)
    if path.suffix == ".json" and is_index(path.name, _FILE):
        weight_map = read_weight_map(path)
        return SafetensorsCheckpoint(path, listed_files(path, weight_map), weight_map)
    if not path.name.endswith(_FILE):
        return None
    files = shards_of(path)
    return SafetensorsCheckpoint(path, files) if isinstance(files, list) else open_safetensors(files)
