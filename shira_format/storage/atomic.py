"""Files and folders that appear whole or not at all, and what is replaced by them."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from shira_format.storage import owners

# Files that file managers create.
LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write that replaces ``path`` when the block ends without an exception.

    It has a hidden name in the same folder until it is flushed to disk and renamed; on any exception, including Ctrl-C,
    it is removed and ``path`` is unchanged. If the process is killed, the next writer into the folder removes it.
    """
    owners.clean(path.absolute().parent)
    hidden = owners.hidden(path)
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(hidden, flags, 0o666), "wb") as file:
            owners.lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, path)
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill that replaces ``path`` when the block ends without an exception.

    Like :func:`atomic_file`: it has a hidden name beside ``path`` until then, and on any exception it is removed and
    ``path`` is unchanged. Both change places at once, where the system can do that.
    """
    restore(path)
    if os.path.lexists(path):  # then what a killed writer had moved away has been replaced
        for old in owners.left_of(path, "old"):
            owners.remove(old)
    owners.clean(path.absolute().parent)
    hidden = owners.hidden(path)
    try:
        hidden.mkdir()
        with _locked(hidden):
            yield hidden
            _sync_all(hidden)
            if os.path.lexists(path):
                _replace(path, hidden)
            else:
                os.replace(hidden, path)
    except BaseException:
        owners.remove(hidden)
        raise
    _sync(path.parent)
    owners.remove(hidden)  # what was replaced


def restore(path: Path) -> None:
    """Put back what a writer had moved away from ``path`` when it was killed, before it put something else there."""
    if os.path.lexists(path):
        return
    for old in owners.left_of(path, "old"):
        os.replace(old, path)
        return


def _replace(path: Path, hidden: Path) -> None:
    """Exchange two names. Where that takes two steps, :func:`restore` undoes the first if the second is not reached."""
    if _exchange(path, hidden):
        return
    old = owners.hidden(path, "old")
    os.replace(path, old)
    try:
        os.replace(hidden, path)
    except BaseException:
        os.replace(old, path)
        raise
    owners.remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; False, and nothing is changed, if the system or the filesystem cannot."""
    exchange = _system_exchange()
    return exchange is not None and exchange(os.fsencode(one), os.fsencode(other)) == 0


@cache
def _system_exchange() -> Any:
    """``renameat2`` of Linux or ``renamex_np`` of macOS, with the flag to exchange; None if the system has neither."""
    with suppress(OSError, AttributeError):
        if sys.platform == "linux":
            rename, here = ctypes.CDLL(None).renameat2, -100  # AT_FDCWD: relative to the working directory
            return lambda one, other: rename(here, one, here, other, 2)
        if sys.platform == "darwin":
            swap = ctypes.CDLL(None).renamex_np
            return lambda one, other: swap(one, other, 2)
    return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locked, where folders can be opened (not on Windows)."""
    handle = _opened(folder)
    try:
        if handle is not None:
            owners.lock(handle)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _opened(folder: Path) -> int | None:
    try:
        return os.open(folder, os.O_RDONLY)
    except OSError:
        return None


def _sync(path: Path) -> None:
    """Flush a rename, or a file, to disk, as far as the system does that."""
    if (handle := _opened(path)) is None:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def _sync_all(folder: Path) -> None:
    for inner, _, files in os.walk(folder):
        for name in files:
            _sync(Path(inner, name))
        _sync(Path(inner))
