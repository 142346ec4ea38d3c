"""The grid: tasks, methods, sizes and numbers of examples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from studies.learning import BATCH
from studies.masks import MATRICES, rate_at
from studies.runs import Run, Store

TASKS = ("spam", "genre")
# The task with fewer texts has 516 of each class to train on. In this order a study that is stopped has both ends.
COUNTS = (1024, 16, 256, 64)
STEPS, TOKENS, HELD, HEADS = 64, 48, 150, 192
LOOKS = (8, 16, 32, 64)  # steps after which held-out texts are scored, beside the last one
VALUES = r"encoder\.layer\.\d+\..*value\.weight$"  # 6
# Rank of the LoRA and the matrices that it is on; a mask has as many entries, over all matrices.
SIZES = {"0.04 %": (1, VALUES), "0.4 %": (1, MATRICES), "1.6 %": (4, MATRICES), "5 %": (13, MATRICES)}
ENTRIES = {"0.04 %": 4_608, "0.4 %": 41_472, "1.6 %": 165_888, "5 %": 539_136}
METHODS = {"lora": "LoRA", "wm": "SHiRA-WM"}
# Of the study of masks at its larger size.
RATES = {"lora": 3e-3, "wm": 1e-2}


def rate_of(method: str, size: str) -> float:
    """The learning rate."""
    return rate_at(RATES[method], "large", ENTRIES[size])


def steps_of(count: int, least: int) -> int:
    """The steps of a training: as many as see each example once, if these are more."""
    return max(least, count // BATCH)


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
        steps: of each training at least, see :func:`steps_of`.
        only: those of whose "TASK METHOD SIZE COUNT" it finds a part.
    """

    counts: Sequence[int] = COUNTS
    seeds: int = 1
    steps: int = STEPS
    only: str = ""

    def runs(self) -> Iterator[DataRun]:
        """All of them, one seed before the next; those of the same examples one after the other."""
        for seed in range(1, self.seeds + 1):
            for count in self.counts:
                steps = steps_of(count, self.steps)
                for task in TASKS:
                    for size in SIZES:
                        yield from (DataRun(task, method, size, count, seed, steps) for method in METHODS)

    def following(self, store: Store) -> list[DataRun]:
        """The runs that are left."""
        return [
            run
            for run in self.runs()
            if run not in store and re.search(self.only, f"{run.task} {run.method} {run.size} {run.count}")
        ]
