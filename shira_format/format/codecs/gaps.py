"""``gap8`` and ``varint``: a byte stream of the gaps between indices, and an optional block directory (spec, section 5)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from shira_format._core.arrays import Array, Indices
from shira_format._core.compiled import loaded
from shira_format.errors import FormatError
from shira_format.format.codecs.base import Encoded, IndexCodec, IndexRange, Streams, cut
from shira_format.format.fields import need
from shira_format.tensors import numel


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


_CHUNK = 1 << 16  # entries


def gaps_of(indices: Indices, before: int = -1) -> Indices:
    """``x_0, x_1 - x_0 - 1, ...``: how many elements each entry skips; ``before`` is the index before the first."""
    gaps = np.diff(indices, prepend=np.int64(before))
    gaps -= 1
    return gaps


def gaps_by_chunks(indices: Indices) -> Iterator[tuple[int, Indices]]:
    """:func:`gaps_of` in chunks that stay in the caches, each with the number of its first entry."""
    before = -1
    for start in range(0, indices.size, _CHUNK):
        chunk = indices[start : start + _CHUNK]
        yield start, gaps_of(chunk, before)
        before = int(chunk[-1])


class GapCodec(IndexCodec):
    """A codec of gaps.

    Attributes:
        end_below: a byte of less than this ends the code of an entry.
    """

    bytewise = True
    end_below: ClassVar[int]

    def check_params(self, params: Mapping[str, Any], tensor: str) -> None:
        if "block_size" in params and not 16 <= (size := need(params, "block_size", int, tensor)) < 2**31:
            raise FormatError("manifest-schema", f"block_size {size}", tensor=tensor)

    def streams(self, params: Mapping[str, Any], nnz: int) -> Streams:
        rows = block_count(nnz, params.get("block_size"))
        return {"indices": ("U8", None)} | ({"blocks": ("I64", (rows, 2))} if rows else {})

    def encoded(self, indices: Indices, stream: Array, starts: list[Indices], block_size: int) -> Encoded:
        """What ``encode`` returns; ``starts``: where in the stream the first code of each block begins."""
        blocks = make_blocks(indices, starts, block_size)
        return Encoded({"codec": self.name, "block_size": block_size}, stream, blocks)

    def decode(self, stored: Encoded, shape: tuple[int, ...], nnz: int, base: Array | None = None) -> Indices:
        stream, blocks, block_size = stored.stream, stored.blocks, stored.params.get("block_size", 0)
        assert stream is not None
        if (kernels := loaded()) is not None and nnz <= stream.size:
            indices = np.empty(nnz, np.int64)
            if self.decode_compiled(kernels, stream, indices, numel(shape)):
                if blocks is not None:
                    check_offsets(blocks, stream.size)
                    if kernels.false_block(stream, blocks, indices, block_size, self.end_below) >= 0:
                        check_blocks(
                            blocks, indices, stream < self.end_below, block_size
                        )  # raises with the reason
                return indices
        is_end = stream < self.end_below
        indices = self.decode_plainly(stream, is_end, nnz, numel(shape))
        if blocks is not None:
            check_blocks(blocks, indices, is_end, block_size)
        return indices

    def decode_range(
        self, stored: Encoded, shape: tuple[int, ...], nnz: int, start: int, stop: int
    ) -> IndexRange | None:
        stream, blocks = stored.stream, stored.blocks
        if blocks is None:
            return None
        assert stream is not None
        check_offsets(blocks, stream.size)
        firsts, size = blocks[:, 0], int(stored.params["block_size"])
        if firsts[0] < 0 or (firsts[1:] <= firsts[:-1]).any() or firsts[-1] >= numel(shape):
            raise FormatError("block-directory", "the first indices do not increase within the tensor")
        # The block before the first one that begins within the range may have entries of it.
        one = max(int(np.searchsorted(firsts, start, "right")) - 1, 0)
        end = max(int(np.searchsorted(firsts, stop, "left")), one + 1)
        part = blocks[one:end].copy()
        bytes_before = int(part[0, 1])
        part[:, 1] -= bytes_before
        codes = stream[bytes_before : int(blocks[end, 1]) if end < len(blocks) else stream.size]
        count = min(end * size, nnz) - one * size
        # As if these were all; the directory has the first index, in which the codes before end.
        whole = Encoded(stored.params, codes)
        indices = self.decode(whole, shape, count)
        if one == 0 and indices[0] != part[0, 0]:
            raise FormatError("block-directory", f"row 0 has first index {part[0, 0]}, decoded {indices[0]}")
        indices = indices + (part[0, 0] - indices[0])
        check_blocks(part, indices, codes < self.end_below, size)
        if indices[-1] >= (firsts[end] if end < len(blocks) else numel(shape)):
            raise FormatError("block-directory", f"row {end - 1} leads to index {indices[-1]}, past where it ends")
        return cut(indices, start, stop, before=one * size)

    @abstractmethod
    def decode_compiled(self, kernels: Any, stream: Array, indices: Indices, elements: int) -> bool:
        """Fill ``indices``; False if the stream breaks a rule, which :meth:`decode_plainly` then names."""

    @abstractmethod
    def decode_plainly(self, stream: Array, is_end: npt.NDArray[np.bool_], nnz: int, elements: int) -> Indices:
        """Decode without machine code; ``is_end``: which bytes end the code of an entry.

        Raises:
            FormatError: the stream breaks a rule.
        """


def check_count(stream: Array, found: int, nnz: int, end_below: int) -> None:
    """Raise FormatError unless ``stream`` has ``nnz`` codes, of which ``found`` bytes are the ends, and nothing else."""
    if found < nnz:
        raise FormatError("stream-truncated", f"the stream ends after {found} of {nnz} entries")
    if found > nnz or (stream.size and stream[-1] >= end_below):
        raise FormatError("stream-trailing", f"bytes follow after the last of {nnz} entries")


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
