"""Strengths, distances, ranks and singular values: CSVs, tables in the page, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np

from studies.bank.forms import FORMS
from studies.bank.plan import Bank, BankRun
from studies.commands import RESULTS
from studies.fusion.plan import FusionRun
from studies.report import write_csv
from studies.runs import Result, Store
from studies.statistics import Case, Estimate, accuracy, kept
from studies.tables import PAGES, Singles, machine_of, markdown, settings, write_page
from studies.trained.plan import SCALED

PAGE = PAGES / "trained.md"


@dataclass(frozen=True)
class Strength:
    """A form at a strength, over its tasks.

    Attributes:
        form: of the bank's.
        parts: 1: single adapters; 3: sums of three.
        alpha: the strength.
        accuracy: a share, with its 95 % interval over the texts.
        low: of the interval.
        high: likewise.
        moved: R² of the margins against the adapter alone at strength 1, the median.
    """

    form: str
    parts: int
    alpha: float
    accuracy: float
    low: float
    high: float
    moved: float


def strengths(results: Sequence[Result], singles: Singles, fused: Store) -> list[Strength]:
    """All forms, numbers of parts and strengths, 0 and 1 among them."""
    groups: dict[tuple[str, int, float], list[Case]] = {}
    for one in results:
        if one["kind"] != "strength":
            continue
        tasks = one["members"].split("+")
        runs = {task: BankRun(task, one["form"], one["seed"]) for task in tasks}
        known: dict[float, Mapping[str, list[float]]] = {
            0.0: {task: singles[run]["base"] for task, run in runs.items()},
            **{float(alpha): found for alpha, found in one["alphas"].items()},
        }
        if len(tasks) == 1:
            known[1.0] = {task: singles[run]["margins"] for task, run in runs.items()}
        else:
            run = FusionRun(one["members"], one["form"], "sum", one["seed"])
            if run in fused:
                known[1.0] = fused.results[run.key]["margins"]
        for alpha, margins in known.items():
            cases = [singles.case(runs[task], margins[task]) for task in tasks]
            groups.setdefault((one["form"], len(tasks), alpha), []).extend(cases)
    keys = sorted(groups, key=lambda key: (list(FORMS).index(key[0]), *key[1:]))
    return [_strength(key, groups[key]) for key in keys]


def _strength(key: tuple[str, int, float], cases: Sequence[Case]) -> Strength:
    of = accuracy(cases)
    return Strength(*key, of.value, of.low, of.high, kept(cases).value)


def table_of_strengths(found: Sequence[Strength]) -> str:
    """Accuracies by form, parts and strength."""
    alphas = sorted({one.alpha for one in found})
    lines = []
    for form in SCALED:
        for parts in sorted({one.parts for one in found}):
            here = {one.alpha: one for one in found if (one.form, one.parts) == (form, parts)}
            if here:
                label = f"{FORMS[form].label}, " + ("alone" if parts == 1 else f"sum of {parts}")
                lines.append(
                    [label, *(Estimate(here[a].accuracy, here[a].low, here[a].high).shown(100) for a in alphas)]
                )
    return markdown(["accuracy, %", *(f"α = {alpha:g}" for alpha in alphas)], lines)


@dataclass(frozen=True)
class Distance:
    """L2 distances of a form's adapters, as in table 13 of the paper.

    Attributes:
        form: of the bank's.
        base: to the base, the mean of the tasks.
        base_low: the least.
        base_high: the greatest.
        others: to one another, the mean of all pairs.
        others_low: the least.
        others_high: the greatest.
        nearer: share of the adapters of pairs that are nearer to the base than to the other one.
    """

    form: str
    base: float
    base_low: float
    base_high: float
    others: float
    others_low: float
    others_high: float
    nearer: float


def distances(measured: Sequence[Result]) -> list[Distance]:
    """From the stored measures of pairs."""
    found = []
    for form in FORMS:
        directed = [side for one in measured if one["form"] == form for side in one["directed"]]
        if directed:
            base = list({side["task"]: side["norm"] for side in directed}.values())
            others = [side["between"] for side in directed]
            nearer = mean(side["norm"] < side["between"] for side in directed)
            found.append(
                Distance(form, mean(base), min(base), max(base), mean(others), min(others), max(others), nearer)
            )
    return found


def table_of_distances(found: Sequence[Distance]) -> str:
    """Means, with the least and the greatest in brackets."""
    lines = [
        [
            FORMS[one.form].label,
            Estimate(one.base, one.base_low, one.base_high).shown(digits=2),
            Estimate(one.others, one.others_low, one.others_high).shown(digits=2),
            f"{100 * one.nearer:.0f} %",
        ]
        for one in found
    ]
    return markdown(
        ["L2 distance, mean (least to greatest)", "to the base", "to one another", "nearer to the base"], lines
    )


def table_of_ranks(results: Sequence[Result]) -> str:
    """Of all matrices the median, with the least and the greatest."""
    lines = []
    for form in FORMS:
        here = [one for one in results if one["kind"] == "spectrum" and one["form"] == form]
        if here:
            columns = {
                name: [value for one in here for value in one[name]]
                for name in ("rank", "numerical", "stable", "holding")
            }
            full = [value for one in here for value in one["full"]]
            share = [rank / most for rank, most in zip(columns["rank"], full, strict=True)]
            proven, matrices = (sum(one[name] for one in here) for name in ("proven", "matrices"))
            cells = [
                _range(columns[name], digits)
                for name, digits in (("rank", 0), ("numerical", 0), ("stable", 1), ("holding", 0))
            ]
            lines.append(
                [
                    FORMS[form].label,
                    cells[0],
                    f"{proven} of {matrices}",
                    _range([100 * one for one in share], 1),
                    *cells[1:],
                ]
            )
    head = [
        "median (least to greatest)",
        "exact rank",
        "proven",
        "of the full rank, %",
        "numerical rank",
        "stable rank",
        "values that hold 90 %",
    ]
    return markdown(head, lines)


def _range(values: Sequence[float], digits: int) -> str:
    return Estimate(float(np.median(values)), min(values), max(values)).shown(digits=digits)


def write(folder: Path, bank: Path, page: Path = PAGE, others: Path = RESULTS) -> None:
    """CSVs, tables and pictures from what is stored.

    Args:
        folder: with ``runs.jsonl`` and ``machine.json``; gets ``strengths.csv`` and ``distances.csv``.
        bank: the folder of the bank.
        page: whose parts are replaced; the pictures go beside it.
        others: with the folders of the studies of fusion and of interference.
    """
    results = list(Store(folder / "runs.jsonl").results.values())
    fused = Store(others / "fusion" / "runs.jsonl")
    scaled = strengths(results, Singles(Bank(bank).store()), fused)
    apart = distances(list(Store(others / "interference" / "runs.jsonl").results.values()))
    write_csv(scaled, folder / "strengths.csv")
    write_csv(apart, folder / "distances.csv")
    about = {
        "strengths": "all tasks, and two sums of three",
        "ranks": "the 36 matrices of the adapters of spam and genre",
    }
    parts = {
        "settings": settings(Bank(bank), results, machine_of(folder), about),
        "strengths": table_of_strengths(scaled),
        "distances": table_of_distances(apart),
        "ranks": table_of_ranks(results),
    }
    write_page(page, parts)
    (page.parent / "trained-strength.png").write_bytes(picture(scaled))
    (page.parent / "trained-spectra.png").write_bytes(picture_of_spectra(results))


def picture(found: Sequence[Strength]) -> bytes:
    """Accuracy and R² against the strength, single adapters and sums."""
    from shira_analysis.figures.style import LINES, MARKS, figure, our_style, render

    with our_style():
        drawn = figure(7.6, 3.2)
        left, right = drawn.subplots(1, 2)
        for number, form in enumerate(SCALED):
            for parts, dashes in ((1, "-"), (3, "--")):
                here = [one for one in found if (one.form, one.parts) == (form, parts)]
                if not here:
                    continue
                x, label = (
                    [one.alpha for one in here],
                    f"{FORMS[form].label}, {'alone' if parts == 1 else 'sum of 3'}",
                )
                left.plot(
                    x,
                    [100 * one.accuracy for one in here],
                    dashes,
                    color=LINES[number],
                    marker=MARKS[number],
                    ms=3.5,
                    label=label,
                )
                left.fill_between(
                    x,
                    [100 * one.low for one in here],
                    [100 * one.high for one in here],
                    color=LINES[number],
                    alpha=0.1,
                    lw=0,
                )
                right.plot(
                    x, [one.moved for one in here], dashes, color=LINES[number], marker=MARKS[number], ms=3.5
                )
        left.set_ylabel("held-out accuracy, %")
        right.set_ylabel("R² to the adapter alone at α = 1")
        right.set_ylim(-1, 1.05)
        for axis in (left, right):
            axis.set_xlabel("strength α")
            axis.grid()
        drawn.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
        return render(drawn)


def picture_of_spectra(results: Sequence[Result]) -> bytes:
    """Mean singular values of the square matrices, each divided by its largest."""
    from shira_analysis.figures.style import LINES, figure, our_style, render

    with our_style():
        drawn = figure(5.2, 3.4)
        axis = drawn.subplots()
        for number, form in enumerate(FORMS):
            here = [one["spectrum"] for one in results if one["kind"] == "spectrum" and one["form"] == form]
            if here:
                values = np.mean(here, axis=0)
                axis.plot(
                    np.arange(1, values.size + 1),
                    np.maximum(values, 1e-6),
                    color=LINES[number % len(LINES)],
                    ls="-" if number < len(LINES) else "--",
                    label=FORMS[form].label,
                )
        axis.set_yscale("log")
        axis.set_xscale("log")
        axis.set_ylim(1e-5, 1.2)
        axis.set_xlabel("singular value, by size")
        axis.set_ylabel("divided by the largest")
        axis.grid()
        axis.legend(fontsize=6.5)
        return render(drawn)
