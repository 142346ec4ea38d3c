"""Trainable tokens: rows of an embedding are trained alone (``peft.tuners.trainable_tokens``)."""

from __future__ import annotations

from shira_format.errors import SourceError
from shira_format.lora.peft.config import Config, Scales
from shira_format.lora.peft.end_patterns import NO_PATTERNS
from shira_format.lora.peft.tokens import row_replacement
from shira_format.lora.peft.tuners.common import Effect, Options, Tuner, TunerLayer

_DELTA = "trainable_tokens_delta"


def _check(options: Options) -> None:
    rows = options["token_indices"]
    if not isinstance(rows, list) or not rows or not all(type(row) is int and row >= 0 for row in rows):
        raise SourceError(f"{options.path}: token_indices must be a list of rows")
    if len(set(rows)) < len(rows):
        raise SourceError(f"{options.path}: token_indices names a row twice")


def _effect(layer: TunerLayer) -> Effect:
    options = layer.options
    scales = Scales(str(options.path), 1, 1, NO_PATTERNS, NO_PATTERNS, use_rslora=False)
    config = Config(options.path, options.raw, scales, [], [], options["token_indices"], [])
    values = layer.part(_DELTA, 2)
    return Effect(row_replacement(layer.module, values, layer.name, layer.base, config, layer.where))


TUNER = Tuner(
    parts=(_DELTA,), effect=_effect, options=frozenset(("token_indices",)), check=_check, trains_rows=True
)
