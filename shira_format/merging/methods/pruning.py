"""Pruning: which of an adapter's entries are kept, and by what they are scaled.

A density is a share of *all* elements of the weight, as in PEFT and mergekit, which prune dense deltas: 0.2 drops nothing from an
adapter that changes 1 % of a weight. With ``of=entries`` it is a share of the adapter's own entries: 0.2 keeps a fifth of them.

Magnitudes are compared in float32 (float64 for float64 weights), as in PEFT and mergekit. Of equal magnitudes the lower flat
index is kept first; PEFT and mergekit do not define this.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.dtypes import working_dtype
from shira_format.entries.aligned import AlignedEntries, Contribution, Floats
from shira_format.merging.methods.method import Option, Options, of_adapter
from shira_format.selection.topk import largest

DENSITY = Option(1.0, "share that is kept; 1: all", low=0, high=1, each=True)
OF = Option(
    "elements",
    "what density is a share of: the weight's elements, or the adapter's own entries",
    ("elements", "entries"),
)
SEED = Option(0, "seed of the random choice of entries", low=0, high=2.0**53)

# mergekit does not rescale if a sum of magnitudes is smaller.
_SMALL = 1e-7


def elements(part: Contribution, options: Options) -> int:
    """The number of which the density is a share: the weight's elements, or the adapter's entries."""
    return part.tensor.nnz if options["of"] == "entries" else part.tensor.numel


def magnitudes(part: Contribution) -> Array:
    """The magnitudes of the deltas, ``[nnz]``, in the dtype in which they are compared."""
    wide = np.float64 if working_dtype(part.tensor.values.dtype) == np.float64 else np.float32
    with np.errstate(over="ignore", under="ignore"):  # outside float32's range all are equal
        return np.abs(part.delta).astype(wide)


def ranked(part: Contribution, first: int, last: int) -> Floats:
    """1 for entries whose rank by magnitude (0: the largest) is in ``range(first, last)``, else 0."""
    kept = np.zeros(part.tensor.nnz)
    size = magnitudes(part)
    kept[largest(size, last)] = 1
    if first > 0:
        kept[largest(size, first)] = 0
    return kept


def restored(part: Contribution, kept: Floats) -> Floats:
    """Scale what is kept so that the sum of magnitudes is that of all deltas, as mergekit's ``rescale``.

    Nothing is scaled if either sum is below 1e-7 (mergekit's limit).
    """
    size = np.abs(part.delta)
    before, after = float(size.sum()), float((size * kept).sum())
    if before < _SMALL or after < _SMALL:
        return kept
    return kept * (before / after)


def pruned(aligned: AlignedEntries, options: Options, prune: Callable[[int, Options], Floats]) -> list[Floats]:
    """For each part the scales of its entries, 0 for those that are dropped: all 1 at density 1, else from ``prune``.

    Args:
        aligned: the weight.
        options: of the method.
        prune: from the part's number and its options to the scales, float64 ``[nnz]``.
    """
    found = []
    for number, part in enumerate(aligned.parts):
        own = of_adapter(options, number)
        found.append(np.ones(part.tensor.nnz) if own["density"] >= 1 else prune(number, own))
    return found


def by_magnitude(aligned: AlignedEntries, options: Options, *, least: int = 0) -> list[Floats]:
    """For each part 1 for its largest entries, else 0: ``int(density * elements)`` of them, but at least ``least``."""

    def prune(number: int, own: Options) -> Floats:
        part = aligned.parts[number]
        count = int(own["density"] * elements(part, options))
        return ranked(part, 0, max(least, count) if own["density"] > 0 else count)

    return pruned(aligned, options, prune)
