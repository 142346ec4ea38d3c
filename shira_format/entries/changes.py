"""Dense changes of one weight (an update such as a LoRA's, or the difference of two checkpoints), computed tile by tile.

Selection, the exact comparison and the conversion work on :class:`Change`; the whole change is never in memory. What is
selected of it are :class:`Entries`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from shira_format._core.arrays import Array, Indices, bits_differ, scratch, where_true
from shira_format._core.dtypes import round_to, upcast, working_dtype
from shira_format.checkpoints import Checkpoint
from shira_format.lora.base import Update
from shira_format.tensors import numel

# Only the entries that differ are computed if fewer than 1 in _SPARSE of a tile's first _SAMPLE elements differ.
_SPARSE, _SAMPLE = 8, 1 << 12
# Elements of a tile: enough to make Python's overhead small, few enough to keep all threads busy.
TILE = 1 << 19
# Elements of a tile of rows: 1 MB of float32, which fits a second-level cache together with its factors.
_ROWS = 1 << 18

# From positions among a tile's values to the base's and the new values there.
Ends = Callable[[Indices], tuple[Array, Array]]


@dataclass(frozen=True, slots=True)
class Tile:
    """A piece of a change. Its arrays belong to the thread that computed it, until that thread's next tile.

    Attributes:
        values: the change, at all elements or at ``where``.
        where: strictly increasing positions within the tile, outside of which the change is zero; None: all elements.
        moved: returns the mask of values that differ in the two checkpoints; None: those that are not zero. Equal bits
            of Inf or NaN do not differ, although their difference is NaN.
        ends: returns the base's and the new values at positions; None: :meth:`Change.completed` reads them, for the
            selected entries only.
    """

    values: Array
    where: Indices | None = None
    ends: Ends | None = None
    moved: Callable[[], Array] | None = None


class Change(Protocol):
    """A dense change of one weight.

    Attributes:
        name: the weight's name.
        shape: its shape in the base.
        weight_dtype: its dtype in the base.
        dtype: float32 or float64, in which the change is computed.
        size: number of elements, from flat index 0 on.
        grain: tiles start and end at multiples of this (the length of a row, for example), or at ``size``.
    """

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def weight_dtype(self) -> np.dtype[Any]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def size(self) -> int: ...
    @property
    def grain(self) -> int: ...

    def tile(self, start: int, stop: int, out: Array) -> Tile:
        """The change of these elements, computed in ``out``, ``[stop - start]`` in ``dtype``."""

    def completed(self, indices: Indices, values: Array) -> tuple[Array, Array]:
        """The base's and the new values of entries whose tiles have no ``ends``; thread-safe."""


def tile_size(change: Change) -> int:
    """The number of elements of each tile of ``change``."""
    return TILE if change.grain == 1 else max(1, _ROWS // change.grain) * change.grain


@dataclass(frozen=True)
class UpdateChange:
    """An update, such as a LoRA's, added to a weight of ``base``; tiles are whole rows of the update."""

    update: Update
    base: Checkpoint

    @property
    def name(self) -> str:
        return self.update.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.update.shape

    @property
    def weight_dtype(self) -> np.dtype[Any]:
        return self.base.dtype(self.name)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.update.dtype

    @property
    def size(self) -> int:
        return numel(self.shape)

    @property
    def grain(self) -> int:
        return self.update.columns

    def tile(self, start: int, stop: int, out: Array) -> Tile:
        columns = self.update.columns
        self.update.tile(start // columns, stop // columns, out.reshape(-1, columns))
        return Tile(out)

    def completed(self, indices: Indices, values: Array) -> tuple[Array, Array]:
        before = self.base.at(self.name, indices)
        work = np.result_type(working_dtype(before.dtype), values.dtype)
        with np.errstate(over="ignore"):  # reported when the entries are finished
            return before, round_to(before.astype(work) + values.astype(work), before.dtype)


@dataclass(frozen=True)
class CheckpointChange:
    """The difference of two checkpoints' weights: the change is ``tuned - base``, the target ``tuned``.

    If one of the two has more rows, ``size`` counts the elements of the rows of both.
    """

    name: str
    base: Checkpoint
    base_name: str
    tuned: Checkpoint
    tuned_name: str
    size: int
    grain: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape(self.base_name)

    @property
    def weight_dtype(self) -> np.dtype[Any]:
        return self.base.dtype(self.base_name)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.result_type(working_dtype(self.weight_dtype), working_dtype(self.tuned.dtype(self.tuned_name)))

    def both(self, start: int, stop: int) -> tuple[Array, Array]:
        """These elements of the base and of the tuned weight, each ``[stop - start]``, in buffers of this thread."""
        a, b = (
            checkpoint.part(name, start, stop, scratch(use, stop - start, checkpoint.dtype(name)))
            for use, checkpoint, name in (
                ("base", self.base, self.base_name),
                ("tuned", self.tuned, self.tuned_name),
            )
        )
        return a, b

    def tile(self, start: int, stop: int, out: Array) -> Tile:
        before, after = self.both(start, stop)
        where = moved = None
        if before.dtype == after.dtype:
            moved = partial(bits_differ, before, after)
            # After one training step few entries differ, and only these need arithmetic.
            if np.count_nonzero(bits_differ(before[:_SAMPLE], after[:_SAMPLE])) * _SPARSE < min(_SAMPLE, out.size):
                where = where_true(moved())
                before, after = before[where], after[where]
                out, moved = out[: where.size], None
        upcast(after, out)
        out -= upcast(before, scratch("wide", out.size, out.dtype))

        def ends(found: Indices) -> tuple[Array, Array]:
            with np.errstate(over="ignore"):
                return before[found], round_to(after[found], before.dtype)

        return Tile(out, where, ends, moved)

    def completed(self, indices: Indices, values: Array) -> tuple[Array, Array]:
        before = self.base.at(self.base_name, indices)
        with np.errstate(over="ignore"):
            return before, round_to(self.tuned.at(self.tuned_name, indices), before.dtype)


COLUMNS = ("indices", "values", "base", "target")


@dataclass(frozen=True)
class Entries:
    """Some entries of one change, in index order.

    Attributes:
        indices: int64 ``[n]``, strictly increasing flat positions.
        values: ``[n]`` the change at these, in the change's dtype.
        base: ``[n]`` the base's values, in the weight's dtype; empty unless :attr:`complete`.
        target: ``[n]`` the new values, in the weight's dtype; likewise.
        energy: energy (the sum of squares) of the whole change.
    """

    indices: Indices
    values: Array
    base: Array
    target: Array
    energy: float = 0.0

    @property
    def size(self) -> int:
        """The number of entries."""
        return int(self.indices.size)

    @property
    def complete(self) -> bool:
        """Whether :attr:`base` and :attr:`target` are known."""
        return self.base.size == self.indices.size

    @classmethod
    def of_tile(cls, change: Change, start: int, tile: Tile, found: Indices) -> Entries:
        """The entries at positions ``found`` among the values of a tile of ``change`` that starts at flat index ``start``."""
        nothing = np.empty(0, change.weight_dtype)
        base, target = tile.ends(found) if tile.ends is not None else (nothing, nothing)
        indices = found if tile.where is None else tile.where[found]
        return cls(indices + start, tile.values[found], base, target)

    def kept(self, which: Array | slice) -> Entries:
        """The entries chosen by a mask, positions or a slice."""
        if isinstance(which, np.ndarray) and which.dtype == np.bool_ and np.count_nonzero(which) * 2 < which.size:
            which = np.flatnonzero(which)  # faster for few entries; for many a mask takes less memory
        both = (self.base[which], self.target[which]) if self.complete else (self.base, self.target)
        return Entries(self.indices[which], self.values[which], *both, self.energy)

    def copied(self) -> Entries:
        """A copy."""
        return Entries(self.indices.copy(), self.values.copy(), self.base.copy(), self.target.copy(), self.energy)

    @classmethod
    def concatenated(cls, parts: list[Entries], change: Change) -> Entries:
        """Consecutive parts concatenated; ``parts`` is emptied, so that memory holds each entry once."""
        lists = [[getattr(part, column) for part in parts] for column in COLUMNS]
        parts.clear()
        dtypes = (np.dtype(np.int64), change.dtype, change.weight_dtype, change.weight_dtype)
        indices, values, base, target = (np.concatenate([np.empty(0, dtype), *lists.pop(0)]) for dtype in dtypes)
        return cls(indices, values, base, target)
