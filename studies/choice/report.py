"""Forms alone and fused side by side, and the front of those that no other one beats at both."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from studies.bank.forms import FORMS
from studies.bank.plan import Bank
from studies.commands import RESULTS
from studies.fusion.report import cases_of, run_of
from studies.report import write_csv
from studies.runs import Result, Store
from studies.statistics import Case, Estimate, accuracy, drop
from studies.tables import PAGES, Singles, machine_of, markdown, settings, write_page

PAGE = PAGES / "choice.md"
MASKS = {"lora": "lora", "wm": "wm", "struct": "struct", "rand": "rand", "runs": "wm-runs"}
"""The method of the study of masks that trains as a form of the bank does."""


@dataclass(frozen=True)
class Row:
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
        front: whether no other form is better both alone and summed.
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
    front: bool


def rows(fused: Sequence[Result], singles: Singles) -> list[Row]:
    """Forms of which sums of three are stored."""
    first = min((one["seed"] for one in fused), default=0)
    found: dict[str, dict[str, list[Case]]] = {}
    for one in fused:
        run = run_of(one)
        if len(run.tasks) == 3 and run.seed == first:
            found.setdefault(run.form, {}).setdefault(run.merge, []).extend(cases_of(one, singles))
    of = {form: _figures(found[form]) for form in FORMS if "sum" in found.get(form, {})}

    def beaten(form: str) -> bool:
        alone, summed = of[form][0].value, of[form][2].value
        return any(
            other[0].value >= alone
            and other[2].value >= summed
            and (other[0].value > alone or other[2].value > summed)
            for other in of.values()
        )

    made = []
    for form, (alone, merge, summed, best) in of.items():
        figures = [(one.value, one.low, one.high) for one in (alone, summed, best)]
        made.append(Row(form, *figures[0], merge, *figures[1], *figures[2], not beaten(form)))
    return made


def _figures(merges: dict[str, list[Case]]) -> tuple[Estimate, str, Estimate, Estimate]:
    alone = accuracy([Case(one.task, one.alone, one.alone, one.base) for one in merges["sum"]])
    best = min(merges, key=lambda merge: drop(merges[merge]).value)
    return alone, best, accuracy(merges["sum"]), accuracy(merges[best])


def table(found: Sequence[Row], masks: Path) -> str:
    """The best at both first."""
    lines = [
        [
            FORMS[row.form].label + (" *" if row.front else ""),
            Estimate(row.alone, row.alone_low, row.alone_high).shown(100),
            Estimate(row.summed, row.summed_low, row.summed_high).shown(100),
            Estimate(row.best, row.best_low, row.best_high).shown(100),
            row.merge,
            *_of_masks(masks, row.form),
        ]
        for row in sorted(found, key=lambda row: -(row.alone + row.summed))
    ]
    head = [
        "accuracy, %",
        "alone",
        "sum of three",
        "best merge of three",
        "which",
        "masks: 82 944 entries",
        "masks: 9 216",
    ]
    return markdown(head, lines)


def _of_masks(path: Path, form: str) -> list[str]:
    """The mean of both tasks in the study of masks, with the mean of the deviations over its seeds, at both sizes."""
    with open(path, encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == MASKS.get(form)]
    cells = []
    for size in ("large", "small"):
        here = [row for row in rows if row["size"] == size]
        spread = mean(float(row["accuracy_sd"]) for row in here) if here else 0.0
        cells.append(
            f"{100 * mean(float(row['accuracy']) for row in here):.1f} ± {100 * spread:.1f}"
            if here
            else "not in it"
        )
    return cells


def write(folder: Path, bank: Path, page: Path = PAGE, others: Path = RESULTS) -> None:
    """CSV, table and picture from what is stored.

    Args:
        folder: gets ``choice.csv``.
        bank: the folder of the bank.
        page: whose parts are replaced; the picture goes beside it.
        others: with the folders of the studies of fusion and of masks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fused = list(Store(others / "fusion" / "runs.jsonl").results.values())
    singles = Singles(Bank(bank).store())
    found = rows(fused, singles)
    write_csv(found, folder / "choice.csv")
    threes = [one for one in fused if one["members"].count("+") == 2]
    about = {"fused": "two threes without a task in common; everything is of the first seed"}
    parts = {
        "settings": settings(Bank(bank), threes, machine_of(others / "fusion"), about),
        "forms": table(found, others / "masks" / "masks.csv"),
    }
    write_page(page, parts)
    (page.parent / "choice.png").write_bytes(picture(found))


def picture(found: Sequence[Row]) -> bytes:
    """Accuracy of a sum of three against that alone."""
    from shira_analysis.figures.style import LINES, MARKS, figure, our_style, render

    with our_style():
        drawn = figure(5.6, 4.0)
        axis = drawn.subplots()
        for number, row in enumerate(found):
            axis.errorbar(
                100 * row.alone, 100 * row.summed,
                xerr=[[100 * (row.alone - row.alone_low)], [100 * (row.alone_high - row.alone)]],
                yerr=[[100 * (row.summed - row.summed_low)], [100 * (row.summed_high - row.summed)]],
                color=LINES[number % len(LINES)], marker=MARKS[number % len(MARKS)], ls="", elinewidth=0.6, label=FORMS[row.form].label,
            )  # fmt: skip
        front = sorted((row for row in found if row.front), key=lambda row: row.alone)
        axis.plot(
            [100 * row.alone for row in front],
            [100 * row.summed for row in front],
            color="black",
            lw=0.8,
            ls=":",
            label="front",
        )
        axis.set_xlabel("accuracy alone, %")
        axis.set_ylabel("accuracy in a sum of three, %")
        axis.grid()
        axis.legend(fontsize=6.5)
        return render(drawn)
