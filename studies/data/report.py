"""Accuracy by examples and entries: CSVs, tables in the page, and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from studies.data.course import More, Reach, added, reaches
from studies.data.plan import ENTRIES, METHODS, SIZES, TASKS, TOKENS
from studies.learning import BATCH
from studies.report import facts_table, write_csv
from studies.runs import Result, Store
from studies.statistics import Case, Estimate, accuracy, drop
from studies.tables import PAGES, machine_of, markdown, write_page

PAGE = PAGES / "data.md"
ALONE = "head alone"
NOT_RUN = "This task has not been run."


@dataclass(frozen=True)
class Row:
    """A task, method, size and number of examples, over its seeds.

    Attributes:
        task: of the study's.
        method: of the study's, or the head alone.
        size: of the study's; "" of the head alone.
        examples: that it was trained on.
        seeds: how many.
        entries: that are trained.
        accuracy: on held-out texts, a share, with its 95 % interval over the texts.
        low: of the interval.
        high: likewise.
        gain: over the head alone that was fitted to the same examples, text by text.
        gain_low: of its interval.
        gain_high: likewise.
        loss: of the last steps of the training; 0 of the head alone.
    """

    task: str
    method: str
    size: str
    examples: int
    seeds: int
    entries: int
    accuracy: float
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float
    loss: float

    @property
    def shown(self) -> str:
        """The accuracy in per cent, as a cell."""
        return Estimate(self.accuracy, self.low, self.high).shown(100)


def rows(results: Sequence[Result]) -> list[Row]:
    """All that were run, and the head alone of each task and number of examples."""
    groups: dict[tuple[str, str, str, int], list[Result]] = {}
    for one in results:
        groups.setdefault((one["task"], one["method"], one["size"], one["examples"]), []).append(one)
        alone = groups.setdefault((one["task"], ALONE, "", one["examples"]), [])
        if one["seed"] not in {other["seed"] for other in alone}:
            alone.append(one | {"margins": one["start"], "entries": 0, "loss": 0.0})
    methods, sizes = [ALONE, *METHODS], ["", *SIZES]
    order = sorted(
        groups, key=lambda key: (TASKS.index(key[0]), sizes.index(key[2]), methods.index(key[1]), key[3])
    )
    return [_row(key, groups[key]) for key in order]


def _row(key: tuple[str, str, str, int], group: Sequence[Result]) -> Row:
    cases = [Case.of(one["task"], one["margins"], one["start"], one["start"]) for one in group]
    right, lost = accuracy(cases), drop(cases)
    return Row(
        *key, len(group), group[0]["entries"], right.value, right.low, right.high, -lost.value, -lost.high, -lost.low,
        sum(one["loss"] for one in group) / len(group),
    )  # fmt: skip


def table(found: Sequence[Row], task: str) -> str:
    """Methods and sizes as rows, examples as columns."""
    here = [row for row in found if row.task == task]
    counts = sorted({row.examples for row in here})
    lines = []
    for method, size in dict.fromkeys((row.method, row.size) for row in here):
        cells = {row.examples: row for row in here if (row.method, row.size) == (method, size)}
        label = ALONE if method == ALONE else f"{METHODS[method]}, {size}"
        entries = next(iter(cells.values())).entries
        shown = (cells[count].shown if count in cells else "not run" for count in counts)
        lines.append([label, f"{entries:,}".replace(",", " "), *shown])
    return markdown(["accuracy, %", "entries", *(f"{count} examples" for count in counts)], lines)


def by_examples(cells: Iterable[tuple[str, str, int, str]], about: str, missing: str = "not run") -> str:
    """A table of all tasks: from task, what a line is of, examples and the cell; lines in the order in which they come."""
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for task, label, count, cell in cells:
        lines.setdefault((task, label), {})[count] = cell
    counts = sorted({count for line in lines.values() for count in line})
    return markdown(
        [about, *(f"{count} examples" for count in counts)],
        ([f"{task}: {label}", *(line.get(count, missing) for count in counts)] for (task, label), line in lines.items()),
    )  # fmt: skip


def steps_table(found: Iterable[Reach]) -> str:
    """When each training has most of the best gain."""
    return by_examples(
        ((one.task, f"{METHODS[one.method]}, {one.size}", one.examples, one.shown) for one in found),
        "steps",
        "not scored",
    )


def added_table(found: Iterable[More]) -> str:
    """What the largest size adds."""
    return by_examples(
        (
            (one.task, f"{METHODS[one.method]}, {one.smaller} to {one.larger}", one.examples, one.shown)
            for one in found
        ),
        "more accuracy, points",
    )


def _steps(results: Sequence[Result]) -> str:
    """How long the trainings are, by their examples."""
    steps = {one["examples"]: one["steps"] for one in results}
    usual = min(steps.values())
    longer = ", ".join(f"{steps[count]} with {count} examples" for count in sorted(steps) if steps[count] > usual)
    return f"{usual} steps of {BATCH} texts" + (f", {longer}" if longer else "")


def write(folder: Path, _: Path, page: Path = PAGE) -> None:
    """CSVs, tables and a picture from what is stored in ``folder``."""
    results = list(Store(folder / "runs.jsonl").results.values())
    found = rows(results)
    results.sort(key=lambda one: (TASKS.index(one["task"]), one["examples"]))
    reached = sorted(reaches(results), key=lambda one: (TASKS.index(one.task), list(SIZES).index(one.size)))
    more = sorted(added(results), key=lambda one: (TASKS.index(one.task), list(METHODS).index(one.method)))
    write_csv(found, folder / "data.csv")
    write_csv(reached, folder / "steps.csv")
    write_csv(more, folder / "entries.csv")
    facts = {
        "model": "all-MiniLM-L6-v2, float32, without dropout; a head of two classes",
        "tasks": ", ".join(_tasks(found)),
        "texts": f"{len(results[0]['margins'])} held out for each task, cut to {TOKENS} tokens",
        "training": f"{_steps(results)}, AdamW without decay",
        "sizes": ", ".join(f"{size}: {entries:,}".replace(",", " ") for size, entries in ENTRIES.items()) + " entries",
        "seeds": ", ".join(map(str, sorted({one["seed"] for one in results}))),
        "runs": f"{len(results)}, {sum(one['seconds'] for one in results) / 60:.0f} minutes of one thread on a shared machine",
    }  # fmt: skip
    parts = {
        "settings": facts_table(facts, machine_of(folder)),
        **{task: table(found, task) if task in _tasks(found) else NOT_RUN for task in TASKS},
        "entries": added_table(more),
        "steps": steps_table(reached),
    }
    write_page(page, parts)
    (page.parent / "data.png").write_bytes(picture(found))


def _tasks(found: Sequence[Row]) -> list[str]:
    """Those that were run."""
    return [task for task in TASKS if any(row.task == task for row in found)]


def picture(found: Sequence[Row]) -> bytes:
    """Accuracy by examples, a panel for each task, a line for each method and size."""
    from shira_analysis.figures.style import GREY, LINES, figure, our_style, render

    with our_style():
        drawn = figure(7.6, 3.4)
        tasks = _tasks(found)
        axes = drawn.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for axis, task in zip(axes, tasks, strict=True):
            for number, size in enumerate(("", *SIZES)):
                for method, dashes in ((ALONE, ":"), ("lora", "--"), ("wm", "-")):
                    here = [row for row in found if (row.task, row.method, row.size) == (task, method, size)]
                    if not here:
                        continue
                    shift = 1 + 0.03 * number + 0.06 * (method == "lora")
                    label = ALONE if method == ALONE else f"{METHODS[method]}, {size}"
                    axis.errorbar(
                        [row.examples * shift for row in here], [100 * row.accuracy for row in here],
                        yerr=[[100 * (row.accuracy - row.low) for row in here], [100 * (row.high - row.accuracy) for row in here]],
                        ls=dashes, marker="o", ms=3, lw=1.1, elinewidth=0.5, color=LINES[number - 1] if size else GREY, label=label,
                    )  # fmt: skip
            axis.set_xscale("log")
            counts = sorted({row.examples for row in found})
            axis.set_xticks(counts, [str(count) for count in counts])
            axis.minorticks_off()
            axis.set_title(task)
            axis.set_xlabel("examples")
            axis.grid()
        axes[0].set_ylabel("held-out accuracy, %")
        handles, labels = axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7)
        return render(drawn)
