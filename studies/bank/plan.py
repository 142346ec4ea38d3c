"""What the bank consists of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from studies.bank.forms import FORMS, TASKS
from studies.runs import Run, Store

_R = TypeVar("_R", bound=Run)

SEEDS = (1, 2)
REPEATED = ("spam", "genre", "learned")  # with all seeds; the other tasks have the first alone


@dataclass(frozen=True)
class Settings:
    """The settings of all trainings of a bank, kept beside them.

    Attributes:
        steps: of :data:`studies.learning.BATCH` texts.
        tokens: of each text.
        held: held-out texts of each task.
        heads: training texts to which a head is fitted before the training.
    """

    steps: int = 64
    tokens: int = 48
    held: int = 96
    heads: int = 192


@dataclass(frozen=True)
class BankRun(Run):
    """One adapter.

    Attributes:
        task: of :data:`TASKS`.
        form: of :data:`FORMS`.
        seed: of the head, of the order of texts, and of what the form draws.
    """

    task: str
    form: str
    seed: int


@dataclass(frozen=True)
class Plan:
    """The adapters of a bank.

    Attributes:
        tasks: of :data:`TASKS`.
        forms: of :data:`FORMS`.
        seeds: see :data:`SEEDS`.
        only: those of whose "TASK FORM SEED" it finds a part.
    """

    tasks: Sequence[str] = tuple(TASKS)
    forms: Sequence[str] = tuple(FORMS)
    seeds: Sequence[int] = SEEDS
    only: str = ""

    def tasks_of(self, seed: int) -> list[str]:
        """The tasks that have this seed."""
        return [task for task in self.tasks if seed == self.seeds[0] or task in REPEATED]

    def runs(self) -> Iterator[BankRun]:
        """All of them, the first seed of all before the next."""
        for seed in self.seeds:
            for task in self.tasks_of(seed):
                yield from (BankRun(task, form, seed) for form in self.forms)

    def following(self, store: Store) -> list[BankRun]:
        """The runs that can be done now: what is made of a LoRA comes after it."""
        left = [
            run
            for run in self.runs()
            if run not in store and re.search(self.only, f"{run.task} {run.form} {run.seed}")
        ]
        return [
            run
            for run in left
            if FORMS[run.form].kind not in ("fitted", "cut") or BankRun(run.task, "lora", run.seed) in store
        ]


class Bank:
    """A folder with the adapters, the heads and texts of their tasks, and the results of the trainings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def texts(self) -> Path:
        """The folder of texts, a file for each task."""
        return self.folder / "texts"

    def store(self) -> Store:
        """The results of the trainings."""
        return Store(self.folder / "runs.jsonl")

    def adapter(self, run: BankRun) -> Path:
        """Where an adapter is: PEFT's folder of a LoRA, else a file."""
        name = f"{run.form}-{run.task}-{run.seed}"
        return self.folder / "adapters" / (name if FORMS[run.form].kind == "lora" else f"{name}.st")

    def head(self, run: BankRun) -> Path:
        """The head that was trained with an adapter."""
        return self.folder / "adapters" / f"{run.form}-{run.task}-{run.seed}.head.safetensors"

    def start(self, task: str, seed: int) -> Path:
        """The head of a task that was fitted to the unchanged encoder."""
        return self.folder / "adapters" / f"{task}-{seed}.head.safetensors"

    def settings(self, given: dict[str, Any] | None = None) -> Settings:
        """The bank's settings; a new bank takes those that are given.

        Raises:
            ValueError: the bank has other ones.
        """
        path = self.folder / "settings.json"
        given = given or {}
        if not path.exists():
            found = Settings(**given)
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(found), indent=1) + "\n", "utf-8")
            return found
        found = Settings(**json.loads(path.read_text("utf-8")))
        for name, value in given.items():
            if getattr(found, name) != value:
                raise ValueError(f"{path}: the bank was made with {name} {getattr(found, name)}, not {value}")
        return found


def ready(
    runs: Iterable[_R],
    store: Store,
    bank: Store,
    only: str,
    told: Callable[[_R], str],
    needs: Callable[[_R], Iterable[BankRun]],
) -> list[_R]:
    """Of a study's runs those that are left, that ``only`` finds in what is told of them, and whose adapters are in the bank."""
    return [
        run
        for run in runs
        if run not in store and re.search(only, told(run)) and all(one in bank for one in needs(run))
    ]
