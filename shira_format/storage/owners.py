"""Who writes what: hidden names that tell their owner, locks, and the removal of what killed writers left behind.

What is being written has a name like ``.adapter.st.HOST-PROCESS-START-RANDOM.tmp``. It is left behind if the process is killed.
The next writer into the folder removes it if its owner is certainly dead: a process of this machine that is not there any
more, and that holds no lock on it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

_LONGEST = 100  # bytes of the visible name in a hidden one
_HIDDEN = re.compile(
    r"\.(?P<name>.+)\.(?P<host>[A-Za-z0-9_]+)-(?P<process>[0-9]{1,10})-(?P<start>[0-9]{1,20})-[0-9a-f]{12}\.(?P<ending>tmp|old)"
)
_cleaned: set[tuple[int, int]] = set()  # folders, by device and inode, that this process has cleaned


def hidden(path: Path, ending: str = "tmp") -> Path:
    """A new hidden name beside ``path`` that tells this process."""
    process = os.getpid()
    owner = f"{_host()}-{process}-{_start(process)}-{secrets.token_hex(6)}"
    return path.with_name(f".{_shortened(path.name)}.{owner}.{ending}")


def left_of(path: Path, ending: str) -> Iterator[Path]:
    """What dead owners left beside ``path`` under its hidden names."""
    name = _shortened(path.name)
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(path.absolute().parent)):
            match = _HIDDEN.fullmatch(entry.name)
            if match and (match["name"], match["ending"]) == (name, ending) and _is_left(match, Path(entry.path)):
                yield path.with_name(entry.name)


def clean(folder: Path) -> None:
    """Remove what dead writers left in a folder; once for each folder and process, since a folder may have many files."""
    with contextlib.suppress(OSError):  # a folder that cannot be listed
        status = folder.stat()
        if (status.st_dev, status.st_ino) in _cleaned:
            return
        _cleaned.add((status.st_dev, status.st_ino))
        for entry in list(os.scandir(folder)):
            match = _HIDDEN.fullmatch(entry.name)
            if match and match["ending"] == "tmp" and _is_left(match, Path(entry.path)):
                remove(Path(entry.path))


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, as far as possible."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def lock(handle: int) -> bool:
    """Lock an open file or folder until it is closed, also by the death of this process; False if somebody else holds the lock.

    Where there are no locks, as on some network filesystems, this is True.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where an open file can neither be removed nor replaced
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_left(match: re.Match[str], path: Path) -> bool:
    if match["host"] != _host() or _is_alive(int(match["process"]), int(match["start"])):
        return False
    # Processes of other containers with the name of this host are not seen, but their locks are.
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return path.is_symlink()
    try:
        return lock(handle)
    finally:
        os.close(handle)


def _is_alive(process: int, start: int) -> bool:
    """Whether the process that began at ``start`` still runs; True where that cannot be known."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return start in (0, now := _start(process)) or now == 0


def _start(process: int) -> int:
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


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", platform.node())[:40] or "_"


def _shortened(name: str) -> str:
    return os.fsencode(name)[:_LONGEST].decode(errors="ignore")
