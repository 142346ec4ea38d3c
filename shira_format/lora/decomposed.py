"""Weight-decomposed updates (DoRA, arXiv 2402.09353): the tuned weight is ``magnitude * (W + U) / norm(W + U)``.

The change depends on the base's weights, which are read in tiles.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint
from shira_format.lora.base import Update
from shira_format.lora.from_base import joint_dtype, read_rows
from shira_format.tensors import numel

_TILE = 1 << 18  # elements at a time for the norms of columns


@dataclass(frozen=True)
class Decomposed:
    """The change that brings ``W`` to ``magnitude * (W + update) / (norm(W + update) + eps)``.

    Attributes:
        update: added to the weight before the scaling.
        base: the checkpoint that has the weight.
        magnitude: the target norms, in ``update.dtype``: ``[rows]``, or with ``by_column`` ``[columns / kernel]``.
        by_column: whether norms are over columns (``[in, out]`` weights; LyCORIS if it scales inputs), not over rows.
        kernel: number of consecutive columns that share a norm: the size of a convolution's kernel.
        eps: added to each norm.
    """

    update: Update
    base: Checkpoint
    magnitude: Array
    by_column: bool = False
    kernel: int = 1
    eps: float = 0.0
    _norms: list[Array] = field(default_factory=list, init=False, repr=False, compare=False)
    _lock: Any = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.update.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.update.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return joint_dtype(self.base, self.name, self.update.dtype)

    @property
    def columns(self) -> int:
        return self.update.columns

    def tile(self, start: int, stop: int, out: Array) -> None:
        # First, since computing them uses the buffer in which the rows of W are kept until the end.
        columns = self._column_norms() + self.eps if self.by_column else None
        weight = self._sum(start, stop, out)
        with np.errstate(divide="ignore", invalid="ignore"):  # a norm of zero is reported later, as NaN or Inf
            if columns is not None:
                out *= np.repeat(self.magnitude / columns, self.kernel).astype(out.dtype)
            else:
                norms = np.sqrt(np.einsum("ij,ij->i", out, out, dtype=np.float64)) + self.eps
                out *= (self.magnitude[start:stop] / norms).astype(out.dtype)[:, None]
        out -= weight

    def _sum(self, start: int, stop: int, out: Array) -> Array:
        """Fill ``out`` with rows of ``W + U``; returns those of ``W``, in a buffer of this thread."""
        self.update.tile(start, stop, out)
        weight = read_rows(self.base, self.name, self.columns, start, stop, out.dtype)
        out += weight
        return weight

    def _column_norms(self) -> Array:
        """``[columns / kernel]`` in float64; computed once, in a pass over the whole weight."""
        with self._lock:
            if not self._norms:
                rows, step = numel(self.shape) // self.columns, max(1, _TILE // self.columns)
                squares = np.zeros(self.columns, np.float64)
                out = np.empty((step, self.columns), self.dtype)
                for start in range(0, rows, step):
                    tile = out[: min(step, rows - start)]
                    self._sum(start, start + len(tile), tile)
                    squares += np.einsum("ij,ij->j", tile, tile, dtype=np.float64)
                self._norms.append(np.sqrt(squares.reshape(-1, self.kernel).sum(1)))
            return self._norms[0]
