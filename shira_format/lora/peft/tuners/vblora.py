"""VB-LoRA (arXiv 2405.15179): ``delta W = B @ A``, whose pieces are mixtures of the ``topk`` likeliest vectors of one bank.

The rules are those of ``peft.tuners.vblora``: the weights of a mixture are the softmax of its largest logits, or are in the file
but for the last, which completes them to 1 (``save_only_topk_weights``).
"""

from __future__ import annotations

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.lora.peft.tuners.common import Effect, Tuner, TunerLayer
from shira_format.lora.products import common_dtype, low_rank, transposed

_A, _B = "vblora_logits_A", "vblora_logits_B"
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"
_BANK = "vblora_vector_bank"


def _effect(layer: TunerLayer) -> Effect:
    bank = layer.shared.get(_BANK)
    if bank is None or bank.ndim != 2:
        raise SourceError(f"{layer.where}: the vectors ({_BANK}) are not in the file")
    made_a, made_b = _mixtures(layer, _A, bank), _mixtures(layer, _B, bank)
    down = made_a.reshape(len(made_a), -1)
    up = made_b.transpose(0, 2, 1).reshape(-1, made_b.shape[1])
    dtype = common_dtype(bank, *(array for array in layer.parts.values() if array.dtype.kind not in "iu"))
    up, down = up.astype(dtype), down.astype(dtype)
    turned = layer.is_transposed(len(up), down.shape[1])
    update = low_rank(layer.name, layer.shape[::-1] if turned else layer.shape, up, down, 1.0, layer.where)
    return Effect(transposed(update, layer.shape) if turned else update)


def _mixtures(layer: TunerLayer, part: str, bank: Array) -> Array:
    """``[m, n, length]`` in float64."""
    if layer.options["save_only_topk_weights"]:
        indices, weights = _saved(layer, part)
    else:
        indices, weights = _largest(layer, part)
    if indices.size and (int(indices.min()) < 0 or int(indices.max()) >= len(bank)):
        raise SourceError(f"{layer.where}: {part} names a vector that the bank of {len(bank)} does not have")
    return np.asarray(np.einsum("mnk,mnkl->mnl", weights, bank.astype(np.float64)[indices]))


def _saved(layer: TunerLayer, part: str) -> tuple[Array, Array]:
    indices, weights = layer.part(part + _INDICES, 3), layer.part(part + _WEIGHTS, 3).astype(np.float64)
    if indices.dtype.kind not in "iu" or weights.shape != (*indices.shape[:2], indices.shape[2] - 1):
        raise SourceError(
            f"{layer.where}: {part} has indices of shape {list(indices.shape)} and weights of shape {list(weights.shape)}"
        )
    return indices.astype(np.int64), np.concatenate([weights, 1 - weights.sum(2, keepdims=True)], axis=2)


def _largest(layer: TunerLayer, part: str) -> tuple[Array, Array]:
    logits = layer.part(part, 3).astype(np.float64)
    topk = layer.options.size("topk")
    if topk > logits.shape[2]:
        raise SourceError(f"{layer.where}: {part} has {logits.shape[2]} logits, fewer than topk {topk}")
    order = np.argsort(-logits, axis=2, kind="stable")[..., : topk + 1]
    chosen = np.take_along_axis(logits, order, 2)
    if order.shape[2] > topk and (chosen[..., topk - 1] == chosen[..., topk]).any():
        raise SourceError(
            f"{layer.where}: {part} has equal logits where the largest {topk} end: which are meant is unknown"
        )
    weights = np.exp(chosen[..., :topk] - chosen[..., :1])
    return order[..., :topk], weights / weights.sum(2, keepdims=True)


TUNER = Tuner(
    parts=tuple(part + end for part in (_A, _B) for end in (_INDICES, _WEIGHTS, "")),
    effect=_effect,
    options=frozenset(("r", "topk", "save_only_topk_weights", "num_vectors", "vector_length")),
    harmless=frozenset(("vblora_dropout", "init_vector_bank_bound", "init_logits_std")),
    shared=(_BANK,),
)
