"""The share of a fine-tune's gain by density and size of the model: a CSV, tables in the page, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from studies.commands import RESULTS
from studies.report import facts_table, write_csv
from studies.runs import Result, Store
from studies.scale import real
from studies.scale.crossing import WANTED, crossing, shown
from studies.scale.plan import BATCH, LENGTH, METHODS
from studies.statistics import DRAWS, Estimate, Floats, interval
from studies.tables import PAGES, machine_of, markdown, write_page

PAGE = PAGES / "scale.md"


@dataclass(frozen=True)
class Row:
    """A model with adapters of one density.

    Attributes:
        hidden: size.
        layers: blocks.
        method: of the study's.
        density: of the entries.
        seeds: how many.
        entries: of the adapter.
        gain: share of the fine-tune's gain in held-out loss, with its 95 % interval over passages.
        low: of the interval.
        high: likewise.
    """

    hidden: int
    layers: int
    method: str
    density: float
    seeds: int
    entries: int
    gain: float
    low: float
    high: float

    @property
    def shown(self) -> str:
        """The share in per cent, as a cell."""
        return Estimate(self.gain, self.low, self.high).shown(100, digits=0)


class Model:
    """One model with all that was tuned from it, as losses of passages: ``[seeds, passages]`` by method and density."""

    def __init__(self, group: Sequence[Result]) -> None:
        self.of: dict[tuple[str, float], Floats] = {}
        self.entries = {(one["method"], one["density"]): one["entries"] for one in group}
        self.parameters = max(one.get("parameters", 0) for one in group)
        for key in self.entries:
            here = sorted(
                (one for one in group if (one["method"], one["density"]) == key), key=lambda one: one["seed"]
            )
            self.of[key] = np.array([one["losses"] for one in here])
        self.seeds = min(len(one) for one in self.of.values())
        passages = self.of["base", 0.0].shape[1]
        self.draws = np.random.default_rng(0).integers(0, passages, (DRAWS, passages))

    @property
    def gain(self) -> Estimate:
        """Of the fine-tune, nats a byte."""
        each = self.mean("base", 0.0) - self.mean("full", 1.0)
        return interval(float(each.mean()), each[self.draws].mean(1))

    def mean(self, method: str, density: float) -> Floats:
        """Losses of passages, the mean of the seeds."""
        found: Floats = self.of[method, density].mean(0)
        return found

    def densities(self, method: str) -> list[float]:
        """Of a method."""
        return sorted(density for name, density in self.of if name == method)

    def shares(self, method: str) -> tuple[Floats, Floats]:
        """Of the fine-tune's gain: ``[densities]``, and of the bootstrap ``[draws, densities]``."""
        base, full = self.mean("base", 0.0), self.mean("full", 1.0)
        mine = np.array([self.mean(method, density) for density in self.densities(method)])
        value = (base.mean() - mine.mean(1)) / (base.mean() - full.mean())
        some = [base[self.draws].mean(1), full[self.draws].mean(1)]
        each = np.array([(some[0] - one[self.draws].mean(1)) / (some[0] - some[1]) for one in mine])
        return value, each.T

    def needed(self, method: str, wanted: float) -> str:
        """The density at which a share of the gain is reached, with its interval, as a cell."""
        densities = self.densities(method)
        value, draws = self.shares(method)
        each = [crossing(densities, one, wanted) for one in draws]
        low, high = np.percentile([one if np.isfinite(one) else 1e9 for one in each], [2.5, 97.5])
        return shown(crossing(densities, value, wanted), low, high, densities)


def models(results: Sequence[Result]) -> Mapping[tuple[int, int], Model]:
    """By hidden size and layers; those whose fine-tune is there."""
    groups: dict[tuple[int, int], list[Result]] = {}
    for one in results:
        groups.setdefault((one["hidden"], one["layers"]), []).append(one)
    return {
        key: Model(group)
        for key, group in sorted(groups.items())
        if {"base", "full"} <= {one["method"] for one in group}
    }


def rows(found: Mapping[tuple[int, int], Model]) -> list[Row]:
    """All models, methods and densities."""
    made = []
    for (hidden, layers), model in found.items():
        for method in METHODS:
            densities = model.densities(method)
            if not densities:
                continue
            value, draws = model.shares(method)
            for at, density in enumerate(densities):
                of = interval(float(value[at]), draws[:, at])
                entries = model.entries[method, density]
                made.append(Row(hidden, layers, method, density, model.seeds, entries, of.value, of.low, of.high))
    return made


def table(found: Mapping[tuple[int, int], Model], method: str) -> str:
    """A line for each model: its gain, what each density keeps of it, and what is needed for most of it."""
    made = [row for row in rows(found) if row.method == method]
    densities = sorted({row.density for row in made})
    lines = []
    for (hidden, layers), model in found.items():
        here = {row.density: row for row in made if (row.hidden, row.layers) == (hidden, layers)}
        if all(density in here for density in densities):
            lines.append(
                [
                    f"{hidden} x {layers}",
                    *(f"{size:,}".replace(",", " ") for size in (model.parameters, model.entries["full", 1.0])),
                    model.gain.shown(digits=3),
                    *(here[density].shown for density in densities),
                    *(model.needed(method, wanted) for wanted in WANTED),
                ]
            )
    head = ["hidden x layers", "parameters", "in the matrices", "gain of the fine-tune, nats a byte"]
    return markdown(
        [
            *head,
            *(f"{100 * one:g} %: of the gain, %" for one in densities),
            *(f"for {100 * wanted:g} %" for wanted in WANTED),
        ],
        lines,
    )


def write(folder: Path, _: Path, page: Path = PAGE) -> None:
    """CSV, tables and a picture from what is stored in ``folder``."""
    results = list(Store(folder / "runs.jsonl").results.values())
    found = models(results)
    write_csv(rows(found), folder / "scale.csv")
    steps = results[0]["steps"]
    facts = {
        "models": "Llama's architecture on bytes, random at first, float32; embeddings are tied",
        "pretraining": f"{steps} steps of {BATCH} passages of {LENGTH} bytes of the Brown corpus",
        "tuning": f"a quarter as many steps on mails, all matrices of the blocks or entries of them; {len(results[0]['losses'])} passages held out",
        "seeds": ", ".join(map(str, sorted({one["seed"] for one in results}))),
        "runs": f"{len(results)}, {sum(one['seconds'] for one in results) / 60:.0f} minutes of one thread on a shared machine",
    }  # fmt: skip
    parts = {
        "settings": facts_table(facts, machine_of(folder)),
        **{method: table(found, method) for method in METHODS},
        "real": real.table(list(Store(RESULTS / "fits" / "runs.jsonl").results.values())),
    }
    write_page(page, parts)
    (page.parent / "scale.png").write_bytes(picture(rows(found)))


def picture(found: Sequence[Row]) -> bytes:
    """What is kept of the gain by density, a line for each model."""
    from shira_analysis.figures.style import GREY, LINES, MARKS, figure, our_style, render

    with our_style():
        drawn = figure(7.6, 3.3)
        axes = drawn.subplots(1, len(METHODS), sharey=True)
        keys = sorted({(row.hidden, row.layers) for row in found})
        for axis, (method, label) in zip(axes, METHODS.items(), strict=True):
            for number, (hidden, layers) in enumerate(keys):
                here = [row for row in found if (row.hidden, row.layers, row.method) == (hidden, layers, method)]
                axis.errorbar(
                    [100 * row.density * (1 + 0.04 * number) for row in here], [100 * row.gain for row in here],
                    yerr=[[100 * (row.gain - row.low) for row in here], [100 * (row.high - row.gain) for row in here]],
                    color=LINES[number], marker=MARKS[number], ms=3.5, lw=1.1, elinewidth=0.6, label=f"{hidden} x {layers}",
                )  # fmt: skip
            for wanted in WANTED:
                axis.axhline(100 * wanted, color=GREY, lw=0.8, ls=":")
            axis.set_xscale("log")
            axis.set_title(label)
            axis.set_xlabel("entries, %")
            axis.grid()
        axes[0].set_ylabel("of the fine-tune's gain, %")
        axes[0].legend(fontsize=7)
        return render(drawn)
