"""Stages (a computation on one change at a time) and the engines that run them.

A stage is a small object that can be pickled: this process, or the workers of a cluster, call it with one change after the
other. The results are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from shira_format.entries.changes import Change
from shira_format.entries.selected import Entries
from shira_format.selection import radix, topk
from shira_format.selection.rule import TopK
from shira_format.selection.workers import Progress, Workers

C_contra = TypeVar("C_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)
_MOST = (
    1 << 25
)  # elements of changes that are finished in the background at a time: their candidates are in memory
_C = TypeVar("_C")
_R = TypeVar("_R")


class Stage(Protocol[C_contra, R_co]):
    """A computation on one change.

    Attributes:
        passes: how often it computes the change.
    """

    @property
    def passes(self) -> int: ...

    def __call__(self, change: C_contra, workers: Workers, progress: Progress) -> Callable[[], R_co]:
        """Compute the change; ``progress`` is called with numbers of elements done.

        Returns:
            What finishes the result, on one thread, while the next change is computed. It must not use ``workers``.
        """


class Engine(Protocol):
    """Runs stages."""

    def map(self, stage: Stage[_C, _R], changes: Sequence[_C]) -> Iterator[_R]:
        """The stage's results in the order of ``changes``; few are computed ahead."""


@dataclass(frozen=True)
class LocalEngine:
    """The threads of this process, one change after the other."""

    workers: Workers
    progress: Progress = lambda _: None

    def map(self, stage: Stage[_C, _R], changes: Sequence[_C]) -> Iterator[_R]:
        rests = ((_size(change), stage(change, self.workers, self.progress)) for change in changes)
        return self.workers.ahead(rests, _MOST)


def _size(change: object) -> int:
    return int(getattr(change, "size", 0))


@dataclass
class SelectStage:
    """The selection within each change."""

    rule: TopK

    @property
    def passes(self) -> int:
        return 1 if self.rule.energy is None else 2

    def __call__(self, change: Change, workers: Workers, progress: Progress) -> Callable[[], Entries]:
        work = topk.largest_entries if self.rule.energy is None else radix.by_energy
        return work(change, self.rule, workers, progress)


@dataclass
class SurveyStage:
    """The first pass of the global selection; ``floor`` may increase as results come in."""

    rule: TopK
    dtype: np.dtype[Any]
    floor: Any
    passes: int = 1

    def __call__(self, change: Change, workers: Workers, progress: Progress) -> Callable[[], radix.Survey]:
        found = radix.survey(change, self.rule, self.dtype, self.floor, workers, progress)
        return lambda: found


@dataclass
class CollectStage:
    """The second pass of the global selection."""

    reach: radix.Reach
    passes: int = 1

    def __call__(self, change: Change, workers: Workers, progress: Progress) -> Callable[[], Entries]:
        pool = radix.above(change, self.reach, workers, progress)

        def rest() -> Entries:
            found = topk.completed(change, pool.result())
            pool.close()
            return found

        return rest
