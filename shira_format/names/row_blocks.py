"""Rows of weights: where a module's rows are in a base that holds the module in parts, or within a larger weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shira_format._core.arrays import Array

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
