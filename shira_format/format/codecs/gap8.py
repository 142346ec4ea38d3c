"""``gap8``: each gap as ``gap // 255`` bytes of 255 and one byte ``gap % 255`` (spec, section 5.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format._core.compiled import loaded
from shira_format.errors import FormatError
from shira_format.format.codecs.base import Encoded
from shira_format.format.codecs.blocks import check_blocks, check_offsets, gaps_by_chunks, make_blocks

# Bytes decoded at a time: the chunk's int32 sums stay in the first-level caches.
CHUNK = 1 << 14


class Gap8:
    """Near the entropy bound at 1 % density: 8.67 bits an entry against 8.08."""

    name = "gap8"
    stream = "U8"
    blocks = True
    counted = False

    def size(self, indices: Indices, shape: tuple[int, ...]) -> int | None:
        return indices.size + sum(int(np.sum(gaps[gaps >= 255] // 255)) for _, gaps in gaps_by_chunks(indices))

    def encode(self, indices: Indices, shape: tuple[int, ...], block_size: int) -> Encoded:
        stream = np.empty(self.size(indices, shape) or 0, np.uint8)
        starts, at = [], 0  # of every block's first code, and of the next chunk's
        for first, gaps in gaps_by_chunks(indices):
            last = gaps.astype(np.uint8)
            wide = np.flatnonzero(gaps >= 255)  # few, at the densities that this codec is for
            escapes, last[wide] = np.divmod(gaps[wide], 255)
            lengths = np.diff(wide, prepend=0, append=gaps.size)
            ends = np.arange(at, at + gaps.size)
            ends += np.repeat(np.concatenate([[0], np.cumsum(escapes)]), lengths)
            stop = int(ends[-1]) + 1
            stream[at:stop] = 255
            stream[ends] = last
            heads = np.arange(-first % block_size, gaps.size, block_size)
            starts.append(np.where(heads > 0, ends[heads - 1] + 1, at))
            at = stop
        blocks = make_blocks(indices, starts, block_size)
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
        if nnz > stream.size:
            raise FormatError("stream-truncated", f"{stream.size} bytes cannot hold {nnz} entries")
        if (kernels := loaded()) is not None:
            indices = np.empty(nnz, np.int64)
            _check_count(stream, kernels.decode_gap8(stream, indices), nnz)
            if blocks is not None:
                check_offsets(blocks, stream.size)
                if kernels.false_block(stream, blocks, indices, params["block_size"], 255) >= 0:
                    check_blocks(blocks, indices, stream != 255, params["block_size"])  # says which, and how
            return indices
        is_end = stream != 255
        _check_count(stream, int(np.count_nonzero(is_end)), nnz)
        indices = np.empty(nnz, np.int64)
        at, done = -1, 0
        for start in range(0, stream.size, CHUNK):
            ends = is_end[start : start + CHUNK]
            # A byte v < 255 moves on by v + 1, a byte of 255 by 255; the entry is where the move ends.
            moves = np.cumsum(stream[start : start + CHUNK] + ends.astype(np.uint8), dtype=np.int32)
            entries = moves[ends]
            np.add(entries, at, out=indices[done : done + entries.size], dtype=np.int64)
            done += entries.size
            at += int(moves[-1])
        if blocks is not None:
            check_blocks(blocks, indices, is_end, params["block_size"])
        return indices


def _check_count(stream: Array, found: int, nnz: int) -> None:
    if found < nnz:
        raise FormatError("stream-truncated", f"the stream ends after {found} of {nnz} entries")
    if found > nnz or (stream.size and stream[-1] == 255):
        raise FormatError("stream-trailing", f"bytes follow after the last of {nnz} entries")
