"""CABS (https://arxiv.org/abs/2503.01874): adapters are pruned one after the other, each to entries that no earlier one has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shira_format._core.arrays import Indices
from shira_format.entries.aligned import AlignedEntries, Contribution, Factor, Floats
from shira_format.merging.methods.arithmetic import LAMBDA, NORMALIZE, summed
from shira_format.merging.methods.method import Method, Option, Options, of_adapter
from shira_format.merging.methods.pruning import DENSITY, OF, magnitudes


def cabs(aligned: AlignedEntries, options: Options) -> Sequence[Factor]:
    """The weighted sum of adapters without a shared entry, in the order in which they are given.

    Of each block of ``block`` elements in flat order (or of the adapter's own entries, with ``of=entries``) the largest that are
    free are kept, at most the share ``density`` of the block, the paper's ``n:m``: 0.25 and 256 are its 64:256. An adapter of
    weight 0 takes no entry.
    """
    taken = np.zeros(aligned.size, bool)
    found: list[Floats] = []
    for number, (part, at) in enumerate(zip(aligned.parts, aligned.places, strict=True)):
        kept = np.zeros(at.size)
        if part.weight:
            chosen = _largest(part, np.flatnonzero(~taken[at]), of_adapter(options, number))
            kept[chosen] = 1
            taken[at[chosen]] = True
        found.append(kept)
    return summed(aligned, found, options)


def _largest(part: Contribution, free: Indices, options: Options) -> Indices:
    """Of the entries ``free`` of a part, the largest of each block; of equal ones those of lower indices."""
    of_entries, block = options["of"] == "entries", options["block"]
    places = free if of_entries else part.tensor.indices[free]
    total = part.tensor.nnz if of_entries else part.tensor.numel
    number = places // block
    size = np.minimum(block, total - number * block)
    order = np.lexsort((-magnitudes(part)[free], number))  # stable, so of equal ones the first stays first
    starts = np.flatnonzero(np.diff(number[order], prepend=-1))
    rank = np.arange(order.size) - np.repeat(starts, np.diff(starts, append=order.size))
    kept: Indices = free[order[rank < np.floor(options["density"] * size[order])]]
    return kept


METHODS = (
    Method(
        "cabs",
        cabs,
        "each adapter's largest entries among those that no earlier adapter has, the same share of every block",
        {
            "density": DENSITY,
            "of": OF,
            "block": Option(256, "elements (or entries) among which the largest are kept", low=1, high=2.0**53),
            "normalize": NORMALIZE,
            "lambda": LAMBDA,
        },
    ),
)
