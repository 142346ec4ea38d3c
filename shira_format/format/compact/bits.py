"""Bits in front of a coded stream: its tables and how many words each block has."""

from __future__ import annotations

from shira_format._core.arrays import Array
from shira_format.errors import FormatError

_MOST = 1 << 16  # bytes that tables and contexts take at most
_VARINT = 5  # bytes of a count at most


class BitWriter:
    """Numbers of given widths, the lowest bit first."""

    def __init__(self) -> None:
        self._value = 0
        self._size = 0

    def put(self, value: int, width: int) -> None:
        """Append ``value``, of ``width`` bits."""
        assert 0 <= value < 1 << width
        self._value |= value << self._size
        self._size += width

    def bytes(self) -> bytes:
        """All of them, filled up to whole bytes with bits of 0."""
        return self._value.to_bytes(-(-self._size // 8), "little")


class BitReader:
    """What :class:`BitWriter` wrote, from the start of a stream."""

    def __init__(self, stream: Array) -> None:
        self._data = stream[:_MOST].tobytes()
        self._at = 0

    def take(self, width: int) -> int:
        """The next ``width`` bits.

        Raises:
            FormatError: the stream ends before.
        """
        first, end = self._at // 8, self._at + width
        if end > 8 * len(self._data):
            raise FormatError("stream-truncated", "ends within its tables")
        value = int.from_bytes(self._data[first : -(-end // 8)], "little") >> self._at % 8
        self._at = end
        return value & ((1 << width) - 1)

    def ahead(self, width: int) -> int:
        """The next ``width`` bits, which are not taken yet; 0 for those that the stream lacks."""
        data = self._data[self._at // 8 : -(-(self._at + width) // 8)]
        return int.from_bytes(data, "little") >> self._at % 8

    def skip(self, width: int) -> None:
        """Take so many bits; see :meth:`take`."""
        if self._at + width > 8 * len(self._data):
            raise FormatError("stream-truncated", "ends within its tables")
        self._at += width

    def end(self) -> int:
        """The byte after the last one of which a bit was taken.

        Raises:
            FormatError: a bit that only fills the last byte is not 0.
        """
        if self.take(-self._at % 8):
            raise FormatError("coder", "the bits that fill the last byte of the tables are not zero")
        return self._at // 8


def varint(value: int) -> bytes:
    """Unsigned LEB128 (spec, section 5.2)."""
    code = bytearray()
    while value >= 128:
        code.append(value & 127 | 128)
        value >>= 7
    return bytes([*code, value])


def read_varints(stream: Array, at: int, count: int) -> tuple[list[int], int]:
    """``count`` numbers below 2^35 from byte ``at`` on, and where they end.

    Raises:
        FormatError: the stream ends before, or a code is longer than necessary.
    """
    if stream.size - at < count:
        raise FormatError("stream-truncated", f"{stream.size} bytes are too few for {count} counts")
    data = stream[at : at + _VARINT * count].tobytes()
    found, place = [], 0
    for _ in range(count):
        value = 0
        for shift in range(0, 7 * _VARINT, 7):
            if place == len(data):
                raise FormatError("stream-truncated", "ends within its counts")
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            if byte < 128:
                break
        else:
            raise FormatError("varint", "a count of more than 5 bytes")
        if byte == 0 and shift:
            raise FormatError("varint", "a count is longer than necessary")
        found.append(value)
    return found, at + place
