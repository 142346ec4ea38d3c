"""What Linux, macOS and Windows do differently with files and processes: asked here, and nowhere else.

Each function does the same on every system, or says in its result or in one error that the system cannot.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import sys
from contextlib import AbstractContextManager, suppress
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any

IS_WINDOWS = os.name == "nt"
# Whether a folder with open files can be renamed, and a file that is open be replaced or removed.
MOVES_OPEN_FILES = not IS_WINDOWS
# macOS refuses to read 2 GiB or more at once.
_AT_ONCE = 1 << 30
# What fsync says where there is nothing to flush: a folder on some systems, a file opened to read on Windows.
_NOT_FLUSHED = frozenset(
    {errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EROFS}
)
# Windows keeps these for devices, whatever follows after the dot.
_DEVICES = {"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(10)}


# Opening and reading


def open_without_waiting(path: str | os.PathLike[str], flags: int = os.O_RDONLY, *, follow: bool = True) -> int:
    """Open a file; a pipe without waiting for a writer, which has no effect on a regular file.

    Args:
        path: the file.
        flags: those of :func:`os.open`.
        follow: whether a symbolic link is followed; where links cannot be told, it is.
    """
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    return os.open(path, flags if follow else flags | getattr(os, "O_NOFOLLOW", 0))


def create(path: Path) -> int:
    """Create a file that is not there yet, to be written."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666)


def open_folder(path: Path) -> int | None:
    """A folder, opened to be locked or flushed; None where folders cannot be opened: Windows."""
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:
        return None


def read_at(file: FileIO, start: int, out: memoryview, turn: AbstractContextManager[Any]) -> int:
    """Read from byte ``start`` on into ``out``, as much as comes at once; how much that was.

    Args:
        file: open to read, without a buffer.
        start: the first byte.
        out: writable bytes.
        turn: a lock of the file's own, for systems on which threads share its position.
    """
    out = out[:_AT_ONCE]
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [out], start)
    with turn:
        file.seek(start)
        return file.readinto(out) or 0


# Replacing and flushing


def replace(source: Path, target: Path) -> None:
    """Give ``source`` the name ``target``, also where a file, or an empty folder, has it.

    Raises:
        PermissionError: naming ``target``; on Windows also if a program has it open.
        OSError: else.
    """
    try:
        os.replace(source, target)
    except PermissionError as error:
        why = (
            error.strerror if MOVES_OPEN_FILES else f"{error.strerror}: a program has it open, or it is protected"
        )
        raise PermissionError(error.errno, why, str(target)) from None


def link(source: Path, target: Path) -> bool:
    """Give ``source`` a second name, if there is no ``target`` yet; False if the file system has no links.

    Raises:
        FileExistsError: there is a ``target``.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
    except (OSError, AttributeError):
        return False
    return True


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; False, and nothing is changed, if the system or the file system cannot."""
    call = _exchange()
    return call is not None and call(os.fsencode(one), os.fsencode(other)) == 0


@cache
def _exchange() -> Any:
    """``renameat2`` of Linux or ``renamex_np`` of macOS, with the flag to exchange; None if the system has neither."""
    with suppress(OSError, AttributeError):
        if sys.platform == "linux":
            rename, here = ctypes.CDLL(None).renameat2, -100  # AT_FDCWD: relative to the working directory
            return lambda one, other: rename(here, one, here, other, 2)
        if sys.platform == "darwin":
            swap = ctypes.CDLL(None).renamex_np
            return lambda one, other: swap(one, other, 2)
    return None


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, as far as the system does that.

    Raises:
        OSError: it does, and the disk is full or fails.
    """
    if (handle := open_folder(path)) is None:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_FLUSHED:
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)


def allocate(handle: int, size: int) -> None:
    """Fill a file that is open for writing up to ``size`` bytes, with room on the disk for all of them.

    A file that is mapped needs that: a page for which the disk has no room ends the process that writes to it.

    Raises:
        OSError: the disk has no room.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # of a file system that cannot
                raise
        else:
            return
    at = os.lseek(handle, 0, os.SEEK_END)
    while at < size:
        at += os.write(handle, bytes(min(size - at, 1 << 20)))


def is_device(name: str) -> bool:
    """Whether Windows takes a file name for a device, such as ``aux.st``."""
    return name.partition(".")[0].lower() in _DEVICES


def is_usable(name: str) -> bool:
    """Whether a file of this name can be made here: Windows keeps those of devices, and drops a dot or space at the end."""
    return not IS_WINDOWS or not (is_device(name) or name.endswith((".", " ")))


# Processes


def lock(handle: int) -> bool:
    """Lock an open file or folder until it is closed, also by the death of this process; False if somebody else holds the lock.

    Where there are no locks, as on Windows and some network file systems, this is True.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def is_running(process: int, start: int) -> bool:
    """Whether the process that :func:`started` at ``start`` still runs; True where that cannot be known: Windows."""
    if IS_WINDOWS:  # where there is no signal 0, and os.kill ends the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return start in (0, now := started(process)) or now == 0


def started(process: int) -> int:
    """When a process began, in ticks of the machine's clock, to tell it from an earlier one of the same number; 0 if unknown."""
    if sys.platform != "linux":
        return 0
    try:
        status = Path(f"/proc/{process}/stat").read_bytes()
        return int(
            status.rpartition(b")")[2].split()[19]
        )  # field 22; the second one, in brackets, may hold anything
    except (OSError, ValueError, IndexError):
        return 0


def host() -> str:
    """The name of this machine, in letters, digits and ``_``, at most 40."""
    return re.sub(r"[^A-Za-z0-9]", "_", platform.node())[:40] or "_"


def usable_cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
