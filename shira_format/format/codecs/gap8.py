"""``gap8``: each gap as ``gap // 255`` bytes of 255 and one byte ``gap % 255`` (spec, section 5.1)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from shira_format._core.arrays import Array, Indices
from shira_format.format.codecs.base import Encoded
from shira_format.format.codecs.gaps import GapCodec, check_count, gaps_by_chunks

# Bytes decoded at a time: the int32 sums of a chunk fit a first-level cache.
CHUNK = 1 << 14


class Gap8(GapCodec):
    """Near the entropy bound at 1 % density: 8.67 bits an entry; the bound is 8.08."""

    name = "gap8"
    end_below = 255

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
        return self.encoded(indices, stream, starts, block_size)

    def decode_compiled(self, kernels: Any, stream: Array, indices: Indices, elements: int) -> bool:
        found = kernels.decode_gap8(stream, indices)
        return bool(found == indices.size and not (stream.size and stream[-1] == 255))

    def decode_plainly(self, stream: Array, is_end: npt.NDArray[np.bool_], nnz: int, elements: int) -> Indices:
        check_count(stream, int(np.count_nonzero(is_end)), nnz, self.end_below)
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
        return indices
