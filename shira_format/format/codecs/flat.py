"""``flat``: the indices as int64, which anyone can write with any tool (spec, section 5.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format.format.codecs.base import Encoded


class Flat:
    """8 bytes an entry; never smaller than ``varint``, so our own writer does not choose it."""

    name = "flat"
    stream = "I64"
    blocks = False
    counted = True

    def size(self, indices: Indices, shape: tuple[int, ...]) -> int | None:
        return indices.nbytes

    def encode(self, indices: Indices, shape: tuple[int, ...], block_size: int) -> Encoded:
        return Encoded({"codec": self.name}, indices)

    def decode(
        self,
        params: Mapping[str, Any],
        stream: Array | None,
        blocks: Indices | None,
        shape: tuple[int, ...],
        nnz: int,
    ) -> Indices:
        assert stream is not None
        return stream.astype(np.int64, copy=False)
