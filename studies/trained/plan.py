"""Adapters at several strengths, alone and fused, and the singular values of some."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from studies.bank.plan import BankRun, ready
from studies.bank.plan import Plan as BankPlan
from studies.fusion.plan import Plan as FusionPlan
from studies.runs import Run, Store

RUNS = "examine"  # the module that does them
SCALED = ("lora", "wm", "struct-apart")
ALPHAS = (0.5, 0.75, 1.25, 1.5)  # 0 and 1 are known from bank and fusion
DECOMPOSED = ("spam", "genre")


@dataclass(frozen=True)
class TrainedRun(Run):
    """One look at an adapter.

    Attributes:
        kind: ``"strength"`` or ``"spectrum"``.
        members: its task, or the tasks of a sum, joined by ``+``.
        form: of the bank's.
        seed: of the adapters.
    """

    kind: str
    members: str
    form: str
    seed: int

    @property
    def tasks(self) -> list[str]:
        """The tasks of the parts."""
        return self.members.split("+")


@dataclass(frozen=True)
class Plan:
    """All of them, of the first seed.

    Attributes:
        bank: the adapters.
        only: those of whose "KIND MEMBERS FORM" it finds a part.
    """

    bank: BankPlan = field(default_factory=BankPlan)
    only: str = ""

    def runs(self) -> Iterator[TrainedRun]:
        """Spectra, then strengths of single adapters and of the threes of the study of fusion."""
        seed = self.bank.seeds[0]
        for form in self.bank.forms:
            yield from (TrainedRun("spectrum", task, form, seed) for task in self.bank.tasks if task in DECOMPOSED)
        threes = ["+".join(group) for group in FusionPlan(self.bank).groups(seed) if len(group) == 3]
        for form in SCALED:
            if form in self.bank.forms:
                yield from (TrainedRun("strength", members, form, seed) for members in (*self.bank.tasks, *threes))

    def following(self, store: Store, bank: Store) -> list[TrainedRun]:
        """The runs whose adapters are there."""
        return ready(
            self.runs(), store, bank, self.only, lambda run: f"{run.kind} {run.members} {run.form}",
            lambda run: (BankRun(task, run.form, run.seed) for task in run.tasks),
        )  # fmt: skip
