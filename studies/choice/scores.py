"""What masks reach alone and fused, with what texts and seeds make uncertain, and which of them no other one beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from studies import statistics
from studies.choice.plan import TASKS
from studies.runs import Result
from studies.statistics import Case, Estimate, Floats, interval, kept

ALONE = "margins"  # as results have them
FUSED = {"sum": "sum of two", "average": "average of two"}


@dataclass(frozen=True)
class Score:
    """A mean accuracy of both tasks over the seeds, a share.

    Attributes:
        value: of all texts and seeds.
        draws: bootstrap, ``[draws]``: seeds and texts drawn with replacement, the same for all scores of as many seeds.
        seeds: of each seed.
    """

    value: float
    draws: Floats
    seeds: list[float]

    @property
    def estimate(self) -> Estimate:
        """With its interval."""
        return interval(self.value, self.draws)

    def more_than(self, other: Score) -> Estimate:
        """The difference, seed by seed and text by text."""
        value, draws = self.value - other.value, self.draws - other.draws
        return interval(round(value, 9) + 0.0, np.round(draws, 9) + 0.0)  # else "-0.0"


def score(group: Sequence[Result], state: str) -> Score:
    """Of one method and density.

    Args:
        group: its results, in the order of the seeds.
        state: :data:`ALONE` or of :data:`FUSED`.
    """
    rng = np.random.default_rng(0)
    count = statistics.DRAWS
    seeds = rng.integers(0, len(group), (count, len(group)))
    means, draws = [], []
    for task in TASKS:
        right = np.array([one[state][task] for one in group]) > 0
        texts = rng.integers(0, right.shape[1], (count, right.shape[1]))
        draws.append(right[seeds[:, :, None], texts[:, None, :]].mean((1, 2)))
        means.append(right.mean(1))
    each = np.mean(means, axis=0)
    return Score(float(each.mean()), np.mean(draws, axis=0), each.tolist())


def r2(group: Sequence[Result], state: str) -> Estimate:
    """What a fused adapter keeps of the effect of its parts, see :func:`studies.statistics.kept`."""
    return kept(
        [Case.of(task, one[state][task], one[ALONE][task], one["base"][task]) for one in group for task in TASKS]
    )


def front(alone: Mapping[str, Score], fused: Mapping[str, Score]) -> dict[str, tuple[bool, float]]:
    """Of each method whether no other one is as good at both and better at one, and the share of the draws in which it is so."""
    values = _unbeaten(*(np.array([[one.value] for one in of.values()]) for of in (alone, fused)))
    draws = _unbeaten(*(np.array([one.draws for one in of.values()]) for of in (alone, fused)))
    return {method: (bool(values[at, 0]), float(draws[at].mean())) for at, method in enumerate(alone)}


def _unbeaten(alone: Floats, fused: Floats) -> npt.NDArray[np.bool_]:
    """``[methods, draws]`` of the same."""
    above, beside = alone[:, None] - alone, fused[:, None] - fused
    beats = (above >= 0) & (beside >= 0) & ((above > 0) | (beside > 0))  # the first the second
    found: npt.NDArray[np.bool_] = np.logical_not(beats.any(0))
    return found
