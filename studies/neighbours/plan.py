"""Adapters that are tried on the tasks of others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from studies.bank.plan import BankRun
from studies.bank.plan import Plan as BankPlan
from studies.runs import Run, Store

RUNS = "try_on"  # the module that does them
FORMS = ("lora", "wm", "struct-apart", "fitted")
NEIGHBOURS = ("genre", "editorial", "hobbies")  # fact from fiction


@dataclass(frozen=True)
class NeighbourRun(Run):
    """One adapter on the texts of all other tasks.

    Attributes:
        source: the task that it was trained for.
        form: of the bank's.
        seed: of the adapter.
    """

    source: str
    form: str
    seed: int


@dataclass(frozen=True)
class Plan:
    """All tasks in some forms, of the first seed.

    Attributes:
        bank: the adapters.
        only: those of whose "SOURCE FORM" it finds a part.
    """

    bank: BankPlan = field(default_factory=BankPlan)
    only: str = ""

    def runs(self) -> Iterator[NeighbourRun]:
        """All of them."""
        for form in FORMS:
            if form in self.bank.forms:
                yield from (NeighbourRun(task, form, self.bank.seeds[0]) for task in self.bank.tasks)

    def following(self, store: Store, bank: Store) -> list[NeighbourRun]:
        """The runs for which all adapters of the form are there: their heads are needed."""
        return [
            run
            for run in self.runs()
            if run not in store
            and re.search(self.only, f"{run.source} {run.form}")
            and all(BankRun(task, run.form, run.seed) in bank for task in self.bank.tasks)
        ]
