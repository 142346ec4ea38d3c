"""Magnitude pruning and TIES (https://arxiv.org/abs/2306.01708): only the largest entries of each adapter."""

from __future__ import annotations

from collections.abc import Sequence

from shira_format.entries.aligned import AlignedEntries, Factor
from shira_format.merging.methods.arithmetic import LAMBDA, RESCALE
from shira_format.merging.methods.election import MAJORITY, SEMANTICS, elected
from shira_format.merging.methods.method import Method, Option, Options
from shira_format.merging.methods.pruning import DENSITY, OF, by_magnitude, restored


def magnitude_prune(aligned: AlignedEntries, options: Options) -> Sequence[Factor]:
    """PEFT's ``magnitude_prune``: the weighted sum of the largest entries of each adapter."""
    return [part.weight * own for part, own in zip(aligned.parts, by_magnitude(aligned, options), strict=True)]


def ties(aligned: AlignedEntries, options: Options) -> Sequence[Factor]:
    """PEFT's or mergekit's ``ties``: trim, elect signs, sum what agrees; see :func:`elected` for how they differ.

    mergekit keeps at least one entry; PEFT keeps ``int(density * elements)``, which may be none.
    """
    peft = options["semantics"] == "peft"
    kept = by_magnitude(aligned, options, least=0 if peft else 1)
    if options["rescale"]:
        kept = [restored(part, own) for part, own in zip(aligned.parts, kept, strict=True)]
    return elected(aligned, kept, options, peft=peft, normalize=options["normalize"])


METHODS = (
    Method(
        "magnitude_prune",
        magnitude_prune,
        "the weighted sum of each adapter's largest entries",
        {"density": DENSITY, "of": OF},
    ),
    Method(
        "ties",
        ties,
        "each adapter's largest entries, where they have the elected sign",
        {
            "density": DENSITY,
            "of": OF,
            "majority_sign": MAJORITY,
            "semantics": SEMANTICS,
            "normalize": Option(True, "divide by the number (mergekit: the weights) of the adapters that agree"),
            "rescale": RESCALE,
            "lambda": LAMBDA,
        },
    ),
)
