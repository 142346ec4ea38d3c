"""Updates as products of small matrices; each computes any rows of the dense update without the others.

The scale is multiplied into a factor. ``rows`` times ``columns`` is the size of the weight, whatever its shape.

A layer's kind is not in the files, but follows from the shapes: ``down`` (``lora_A``) is ``[r, in]`` of a linear layer or
``[r, in, *kernel]`` of a convolution, ``up`` (``lora_B``) is ``[out, r]`` or ``[out, r, 1, ...]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.lora.base import Update


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
    """A change that is held in full: ``values`` is ``[rows, columns]``."""

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
    """``(up_1 @ down_1) * (up_2 @ down_2)``, elementwise: LoHa (arXiv 2108.06098, proposition 2)."""

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
    """Updates stacked along rows, of one dtype and equal ``columns``: experts, or the parts of a fused projection."""

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


def common_dtype(*factors: Array) -> np.dtype[Any]:
    """float64 if a factor is, else float32."""
    return np.dtype(np.float64 if any(factor.dtype == np.float64 for factor in factors) else np.float32)


def scale_factor(factor: Array, scale: float, dtype: np.dtype[Any]) -> Array:
    """``factor * scale`` in ``dtype``; an overflow is reported when the update is computed."""
    with np.errstate(over="ignore"):
        return np.asarray(factor.astype(dtype) * np.asarray(scale).astype(dtype))


def low_rank(name: str, shape: tuple[int, ...], up: Array, down: Array, scale: float, where: str) -> LowRank:
    """``scale * up @ down`` as the update of a weight that is stored as ``[out, in]`` or ``[out, in, *kernel]``.

    A linear layer's factors fit a convolution of kernel 1, and the other way round: both are the same matrix.

    Args:
        name: of the weight in the base.
        shape: its shape there.
        up: ``[out, r]``, maybe with a kernel of ones.
        down: ``[r, in]`` or ``[r, in, *kernel]``.
        scale: of the product.
        where: file and module, for messages.

    Raises:
        SourceError: the shapes do not fit each other, or not the weight.
    """
    rank_up, rank_down = up.shape[1] if up.ndim > 1 else 0, down.shape[0] if down.ndim > 1 else 0
    if not rank_up or rank_up != rank_down or math.prod(up.shape[2:]) != 1:
        raise SourceError(
            f"{where}: factors of shapes {list(up.shape)} and {list(down.shape)} do not fit each other"
        )
    check_shape((up.shape[0], *down.shape[1:]), name, shape, where)
    dtype = common_dtype(up, down)
    return LowRank(
        name, shape,
        np.ascontiguousarray(scale_factor(up.reshape(up.shape[0], -1), scale, dtype)),
        np.ascontiguousarray(down.reshape(down.shape[0], -1).astype(dtype)),
    )  # fmt: skip


def check_shape(update: tuple[int, ...], name: str, shape: tuple[int, ...], where: str) -> None:
    """Whether an update of this shape fits the weight, but for a kernel of ones.

    Raises:
        SourceError: it does not.
    """
    if without_unit_kernel(update) != without_unit_kernel(shape):
        raise SourceError(
            f"{where}: updates a weight of shape {list(update)}, the base's {name!r} has {list(shape)}"
        )


def without_unit_kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    """``shape`` without a kernel of ones: what a convolution of kernel 1 shares with a linear layer."""
    return shape[:2] if math.prod(shape[2:]) == 1 else shape


def transposed(update: LowRank, shape: tuple[int, ...]) -> LowRank:
    """The update of the transposed matrix, ``[in, out]``."""
    return LowRank(update.name, shape, np.ascontiguousarray(update.down.T), np.ascontiguousarray(update.up.T))


def fits_shapes(shape: tuple[int, ...], up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    """Whether the product of factors of shapes ``up``, ``[out, r, ...]``, and ``down``, ``[r, in, ...]``, fits a weight.

    The weight may be stored as ``[in, out]``. For choosing between weights: :func:`low_rank` checks more.
    """
    if len(up) < 2 or len(down) < 2 or not shape or not down[0]:
        return True
    columns = math.prod(down) // down[0]
    return math.prod(shape) == up[0] * columns and shape[0] in (up[0], columns)


def fits_factors(shape: tuple[int, ...], up: Array, down: Array) -> bool:
    """As :func:`fits_shapes`, of the factors themselves."""
    return fits_shapes(shape, up.shape, down.shape)
