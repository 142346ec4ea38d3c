"""Fits to so many entries, each compared with the plain cut to as many: one, or a search of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from shira_format._core.arrays import Array, Indices, as_array
from shira_format._core.text import count
from shira_format.adapter import Adapter
from shira_format.convert.fit.quality import Effect, effect
from shira_format.convert.fit.search import Search, Trial, fewest_entries, fullest_file
from shira_format.convert.fit.sources import SourceWeights, tensor_of
from shira_format.convert.fit.task import Entries, Task
from shira_format.convert.given import Given
from shira_format.convert.pipeline import Rule
from shira_format.convert.report import ConversionReport
from shira_format.format import load
from shira_format.selection import TopK

Kept = Literal["fit", "plain"]


@dataclass(frozen=True)
class Amount:
    """How many entries are kept: at most one of these.

    Attributes:
        density: share of the entries; 0.01 by default.
        top_k: number of entries of all weights together.
        keep: the fewest that keep this share of the effect.
        max_bytes: as many as a file of so many bytes has room for.
    """

    density: float | None = None
    top_k: int | None = None
    keep: float | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for invalid values."""
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: give one of them")
        if self.keep is not None and not 0 < self.keep < 1:
            raise ValueError(f"keep {self.keep:g} is not in (0, 1)")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"max_bytes {self.max_bytes} is not positive")
        self.plain_cut()  # which checks the others

    @property
    def goal(self) -> dict[str, Any]:
        """What is searched for; empty if the number of entries is known."""
        return {name: value for name in ("keep", "max_bytes") if (value := getattr(self, name)) is not None}

    def plain_cut(self) -> TopK:
        """The plain cut that a fit is compared with, if the number of entries is known."""
        if self.top_k is not None:
            return TopK(None, self.top_k, "global")
        return TopK(0.01 if self.density is None else self.density)


class Fit(Protocol):
    """Fits so many entries, from those of a denser fit if there is one."""

    def __call__(self, task: Task, budget: int, start: Entries | None) -> Entries: ...


class Write(Protocol):
    """Writes the adapter file; None: only the report."""

    def __call__(self, out: Path | None, *, rule: Rule) -> ConversionReport: ...


@dataclass(frozen=True)
class Made:
    """A fit and the plain cut of as many entries, measured as they are read back.

    Attributes:
        trial: what they are on the inputs that the choice between them, and between densities, is made by.
        fit: what the fit is on the inputs held out to measure on.
        plain: what the plain cut is there.
        entries: of the nearer one, by the adapter's names.
        selection: what the manifest says of how they were chosen.
    """

    trial: Trial
    fit: Effect
    plain: Effect
    entries: Mapping[str, tuple[Indices, Array]]
    selection: dict[str, Any]


@dataclass
class Attempts:
    """Fits, measures and writes, as often as is asked for.

    Attributes:
        task: whose held-out inputs choose between fit and plain cut, and between densities.
        measured: the task with the inputs held out to measure on, which are others if a density is searched for.
        source: what is fitted.
        fit: see :class:`Fit`.
        write: see :class:`Write`.
        rule: what is written in the end.
        folder: for files on the way.
        on_stage: called with a line on what comes next.
    """

    task: Task
    measured: Task
    source: SourceWeights
    fit: Fit
    write: Write
    rule: Callable[[Made], Given]
    folder: Path
    on_stage: Callable[[str], object]
    made: dict[int, Made] = field(default_factory=dict)

    def run(self, amount: Amount) -> tuple[Made, list[Trial]]:
        """What was asked for, and all fits of a search.

        Raises:
            SourceError: a search does not reach its goal.
        """
        if not amount.goal:
            trial = self.at(amount.plain_cut())
            return self.made[trial.budget], [trial]
        search = Search(
            self.task.numel, lambda budget, start: self.at(TopK(None, budget, "global"), start, sized=True)
        )
        if amount.keep is not None:
            trial = fewest_entries(search, amount.keep)
        else:
            assert amount.max_bytes is not None
            trial = fullest_file(search, amount.max_bytes, self._plain_size)
        return self.made[trial.budget], search.trials

    def at(self, cut: TopK, start: Entries | None = None, *, sized: bool = False) -> Trial:
        """Fit as many entries as a plain cut has, and measure both.

        Args:
            cut: the plain cut.
            start: entries to start from.
            sized: write the file that would be the result, too, to know its size.
        """
        budget = _budget(cut, self.task)
        self.on_stage(f"fitting {count(budget)} of {count(self.task.numel)} entries")
        found = self.fit(self.task, budget, start)
        self.on_stage("measuring on the inputs that were held out")
        files = {"fit": self._file(Given(self._named(found))), "plain": self._file(cut)}
        by_kind = {kind: self._entries(adapter) for kind, adapter in files.items()}
        choosing = {kind: effect(self.task, entries) for kind, entries in by_kind.items()}
        measured = choosing
        if self.measured is not self.task:
            measured = {kind: effect(self.measured, entries) for kind, entries in by_kind.items()}
        trial = Trial(budget, budget / self.task.numel, choosing["fit"], choosing["plain"], 0, found)
        kept = files[trial.kept]
        selection = (
            {"rule": "fit", "scope": "global"} if trial.kept == "fit" else {"rule": "top-k", "scope": cut.scope}
        )
        amount = {"density": cut.density} if cut.top_k is None else {"top_k": cut.top_k}
        made = Made(
            trial, measured["fit"], measured["plain"], {key: (one.indices, one.values) for key, one in kept.items()}, selection | amount
        )  # fmt: skip
        if sized:
            trial = replace(trial, file_bytes=self._size(self.rule(made)))
            made = replace(made, trial=trial)
        self.made[budget] = made
        return trial

    def _plain_size(self, budget: int) -> int:
        return self._size(TopK(None, budget, "global"))

    def _size(self, rule: Rule) -> int:
        size = self.write(self.folder / "size.st", rule=rule).file_bytes
        assert size is not None
        return size

    def _file(self, rule: Rule) -> Adapter:
        """What a rule selects, as it is read back from a file."""
        path = self.folder / "made.st"
        self.write(path, rule=rule)
        found = load(path)
        path.unlink()
        return found

    def _named(self, found: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Indices, Array]]:
        """Entries by the adapter's names."""
        return {
            self.source.names[name]: (as_array(at).astype(np.int64, copy=False), as_array(values.detach()))
            for name, (at, values) in found.items()
        }

    def _entries(self, adapter: Adapter) -> Entries:
        """The entries of an adapter by the model's names."""
        return {
            name: (tensor_of(adapter[key].indices), tensor_of(adapter[key].values))
            for name, key in self.source.names.items()
            if key in adapter
        }


def _budget(cut: TopK, task: Task) -> int:
    """As many entries as the plain cut has."""
    if cut.scope == "global":
        return cut.count(task.numel)
    return sum(cut.count(task.parameter(name).numel()) for name in task.source)
