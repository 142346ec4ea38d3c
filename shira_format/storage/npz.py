"""Files of numpy, whose sizes are compared with what is there before anything of these sizes is allocated."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.files import digested
from shira_format.errors import SourceError
from shira_format.storage.paths import one_line

Header = tuple[tuple[int, ...], np.dtype[Any]]  # the shape and the dtype of an array

# The best ratio of deflate; a higher one means a forged file.
_BEST_RATIO = 1032
# How much more than their file the arrays may take together, so that a small file cannot fill the memory; and so much in any case.
_MOST_RATIO = 16
_ALWAYS = 1 << 24


def read_arrays(path: Path) -> tuple[dict[str, Array], str]:
    """The arrays of an ``.npz`` file by name, or that of an ``.npy`` file by ``""``; and the SHA-256 of the file.

    Raises:
        SourceError: not such a file, Python objects, or arrays that are far larger than the file.
        OSError: it cannot be read, or changes meanwhile.
    """
    try:
        with digested(path) as (file, digest):
            if path.suffix.lower() == ".npy":
                return {"": _single(file)}, digest
            size = os.fstat(file.fileno()).st_size
            with zipfile.ZipFile(file) as archive:
                names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
                if len(set(names)) < len(names):
                    raise SourceError("a member occurs twice")
                headers = [header_of(archive, info, size) for info in archive.infolist()]
                check_unpacked(size, headers)
            file.seek(0)
            with np.load(file, allow_pickle=False) as found:
                return {name: found[name] for name in found.files}, digest
    except (MemoryError, OSError) as error:
        # zipfile and numpy raise OSErrors of their own, without a number, about what is in the file.
        if isinstance(error, OSError) and error.errno is None:
            raise SourceError(f"{path}: {one_line(error)}") from None
        raise
    except Exception as error:  # of zipfile, zlib and numpy: strangers' files find them all
        raise SourceError(f"{path}: {one_line(error)}") from None


def check_unpacked(size: int, headers: Iterable[Header]) -> None:
    """Raise SourceError if the arrays of a file of ``size`` bytes would take far more memory than that."""
    unpacked = sum(prod(shape) * dtype.itemsize for shape, dtype in headers)
    if unpacked > _MOST_RATIO * size + _ALWAYS:
        raise SourceError(f"a file of {size} bytes with {unpacked} bytes of arrays: save it with compressed=False")


def header_of(archive: zipfile.ZipFile, info: zipfile.ZipInfo, size: int) -> Header:
    """Shape and dtype of a member, whose bytes are as many as these ask for, of a file of ``size`` bytes.

    Raises:
        SourceError: it is no such member; without the file's name.
    """
    name = info.filename
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise SourceError(f"{name!r} is compressed in a way that numpy does not use")
    if info.compress_size > size or info.file_size > _BEST_RATIO * info.compress_size + 64:
        raise SourceError(f"{name!r} declares more bytes than it can hold")
    with archive.open(info) as member:
        return _header(member, name, info.file_size)


def _single(file: IO[bytes]) -> Array:
    _header(file, "array", os.fstat(file.fileno()).st_size)
    file.seek(0)
    found: Array = np.lib.format.read_array(file, allow_pickle=False)
    return found


def _header(file: IO[bytes], name: str, size: int) -> Header:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise SourceError(f"{name!r} is an array file of version {version}")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject:
        raise SourceError(f"{name!r} holds Python objects, which are not loaded")
    if file.tell() + prod(shape) * dtype.itemsize != size:
        raise SourceError(f"{name!r} is of shape {list(shape)} and dtype {dtype}, which is not its size")
    return tuple(shape), dtype
