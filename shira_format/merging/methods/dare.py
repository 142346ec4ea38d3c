"""DARE (https://arxiv.org/abs/2311.03099): entries are dropped at random, and the others rescaled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shira_format.entries.aligned import AlignedEntries, Factor, Floats
from shira_format.merging.methods.arithmetic import LAMBDA, NORMALIZE, summed
from shira_format.merging.methods.election import MAJORITY, SEMANTICS, elected
from shira_format.merging.methods.method import Method, Option, Options
from shira_format.merging.methods.pruning import DENSITY, SEED, pruned, restored
from shira_format.merging.methods.randomness import uniform


def dropped(aligned: AlignedEntries, options: Options) -> list[Floats]:
    """For each part the scales of its entries, 0 for those that are dropped.

    Density 0 drops all. (PEFT divides zeros by 0 there, and every element of the weight becomes NaN.)
    """
    rescale = options["rescale"]
    if rescale == "default":
        rescale = "density" if options["semantics"] == "peft" else "norm"

    def prune(number: int, own: Options) -> Floats:
        kept = (uniform(aligned, number, options["seed"]) < own["density"]).astype(np.float64)
        if rescale == "density" and own["density"] > 0:
            kept /= own["density"]
        return restored(aligned.parts[number], kept) if rescale == "norm" else kept

    return pruned(aligned, options, prune)


def dare_linear(aligned: AlignedEntries, options: Options) -> Sequence[Factor]:
    """PEFT's or mergekit's ``dare_linear``: the weighted sum of the entries that are kept."""
    return summed(aligned, dropped(aligned, options), options)


def dare_ties(aligned: AlignedEntries, options: Options) -> Sequence[Factor]:
    """PEFT's or mergekit's ``dare_ties``: drop, elect signs, sum what agrees; see :func:`elected` for how they differ."""
    peft = options["semantics"] == "peft"
    normalize = peft if options["normalize"] == "default" else options["normalize"] == "true"
    return elected(aligned, dropped(aligned, options), options, peft=peft, normalize=normalize)


RESCALE = Option(
    "default",
    "what is kept is divided by the density (as PEFT), scaled to the adapter's sum of magnitudes (as mergekit), or neither",
    ("default", "density", "norm", "none"),
)
_BOTH = {"density": DENSITY, "seed": SEED, "semantics": SEMANTICS, "rescale": RESCALE, "lambda": LAMBDA}

METHODS = (
    Method(
        "dare_linear",
        dare_linear,
        "the weighted sum after dropping entries at random",
        {**_BOTH, "normalize": NORMALIZE},
    ),
    Method(
        "dare_ties",
        dare_ties,
        "entries dropped at random, the others summed where they have the elected sign",
        {
            **_BOTH,
            "majority_sign": MAJORITY,
            "normalize": Option(
                "default",
                "divide by the number (mergekit: the weights) of the adapters that agree; PEFT does, mergekit does not",
                ("default", "true", "false"),
            ),
        },
    ),
)
