"""Sign election: for each entry the adapters vote for plus or minus, and only those on the side that won are joined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from shira_format._core.arrays import Indices
from shira_format.entries.aligned import AlignedEntries, Floats
from shira_format.merge.methods.arithmetic import SMALL
from shira_format.merge.methods.method import Option, Options

MAJORITY = Option(
    "total", "how signs are elected: by the sum of the deltas, or one vote an adapter", ("total", "frequency")
)
SEMANTICS = Option("peft", "whose rules hold where they differ: PEFT's, or mergekit's", ("peft", "mergekit"))

_BLOCK = 1 << 20  # numbers that are held at a time


def stacked(
    joined: AlignedEntries, values: Sequence[Floats], where: Indices | None = None
) -> Iterator[tuple[slice, Floats]]:
    """What the parts have at each entry, zeros where they have none: slices of the entries, and float64 ``[parts, slice]``.

    Args:
        joined: the weight.
        values: for each part ``[nnz]``.
        where: numbers of entries to look at, rising; all by default. The slices are of these.
    """
    size = joined.size if where is None else where.size
    step = max(1, _BLOCK // max(1, len(values)))
    for start in range(0, size, step):
        some = slice(start, min(start + step, size))
        chosen = np.arange(some.start, some.stop) if where is None else where[some]
        block = np.zeros((len(values), chosen.size))
        for row, at, own in zip(block, joined.places, values, strict=True):
            low, high = np.searchsorted(at, [chosen[0], chosen[-1] + 1])
            mine = at[low:high]
            place = np.searchsorted(chosen, mine)
            met = chosen[place] == mine
            row[place[met]] = own[low:high][met]
        yield some, block


def total(joined: AlignedEntries, values: Sequence[Floats]) -> Floats:
    """The sum for each entry: float64 ``[n]`` from ``[nnz]`` each, bit for bit the same in any order of the parts."""
    found = joined.sum(values)
    if len(values) > 2:  # two numbers have the same sum in both orders
        many = np.flatnonzero(joined.touches > 2)
        for some, block in stacked(joined, values, many):
            found[many[some]] = ascending(block)
    return found


def ascending(block: Floats) -> Floats:
    """The sums of columns, smallest number first; sorts them in place."""
    block.sort(axis=0)
    found = np.zeros(block.shape[1])
    for row in block:
        found += row
    return found


def agreeing(joined: AlignedEntries, steps: Sequence[Floats], majority: str = "total") -> list[Floats]:
    """For each part 1 where its step has the elected sign, else 0. A tie elects plus; a step of 0 has no sign, and never agrees."""
    votes = total(joined, steps) if majority == "total" else joined.sum([np.sign(step) for step in steps])
    elected = np.where(votes >= 0, 1.0, -1.0)
    return [
        (np.sign(step) == elected[at]).astype(np.float64) for step, at in zip(steps, joined.places, strict=True)
    ]


def elected(
    joined: AlignedEntries, kept: Sequence[Floats], options: Options, *, peft: bool, normalize: bool
) -> list[Floats]:
    """The sum of what is kept and has the elected sign.

    Args:
        joined: the weight.
        kept: for each part the scale of its entries, 0 where they were pruned, without its weight.
        options: ``majority_sign`` and ``lambda``.
        peft: whose rules. PEFT elects by deltas without weights, so that an adapter of weight 0 votes, one of a negative
            weight votes for the sign that it had; and it divides by the number of those that agree, whatever their weights
            are. mergekit elects by weighted deltas and divides by the sum of the weights of those that agree.
        normalize: whether it is divided at all.
    """
    scales = kept if peft else [part.weight * own for part, own in zip(joined.parts, kept, strict=True)]
    steps = [part.delta * scale for part, scale in zip(joined.parts, scales, strict=True)]
    agree = agreeing(joined, steps, options["majority_sign"])
    divisor = np.ones(joined.size)
    if normalize and peft:
        divisor = np.maximum(joined.sum(agree), 1)
    elif normalize:
        divisor = total(joined, [part.weight * own for part, own in zip(joined.parts, agree, strict=True)])
        # mergekit: where it is 0. Weights that cancel leave something below this, or nothing, by the order of adding them.
        divisor[np.abs(divisor) < SMALL] = 1
    return [
        options["lambda"] * part.weight * own * met / divisor[at]
        for part, own, met, at in zip(joined.parts, kept, agree, joined.places, strict=True)
    ]
