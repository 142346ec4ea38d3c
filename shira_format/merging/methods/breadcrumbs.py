"""Model Breadcrumbs (https://arxiv.org/abs/2312.06795): the smallest and the very largest entries are dropped."""

from __future__ import annotations

from collections.abc import Sequence

from shira_format.entries.aligned import AlignedEntries, Factor, Floats
from shira_format.merging.methods.arithmetic import LAMBDA, NORMALIZE, RESCALE, summed
from shira_format.merging.methods.election import MAJORITY, elected
from shira_format.merging.methods.method import Method, Option, Options
from shira_format.merging.methods.pruning import DENSITY, OF, elements, pruned, ranked, restored


def sifted(aligned: AlignedEntries, options: Options) -> list[Floats]:
    """For each part the scales of its entries, 0 for those that are dropped.

    As in mergekit, the share ``gamma`` of the elements that is largest is dropped first, then as many of the smallest as leaves
    the share ``density``; fewer of the largest if both shares are more than all. The zeros of the dense delta are its smallest
    elements, so an adapter with fewer entries than ``gamma`` of the weight's elements loses all of them: use ``of=entries``.
    """

    def prune(number: int, own: Options) -> Floats:
        part = aligned.parts[number]
        count = elements(part, options)
        target = int(own["density"] * count)
        smallest = max(0, count - target - int(own["gamma"] * count))
        last = count - smallest  # from the largest on
        kept = ranked(part, last - target, last)
        return restored(part, kept) if options["rescale"] else kept

    return pruned(aligned, options, prune)


def breadcrumbs(aligned: AlignedEntries, options: Options) -> Sequence[Factor]:
    """As mergekit's ``breadcrumbs``: the weighted sum of what is left."""
    return summed(aligned, sifted(aligned, options), options)


def breadcrumbs_ties(aligned: AlignedEntries, options: Options) -> Sequence[Factor]:
    """As mergekit's ``breadcrumbs_ties``: signs are elected by weighted deltas, and deltas that agree are summed."""
    return elected(aligned, sifted(aligned, options), options, peft=False, normalize=options["normalize"])


_BOTH = {
    "density": DENSITY,
    "gamma": Option(
        0.01, "share that is dropped as too large, of the same elements as density", low=0, high=1, each=True
    ),
    "of": OF,
    "rescale": RESCALE,
    "lambda": LAMBDA,
}

METHODS = (
    Method(
        "breadcrumbs",
        breadcrumbs,
        "the weighted sum without the smallest and the very largest",
        {**_BOTH, "normalize": NORMALIZE},
    ),
    Method(
        "breadcrumbs_ties",
        breadcrumbs_ties,
        "the smallest and the very largest entries dropped, the others summed where they have the elected sign",
        {
            **_BOTH,
            "majority_sign": MAJORITY,
            "normalize": Option(False, "divide by the weights of the adapters that agree"),
        },
    ),
)
