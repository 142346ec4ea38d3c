"""LN tuning (arXiv 2312.11420): norms are trained and saved whole (``peft.tuners.ln_tuning``)."""

from __future__ import annotations

from shira_format.lora.peft.tuners.common import Effect, Tuner, TunerLayer

_STEM = "ln_tuning_layers."


def _effect(layer: TunerLayer) -> Effect:
    return Effect(whole={part.removeprefix(_STEM): array for part, array in layer.parts.items()})


TUNER = Tuner(parts=(f"{_STEM}weight", f"{_STEM}bias"), effect=_effect, harmless=frozenset())
