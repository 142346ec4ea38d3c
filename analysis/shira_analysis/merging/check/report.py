"""What a comparison of a merged checkpoint reports."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["verified", "absent", "strength", "different", "missing", "unclear"]
Answer = Literal["yes", "no", "inconclusive"]


@dataclass(frozen=True)
class LayerVerdict:
    """What became of one weight.

    Attributes:
        name: in the base, or, of a new tensor, in the result.
        merged_name: in the merged checkpoint.
        kind: ``"weight"``, ``"bias"``, ``"entries"`` or ``"whole"`` (replaced).
        verdict: see the module.
        strength: at which the update is there; None where none can be told.
        low, high: the strengths that fit every entry; None where none does. Of quantised weights, six standard errors. ``high`` is infinite where rounding sets no limit.
        equal: share of entries that have the very bits that are due at the expected strength.
        off: the largest distance from what is due, in ulps of the merged dtype.
        residual: norm of what the expected strength leaves of the change, relative to the update's.
        energy: the update's sum of squares.
        reason: in words.
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
    """The tensors that the LoRA leaves alone, by their names in the base (new ones: in the merged checkpoint).

    Attributes:
        compared: how many were compared.
        changed: those that hold other values, or have another shape.
        tied: those that changed along with an adapted one, to which they are tied.
        missing: those that the merged checkpoint lacks.
        new: those that the base lacks.
        unclear: those that cannot be compared, as they are quantised.
    """

    compared: int = 0
    changed: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MergeVerdict:
    """What was found.

    Attributes:
        answer: see the module.
        sentence: the same in words.
        expected: the strength that was asked for.
        strength: the one that all layers hold; None if there is none.
        layers: in the LoRA's order.
        others: None if they were not looked at.
        notices: what a user should know.
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
