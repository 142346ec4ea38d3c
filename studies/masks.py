"""Which entries to train: masks beside a LoRA, full fine-tuning and a head alone, at equal numbers of trained entries.

The encoder is all-MiniLM-L6-v2 in float32, the tasks are those of :mod:`studies.texts`. In each run a head is fitted to the
unchanged encoder first, since the gradients that some masks rank by need a head that means something; then the mask is made, and
the head is trained on with what the method trains.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from studies.runs import Run, Store

TASKS = ("genre", "spam")
PILOT_TASK = "genre"
PILOT_SEED = 0
SEEDS = (1, 2, 3)
STEPS, PILOT_STEPS = 64, 24
LENGTH = 48  # tokens
# of entries in a training that regrows them, and the steps at most whose gradients tell which
CHANGES, SUMMED = 8, 5
CALIBRATION = 64  # texts for gradients
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST_RATES = (1e-3, 3e-3)
ALPHAS = tuple(number / 8 for number in range(11))

MATRICES = r"encoder\.layer\.\d+\..*(query|key|value|dense)\.weight$"  # 36, not the pooler
ATTENTION = r"encoder\.layer\.\d+\..*(query|value)\.weight$"  # 12
SIZES = ("large", "small")
ENTRIES = {"large": 82_944, "small": 9_216}
# As many as a LoRA of rank 2 on all matrices has parameters, 82 944; and as one of rank 1 on query and value has, 9216.
MASK_SIZES: dict[str, dict[str, Any]] = {"large": {"rank": 2}, "small": {"density": 1 / 1152}}
ALL = 10_616_832  # elements of all matrices
LORAS = {"large": (2, MATRICES), "small": (1, ATTENTION)}


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        label: in tables.
        rule: of the mask; "" without one.
        scope: of the mask's size.
        runs: entries in a row.
        dora: magnitudes beside the entries.
        regrown: entries are dropped and grown :data:`CHANGES` times in a training.
        lines: the mask has one entry or more in each row, so that the small size is placed on query and value alone, where the small
            LoRA is: spread over all matrices it would be less than that.
        sizes: in which it is run.
        rate: that is given; None: it is searched.
    """

    label: str
    rule: str = ""
    scope: str = "tensor"
    runs: int = 1
    dora: bool = False
    regrown: bool = False
    lines: bool = False
    sizes: tuple[str, ...] = SIZES
    rate: float | None = None

    def mask_options(self, size: str, density: float | None = None) -> dict[str, Any]:
        """What ``make_mask`` takes; with a density, which is near the size, of that instead where entries may be anywhere."""
        where = {"scope": self.scope, "runs": self.runs}
        if self.lines and size == "small":
            return {"rank": 1, "include": [ATTENTION]} | where
        return (MASK_SIZES[size] if density is None else {"density": density}) | {"include": [MATRICES]} | where


METHODS = {
    "lora": Method("LoRA (PEFT)"),
    "wm": Method("SHiRA-WM", "wm"),
    "snip": Method("SHiRA-SNIP", "snip"),
    "grad": Method("SHiRA-Grad", "grad"),
    "rand": Method("SHiRA-Rand", "rand"),
    "struct": Method("SHiRA-Struct", "struct", lines=True),
    "full": Method("full fine-tuning", sizes=("all",)),
    "full-customary": Method("full fine-tuning at 0.0001", sizes=("all",), rate=1e-4),
    "head": Method("head only", sizes=("none",), rate=0.0),
    "snip-global": Method("SNIP, global", "snip", "global"),
    "grad-global": Method("Grad, global", "grad", "global"),
    "wm-runs": Method("WM, runs of 16", "wm", runs=16),
    "grad-runs": Method("Grad, runs of 16", "grad", runs=16),
    "rows": Method("rows alone", "rows", lines=True),
    "wm-dora": Method("SHiRA-DoRA (WM)", "wm", dora=True),
    "lift": Method("LIFT", "lift"),
    "gallop": Method("GaLLoP", "gallop"),
    "talos": Method("TaLoS, global", "talos", "global"),
    "spiel": Method("SpIEL", "rand", regrown=True),
    "neuroada": Method("NeuroAda", "neuroada", "row", lines=True),
}
SCALED = ("lora", "wm", "grad")  # at the strengths of ALPHAS


def rate_at(rate: float, size: str, entries: float) -> float:
    """The rate of a size for other numbers of entries: it falls with their root, as the best rates did between the two sizes."""
    return rate * math.sqrt(ENTRIES[size] / entries)


@dataclass(frozen=True)
class MaskRun(Run):
    """One training.

    Attributes:
        part: that is scored: ``"validation"`` for the choice of a rate, or ``"test"``.
        task: of :data:`TASKS`.
        method: of :data:`METHODS`.
        size: of :data:`SIZES`, ``"all"`` or ``"none"``.
        seed: of the head, the order of texts, calibration texts, and what the method draws.
        rate: at the peak; 0 if nothing but the head is trained.
        steps: of :data:`studies.learning.BATCH` texts.
    """

    part: str
    task: str
    method: str
    size: str
    seed: int
    rate: float
    steps: int


@dataclass(frozen=True)
class Plan:
    """What the study consists of.

    Attributes:
        methods: of :data:`METHODS`.
        seeds: of the results.
        steps: of the results.
        pilot_steps: for the choice of rates.
        only: those methods and sizes of whose "METHOD SIZE" it finds a part.
    """

    methods: Sequence[str] = tuple(METHODS)
    seeds: Sequence[int] = SEEDS
    steps: int = STEPS
    pilot_steps: int = PILOT_STEPS
    only: str = ""

    def cases(self) -> Iterator[tuple[str, str]]:
        """Methods and sizes: the large ones first, with those of one size alone among them."""
        for step, size in enumerate(SIZES):
            for method in self.methods:
                sizes = METHODS[method].sizes
                here = size if size in sizes else sizes[0]
                if (here == size or not step) and re.search(self.only, f"{method} {here}"):
                    yield method, here

    def pilot(self, method: str, size: str, rate: float) -> MaskRun:
        """The run that tells how good a rate is."""
        return MaskRun("validation", PILOT_TASK, method, size, PILOT_SEED, rate, self.pilot_steps)

    def rate(self, store: Store, method: str, size: str) -> float | list[MaskRun]:
        """The rate with the least validation loss, or the pilots that are still to be run.

        All methods go the same way: from the two rates in the middle on towards the better one, for as long as it gets better.
        """
        if (given := METHODS[method].rate) is not None:
            return given
        low, high = (RATES.index(rate) for rate in FIRST_RATES)
        while True:
            pilots = [self.pilot(method, size, rate) for rate in RATES[low : high + 1]]
            if left := [pilot for pilot in pilots if pilot not in store]:
                return left
            losses = [store.results[pilot.key]["loss"] for pilot in pilots]
            best = min(range(len(pilots)), key=lambda at: (losses[at] is None, losses[at]))
            if best == 0 and low > 0:
                low -= 1
            elif best == len(pilots) - 1 and high < len(RATES) - 1:
                high += 1
            else:
                return pilots[best].rate

    def following(self, store: Store) -> list[MaskRun]:
        """The runs that can be done now, in order: one seed of all methods before the next."""
        found: dict[MaskRun, None] = {}
        for seed in self.seeds:
            for method, size in self.cases():
                rate = self.rate(store, method, size)
                if isinstance(rate, list):
                    found |= dict.fromkeys(rate)
                else:
                    runs = (MaskRun("test", task, method, size, seed, rate, self.steps) for task in TASKS)
                    found |= dict.fromkeys(run for run in runs if run not in store)
        return list(found)
