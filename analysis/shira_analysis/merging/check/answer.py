"""The answer for the whole checkpoint, with the reason; the rules are in :mod:`shira_analysis.merging.check.check`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shira_analysis.merging.check.names import MergedNames
from shira_analysis.merging.check.report import Answer, LayerVerdict, Others
from shira_analysis.merging.check.scan import COARSE

_UNCLEAR = 0.01  # share of the update's energy that may be hidden by rounding
_NAMED = 4


def conclude(
    layers: Sequence[LayerVerdict],
    others: Others | None,
    expected: float,
    names: MergedNames,
    facts: Mapping[str, Any],
) -> tuple[Answer, str, float | None]:
    """The answer, the reason, and the strength of all layers."""
    by: dict[str, list[LayerVerdict]] = {}
    for layer in layers:
        by.setdefault(layer.verdict, []).append(layer)
    verified, unclear = by.get("verified", []), by.get("unclear", [])
    counted = f"{len(layers)} adapted tensor" + "s" * (len(layers) != 1)
    at = f"at strength {expected:g}"
    if names.alone:
        return "no", f"it is a LoRA, not a merged checkpoint: it has keys like {names.wrapped!r}", None
    bad = [layer for layer in layers if layer.verdict not in ("verified", "unclear")]
    if names.wrapped is not None:
        state = (
            "and its weights hold the LoRA, but under PEFT's names, which other loaders do not find"
            if not bad and verified
            else _counts(by)
        )
        return "no", f"it is a PEFT model that was not unloaded (keys like {names.wrapped!r}): {state}; save what merge_and_unload() returns", None  # fmt: skip
    if bad:
        return "no", _why_not(layers, by, bad, expected, facts, others), _common(layers, expected)
    if others is not None and others.changed:
        holds = (
            f"it holds the LoRA {at} in {counted}, but" if verified else "the LoRA itself cannot be detected, and"
        )
        number = len(others.changed)
        what = (
            "one tensor that the LoRA does not change differs"
            if number == 1
            else f"{number} tensors that the LoRA does not change differ"
        )
        return "no", f"{holds} {what} from the base: {_some(others.changed)}", None
    whole_energy, hidden = sum(layer.energy for layer in layers), sum(layer.energy for layer in unclear)
    if not verified or hidden >= _UNCLEAR * whole_energy > 0:
        few = f"in {len(unclear)} of {counted}" if verified else f"in all of {counted}"
        return "inconclusive", f"{_why_unclear(unclear)} {few}", None
    rest = f" ({len(unclear)} of them consistent with it, but too small to tell)" if unclear else ""
    return "yes", f"it holds the LoRA {at} in {counted}{rest}", _mean(verified) or expected


def _why_unclear(unclear: Sequence[LayerVerdict]) -> str:
    reasons = [layer.reason for layer in unclear]
    if scaled := [reason for reason in reasons if "quantised with scales" in reason]:
        return f"the weights are {scaled[0]}:"
    if any("quantised" in reason for reason in reasons):
        return "the weights are quantised, and only the strength fits"
    if any("weight-decomposed" in reason for reason in reasons):
        return "a weight-decomposed update can be checked at strength 1 only"
    if all("update is zero" in reason for reason in reasons):
        return "the update is zero"
    return "rounding hides the update"


def _why_not(
    layers: Sequence[LayerVerdict], by: Mapping[str, Sequence[LayerVerdict]], bad: Sequence[LayerVerdict], expected: float,
    facts: Mapping[str, Any], others: Others | None,
) -> str:  # fmt: skip
    judged = [layer for layer in layers if layer.verdict != "unclear"]
    absent, strength, different = by.get("absent", []), by.get("strength", []), by.get("different", [])
    if len(absent) == len(judged):
        return f"nothing was merged: all {len(absent)} adapted tensors equal the base's"
    common = _common(layers, expected)
    if common is not None:
        hint = _hint(common / expected, facts)
        return f"it holds the LoRA at strength {common:.4g} in all layers, not {expected:g}" + (
            f" ({hint})" if hint else ""
        )
    text = _counts(by)
    if strength and len(strength) > 1:
        values = sorted(layer.strength for layer in strength if layer.strength is not None)
        text += f"; strengths from {values[0]:.4g} to {values[-1]:.4g}"
    if different and others is not None and len(others.changed) > others.compared / 2:
        text += "; most other tensors differ as well: was it merged into another base?"
    return f"{text}: {_some([layer.name for layer in bad])}"


def _counts(by: Mapping[str, Sequence[LayerVerdict]]) -> str:
    words = {
        "verified": "hold the LoRA", "absent": "are unchanged", "strength": "hold it at another strength",
        "different": "hold something else", "missing": "are missing", "unclear": "are unclear",
    }  # fmt: skip
    total = sum(map(len, by.values()))
    return f"of {total} adapted tensors " + ", ".join(
        f"{len(by[key])} {text}" for key, text in words.items() if key in by
    )


def _common(layers: Sequence[LayerVerdict], expected: float) -> float | None:
    """The one strength, other than the expected one, that explains all layers, if there is one."""
    linear = [layer for layer in layers if layer.kind != "whole"]
    strength = [layer for layer in linear if layer.verdict == "strength"]
    if not strength or any(layer.low is None or layer.high is None for layer in linear):
        return None
    if any(layer.kind == "whole" and layer.verdict not in ("verified", "unclear") for layer in layers):
        return None
    low = max(layer.low for layer in linear if layer.low is not None)
    high = min(layer.high for layer in linear if layer.high is not None)
    # Strengths from 16-bit arithmetic are this uncertain.
    wide = COARSE * max(abs(low), abs(high))
    if low > high + wide or low <= expected <= high or (low <= 0 <= high):
        return None
    mean = _mean(strength)
    return None if mean is None else min(max(mean, min(low, high)), max(low, high))


def _mean(layers: Sequence[LayerVerdict]) -> float | None:
    """The mean strength of these layers, weighted by energy."""
    known = [(layer.energy, layer.strength) for layer in layers if layer.strength is not None]
    total = sum(energy for energy, _ in known)
    return sum(energy * value for energy, value in known) / total if total else None


def _hint(ratio: float, facts: Mapping[str, Any]) -> str:
    """What may explain a wrong strength."""

    def near(value: float) -> bool:
        return abs(ratio - value) <= 0.02 * abs(value)

    rank, alpha, stable = facts.get("r"), facts.get("lora_alpha"), bool(facts.get("use_rslora"))
    if near(2):
        return "merged twice?"
    if ratio < 0:
        return "subtracted?"
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or rank < 1 or alpha == 0:
        return ""
    scale = alpha / (math.sqrt(rank) if stable else rank)
    if near(1 / math.sqrt(rank) if stable else math.sqrt(rank)):
        return "as if rslora were not set" if stable else "as if rslora were set"
    if near(1 / scale):
        return f"as if the scale {scale:.4g} of rank {rank} and alpha {alpha:g} had been left out"
    return "as if the scale had been taken twice" if near(scale) else ""


def _some(names: Sequence[str]) -> str:
    text = ", ".join(names[:_NAMED])
    return text if len(names) <= _NAMED else f"{text}, ... ({len(names)})"
