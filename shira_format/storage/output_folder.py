"""Writing an export: a folder that appears whole, and the files in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, as_bytes
from shira_format.errors import SourceError
from shira_format.storage.atomic import atomic_file, atomic_folder
from shira_format.storage.safetensors_header import header_of

# A tensor of a file to be written: name, dtype, shape.
TensorLayout = tuple[str, np.dtype[Any], tuple[int, ...]]


@contextmanager
def output_folder(path: Path | None) -> Iterator[Path | None]:
    """A new folder that takes the place of ``path`` if the block ends without an exception; None for a dry run."""
    if path is None:
        yield None
        return
    with atomic_folder(path) as folder:
        yield folder


def new_file(folder: Path, name: str) -> Path:
    """The path of a new file in a folder that is being written; ``name`` may have folders, which are made.

    Raises:
        SourceError: the file is there. Names that differ in case only are one file on Windows and macOS.
    """
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path):
        raise SourceError(
            f"{name}: two files to write have this name; this file system does not tell upper from lower case"
        )
    return path


def folder_bytes(folder: Path) -> int:
    """The size of all files directly in ``folder``."""
    return sum(path.stat().st_size for path in folder.iterdir())


def write_json(path: Path, value: Any, indent: int = 2) -> None:
    """Write JSON in ASCII, with escapes, so that it is read correctly in any encoding.

    Raises:
        ValueError: NaN or Inf.
        TypeError: not JSON.
    """
    text = json.dumps(value, indent=indent, allow_nan=False)
    with atomic_file(path) as file:
        file.write(text.encode("ascii") + b"\n")


@contextmanager
def weights_file(
    path: Path, tensors: Iterable[TensorLayout], metadata: Mapping[str, str]
) -> Iterator[Callable[[str, Iterable[Array]], None]]:
    """Write a safetensors file of known layout, tensor by tensor.

    Args:
        path: the file.
        tensors: all tensors of the file. Those of larger elements come first, so that each is aligned.
        metadata: strings of the header.

    Yields:
        A function that writes one tensor: its name, and its elements in flat parts. All must be written, in any order.
    """
    layout = sorted(tensors, key=lambda tensor: -tensor[1].itemsize)
    header, starts = header_of(layout, metadata)
    with atomic_file(path) as file:
        file.write(header)

        def put(name: str, parts: Iterable[Array]) -> None:
            file.seek(starts.pop(name))
            for part in parts:
                file.write(as_bytes(part).data)

        yield put
        assert not starts, starts
