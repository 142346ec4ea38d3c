"""The products of small matrices that updates are: each computes any rows of a dense update without the others.

The scale is in the factors already. ``rows`` times ``columns`` is the size of the weight, whatever its shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format.lora.update import Update


@dataclass(frozen=True)
class LowRank:
    """``up @ down``: ``up`` is ``[rows, r]``, ``down`` is ``[r, columns]``; of one dtype."""

    name: str
    shape: tuple[int, ...]
    up: Array
    down: Array

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.up.dtype

    @property
    def columns(self) -> int:
        return int(self.down.shape[1])

    def tile(self, start: int, stop: int, out: Array) -> None:
        np.matmul(self.up[start:stop], self.down, out=out)


@dataclass(frozen=True)
class Dense:
    """A change that the file holds as it is: ``values`` is ``[rows, columns]``."""

    name: str
    shape: tuple[int, ...]
    values: Array

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    @property
    def columns(self) -> int:
        return int(self.values.shape[1])

    def tile(self, start: int, stop: int, out: Array) -> None:
        out[...] = self.values[start:stop]


@dataclass(frozen=True)
class Hadamard:
    """``(up_1 @ down_1) * (up_2 @ down_2)``, entry by entry: LoHa (arXiv 2108.06098, proposition 2)."""

    first: LowRank
    second: LowRank

    @property
    def name(self) -> str:
        return self.first.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.first.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.first.dtype

    @property
    def columns(self) -> int:
        return self.first.columns

    def tile(self, start: int, stop: int, out: Array) -> None:
        self.first.tile(start, stop, out)
        out *= np.matmul(self.second.up[start:stop], self.second.down)


@dataclass(frozen=True)
class Kronecker:
    """``kron(left, right)``: LoKr. ``left`` is ``[a, b]``, ``right`` is ``[c, d]``; rows are ``a c``, columns ``b d``.

    For a convolution ``d`` is in_features times the size of the kernel, which ``left`` does not touch.
    """

    name: str
    shape: tuple[int, ...]
    left: Array
    right: Array

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.left.dtype

    @property
    def columns(self) -> int:
        return int(self.left.shape[1] * self.right.shape[1])

    def tile(self, start: int, stop: int, out: Array) -> None:
        i, p = np.divmod(np.arange(start, stop), self.right.shape[0])
        blocks = out.reshape(stop - start, self.left.shape[1], self.right.shape[1])
        np.multiply(self.left[i, :, None], self.right[p, None, :], out=blocks)


@dataclass(frozen=True)
class Stacked:
    """Updates on top of each other, of one dtype and as many columns: experts, or the parts of a fused projection."""

    name: str
    shape: tuple[int, ...]
    parts: Sequence[Update]
    heights: Sequence[int]  # rows of each part

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.parts[0].dtype

    @property
    def columns(self) -> int:
        return self.parts[0].columns

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.heights))

    def tile(self, start: int, stop: int, out: Array) -> None:
        for part, height, end in zip(self.parts, self.heights, self._ends, strict=True):
            first, last = max(start, end - height), min(stop, end)
            if first < last:
                part.tile(first - (end - height), last - (end - height), out[first - start : last - start])
