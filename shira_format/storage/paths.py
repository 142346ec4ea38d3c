"""Files on local disks and on storage that fsspec reaches, read by ranges and from any thread."""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, cast

from shira_format._core.optional import optional_import
from shira_format.errors import SourceError

# One letter is a drive of Windows, not a protocol. A chain names several: zip://weights.st::s3://bucket/all.zip
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+://|(?:[A-Za-z][A-Za-z0-9+.\-]+::)+[A-Za-z][A-Za-z0-9+.\-]+://")
# macOS refuses to read 2 GiB or more at once.
_AT_ONCE = 1 << 30
# Filesystems of fsspec that are not asynchronous share one connection, or one position in an archive.
_ONE_AT_A_TIME = threading.Lock()


class Storage(Protocol):
    """One open file.

    Attributes:
        size: its size in bytes.
    """

    size: int

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill ``out`` (bytes, writable) with the file's bytes from ``start`` on; safe from several threads.

        Raises:
            OSError: the file ends before that, or cannot be read.
            SourceError: the same for a remote file.
        """

    def view(self, start: int, stop: int) -> Any:
        """The bytes from ``start`` to ``stop`` as a read-only buffer: mapped if possible, else read."""

    def close(self) -> None:
        """Close the file; views stay valid."""


class LocalFile:
    """A local file."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if it cannot be opened, or is a pipe or a device."""
        self._path = path
        # lives as long as the object
        self._file = open(path, "rb", buffering=0, opener=_open_at_once)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        status = os.fstat(self._file.fileno())
        if not stat.S_ISREG(status.st_mode):
            self._file.close()
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        self.size = status.st_size
        self._lock = threading.Lock()

    def read_into(self, start: int, out: memoryview) -> None:
        while out:
            now = out[:_AT_ONCE]
            if hasattr(os, "preadv"):
                done = os.preadv(self._file.fileno(), [now], start)
            else:  # Windows
                with self._lock:
                    self._file.seek(start)
                    done = self._file.readinto(now) or 0
            if done == 0:
                raise self._shorter()
            start, out = start + done, out[done:]

    def view(self, start: int, stop: int) -> Any:
        if start == stop:
            return b""
        skip = start % mmap.ALLOCATIONGRANULARITY
        try:
            mapped = mmap.mmap(
                self._file.fileno(), skip + stop - start, access=mmap.ACCESS_READ, offset=start - skip
            )
        except ValueError as error:
            if self._file.closed:
                raise
            raise self._shorter() from error
        return memoryview(mapped)[skip:]

    def close(self) -> None:
        self._file.close()

    def _shorter(self) -> OSError:
        return OSError(errno.EIO, "the file has become shorter", str(self._path))


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; a pipe without waiting for a writer. Has no effect on reading a regular file."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


class MemoryFile:
    """The content of a file in memory."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.size = len(content)

    def read_into(self, start: int, out: memoryview) -> None:
        out[:] = self.view(start, start + len(out))

    def view(self, start: int, stop: int) -> Any:
        return memoryview(self._content)[start:stop]

    def close(self) -> None:
        """Memory needs none."""


class RemoteFile:
    """A file behind fsspec: object stores, shared storage, archives."""

    def __init__(self, path: Any) -> None:
        """Args: ``path`` is a ``UPath``. Raises SourceError if there is no such file."""
        self._url, self._fs, self._path = str(path), path.fs, path.path
        self._turn: Any = one_at_a_time(self._fs)
        with naming(self._url), self._turn:
            size = self._fs.size(self._path)
        if size is None:
            raise SourceError(f"{self._url}: its size is not known, so parts of it cannot be read")
        self.size = int(size)

    def read_into(self, start: int, out: memoryview) -> None:
        out[:] = self.view(start, start + len(out))

    def view(self, start: int, stop: int) -> Any:
        if start == stop:
            return b""
        with naming(self._url), self._turn:
            found = self._fs.cat_file(self._path, start=start, end=stop)
        if len(found) != stop - start:
            raise SourceError(
                f"{self._url}: {len(found)} bytes came instead of bytes {start} to {stop}: "
                "the file has become shorter, or its storage does not support ranges"
            )
        return found

    def close(self) -> None:
        """Nothing stays open between reads."""


def one_at_a_time(filesystem: Any) -> Any:
    """What threads hold while they use a filesystem of fsspec."""
    # Asynchronous filesystems run requests in a loop of their own, so any thread may send one.
    return nullcontext() if filesystem.async_impl else _ONE_AT_A_TIME


@contextmanager
def naming(url: str) -> Iterator[None]:
    """Turn any exception into a SourceError that names ``url``: every filesystem raises exceptions of its own."""
    try:
        yield
    except SourceError:
        raise
    except FileNotFoundError as error:
        cause = error.__cause__  # such as a lost connection; a failed dictionary look-up is no explanation
        why = f" ({one_line(cause)})" if cause and not isinstance(cause, LookupError) else ""
        raise SourceError(f"{url}: no such file or folder{why}") from None
    except Exception as error:
        raise SourceError(f"{url}: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """The message of ``error`` in one line; its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def open_storage(path: Path) -> Storage:
    """Open a path that :func:`resolve_path` returned.

    Raises:
        OSError: it cannot be read.
        SourceError: the same for a remote file.
    """
    return LocalFile(path) if isinstance(path, Path) else RemoteFile(path)


def read_file(path: Path, limit: int | None = None) -> bytes:
    """The bytes of a file that :func:`resolve_path` returned, as it is now.

    Args:
        path: the file.
        limit: bytes that it may have; by default any number.

    Raises:
        OSError: it cannot be read, is a pipe or a device, or becomes shorter meanwhile.
        SourceError: the same for a remote file; it is larger than ``limit``.
        ValueError: the name holds a NUL.
    """
    storage = open_storage(path)
    try:
        if limit is not None and storage.size > limit:
            raise SourceError(f"{path}: has {storage.size} bytes; at most {limit} are read")
        content = bytearray(storage.size)
        storage.read_into(0, memoryview(content))
        return bytes(content)
    finally:
        storage.close()


def resolve_path(path: str | os.PathLike[str]) -> Path:
    """A local path, ``hf://...`` (downloaded to the hub's cache) or another URL (through fsspec) as a path object.

    A URL of fsspec becomes a ``UPath``: not a :class:`Path`, but with the same methods. A ``UPath`` with storage options may
    also be passed, and is returned unchanged.

    Raises:
        SourceError: there is nothing at the URL, it cannot be reached, or it needs a package that is not installed.
    """
    if not isinstance(path, (str, os.PathLike)):
        return path
    text = os.fspath(path)
    if text.startswith("hf://"):
        from shira_format.storage.hub import download

        return download(text)
    if _URL.match(text) is None:
        return Path(text)
    found: Any = unresolved(text)
    if isinstance(found, Path):
        return found
    with naming(text):
        # Most filesystems say "does not exist" whatever the failure; stat raises the reason.
        if not found.exists():
            found.stat()
    return cast(Path, found)


def unresolved(text: str) -> Any:
    """A local path, or the ``UPath`` of a URL of fsspec at which there may be nothing yet.

    Raises:
        SourceError: the URL cannot be meant, or it needs a package that is not installed.
    """
    if _URL.match(text) is None:
        return Path(text)
    with optional_import(f"{text}: URLs need fsspec", "remote"):
        from upath import UPath
    with naming(text):
        found: Any = UPath(text)
        return Path(found.path) if found.protocol in ("file", "local") else found


def hub_identity(path: str | os.PathLike[str]) -> dict[str, str]:
    """``id`` and ``revision`` of the repository of an ``hf://`` location; empty for other paths.

    Call it after :func:`resolve_path`: the revision is the one in the cache.
    """
    if not isinstance(path, str) or not path.startswith("hf://"):
        return {}
    from shira_format.storage.hub import hub_identity as identified_by_hub

    return identified_by_hub(path)
