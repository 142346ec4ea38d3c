"""The block directory of the gap codecs (spec, section 5.3)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from shira_format._core.arrays import Indices
from shira_format.errors import FormatError

_CHUNK = 1 << 16  # entries


def gaps_of(indices: Indices, before: int = -1) -> Indices:
    """``x_0, x_1 - x_0 - 1, ...``: how many positions each entry skips; ``before`` is the index before the first one."""
    gaps = np.diff(indices, prepend=np.int64(before))
    gaps -= 1
    return gaps


def gaps_by_chunks(indices: Indices) -> Iterator[tuple[int, Indices]]:
    """:func:`gaps_of` in chunks that stay in the caches, each with the place of its first entry."""
    before = -1
    for start in range(0, indices.size, _CHUNK):
        chunk = indices[start : start + _CHUNK]
        yield start, gaps_of(chunk, before)
        before = int(chunk[-1])


def block_count(nnz: int, block_size: int | None) -> int:
    """Rows of the directory; 0 if there is none."""
    return 0 if block_size is None or nnz <= block_size else -(-nnz // block_size)


def make_blocks(indices: Indices, starts: list[Indices], block_size: int) -> Indices | None:
    """The directory, int64 ``[blocks, 2]``, from the offset of each block's first code; None if one block is enough."""
    if not block_count(indices.size, block_size):
        return None
    return np.stack([indices[::block_size], np.concatenate(starts)], axis=1)


def check_offsets(blocks: Indices, size: int) -> None:
    """Raise unless the offsets rise from 0 within a stream of ``size`` bytes."""
    offsets = blocks[:, 1]
    # Compared, not subtracted: a difference of hostile offsets could overflow.
    if offsets[0] != 0 or (offsets[1:] <= offsets[:-1]).any() or offsets[-1] >= size:
        raise FormatError("block-directory", "offsets do not rise from 0 within the stream")


def check_blocks(blocks: Indices, indices: Indices, is_end: npt.NDArray[np.bool_], block_size: int) -> None:
    """Raise unless the directory says the truth about decoded ``indices`` and the last bytes of their codes."""
    check_offsets(blocks, is_end.size)
    offsets = blocks[:, 1]
    counts = np.add.reduceat(is_end, offsets, dtype=np.int64)
    lies = np.flatnonzero((counts[:-1] != block_size) | ~is_end[offsets[1:] - 1])
    if lies.size:
        row = int(lies[0]) + 1
        raise FormatError(
            "block-directory", f"row {row} says offset {offsets[row]}, which is not where its entry starts"
        )
    lies = np.flatnonzero(blocks[:, 0] != indices[::block_size])
    if lies.size:
        row = int(lies[0])
        raise FormatError(
            "block-directory",
            f"row {row} says first index {blocks[row, 0]}, decoded {indices[row * block_size]}",
        )
