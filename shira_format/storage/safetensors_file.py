"""The safetensors container, read and written by our own code, here and nowhere else.

The safetensors package does not do what adapters and checkpoints need:

* A stranger's file is checked before anything is allocated: exact offsets, sizes, repeated keys, the types of metadata.
* Parts of tensors are read by ranges, from local and remote storage, in bounded memory and from several threads.
* Tensors are written one by one, without all of them in memory, in an order of ours and with float8 and bfloat16.

Section numbers are those of ``spec/SPEC.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shira_format._core.arrays import Array, as_bytes, frozen
from shira_format._core.dtypes import DTYPES, dtype_name
from shira_format.errors import FormatError
from shira_format.storage.paths import MemoryFile, open_storage, storage_digest
from shira_format.storage.safetensors_header import MAX_HEADER, Stream, file_header, parse_header
from shira_format.tensors import numel


class SafetensorsFile(Mapping[str, Stream]):
    """The checked header of a file as a mapping from name to :class:`Stream`, in the header's order.

    Attributes:
        path: the file.
        header: what it says of the arrays.
        metadata: the strings of ``__metadata__``.
        size: of the whole file, in bytes.
        buffer_size: of what follows the header, in bytes.
        tile: see :class:`shira_format.storage.paths.Storage`.

    Raises:
        FormatError: a rule of section 2 is broken.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str | Path, content: bytes | None = None) -> None:
        """Args: ``content``: the file's bytes, if they have been read; then nothing else is."""
        # A UPath, of a remote file, is not a Path and stays a UPath.
        self.path = Path(path) if isinstance(path, str) else path
        self._storage = open_storage(self.path) if content is None else MemoryFile(content)
        try:
            self.size = self._storage.size
            self.tile = self._storage.tile
            self._start, text = self._read_header()
            self.buffer_size = self.size - self._start
            self.header = parse_header(text, self.buffer_size)
            self.metadata = self.header.metadata
        except FormatError as error:
            self._storage.close()
            raise error.at(file=self.path) from None
        except BaseException:
            self._storage.close()
            raise

    def _read_header(self) -> tuple[int, bytearray]:
        if self.size < 8:
            raise FormatError("file-truncated", f"not a safetensors file: it has only {self.size} bytes")
        prefix = self._read(0, 8)
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER:
            # The first 8 bytes of a file of another kind make an absurd length.
            other = "not a safetensors file"
            reason = other if length > self.size else f"a header of {length} bytes; the limit is {MAX_HEADER}"
            raise FormatError("header-too-large", reason)
        if 8 + length > self.size:
            raise FormatError("file-truncated", f"a header of {length} bytes in a file of {self.size}")
        return 8 + length, self._read(8, length)

    def _read(self, start: int, size: int) -> bytearray:
        """Read, not mapped: the file may be cut meanwhile."""
        found = bytearray(size)
        self._storage.read_into(start, memoryview(found))
        return found

    def __getitem__(self, name: str) -> Stream:
        return self.header[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.header)

    def __len__(self) -> int:
        return len(self.header)

    def read(self, name: str) -> Array:
        """The array ``name``, read-only, read into memory of its own: later changes of the file do not reach it."""
        stream = self.header[name]
        return frozen(self.read_part(name, 0, numel(stream.shape)).reshape(stream.shape))

    def read_part(self, name: str, start: int, stop: int, out: Array | None = None) -> Array:
        """Elements ``start`` to ``stop`` of the flat array ``name``, ``[stop - start]``, read into ``out`` or a new array.

        Args:
            name: the array.
            start: first flat index.
            stop: flat index after the last.
            out: contiguous, of the array's dtype, with at least ``stop - start`` elements.
        """
        stream = self.header[name]
        if out is None:
            out = np.empty(stop - start, DTYPES[stream.dtype])
        part = out[: stop - start]
        if stop > start:
            at = self._start + stream.begin + start * part.itemsize
            self._storage.read_into(at, part.view(np.uint8).data)
        return part

    def digest(self) -> str:
        """SHA-256 of the whole file that was opened, whatever has its name now, as 64 hex digits."""
        return storage_digest(self._storage)

    def close(self) -> None:
        """Close the file; arrays that were read stay valid."""
        self._storage.close()


class SafetensorsWriter:
    """Writes tensors one after the other, whose exact shapes are known only when they come.

    The header gets the room that it would need if all tensors came in their largest shapes; spaces fill what is left.
    """

    def __init__(
        self,
        file: BinaryIO,
        largest: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> None:
        """Args: ``file``: empty, open for writing; ``largest``: dtypes and largest shapes of all tensors that may come."""
        self._file = file
        self._metadata = metadata
        self._streams: dict[str, Stream] = {}
        self._at = 0
        end = sum(dtype.itemsize * numel(shape) for dtype, shape in largest.values())
        most = {name: Stream(dtype_name(dtype), shape, end, end) for name, (dtype, shape) in largest.items()}
        self._room = len(file_header(most, metadata))
        file.write(bytes(self._room))

    def add(self, name: str, array: Array) -> None:
        """Write one tensor."""
        begin, self._at = self._at, self._at + array.nbytes
        self._streams[name] = Stream(dtype_name(array.dtype), array.shape, begin, self._at)
        self._file.write(as_bytes(array).data)

    def finish(self) -> None:
        """Write the header."""
        self._file.seek(0)
        self._file.write(file_header(self._streams, self._metadata, self._room))
