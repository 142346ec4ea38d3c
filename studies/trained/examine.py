"""One look at a trained adapter."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from shira_analysis.measures.lora import measure_lora
from shira_analysis.measures.rank import RankReport, rank_of
from studies.bank.forms import FORMS
from studies.bank.plan import BankRun
from studies.fusion import fuse
from studies.fusion.plan import FusionRun
from studies.trained.plan import ALPHAS, TrainedRun

start = fuse.start


def work(run: TrainedRun) -> dict[str, Any]:
    """Do one run."""
    begin = time.perf_counter()
    found = _strengths(run) if run.kind == "strength" else _spectrum(BankRun(run.members, run.form, run.seed))
    return found | {"seconds": round(time.perf_counter() - begin, 2)}


def _strengths(run: TrainedRun) -> dict[str, Any]:
    """Margins of each task at each strength."""
    merged = FusionRun(run.members, run.form, "sum", run.seed)
    found = {}
    for alpha in ALPHAS:
        one = len(run.tasks) == 1
        shown = (
            fuse.showing(BankRun(run.members, run.form, run.seed), alpha)
            if one
            else fuse.showing_fused(merged, alpha)
        )
        with shown as model:
            found[f"{alpha:g}"] = fuse.margins_of_all(model, merged)
    return {"alphas": found}


def _reports(run: BankRun) -> Iterator[RankReport]:
    if FORMS[run.form].kind == "lora":
        place = fuse.place()
        yield from (report for _, report in measure_lora(place.bank.adapter(run), place.base).tensors)
    else:
        yield from (rank_of(tensor) for tensor in fuse.adapter(run).values())


def _spectrum(run: BankRun) -> dict[str, Any]:
    """Ranks of all matrices, and the mean singular values of the square ones, each divided by its largest."""
    exact, spectra, rows = [], [], []
    for report in _reports(run):
        assert report.bounds is not None
        assert report.spectrum is not None
        exact.append(report.bounds.exact is not None)
        spectrum = report.spectrum
        rows.append(
            [
                report.bounds.lower,
                report.full,
                spectrum.numerical_rank,
                spectrum.stable_rank,
                spectrum.holding(0.9),
            ]
        )
        if report.shape[0] == report.shape[1] and spectrum.values.size:
            values = np.zeros(report.full)
            values[: spectrum.values.size] = spectrum.values
            spectra.append(values / values[0])
    columns = np.array(rows, np.float64)
    names = ("rank", "full", "numerical", "stable", "holding")
    return {
        "proven": sum(exact), "matrices": len(rows), "spectrum": [round(float(one), 5) for one in np.mean(spectra, axis=0)],
        **{name: [round(float(one), 3) for one in columns[:, at]] for at, name in enumerate(names)},
    }  # fmt: skip
