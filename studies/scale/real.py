"""Models that are used: which density a fit or a cut needs on MiniLM and on SmolLM2, from the stored runs of the study of fits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from studies.fits import LANGUAGE, LORAS, METHODS, TUNED
from studies.fits_report import Row, rows
from studies.runs import Result
from studies.scale.crossing import WANTED, crossing, shown
from studies.statistics import Estimate
from studies.tables import markdown

SAME = 0.005  # the density that both models have
FORMS = ("cut", "cut-global", "moments", "distill")
MODELS = {**dict.fromkeys((*LORAS, TUNED), "MiniLM"), LANGUAGE: "SmolLM2"}


def needed(found: Sequence[Row], wanted: float) -> str:
    """The density at which R² is as wanted, as a cell.

    Args:
        found: of one source and method, by density. The limits are where those of the intervals of R² reach it.
        wanted: R².
    """
    densities = [row.density for row in found]
    curves = ([row.r2 for row in found], [row.r2_high for row in found], [row.r2_low for row in found])
    value, low, high = (crossing(densities, np.array(curve), wanted) for curve in curves)
    return shown(value, low, high, densities)


def table(results: Sequence[Result]) -> str:
    """A line for each source and form that was run.

    Args:
        results: of the study of fits.
    """
    sizes = {one["source"]: one["budget"] for one in results if one["method"] == "source"}
    steps = {(one["source"], one["method"]): one["steps"] for one in results}
    found = [row for row in rows(results) if not row.texts]
    lines = []
    for source, model in MODELS.items():
        for method in FORMS:
            here = [row for row in found if (row.source, row.method) == (source, method)]
            if not here:
                continue
            same = [
                Estimate(row.r2, row.r2_low, row.r2_high).shown(digits=3) for row in here if row.density == SAME
            ]
            cells = [
                f"{sizes[source] / 1e6:.1f} M", METHODS[method].label, str(steps[source, method]),
                ", ".join(f"{100 * row.density:g}" for row in here), same[0] if same else "not run",
            ]  # fmt: skip
            lines.append([model, source, *cells, *(needed(here, wanted) for wanted in WANTED)])
    head = ["model", "source", "entries", "form", "steps", "densities that were run, %"]
    return markdown([*head, f"R² at {100 * SAME:g} %", *(f"for R² {wanted:g}" for wanted in WANTED)], lines)
