"""RoAD (arXiv 2409.00119): pairs of outputs are rotated and scaled, the bias with them: ``W' = R W`` and ``b' = R b``.

The rules are those of ``peft.tuners.road``. In each group of outputs, output ``j`` of the first half is paired with output ``j`` of
the second: ``y1 = f1 x1 - s1 x2`` and ``y2 = f2 x2 + s2 x1``, where ``f = alpha cos(theta)`` and ``s = alpha sin(theta)``, with one
angle for both (``road_1``), one each (``road_2``), or one for each ``f`` and each ``s`` (``road_4``).
"""

from __future__ import annotations

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.lora.from_base import StoredBlocks, output_map
from shira_format.lora.peft.tuners.common import Effect, Tuner, TunerLayer
from shira_format.lora.products import common_dtype


def _effect(layer: TunerLayer) -> Effect:
    theta, alpha = layer.part("road_theta", 1), layer.part("road_alpha", 1)
    if len(layer.shape) != 2:
        raise layer.misfit("a linear layer")
    group = layer.options.size("group_size")
    outputs = layer.shape[0]
    if group % 2 or outputs % group:
        raise SourceError(
            f"{layer.where}: {outputs} outputs are not in groups of {group}, the group_size, which must be even"
        )
    first, second = _columns(theta, alpha, group, layer)
    half = group // 2
    blocks = np.zeros((outputs // group, group, group))
    at = np.arange(half)
    blocks[:, at, at] = first[:, :half] - 1
    blocks[:, at, at + half] = -second[:, :half]
    blocks[:, at + half, at + half] = first[:, half:] - 1
    blocks[:, at + half, at] = second[:, half:]
    dtype = common_dtype(theta, alpha)
    update = output_map(layer.name, layer.shape, layer.base, StoredBlocks(blocks), dtype)
    return Effect(update, bias=_bias(blocks, layer))


def _columns(theta: Array, alpha: Array, group: int, layer: TunerLayer) -> tuple[Array, Array]:
    """``f`` and ``s``, ``[groups, group]`` in float64."""
    variant = layer.options["variant"]
    per_group = {"road_1": group // 2, "road_2": group, "road_4": 2 * group}.get(variant)
    if per_group is None:
        raise SourceError(f"{layer.options.path}: variant {variant!r} is none of road_1, road_2 and road_4")
    groups = layer.shape[0] // group
    if theta.size != groups * per_group or alpha.size != theta.size:
        raise SourceError(
            f"{layer.where}: road_theta has {theta.size} numbers and road_alpha {alpha.size}, {variant} of {layer.shape[0]} outputs "
            f"has {groups * per_group}"
        )
    angles, sizes = (array.astype(np.float64).reshape(groups, per_group) for array in (theta, alpha))
    first, second = sizes * np.cos(angles), sizes * np.sin(angles)
    if variant == "road_1":
        return np.tile(first, 2), np.tile(second, 2)
    return (first, second) if variant == "road_2" else (first[:, :group], second[:, group:])


def _bias(blocks: Array, layer: TunerLayer) -> Array | None:
    if layer.bias not in layer.base:
        return None
    bias = layer.base[layer.bias].astype(np.float64)
    if bias.shape != layer.shape[:1]:
        raise SourceError(f"{layer.where}: the base's {layer.bias!r} has shape {list(bias.shape)}, not {list(layer.shape[:1])}")  # fmt: skip
    return np.asarray(np.einsum("kij,kj->ki", blocks, bias.reshape(blocks.shape[:2])).reshape(-1))


TUNER = Tuner(parts=("road_theta", "road_alpha"), effect=_effect, options=frozenset(("variant", "group_size")))
