"""(IA)^3 (arXiv 2205.05638): the outputs of a layer, its bias with them, or the inputs of a feedforward layer are scaled.

The rules are those of ``peft.tuners.ia3``: ``ia3_l`` is ``[out, 1]`` or ``[1, in]`` of a linear layer, which shows what it scales,
and ``[1, n, 1, ...]`` of a convolution, for which ``feedforward_modules`` says it.
"""

from __future__ import annotations

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.lora.peft.tuners.common import Effect, Tuner, TunerLayer
from shira_format.lora.products import common_dtype
from shira_format.lora.scalings import scaled


def _effect(layer: TunerLayer) -> Effect:
    factors = layer.parts["ia3_l"]
    if factors.ndim != len(layer.shape) or factors.ndim < 2 or max(factors.shape) != factors.size:
        raise SourceError(
            f"{layer.where}: ia3_l has shape {list(factors.shape)}, the base's {layer.name!r} has {list(layer.shape)}"
        )
    by_input = _scales_inputs(factors, layer)
    wide = factors.reshape(-1).astype(common_dtype(factors))
    change = (wide.astype(np.float64) - 1).astype(wide.dtype)
    turned = len(layer.shape) == 2 and _is_turned(wide.size, layer, by_input=by_input)
    update = scaled(change, layer.name, layer.shape, layer.base, layer.where, by_input=by_input != turned)
    return Effect(update, bias=None if by_input else _bias(wide, layer))


def _scales_inputs(factors: Array, layer: TunerLayer) -> bool:
    said = _is_feedforward(layer)
    if factors.ndim == 2 and factors.size > 1:
        shown = bool(factors.shape[0] == 1)
        if said is not None and said != shown:
            raise SourceError(
                f"{layer.where}: ia3_l has shape {list(factors.shape)}, which contradicts feedforward_modules"
            )
        return shown
    if said is None:
        raise SourceError(f"{layer.options.path}: feedforward_modules is not set, so whether {layer.module!r} scales inputs or outputs is unknown")  # fmt: skip
    return said


def _is_feedforward(layer: TunerLayer) -> bool | None:
    """As PEFT decides; None if the options do not say."""
    found = layer.options["feedforward_modules"]
    if found is None:
        return None
    if isinstance(found, str):
        return layer.options.fullmatches("feedforward_modules", found, layer.module)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise SourceError(f"{layer.options.path}: feedforward_modules must be a regex or a list of names")
    return any(layer.module.endswith(name) for name in found)


def _is_turned(count: int, layer: TunerLayer, *, by_input: bool) -> bool:
    """Whether the base stores the weight as ``[in, out]``, which one dimension alone may not show."""
    rows, columns = layer.shape
    if count not in (rows, columns):
        raise layer.misfit(f"{count} {'inputs' if by_input else 'outputs'}")
    if rows == columns:
        return layer.is_transposed(rows, columns)
    return count == (rows if by_input else columns)


def _bias(factors: Array, layer: TunerLayer) -> Array | None:
    if layer.bias not in layer.base:
        return None
    bias = layer.base[layer.bias].astype(np.float64)
    if bias.shape != factors.shape:
        raise SourceError(f"{layer.where}: scales {factors.size} outputs, the base's {layer.bias!r} has shape {list(bias.shape)}")  # fmt: skip
    return np.asarray(bias * (factors.astype(np.float64) - 1))


TUNER = Tuner(
    parts=("ia3_l",),
    effect=_effect,
    options=frozenset(("feedforward_modules",)),
    harmless=frozenset(("init_ia3_weights",)),
)
