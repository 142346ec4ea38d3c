"""Files and folders that appear whole or not at all."""

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
    """A binary file to write that replaces ``path`` when the block ends without an exception.

    It has a hidden name in the same folder until it is flushed to disk and renamed; on any exception, including Ctrl-C,
    it is removed and ``path`` is unchanged.
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
    """Flush the rename to disk, where folders can be opened (not on Windows)."""
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


# Files that file managers create.
LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill that replaces ``path`` when the block ends without an exception.

    Like :func:`atomic_file`: it has a hidden name beside ``path`` until then, and on any exception it is removed and
    ``path`` is unchanged.
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
