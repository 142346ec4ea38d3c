"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write in binary that takes the place of ``path`` when the block ends without an exception.

    It is written under a hidden name in the same folder, flushed to disk and renamed; on any exception, Ctrl-C
    included, it is removed and ``path`` is as it was.
    """
    hidden = path.with_name(f".{path.name[:48]}.{secrets.token_hex(6)}.tmp")
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(hidden, flags, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, path)
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where folders can be opened (not on Windows)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


# What file managers leave behind.
LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill that takes the place of ``path`` when the block ends without an exception.

    Like :func:`atomic_file`: it has a hidden name beside ``path`` until then, and on any exception it is removed and
    ``path`` is as it was.
    """
    hidden = path.with_name(f".{path.name[:48]}.{secrets.token_hex(6)}.tmp")
    old = hidden.with_suffix(".old")
    try:
        hidden.mkdir()
        yield hidden
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(hidden, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    _sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)
