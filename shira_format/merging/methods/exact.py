"""Methods that copy entries: every entry of the result is bit for bit that of one adapter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shira_format._core.arrays import Array, bits_differ
from shira_format.entries.aligned import AlignedEntries, Factor, Floats
from shira_format.errors import SourceError
from shira_format.merging.methods.method import Method, Option, Options


def overwrite(aligned: AlignedEntries, options: Options) -> Sequence[Factor]:
    """The entry of the first or the last adapter that has it and a weight other than 0."""
    return _of_winners(aligned, options["priority"])


def _of_winners(aligned: AlignedEntries, priority: str) -> list[Floats]:
    numbers = [number for number, part in enumerate(aligned.parts) if part.weight]
    if priority == "first":
        numbers.reverse()
    winner = np.full(aligned.size, -1)
    for number in numbers:
        winner[aligned.places[number]] = number
    return [
        (winner[at] == number) * part.weight
        for number, (part, at) in enumerate(zip(aligned.parts, aligned.places, strict=True))
    ]


def refuse(aligned: AlignedEntries, _: Options) -> Sequence[Factor]:
    """All entries; an error if two adapters set one to different values.

    Raises:
        SourceError: two do.
    """
    factors = _of_winners(aligned, "last")
    for number, (part, at) in enumerate(zip(aligned.parts, aligned.places, strict=True)):
        if not part.weight or not at.size:
            continue
        for other in range(number):
            if not aligned.parts[other].weight:
                continue
            __, mine, its = np.intersect1d(at, aligned.places[other], assume_unique=True, return_indices=True)
            tensor, before = part.tensor, aligned.parts[other].tensor
            same = (tensor.value_kind, tensor.values.dtype, part.weight) == (
                before.value_kind, before.values.dtype, aligned.parts[other].weight,
            )  # fmt: skip
            bad: Array = bits_differ(tensor.values[mine], before.values[its]) if same else np.ones(mine.size, bool)
            if bad.any():
                index = int(tensor.indices[mine[bad]][0])
                raise SourceError(
                    f"tensor {aligned.name!r}: {part.label} and {aligned.parts[other].label} set {int(bad.sum())} entries to "
                    f"different values, for example at flat index {index}"
                )
    return factors


def disjoint(aligned: AlignedEntries, _: Options) -> Sequence[Factor]:
    """The entries of exactly one adapter."""
    alone = sum_of_active(aligned) == 1
    return [alone[at] * part.weight for part, at in zip(aligned.parts, aligned.places, strict=True)]


def intersect(aligned: AlignedEntries, options: Options) -> Sequence[Factor]:
    """The entries that all adapters have, with the values of the first or the last."""
    active = sum(1 for part in aligned.parts if part.weight)
    every = sum_of_active(aligned) == active
    return [
        own * every[at] for own, at in zip(_of_winners(aligned, options["priority"]), aligned.places, strict=True)
    ]


def sum_of_active(aligned: AlignedEntries) -> Floats:
    """The number of adapters with a weight other than 0 that have each entry."""
    return aligned.sum([float(part.weight != 0) for part in aligned.parts])


PRIORITY = Option("last", "which adapter wins where several have an entry", choices=("first", "last"))

METHODS = (
    Method(
        "overwrite",
        overwrite,
        "the entry of the last adapter that has it (or of the first)",
        {"priority": PRIORITY},
        copies=True,
    ),
    Method("refuse", refuse, "all entries; an error if two adapters set one to different values", copies=True),
    Method("disjoint", disjoint, "only the entries of exactly one adapter", copies=True),
    Method("intersect", intersect, "only the entries that all adapters have", {"priority": PRIORITY}, copies=True),
)
