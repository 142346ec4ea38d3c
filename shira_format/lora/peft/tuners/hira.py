"""HiRA (OpenReview TwJrTz9cRS): ``delta W = W * (B @ A)``, elementwise (``peft.tuners.hira``).

Ranks only show in the factors: PEFT ignores ``rank_pattern`` for convolutions.
"""

from __future__ import annotations

import numpy as np

from shira_format._core.arrays import Array
from shira_format.lora.from_base import RowChange, joint_dtype
from shira_format.lora.peft.tuners.common import Effect, Tuner, TunerLayer
from shira_format.lora.products import LowRank, low_rank, transposed

_EMBEDDING = ("hira_embedding_A", "hira_embedding_B")


def _effect(layer: TunerLayer) -> Effect:
    factor = _factor(layer)

    def change(rows: Array, start: int, out: Array) -> None:
        np.matmul(factor.up[start : start + len(rows)], factor.down, out=out)
        out *= rows

    dtype = joint_dtype(layer.base, layer.name, factor.dtype)
    return Effect(RowChange(layer.name, layer.shape, layer.base, factor.columns, dtype, change))


def _factor(layer: TunerLayer) -> LowRank:
    """``B @ A`` as the weight is stored."""
    if any(part in _EMBEDDING for part in layer.parts):
        a, b = (layer.part(part, 2) for part in _EMBEDDING)
        return low_rank(layer.name, layer.shape, a.T, b.T, 1.0, layer.where)
    a, b = (layer.part(part, len(layer.shape)) for part in ("hira_A", "hira_B"))
    if a.ndim == 2 and layer.is_transposed(b.shape[0], a.shape[1]):
        return transposed(low_rank(layer.name, layer.shape[::-1], b, a, 1.0, layer.where), layer.shape)
    return low_rank(layer.name, layer.shape, b, a, 1.0, layer.where)


TUNER = Tuner(
    parts=("hira_A", "hira_B", *_EMBEDDING),
    effect=_effect,
    harmless=frozenset(("init_weights", "hira_dropout", "r", "rank_pattern")),
)
