"""GraLoRA (arXiv 2505.20355): a weight in ``k x k`` blocks, each with low-rank factors of its own, and maybe a LoRA of the whole.

The rules are those of ``peft.tuners.gralora``: ``gralora_A`` is ``[k, in / k, r]``, ``gralora_B`` is ``[k, r, out / k]``, ``q = r / k``;
block ``(s, n)`` is ``B[s, n q : (n + 1) q]^T @ A[n, :, s q : (s + 1) q]^T``, and the scale ``alpha / (r + hybrid_r)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.lora.base import Update
from shira_format.lora.peft.tuners.common import Effect, Tuner, TunerLayer
from shira_format.lora.products import common_dtype

_GENERAL = ("gralora_A_general.weight", "gralora_B_general.weight")


@dataclass(frozen=True)
class BlockLowRank:
    """``up[s, n] @ down[s, n]`` in block ``(s, n)``, plus ``general_up @ general_down``.

    Attributes:
        name, shape: of the weight, ``[rows, columns]``.
        up: ``[k, k, rows / k, q]``.
        down: ``[k, k, q, columns / k]``.
        general_up: ``[rows, h]``.
        general_down: ``[h, columns]``.
    """

    name: str
    shape: tuple[int, ...]
    up: Array
    down: Array
    general_up: Array
    general_down: Array

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.up.dtype

    @property
    def columns(self) -> int:
        return int(self.shape[1])

    def tile(self, start: int, stop: int, out: Array) -> None:
        np.matmul(self.general_up[start:stop], self.general_down, out=out)
        count, height = len(self.up), self.up.shape[2]
        for block in range(start // height, -(-stop // height)):
            low, high = max(start, block * height), min(stop, (block + 1) * height)
            made = self.up[block, :, low - block * height : high - block * height] @ self.down[block]
            part = out[low - start : high - start].reshape(high - low, count, -1)
            part += made.transpose(1, 0, 2)


def _effect(layer: TunerLayer) -> Effect:
    a, b = layer.part("gralora_A", 3), layer.part("gralora_B", 3)
    k, inner, rank = a.shape
    if b.shape[:2] != (k, rank) or not k or not rank or rank % k or k != layer.options.size("gralora_k"):
        raise SourceError(
            f"{layer.where}: gralora_A of shape {list(a.shape)} and gralora_B of {list(b.shape)} do not fit each other and gralora_k"
        )
    hybrid = layer.options["hybrid_r"] or 0
    if rank != layer.options.size("r") or not isinstance(hybrid, int):
        raise SourceError(
            f"{layer.where} should have rank {layer.options['r']} by {layer.options.path.name}, and has {rank}"
        )
    outputs, inputs = k * b.shape[2], k * inner
    general = (
        [layer.part(name, 2) for name in _GENERAL] if hybrid else [np.zeros((0, inputs)), np.zeros((outputs, 0))]
    )
    if (general[0].shape, general[1].shape) != ((hybrid, inputs), (outputs, hybrid)) or (
        not hybrid and any(name in layer.parts for name in _GENERAL)
    ):
        raise SourceError(f"{layer.where}: its general factors do not fit hybrid_r {hybrid}")
    turned = layer.is_transposed(outputs, inputs)
    dtype = common_dtype(a, b) if not hybrid else common_dtype(a, b, *general)
    scale = layer.options.number("alpha") / (rank + hybrid)
    q = rank // k
    # [s, n, out / k, q] and [s, n, q, in / k].
    up = b.astype(np.float64).reshape(k, k, q, -1).transpose(0, 1, 3, 2) * scale
    down = a.astype(np.float64).reshape(k, inner, k, q).transpose(2, 0, 3, 1)
    high, wide = general[1].astype(np.float64) * scale, general[0].astype(np.float64)
    if turned:
        up, down = (array.transpose(1, 0, 3, 2) for array in (down, up))
        high, wide = wide.T, high.T
    update: Update = BlockLowRank(
        layer.name, layer.shape, *(np.ascontiguousarray(array.astype(dtype)) for array in (up, down, high, wide))
    )
    return Effect(update)


TUNER = Tuner(
    parts=("gralora_A", "gralora_B", *_GENERAL),
    effect=_effect,
    options=frozenset(("r", "alpha", "gralora_k", "hybrid_r")),
    harmless=frozenset(("init_weights", "gralora_dropout")),
)
