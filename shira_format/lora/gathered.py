"""A module's weight put together from the base's rows, for adapters whose change depends on the weight.

A base may hold a module in parts (q, k and v apart), or as rows of a larger weight. What such an adapter does to the module is
computed on the rows that it means; :func:`~shira_format.lora.row_stack.stack_rows` brings the result back to the base's weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.names.row_blocks import RowBlock
from shira_format.tensors import numel


class GatheredRows(Checkpoint):
    """One tensor, ``name``, whose rows are those of ``blocks`` in the order of the adapted module; read in pieces like any other."""

    def __init__(self, base: Checkpoint, name: str, blocks: Sequence[RowBlock], where: str) -> None:
        """Raises SourceError if the blocks are not all rows of one matrix; the message begins with ``where``."""
        self.base = base
        self.name = name
        self.path = base.path
        self.files = base.files
        kinds = {(base.shape(block.name)[1:], base.dtype(block.name)) for block in blocks}
        if len(kinds) != 1:
            raise SourceError(
                f"{where}: the base's {', '.join(repr(block.name) for block in blocks)} differ in columns or dtype, and are no parts of "
                "one weight"
            )
        ((rest, self._dtype),) = kinds
        # The module's rows from start to stop, the weight that has them, and the first one's row there.
        self._ranges: list[tuple[int, int, str, int]] = []
        for block in blocks:
            at = block.start
            for start, stop in block.rows:
                self._ranges.append((start, stop, block.name, at))
                at += stop - start
        self._ranges.sort()
        ends = [0, *(stop for _, stop, _, _ in self._ranges)]
        if [start for start, _, _, _ in self._ranges] != ends[:-1]:
            raise SourceError(f"{where}: the base does not have all rows of the module once")
        self._shape = (ends[-1], *rest)

    def __getitem__(self, name: str) -> Array:
        return self.part(name, 0, numel(self._shape)).reshape(self._shape)

    def __iter__(self) -> Iterator[str]:
        yield self.name

    def __len__(self) -> int:
        return 1

    def shape(self, name: str) -> tuple[int, ...]:
        self._check(name)
        return self._shape

    def dtype(self, name: str) -> np.dtype[Any]:
        self._check(name)
        return self._dtype

    def part(self, name: str, start: int, stop: int, out: Array | None = None) -> Array:
        self._check(name)
        columns = numel(self._shape[1:])
        found = np.empty(stop - start, self._dtype) if out is None else out[: stop - start]
        for first, last, weight, row in self._ranges:
            low, high = max(start, first * columns), min(stop, last * columns)
            if low < high:
                shift = (row - first) * columns
                found[low - start : high - start] = self.base.part(weight, low + shift, high + shift)
        return found

    def _check(self, name: str) -> None:
        if name != self.name:
            raise KeyError(name)
