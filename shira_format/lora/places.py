"""Where the rows of an adapted module are in the base, which may hold it in parts, or as a part of a larger weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.products import LowRank, Stacked
from shira_format.lora.update import Update


@dataclass(frozen=True)
class RowBlock:
    """Rows of one of the base's weights.

    Attributes:
        name: the weight.
        start: the first row.
        rows: the ranges ``(start, stop)`` of the adapted module's rows that are here, in this order.
    """

    name: str
    start: int
    rows: tuple[tuple[int, int], ...]

    @property
    def height(self) -> int:
        return sum(stop - start for start, stop in self.rows)

    @property
    def bias(self) -> str:
        """The name of the bias that belongs to the weight."""
        return f"{self.name.removesuffix('weight')}bias"

    def of(self, array: Array) -> Array:
        """The part of ``array``, ``[rows of the adapted module, ...]``, that is here; a view if it is one range."""
        parts = [array[start:stop] for start, stop in self.rows]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def whole(name: str, base: Checkpoint) -> RowBlock:
    """All of a weight."""
    return RowBlock(name, 0, ((0, base.shape(name)[0]),))


@dataclass(frozen=True)
class Rows:
    """Rows of an update from ``first`` on, as an update of another weight or of a part of it; in a wider dtype maybe."""

    update: Update
    name: str
    shape: tuple[int, ...]
    first: int
    dtype: np.dtype[Any]

    @property
    def columns(self) -> int:
        return self.update.columns

    def tile(self, start: int, stop: int, out: Array) -> None:
        self.update.tile(self.first + start, self.first + stop, out)


def joined(name: str, shape: tuple[int, ...], parts: Iterable[tuple[RowBlock, Update]], where: str) -> Update:
    """The update of a whole weight from those of modules that are rows of it; the other rows do not change.

    Args:
        name: the weight.
        shape: its shape.
        parts: where in the weight, and the update of the whole adapted module of which rows are there.
        where: the file, for messages.

    Raises:
        SourceError: two modules are the same rows.
    """
    ordered = sorted(parts, key=lambda part: part[0].start)
    columns, dtype = ordered[0][1].columns, np.result_type(*(update.dtype for _, update in ordered))
    stack: list[Update] = []
    heights: list[int] = []
    end = 0

    def fill(until: int) -> None:
        if until > end:
            rows, nothing = until - end, np.zeros((0, columns), dtype)
            stack.append(LowRank(name, (rows, *shape[1:]), np.zeros((rows, 0), dtype), nothing))
            heights.append(rows)

    for place, update in ordered:
        if place.start < end:
            raise SourceError(f"{where}: two modules adapt the same rows of the base's {name!r}")
        fill(place.start)
        for start, stop in place.rows:
            stack.append(Rows(update, name, (stop - start, *shape[1:]), start, dtype))
            heights.append(stop - start)
        end = place.start + place.height
    fill(shape[0])
    return Stacked(name, shape, stack, heights)


def is_plain(places: Sequence[RowBlock], base: Checkpoint) -> bool:
    """Whether the module is one weight of the base, as it is."""
    return len(places) == 1 and places[0] == whole(places[0].name, base)
