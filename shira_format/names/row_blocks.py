"""Rows of weights: where a module's rows are in a base that holds the module in parts, or within a larger weight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint

RowRanges = tuple[tuple[int, int], ...]


def take_rows(array: Array, ranges: RowRanges) -> Array:
    """The rows ``(start, stop)`` of ``array``, ``[rows, ...]``, range after range; a view if there is one range."""
    parts = [array[start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


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
    rows: RowRanges

    @property
    def height(self) -> int:
        """Number of rows."""
        return sum(stop - start for start, stop in self.rows)

    @property
    def bias(self) -> str:
        """The name of the bias that belongs to the weight."""
        return f"{self.name.removesuffix('weight')}bias"

    def take(self, array: Array) -> Array:
        """The part of ``array``, ``[rows of the adapted module, ...]``, that is here."""
        return take_rows(array, self.rows)


@dataclass(frozen=True)
class Location:
    """Where a tensor of another name space is in a checkpoint.

    Attributes:
        shape: of the tensor.
        blocks: its rows in the checkpoint's tensors, top to bottom. A row is one of the matrix view ``[rows, columns]`` whose
            columns are the last dimension of a 3-D tensor of experts, and all dimensions but the first of any other.
    """

    shape: tuple[int, ...]
    blocks: tuple[RowBlock, ...]


def whole_weight(name: str, base: Checkpoint) -> RowBlock:
    """All rows of a weight."""
    return RowBlock(name, 0, ((0, base.shape(name)[0]),))


def is_one_weight(blocks: Sequence[RowBlock], base: Checkpoint) -> bool:
    """Whether the blocks are exactly one weight of the base."""
    return len(blocks) == 1 and blocks[0] == whole_weight(blocks[0].name, base)


@dataclass(frozen=True)
class FusedPart:
    """A module of diffusers that is rows of a module of the model's authors.

    Attributes:
        module: its name in diffusers' transformer.
        rows: the ranges ``(start, stop)`` of the authors' rows, in diffusers' order.
    """

    module: str
    rows: RowRanges

    def take(self, array: Array) -> Array:
        """These rows of ``array``, ``[rows of the authors' module, ...]``."""
        return take_rows(array, self.rows)


# The prefix of the authors' modules, that of diffusers' ones, and which of these are rows of which of those.
FusedTable = tuple[str, str, Mapping[str, tuple[str, ...]]]


def fused_parts(
    tables: Iterable[FusedTable],
    modules: Collection[str],
    height: Callable[[str], int],
    is_swapped: Callable[[str, int], bool],
) -> dict[str, tuple[FusedPart, ...]]:
    """The authors' modules whose parts are all among ``modules``, each as its parts, top to bottom.

    Args:
        tables: names of modules.
        modules: diffusers' modules that have weights.
        height: the number of rows of a tensor of diffusers' transformer.
        is_swapped: whether the halves of a part, given its module and number of rows, change places: the authors' last
            layers compute shift, then scale; diffusers' scale, then shift.
    """
    found: dict[str, tuple[FusedPart, ...]] = {}
    for theirs, ours, table in tables:
        for module, inner in table.items():
            parts, start = [], 0
            for part in (ours + name for name in inner):
                if part not in modules:
                    break
                stop = start + height(f"{part}.weight")
                middle = (start + stop) // 2
                rows = ((middle, stop), (start, middle)) if is_swapped(part, stop - start) else ((start, stop),)
                parts.append(FusedPart(part, rows))
                start = stop
            else:
                found[theirs + module] = tuple(parts)
    return found
