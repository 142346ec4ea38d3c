"""``varint``: each gap as an unsigned LEB128 of at most 8 bytes (spec, section 5.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format._core.compiled import loaded
from shira_format.errors import FormatError
from shira_format.format.codecs.base import Encoded
from shira_format.format.codecs.blocks import check_blocks, check_offsets, gaps_by_chunks, gaps_of, make_blocks
from shira_format.tensors import numel

MAX_BYTES = 8


class Varint:
    """For very sparse tensors: ten entries in an embedding of 500 M take 40 bytes, where gap8 takes 2 MB."""

    name = "varint"
    stream = "U8"
    blocks = True
    counted = False

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
        blocks = make_blocks(indices, [starts[::block_size]], block_size)
        return Encoded({"codec": self.name, "block_size": block_size}, stream, blocks)

    def decode(
        self,
        params: Mapping[str, Any],
        stream: Array | None,
        blocks: Indices | None,
        shape: tuple[int, ...],
        nnz: int,
    ) -> Indices:
        assert stream is not None
        if (kernels := loaded()) is not None and nnz <= stream.size:
            indices = np.empty(nnz, np.int64)
            if kernels.decode_varint(stream, indices, numel(shape)):
                if blocks is not None:
                    check_offsets(blocks, stream.size)
                    if kernels.false_block(stream, blocks, indices, params["block_size"], 128) >= 0:
                        check_blocks(blocks, indices, stream < 128, params["block_size"])  # says which, and how
                return indices
        # What is wrong, if something is, is said below.
        is_end = stream < 128
        ends = np.flatnonzero(is_end)
        lengths = np.diff(ends, prepend=-1, append=stream.size - 1)  # the last: an unfinished code
        if (lengths > MAX_BYTES).any() or lengths[-1] == MAX_BYTES:
            raise FormatError("varint", "a code of more than 8 bytes")
        lengths = lengths[:-1]
        if ends.size < nnz:
            raise FormatError("stream-truncated", f"the stream ends after {ends.size} of {nnz} entries")
        if ends.size > nnz or (stream.size and not is_end[-1]):
            raise FormatError("stream-trailing", f"bytes follow after the last of {nnz} entries")
        if ((lengths > 1) & (stream[ends] == 0)).any():
            raise FormatError("varint", "a code is longer than it has to be")
        starts = ends - lengths + 1
        gaps = np.zeros(nnz, np.int64)
        for k in range(int(lengths.max(initial=0))):
            longer = np.flatnonzero(lengths > k)
            gaps[longer] |= (stream[starts[longer] + k].astype(np.int64) & 127) << (7 * k)
        # Hostile gaps could overflow the 64-bit sum; float64 tells well enough that they leave the tensor.
        if float(np.sum(gaps, dtype=np.float64)) + nnz > 2.0 * numel(shape) + 2:
            raise FormatError("out-of-range", f"the gaps lead outside a tensor of {numel(shape)} elements")
        gaps += 1
        indices = np.cumsum(gaps) - 1
        if blocks is not None:
            check_blocks(blocks, indices, is_end, params["block_size"])
        return indices


def _lengths(gaps: Indices) -> Indices:
    """Bytes of each code: one for every 7 bits begun, at least 1."""
    lengths = np.ones(gaps.size, np.int64)
    for k in range(1, MAX_BYTES):
        lengths += gaps >> (7 * k) > 0
    return lengths
