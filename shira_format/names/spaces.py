"""The names that one model's tensors have in other programs, and where each of these tensors is in a checkpoint at hand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from shira_format.names.models.experts import experts
from shira_format.names.row_blocks import Location

# Given the names of a checkpoint's tensors and their shapes: tensors of other name spaces by name.
Table = Callable[[Collection[str], Callable[[str], tuple[int, ...]]], Mapping[str, Location]]

# A known model is one module in :mod:`shira_format.names.models` and one entry here.
TABLES: tuple[Table, ...] = (experts,)


def other_names(names: Collection[str], shape: Callable[[str], tuple[int, ...]]) -> dict[str, Location]:
    """The tensors (weights and biases) that other programs have for the model in a checkpoint, by their names there.

    Args:
        names: the checkpoint's tensors, without a component's prefix.
        shape: of one of them.
    """
    found: dict[str, Location] = {}
    for table in TABLES:
        for name, location in table(names, shape).items():
            if name not in names:
                found.setdefault(name, location)
    return found
