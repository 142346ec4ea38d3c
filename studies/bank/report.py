"""How good the adapters of the bank are alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.bank.forms import FORMS, TASKS
from studies.bank.plan import Bank
from studies.report import write_csv
from studies.runs import Result
from studies.statistics import Case, Estimate, accuracy, drop
from studies.tables import PAGES, machine_of, markdown, settings, write_page

PAGE = PAGES / "bank.md"


@dataclass(frozen=True)
class Row:
    """A form on one task, or on all.

    Attributes:
        form: of the bank's.
        task: of the bank's, or ``"all"``.
        adapters: how many, of all seeds.
        accuracy: a share, with the limits of its 95 % interval over the texts.
        low: of the interval.
        high: likewise.
        gain: more of the texts right than with the head alone that was fitted to the unchanged encoder.
        gain_low: of its interval.
        gain_high: likewise.
        entries: of an adapter.
        bytes: of its file.
        seconds: to make it.
    """

    form: str
    task: str
    adapters: int
    accuracy: float
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float
    entries: int
    bytes: int
    seconds: float


def rows(results: Sequence[Result]) -> list[Row]:
    """All forms on each task and on all."""
    found = []
    for form in FORMS:
        for task in (*TASKS, "all"):
            group = [one for one in results if one["form"] == form and task in (one["task"], "all")]
            if group:
                found.append(_row(form, task, group))
    return found


def _cases(group: Sequence[Result]) -> list[Case]:
    """The head alone in the place of the adapter alone."""
    return [Case.of(one["task"], one["margins"], one["start"], one["base"]) for one in group]


def _row(form: str, task: str, group: Sequence[Result]) -> Row:
    right, lost = accuracy(_cases(group)), drop(_cases(group))
    first = group[0]
    return Row(
        form, task, len(group), right.value, right.low, right.high, -lost.value, -lost.high, -lost.low,
        first["entries"], round(sum(one["bytes"] for one in group) / len(group)), sum(one["train_seconds"] for one in group) / len(group),
    )  # fmt: skip


def table(found: Sequence[Row], results: Sequence[Result]) -> str:
    """Accuracies by form and task."""
    tasks = [task for task in TASKS if any(row.task == task for row in found)]
    head = ["accuracy, %", *tasks, "all", "gain, points", "entries", "file, kB"]
    lines = [["head alone", *(_start(results, (task,)) for task in tasks), _start(results, tasks), "0", "0", "0"]]
    for form in FORMS:
        here = {row.task: row for row in found if row.form == form}
        if not here:
            continue
        whole = here["all"]
        cells = [_shown(here[task]) if task in here else "not trained" for task in (*tasks, "all")]
        gain = Estimate(whole.gain, whole.gain_low, whole.gain_high).shown(100, sign=True)
        lines.append(
            [
                FORMS[form].label,
                *cells,
                gain,
                f"{whole.entries:,}".replace(",", " "),
                f"{whole.bytes / 1000:.0f}",
            ]
        )
    return markdown(head, lines)


def _shown(row: Row) -> str:
    return Estimate(row.accuracy, row.low, row.high).shown(100)


def _start(results: Sequence[Result], tasks: Sequence[str]) -> str:
    """The head alone; all forms of a task and seed have the same."""
    group = {(one["task"], one["seed"]): one for one in results if one["task"] in tasks}
    cases = [Case.of(one["task"], one["start"], one["start"], one["base"]) for one in group.values()]
    return accuracy(cases).shown(100)


def parts(bank: Bank, machine: dict[str, Any]) -> dict[str, str]:
    """What the page has of the results."""
    results = list(bank.store().results.values())
    about = {
        "seeds": ", ".join(map(str, sorted({one["seed"] for one in results}))) + "; tasks with two are averaged"
    }
    return {"settings": settings(bank, results, machine, about), "alone": table(rows(results), results)}


def write(folder: Path, _: Path, page: Path = PAGE) -> None:
    """CSV and table from what is stored."""
    bank = Bank(folder)
    write_csv(rows(list(bank.store().results.values())), folder / "bank.csv")
    write_page(page, parts(bank, machine_of(folder)))
