"""The pairs that are measured: those whose sums the study of fusion tries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations

from studies.bank.plan import BankRun, ready
from studies.bank.plan import Plan as BankPlan
from studies.runs import Run, Store

RUNS = "measure"  # the module that does them

MEASURES = {
    "overlap": "entries in common, share of those of either",
    "cosine": "cosine of the deltas",
    "size": "norm of the other, against its own",
    "awom": "AWOM",
    "awom_relative": "AWOM, divided by both norms",
    "awor": "1 - AWOR",
    "feature_cosine": "cosine of the outputs of all layers",
    "feature_size": "norm of the other's outputs, against its own",
    "disturbed": "its outputs disturbed, over all inputs",
    "disturbed_each": "its outputs disturbed, input by input",
}
"""The larger, the more interference one would expect; signs of cosines are left out."""


@dataclass(frozen=True)
class PairRun(Run):
    """The measures of two adapters.

    Attributes:
        first: a task.
        second: another one.
        form: of both adapters.
        seed: likewise.
    """

    first: str
    second: str
    form: str
    seed: int


@dataclass(frozen=True)
class Plan:
    """All pairs of the first seed.

    Attributes:
        bank: the adapters.
        only: those of whose "FIRST SECOND FORM" it finds a part.
    """

    bank: BankPlan = field(default_factory=BankPlan)
    only: str = ""

    def runs(self) -> Iterator[PairRun]:
        """All of them."""
        for form in self.bank.forms:
            for first, second in combinations(self.bank.tasks, 2):
                yield PairRun(first, second, form, self.bank.seeds[0])

    def following(self, store: Store, bank: Store) -> list[PairRun]:
        """The runs whose adapters are there."""
        return ready(
            self.runs(), store, bank, self.only, lambda run: f"{run.first} {run.second} {run.form}",
            lambda run: (BankRun(task, run.form, run.seed) for task in (run.first, run.second)),
        )  # fmt: skip
