"""LoKr (arXiv 2309.14859): ``delta W = alpha / r * kron(w1, w2)``, where a factor is whole or a product, the second also with a core.

The rules are those of ``peft.tuners.lokr``; forward pass and merge agree there. A 1-D convolution whose ``w2`` is whole has a
Kronecker product over the wrong dimensions, ``[1, a, b]`` with ``[c, d, k]``, reshaped to the weight: that is what was trained.
"""

from __future__ import annotations

import math

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.lora.peft.tuners.common import Effect, Tuner, TunerLayer
from shira_format.lora.products import Dense, Kronecker, common_dtype
from shira_format.lora.tucker import check_size, with_core
from shira_format.tensors import numel


def _effect(layer: TunerLayer) -> Effect:
    dtype = common_dtype(*layer.parts.values())
    left, right = _left(layer), _right(layer)
    rank = layer.options.rank(layer.module)
    scale = layer.options.by_pattern("alpha_pattern", layer.module, layer.options.number("alpha")) / rank
    columns = numel(layer.shape[1:])
    if right.ndim == 3:
        return Effect(_over_wrong_dimensions(layer, left * scale, right))
    matrix = right.reshape(right.shape[0], -1)
    made = (left.shape[0] * matrix.shape[0], left.shape[1] * matrix.shape[1])
    if len(layer.shape) < 2 or made != (layer.shape[0], columns):
        raise layer.misfit(f"a weight of {made[0]} rows and {made[1]} columns")
    return Effect(Kronecker(layer.name, layer.shape, (left * scale).astype(dtype), matrix.astype(dtype)))


def _left(layer: TunerLayer) -> Array:
    """``[a, b]`` in float64."""
    if "lokr_w1" in layer.parts:
        return layer.part("lokr_w1", 2).astype(np.float64)
    return _product(layer, "lokr_w1")


def _right(layer: TunerLayer) -> Array:
    """``[c, d]`` or ``[c, d, *kernel]`` in float64."""
    if "lokr_w2" in layer.parts:
        return layer.parts["lokr_w2"].astype(np.float64)
    if "lokr_t2" not in layer.parts:
        return _product(layer, "lokr_w2")
    up, down = layer.part("lokr_w2_a", 2), layer.part("lokr_w2_b", 2)
    made = with_core(layer.parts["lokr_t2"], down, layer.where)
    if len(up) != len(made):
        raise SourceError(f"{layer.where}: lokr_w2_a has shape {list(up.shape)}, which does not fit its core")
    check_size(up.shape[1] * math.prod(made.shape[1:]), layer.where)
    return np.asarray(np.tensordot(up.astype(np.float64), made, axes=(0, 0)))


def _product(layer: TunerLayer, stem: str) -> Array:
    up, down = layer.part(f"{stem}_a", 2), layer.part(f"{stem}_b", 2)
    if up.shape[1] != down.shape[0]:
        raise SourceError(
            f"{layer.where}: {stem}_a of shape {list(up.shape)} and {stem}_b of {list(down.shape)} do not fit"
        )
    check_size(up.shape[0] * down.shape[1], layer.where)
    return np.asarray(up.astype(np.float64) @ down.astype(np.float64))


def _over_wrong_dimensions(layer: TunerLayer, left: Array, right: Array) -> Dense:
    if left.size * right.size != numel(layer.shape) or len(layer.shape) != 3:
        raise layer.misfit(f"{left.size * right.size} elements")
    check_size(left.size * right.size, layer.where)
    values = np.kron(left[None], right).astype(common_dtype(*layer.parts.values()))
    return Dense(layer.name, layer.shape, values.reshape(layer.shape[0], -1))


TUNER = Tuner(
    parts=("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    effect=_effect,
    options=frozenset(("r", "alpha", "rank_pattern", "alpha_pattern")),
    harmless=frozenset(
        (
            "init_weights", "rank_dropout", "rank_dropout_scale", "module_dropout", "use_effective_conv2d", "decompose_both",
            "decompose_factor",
        )
    ),
)  # fmt: skip
