"""Model Breadcrumbs (https://arxiv.org/abs/2312.06795): neither the smallest entries nor the very largest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shira_format.entries.aligned import AlignedEntries, Factor, Floats
from shira_format.merge.methods.arithmetic import LAMBDA, NORMALIZE, RESCALE, summed
from shira_format.merge.methods.election import MAJORITY, elected
from shira_format.merge.methods.method import Method, Option, Options, of_adapter
from shira_format.merge.methods.pruning import DENSITY, OF, elements, ranked, restored


def sifted(aligned: AlignedEntries, options: Options) -> list[Floats]:
    """For each part the scale of its entries, 0 for those that are left out.

    mergekit's counting: the share ``gamma`` of all elements that is largest goes first, then as many of the smallest as it
    takes to leave the share ``density``; fewer of the largest go if both shares are more than all. The zeros of the dense
    tensor are its smallest elements, so that an adapter with fewer entries than ``gamma`` of the weight's elements loses
    all of them: ``of=entries`` is what such adapters need.
    """
    found = []
    for number, part in enumerate(aligned.parts):
        own = of_adapter(options, number)
        density = own["density"]
        if density >= 1:
            found.append(np.ones(part.tensor.nnz))
            continue
        count = elements(part, options)
        target = int(density * count)
        smallest = max(0, count - target - int(own["gamma"] * count))
        last = count - smallest  # from the largest on
        kept = ranked(part, last - target, last)
        found.append(restored(part, kept) if options["rescale"] else kept)
    return found


def breadcrumbs(aligned: AlignedEntries, options: Options) -> Sequence[Factor]:
    """As mergekit's ``breadcrumbs``: the weighted sum of what is left."""
    return summed(aligned, sifted(aligned, options), options)


def breadcrumbs_ties(aligned: AlignedEntries, options: Options) -> Sequence[Factor]:
    """As mergekit's ``breadcrumbs_ties``: signs are elected by weighted deltas, and what agrees is aligned."""
    return elected(aligned, sifted(aligned, options), options, peft=False, normalize=options["normalize"])


_BOTH = {
    "density": DENSITY,
    "gamma": Option(
        0.01, "share that is left out as too large; of what density is a share of", low=0, high=1, each=True
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
        "neither the smallest nor the very largest, joined where they have the elected sign",
        {
            **_BOTH,
            "majority_sign": MAJORITY,
            "normalize": Option(False, "divide by the weights of the adapters that agree"),
        },
    ),
)
