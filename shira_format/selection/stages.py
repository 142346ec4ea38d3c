"""The selection as stages, each computed for one change at a time, and the engines that run them.

A stage is a small object that can be pickled: the threads of this process, or workers of a cluster, call it with one
change after the other. Its results do not depend on the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from shira_format._core.threads import Progress, Workers
from shira_format.entries.changes import Change, Entries
from shira_format.selection import radix, topk
from shira_format.selection.spool import Spool
from shira_format.selection.topk import TopK

C_contra = TypeVar("C_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)
_C = TypeVar("_C")
_R = TypeVar("_R")

# An unfinished result: the number of entries that it holds in memory, and the function that finishes it, on any thread.
Pending = tuple[int, Callable[[], _R]]


class Stage(Protocol[C_contra, R_co]):
    """One step for one change.

    Attributes:
        passes: how often it computes the change.
    """

    @property
    def passes(self) -> int: ...

    def __call__(self, change: C_contra, workers: Workers, progress: Progress) -> Pending[R_co]:
        """Read the change; ``progress`` is called with numbers of elements.

        Returns:
            What finishes the result, while the next change is read. It must not use ``workers``.
        """


class Engine(Protocol):
    """Who computes."""

    def map(self, stage: Stage[_C, _R], changes: Sequence[_C]) -> Iterator[Pending[_R]]:
        """The unfinished results in the order of ``changes``; few are computed ahead."""


@dataclass(frozen=True)
class LocalEngine:
    """The threads of this process, one change after the other."""

    workers: Workers
    progress: Progress = lambda _: None

    def map(self, stage: Stage[_C, _R], changes: Sequence[_C]) -> Iterator[Pending[_R]]:
        return (stage(change, self.workers, self.progress) for change in changes)


@dataclass
class SelectStage:
    """The selection of each change alone."""

    rule: TopK

    @property
    def passes(self) -> int:
        return 1 if self.rule.energy is None else 2

    def __call__(self, change: Change, workers: Workers, progress: Progress) -> Pending[Entries]:
        work = topk.largest_entries if self.rule.energy is None else radix.by_energy
        return work(change, self.rule, workers, progress)


@dataclass
class SurveyStage:
    """The first pass over all; ``floor`` may rise as results come in."""

    rule: TopK
    dtype: np.dtype[Any]
    floor: Any
    passes: int = 1

    def __call__(self, change: Change, workers: Workers, progress: Progress) -> Pending[radix.Survey]:
        found = radix.survey(change, self.rule, self.dtype, self.floor, workers, progress)
        return 0, lambda: found


@dataclass
class CollectStage:
    """The second pass over all."""

    reach: radix.Reach
    passes: int = 1

    def __call__(self, change: Change, workers: Workers, progress: Progress) -> Pending[Entries]:
        pool = radix.above(change, self.reach, workers, progress)

        def rest() -> Entries:
            found = topk.completed(change, pool.result())
            pool.close()
            return found

        return pool.size, rest


def select(
    changes: Sequence[Change], rule: TopK, engine: Engine, workers: Workers, *, folder: Path | None = None
) -> Iterator[Pending[Entries]]:
    """The selected entries of each change, in order; those of one tensor are in memory at a time.

    Args:
        changes: what to select from.
        rule: how many to select.
        engine: the threads of this process (:class:`LocalEngine`), or a cluster; the result is the same.
        workers: the threads of this process.
        folder: for a temporary file, under the global scope.

    Returns:
        Unfinished results, for :meth:`Workers.ahead`.

    Raises:
        SourceError: a change holds NaN or Inf.
    """
    if rule.scope == "global":
        return _select_global(changes, rule, engine, workers, folder)
    return engine.map(SelectStage(rule), changes)


def passes(rule: TopK) -> int:
    """How often each change is computed."""
    return 2 if rule.scope == "global" or rule.energy is not None else 1


def _select_global(
    changes: Sequence[Change], rule: TopK, engine: Engine, workers: Workers, folder: Path | None
) -> Iterator[Pending[Entries]]:
    dtype, size = radix.common_dtype(changes), sum(change.size for change in changes)
    surveying, seen, energies = SurveyStage(rule, dtype, rule.lowest(dtype)), radix.Survey.empty(rule), []
    for _, result in engine.map(surveying, changes):
        survey = result()
        seen.add(survey)
        energies.append(survey.energy)
        if rule.energy is None:  # anything below the k largest so far is not selected
            surveying.floor = radix.Edge(rule, seen, size, dtype).floor
    edge = radix.Edge(rule, seen, size, dtype)
    with Spool(folder) as spool:
        places = []
        for entries in workers.ahead(engine.map(CollectStage(edge.reach), changes)):
            edge.see(entries.values)
            places.append(spool.put(entries))
            del entries  # not needed while the next ones are collected
        value, ties = edge.decide()
        for place, energy in zip(places, energies, strict=True):
            entries, ties = radix.cut(spool.get(place), value, ties, energy)
            yield entries.size, partial(_itself, entries)
            del entries


def _itself(entries: Entries) -> Entries:
    return entries
