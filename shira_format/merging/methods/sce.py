"""SCE (https://arxiv.org/abs/2408.07990): select the entries that vary most, calculate weights from energies, erase minority signs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shira_format.entries.aligned import AlignedEntries, Factor, Floats
from shira_format.entries.mixing import sum_ascending
from shira_format.merging.methods.election import agreeing, stacked, total
from shira_format.merging.methods.method import Method, Option, Options
from shira_format.selection.topk import largest

# mergekit's limit of the sum of mean squares below which all adapters get the same share, and of the divisor.
_SMALL = 1e-6


def sce(aligned: AlignedEntries, options: Options) -> Sequence[Factor]:
    """As mergekit's ``sce``, on the deltas times their weights (mergekit has none); an adapter of weight 0 is left out.

    An adapter that does not change this weight counts as equal to the base there. ``select_topk`` is a share of the entries that
    vary among the adapters, so nothing is left of one adapter alone.

    The adapters' shares are proportional to their mean squares over *all* elements of the weight. If these sum to less than 1e-6,
    as is common for sparse adapters, all adapters get the same share, as in mergekit.
    """
    active = [number for number, part in enumerate(aligned.parts) if part.weight]
    found: list[Factor] = [0.0] * len(aligned.parts)
    if not active:
        return found
    among = (
        aligned
        if len(active) == len(aligned.parts)
        else AlignedEntries.of([aligned.parts[number] for number in active])
    )
    parts = among.parts
    kept = [np.full(part.tensor.nnz, part.weight) for part in parts]
    if options["select_topk"] < 1:
        chosen = _varying(among, [part.delta * part.weight for part in parts], options["select_topk"])
        kept = [own * chosen[at] for own, at in zip(kept, among.places, strict=True)]
    steps = [part.delta * own for part, own in zip(parts, kept, strict=True)]
    energies = [float(np.square(step).sum()) / max(1, aligned.numel) for step in steps]
    whole = math.fsum(energies)
    shares = [1 / len(parts) if whole < _SMALL else energy / whole for energy in energies]
    erased = [share * own for share, own in zip(shares, agreeing(among, steps), strict=True)]
    divisor = np.maximum(total(among, erased), _SMALL)
    for number, own, share, at in zip(active, kept, erased, among.places, strict=True):
        found[number] = own * share / divisor[at]
    return found


def _varying(aligned: AlignedEntries, steps: Sequence[Floats], share: float) -> Floats:
    """1 for a share of the entries with a variance other than 0, those of largest variance; else 0: float64 ``[n]``."""
    variance = np.empty(aligned.size)
    for some, block in stacked(aligned, steps):
        off = block - block.min(axis=0)  # equal numbers have the variance 0, exactly
        off -= sum_ascending(off) / len(off)
        variance[some] = sum_ascending(off * off) / len(off)
    chosen = np.zeros(aligned.size)
    # in float32, as torch multiplies: the count may differ by one otherwise
    count = int(np.float32(np.count_nonzero(variance)) * np.float32(share))
    chosen[largest(variance, count)] = 1
    return chosen


METHODS = (
    Method(
        "sce",
        sce,
        "entries that vary most, weighted by the adapters' energies (sums of squares), where they have the elected sign",
        {"select_topk": Option(1.0, "share of the entries that vary that is kept; 1: all entries", low=0, high=1)},
    ),
)
