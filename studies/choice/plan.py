"""The grid: masks, densities and seeds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from studies.masks import ALL, ATTENTION, ENTRIES, MATRICES, METHODS, STEPS, rate_at
from studies.masks import Plan as MasksPlan
from studies.runs import Run, Store

TASKS = ("spam", "genre")
MASKS = ("wm", "snip", "grad", "rand", "struct", "rows", "wm-runs", "grad-runs", "lift", "gallop", "neuroada")
HEAD = "head"  # trained as long, without anything beside it
HELD = 150  # texts
# By density the size of the study of masks that is next to it, whose rates are taken.
SIZES = {0.001: "small", 0.01: "large", 0.02: "large"}
_WIDE = r"encoder\.layer\.\d+\.(intermediate|output)\.dense\.weight$"
_QUERY = r"encoder\.layer\.\d+\..*query\.weight$"
# Rank, matrices, and the rank of some of these: 9 216, 105 984 and 211 968 parameters.
LORAS: Mapping[float, tuple[int, str, Mapping[str, int]]] = {
    0.001: (1, ATTENTION, {}),
    0.01: (2, MATRICES, {_WIDE: 3}),
    0.02: (5, MATRICES, {_QUERY: 6}),
}


@dataclass(frozen=True)
class ChoiceRun(Run):
    """Both tasks, trained and fused.

    Attributes:
        method: of :data:`MASKS`, ``"lora"`` or :data:`HEAD`.
        density: of :data:`SIZES`; 0 of the head.
        seed: of the heads, of the order of texts, and of what the method draws.
        rate: at the peak.
        steps: of :data:`studies.learning.BATCH` texts, for each task.
    """

    method: str
    density: float
    seed: int
    rate: float
    steps: int

    @property
    def mask_options(self) -> dict[str, Any]:
        """What ``make_mask`` takes."""
        return METHODS[self.method].mask_options(SIZES[self.density], self.density)


def rates_of(masks: Store) -> dict[tuple[str, float], float]:
    """The rates of all methods and densities, from those that the study of masks found at its two sizes.

    Args:
        masks: the results of that study, which ship with it.
    """
    found = {(HEAD, 0.0): 0.0}
    for method in ("lora", *MASKS):
        for density, size in SIZES.items():
            rate = MasksPlan().rate(masks, method, size)
            assert isinstance(rate, float), f"{masks.path}: has no rate of {method}, {size}"
            small = size == "small" and (method == "lora" or METHODS[method].lines)
            entries = ENTRIES[size] if small else density * ALL
            found[method, density] = float(f"{rate_at(rate, size, entries):.3g}")
    return found


@dataclass(frozen=True)
class Plan:
    """What the study consists of.

    Attributes:
        rates: by method and density, see :func:`rates_of`.
        methods: which.
        densities: of :data:`SIZES`.
        seeds: how many.
        steps: of each training.
        only: those of whose "METHOD DENSITY SEED" it finds a part.
    """

    rates: Mapping[tuple[str, float], float]
    methods: Sequence[str] = ("lora", *MASKS)
    densities: Sequence[float] = tuple(SIZES)
    seeds: int = 3
    steps: int = STEPS
    only: str = ""

    def runs(self) -> Iterator[ChoiceRun]:
        """All of them, one seed before the next."""
        for seed in range(1, self.seeds + 1):
            cases = [(HEAD, 0.0), *((method, density) for density in self.densities for method in self.methods)]
            yield from (ChoiceRun(*case, seed, self.rates[case], self.steps) for case in cases)

    def following(self, store: Store) -> list[ChoiceRun]:
        """The runs that are left."""
        return [
            run
            for run in self.runs()
            if run not in store and re.search(self.only, f"{run.method} {run.density:g} {run.seed}")
        ]
