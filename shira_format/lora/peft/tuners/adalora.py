"""AdaLoRA (arXiv 2303.10512): ``delta W = alpha / (init_r + 1e-5) * B @ (E * A)``.

The rules are those of ``peft.tuners.adalora``: ``lora_E`` is ``[r, 1]``. Ranks that the allocator gave up (``rank_pattern``) are not
in the file, and do not change the scale.
"""

from __future__ import annotations

import numpy as np

from shira_format.errors import SourceError
from shira_format.lora.peft.config import REFUSED
from shira_format.lora.peft.tuners.common import Effect, Options, Tuner, TunerLayer
from shira_format.lora.products import common_dtype, low_rank, transposed
from shira_format.tensors import numel

_EPS = 1e-5  # PEFT adds it to the rank


def _check(options: Options) -> None:
    if not options.number("lora_alpha") > 0:
        raise SourceError(f"{options.path}: lora_alpha must be positive: another means another scale while it is trained than when it is loaded")  # fmt: skip
    if options["init_lora_weights"] not in (None, True, False):
        raise SourceError(
            f"{options.path}: init_lora_weights={options['init_lora_weights']!r} is unknown for AdaLoRA"
        )


def _effect(layer: TunerLayer) -> Effect:
    a, b, e = layer.part("lora_A", 2), layer.part("lora_B", 2), layer.part("lora_E", 2)
    rank = _rank(layer)
    if (a.shape[0], b.shape[1], e.shape) != (rank, rank, (rank, 1)):
        raise SourceError(
            f"{layer.where} should have rank {rank} by {layer.options.path.name}; lora_A has shape {list(a.shape)}, lora_B "
            f"{list(b.shape)} and lora_E {list(e.shape)}"
        )
    if not rank:
        return Effect()
    scale = layer.options.number("lora_alpha") / (layer.options.size("init_r") + _EPS)
    down = (a.astype(np.float64) * e.astype(np.float64)).astype(common_dtype(a, b, e))
    if len(layer.shape) > 2:
        if (b.shape[0], a.shape[1]) != (layer.shape[0], numel(layer.shape[1:])):
            raise layer.misfit(f"a weight of shape {[b.shape[0], a.shape[1]]}")
        return Effect(
            low_rank(layer.name, layer.shape, b, down.reshape(rank, *layer.shape[1:]), scale, layer.where)
        )
    turned = layer.is_transposed(b.shape[0], a.shape[1])
    update = low_rank(layer.name, layer.shape[::-1] if turned else layer.shape, b, down, scale, layer.where)
    return Effect(transposed(update, layer.shape) if turned else update)


def _rank(layer: TunerLayer) -> int:
    """The rank that is left, by ``rank_pattern``: for each layer's ``lora_E``, which of its ranks were kept."""
    pattern = layer.options["rank_pattern"] or {}
    if not isinstance(pattern, dict):
        raise SourceError(f"{layer.options.path}: rank_pattern must map names to lists")
    kept = pattern.get(f"{layer.module}.lora_E", pattern.get(f"{layer.module}.lora_E.default"))
    if kept is None:
        return layer.options.size("init_r")
    if not isinstance(kept, list) or not all(isinstance(one, bool) for one in kept):
        raise SourceError(
            f"{layer.options.path}: rank_pattern of {layer.module!r} must be a list of true and false"
        )
    return sum(kept)


TUNER = Tuner(
    parts=("lora_A", "lora_B", "lora_E"),
    effect=_effect,
    options=frozenset(("lora_alpha", "init_r", "rank_pattern", "init_lora_weights")),
    # r is LoRA's; AdaLoRA ignores it.
    harmless=frozenset(
        ("r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
    ),
    refused=REFUSED
    | dict.fromkeys(
        ("use_rslora", "use_dora", "lora_bias", "alpha_pattern", "trainable_token_indices", "layer_replication", "target_parameters", "ensure_weight_tying"),
        "PEFT's AdaLoRA does not support it",
    ),
    check=_check,
)  # fmt: skip
