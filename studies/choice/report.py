"""Masks alone and fused: CSVs, tables in the page, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

from studies.bank.plan import Bank
from studies.choice.forms import rows_of_forms, table_of_forms
from studies.choice.plan import HEAD, MASKS, SIZES, TASKS
from studies.choice.scores import ALONE, FUSED, Score, front, r2, score
from studies.commands import RESULTS
from studies.learning import BATCH
from studies.masks import LENGTH, METHODS
from studies.report import facts_table, write_csv
from studies.runs import Result, Store
from studies.statistics import Estimate
from studies.tables import PAGES, Singles, machine_of, markdown, write_page

PAGE = PAGES / "choice.md"
MARKS = {"sum": "\\*", "average": "†"}
"""Of the front, by the way to fuse."""
NOTHING = "none"
METHODS_RUN = ("lora", *MASKS)
NOT_RUN = "This density has not been run."
COMPARED = (
    ("wm-runs", "wm"), ("grad-runs", "grad"), ("rows", "wm"), ("rows", "rand"), ("struct", "wm"), ("struct", "rand")
)  # fmt: skip
"""What is cheap to train, to store and to switch, and the single entries that it is compared with."""


@dataclass(frozen=True)
class Row:
    """A method at a density, by one way to fuse, over its seeds.

    Attributes:
        density: share of the entries.
        method: of the study's, or the head alone.
        merge: of :data:`FUSED`; :data:`NOTHING` of the head alone, whose figures are the same alone and fused.
        seeds: how many.
        entries: of each adapter.
        rate: of learning.
        alone: mean accuracy of both tasks, a share, with its 95 % interval over texts and seeds.
        alone_low: of the interval.
        alone_high: likewise.
        alone_sd: standard deviation over the seeds; 0 of one seed.
        fused: of both fused, likewise.
        fused_low: likewise.
        fused_high: likewise.
        fused_sd: likewise.
        r2: what is kept of the parts' effect on margins, the median, with its interval over the texts.
        r2_low: likewise.
        r2_high: likewise.
        front: whether no other method is as good alone and fused and better at one; False while some have not been run.
        front_share: of the draws, in which that is so.
    """

    density: float
    method: str
    merge: str
    seeds: int
    entries: int
    rate: float
    alone: float
    alone_low: float
    alone_high: float
    alone_sd: float
    fused: float
    fused_low: float
    fused_high: float
    fused_sd: float
    r2: float
    r2_low: float
    r2_high: float
    front: bool
    front_share: float

    def shown(self, name: str, scale: float = 100.0, digits: int = 1) -> str:
        """A figure and its interval, as a cell."""
        value, low, high = (getattr(self, f"{name}{end}") for end in ("", "_low", "_high"))
        return Estimate(value, low, high).shown(scale, digits)


@dataclass(frozen=True)
class Density:
    """What is stored of a density.

    Attributes:
        density: share of the entries.
        groups: by method, those of the seeds that all of the methods have, in order.
        head: of the same seeds.
        scores: by method, alone and by way to fuse.
    """

    density: float
    groups: Mapping[str, list[Result]]
    head: list[Result]
    scores: Mapping[str, Mapping[str, Score]]

    @property
    def seeds(self) -> list[int]:
        """Of the groups."""
        return [one["seed"] for one in self.head]

    @property
    def whole(self) -> bool:
        """Whether all methods are there."""
        return len(self.groups) == len(METHODS_RUN)


def densities(results: Sequence[Result]) -> list[Density]:
    """All with a seed that all methods have of which something is stored there."""
    return [found for density in SIZES if (found := _density(results, density)) is not None]


def _density(results: Sequence[Result], density: float) -> Density | None:
    groups = {
        method: [one for one in results if (one["method"], one["density"]) == (method, of)]
        for method, of in [(HEAD, 0.0), *((method, density) for method in METHODS_RUN)]
    }
    found = {method: {one["seed"]: one for one in group} for method, group in groups.items() if group}
    seeds = sorted(set.intersection(*(set(group) for group in found.values()))) if len(found) > 1 else []
    if not seeds or HEAD not in found:
        return None
    known = {method: [group[seed] for seed in seeds] for method, group in found.items()}
    head = known.pop(HEAD)
    scores = {method: {state: score(group, state) for state in (ALONE, *FUSED)} for method, group in known.items()}
    return Density(density, known, head, scores)


def rows(found: Density) -> list[Row]:
    """The methods of a density by each way to fuse, those that are best alone and summed first, and at the end the head alone."""
    of = {state: {method: one[state] for method, one in found.scores.items()} for state in (ALONE, *FUSED)}
    # A front of some of the methods would be none.
    unknown = dict.fromkeys(found.scores, (False, 0.0))
    fronts = {merge: front(of[ALONE], of[merge]) if found.whole else unknown for merge in FUSED}
    made = []
    for method in sorted(of[ALONE], key=lambda one: -(of[ALONE][one].value + of["sum"][one].value)):
        group, alone = found.groups[method], _figures(of[ALONE][method])
        for merge in FUSED:
            kept = r2(group, merge)
            made.append(
                Row(
                    found.density, method, merge, len(group), group[0]["entries"][TASKS[0]], group[0]["rate"], *alone,
                    *_figures(of[merge][method]), kept.value, kept.low, kept.high, *fronts[merge][method],
                )
            )  # fmt: skip
    alone = _figures(score(found.head, ALONE))
    nothing = Row(found.density, HEAD, NOTHING, len(found.head), 0, 0.0, *alone, *alone, 1.0, 1.0, 1.0, False, 0.0)
    return [*made, nothing]


def _figures(of: Score) -> tuple[float, float, float, float]:
    known = of.estimate
    return known.value, known.low, known.high, stdev(of.seeds) if len(of.seeds) > 1 else 0.0


def table(found: Sequence[Row]) -> str:
    """Of one density."""
    head = ["accuracy, %", "entries", "alone", *FUSED.values(), "R² of the sum", "R² of the average"]
    lines = []
    whole = any(row.front for row in found)
    for method in dict.fromkeys(row.method for row in found):
        here = [row for row in found if row.method == method]
        marks = "".join(f" {MARKS[row.merge]}" for row in here if row.front)
        cells = [row.shown("fused") for row in here] + [row.shown("r2", 1.0, 2) for row in here]
        shares = [f"{100 * row.front_share:.0f}" if whole else "not all run" for row in here]
        lines.append(
            [
                METHODS[method].label + marks,
                f"{here[0].entries:,}".replace(",", " "),
                here[0].shown("alone"),
                *([*cells, *shares] if method != HEAD else ["none"] * 6),
            ]
        )
    return markdown([*head, *(f"{mark}, % of draws" for mark in MARKS.values())], lines)


def table_of_cheap(found: Sequence[Density]) -> str:
    """What rows and runs have more than single entries, or less."""
    lines = []
    for cheap, other in COMPARED:
        for one in found:
            if cheap in one.scores and other in one.scores:
                cells = [
                    one.scores[cheap][state].more_than(one.scores[other][state]).shown(100, sign=True)
                    for state in (ALONE, *FUSED)
                ]
                label = f"{METHODS[cheap].label} against {METHODS[other].label}"
                lines.append([label, f"{100 * one.density:g} %", *cells])
    return markdown(["points more", "entries", "alone", *FUSED.values()], lines)


def write(folder: Path, bank: Path, page: Path = PAGE, others: Path = RESULTS) -> None:
    """CSVs, tables and a picture from what is stored.

    Args:
        folder: with ``runs.jsonl`` and ``machine.json``; gets ``choice.csv`` and ``forms.csv``.
        bank: the folder of the bank.
        page: whose parts are replaced; the picture goes beside it.
        others: with the folder of the study of fusion.
    """
    results = list(Store(folder / "runs.jsonl").results.values())
    found = densities(results)
    made = [rows(one) for one in found]
    write_csv([row for some in made for row in some], folder / "choice.csv")
    fused = list(Store(others / "fusion" / "runs.jsonl").results.values())
    forms = rows_of_forms(fused, Singles(Bank(bank).store()))
    write_csv(forms, folder / "forms.csv")
    tables = {one.density: table(some) for one, some in zip(found, made, strict=True)}
    parts = {
        "settings": settings(results, found, folder),
        **{f"{100 * density:g} %": tables.get(density, NOT_RUN) for density in SIZES},
        "cheap": table_of_cheap(found),
        "forms": table_of_forms(forms),
    }
    write_page(page, parts)
    (page.parent / "choice.png").write_bytes(picture(made))


def settings(results: Sequence[Result], found: Sequence[Density], folder: Path) -> str:
    """What was trained, how, and on what."""
    seeds = "; ".join(
        f"{100 * one.density:g} %: {len(one.groups)} of {len(METHODS_RUN)} methods, seeds {', '.join(map(str, one.seeds))}"
        for one in found
    )
    facts = {
        "model": "all-MiniLM-L6-v2, float32, without dropout; each task has a head of its own, which is never fused",
        "tasks": "spam: ham or spam; genre: news or romance",
        "texts": f"{len(results[0]['margins'][TASKS[0]])} held out for each task, cut to {LENGTH} tokens",
        "training": f"{results[0]['steps']} steps of {BATCH} texts, AdamW without decay, gradients clipped to 1",
        "in the tables": seeds,
        "runs": f"{len(results)}, of two trainings each, {sum(one['seconds'] for one in results) / 3600:.1f} hours of one thread on a shared machine",
    }  # fmt: skip
    return facts_table(facts, machine_of(folder))


def picture(made: Sequence[Sequence[Row]]) -> bytes:
    """Accuracy fused against that alone: a column for each density, sums above and averages below."""
    from shira_analysis.figures.style import GREY, figure, line_style, our_style, render

    with our_style():
        drawn = figure(2.9 * len(made) + 0.4, 6.4)
        axes = drawn.subplots(len(FUSED), len(made), squeeze=False, sharex=True, sharey=True)
        for line, (merge, label) in zip(axes, FUSED.items(), strict=True):
            for axis, some in zip(line, made, strict=True):
                here = sorted(
                    (row for row in some if row.merge == merge), key=lambda row: METHODS_RUN.index(row.method)
                )
                for row in here:
                    x, y = (
                        [100 * getattr(row, f"{key}{end}") for end in ("", "_low", "_high")]
                        for key in ("alone", "fused")
                    )
                    axis.errorbar(
                        x[0], y[0], xerr=[[x[0] - x[1]], [x[2] - x[0]]], yerr=[[y[0] - y[1]], [y[2] - y[0]]],
                        **line_style(METHODS_RUN.index(row.method)) | {"ls": ""}, ms=5, elinewidth=0.3, label=METHODS[row.method].label,
                    )  # fmt: skip
                best = sorted((row for row in here if row.front), key=lambda row: row.alone)
                axis.plot(
                    [100 * row.alone for row in best], [100 * row.fused for row in best],
                    color="black", lw=0.8, ls=":", label="front",
                )  # fmt: skip
                axis.axline((80, 80), slope=1, color=GREY, lw=0.6, label="as good as alone")
                axis.set_title(f"{100 * some[0].density:g} %, {label}")
                axis.grid()
            line[0].set_ylabel("accuracy fused, %")
        for axis in axes[-1]:
            axis.set_xlabel("accuracy alone, %")
        handles, labels = axes[0][0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=7)
        return render(drawn)
