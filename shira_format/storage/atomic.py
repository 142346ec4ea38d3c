"""Files and folders that appear whole or not at all, and what is replaced by them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from shira_format._core import system
from shira_format._core.files import naming
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
    try:
        with _hidden_file(path, hidden) as file:
            yield file
        system.replace(hidden, path)
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise
    _flush_names(path.parent)


def create_file(path: Path, data: bytes) -> None:
    """Write a file that nobody has written yet; it appears whole, and only one of several writers succeeds.

    Raises:
        FileExistsError: there is one.
    """
    owners.clean(path.absolute().parent)
    hidden = owners.hidden(path)
    try:
        with _hidden_file(path, hidden) as file:
            file.write(data)
        if not system.link(hidden, path):
            with naming(path), open(path, "xb") as file:
                file.write(data)
    finally:
        hidden.unlink(missing_ok=True)
    _flush_names(path.parent)


@contextmanager
def _hidden_file(path: Path, hidden: Path) -> Iterator[BinaryIO]:
    """A new file, locked, and flushed to disk at the end; errors name ``path``."""
    # These come first: what is in the buffer of a file on a full disk fails again when it is closed.
    with owners.naming_visible(path, hidden), naming(path), open(system.create(hidden), "wb") as file:
        system.lock(file.fileno())
        yield file
        file.flush()
        os.fsync(file.fileno())


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
        with _locked(hidden), owners.naming_visible(path, hidden):
            yield hidden
            _flush_all(hidden)
            if os.path.lexists(path):
                _replace(path, hidden)
            else:
                system.replace(hidden, path)
    except BaseException:
        owners.remove(hidden)
        raise
    _flush_names(path.parent)
    owners.remove(hidden)  # what was replaced


def restore(path: Path) -> None:
    """Put back what a writer had moved away from ``path`` when it was killed, before it put something else there."""
    if os.path.lexists(path):
        return
    for old in owners.left_of(path, "old"):
        system.replace(old, path)
        return


def _replace(path: Path, hidden: Path) -> None:
    """Exchange two names. Where that takes two steps, :func:`restore` undoes the first if the second is not reached."""
    if system.exchange(path, hidden):
        return
    old = owners.hidden(path, "old")
    system.replace(path, old)
    try:
        system.replace(hidden, path)
    except BaseException:
        system.replace(old, path)
        raise
    owners.remove(old)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locked, where folders can be opened (not on Windows)."""
    handle = system.open_folder(folder)
    try:
        if handle is not None:
            system.lock(handle)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _flush_names(folder: Path) -> None:
    """Flush a rename that was made: if that fails, what is there after a crash is the old one or the new one, and whole."""
    with suppress(OSError):
        system.flush(folder)


def _flush_all(folder: Path) -> None:
    for inner, _, files in os.walk(folder):
        for name in files:
            system.flush(Path(inner, name))
        system.flush(Path(inner))
