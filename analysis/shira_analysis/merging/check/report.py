"""The result of a merge check."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["verified", "absent", "strength", "different", "missing", "unclear"]
Answer = Literal["yes", "no", "inconclusive"]


@dataclass(frozen=True)
class LayerVerdict:
    """The verdict on one tensor.

    Attributes:
        name: in the base; of a new tensor, in the result.
        merged_name: in the merged checkpoint.
        kind: ``"weight"``, ``"bias"``, ``"entries"`` or ``"whole"`` (replaced).
        verdict: see :mod:`shira_analysis.merging.check.check`.
        strength: the strength found; None if unknown.
        low, high: the interval of strengths that fit every entry; None if there is none. For quantised weights, six standard errors. ``high`` is infinite if rounding sets no limit.
        equal: share of entries with the bits expected at the expected strength.
        off: the largest distance from the expected values, in ulps of the merged dtype.
        residual: norm of the change minus the expected change, relative to the norm of the expected change.
        energy: the update's energy (the sum of squares).
        reason: for people.
    """

    name: str
    merged_name: str | None
    kind: str
    verdict: Verdict
    strength: float | None = None
    low: float | None = None
    high: float | None = None
    equal: float | None = None
    off: float | None = None
    residual: float | None = None
    energy: float = 0.0
    reason: str = ""


@dataclass
class Others:
    """The tensors that the LoRA does not change, by their names in the base (new ones: in the merged checkpoint).

    Attributes:
        compared: how many were compared.
        changed: those with other values or another shape.
        tied: those that changed with an adapted tensor that they are tied to.
        missing: those that are not in the merged checkpoint.
        new: those that are not in the base.
        unclear: quantised tensors, which cannot be compared.
    """

    compared: int = 0
    changed: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MergeVerdict:
    """The answer to whether a checkpoint holds an adapter or a LoRA.

    Attributes:
        answer: see the module.
        sentence: the answer with its reason, for people.
        expected: the expected strength.
        strength: the strength of all layers; None if they differ.
        layers: in the LoRA's order.
        others: None if they were not compared.
        notices: remarks for the user.
    """

    answer: Answer
    sentence: str
    expected: float
    strength: float | None
    layers: list[LayerVerdict]
    others: Others | None
    notices: list[str]


def as_json(report: MergeVerdict) -> dict[str, Any]:
    """The report as plain JSON values."""

    def number(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    def row(layer: LayerVerdict) -> dict[str, Any]:
        return {key: number(value) if isinstance(value, float) else value for key, value in vars(layer).items()}

    return {
        "answer": report.answer,
        "sentence": report.sentence,
        "expected_strength": report.expected,
        "strength": number(report.strength),
        "layers": [row(layer) for layer in report.layers],
        "others": None if report.others is None else vars(report.others),
        "notices": report.notices,
    }
