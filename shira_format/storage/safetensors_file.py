"""The safetensors container, read and written by our own code, here and nowhere else.

The safetensors package does not do what adapters and checkpoints need:

* A stranger's file is checked before anything is allocated: exact offsets, sizes, repeated keys, the types of metadata.
* Parts of tensors are read by ranges, from local and remote storage, in bounded memory and from several threads.
* Tensors are written one by one, without all of them in memory, in an order of ours and with float8 and bfloat16.

Section numbers are those of ``spec/SPEC.md``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shira_format._core.arrays import Array, as_bytes, frozen
from shira_format._core.dtypes import DTYPES, dtype_name
from shira_format._core.strict_json import is_uint, parse_object
from shira_format.errors import FormatError
from shira_format.storage.paths import MemoryFile, open_storage
from shira_format.tensors import MAX_RANK, TOO_LARGE, is_too_large, numel

MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class Stream:
    """One array of a file: dtype, shape and byte range in the buffer."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.end - self.begin


class SafetensorsFile(Mapping[str, Stream]):
    """The checked header of a file as a mapping from name to :class:`Stream`, in the header's order.

    Attributes:
        path: the file.
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
            self._start, header = self._read_header()
            self.metadata = _metadata(header)
            self.buffer_size = self.size - self._start
            self._streams = _streams(header, self.buffer_size)
        except FormatError as error:
            self._storage.close()
            raise error.at(file=self.path) from None
        except BaseException:
            self._storage.close()
            raise

    def _read_header(self) -> tuple[int, dict[str, Any]]:
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
        return 8 + length, parse_object(self._read(8, length), "header-json")

    def _read(self, start: int, size: int) -> bytes:
        """Read, not mapped: the file may be cut meanwhile."""
        found = bytearray(size)
        self._storage.read_into(start, memoryview(found))
        return bytes(found)

    def __getitem__(self, name: str) -> Stream:
        return self._streams[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._streams)

    def __len__(self) -> int:
        return len(self._streams)

    def read(self, name: str) -> Array:
        """The array ``name``, read-only, read into memory of its own: later changes of the file do not reach it."""
        stream = self._streams[name]
        return frozen(self.read_part(name, 0, numel(stream.shape)).reshape(stream.shape))

    def read_part(self, name: str, start: int, stop: int, out: Array | None = None) -> Array:
        """Elements ``start`` to ``stop`` of the flat array ``name``, ``[stop - start]``, read into ``out`` or a new array.

        Args:
            name: the array.
            start: first flat index.
            stop: flat index after the last.
            out: contiguous, of the array's dtype, with at least ``stop - start`` elements.
        """
        stream = self._streams[name]
        if out is None:
            out = np.empty(stop - start, DTYPES[stream.dtype])
        part = out[: stop - start]
        if stop > start:
            at = self._start + stream.begin + start * part.itemsize
            self._storage.read_into(at, part.view(np.uint8).data)
        return part

    def close(self) -> None:
        """Close the file; arrays that were read stay valid."""
        self._storage.close()


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("header-entry", "__metadata__ does not map strings to strings")
    return metadata


def _streams(header: dict[str, Any], buffer_size: int) -> dict[str, Stream]:
    streams = {name: _stream(name, entry) for name, entry in header.items() if name != "__metadata__"}
    at = 0
    for name, stream in sorted(streams.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stream.begin != at:
            raise FormatError(
                "offsets", f"it begins at byte {stream.begin}, but the stream before it ends at {at}", tensor=name
            )
        at = stream.end
    if at > buffer_size:
        raise FormatError(
            "file-truncated", f"the streams have {at} bytes, but the file has only {buffer_size} after its header"
        )
    if at < buffer_size:
        raise FormatError("file-trailing", f"{buffer_size - at} bytes follow after the last stream")
    return streams


def _stream(name: str, entry: Any) -> Stream:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise FormatError("header-entry", "its entry is not {dtype, shape, data_offsets}", tensor=name) from None
    if not (
        len(entry) == 3
        and isinstance(dtype, str)
        and isinstance(shape, list)
        and len(shape) <= MAX_RANK
        and all(is_uint(n) for n in [*shape, begin, end])
        and begin <= end
    ):
        raise FormatError("header-entry", "its entry is not {dtype, shape, data_offsets}", tensor=name)
    if dtype not in DTYPES:
        raise FormatError("unknown-dtype", f"dtype {dtype!r} is not known", tensor=name)
    if is_too_large(tuple(shape)):
        raise FormatError("shape-overflow", f"shape {shape}: {TOO_LARGE}", tensor=name)
    stream = Stream(dtype, tuple(shape), begin, end)
    if stream.nbytes != numel(stream.shape) * DTYPES[dtype].itemsize:
        raise FormatError("dtype-length", f"{stream.nbytes} bytes for {dtype} of shape {shape}", tensor=name)
    return stream


def file_header(streams: Mapping[str, Stream], metadata: Mapping[str, str], room: int = 0) -> bytes:
    """The beginning of a file up to its buffer: the length of the header and the header, filled up with spaces.

    Args:
        streams: the arrays by name, in the order of the header.
        metadata: strings by name; none is written if it is empty.
        room: bytes of the result; by default as few as give a multiple of 8.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, stream in streams.items():
        entries[name] = {
            "dtype": stream.dtype, "shape": stream.shape, "data_offsets": [stream.begin, stream.end],
        }  # fmt: skip
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(room - 8 if room else (len(text) + 7) & ~7)
    return len(text).to_bytes(8, "little") + text


def header_of(
    tensors: Iterable[tuple[str, np.dtype[Any], tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """:func:`file_header` of tensors that follow one another, and where in the file each tensor's bytes begin.

    Args:
        tensors: name, dtype and shape of each, in the order of the file.
        metadata: see :func:`file_header`.
    """
    streams, at = {}, 0
    for name, dtype, shape in tensors:
        stop = at + numel(shape) * dtype.itemsize
        streams[name], at = Stream(dtype_name(dtype), shape, at, stop), stop
    header = file_header(streams, metadata)
    return header, {name: len(header) + stream.begin for name, stream in streams.items()}


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
