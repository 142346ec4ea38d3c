"""Reading a GGUF file's header strictly, by ranges and in bounded memory.

``gguf.GGUFReader`` maps the whole file, makes Python objects of the whole vocabulary, trusts every count, and reads only
local files. The types and their dequantisation come from that package.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shira_format._core.optional import optional_import
from shira_format.errors import SourceError
from shira_format.storage.paths import Storage, open_storage
from shira_format.tensors import MAX_NUMEL, numel

# Far more than any model has: the largest mixtures of experts have some ten thousand tensors, keys are below 100 bytes.
MAX_ENTRIES = 2**17
MAX_TEXT = 1024
MAX_DIMENSIONS = 4  # of ggml

_WINDOW = 2**20
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor.

    Attributes:
        type: a ``gguf.GGMLQuantizationType``.
        shape: in numpy's order, with the last dimension contiguous; GGUF has the reverse.
        begin: where its data begins in the file.
        block: elements of a block; 1 if the type is not quantised.
        block_bytes: bytes of a block.
    """

    type: Any
    shape: tuple[int, ...]
    begin: int
    block: int
    block_bytes: int


class GGUFFile:
    """The checked header of one file; data is read from :attr:`storage`.

    Attributes:
        path: the file.
        storage: the open file.
        metadata: the numbers and short strings of its metadata; lists and long strings are None.
        entries: its tensors by GGUF's names, in the file's order.

    Raises:
        SourceError: it is not a GGUF file of version 2 or 3, it is damaged, or the gguf package is missing.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.storage: Storage = open_storage(path)
        try:
            header = _Header(path, self.storage)
            tensors, keys = header.start()
            self.metadata = header.metadata(keys)
            self.entries = header.entries(tensors, self.metadata)
        except BaseException:
            self.storage.close()
            raise


class _Header:
    """Reads a file from its start, through a window, never beyond its end."""

    def __init__(self, path: Path, storage: Storage) -> None:
        self._path, self._storage = path, storage
        self._at, self._window, self._begin = 0, b"", 0

    def start(self) -> tuple[int, int]:
        """The number of tensors and of keys."""
        if self._storage.size < 24 or self._take(4) != b"GGUF":
            raise self._error("not a GGUF file")
        version = self._number("I")
        if version and version & 0xFFFF == 0:
            raise self._error("a big-endian GGUF file, which is not supported")
        if version not in {2, 3}:
            raise self._error(f"GGUF version {version}; only 2 and 3 are supported")
        tensors, keys = self._number("Q"), self._number("Q")
        for count, what in ((tensors, "tensors"), (keys, "keys")):
            if count > MAX_ENTRIES:
                raise self._error(f"a header with {count} {what}; the limit is {MAX_ENTRIES}")
        return tensors, keys

    def metadata(self, keys: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(keys):
            key = self._name()
            if key in found:
                raise self._error(f"the key {key!r} occurs twice")
            found[key] = self._value(key)
        return found

    def entries(self, tensors: int, metadata: dict[str, Any]) -> dict[str, Entry]:
        raw: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name = self._name()
            if name in raw:
                raise self._error(f"the tensor {name!r} occurs twice")
            if (dimensions := self._number("I")) > MAX_DIMENSIONS:
                raise self._error(f"tensor {name!r} has {dimensions} dimensions; the limit is {MAX_DIMENSIONS}")
            shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
            raw[name] = (shape, self._number("I"), self._number("Q"))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"general.alignment is {alignment!r}, not a power of 2")
        data = -(-self._at // alignment) * alignment
        return {
            name: self._entry(name, shape, number, data + offset) for name, (shape, number, offset) in raw.items()
        }

    def _entry(self, name: str, shape: tuple[int, ...], number: int, begin: int) -> Entry:
        gguf = load_gguf(self._path)
        try:
            kind = gguf.GGMLQuantizationType(number)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise self._error(
                f"tensor {name!r} is of type {number}, which the gguf package does not know"
            ) from None
        if not 0 < (count := numel(shape)) <= MAX_NUMEL:
            raise self._error(f"tensor {name!r} of shape {list(shape)} has no elements, or more than 2^53 - 1")
        if (row := shape[-1] if shape else 1) % block:
            raise self._error(
                f"tensor {name!r}: rows of {row} are not a multiple of the block size of {kind.name} ({block})"
            )
        if (end := begin + count // block * block_bytes) > self._storage.size:
            raise self._error(
                f"tensor {name!r} ends at byte {end}, but the file has {self._storage.size} bytes: truncated?"
            )
        return Entry(kind, shape, begin, block, block_bytes)

    def _value(self, key: str) -> Any:
        kind = self._number("I")
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            length = self._number("Q")
            if length > MAX_TEXT:
                self._skip(length)
                return None
            return self._text(length)
        if kind != _ARRAY:
            raise self._error(f"the key {key!r} has the unknown type {kind}")
        kind, count = self._number("I"), self._number("Q")
        if kind in _SCALARS:
            self._skip(count * struct.calcsize(_SCALARS[kind]))
        elif kind == _STRING:
            for _ in range(count):  # at most until the end of the file
                self._skip(self._number("Q"))
        else:
            raise self._error(f"the key {key!r} is a list of the unknown type {kind}")
        return None

    def _name(self) -> str:
        if (length := self._number("Q")) > MAX_TEXT:
            raise self._error(f"a name of {length} bytes at byte {self._at}; the limit is {MAX_TEXT}")
        return self._text(length)

    def _text(self, length: int) -> str:
        at = self._at
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self._error(f"the text at byte {at} is not UTF-8") from None

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(code)))[0]

    def _take(self, count: int) -> bytes:
        """The next bytes; at most the size of the window."""
        begin = self._at
        self._skip(count)
        if not self._begin <= begin <= self._at <= self._begin + len(self._window):
            window = bytearray(min(_WINDOW, self._storage.size - begin))
            self._storage.read_into(begin, memoryview(window))
            self._window, self._begin = bytes(window), begin
        return self._window[begin - self._begin : self._at - self._begin]

    def _skip(self, count: int) -> None:
        if count > self._storage.size - self._at:
            raise self._error(f"it ends at byte {self._storage.size}, within its header: truncated?")
        self._at += count

    def _error(self, reason: str) -> SourceError:
        return SourceError(f"{self._path}: {reason}")


def load_gguf(path: Path) -> Any:
    """The gguf package.

    Raises:
        SourceError: it is not installed.
    """
    with optional_import(f"{path}: GGUF files need the gguf package", "gguf"):
        import gguf
    return gguf
