"""Adapters that are tried on the tasks of others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from studies.bank.plan import BankRun, ready
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
        return ready(
            self.runs(), store, bank, self.only, lambda run: f"{run.source} {run.form}",
            lambda run: (BankRun(task, run.form, run.seed) for task in self.bank.tasks),
        )  # fmt: skip
