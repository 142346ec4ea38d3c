"""Writing an export: whether its file or folder may be replaced, a folder that appears whole, and the files in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, as_bytes
from shira_format.errors import ShiraError, SourceError
from shira_format.storage.atomic import LITTER, atomic_file, atomic_folder
from shira_format.storage.safetensors_file import header_of

# A tensor of a file to be written: name, dtype, shape.
TensorLayout = tuple[str, np.dtype[Any], tuple[int, ...]]


def check_output_file(path: Path | None, *, force: bool) -> None:
    """Check that a file may be written at ``path``; None is a dry run.

    Raises:
        SourceError: it is a folder, its folder does not exist, or it exists and ``force`` is not set.
    """
    if path is None:
        return
    if path.is_dir():
        raise SourceError(f"{path}: is a folder, not a file to write")
    _check_parent(path)
    if path.exists() and not force:
        raise SourceError(f"{path}: exists; --force replaces it")


def check_output_folder(
    path: Path | None,
    inputs: Iterable[object],
    *,
    force: bool,
    writer: str = "",
    own_files: Callable[[Path], Collection[str]] | None = None,
) -> None:
    """Check that a folder may be written at ``path``; None is a dry run.

    A folder that holds an input, or the working directory, is never replaced.

    Args:
        path: the folder.
        inputs: files and folders that are read; only local paths are checked.
        force: replace what exists.
        writer: the export that writes the folder, for messages.
        own_files: names of the files of such an export in a folder. If given, only a folder that holds these and nothing else
            is replaced. It raises OSError or ShiraError if the folder holds no such export.

    Raises:
        SourceError: the folder must not be written.
    """
    if path is None:
        return
    _check_parent(path)
    if not os.path.lexists(path):
        return
    if not force:
        raise SourceError(f"{path}: exists; --force replaces it")
    here = path.resolve()
    if not here.is_dir():
        if own_files is None:
            raise SourceError(f"{path}: is a file, not a folder to write")
        raise SourceError(f"{path}: not a folder that {writer} wrote, and so not replaced")
    for other in (*inputs, Path.cwd()):
        if isinstance(other, Path) and (here == other.resolve() or here in other.resolve().parents):
            raise SourceError(f"{path}: holds {other}, and is not replaced")
    if own_files is not None:
        _check_own(path, writer, own_files)


def _check_parent(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise SourceError(f"{path}: the folder {path.parent} does not exist")


def _check_own(folder: Path, writer: str, own_files: Callable[[Path], Collection[str]]) -> None:
    refused = f"{folder}: not a folder that {writer} wrote, and so not replaced"
    if folder.is_symlink():
        raise SourceError(refused)
    try:
        own = own_files(folder)
    except (OSError, ShiraError) as error:
        raise SourceError(f"{refused} ({error})") from None
    others = (p.name for p in folder.iterdir() if p.name not in LITTER and (p.name not in own or p.is_dir()))
    if other := min(others, default=None):
        raise SourceError(f"{folder}: holds {other!r}, which {writer} did not write, and so is not replaced")


@contextmanager
def output_folder(path: Path | None) -> Iterator[Path | None]:
    """A new folder that takes the place of ``path`` if the block ends without an exception; None for a dry run."""
    if path is None:
        yield None
        return
    with atomic_folder(path) as folder:
        yield folder


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
