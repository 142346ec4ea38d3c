"""The weighted sum of the entries that are kept, and its simplest case, where all are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shira_format.entries.aligned import AlignedEntries, Factor
from shira_format.merging.methods.method import Method, Option, Options

# mergekit does not divide by a smaller sum of weights.
SMALL = 1e-8

NORMALIZE = Option(False, "divide by the sum of the weights")
LAMBDA = Option(1.0, "factor of the result")
RESCALE = Option(False, "restore each adapter's sum of magnitudes before pruning")


def summed(aligned: AlignedEntries, kept: Sequence[Factor], options: Options) -> list[Factor]:
    """``lambda * sum of w_i kept_i D_i``, with ``normalize`` divided by the sum of all weights (if not 0), as mergekit."""
    scale = options["lambda"]
    if options["normalize"]:
        total = math.fsum(aligned.weights)  # exact: the order of the adapters does not matter
        scale /= total if abs(total) >= SMALL else 1.0
    return [part.weight * scale * own for part, own in zip(aligned.parts, kept, strict=True)]


def task_arithmetic(aligned: AlignedEntries, options: Options) -> Sequence[Factor]:
    """As mergekit's ``task_arithmetic``: the weighted sum. ``normalize`` also counts adapters that do not change the weight."""
    return summed(aligned, [1.0] * len(aligned.parts), options)


METHODS = (
    Method(
        "task_arithmetic",
        task_arithmetic,
        "the weighted sum times lambda",
        {"normalize": NORMALIZE, "lambda": LAMBDA},
    ),
)
