"""Methods that take entries as they are: every entry of the result is bit for bit that of one adapter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shira_format._core.arrays import Array, bits_differ
from shira_format.entries.aligned import AlignedEntries, Factor, Floats
from shira_format.errors import SourceError
from shira_format.merge.methods.method import Method, Option, Options


def overwrite(joined: AlignedEntries, options: Options) -> Sequence[Factor]:
    """The entry of the first or the last adapter that has it and whose weight is not 0."""
    return _of_winners(joined, options["priority"])


def _of_winners(joined: AlignedEntries, priority: str) -> list[Floats]:
    numbers = [number for number, part in enumerate(joined.parts) if part.weight]
    if priority == "first":
        numbers.reverse()
    winner = np.full(joined.size, -1)
    for number in numbers:
        winner[joined.places[number]] = number
    return [
        (winner[at] == number) * part.weight
        for number, (part, at) in enumerate(zip(joined.parts, joined.places, strict=True))
    ]


def refuse(joined: AlignedEntries, _: Options) -> Sequence[Factor]:
    """All entries, if no two adapters set one to different values.

    Raises:
        SourceError: two do.
    """
    factors = _of_winners(joined, "last")
    for number, (part, at) in enumerate(zip(joined.parts, joined.places, strict=True)):
        if not part.weight or not at.size:
            continue
        for other in range(number):
            if not joined.parts[other].weight:
                continue
            __, mine, its = np.intersect1d(at, joined.places[other], assume_unique=True, return_indices=True)
            tensor, before = part.tensor, joined.parts[other].tensor
            same = (tensor.value_kind, tensor.values.dtype, part.weight) == (
                before.value_kind, before.values.dtype, joined.parts[other].weight,
            )  # fmt: skip
            bad: Array = bits_differ(tensor.values[mine], before.values[its]) if same else np.ones(mine.size, bool)
            if bad.any():
                index = int(tensor.indices[mine[bad]][0])
                raise SourceError(
                    f"tensor {joined.name!r}: {part.label} and {joined.parts[other].label} set {int(bad.sum())} entries to "
                    f"different values, the one at flat index {index} for example"
                )
    return factors


def disjoint(joined: AlignedEntries, _: Options) -> Sequence[Factor]:
    """The entries that one adapter alone has."""
    alone = sum_of_active(joined) == 1
    return [alone[at] * part.weight for part, at in zip(joined.parts, joined.places, strict=True)]


def intersect(joined: AlignedEntries, options: Options) -> Sequence[Factor]:
    """The entries that all adapters have, as the first or the last has them."""
    active = sum(1 for part in joined.parts if part.weight)
    every = sum_of_active(joined) == active
    return [
        own * every[at] for own, at in zip(_of_winners(joined, options["priority"]), joined.places, strict=True)
    ]


def sum_of_active(joined: AlignedEntries) -> Floats:
    """How many adapters of a weight that is not 0 have each entry."""
    return joined.sum([float(part.weight != 0) for part in joined.parts])


PRIORITY = Option("last", "which adapter wins where several have an entry", choices=("first", "last"))

METHODS = (
    Method("overwrite", overwrite, "one adapter over the other", {"priority": PRIORITY}, takes=True),
    Method("refuse", refuse, "all entries; an error if two adapters set one to different values", takes=True),
    Method("disjoint", disjoint, "only the entries that one adapter alone has", takes=True),
    Method("intersect", intersect, "only the entries that all adapters have", {"priority": PRIORITY}, takes=True),
)
