"""Weighted sums and means."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shira_format.entries.aligned import AlignedEntries, Factor
from shira_format.errors import SourceError
from shira_format.merging.methods.election import total as total_of
from shira_format.merging.methods.method import Method, Option, Options


def linear(aligned: AlignedEntries, options: Options) -> Sequence[Factor]:
    """``sum of w_i D_i``, as PEFT's ``linear`` of task tensors and mergekit's ``task_arithmetic``.

    With ``normalize`` divided by the sum of all weights (if not 0), those of adapters without the entry included, as mergekit's
    ``linear`` averages models.
    """
    divisor = math.fsum(aligned.weights) if options["normalize"] else 1.0
    return [part.weight / (divisor if abs(divisor) >= 1e-8 else 1.0) for part in aligned.parts]


def mean(aligned: AlignedEntries, _: Options) -> Sequence[Factor]:
    """``sum of w_i D_i / sum of w_i`` over the adapters that have the entry; the entry of one adapter alone is kept in full.

    With equal weights the average by overlap count of UniformSparse (https://arxiv.org/abs/2507.07140).

    Raises:
        SourceError: a negative weight: -1 and -1 would give the same mean as 1 and 1.
    """
    for part in aligned.parts:
        if part.weight < 0:
            raise SourceError(
                f"{part.label}: the weight {part.weight:g} is negative, which the method 'mean' does not allow"
            )
    total = total_of(
        aligned, [np.full(at.size, part.weight) for part, at in zip(aligned.parts, aligned.places, strict=True)]
    )
    total[np.abs(total) < 1e-8] = 1
    return [part.weight / total[at] for part, at in zip(aligned.parts, aligned.places, strict=True)]


NORMALIZE = Option(False, "divide by the sum of the weights")

METHODS = (
    Method("linear", linear, "the weighted sum", {"normalize": NORMALIZE}),
    Method("mean", mean, "the weighted mean over the adapters that have the entry"),
)
