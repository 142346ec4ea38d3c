"""``varint``: each gap as an unsigned LEB128 of at most 8 bytes (spec, section 5.2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from shira_format._core.arrays import Array, Indices
from shira_format.errors import FormatError
from shira_format.format.codecs.base import Encoded
from shira_format.format.codecs.gaps import GapCodec, check_count, gaps_by_chunks, gaps_of

MAX_BYTES = 8


class Varint(GapCodec):
    """For very sparse tensors: ten entries of an embedding of 500 M elements take 40 bytes, with gap8 2 MB."""

    name = "varint"
    end_below = 128

    def size(self, indices: Indices, shape: tuple[int, ...]) -> int | None:
        size = indices.size
        for _, gaps in gaps_by_chunks(indices):
            longest = (int(gaps.max()).bit_length() + 6) // 7
            size += sum(int(np.count_nonzero(gaps >= 1 << 7 * k)) for k in range(1, longest))
        return size

    def encode(self, indices: Indices, shape: tuple[int, ...], block_size: int) -> Encoded:
        gaps = gaps_of(indices)
        lengths = _lengths(gaps)
        ends = np.cumsum(lengths) - 1
        starts = ends - lengths + 1
        stream = np.zeros(int(ends[-1]) + 1 if indices.size else 0, np.uint8)
        for k in range(int(lengths.max(initial=0))):
            longer = np.flatnonzero(lengths > k)
            more = (lengths[longer] > k + 1).astype(np.uint8) << 7
            stream[starts[longer] + k] = ((gaps[longer] >> (7 * k)) & 127).astype(np.uint8) | more
        return self.encoded(indices, stream, [starts[::block_size]], block_size)

    def decode_compiled(self, kernels: Any, stream: Array, indices: Indices, elements: int) -> bool:
        return bool(kernels.decode_varint(stream, indices, elements))

    def decode_plainly(self, stream: Array, is_end: npt.NDArray[np.bool_], nnz: int, elements: int) -> Indices:
        ends = np.flatnonzero(is_end)
        lengths = np.diff(ends, prepend=-1, append=stream.size - 1)  # the last: an unfinished code
        if (lengths > MAX_BYTES).any() or lengths[-1] == MAX_BYTES:
            raise FormatError("varint", "a code of more than 8 bytes")
        lengths = lengths[:-1]
        check_count(stream, ends.size, nnz, self.end_below)
        if ((lengths > 1) & (stream[ends] == 0)).any():
            raise FormatError("varint", "a code is longer than necessary")
        starts = ends - lengths + 1
        gaps = np.zeros(nnz, np.int64)
        for k in range(int(lengths.max(initial=0))):
            longer = np.flatnonzero(lengths > k)
            gaps[longer] |= (stream[starts[longer] + k].astype(np.int64) & 127) << (7 * k)
        # Hostile gaps could overflow the 64-bit sum; in float64 it is exact enough to see that they leave the tensor.
        if float(np.sum(gaps, dtype=np.float64)) + nnz > 2.0 * elements + 2:
            raise FormatError("out-of-range", f"the gaps lead outside a tensor of {elements} elements")
        gaps += 1
        return np.cumsum(gaps) - 1


def _lengths(gaps: Indices) -> Indices:
    """Bytes of each code: 1 for every 7 bits, rounded up, at least 1."""
    lengths = np.ones(gaps.size, np.int64)
    for k in range(1, MAX_BYTES):
        lengths += gaps >> (7 * k) > 0
    return lengths
