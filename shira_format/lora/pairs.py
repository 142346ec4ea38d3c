"""Two factors of a layer as an update of the base's weight, whatever kind of layer it is.

A layer's kind is not in the files. The shapes tell: ``down`` (``lora_A``) is ``[r, in]`` of a linear layer or
``[r, in, *kernel]`` of a convolution, ``up`` (``lora_B``) is ``[out, r]`` or ``[out, r, 1, ...]``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.lora.products import LowRank


def common_dtype(*factors: Array) -> np.dtype[Any]:
    """float64 if a factor is, else float32."""
    return np.dtype(np.float64 if any(factor.dtype == np.float64 for factor in factors) else np.float32)


def scaled(factor: Array, scale: float, dtype: np.dtype[Any]) -> Array:
    """``factor * scale`` in ``dtype``; an overflow is found, and named, when the update is computed."""
    with np.errstate(over="ignore"):
        return np.asarray(factor.astype(dtype) * np.asarray(scale).astype(dtype))


def plain(name: str, shape: tuple[int, ...], up: Array, down: Array, scale: float, where: str) -> LowRank:
    """The update of a weight that is stored as ``[out, in]`` or ``[out, in, *kernel]``.

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
    made = (up.shape[0], *down.shape[1:])
    if trimmed(made) != trimmed(shape):
        raise SourceError(
            f"{where}: updates a weight of shape {list(made)}, the base's {name!r} has {list(shape)}"
        )
    dtype = common_dtype(up, down)
    return LowRank(
        name, shape,
        np.ascontiguousarray(scaled(up.reshape(up.shape[0], -1), scale, dtype)),
        np.ascontiguousarray(down.reshape(down.shape[0], -1).astype(dtype)),
    )  # fmt: skip


def trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without a kernel of ones: what a convolution of kernel 1 shares with a linear layer."""
    return shape[:2] if math.prod(shape[2:]) == 1 else shape


def transposed(update: LowRank, shape: tuple[int, ...]) -> LowRank:
    """The update of the transposed matrix, ``[in, out]``."""
    return LowRank(update.name, shape, np.ascontiguousarray(update.down.T), np.ascontiguousarray(update.up.T))
