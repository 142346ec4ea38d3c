"""The update of a weight from updates of some of its rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.lora.base import Update
from shira_format.lora.products import LowRank, Stacked
from shira_format.names.row_blocks import RowRanges
from shira_format.tensors import numel


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


def take_update_rows(update: Update, name: str, ranges: RowRanges, dtype: np.dtype[Any] | None = None) -> Update:
    """The rows ``(start, stop)`` of ``update``, range after range, as the update ``[rows, columns]`` of a part of ``name``."""
    dtype = update.dtype if dtype is None else dtype
    parts = [RowRange(update, name, (stop - start, update.columns), start, dtype) for start, stop in ranges]
    if len(parts) == 1:
        return parts[0]
    heights = [part.shape[0] for part in parts]
    return Stacked(name, (sum(heights), update.columns), parts, heights)


@dataclass(frozen=True)
class Piece:
    """The update of consecutive rows of a weight.

    Attributes:
        start: the first row.
        update: of a part with as many rows as it has.
        owner: the module that it is from, for messages.
    """

    start: int
    update: Update
    owner: str

    @property
    def height(self) -> int:
        return numel(self.update.shape) // self.update.columns


def stack_rows(name: str, shape: tuple[int, ...], pieces: Iterable[Piece], where: object) -> Update:
    """The update of a whole weight; all rows without a piece stay unchanged.

    Args:
        name: the weight.
        shape: its shape; its rows are those of the matrix view with as many columns as the pieces have.
        pieces: of disjoint rows.
        where: the file, for messages.

    Raises:
        SourceError: two pieces overlap, or do not fit the weight.
    """
    ordered = sorted(pieces, key=lambda piece: piece.start)
    columns, dtype = ordered[0].update.columns, np.result_type(*(piece.update.dtype for piece in ordered))
    rows, left = divmod(numel(shape), columns)
    stack: list[Update] = []
    heights: list[int] = []
    end, before = 0, ""

    def fill(until: int) -> None:
        if until > end:
            nothing = np.zeros((0, columns), dtype)
            stack.append(LowRank(name, (until - end, columns), np.zeros((until - end, 0), dtype), nothing))
            heights.append(until - end)

    for piece in ordered:
        if left or piece.update.columns != columns or piece.start + piece.height > rows:
            raise SourceError(f"{where}: {piece.owner!r} does not fit the base's {name!r} of shape {list(shape)}")
        if piece.start < end:
            raise SourceError(
                f"{where}: {before!r} and {piece.owner!r} both adapt the same rows of the base's {name!r}"
            )
        fill(piece.start)
        stack.append(take_update_rows(piece.update, name, ((0, piece.height),), dtype))
        heights.append(piece.height)
        end, before = piece.start + piece.height, piece.owner
    fill(rows)
    return Stacked(name, shape, stack, heights)
