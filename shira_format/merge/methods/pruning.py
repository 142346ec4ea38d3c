"""What the methods that prune have in common: which of an adapter's entries are kept, and at which scale.

All of them see an adapter's deltas as a dense tensor of the weight's shape, of which nearly all elements are zeros. A share is
of *all* its elements, as in PEFT and mergekit: a density of 0.2 takes nothing from an adapter that changes 1 % of a weight. With
``of=entries`` it is of the adapter's own entries, as if these were the whole tensor: 0.2 then leaves a fifth of them.

Magnitudes are ordered as the peers order them, in float32 (float64 for float64 weights). Of equal ones that with the lower flat
index counts as the larger; the peers leave open which it is.
"""

from __future__ import annotations

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.dtypes import working_dtype
from shira_format.entries.aligned import AlignedEntries, Contribution, Floats
from shira_format.merge.methods.method import Option, Options, of_adapter
from shira_format.selection.largest import largest

DENSITY = Option(1.0, "share that is kept; 1: all", low=0, high=1, each=True)
OF = Option(
    "elements",
    "what density is a share of: the weight's elements, or the adapter's own entries",
    ("elements", "entries"),
)
SEED = Option(0, "another seed, other entries", low=0, high=2.0**53)

# mergekit restores no norm that is smaller.
_SMALL = 1e-7


def elements(part: Contribution, options: Options) -> int:
    """How many elements the tensor has of which entries are pruned: those of the weight, or the entries alone."""
    return part.tensor.nnz if options["of"] == "entries" else part.tensor.numel


def magnitudes(part: Contribution) -> Array:
    """Of the deltas, ``[nnz]``, in the type in which they are compared."""
    wide = np.float64 if working_dtype(part.tensor.values.dtype) == np.float64 else np.float32
    with np.errstate(over="ignore", under="ignore"):  # beyond float32's range all are equal
        return np.abs(part.delta).astype(wide)


def ranked(part: Contribution, first: int, last: int) -> Floats:
    """1 for entries that are, counted from the largest magnitude, at places ``first`` to ``last`` - 1, else 0."""
    kept = np.zeros(part.tensor.nnz)
    size = magnitudes(part)
    kept[largest(size, last)] = 1
    if first > 0:
        kept[largest(size, first)] = 0
    return kept


def restored(part: Contribution, kept: Floats) -> Floats:
    """Scale what is kept so that the sum of magnitudes is that of all deltas, as mergekit's ``rescale``.

    Not if either is below 1e-7 (mergekit's limit): then nothing is scaled.
    """
    size = np.abs(part.delta)
    before, after = float(size.sum()), float((size * kept).sum())
    if before < _SMALL or after < _SMALL:
        return kept
    return kept * (before / after)


def by_magnitude(aligned: AlignedEntries, options: Options, *, least: int = 0) -> list[Floats]:
    """For each part 1 for its largest entries, else 0: ``int(density * elements)`` of them, but at least ``least``."""
    found = []
    for number, part in enumerate(aligned.parts):
        density = of_adapter(options, number)["density"]
        count = int(density * elements(part, options))
        if density > 0:
            count = max(least, count)
        found.append(ranked(part, 0, count) if density < 1 else np.ones(part.tensor.nnz))
    return found
