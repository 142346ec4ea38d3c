"""SpIEL: entries that are dropped and grown during training (Ansell et al., arXiv 2401.16405; github.com/AlanAnsell/peft).

Every so many steps the entries whose deltas are smallest are dropped, and as many are grown where gradients, summed over the
last few steps, are largest. These functions choose; :mod:`shira_format.training.regrow` changes the entries of a model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format.selection.topk import largest


@dataclass(frozen=True)
class Schedule:
    """When entries change, and how many.

    Attributes:
        steps: of the training, in all.
        every: steps between two changes; the authors' default.
        summed: steps over which gradients are summed before a change; likewise.
        rate: the share of the entries that change at first; it falls linearly to 0 at the end of the training; likewise.
    """

    steps: int
    every: int = 100
    summed: int = 5
    rate: float = 0.2

    def __post_init__(self) -> None:
        """Raise ValueError for values that cannot be meant."""
        if self.steps < 1 or not 1 <= self.summed <= self.every:
            raise ValueError(
                f"{self.steps} steps, of which {self.summed} are summed of every {self.every}: not a schedule"
            )
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate {self.rate} is not in (0, 1]")

    def sums(self, step: int) -> bool:
        """Whether the gradients of step ``step`` (from 1) are summed: the first ``summed`` steps of each period that ends in a change."""
        place = (step - 1) % self.every
        return place < self.summed and step - place + self.summed - 1 <= self.steps

    def changes(self, step: int) -> bool:
        """Whether entries change after step ``step`` (from 1)."""
        return step % self.every == self.summed % self.every and self.summed <= step <= self.steps

    def share(self, step: int) -> float:
        """The share of the entries that change after step ``step``: all of them the first time, when no delta means anything yet,
        then ``rate * (1 - step / steps)``.
        """
        return 1.0 if step == self.summed else self.rate * max(0.0, 1 - step / self.steps)

    def count(self, step: int, entries: int) -> int:
        """That share of ``entries``, rounded down."""
        return int(entries * self.share(step))


@dataclass(frozen=True)
class Change:
    """Which entries go and which come, as many of each.

    Attributes:
        dropped: int64 ``[n]``, positions among the entries, increasing.
        grown: int64 ``[n]``, flat positions in the weight, increasing.
    """

    dropped: Indices
    grown: Indices


def drop(deltas: Array, count: int) -> Indices:
    """The positions of the ``count`` entries of the smallest ``|delta|``, int64 increasing; of equal ones the last.

    Args:
        deltas: ``[nnz]``.
        count: at most nnz.
    """
    return np.flatnonzero(~largest(np.abs(deltas), deltas.size - count))


def grow(candidates: Indices, gradients: Array, taken: Indices, count: int) -> Indices:
    """The ``count`` candidates of the largest ``|gradient|`` that are not taken, int64 increasing; fewer if there are fewer.

    Args:
        candidates: flat positions, int64 ``[c]``, strictly increasing.
        gradients: the sum of their gradients, ``[c]``.
        taken: flat positions, int64, strictly increasing.
        count: how many.
    """
    free = ~np.isin(candidates, taken, assume_unique=True)
    scores = np.abs(gradients[free])
    return candidates[free][largest(scores, min(count, scores.size))]


def regrow(indices: Indices, deltas: Array, candidates: Indices, gradients: Array, count: int) -> Change:
    """Drop ``count`` entries and grow as many; one that would come back at once stays, with its delta.

    Args:
        indices: the entries, int64 ``[nnz]``, strictly increasing.
        deltas: ``[nnz]``.
        candidates: see :func:`grow`; the authors take the nnz largest gradients of the first step that is summed.
        gradients: see :func:`grow`.
        count: at most nnz.
    """
    dropped = drop(deltas, count)
    stay = np.ones(indices.size, bool)
    stay[dropped] = False
    grown = grow(candidates, gradients, indices[stay], count)
    back = np.isin(indices[dropped], grown, assume_unique=True)
    leaving, new = dropped[~back], np.setdiff1d(grown, indices[dropped], assume_unique=True)
    # With too few candidates fewer leave: those of the smallest deltas.
    kept = drop(deltas[leaving], new.size)
    return Change(leaving[kept], new)


def regrown(indices: Indices, deltas: Array, change: Change) -> tuple[Indices, Array]:
    """The entries and deltas after a change, in the order of their positions; grown ones have a delta of 0."""
    stay = np.ones(indices.size, bool)
    stay[change.dropped] = False
    found = np.concatenate([indices[stay], change.grown])
    values = np.concatenate([deltas[stay], np.zeros(change.grown.size, deltas.dtype)])
    order = np.argsort(found)
    return found[order], values[order]
