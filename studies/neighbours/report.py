"""What adapters do for other tasks: a CSV, tables in the page, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from studies.bank.forms import FORMS as LABELS
from studies.bank.forms import TASKS
from studies.bank.plan import Bank, BankRun
from studies.neighbours.plan import FORMS, NEIGHBOURS
from studies.report import write_csv
from studies.runs import Result, Store
from studies.statistics import Case, Estimate, drop
from studies.tables import PAGES, Singles, machine_of, markdown, settings, write_page

PAGE = PAGES / "neighbours.md"
HEADS = {"start": "the head fitted to the unchanged encoder", "own": "the head of the task's own adapter"}


@dataclass(frozen=True)
class Row:
    """An adapter on another task.

    Attributes:
        form: of the adapter; ``"all"``: the mean of all forms.
        source: the task that it was trained for.
        task: that it is tried on.
        head: of :data:`HEADS`.
        gain: how much more of the held-out texts is right than without an adapter, under the same head, a share.
        low: of its 95 % interval over the texts.
        high: likewise.
    """

    form: str
    source: str
    task: str
    head: str
    gain: float
    low: float
    high: float

    @property
    def shown(self) -> str:
        """The gain in points, as a cell."""
        return Estimate(self.gain, self.low, self.high).shown(100, sign=True)


def cases(
    results: Sequence[Result], singles: Singles, head: str, chosen: Callable[[str, str, str], bool]
) -> list[Case]:
    """The adapters of form, source and task that are chosen, beside the unchanged encoder under the same head."""
    found = []
    for one in results:
        for task, margins in one[head].items():
            if chosen(one["form"], one["source"], task):
                alone = singles[BankRun(task, one["form"], one["seed"])]
                without = alone["start"] if head == "start" else alone["base"]
                found.append(Case.of(task, margins, without, without))
    return found


def rows(results: Sequence[Result], singles: Singles) -> list[Row]:
    """Each adapter on each other task, and the mean of all forms."""
    found = []
    for head in HEADS:
        for form in (*FORMS, "all"):
            for source in TASKS:
                for task in TASKS:
                    here = cases(
                        results, singles, head,
                        lambda f, s, t, form=form, source=source, task=task: form in (f, "all") and (s, t) == (source, task),  # type: ignore[misc]
                    )  # fmt: skip
                    if here:
                        found.append(Row(form, source, task, head, *_gain(here)))
    return found


def _gain(here: Sequence[Case]) -> tuple[float, float, float]:
    lost = drop(here)
    return -lost.value, -lost.high, -lost.low


def table_of_tasks(found: Sequence[Row], head: str) -> str:
    """Adapters as rows, tasks as columns: the mean of the forms."""
    tasks = [task for task in TASKS if any(row.task == task for row in found)]
    lines = []
    for source in tasks:
        here = {row.task: row.shown for row in found if (row.form, row.source, row.head) == ("all", source, head)}
        lines.append([f"adapter of {source}", *(here.get(task, "its own") for task in tasks)])
    return markdown(["gain, points", *(f"on {task}" for task in tasks)], lines)


def table_of_forms(results: Sequence[Result], singles: Singles) -> str:
    """Gains on neighbours and on others, by form and head."""
    lines = []
    for form in FORMS:
        cells = []
        for head in HEADS:
            for near in (True, False):
                here = cases(
                    results, singles, head,
                    lambda f, s, t, form=form, near=near: f == form and ({s, t} <= set(NEIGHBOURS)) == near,  # type: ignore[misc]
                )  # fmt: skip
                cells.append(Estimate(*_gain(here)).shown(100, sign=True) if here else "not tried")
        lines.append([LABELS[form].label, *cells])
    titles = ["gain, points", "on neighbours", "on others", "on neighbours, own head", "on others, own head"]
    return markdown(titles, lines)


def write(folder: Path, bank: Path, page: Path = PAGE) -> None:
    """CSV, tables and a picture from what is stored; see :func:`studies.fusion.report.write`."""
    results = list(Store(folder / "runs.jsonl").results.values())
    singles = Singles(Bank(bank).store())
    found = rows(results, singles)
    write_csv(found, folder / "neighbours.csv")
    about = {"tried": f"{len(FORMS)} forms, each adapter on the five other tasks"}
    parts = {
        "settings": settings(Bank(bank), results, machine_of(folder), about),
        "forms": table_of_forms(results, singles),
        "tasks": table_of_tasks(found, "start"),
    }
    write_page(page, parts)
    (page.parent / "neighbours.png").write_bytes(picture(found))


def picture(found: Sequence[Row]) -> bytes:
    """Gains by adapter and task, a panel for each head."""
    import numpy as np

    from shira_analysis.figures.style import figure, our_style, render

    tasks = [task for task in TASKS if any(row.task == task for row in found)]
    with our_style():
        drawn = figure(8.0, 3.6)
        axes = drawn.subplots(1, len(HEADS), sharey=True)
        for axis, (head, label) in zip(axes, HEADS.items(), strict=True):
            gains = np.full((len(tasks), len(tasks)), np.nan)
            for row in found:
                if (row.form, row.head) == ("all", head):
                    gains[tasks.index(row.source), tasks.index(row.task)] = 100 * row.gain
            shown = axis.imshow(gains, cmap="RdBu", vmin=-25, vmax=25)
            for place in np.argwhere(np.isfinite(gains)):
                axis.text(place[1], place[0], f"{gains[tuple(place)]:+.0f}", ha="center", va="center", fontsize=7)
            axis.set_xticks(range(len(tasks)), tasks, rotation=45)
            axis.set_yticks(range(len(tasks)), tasks)
            axis.set_title(label, fontsize=8)
            axis.set_xlabel("tried on")
        axes[0].set_ylabel("adapter of")
        drawn.colorbar(shown, ax=axes, label="gain in accuracy, points")
        return render(drawn)
