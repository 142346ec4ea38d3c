"""What is fused, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from studies.bank.forms import FORMS
from studies.bank.plan import REPEATED, BankRun, ready
from studies.bank.plan import Plan as BankPlan
from studies.runs import Run, Store

RUNS = "fuse"  # the module that does them

DENSITY = 0.5  # of the methods that prune: the share of an adapter's own entries that is kept


@dataclass(frozen=True)
class Merge:
    """A way to fuse.

    Attributes:
        label: in tables.
        method: of ``shira_format.merging`` or of PEFT; ``"distilled"`` is that of :mod:`studies.fusion.distilled`.
        options: of the method.
        share: whether the option ``density`` is 1 over the number of adapters.
        halved: whether each adapter has the weight 1 over their number.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    share: bool = False
    halved: bool = False


_OWN = {"density": DENSITY, "of": "entries"}

MERGES = {
    "sum": Merge("sum (`linear`)", "linear"),
    "average": Merge("average (`linear`, normalize)", "linear", {"normalize": True}),
    "mean": Merge("average by overlap count (`mean`)", "mean"),
    "cabs": Merge("`cabs`, a part of the entries each", "cabs", {"of": "entries"}, share=True),
    "overwrite": Merge("`overwrite`", "overwrite"),
    "disjoint": Merge("`disjoint`", "disjoint"),
    "intersect": Merge("`intersect`", "intersect"),
    "magnitude_prune": Merge("`magnitude_prune`", "magnitude_prune", _OWN),
    "ties": Merge("`ties`", "ties", _OWN),
    "dare_linear": Merge("`dare_linear`", "dare_linear", {"density": DENSITY}),
    "dare_ties": Merge("`dare_ties`", "dare_ties", {"density": DENSITY}),
    "breadcrumbs": Merge("`breadcrumbs`", "breadcrumbs", _OWN),
    "breadcrumbs_ties": Merge("`breadcrumbs_ties`", "breadcrumbs_ties", _OWN),
    "della": Merge("`della`", "della", _OWN),
    "della_linear": Merge("`della_linear`", "della_linear", _OWN),
    "sce": Merge("`sce`", "sce"),
    "ram": Merge("`ram`", "ram"),
    "ramplus_tl": Merge("`ramplus_tl`", "ramplus_tl"),
    "distilled": Merge("distilled from its parts", "distilled"),
}
"""On sparse adapters. All but ``refuse``, which refuses, and ``task_arithmetic``, which is ``linear``."""

PEFT = {
    "sum": Merge("PEFT `cat`: the sum", "cat"),
    "average": Merge("PEFT `cat`, weights 1/n", "cat", halved=True),
    "linear": Merge("PEFT `linear`", "linear"),
    "svd": Merge("PEFT `svd` to one adapter's rank", "svd", {"svd_full_matrices": False}),
    "ties": Merge("PEFT `ties`", "ties", {"density": DENSITY}),
    "dare_linear": Merge("PEFT `dare_linear`", "dare_linear", {"density": DENSITY}),
    "dare_ties": Merge("PEFT `dare_ties`", "dare_ties", {"density": DENSITY}),
    "magnitude_prune": Merge("PEFT `magnitude_prune`", "magnitude_prune", {"density": DENSITY}),
    "ties_svd": Merge("PEFT `ties_svd`", "ties_svd", {"density": DENSITY, "svd_full_matrices": False}),
}
"""On LoRAs."""

COMPARED = ("wm", "cut")  # by all methods
SHIPPED, SHIPPED_TASKS = "shipped", ("spam", "genre")
"""The LoRAs that ship with the commands, trained much longer than those of the bank, cut to their largest 5 %: by all methods, too."""

DISTILLED = ("wm", "wm-bands", "struct-apart", "cut")
EVERYWHERE = ("sum", "average", "mean")


def merges_of(form: str) -> dict[str, Merge]:
    """The ways to fuse adapters of a form."""
    return PEFT if is_lora(form) else MERGES


def is_lora(form: str) -> bool:
    """Whether adapters of a form are merged by PEFT."""
    return form != SHIPPED and FORMS[form].kind == "lora"


def runs_methods(form: str, count: int) -> list[str]:
    """The merges of a form, of so many adapters: two are summed alone, and all are fused in few ways."""
    known = merges_of(form)
    if count == 2:
        return ["sum"]
    wanted = list(known) if count == 3 and (form in COMPARED or known is PEFT) else list(EVERYWHERE)
    if form in (DISTILLED if count == 3 else COMPARED):
        wanted.append("distilled")
    return [name for name in known if name in wanted]


@dataclass(frozen=True)
class FusionRun(Run):
    """One fused adapter, tried on the tasks of all its parts.

    Attributes:
        members: tasks, joined by ``+``.
        form: of :data:`studies.bank.forms.FORMS`, or :data:`SHIPPED`.
        merge: of :data:`MERGES` or :data:`PEFT`.
        seed: of the parts.
    """

    members: str
    form: str
    merge: str
    seed: int

    @property
    def tasks(self) -> list[str]:
        """The tasks of the parts."""
        return self.members.split("+")


@dataclass(frozen=True)
class Plan:
    """What is fused of a bank.

    Attributes:
        bank: the adapters.
        only: those runs of whose "MEMBERS FORM MERGE SEED" it finds a part.
    """

    bank: BankPlan = field(default_factory=BankPlan)
    only: str = ""

    def groups(self, seed: int) -> Iterator[Sequence[str]]:
        """Threes without a task in common, all tasks, then all pairs; of a second seed the three that have it."""
        tasks = self.bank.tasks_of(seed)
        first = [task for task in tasks if task in REPEATED]
        rest = [task for task in tasks if task not in REPEATED]
        yield from (three for three in (first, rest) if len(three) == 3)
        if len(tasks) > 3:
            yield tasks
        if seed == self.bank.seeds[0]:
            yield from combinations(tasks, 2)

    def runs(self) -> Iterator[FusionRun]:
        """All of them."""
        for seed in self.bank.seeds:
            for group in self.groups(seed):
                for form in self.bank.forms:
                    for merge in runs_methods(form, len(group)):
                        if seed == self.bank.seeds[0] or merge in EVERYWHERE:
                            yield FusionRun("+".join(group), form, merge, seed)
        if set(SHIPPED_TASKS) <= set(self.bank.tasks):
            yield from (FusionRun("+".join(SHIPPED_TASKS), SHIPPED, merge, self.bank.seeds[0]) for merge in MERGES)

    def following(self, store: Store, bank: Store) -> list[FusionRun]:
        """The runs whose parts are there."""
        return ready(
            self.runs(), store, bank, self.only, lambda run: f"{run.members} {run.form} {run.merge} {run.seed}",
            lambda run: () if run.form == SHIPPED else (BankRun(task, run.form, run.seed) for task in run.tasks),
        )  # fmt: skip
