"""Spreads: intervals by bootstrap over texts and over tasks, and rank correlations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

DRAWS = 1000
LEVEL = 95.0  # per cent


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def shown(self, scale: float = 1.0, digits: int = 1, *, sign: bool = False) -> str:
        """As text for a cell: the figure, and the interval in brackets."""
        plus = "+" if sign else ""
        value, low, high = (f"{scale * one:{plus}.{digits}f}" for one in (self.value, self.low, self.high))
        return f"{value} ({low} to {high})"


def interval(value: float, draws: Floats) -> Estimate:
    """A figure with the percentiles of its bootstrap draws; draws that are no number are left out."""
    known = draws[np.isfinite(draws)]
    low, high = np.percentile(known, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


@dataclass(frozen=True)
class Case:
    """One adapter on the held-out texts of one task: how far the right class is ahead of the other, ``[texts]`` each.

    Attributes:
        task: of the texts.
        fused: with the fused adapter.
        alone: with the task's own adapter.
        base: without an adapter, under the same head.
    """

    task: str
    fused: Floats
    alone: Floats
    base: Floats

    @classmethod
    def of(cls, task: str, fused: Sequence[float], alone: Sequence[float], base: Sequence[float]) -> Case:
        """From lists."""
        return cls(task, *(np.array(one, np.float64) for one in (fused, alone, base)))


def draws_of(cases: Sequence[Case], seed: int = 0) -> Mapping[str, npt.NDArray[np.int64]]:
    """For each task numbers of texts, drawn with replacement, ``[draws, texts]``: the same for all cases of the task."""
    rng = np.random.default_rng(seed)
    sizes = {case.task: case.fused.size for case in cases}
    return {task: rng.integers(0, size, (DRAWS, size)) for task, size in sorted(sizes.items())}


def accuracy(cases: Sequence[Case]) -> Estimate:
    """The mean accuracy of the fused adapters, with its interval over the texts."""
    return _mean(cases, [(case.fused > 0).astype(np.float64) for case in cases])


def drop(cases: Sequence[Case]) -> Estimate:
    """How much less of the texts is right with the fused adapter than with the task's own, text by text."""
    return _mean(cases, [(case.alone > 0) - (case.fused > 0).astype(np.float64) for case in cases])


def _mean(cases: Sequence[Case], each: Sequence[Floats]) -> Estimate:
    chosen = draws_of(cases)
    draws = np.mean([one[chosen[case.task]].mean(1) for case, one in zip(cases, each, strict=True)], axis=0)
    return interval(float(np.mean([one.mean() for one in each])), draws)


def kept(cases: Sequence[Case]) -> Estimate:
    """R² of the margins: 1 minus the squared distance to the adapter alone over that of the base, the median of the cases.

    The median, since where an adapter changes little the quotient may be any number.
    """
    chosen = draws_of(cases)
    missed = [np.square(case.fused - case.alone) for case in cases]
    wanted = [np.square(case.base - case.alone) for case in cases]
    found = [1 - m.sum() / w.sum() for m, w in zip(missed, wanted, strict=True)]
    draws = [
        1 - m[chosen[case.task]].sum(1) / w[chosen[case.task]].sum(1)
        for case, m, w in zip(cases, missed, wanted, strict=True)
    ]
    return interval(float(np.median(found)), np.median(draws, axis=0))


def spearman(x: Floats, y: Floats, counts: Floats | None = None) -> Floats:
    """Rank correlations of repeated values, ties at their mean rank; nan where one side does not vary.

    Args:
        x: ``[n]``.
        y: ``[n]``.
        counts: ``[draws, n]``, how often each pair of values is there in each draw; once by default.

    Returns:
        ``[draws]``.
    """
    often = np.ones((1, x.size)) if counts is None else counts
    total = often.sum(1, keepdims=True)

    def centred(values: Floats) -> Floats:
        _, group = np.unique(values, return_inverse=True)
        sizes = often @ np.eye(group.max() + 1)[group]
        ranks = (np.cumsum(sizes, axis=1) - (sizes - 1) / 2)[:, group]
        centre: Floats = ranks - (often * ranks).sum(1, keepdims=True) / total
        return centre

    with np.errstate(divide="ignore", invalid="ignore"):  # a draw without a pair, or without variation
        a, b = centred(x), centred(y)
        found: Floats = (often * a * b).sum(1) / np.sqrt((often * a * a).sum(1) * (often * b * b).sum(1))
    return found


def spearman_over_pairs(
    pairs: Sequence[tuple[str, str]], x: Sequence[float], y: Sequence[float], seed: int = 0
) -> Estimate | None:
    """Rank correlation over pairs of tasks, with an interval by bootstrap over the *tasks*: pairs that share one are not independent.

    Tasks are drawn with replacement, and a pair counts as often as both its tasks were drawn together.

    Returns:
        None if one of them does not vary.
    """
    a, b = np.array(x, np.float64), np.array(y, np.float64)
    value = float(spearman(a, b)[0])
    if not np.isfinite(value):
        return None
    tasks = sorted({task for pair in pairs for task in pair})
    first, second = (np.array([tasks.index(pair[side]) for pair in pairs]) for side in (0, 1))
    drawn = np.random.default_rng(seed).integers(0, len(tasks), (DRAWS, len(tasks)))
    counts = (drawn[:, :, None] == np.arange(len(tasks))).sum(1)
    often = (counts[:, first] * counts[:, second]).astype(np.float64)
    draws = spearman(a, b, often[np.count_nonzero(often, axis=1) > 2])
    return interval(value, draws) if np.isfinite(draws).any() else None
