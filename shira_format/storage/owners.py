"""Who writes what: hidden names that tell their owner, locks, and the removal of what killed writers left behind.

What is being written has a name like ``.adapter.st.HOST-PROCESS-START-RANDOM.tmp``. It is left behind if the process is killed.
The next writer into the folder removes it if its owner is certainly dead: a process of this machine that is not there any
more, and that holds no lock on it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from shira_format._core import system

_LONGEST = 100  # bytes of the visible name in a hidden one
_HIDDEN = re.compile(
    r"\.(?P<name>.+)\.(?P<host>[A-Za-z0-9_]+)-(?P<process>[0-9]{1,10})-(?P<start>[0-9]{1,20})-[0-9a-f]{12}\.(?P<ending>tmp|old)"
)
_AGAIN = 60.0  # seconds after which a folder is cleaned again
# When this process has cleaned folders, by device and inode: which a later folder may have again, once this one is removed.
_cleaned: dict[tuple[int, int], float] = {}


def hidden(path: Path, ending: str = "tmp") -> Path:
    """A new hidden name beside ``path`` that tells this process."""
    process = os.getpid()
    owner = f"{system.host()}-{process}-{system.started(process)}-{secrets.token_hex(6)}"
    return path.with_name(f".{_shortened(path.name)}.{owner}.{ending}")


@contextlib.contextmanager
def naming_visible(path: Path, hidden: Path) -> Iterator[None]:
    """An OSError about the hidden file, or one in the hidden folder, names what that was to become at ``path``."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str) and Path(error.filename).is_relative_to(hidden):
            error.filename = str(path / Path(error.filename).relative_to(hidden))
        raise


def is_hidden(path: Path) -> bool:
    """Whether a file or folder has a name that :func:`hidden` gives."""
    return _HIDDEN.fullmatch(path.name) is not None


def left_of(path: Path, ending: str) -> Iterator[Path]:
    """What dead owners left beside ``path`` under its hidden names."""
    name = _shortened(path.name)
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(path.absolute().parent)):
            match = _HIDDEN.fullmatch(entry.name)
            if match and (match["name"], match["ending"]) == (name, ending) and _is_left(match, Path(entry.path)):
                yield path.with_name(entry.name)


def clean(folder: Path) -> None:
    """Remove what dead writers left in a folder; once a minute, since a folder may have many files."""
    with contextlib.suppress(OSError):  # a folder that cannot be listed
        status, now = folder.stat(), time.monotonic()
        place = status.st_dev, status.st_ino
        if now - _cleaned.get(place, -_AGAIN) < _AGAIN:
            return
        _cleaned[place] = now
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


def _is_left(match: re.Match[str], path: Path) -> bool:
    if match["host"] != system.host() or system.is_running(int(match["process"]), int(match["start"])):
        return False
    # Processes of other containers with the name of this host are not seen, but their locks are.
    try:
        handle = system.open_without_waiting(path, follow=False)
    except OSError:
        return path.is_symlink()
    try:
        return system.lock(handle)
    finally:
        os.close(handle)


def _shortened(name: str) -> str:
    return os.fsencode(name)[:_LONGEST].decode(errors="ignore")
