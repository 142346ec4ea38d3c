"""Updates that depend on the base's weight: linear maps of its rows or of its outputs, less the identity.

The base's weight is read in tiles. A map of inputs (columns) needs the rows of the tile alone; one of outputs mixes rows, but
only those of one block of a block-diagonal matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from shira_format._core.arrays import Array, scratch
from shira_format._core.dtypes import upcast, working_dtype
from shira_format.checkpoints import Checkpoint
from shira_format.tensors import numel

_TILE = 1 << 20  # elements of the base at a time


def read_rows(base: Checkpoint, name: str, columns: int, start: int, stop: int, dtype: np.dtype[Any]) -> Array:
    """Rows ``start`` to ``stop`` of a weight as ``[stop - start, columns]`` in ``dtype``, in a buffer of this thread."""
    size = (stop - start) * columns
    raw = scratch("rows of base", size, base.dtype(name))
    part = base.part(name, start * columns, start * columns + size, raw)
    return upcast(part, scratch("rows of base, wide", size, dtype)).reshape(stop - start, columns)


def joint_dtype(base: Checkpoint, name: str, factors: np.dtype[Any]) -> np.dtype[Any]:
    """float64 if the factors or the base's weight are, else float32."""
    return np.result_type(factors, working_dtype(base.dtype(name)))


@dataclass(frozen=True)
class RowChange:
    """An update whose rows are a function of the same rows of the base.

    Attributes:
        name, shape: of the weight.
        base: the checkpoint that has it.
        columns: row length of the matrix view.
        dtype: float32 or float64.
        change: from rows of the base in ``dtype``, which it may overwrite, the number of the first, and the output, which it
            fills with the change of these rows.
    """

    name: str
    shape: tuple[int, ...]
    base: Checkpoint
    columns: int
    dtype: np.dtype[Any]
    change: Callable[[Array, int, Array], None]

    def tile(self, start: int, stop: int, out: Array) -> None:
        self.change(read_rows(self.base, self.name, self.columns, start, stop, self.dtype), start, out)


class Blocks(Protocol):
    """The diagonal blocks of a square matrix, all of one size."""

    @property
    def size(self) -> int:
        """Rows of a block."""

    @property
    def count(self) -> int:
        """Number of blocks."""

    def rows(self, block: int, start: int, stop: int) -> Array:
        """Rows of one block, ``[stop - start, size]`` in float64; ``start`` and ``stop`` count from its first."""


@dataclass(frozen=True)
class StoredBlocks:
    """Blocks that are held in memory: ``values`` is ``[count, size, size]`` in float64."""

    values: Array

    @property
    def size(self) -> int:
        return int(self.values.shape[1])

    @property
    def count(self) -> int:
        return int(self.values.shape[0])

    def rows(self, block: int, start: int, stop: int) -> Array:
        return np.asarray(self.values[block, start:stop])


@dataclass(frozen=True)
class OutputMap:
    """``M @ W`` for a block-diagonal ``M`` over the weight's rows: ``R - I``, if ``R W`` is the new weight.

    Attributes:
        name, shape: of the weight.
        base: the checkpoint that has it.
        columns: row length of the matrix view.
        dtype: float32 or float64.
        blocks: of ``M``; ``size * count`` is the number of rows.
    """

    name: str
    shape: tuple[int, ...]
    base: Checkpoint
    columns: int
    dtype: np.dtype[Any]
    blocks: Blocks

    def tile(self, start: int, stop: int, out: Array) -> None:
        size = self.blocks.size
        at_once = max(1, _TILE // (size * max(size, self.columns)))
        first = start // size
        while first * size < stop:
            last = min(first + at_once, math.ceil(stop / size))
            low, high = max(start, first * size), min(stop, last * size)
            part = out[low - start : high - start]
            if last - first > 1 and isinstance(self.blocks, StoredBlocks):
                self._many(first, last, low, high, part)
            else:
                last = first + 1
                high = min(stop, last * size)
                self._one(first, low - first * size, high - first * size, out[low - start : high - start])
            first = last

    def _many(self, first: int, last: int, low: int, high: int, out: Array) -> None:
        """Rows ``low`` to ``high`` of several small blocks at once."""
        size = self.blocks.size
        assert isinstance(self.blocks, StoredBlocks)
        rows = read_rows(self.base, self.name, self.columns, first * size, last * size, self.dtype)
        made = self.blocks.values[first:last].astype(self.dtype) @ rows.reshape(last - first, size, self.columns)
        out[...] = made.reshape(-1, self.columns)[low - first * size : high - first * size]

    def _one(self, block: int, low: int, high: int, out: Array) -> None:
        """Rows ``low`` to ``high`` of one block, whose rows are read in pieces."""
        size, step = self.blocks.size, max(1, _TILE // self.columns)
        some = max(1, _TILE // size)
        for start in range(low, high, some):
            stop = min(start + some, high)
            factors = self.blocks.rows(block, start, stop).astype(self.dtype)
            part = out[start - low : stop - low]
            part[...] = 0
            for at in range(0, size, step):
                end = min(at + step, size)
                first = block * size
                rows = read_rows(self.base, self.name, self.columns, first + at, first + end, self.dtype)
                part += factors[:, at:end] @ rows


def output_map(
    name: str, shape: tuple[int, ...], base: Checkpoint, blocks: Blocks, factors: np.dtype[Any]
) -> OutputMap:
    """An :class:`OutputMap` of a weight ``[out, ...]``; ``factors`` is the dtype in which the adapter is computed."""
    return OutputMap(name, shape, base, numel(shape[1:]), joint_dtype(base, name, factors), blocks)


def input_map(
    name: str, shape: tuple[int, ...], base: Checkpoint, blocks: Array, factors: np.dtype[Any]
) -> RowChange:
    """``W @ M`` for a block-diagonal ``M`` over the columns of the matrix view; ``blocks`` is ``[count, size, size]``."""
    dtype = joint_dtype(base, name, factors)
    count, size, _ = blocks.shape
    matrices = np.ascontiguousarray(blocks.astype(dtype))

    def change(rows: Array, _: int, out: Array) -> None:
        split = rows.reshape(len(rows), count, size).transpose(1, 0, 2)
        np.matmul(split, matrices, out=out.reshape(len(rows), count, size).transpose(1, 0, 2))

    return RowChange(name, shape, base, count * size, dtype, change)
