"""The update of a weight from updates of modules that are some of its rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.lora.base import Update
from shira_format.lora.products import LowRank, Stacked
from shira_format.names.row_blocks import RowBlock


@dataclass(frozen=True)
class RowRange:
    """Rows of ``update`` from ``first`` on, as the update of another weight or of a part of it; ``dtype`` may be wider."""

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


def stack_rows(name: str, shape: tuple[int, ...], parts: Iterable[tuple[RowBlock, Update]], where: str) -> Update:
    """The update of a whole weight from those of modules that are rows of it; all other rows stay unchanged.

    Args:
        name: the weight.
        shape: its shape.
        parts: blocks of the weight, each with the update of the whole module whose rows it has.
        where: the file, for messages.

    Raises:
        SourceError: two blocks overlap.
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

    for block, update in ordered:
        if block.start < end:
            raise SourceError(f"{where}: two modules adapt the same rows of the base's {name!r}")
        fill(block.start)
        for start, stop in block.rows:
            stack.append(RowRange(update, name, (stop - start, *shape[1:]), start, dtype))
            heights.append(stop - start)
        end = block.start + block.height
    fill(math.prod(shape) // columns)  # of a 3-D tensor of experts more rows than its first dimension
    return Stacked(name, shape, stack, heights)
