"""Updates of tensors that a base has in other tensors: moved there, row by row."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from shira_format.errors import SourceError
from shira_format.lora.base import Update
from shira_format.lora.products import LowRank, Stacked
from shira_format.lora.row_stack import RowRange, stack_rows
from shira_format.names.located import LocatedCheckpoint
from shira_format.names.row_blocks import RowBlock


def placed(updates: Iterable[Update], located: LocatedCheckpoint, where: object) -> list[Update]:
    """The updates as those of the base's own tensors.

    Args:
        updates: of tensors of ``located``.
        located: the base and where its other names are.
        where: the file, for messages.

    Raises:
        SourceError: two updates are of the same rows.
    """
    parts: dict[str, list[tuple[RowBlock, Update]]] = {}
    whole: dict[str, list[Update]] = {}
    for update in updates:
        location = located.locations.get(update.name)
        if location is None:
            whole.setdefault(update.name, []).append(update)
            parts.setdefault(update.name, [])
        else:
            for block in location.blocks:
                parts.setdefault(block.name, []).append((block, update))
    found: list[Update] = []
    for name, blocks in parts.items():
        if whole.get(name) and blocks:
            raise SourceError(f"{where}: adapts {name!r} and, under the name {blocks[0][1].name!r}, rows of it")
        found += whole.get(name, [])
        if blocks:
            found.append(_assembled(name, located.shape(name), blocks, where))
    return found


def _assembled(name: str, shape: tuple[int, ...], parts: list[tuple[RowBlock, Update]], where: object) -> Update:
    (block, update), *others = parts
    if (
        not others
        and block.start == 0
        and len(block.rows) == 1
        and block.height * update.columns == np.prod(shape)
    ):
        return rows_of(update, *block.rows[0], name, shape)
    return stack_rows(name, shape, parts, str(where))


def rows_of(update: Update, start: int, stop: int, name: str, shape: tuple[int, ...]) -> Update:
    """Rows ``start`` to ``stop`` of an update as the update of a weight; of a product, a product again."""
    if isinstance(update, LowRank):
        return LowRank(name, shape, np.ascontiguousarray(update.up[start:stop]), update.down)
    if isinstance(update, Stacked):
        end = 0
        for part, height in zip(update.parts, update.heights, strict=True):
            first, end = end, end + height
            if first <= start and stop <= end:
                return rows_of(part, start - first, stop - first, name, shape)
    return RowRange(update, name, shape, start, update.dtype)
