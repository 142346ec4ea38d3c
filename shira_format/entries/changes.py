"""What a source says of one weight: a dense change of the base's values, seen tile by tile and never held whole.

Selection, the exact comparison and the pipeline work on :class:`Change`; whoever has an :class:`Update` (a LoRA) or
two checkpoints makes changes of them here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from shira_format._core.arrays import Array, Indices, bits_differ, scratch, where_true
from shira_format._core.dtypes import working_dtype
from shira_format._core.rounding import round_to, upcast
from shira_format.checkpoints import Checkpoint
from shira_format.lora.update import Update
from shira_format.tensors import numel

# A tile is looked at entry by entry if less than one in so many of its first elements has moved.
_FEW, _GLANCE = 8, 1 << 12
TILE = 1 << 19  # elements: many enough that Python's own work between them is little, few enough for many threads
_ROWS = (
    1 << 18
)  # elements of a tile of rows: 1 MB of float32, which stays in a second-level cache beside its factors

# Gives the base's and the new values at positions among a tile's values.
Ends = Callable[[Indices], tuple[Array, Array]]


@dataclass(frozen=True, slots=True)
class Tile:
    """A piece of a change. Its arrays belong to the thread that computed it, and are good until its next tile.

    Attributes:
        values: the change, of all elements or of those at ``where``.
        where: positions within the tile, rising, outside of which the change is zero; None: there are all.
        moved: makes the mask of values that have changed at all; None: a value says so itself. What is infinite or NaN
            in both checkpoints has not changed, though its difference is no number.
        ends: gives the base's and the new values; None: to look at the base for each candidate would be waste, and
            :meth:`Change.completed` does so for those that are selected.
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
        size: how many elements, from flat index 0 on, there are to look at.
        grain: elements that come together, such as a row; tiles begin and end at multiples of it, or at ``size``.
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
        """The base's and the new values of entries whose tiles gave none; safe from several threads."""


def tile_size(change: Change) -> int:
    """Elements a tile of ``change``."""
    return TILE if change.grain == 1 else max(1, _ROWS // change.grain) * change.grain


COLUMNS = ("indices", "values", "base", "target")


@dataclass(frozen=True)
class Entries:
    """Some entries of one change, in index order.

    Attributes:
        indices: int64 ``[n]``, strictly increasing flat positions.
        values: ``[n]`` the change at these, in the change's dtype.
        base: ``[n]`` the base's values, in the weight's dtype; empty as long as they are not :attr:`complete`.
        target: ``[n]`` what they become, in the weight's dtype; likewise.
        energy: sum of squares of the whole change.
    """

    indices: Indices
    values: Array
    base: Array
    target: Array
    energy: float = 0.0

    @property
    def size(self) -> int:
        """How many."""
        return int(self.indices.size)

    @property
    def complete(self) -> bool:
        """Whether the base's and the new values are there."""
        return self.base.size == self.indices.size

    @classmethod
    def of_tile(cls, change: Change, start: int, tile: Tile, found: Indices) -> Entries:
        """Entries at positions ``found`` among the values of the tile of ``change`` that begins at ``start``."""
        nothing = np.empty(0, change.weight_dtype)
        base, target = tile.ends(found) if tile.ends is not None else (nothing, nothing)
        indices = found if tile.where is None else tile.where[found]
        return cls(indices + start, tile.values[found], base, target)

    def kept(self, which: Array | slice) -> Entries:
        """Those chosen by a mask, by positions or by a slice."""
        if isinstance(which, np.ndarray) and which.dtype == np.bool_ and np.count_nonzero(which) * 2 < which.size:
            which = np.flatnonzero(which)  # faster if few are taken; if many are, a mask needs less memory
        both = (self.base[which], self.target[which]) if self.complete else (self.base, self.target)
        return Entries(self.indices[which], self.values[which], *both, self.energy)

    def copied(self) -> Entries:
        """The same, in memory of its own."""
        return Entries(self.indices.copy(), self.values.copy(), self.base.copy(), self.target.copy(), self.energy)

    @classmethod
    def joined(cls, parts: list[Entries], change: Change) -> Entries:
        """Parts that follow each other, as one; ``parts`` is emptied, so that memory holds them once."""
        lists = [[getattr(part, column) for part in parts] for column in COLUMNS]
        parts.clear()
        dtypes = (np.dtype(np.int64), change.dtype, change.weight_dtype, change.weight_dtype)
        indices, values, base, target = (np.concatenate([np.empty(0, dtype), *lists.pop(0)]) for dtype in dtypes)
        return cls(indices, values, base, target)


@dataclass(frozen=True)
class AddedTo:
    """An update, such as a LoRA's, that is added to a weight of ``base``; tiles are whole rows of the update."""

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
        with np.errstate(over="ignore"):  # found, and named, where the entries are finished
            return before, round_to(before.astype(work) + values.astype(work), before.dtype)


@dataclass(frozen=True)
class Difference:
    """What lies between a weight of ``base`` and one of ``tuned``: the change is ``tuned - base``, the target ``tuned``.

    ``size`` is below the number of elements if one of the two has more rows: then the common rows are compared.
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
            # After a step of training few entries have moved, and only these need any arithmetic.
            if np.count_nonzero(bits_differ(before[:_GLANCE], after[:_GLANCE])) * _FEW < min(_GLANCE, out.size):
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
