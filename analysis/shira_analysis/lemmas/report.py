"""What a check of a lemma reports: the statement as printed, what is true of it, what was checked and how close it came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Relation = Literal["=", "<="]
ReadingVerdict = Literal["holds", "fails", "says nothing"]


@dataclass
class Check:
    """One law, tried on many cases; ``left relation right`` must hold in each.

    Attributes:
        law: in words and formulas.
        relation: ``"="`` or ``"<="``.
        exact: integers, and no allowance; else float64 with an allowance for rounding that each case states.
        cases: how many were tried.
        broken: how many broke the law.
        margin: the least that was left, see ``unit``; negative where the law is broken. Infinite without a case.
        where: the case that came closest.
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
        """Of what ``margin`` is a number: of what is compared, of the right side, or of the allowance for rounding."""
        if self.exact:
            return "difference"
        return "share of the allowance for rounding" if self.relation == "=" else "share of the right side"

    @property
    def ok(self) -> bool:
        """Whether the law held in every case; a law without a case is not confirmed."""
        return self.broken == 0 and self.cases > 0

    def add(self, left: float, right: float, where: str, allowed: float = 0.0) -> None:
        """Try one case.

        Args:
            left: the left side.
            right: the right side.
            where: what the case is.
            allowed: what rounding may add to the difference; positive unless the check is exact.
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
    """Small matrices by which a reader can see for himself that a statement fails.

    Attributes:
        found: how it was found.
        matrices: by name, each a tuple of rows of numbers as text.
        steps: the computation, a line each.
    """

    found: str
    matrices: dict[str, tuple[tuple[str, ...], ...]]
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """One way to read the printed statement, and what becomes of it."""

    text: str
    verdict: ReadingVerdict
    why: str
    counterexample: Counterexample | None = None


@dataclass
class LemmaReport:
    """What was found out about one lemma.

    Attributes:
        number: as in the paper.
        title: a few words.
        printed: the statement as printed, in other words.
        true: the statement that is true.
        verdict: what becomes of the printed one, in a few words.
        readings: of the printed statement, or of what it is taken for.
        checks: laws that must hold.
        measured: what is no law: a name and a sentence each.
        of_files: the same of weights in the given files.
        notes: what of the given files was not checked, and why.
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
        """How many cases were tried, all laws together."""
        return sum(check.cases for check in self.checks)

    @property
    def ok(self) -> bool:
        """Whether what should hold does."""
        return all(check.ok for check in self.checks)

    @property
    def counterexample(self) -> Counterexample | None:
        """Of the first reading that fails; None if none does."""
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
        """Whether what should hold does."""
        return all(lemma.ok for lemma in self.lemmas)


def as_json(verification: Verification) -> dict[str, Any]:
    """The report as plain JSON values."""
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
