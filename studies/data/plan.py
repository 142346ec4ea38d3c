"""The grid: tasks, methods, sizes and numbers of examples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from studies.masks import MATRICES, rate_at
from studies.runs import Run, Store

TASKS = ("spam", "genre")
COUNTS = (16, 64, 256, 512)
STEPS, TOKENS, HELD, HEADS = 64, 48, 150, 192
VALUES = r"encoder\.layer\.\d+\..*value\.weight$"  # 6
# Rank of the LoRA and the matrices that it is on; a mask has as many entries, over all matrices.
SIZES = {"0.04 %": (1, VALUES), "0.4 %": (1, MATRICES), "5 %": (13, MATRICES)}
ENTRIES = {"0.04 %": 4_608, "0.4 %": 41_472, "5 %": 539_136}
METHODS = {"lora": "LoRA", "wm": "SHiRA-WM"}
# Of the study of masks at its larger size.
RATES = {"lora": 3e-3, "wm": 1e-2}


def rate_of(method: str, size: str) -> float:
    """The learning rate."""
    return rate_at(RATES[method], "large", ENTRIES[size])


@dataclass(frozen=True)
class DataRun(Run):
    """One training.

    Attributes:
        task: of :data:`TASKS`.
        method: of :data:`METHODS`.
        size: of :data:`SIZES`.
        count: examples, half of each class; the head is fitted to no others.
        seed: of which examples, of their order, and of the head.
        steps: of :data:`studies.learning.BATCH` texts.
    """

    task: str
    method: str
    size: str
    count: int
    seed: int
    steps: int


@dataclass(frozen=True)
class Plan:
    """What the study consists of.

    Attributes:
        counts: of examples.
        seeds: how many.
        steps: of each training.
        only: those of whose "TASK METHOD SIZE COUNT" it finds a part.
    """

    counts: Sequence[int] = COUNTS
    seeds: int = 1
    steps: int = STEPS
    only: str = ""

    def runs(self) -> Iterator[DataRun]:
        """All of them, one seed before the next; those of the same examples one after the other."""
        for seed in range(1, self.seeds + 1):
            for task in TASKS:
                for count in self.counts:
                    for size in SIZES:
                        yield from (DataRun(task, method, size, count, seed, self.steps) for method in METHODS)

    def following(self, store: Store) -> list[DataRun]:
        """The runs that are left."""
        return [
            run
            for run in self.runs()
            if run not in store and re.search(self.only, f"{run.task} {run.method} {run.size} {run.count}")
        ]
