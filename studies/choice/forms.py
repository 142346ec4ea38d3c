"""Forms of the bank alone and fused side by side, three at once: what another mask for each task changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from studies.bank.forms import FORMS
from studies.fusion.report import cases_of, run_of
from studies.runs import Result
from studies.statistics import Case, Estimate, accuracy, drop
from studies.tables import Singles, markdown


@dataclass(frozen=True)
class FormRow:
    """A form.

    Attributes:
        form: of the bank's.
        alone: mean accuracy of all tasks, a share, with its 95 % interval over the texts.
        alone_low: of the interval.
        alone_high: likewise.
        merge: the way to fuse three that was best.
        summed: accuracy of sums of three, with its interval.
        summed_low: of the interval.
        summed_high: likewise.
        best: accuracy by ``merge``, with its interval.
        best_low: of the interval.
        best_high: likewise.
    """

    form: str
    alone: float
    alone_low: float
    alone_high: float
    merge: str
    summed: float
    summed_low: float
    summed_high: float
    best: float
    best_low: float
    best_high: float


def rows_of_forms(fused: Sequence[Result], singles: Singles) -> list[FormRow]:
    """Forms of which sums of three are stored, those that are best at both first."""
    first = min((one["seed"] for one in fused), default=0)
    found: dict[str, dict[str, list[Case]]] = {}
    for one in fused:
        run = run_of(one)
        if len(run.tasks) == 3 and run.seed == first:
            found.setdefault(run.form, {}).setdefault(run.merge, []).extend(cases_of(one, singles))
    made = [_row(form, found[form]) for form in FORMS if "sum" in found.get(form, {})]
    return sorted(made, key=lambda row: -(row.alone + row.summed))


def _row(form: str, merges: dict[str, list[Case]]) -> FormRow:
    alone = accuracy([Case(one.task, one.alone, one.alone, one.base) for one in merges["sum"]])
    best = min(merges, key=lambda merge: drop(merges[merge]).value)
    figures = [(one.value, one.low, one.high) for one in (alone, accuracy(merges["sum"]), accuracy(merges[best]))]
    return FormRow(form, *figures[0], best, *figures[1], *figures[2])


def table_of_forms(found: Sequence[FormRow]) -> str:
    """A line for each form."""
    lines = [
        [
            FORMS[row.form].label,
            Estimate(row.alone, row.alone_low, row.alone_high).shown(100),
            Estimate(row.summed, row.summed_low, row.summed_high).shown(100),
            Estimate(row.best, row.best_low, row.best_high).shown(100),
            row.merge,
        ]
        for row in found
    ]
    return markdown(["accuracy, %", "alone", "sum of three", "best merge of three", "which"], lines)
