"""A coded stream: tables, counts and words, as bytes and back (spec, section 5.10)."""

from __future__ import annotations

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format.errors import FormatError
from shira_format.format.compact.bits import BitWriter, read_varints, varint
from shira_format.format.compact.coder import Words


def write(bits: BitWriter, words: list[Words], lengths: list[int], more: list[int]) -> Array:
    """The bytes of a stream, uint8.

    Args:
        bits: what stands in front.
        words: of all blocks.
        lengths: words of each block.
        more: further counts.
    """
    front = bits.bytes() + b"".join(map(varint, lengths + more))
    return np.concatenate([np.frombuffer(front, np.uint8), *(one.astype("<u2").view(np.uint8) for one in words)])


def read(stream: Array, at: int, blocks: int, more: int = 0) -> tuple[Indices, Indices, Words]:
    """How many words each block has, ``more`` further counts, and the words.

    Args:
        stream: uint8, all of it.
        at: where the counts begin.
        blocks: how many there are.
        more: how many further counts.

    Raises:
        FormatError: the stream is shorter or longer than they say.
    """
    found, end = read_varints(stream, at, blocks + more)
    lengths, others = np.array(found[:blocks], np.int64), np.array(found[blocks:], np.int64)
    if (lengths < 2).any():
        raise FormatError("coder-state", "a block has fewer than two words")
    expected, left = 2 * int(lengths.sum()), stream.size - end
    if left != expected:
        rule = "stream-truncated" if left < expected else "stream-trailing"
        raise FormatError(rule, f"{left} bytes follow the counts, which say {expected}")
    return lengths, others, np.frombuffer(stream[end:].tobytes(), "<u2").astype(np.uint16)
