"""BEFT: a vector is added to a layer's bias (``peft.tuners.beft``)."""

from __future__ import annotations

from shira_format.errors import SourceError
from shira_format.lora.peft.tuners.common import Effect, Tuner, TunerLayer
from shira_format.lora.products import common_dtype


def _effect(layer: TunerLayer) -> Effect:
    added = layer.part("beft_bias", 2)
    if layer.bias not in layer.base:
        raise SourceError(
            f"{layer.where}: beft_bias, but the base has no {layer.bias!r}, and PEFT cannot merge it either"
        )
    return Effect(bias=added.reshape(-1).astype(common_dtype(added)))


TUNER = Tuner(parts=("beft_bias",), effect=_effect)
