"""Reinforced Agent Merging (https://arxiv.org/abs/2601.13572): the mean of shared entries, the sum of all others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shira_format.entries.aligned import AlignedEntries, Factor, Floats
from shira_format.merging.methods.method import Method, Option, Options


def ram(aligned: AlignedEntries, options: Options) -> Sequence[Factor]:
    """As mergekit's ``ram``, on the deltas times their weights (mergekit has none).

    An entry counts for an adapter if its delta's magnitude is above ``epsilon``; the sum is divided by the number of adapters
    for which it counts.
    """
    counted, number = _counted(aligned, options["epsilon"])
    return [
        part.weight * own / np.maximum(number[at], 1)
        for part, own, at in zip(aligned.parts, counted, aligned.places, strict=True)
    ]


def ramplus_tl(aligned: AlignedEntries, options: Options) -> Sequence[Factor]:
    """As mergekit's ``ramplus_tl``: as ``ram``, but an adapter's unshared entries are scaled up, the more of its entries are shared.

    The factor is ``1 + r * min(rho, rho_max)`` with ``rho`` the ratio of its shared to its unshared entries.
    ``rho_max`` is mergekit's ``alpha``, renamed because adapters have an alpha.
    """
    counted, number = _counted(aligned, options["epsilon"])
    found: list[Factor] = []
    for part, own, at in zip(aligned.parts, counted, aligned.places, strict=True):
        mine = number[at]
        shared, alone = np.count_nonzero(own * (mine > 1)), np.count_nonzero(own * (mine == 1))
        larger = 1 + options["r"] * min(shared / alone, options["rho_max"]) if alone else 1.0
        found.append(part.weight * own * np.where(mine == 1, larger, 1 / np.maximum(mine, 1)))
    return found


def _counted(aligned: AlignedEntries, epsilon: float) -> tuple[list[Floats], Floats]:
    """For each part 1 for entries that count, else 0, ``[nnz]``; and the number of parts for which each entry counts, ``[n]``."""
    counted = [(np.abs(part.delta * part.weight) > epsilon).astype(np.float64) for part in aligned.parts]
    return counted, aligned.sum(counted)


EPSILON = Option(1e-5, "deltas up to this magnitude do not count", low=0)

METHODS = (
    Method("ram", ram, "the mean of shared entries, the sum of all others", {"epsilon": EPSILON}),
    Method(
        "ramplus_tl",
        ramplus_tl,
        "as ram, with unshared entries scaled up, the more of an adapter's entries are shared",
        {
            "epsilon": EPSILON,
            "r": Option(0.1, "how much they are scaled up", low=0),
            "rho_max": Option(
                0.2, "upper limit of the ratio of shared to unshared entries (mergekit's alpha)", low=0
            ),
        },
    ),
)
