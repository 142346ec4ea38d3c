"""Reinforced Agent Merging (https://arxiv.org/abs/2601.13572): means of what adapters share, sums of what each has alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shira_format.entries.aligned import AlignedEntries, Factor, Floats
from shira_format.merge.methods.method import Method, Option, Options


def ram(aligned: AlignedEntries, options: Options) -> Sequence[Factor]:
    """As mergekit's ``ram``, on the deltas times their weights (mergekit has none).

    An entry counts for an adapter if its delta's magnitude is above ``epsilon``; it is divided by the number of adapters for
    which it counts.
    """
    counted, number = _counted(aligned, options["epsilon"])
    return [
        part.weight * own / np.maximum(number[at], 1)
        for part, own, at in zip(aligned.parts, counted, aligned.places, strict=True)
    ]


def ramplus_tl(aligned: AlignedEntries, options: Options) -> Sequence[Factor]:
    """As mergekit's ``ramplus_tl``: as ``ram``, but what an adapter has alone is made larger, the more it shares.

    The factor is ``1 + r * min(rho, rho_max)`` with ``rho`` the entries that it shares over those that it has alone.
    ``rho_max`` is mergekit's ``alpha``, which here would be taken for an adapter's.
    """
    counted, number = _counted(aligned, options["epsilon"])
    found: list[Factor] = []
    for part, own, at in zip(aligned.parts, counted, aligned.places, strict=True):
        mine = number[at]
        shared, alone = np.count_nonzero(own * (mine > 1)), np.count_nonzero(own * (mine == 1))
        # Of an adapter that has nothing alone nothing is made larger.
        larger = 1 + options["r"] * min(shared / alone, options["rho_max"]) if alone else 1.0
        found.append(part.weight * own * np.where(mine == 1, larger, 1 / np.maximum(mine, 1)))
    return found


def _counted(aligned: AlignedEntries, epsilon: float) -> tuple[list[Floats], Floats]:
    """For each part 1 for entries that count, else 0, ``[nnz]``; and for how many parts each entry counts, ``[n]``."""
    counted = [(np.abs(part.delta * part.weight) > epsilon).astype(np.float64) for part in aligned.parts]
    return counted, aligned.sum(counted)


EPSILON = Option(1e-5, "deltas that are not larger do not count", low=0)

METHODS = (
    Method("ram", ram, "the mean of what adapters share, the sum of what each has alone", {"epsilon": EPSILON}),
    Method(
        "ramplus_tl",
        ramplus_tl,
        "as ram, and what an adapter has alone is made larger, the more it shares",
        {
            "epsilon": EPSILON,
            "r": Option(0.1, "how much larger it is made", low=0),
            "rho_max": Option(0.2, "most that shared over unshared entries count (mergekit's alpha)", low=0),
        },
    ),
)
