"""From the stored runs of the study of fusion to a CSV, tables in the page, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.bank.forms import FORMS
from studies.bank.plan import Bank, BankRun
from studies.fusion.plan import COMPARED, DENSITY, EVERYWHERE, SHIPPED, FusionRun, merges_of
from studies.report import write_csv
from studies.runs import Result, Store
from studies.statistics import Case, Estimate, accuracy, drop, kept
from studies.tables import PAGES, Singles, machine_of, markdown, settings, write_page

PAGE = PAGES / "fusion.md"


@dataclass(frozen=True)
class Row:
    """A form, a merge and a number of parts, over all that were fused so.

    Attributes:
        form: of the bank's.
        merge: of the form's.
        parts: how many adapters are fused.
        seed: of the parts; 0: all seeds.
        cases: fused adapters, each counted for each of its tasks.
        alone: mean accuracy of the parts alone, a share.
        fused: of the fused adapters on the tasks of their parts.
        drop: the difference.
        drop_low: of its 95 % interval over the texts.
        drop_high: likewise.
        r2: what is kept of the parts' effect on margins, the median.
        r2_low: of its interval.
        r2_high: likewise.
    """

    form: str
    merge: str
    parts: int
    seed: int
    cases: int
    alone: float
    fused: float
    drop: float
    drop_low: float
    drop_high: float
    r2: float
    r2_low: float
    r2_high: float

    @property
    def lost(self) -> str:
        """The drop in points, as a cell."""
        return Estimate(self.drop, self.drop_low, self.drop_high).shown(100)

    @property
    def kept(self) -> str:
        """R² as a cell."""
        return Estimate(self.r2, self.r2_low, self.r2_high).shown(digits=2)


def run_of(result: Result) -> FusionRun:
    """The run of a stored result."""
    return FusionRun(result["members"], result["form"], result["merge"], result["seed"])


def cases_of(result: Result, singles: Singles) -> list[Case]:
    """A fused adapter on each of its tasks."""
    run = run_of(result)
    if run.form == SHIPPED:
        return [
            Case.of(task, result["margins"][task], result["alone"][task], result["base"][task])
            for task in run.tasks
        ]
    return [singles.case(BankRun(task, run.form, run.seed), result["margins"][task]) for task in run.tasks]


def rows(results: Sequence[Result], singles: Singles) -> list[Row]:
    """All forms, merges and numbers of parts of the first seed, and where a second one was run, each of its groups by seed."""
    groups: dict[tuple[str, str, int, int], list[Case]] = {}
    first = min((one["seed"] for one in results), default=0)
    repeated = {(one["members"], one["form"], one["merge"]) for one in results if one["seed"] != first}
    for one in results:
        run = run_of(one)
        cases = cases_of(one, singles)
        if run.seed == first:
            groups.setdefault((run.form, run.merge, len(run.tasks), 0), []).extend(cases)
        if (run.members, run.form, run.merge) in repeated:
            groups.setdefault((run.form, run.merge, len(run.tasks), run.seed), []).extend(cases)
    forms = [*FORMS, SHIPPED]
    keys = sorted(
        groups, key=lambda key: (forms.index(key[0]), key[2], key[3], list(merges_of(key[0])).index(key[1]))
    )
    return [_row(key, groups[key]) for key in keys]


def _row(key: tuple[str, str, int, int], cases: Sequence[Case]) -> Row:
    form, merge, parts, seed = key
    lost, of = drop(cases), kept(cases)
    fused = accuracy(cases).value
    return Row(
        form, merge, parts, seed, len(cases), fused + lost.value, fused, lost.value, lost.low, lost.high, of.value, of.low, of.high
    )  # fmt: skip


def find(found: Sequence[Row], form: str, merge: str, parts: int, seed: int = 0) -> Row | None:
    """A row, if it is there."""
    return next(
        (row for row in found if (row.form, row.merge, row.parts, row.seed) == (form, merge, parts, seed)), None
    )


def table_of_forms(found: Sequence[Row]) -> str:
    """What the sum of two, three and all costs, by form."""
    counts = sorted({row.parts for row in found})
    head = ["sum of", *(f"{count}: drop, points | R²" for count in counts)]
    lines = []
    for form in FORMS:
        cells = [find(found, form, "sum", count) for count in counts]
        if all(cells):
            lines.append([FORMS[form].label, *(f"{row.lost} | {row.kept}" for row in cells if row)])
    return _wide(head, lines, 1 + 2 * len(counts))


def _wide(head: Sequence[str], lines: Sequence[Sequence[str]], columns: int) -> str:
    """A table whose cells hold several columns."""
    text = markdown(head, lines).splitlines()
    text[1] = "|---|" + "--:|" * (columns - 1)
    return "\n".join(text)


def table_of_methods(found: Sequence[Row], form: str, parts: int) -> str:
    """All methods on one form, the smallest drop first."""
    here = sorted(
        (row for row in found if (row.form, row.parts, row.seed) == (form, parts, 0)), key=lambda row: row.drop
    )
    lines = [
        [
            merges_of(form)[row.merge].label,
            f"{100 * row.alone:.1f}",
            f"{100 * row.fused:.1f}",
            row.lost,
            row.kept,
        ]
        for row in here
    ]
    return markdown(["merge", "alone, %", "fused, %", "drop, points", "R²"], lines)


def table_of_merges(found: Sequence[Row], parts: int) -> str:
    """Sum, averages and the distilled merge, for each form."""
    names = [*EVERYWHERE, "distilled"]
    labels = ["sum", "average", "by overlap count", "distilled"]
    head = ["drop, points", "alone, %", *labels]
    lines = []
    for form in FORMS:
        cells = [find(found, form, name, parts) for name in names]
        if cells[0] is not None:
            lines.append(
                [
                    FORMS[form].label,
                    f"{100 * cells[0].alone:.1f}",
                    *("not tried" if row is None else row.lost for row in cells),
                ]
            )
    return markdown(head, lines)


def table_of_seeds(found: Sequence[Row]) -> str:
    """The same three tasks, trained twice."""
    seeds = sorted({row.seed for row in found if row.seed})
    lines = []
    for form in FORMS:
        for merge in EVERYWHERE:
            cells = [find(found, form, merge, 3, seed) for seed in seeds]
            if cells and all(cells):
                lines.append(
                    [
                        f"{FORMS[form].label}, {merge}",
                        *(f"{row.lost}" for row in cells if row),
                    ]
                )
    return markdown(["drop, points", *(f"seed {seed}" for seed in seeds)], lines)


def parts(results: Sequence[Result], found: Sequence[Row], folder: Path, bank: Bank) -> dict[str, str]:
    """What the page has of the results."""
    about = {
        "fused": "sums of all 15 pairs; two threes without a task in common, by every method; all six",
        "densities": f"methods that prune keep {100 * DENSITY:.0f} % of an adapter's entries",
    }
    everything = max((row.parts for row in found), default=0)
    return {
        "settings": settings(bank, results, machine_of(folder), about),
        "forms": table_of_forms(found),
        "threes": table_of_merges(found, 3),
        "all": table_of_merges(found, everything),
        "lora": table_of_methods(found, "lora", 3),
        **{form: table_of_methods(found, form, 3) for form in COMPARED},
        SHIPPED: table_of_methods(found, SHIPPED, 2),
        "seeds": table_of_seeds(found),
    }


def write(folder: Path, bank: Path, page: Path = PAGE) -> None:
    """CSV, tables and a picture from what is stored.

    Args:
        folder: with ``runs.jsonl`` and ``machine.json``; gets ``fusion.csv``.
        bank: the folder of the bank.
        page: whose parts are replaced; the picture goes beside it.
    """
    results = list(Store(folder / "runs.jsonl").results.values())
    found = rows(results, Singles(Bank(bank).store()))
    write_csv(found, folder / "fusion.csv")
    write_page(page, parts(results, found, folder, Bank(bank)))
    (page.parent / "fusion.png").write_bytes(picture(found))


def picture(found: Sequence[Row]) -> bytes:
    """Drops: of the sum by number of parts, and of three parts by method."""
    from shira_analysis.figures.style import LINES, MARKS, figure, our_style, render

    with our_style():
        drawn = figure(8.4, 4.2)
        left, right = drawn.subplots(1, 2, width_ratios=(1, 1.15))
        counts = sorted({row.parts for row in found})
        shown = [form for form in FORMS if all(find(found, form, "sum", count) for count in counts)]
        for number, form in enumerate(shown):
            here = [row for count in counts if (row := find(found, form, "sum", count))]
            places = [at + 0.06 * (number - len(shown) / 2) for at in range(len(here))]
            _points(
                left, places, here, LINES[number % len(LINES)], MARKS[number % len(MARKS)], FORMS[form].label, "-"
            )
        left.set_xticks(range(len(counts)), [str(count) for count in counts])
        left.set_xlabel("adapters summed")
        left.set_ylabel("drop in accuracy, points")
        left.legend(loc="upper left", fontsize=6.5)
        order: list[str] = []
        for number, form in enumerate(COMPARED):
            rows_of = sorted(
                (row for row in found if (row.form, row.parts, row.seed) == (form, 3, 0)),
                key=lambda row: -row.drop,
            )
            order += [row.merge for row in rows_of if row.merge not in order]
            _bars(
                right,
                [order.index(row.merge) + 0.16 * (2 * number - 1) for row in rows_of],
                rows_of,
                LINES[number],
                MARKS[number],
                form,
            )
        labels = [merges_of("wm")[merge].label.replace("`", "") for merge in order]
        right.set_yticks(range(len(order)), labels, fontsize=6.5)
        right.set_xlabel("drop of three, points")
        right.legend(loc="upper right", fontsize=6.5)
        for axis in (left, right):
            axis.grid()
        return render(drawn)


def _points(
    axis: Any, places: Sequence[float], here: Sequence[Row], colour: str, mark: str, label: str, line: str
) -> None:
    axis.errorbar(
        places, [100 * row.drop for row in here],
        yerr=[[100 * (row.drop - row.drop_low) for row in here], [100 * (row.drop_high - row.drop) for row in here]],
        color=colour, marker=mark, ms=3.5, lw=1, elinewidth=0.8, ls=line, label=label,
    )  # fmt: skip


def _bars(axis: Any, places: Sequence[float], here: Sequence[Row], colour: str, mark: str, form: str) -> None:
    axis.errorbar(
        [100 * row.drop for row in here], places,
        xerr=[[100 * (row.drop - row.drop_low) for row in here], [100 * (row.drop_high - row.drop) for row in here]],
        color=colour, marker=mark, ms=3.5, ls="", elinewidth=0.8, label=FORMS[form].label,
    )  # fmt: skip
