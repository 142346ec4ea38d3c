"""DeLoRA (arXiv 2503.18225): ``delta W = B @ diag(lambda / (r |A_i| |B_i|)) @ A * w``, where ``w`` are norms of the base's columns.

The rules are those of ``peft.tuners.delora``; norms of factors are 1e-4 at least. ``w`` is in the file (``delora_w_norm``).
"""

from __future__ import annotations

import numpy as np

from shira_format.errors import SourceError
from shira_format.lora.peft.tuners.common import Effect, Tuner, TunerLayer
from shira_format.lora.products import common_dtype, low_rank

_LEAST = 1e-4


def _effect(layer: TunerLayer) -> Effect:
    a, b = layer.part("delora_A", 2), layer.part("delora_B", 2)
    bound, norms = layer.part("delora_lambda", 1), layer.part("delora_w_norm", 1)
    rank = layer.options.rank(layer.module)
    if a.shape[0] != rank or b.shape[1] != rank or bound.size != 1 or norms.size != a.shape[1]:
        raise SourceError(
            f"{layer.where} should have rank {rank} by {layer.options.path.name}; delora_A has shape {list(a.shape)}, delora_B "
            f"{list(b.shape)}, delora_lambda {list(bound.shape)} and delora_w_norm {list(norms.shape)}"
        )
    dtype = common_dtype(a, b, bound, norms)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    sizes = np.maximum(np.linalg.norm(wide_a, axis=1), _LEAST) * np.maximum(np.linalg.norm(wide_b, axis=0), _LEAST)
    down = wide_a * (float(bound.astype(np.float64)[0]) / rank / sizes)[:, None] * norms.astype(np.float64)
    return Effect(low_rank(layer.name, layer.shape, b.astype(dtype), down.astype(dtype), 1.0, layer.where))


TUNER = Tuner(
    parts=("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
    effect=_effect,
    options=frozenset(("r", "rank_pattern")),
    harmless=frozenset(("init_weights", "delora_lambda", "lambda_pattern", "module_dropout")),
)
