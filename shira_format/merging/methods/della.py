"""DELLA (https://arxiv.org/abs/2406.11617): entries are dropped at random, smaller ones of a row more often."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shira_format.entries.aligned import AlignedEntries, Contribution, Factor, Floats
from shira_format.errors import SourceError
from shira_format.merging.methods.arithmetic import LAMBDA, NORMALIZE, summed
from shira_format.merging.methods.election import MAJORITY, elected
from shira_format.merging.methods.method import Method, Option, Options
from shira_format.merging.methods.pruning import DENSITY, SEED, magnitudes, pruned, restored
from shira_format.merging.methods.randomness import uniform


def chances(part: Contribution, options: Options) -> Floats:
    """The probability of each entry to be kept: float64 ``[nnz]``, from ``density - epsilon`` to ``density + epsilon``.

    It increases with the rank of the entry's magnitude in its row. mergekit ranks along axis 1: the rows of a matrix; with more
    dimensions (convolutions) the elements that differ in their second index only; a vector is one row. Elements that the
    adapter does not change are zeros and take the lowest ranks: at 1 % density all entries are near the upper end. With
    ``of=entries`` the ranks are among the adapter's entries of the row.

    In a row of one element the probability is ``density``. (mergekit divides 0 by 0 there, and fails.)

    Raises:
        SourceError: ``density - epsilon`` or ``density + epsilon`` is not between 0 and 1.
    """
    density, epsilon = options["density"], options["epsilon"]
    if not 0 < density - epsilon <= density + epsilon < 1:
        raise SourceError(
            f"density={density:g} and epsilon={epsilon:g}: density - epsilon and density + epsilon are not both between 0 and 1"
        )
    shape, indices = part.tensor.shape, part.tensor.indices
    length = shape[1] if len(shape) > 1 else part.tensor.numel
    inner = math.prod(shape[2:])
    row = indices // max(1, length * inner) * inner + indices % inner if inner else indices
    order = np.lexsort((-magnitudes(part), row))  # stable: of equal ones the lower flat index first
    starts, counts = np.unique(row[order], return_index=True, return_counts=True)[1:]
    from_largest = np.arange(order.size) - np.repeat(starts, counts)
    most = np.repeat(counts, counts) - 1.0 if options["of"] == "entries" else np.full(order.size, length - 1.0)
    share = np.full(order.size, 0.5)
    np.divide(most - from_largest, most, out=share, where=most > 0)
    found = np.empty(order.size)
    found[order] = (density - epsilon) + share * 2 * epsilon
    return found


def thinned(aligned: AlignedEntries, options: Options) -> list[Floats]:
    """For each part the scales of its entries, 0 for those that are dropped."""

    def prune(number: int, own: Options) -> Floats:
        part = aligned.parts[number]
        if own["density"] <= 0:
            return np.zeros(part.tensor.nnz)
        kept = (uniform(aligned, number, options["seed"]) < chances(part, own)).astype(np.float64)
        return restored(part, kept) if options["rescale"] else kept

    return pruned(aligned, options, prune)


def della_linear(aligned: AlignedEntries, options: Options) -> Sequence[Factor]:
    """As mergekit's ``della_linear``: the weighted sum of the entries that are kept."""
    return summed(aligned, thinned(aligned, options), options)


def della(aligned: AlignedEntries, options: Options) -> Sequence[Factor]:
    """As mergekit's ``della``: signs are elected by weighted deltas, and deltas that agree are summed."""
    return elected(aligned, thinned(aligned, options), options, peft=False, normalize=options["normalize"])


_BOTH = {
    "density": DENSITY,
    "epsilon": Option(
        0.15,
        "how far the probability is from density for the smallest and the largest of a row",
        low=0,
        high=1,
        each=True,
    ),
    "seed": SEED,
    "of": Option(
        "elements",
        "what an entry is ranked among in its row: all elements, or the adapter's own entries",
        ("elements", "entries"),
    ),
    "rescale": Option(True, "restore the sum of magnitudes that each adapter had before entries were dropped"),
    "lambda": LAMBDA,
}

METHODS = (
    Method(
        "della",
        della,
        "entries dropped at random, small ones more often, the others summed where they have the elected sign",
        {
            **_BOTH,
            "majority_sign": MAJORITY,
            "normalize": Option(True, "divide by the weights of the adapters that agree"),
        },
    ),
    Method(
        "della_linear",
        della_linear,
        "the weighted sum after dropping entries at random, small ones more often",
        {**_BOTH, "normalize": NORMALIZE},
    ),
)
