"""The interface of an index codec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from shira_format._core.arrays import Array, Indices


@dataclass(frozen=True)
class Encoded:
    """Indices as stored: the manifest's ``indices`` object and up to two streams."""

    params: dict[str, Any]
    stream: Array | None = None
    blocks: Indices | None = None

    @property
    def stream_bytes(self) -> int:
        """Bytes in the streams, without the manifest."""
        return sum(array.nbytes for array in (self.stream, self.blocks) if array is not None)


class IndexCodec(Protocol):
    """Bytes to indices and back; knows nothing of files, torch or models.

    Attributes:
        name: as in the manifest.
        stream: safetensors dtype of the stream ``#indices``, or None if there is none.
        blocks: whether ``block_size`` asks for a block directory.
        counted: whether the stream has exactly ``nnz`` elements.
    """

    @property
    def name(self) -> str: ...
    @property
    def stream(self) -> str | None: ...
    @property
    def blocks(self) -> bool: ...
    @property
    def counted(self) -> bool: ...

    def size(self, indices: Indices, shape: tuple[int, ...]) -> int | None:
        """Bytes that ``encode`` would take, directory left out; None if this codec cannot hold these indices."""

    def encode(self, indices: Indices, shape: tuple[int, ...], block_size: int) -> Encoded:
        """Encode strictly increasing int64 indices."""

    def decode(
        self,
        params: Mapping[str, Any],
        stream: Array | None,
        blocks: Indices | None,
        shape: tuple[int, ...],
        nnz: int,
    ) -> Indices:
        """The ``nnz`` indices, int64, strictly increasing and within the tensor.

        Memory stays in proportion to ``nnz``, which the caller has compared with bytes that are in the file.

        Raises:
            FormatError: the stream breaks a rule.
        """
