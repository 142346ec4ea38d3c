"""Rank correlations of measures with what pairs lose: a CSV, tables in the page, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from studies.bank.forms import FORMS
from studies.bank.plan import Bank
from studies.commands import RESULTS
from studies.fusion.plan import FusionRun
from studies.fusion.report import cases_of
from studies.interference.plan import MEASURES
from studies.report import write_csv
from studies.runs import Result, Store
from studies.statistics import Case, Estimate, spearman_over_pairs
from studies.tables import PAGES, Singles, machine_of, markdown, settings, write_page

PAGE = PAGES / "interference.md"
LOSSES = {"unkept": "1 - R² of the margins", "drop": "drop in accuracy"}
ALL = "all"


@dataclass(frozen=True)
class Row:
    """One adapter of a pair, with what it loses when the other is added.

    Attributes:
        form: of both adapters.
        task: whose adapter it is.
        other: of the other adapter.
        unkept: 1 - R² of the margins on the held-out texts of ``task``.
        drop: in accuracy there, a share.
        measures: by name of :data:`MEASURES`.
    """

    form: str
    task: str
    other: str
    unkept: float
    drop: float
    measures: Mapping[str, float]


@dataclass(frozen=True)
class Line:
    """A line of the CSV: a rank correlation.

    Attributes:
        form: of the bank's, or ``"all"``.
        measure: of :data:`MEASURES`.
        loss: of :data:`LOSSES`.
        cases: adapters of pairs.
        rho: Spearman's.
        low: of its 95 % interval over tasks.
        high: likewise.
    """

    form: str
    measure: str
    loss: str
    cases: int
    rho: float
    low: float
    high: float


def rows(measured: Sequence[Result], fused: Store, singles: Singles) -> list[Row]:
    """All adapters of pairs of which both the measures and the sum are stored."""
    found = []
    for one in measured:
        run = FusionRun(f"{one['first']}+{one['second']}", one["form"], "sum", one["seed"])
        if run not in fused:
            continue
        cases = {case.task: case for case in cases_of(fused.results[run.key], singles)}
        for directed in one["directed"]:
            case = cases[directed["task"]]
            measures = {name: float(directed[name]) for name in MEASURES}
            found.append(Row(one["form"], directed["task"], directed["other"], *_lost(case), measures))
    return found


def _lost(case: Case) -> tuple[float, float]:
    wanted = float(np.square(case.base - case.alone).sum())
    missed = float(np.square(case.fused - case.alone).sum())
    return missed / wanted, float(np.mean((case.alone > 0) - (case.fused > 0).astype(float)))


def lines(found: Sequence[Row]) -> list[Line]:
    """All correlations; a measure that is the same for all pairs of a form has none there."""
    made = []
    for form in (*FORMS, ALL):
        here = [row for row in found if form in (row.form, ALL)]
        pairs = [(row.task, row.other) for row in here]
        for measure in MEASURES:
            for loss in LOSSES:
                of = _correlation(pairs, here, measure, loss)
                if of is not None:
                    made.append(Line(form, measure, loss, len(here), of.value, of.low, of.high))
    return made


def _correlation(
    pairs: Sequence[tuple[str, str]], here: Sequence[Row], measure: str, loss: str
) -> Estimate | None:
    if len(here) < 4:
        return None
    return spearman_over_pairs(
        pairs, [row.measures[measure] for row in here], [getattr(row, loss) for row in here]
    )


def table(made: Sequence[Line], loss: str) -> str:
    """Measures as rows, forms as columns; a dash where a measure is the same for all pairs."""
    forms = [form for form in (*FORMS, ALL) if any(line.form == form for line in made)]
    head = ["Spearman's ρ", *(FORMS[form].label if form in FORMS else "all forms" for form in forms)]
    cells = []
    for measure, label in MEASURES.items():
        here = {line.form: line for line in made if (line.measure, line.loss) == (measure, loss)}
        cells.append([label, *(_shown(here[form]) if form in here else "same for all" for form in forms)])
    return markdown(head, cells)


def _shown(line: Line) -> str:
    return Estimate(line.rho, line.low, line.high).shown(digits=2, sign=True)


def table_of_sizes(found: Sequence[Row]) -> str:
    """What the measures are, by form: the median, and the quartiles."""
    names = ("overlap", "cosine", "awor", "awom_relative", "feature_cosine", "feature_size", "disturbed_each")
    head = ["median (quartiles)", *(MEASURES[name] for name in names), LOSSES["unkept"], "drop, points"]
    cells = []
    for form in FORMS:
        here = [row for row in found if row.form == form]
        if here:
            columns = [[row.measures[name] for row in here] for name in names]
            columns += [[row.unkept for row in here], [100 * row.drop for row in here]]
            cells.append([FORMS[form].label, *(_quartiles(column) for column in columns)])
    return markdown(head, cells)


def _quartiles(column: Sequence[float]) -> str:
    low, middle, high = np.percentile(column, [25, 50, 75])
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def parts(
    results: Sequence[Result], found: Sequence[Row], made: Sequence[Line], folder: Path, bank: Bank
) -> dict[str, str]:
    """What the page has of the results."""
    about = {
        "pairs": f"all pairs of tasks, each adapter of a pair counted for itself: {len(found)} cases",
        "inputs": "128 inputs of each layer, from texts that no adapter was trained on",
    }
    return {
        "settings": settings(bank, results, machine_of(folder), about),
        "sizes": table_of_sizes(found),
        "unkept": table(made, "unkept"),
        "drop": table(made, "drop"),
    }


def write(folder: Path, bank: Path, page: Path = PAGE, fused: Path = RESULTS / "fusion") -> None:
    """CSV, tables and a picture from what is stored.

    Args:
        folder: with ``runs.jsonl`` and ``machine.json``; gets ``interference.csv``.
        bank: the folder of the bank.
        page: whose parts are replaced; the picture goes beside it.
        fused: the folder of the study of fusion.
    """
    results = list(Store(folder / "runs.jsonl").results.values())
    found = rows(results, Store(fused / "runs.jsonl"), Singles(Bank(bank).store()))
    made = lines(found)
    write_csv(made, folder / "interference.csv")
    write_page(page, parts(results, found, made, folder, Bank(bank)))
    (page.parent / "interference.png").write_bytes(picture(found))


SHOWN = ("cosine", "awor", "awom_relative", "feature_cosine", "feature_size", "disturbed_each")


def picture(found: Sequence[Row]) -> bytes:
    """What is lost against six measures, a point for each adapter of a pair."""
    from shira_analysis.figures.style import LINES, MARKS, figure, our_style, render

    with our_style():
        drawn = figure(8.4, 5.0)
        axes = drawn.subplots(2, 3, sharey=True)
        for axis, measure in zip(axes.flat, SHOWN, strict=True):
            for number, form in enumerate(FORMS):
                here = [row for row in found if row.form == form]
                axis.plot(
                    [row.measures[measure] for row in here], [max(row.unkept, 1e-4) for row in here],
                    ls="", marker=MARKS[number % len(MARKS)], ms=3, color=LINES[number % len(LINES)], label=FORMS[form].label,
                )  # fmt: skip
            axis.set_yscale("log")
            axis.set_xlabel(MEASURES[measure], fontsize=7.5)
            axis.grid()
        for row in axes:
            row[0].set_ylabel(LOSSES["unkept"])
        handles, labels = axes[0][0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7)
        return render(drawn)
