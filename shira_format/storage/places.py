"""Places that files are put in for others to read: a folder, or one behind fsspec, such as in an object store.

A file appears whole or, on storage that writes in steps, is told apart by its digest, which the reader knows from elsewhere.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from shira_format.errors import SourceError
from shira_format.storage.atomic import create_file
from shira_format.storage.paths import MOST_INDEX, is_failure, naming_url, one_at_a_time, read_file, unresolved


@runtime_checkable
class Place(Protocol):
    """Files by names such as ``"patches/7.st"``; errors are OSError of a folder, SourceError of remote storage.

    Attributes:
        label: what messages call it: its path or URL.
    """

    label: str

    def names(self, folder: str) -> list[str]:
        """The names of the files in a folder, without the folder's; none if there is no such folder."""

    def read(self, name: str) -> bytes:
        """A small file whole.

        Raises:
            FileNotFoundError: there is none.
        """

    def create(self, name: str, data: bytes) -> None:
        """Write a small file that nobody has written yet.

        Raises:
            FileExistsError: somebody has; it stays as it is.
        """

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """A local path to write; what is there when the block ends without an exception becomes the file ``name``."""

    def local(self, name: str) -> AbstractContextManager[Path]:
        """A local path of a file, for the time of the block.

        Raises:
            FileNotFoundError: there is none.
        """

    def remove(self, name: str) -> None:
        """Remove a file; none is no error."""


def open_place(where: str | os.PathLike[str] | Place) -> Place:
    """The place at a path or a URL of fsspec, at which there may be nothing yet; a place is returned.

    Raises:
        SourceError: the URL cannot be meant, or needs a package that is not installed.
    """
    if isinstance(where, (str, Path)):
        where = unresolved(os.fspath(where))
    if isinstance(where, Path):
        return Folder(where)
    return where if isinstance(where, Place) else RemoteFolder(where)


class Folder:
    """A local folder; it and its folders are made when the first file is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.label = str(path)

    def names(self, folder: str) -> list[str]:
        try:
            found = list((self._path / folder).iterdir())
        except FileNotFoundError:
            return []
        return sorted(path.name for path in found if not path.name.startswith("."))

    def read(self, name: str) -> bytes:
        return read_file(self._path / name, MOST_INDEX)

    def create(self, name: str, data: bytes) -> None:
        create_file(self._made(name), data)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        yield self._made(name)  # our writers replace files atomically

    def local(self, name: str) -> AbstractContextManager[Path]:
        path = self._path / name
        path.stat()
        return nullcontext(path)

    def remove(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)

    def _made(self, name: str) -> Path:
        path = self._path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class RemoteFolder:
    """A folder behind fsspec; files are written and read by way of local temporary ones."""

    def __init__(self, path: Any) -> None:
        """Args: ``path`` is a ``UPath``."""
        self.label = str(path)
        self._fs, self._root = path.fs, path.path.rstrip("/")
        self._turn: Any = one_at_a_time(path.fs)
        self._made: set[str] = set()

    def names(self, folder: str) -> list[str]:
        path = f"{self._root}/{folder}"
        with naming_url(f"{self.label}/{folder}"), self._turn:
            self._fs.invalidate_cache()  # others write there
            try:
                found = self._fs.ls(path, detail=False)
            except FileNotFoundError as error:
                if is_failure(error):
                    raise
                return []
        names = (str(one).rstrip("/").rpartition("/")[2] for one in found)
        return sorted(name for name in names if not name.startswith("."))

    def read(self, name: str) -> bytes:
        with self._errors(name):
            path = self._path(name)
            self._fs.invalidate_cache(path)
            size = self._fs.info(path).get("size")
            if size is None:
                raise SourceError(f"{self.label}/{name}: its size is not known")
            if size > MOST_INDEX:
                raise SourceError(f"{self.label}/{name}: has {size} bytes; at most {MOST_INDEX} are read")
            return bytes(self._fs.cat_file(path, start=0, end=size)) if size else b""

    def create(self, name: str, data: bytes) -> None:
        self._make_folder(name)
        with self._errors(name):
            self._refuse_existing(name)
            try:
                # Stores that can, such as S3, refuse a second writer in the same instant; others have just the line above.
                self._fs.pipe_file(self._path(name), data, mode="create")
            except Exception:
                self._refuse_existing(name)  # which not every store's refusal says
                raise

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="shira-") as folder:
            path = Path(folder) / name.rpartition("/")[2]
            yield path
            self._make_folder(name)
            with self._errors(name):
                self._fs.put_file(str(path), self._path(name))

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="shira-") as folder:
            path = Path(folder) / name.rpartition("/")[2]
            with self._errors(name):
                self._fs.get_file(self._path(name), str(path))
            yield path

    def remove(self, name: str) -> None:
        with self._errors(name):
            try:
                self._fs.rm_file(self._path(name))
            except FileNotFoundError:
                return

    def _refuse_existing(self, name: str) -> None:
        self._fs.invalidate_cache()
        if self._fs.exists(self._path(name)):
            raise FileExistsError(name)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _make_folder(self, name: str) -> None:
        folder = self._path(name).rpartition("/")[0]
        if folder not in self._made:
            with self._errors(name):
                self._fs.makedirs(folder, exist_ok=True)
            self._made.add(folder)

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Errors name the file; one that is there or is not stays what it is."""
        url = f"{self.label}/{name}"
        found: OSError | None = None
        with naming_url(url), self._turn:
            try:
                yield
            except FileNotFoundError as error:
                if is_failure(error):
                    raise
                found = FileNotFoundError(f"{url}: no such file")
            except FileExistsError:
                found = FileExistsError(f"{url}: exists")
        if found is not None:
            raise found
