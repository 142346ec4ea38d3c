"""All tensors of a version in one safetensors file: snapshots, and copies that are written in place."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core import system
from shira_format._core.arrays import Array
from shira_format._core.dtypes import DTYPES
from shira_format.checkpoints import Checkpoint
from shira_format.checkpoints.safetensors import SafetensorsCheckpoint
from shira_format.convert.exact import read_parts
from shira_format.errors import SourceError
from shira_format.storage.atomic import atomic_file
from shira_format.storage.output_folder import weights_file
from shira_format.storage.safetensors_file import SafetensorsFile
from shira_format.storage.safetensors_header import header_of
from shira_format.sync.structure import Structure
from shira_format.tensors import numel

_METADATA = {"format": "pt"}


def write_whole(path: Path, checkpoint: Checkpoint, structure: Structure) -> None:
    """Write all tensors, part by part; the file appears whole."""
    layout = [(name, dtype, shape) for name, (dtype, shape) in structure.tensors.items()]
    with weights_file(path, layout, _METADATA) as put:
        for name in structure.tensors:
            put(name, read_parts(checkpoint, name))


def open_whole(path: Path, structure: Structure, what: str) -> Checkpoint:
    """Open such a file; BaseMismatch unless it has these tensors, FormatError if it is damaged."""
    found = SafetensorsCheckpoint(path, [path])
    structure.check(what, found)
    return found


def mapped(path: Path, structure: Structure) -> dict[str, Array]:
    """The tensors in a file, which is made if there is none, to be changed in place: the system decides what is in memory.

    Nobody else may cut the file meanwhile: that ends the process.

    Raises:
        OSError: the file cannot be made, or the disk has no room for it.
        SourceError: the file has other tensors.
    """
    if not path.exists():
        layout = [(name, dtype, shape) for name, (dtype, shape) in structure.tensors.items()]
        header, _ = header_of(sorted(layout, key=lambda tensor: -tensor[1].itemsize), _METADATA)
        size = sum(dtype.itemsize * numel(shape) for _, dtype, shape in layout)
        with atomic_file(path) as file:
            file.write(header)
            file.flush()
            system.allocate(file.fileno(), len(header) + size)
    streams = SafetensorsFile(path)
    found = {name: (DTYPES[stream.dtype], stream.shape) for name, stream in streams.items()}
    if found != dict(structure.tensors):
        raise SourceError(f"{path}: exists, and has other tensors")
    start = streams.size - max((stream.end for stream in streams.values()), default=0)
    streams.close()
    with open(path, "r+b") as file:
        buffer = mmap.mmap(file.fileno(), 0)
    return {name: _view(buffer, start + stream.begin, *found[name]) for name, stream in streams.items()}


def _view(buffer: Any, start: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    return np.frombuffer(buffer, dtype, numel(shape), start).reshape(shape)


def fill(arrays: dict[str, Array], checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Set arrays to the tensors of a checkpoint."""
    for name in names:
        flat, at = arrays[name].reshape(-1), 0
        for part in read_parts(checkpoint, name):
            flat[at : at + part.size] = part
            at += part.size
