"""Files on local disks and on storage that fsspec reaches, read by ranges and from any thread."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol, cast

from shira_format._core import system
from shira_format._core.files import naming, open_regular
from shira_format._core.optional import optional_import
from shira_format.errors import ShiraError, SourceError

# One letter is a drive of Windows, not a protocol. A chain names several: zip://weights.st::s3://bucket/all.zip
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+://|(?:[A-Za-z][A-Za-z0-9+.\-]+::)+[A-Za-z][A-Za-z0-9+.\-]+://")
MOST_JSON = 1 << 24  # bytes of a configuration file
MOST_INDEX = 100_000_000  # bytes of a list of tensors, as of the header of a file
# What filesystems of fsspec call that by which one content of a file is told from another, the surest first.
_VERSION = (
    "ETag", "etag", "generation", "md5Hash", "content_md5", "Content-MD5", "Digest", "LastModified", "Last-Modified",
    "last_modified", "updated", "mtime", "modified", "created",
)  # fmt: skip
# Filesystems of fsspec that are not asynchronous share one connection, or one position in an archive.
_ONE_AT_A_TIME = threading.Lock()


class Storage(Protocol):
    """One open file.

    Attributes:
        size: its size in bytes.
        tile: about how many bytes are read as fast at once as the few of them that are needed.
        version: tells this content from another one of the file, as far as the storage can.
    """

    size: int
    tile: int

    @property
    def version(self) -> object: ...

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill ``out`` (bytes, writable) with the file's bytes from ``start`` on; safe from several threads.

        Raises:
            OSError: the file ends before that, cannot be read, or has changed since it was opened.
            SourceError: the same for a remote file.
        """

    def close(self) -> None:
        """Close the file."""


class LocalFile:
    """A local file.

    Read, never mapped: a mapped file that another program cuts ends the process, one that it overwrites changes arrays in use,
    and on Windows nobody can replace it.
    """

    tile = 1 << 21

    def __init__(self, path: Path) -> None:
        """Raises OSError if it cannot be opened, or is a pipe or a device."""
        self._path = path
        self._file = open_regular(path)
        weakref.finalize(self, self._file.close)
        self.size, self._modified = self._state()
        self._turn = threading.Lock()

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    @property
    def version(self) -> object:
        found = os.fstat(self._file.fileno())
        return self.size, self._modified, found.st_ino, found.st_dev

    def read_into(self, start: int, out: memoryview) -> None:
        with naming(self._path):
            while out:
                done = system.read_at(self._file, start, out, self._turn)
                if done == 0:
                    raise OSError(errno.EIO, "the file has become shorter")
                start, out = start + done, out[done:]
            if self._state() != (self.size, self._modified):
                raise OSError(errno.EIO, "the file has changed since it was opened")

    def close(self) -> None:
        self._file.close()


class MemoryFile:
    """The content of a file in memory."""

    tile = 1 << 21

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.size = len(content)

    @property
    def version(self) -> object:
        return self.size

    def read_into(self, start: int, out: memoryview) -> None:
        out[:] = memoryview(self._content)[start : start + len(out)]

    def close(self) -> None:
        """Memory needs none."""


class RemoteFile:
    """A file behind fsspec: object stores, shared storage, archives.

    After each read the storage is asked whether the file is still the one that was opened, where it tells that.
    """

    tile = 1 << 28

    def __init__(self, path: Any) -> None:
        """Args: ``path`` is a ``UPath``. Raises SourceError if there is no such file."""
        self._url, self._fs, self._path = str(path), path.fs, path.path
        self._turn: Any = one_at_a_time(self._fs)
        with naming_url(self._url), self._turn:
            self._opened = self._state()
        if self._opened[0] is None:
            raise SourceError(f"{self._url}: its size is not known, so parts of it cannot be read")
        self.size = int(self._opened[0])

    @property
    def version(self) -> object:
        return self._opened

    def _state(self) -> tuple[Any, Any]:
        """The size and the version that the file has now."""
        self._fs.invalidate_cache(self._path)  # which others may fill again with what a listing of the folder says
        found = self._fs.info(self._path)
        return found.get("size"), next((found[key] for key in _VERSION if found.get(key)), None)

    def read_into(self, start: int, out: memoryview) -> None:
        if not out:
            return
        with naming_url(self._url), self._turn:
            found = self._fs.cat_file(self._path, start=start, end=start + len(out))
            now = self._state()
        if now != self._opened:
            raise SourceError(f"{self._url}: the file has changed since it was opened")
        if len(found) != len(out):
            raise SourceError(
                f"{self._url}: {len(found)} bytes came instead of bytes {start} to {start + len(out)}: "
                "its storage does not support ranges"
            )
        out[:] = found

    def close(self) -> None:
        """Nothing stays open between reads."""


def one_at_a_time(filesystem: Any) -> Any:
    """What threads hold while they use a filesystem of fsspec."""
    # Asynchronous filesystems run requests in a loop of their own, so any thread may send one.
    return nullcontext() if filesystem.async_impl else _ONE_AT_A_TIME


@contextmanager
def naming_url(url: str) -> Iterator[None]:
    """Turn any exception into a SourceError that names ``url``: every filesystem raises exceptions of its own."""
    try:
        yield
    except (ShiraError, MemoryError):
        raise
    except FileNotFoundError as error:
        cause = error.__cause__  # such as an answer of a server; a failed dictionary look-up is no explanation
        if is_failure(error):
            raise SourceError(f"{url}: {one_line(cause or error)}") from None
        why = f" ({one_line(cause)})" if cause and not isinstance(cause, LookupError) else ""
        raise SourceError(f"{url}: no such file or folder{why}") from None
    except Exception as error:
        raise SourceError(f"{url}: {one_line(error)}") from None


def naming_remote(path: Path) -> AbstractContextManager[None]:
    """:func:`naming_url` for a path that :func:`resolve_path` returned, if it is a remote one."""
    return nullcontext() if isinstance(path, Path) else naming_url(str(path))


def is_failure(error: FileNotFoundError) -> bool:
    """Whether a filesystem of fsspec says "not found" since a server or the connection failed, which HTTP's does."""
    cause = error.__cause__
    status = getattr(cause, "status", None)
    if isinstance(status, int) and status > 0:
        return status >= 500 or status in (408, 429)
    of_connection = type(cause).__module__.partition(".")[0] == "aiohttp" or isinstance(cause, OSError)
    return of_connection and not isinstance(cause, FileNotFoundError)


def is_file(path: Path) -> bool:
    """Whether there is a file at a path that :func:`resolve_path` returned, or beside one: what lies there has a meaning.

    Raises:
        SourceError: storage behind fsspec failed, whose own method says that there is none.
    """
    if isinstance(path, Path):
        return path.is_file()
    remote: Any = path
    with naming_url(str(path)):
        try:
            return bool(remote.fs.info(remote.path)["type"] == "file")
        except PermissionError:  # object stores say that of files that are not there, unless they may be listed
            return False
        except FileNotFoundError as error:
            if is_failure(error):
                raise
            return False


def check_exists(path: Path) -> None:
    """Refuse a path that :func:`resolve_path` returned at which there is nothing.

    Raises:
        SourceError: there is nothing, or the storage failed, which is said.
    """
    with naming_remote(path):
        if path.exists():
            return
        if not isinstance(path, Path):
            path.stat()  # raises the reason
    raise SourceError(f"{path}: no such file or folder")


def one_line(error: BaseException) -> str:
    """The message of ``error`` in one line; its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def open_storage(path: Path) -> Storage:
    """Open a path that :func:`resolve_path` returned.

    Raises:
        OSError: it cannot be read.
        SourceError: the same for a remote file; or it is another one than before, see :func:`same_files`.
    """
    storage: Storage = LocalFile(path) if isinstance(path, Path) else RemoteFile(path)
    opened = _opened.get()
    if opened is not None and opened.setdefault(str(path), storage.version) != storage.version:
        storage.close()
        raise SourceError(f"{path}: the file has changed while it was read")
    return storage


_opened: ContextVar[dict[str, object] | None] = ContextVar("opened", default=None)


@contextmanager
def same_files() -> Iterator[None]:
    """A file that is opened more than once in the block is the same each time, so that its digest is of what was read.

    :func:`open_storage` raises SourceError if it has been replaced, or overwritten, since it was opened first.
    """
    token = _opened.set({} if (known := _opened.get()) is None else known)
    try:
        yield
    finally:
        _opened.reset(token)


_PART = 1 << 20  # bytes that are hashed at a time


def storage_digest(storage: Storage) -> str:
    """SHA-256 of the whole file that was opened, whatever has its name now, as 64 hex digits."""
    found, part = hashlib.sha256(), bytearray(min(storage.size, _PART))
    for start in range(0, storage.size, _PART):
        read = memoryview(part)[: storage.size - start]
        storage.read_into(start, read)
        found.update(read)
    return found.hexdigest()


def digest_of(path: Path) -> str:
    """SHA-256 of the file at a path that :func:`resolve_path` returned; see :func:`open_storage`."""
    storage = open_storage(path)
    try:
        return storage_digest(storage)
    finally:
        storage.close()


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
    with naming_url(text):
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
    with naming_url(text):
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
