"""LoHa (arXiv 2108.06098): ``delta W = alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b)``, with cores for convolutions.

The rules are those of ``peft.tuners.loha``; forward pass and merge agree there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.lora.peft.tuners.common import Effect, Tuner, TunerLayer
from shira_format.lora.products import Hadamard, LowRank, common_dtype
from shira_format.lora.tucker import with_core
from shira_format.tensors import numel

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


def _effect(layer: TunerLayer) -> Effect:
    factors = [layer.part(name, 2) for name in _FACTORS]
    cores = [layer.parts.get(name) for name in _CORES]
    if (cores[0] is None) != (cores[1] is None):
        raise SourceError(f"{layer.where} has one of hada_t1 and hada_t2 only")
    rank = layer.options.rank(layer.module)
    scale = layer.options.by_pattern("alpha_pattern", layer.module, layer.options.number("alpha")) / rank
    dtype = common_dtype(*factors, *(core for core in cores if core is not None))
    halves = [
        _half(layer, rank, up, down, core, factor, dtype)
        for up, down, core, factor in (
            (factors[0], factors[1], cores[0], scale), (factors[2], factors[3], cores[1], 1.0),
        )
    ]  # fmt: skip
    return Effect(Hadamard(*halves))


def _half(
    layer: TunerLayer, rank: int, up: Array, down: Array, core: Array | None, scale: float, dtype: np.dtype[Any]
) -> LowRank:
    if core is not None:
        made = with_core(core, down, layer.where)
        up, down = up.T, made.reshape(len(made), -1)
    if up.shape[1] != rank or down.shape[0] != rank:
        raise SourceError(
            f"{layer.where} should have rank {rank} by {layer.options.path.name}, its factors have shapes {list(up.shape)} and "
            f"{list(down.shape)}"
        )
    if len(layer.shape) < 2 or (up.shape[0], down.shape[1]) != (layer.shape[0], numel(layer.shape[1:])):
        raise layer.misfit(f"a weight of {up.shape[0]} rows and {down.shape[1]} columns")
    return LowRank(
        layer.name, layer.shape, np.ascontiguousarray((up.astype(np.float64) * scale).astype(dtype)),
        np.ascontiguousarray(down.astype(dtype)),
    )  # fmt: skip


TUNER = Tuner(
    parts=(*_FACTORS, *_CORES),
    effect=_effect,
    options=frozenset(("r", "alpha", "rank_pattern", "alpha_pattern")),
    harmless=frozenset(("init_weights", "rank_dropout", "module_dropout", "use_effective_conv2d")),
)
