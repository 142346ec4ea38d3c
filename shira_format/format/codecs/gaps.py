"""What ``gap8`` and ``varint`` share: a byte stream of gaps and an optional block directory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from shira_format._core.arrays import Array, Indices
from shira_format._core.compiled import loaded
from shira_format.errors import FormatError
from shira_format.format.codecs.base import Encoded, IndexCodec, Streams
from shira_format.format.codecs.blocks import block_count, check_blocks, check_offsets, make_blocks
from shira_format.format.fields import need
from shira_format.tensors import numel

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

    def decode(self, stored: Encoded, shape: tuple[int, ...], nnz: int) -> Indices:
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
