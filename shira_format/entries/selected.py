"""Some entries of a dense change of one weight, such as the largest ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format.entries.changes import Change, Tile

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
