"""The block directory of the gap codecs (spec, section 5.3)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shira_format._core.arrays import Indices
from shira_format.errors import FormatError


def block_count(nnz: int, block_size: int | None) -> int:
    """Rows of the directory; 0 if there is none."""
    return 0 if block_size is None or nnz <= block_size else -(-nnz // block_size)


def make_blocks(indices: Indices, starts: list[Indices], block_size: int) -> Indices | None:
    """The directory, int64 ``[blocks, 2]``, from the offset of each block's first code; None if one block is enough."""
    if not block_count(indices.size, block_size):
        return None
    return np.stack([indices[::block_size], np.concatenate(starts)], axis=1)


def check_offsets(blocks: Indices, size: int) -> None:
    """Raise FormatError unless the offsets increase strictly from 0 within a stream of ``size`` bytes."""
    offsets = blocks[:, 1]
    # Compared, not subtracted: a difference of hostile offsets could overflow.
    if offsets[0] != 0 or (offsets[1:] <= offsets[:-1]).any() or offsets[-1] >= size:
        raise FormatError("block-directory", "the offsets do not increase from 0 within the stream")


def check_blocks(blocks: Indices, indices: Indices, is_end: npt.NDArray[np.bool_], block_size: int) -> None:
    """Raise FormatError unless the directory agrees with the decoded ``indices`` and with where their codes end."""
    check_offsets(blocks, is_end.size)
    offsets = blocks[:, 1]
    counts = np.add.reduceat(is_end, offsets, dtype=np.int64)
    wrong = np.flatnonzero((counts[:-1] != block_size) | ~is_end[offsets[1:] - 1])
    if wrong.size:
        row = int(wrong[0]) + 1
        raise FormatError(
            "block-directory", f"row {row} has offset {offsets[row]}, which is not where its entry starts"
        )
    wrong = np.flatnonzero(blocks[:, 0] != indices[::block_size])
    if wrong.size:
        row = int(wrong[0])
        raise FormatError(
            "block-directory",
            f"row {row} has first index {blocks[row, 0]}, decoded {indices[row * block_size]}",
        )
