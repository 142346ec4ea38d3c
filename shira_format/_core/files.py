"""Opening files of strangers' choice: never a pipe that nobody writes to, nor a device without an end."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from shira_format._core.system import open_without_waiting


def open_regular(path: Path) -> io.FileIO:
    """Open a regular file to read, without a buffer.

    Raises:
        OSError: it cannot be opened, or is a pipe, a socket or a device.
        ValueError: the name holds a NUL.
    """
    file = io.FileIO(path, opener=open_without_waiting)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


@contextmanager
def digested(path: Path) -> Iterator[tuple[IO[bytes], str]]:
    """A regular file to read from its start, and its SHA-256.

    Raises:
        OSError: it cannot be opened, is a pipe or a device, or has changed before the block ends.
        ValueError: the name holds a NUL.
    """
    with io.BufferedReader(open_regular(path)) as file:
        before = _state(file)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        yield file, digest
        if _state(file) != before:
            raise OSError(errno.EIO, "the file has changed while it was read", str(path))


def _state(file: IO[bytes]) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


@contextmanager
def naming(path: object) -> Iterator[None]:
    """An OSError of the block that names no file, such as that of a full disk, names ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
