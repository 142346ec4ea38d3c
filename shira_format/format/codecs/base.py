"""The interface of an index codec."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from shira_format._core.arrays import Array, Indices

# Of each stream, safetensors dtype and shape; None is one dimension of any size.
Streams = dict[str, tuple[str, tuple[int, ...] | None]]


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


@dataclass(frozen=True)
class IndexRange:
    """The entries of one tensor within a range of flat indices.

    Attributes:
        first: the number of the first of them among all entries.
        indices: int64 ``[n]``.
        decoded: entries that were decoded to find them.
    """

    first: int
    indices: Indices
    decoded: int

    @property
    def last(self) -> int:
        """The number of the entry after the last."""
        return self.first + int(self.indices.size)


def cut(indices: Indices, start: int, stop: int, *, before: int = 0) -> IndexRange:
    """The entries from flat index ``start`` to ``stop`` of decoded ones, ahead of which there are ``before`` others."""
    first, last = (int(at) for at in np.searchsorted(indices, [start, stop]))
    return IndexRange(before + first, indices[first:last], int(indices.size))


class IndexCodec(ABC):
    """Indices to bytes and back; knows nothing of files, torch or models.

    Attributes:
        name: as in the manifest.
        feature: that a file with this codec must list; None: every reader knows the codec.
        bytewise: whether an entry takes at least a byte.
        own_text: a parameter that is another text for each tensor; None: tensors of one kind have the same parameters.
    """

    name: ClassVar[str]
    feature: ClassVar[str | None] = None
    bytewise: ClassVar[bool] = False
    own_text: ClassVar[str | None] = None

    def check_params(self, params: Mapping[str, Any], tensor: str) -> None:  # noqa: B027 - most have none
        """Check the manifest's ``indices`` object of the tensor named ``tensor``, as far as no stream is needed.

        Raises:
            FormatError: a parameter is missing or has another type or range.
        """

    def needs_base(self, params: Mapping[str, Any]) -> bool:
        """Whether the base's tensor is needed to decode."""
        return False

    def is_implied(self, params: Mapping[str, Any]) -> bool:
        """Whether something beside the streams tells the indices, so that the digest ``entries`` guards them."""
        return self.needs_base(params)

    def streams(self, params: Mapping[str, Any], nnz: int) -> Streams:
        """Which of the streams ``indices`` and ``blocks`` there are, with what dtypes and shapes."""
        return {}

    @abstractmethod
    def size(self, indices: Indices, shape: tuple[int, ...]) -> int | None:
        """Bytes that ``encode`` would take without the directory; None if this codec cannot hold these indices."""

    @abstractmethod
    def encode(self, indices: Indices, shape: tuple[int, ...], block_size: int) -> Encoded:
        """Encode strictly increasing int64 indices."""

    @abstractmethod
    def decode(self, stored: Encoded, shape: tuple[int, ...], nnz: int, base: Array | None = None) -> Indices:
        """The ``nnz`` indices, int64; the caller checks their order and range.

        Memory stays in proportion to ``nnz``, which the caller has compared with bytes that are in the file.

        Args:
            stored: parameters and streams.
            shape: of the tensor.
            nnz: how many indices.
            base: the base's tensor, flat, if :meth:`needs_base`.

        Raises:
            FormatError: the stream breaks a rule.
        """

    def decode_range(
        self, stored: Encoded, shape: tuple[int, ...], nnz: int, start: int, stop: int
    ) -> IndexRange | None:
        """The entries from flat index ``start`` to ``stop``, without the others; None if all have to be decoded.

        The caller checks their order and range.

        Raises:
            FormatError: the stream breaks a rule in the part that is decoded.
        """
        return None
