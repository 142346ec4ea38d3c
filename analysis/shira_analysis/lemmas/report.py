"""The report on a lemma: the statement as printed, the corrected statement, what was checked and how close it came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Relation = Literal["=", "<="]
ReadingVerdict = Literal["holds", "fails", "says nothing"]


@dataclass
class Check:
    """One law, tested on many cases; ``left relation right`` must hold in each.

    Attributes:
        law: in words and formulas.
        relation: ``"="`` or ``"<="``.
        exact: in integers, without allowance; else in float64, each case with an allowance for rounding.
        cases: how many were tested.
        broken: how many broke the law.
        margin: the smallest margin, in ``unit``; negative if the law is broken, infinite without cases.
        where: the case with the smallest margin.
    """

    law: str
    relation: Relation
    exact: bool
    cases: int = 0
    broken: int = 0
    margin: float = math.inf
    where: str = ""

    @property
    def unit(self) -> str:
        """The unit of ``margin``: the difference of the sides, or a share of the right side or of the allowance for rounding."""
        if self.exact:
            return "difference"
        return "share of the allowance for rounding" if self.relation == "=" else "share of the right side"

    @property
    def ok(self) -> bool:
        """Whether the law held in every case; False without cases."""
        return self.broken == 0 and self.cases > 0

    def add(self, left: float, right: float, where: str, allowed: float = 0.0) -> None:
        """Test one case.

        Args:
            left: the left side.
            right: the right side.
            where: the case's name.
            allowed: the rounding error that the difference may have; positive unless the check is exact.

        Raises:
            ValueError: an allowance in an exact check, or none in another.
        """
        if self.exact == (allowed > 0):
            raise ValueError(f"{self.law}: an allowance of {allowed}")
        excess = abs(left - right) if self.relation == "=" else left - right
        if self.exact:
            margin = -float(excess)
        elif self.relation == "=":
            margin = 1 - float(excess) / allowed
        else:
            margin = -float(excess) / max(abs(float(right)), allowed)
        held = bool(excess <= allowed)  # false for NaN
        self.cases += 1
        self.broken += not held
        if not margin >= self.margin:
            self.margin, self.where = margin, where


@dataclass(frozen=True)
class Counterexample:
    """Small matrices for which a statement fails, to be checked by hand.

    Attributes:
        found: how it was found.
        matrices: by name; each a tuple of rows, the numbers as text.
        steps: the lines of the computation.
    """

    found: str
    matrices: dict[str, tuple[tuple[str, ...], ...]]
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """One way to read the printed statement, and whether it holds."""

    text: str
    verdict: ReadingVerdict
    why: str
    counterexample: Counterexample | None = None


@dataclass
class LemmaReport:
    """The results for one lemma.

    Attributes:
        number: as in the paper.
        title: a few words.
        printed: the printed statement, paraphrased.
        true: the corrected statement.
        verdict: whether the printed statement holds, in a few words.
        readings: ways to read the printed statement.
        checks: laws that must hold.
        measured: measurements that are not laws: name and result.
        of_files: measurements of weights in the given files: name and result.
        notes: what was skipped in the given files, and why.
    """

    number: str
    title: str
    printed: str
    true: str
    verdict: str
    readings: list[Reading] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    measured: list[tuple[str, str]] = field(default_factory=list)
    of_files: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """The number of cases, over all laws."""
        return sum(check.cases for check in self.checks)

    @property
    def ok(self) -> bool:
        """Whether all laws hold."""
        return all(check.ok for check in self.checks)

    @property
    def counterexample(self) -> Counterexample | None:
        """The counterexample of the first reading that fails; None if all hold."""
        return next((reading.counterexample for reading in self.readings if reading.verdict == "fails"), None)


@dataclass(frozen=True)
class Verification:
    """All five lemmas."""

    seed: int
    quick: bool
    files: list[str]
    lemmas: list[LemmaReport]

    @property
    def ok(self) -> bool:
        """Whether all laws hold."""
        return all(lemma.ok for lemma in self.lemmas)


def as_json(verification: Verification) -> dict[str, Any]:
    """The report as JSON values."""
    return {
        "ok": verification.ok,
        "seed": verification.seed,
        "quick": verification.quick,
        "files": verification.files,
        "lemmas": [_lemma(lemma) for lemma in verification.lemmas],
    }


def _lemma(lemma: LemmaReport) -> dict[str, Any]:
    return {
        "lemma": lemma.number,
        "title": lemma.title,
        "printed": lemma.printed,
        "true": lemma.true,
        "verdict": lemma.verdict,
        "ok": lemma.ok,
        "cases": lemma.cases,
        "readings": [
            {
                "text": reading.text,
                "verdict": reading.verdict,
                "why": reading.why,
                "counterexample": _counterexample(reading.counterexample),
            }
            for reading in lemma.readings
        ],
        "checks": [_check(check) for check in lemma.checks],
        "measured": [{"what": what, "found": found} for what, found in lemma.measured],
        "of_files": [{"what": what, "found": found} for what, found in lemma.of_files],
        "notes": lemma.notes,
    }


def _check(check: Check) -> dict[str, Any]:
    return {
        "law": check.law,
        "exact": check.exact,
        "cases": check.cases,
        "broken": check.broken,
        "ok": check.ok,
        "margin": check.margin if math.isfinite(check.margin) else None,
        "margin_unit": check.unit,
        "closest_case": check.where,
    }


def _counterexample(found: Counterexample | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"found": found.found, "matrices": {k: [list(r) for r in m] for k, m in found.matrices.items()}, "steps": list(found.steps)}  # fmt: skip


def rows_of(matrix: Sequence[Sequence[Any]] | Any) -> tuple[tuple[str, ...], ...]:
    """A matrix of integers or fractions as rows of text."""
    return tuple(tuple(str(value) for value in row) for row in matrix)
