"""Sign election: for each entry the adapters elect plus or minus, and only deltas with the elected sign are summed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from shira_format._core.arrays import Indices
from shira_format.entries.aligned import AlignedEntries, Floats
from shira_format.entries.mixing import sum_ascending
from shira_format.merging.methods.arithmetic import SMALL
from shira_format.merging.methods.method import Option, Options

MAJORITY = Option(
    "total",
    "how signs are elected: by the sum of the deltas, or by one vote for each adapter",
    ("total", "frequency"),
)
SEMANTICS = Option("peft", "which rules apply where they differ: PEFT's, or mergekit's", ("peft", "mergekit"))

_BLOCK = 1 << 20  # numbers in memory at a time


def stacked(
    aligned: AlignedEntries, values: Sequence[Floats], where: Indices | None = None
) -> Iterator[tuple[slice, Floats]]:
    """The parts' values at each entry, zeros where they have none: slices of the entries, and float64 ``[parts, slice]``.

    Args:
        aligned: the weight.
        values: for each part ``[nnz]``.
        where: strictly increasing numbers of entries; all by default. The slices are of these.
    """
    size = aligned.size if where is None else where.size
    step = max(1, _BLOCK // max(1, len(values)))
    for start in range(0, size, step):
        some = slice(start, min(start + step, size))
        chosen = np.arange(some.start, some.stop) if where is None else where[some]
        block = np.zeros((len(values), chosen.size))
        for row, at, own in zip(block, aligned.places, values, strict=True):
            low, high = np.searchsorted(at, [chosen[0], chosen[-1] + 1])
            mine = at[low:high]
            place = np.searchsorted(chosen, mine)
            met = chosen[place] == mine
            row[place[met]] = own[low:high][met]
        yield some, block


def total(aligned: AlignedEntries, values: Sequence[Floats]) -> Floats:
    """The sum for each entry: float64 ``[n]`` from ``[nnz]`` each, bit for bit the same for any order of the parts."""
    found = aligned.sum(values)
    if len(values) > 2:  # two numbers have the same sum in both orders
        many = np.flatnonzero(aligned.counts > 2)
        for some, block in stacked(aligned, values, many):
            found[many[some]] = sum_ascending(block)
    return found


def agreeing(aligned: AlignedEntries, steps: Sequence[Floats], majority: str = "total") -> list[Floats]:
    """For each part 1 where its step has the elected sign, else 0. A tie elects plus; a step of 0 never agrees."""
    votes = total(aligned, steps) if majority == "total" else aligned.sum([np.sign(step) for step in steps])
    elected = np.where(votes >= 0, 1.0, -1.0)
    return [
        (np.sign(step) == elected[at]).astype(np.float64) for step, at in zip(steps, aligned.places, strict=True)
    ]


def elected(
    aligned: AlignedEntries, kept: Sequence[Floats], options: Options, *, peft: bool, normalize: bool
) -> list[Floats]:
    """The factors of the sum of what is kept and has the elected sign.

    Args:
        aligned: the weight.
        kept: for each part the scale of its entries, 0 where they were pruned, without its weight.
        options: ``majority_sign`` and ``lambda``.
        peft: whether PEFT's rules apply. PEFT elects by unweighted deltas (so an adapter of weight 0 votes, and a negative weight
            does not change the vote), and divides by the number of adapters that agree. mergekit elects by weighted deltas, and
            divides by the sum of the weights of those that agree.
        normalize: whether to divide.
    """
    scales = kept if peft else [part.weight * own for part, own in zip(aligned.parts, kept, strict=True)]
    steps = [part.delta * scale for part, scale in zip(aligned.parts, scales, strict=True)]
    agree = agreeing(aligned, steps, options["majority_sign"])
    divisor = np.ones(aligned.size)
    if normalize and peft:
        divisor = np.maximum(aligned.sum(agree), 1)
    elif normalize:
        divisor = total(aligned, [part.weight * own for part, own in zip(aligned.parts, agree, strict=True)])
        # mergekit: where it is 0. Weights that cancel leave a rest below this that depends on their order.
        divisor[np.abs(divisor) < SMALL] = 1
    return [
        options["lambda"] * part.weight * own * met / divisor[at]
        for part, own, met, at in zip(aligned.parts, kept, agree, aligned.places, strict=True)
    ]
