"""``flat``: the indices as int64, which any tool can write (spec, section 5.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format.format.codecs.base import Encoded, IndexCodec, Streams


class Flat(IndexCodec):
    """8 bytes an entry; never smaller than ``varint``, so our writer does not choose it."""

    name = "flat"
    bytewise = True

    def streams(self, params: Mapping[str, Any], nnz: int) -> Streams:
        return {"indices": ("I64", (nnz,))}

    def size(self, indices: Indices, shape: tuple[int, ...]) -> int | None:
        return indices.nbytes

    def encode(self, indices: Indices, shape: tuple[int, ...], block_size: int) -> Encoded:
        return Encoded({"codec": self.name}, indices)

    def decode(self, stored: Encoded, shape: tuple[int, ...], nnz: int, base: Array | None = None) -> Indices:
        assert stored.stream is not None
        return stored.stream.astype(np.int64, copy=False)
