"""Exact selection over all tensors, or by a share of the energy, in two passes.

The first pass counts magnitudes by their leading bits, which sort like the numbers themselves, and so finds the bin in
which the selection ends. The second collects the entries in that bin or above; the distinct magnitudes within the bin then
give the smallest selected magnitude, and how many of the entries that equal it are selected. Ties go to the lower index and
the earlier tensor. Memory: the counts, and the distinct magnitudes of one bin (for float32 at most 32768).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shira_format._core.arrays import Array
from shira_format._core.threads import Progress, Workers
from shira_format.entries.changes import TILE, Change, Entries, Tile
from shira_format.selection.topk import Pool, TopK, at_least, check_energy, completed, reaching, tiles

BINS = 1 << 16


@dataclass
class Survey:
    """Magnitudes by bin: their number, and, if a share of the energy is asked for, their sum of squares.

    Attributes:
        counts: int64 ``[BINS]``.
        energies: float64 ``[BINS]``, or None.
        energy: the sum of all squares.
    """

    counts: npt.NDArray[np.int64]
    energies: npt.NDArray[np.float64] | None
    energy: float = 0.0

    @classmethod
    def empty(cls, rule: TopK) -> Survey:
        """A survey of no entries."""
        return cls(np.zeros(BINS, np.int64), np.zeros(BINS) if rule.energy is not None else None)

    def add(self, other: Survey) -> None:
        """Add the counts of another."""
        self.counts += other.counts
        if self.energies is not None and other.energies is not None:
            self.energies += other.energies
        self.energy += other.energy


def survey(
    change: Change, rule: TopK, dtype: np.dtype[Any], floor: Any, workers: Workers, progress: Progress
) -> Survey:
    """The first pass over one change; magnitudes below ``floor`` cannot be selected, and are not counted.

    Raises:
        SourceError: the change holds NaN or Inf.
    """
    total, few = Survey.empty(rule), _Bins()

    def count(_start: int, tile: Tile, energy: float) -> tuple[Array, Array | None, float]:
        near = np.abs(tile.values[reaching(tile.values, floor)]).astype(dtype, copy=False)
        bins = _leading_bits(near)
        if rule.energy is not None:
            wide = near.astype(np.float64)
            return np.bincount(bins, minlength=BINS), np.bincount(bins, wide * wide, BINS), energy
        # Few numbers take less time to pass on than all bins take to add.
        return bins if bins.size < BINS // 8 else np.bincount(bins, minlength=BINS), None, energy

    for counts, weights, energy in tiles(workers, change, count, progress):
        total.energy += energy
        if weights is None and counts.size < BINS:
            few.add(counts)
        else:
            total.add(Survey(counts, weights))
    total.counts += few.counted()
    check_energy(change, total.energy)
    return total


class _Bins:
    """Bin numbers, counted in batches."""

    def __init__(self) -> None:
        self._counts = np.zeros(BINS, np.int64)
        self._waiting: list[Array] = []

    def add(self, bins: Array) -> None:
        self._waiting.append(bins)
        if len(self._waiting) == 64:
            self._counts = self.counted()

    def counted(self) -> Array:
        """The number of each."""
        waiting, self._waiting = self._waiting, []
        found: Array = self._counts
        if waiting:
            found = found + np.bincount(np.concatenate(waiting), minlength=BINS)
        self._counts = found
        return found


@dataclass(frozen=True)
class Reach:
    """What the second pass collects.

    Attributes:
        floor: the smallest magnitude that may be selected.
        sure: magnitudes from this on are all selected.
        most: how many of those between may be selected.
        expected: the number of both, in all changes.
    """

    floor: Any
    sure: Any
    most: int
    expected: int


class Edge:
    """The smallest selected magnitude, found in two steps: from a survey, and from the entries in its last bin."""

    def __init__(self, rule: TopK, seen: Survey, size: int, dtype: np.dtype[Any]) -> None:
        """Find the bin.

        Args:
            rule: what to keep.
            seen: the survey of everything; of a part, if the rule gives a count: then :attr:`floor` is a lower bound.
            size: elements in all.
            dtype: the dtype in which magnitudes are compared.
        """
        self._dtype = dtype
        self._by_energy = rule.energy is not None
        lowest = rule.lowest(dtype)
        falling: Array
        if rule.energy is not None:
            assert seen.energies is not None
            weights: Array = seen.energies
            wanted: float = rule.energy * seen.energy
            falling = np.cumsum(weights[::-1])
            # The total was summed in another precision, and may be larger than this sum.
            everything = rule.energy == 1.0 or falling[-1] <= wanted
        else:
            weights, wanted = seen.counts, rule.count(size)
            falling = np.cumsum(weights[::-1])
            everything = bool(falling[-1] <= wanted)
        self._bin: int | None = None
        self._above, self._within = int(seen.counts.sum()), 0
        self.floor = lowest
        if not everything:
            position = int(np.searchsorted(falling, wanted))
            self._bin = BINS - 1 - position
            self._above, self._within = int(seen.counts[self._bin + 1 :].sum()), int(seen.counts[self._bin])
            self._missing = wanted - (falling[position - 1] if position else 0)
            self.floor = max(lowest, _lower_edge(self._bin, dtype))
        # Within a bin magnitudes differ in their low bits: 15 in a float32, too many to count one by one in a float64.
        self._low = np.zeros(1 << _layout(dtype)[1], np.int64) if dtype.itemsize == 4 else None
        self._known = np.empty(0, dtype), np.empty(0, np.int64)

    @property
    def reach(self) -> Reach:
        """What the second pass collects."""
        if self._bin is None:
            return Reach(self.floor, self.floor, 0, self._above)
        most = self._missing
        if self._by_energy:
            most = most / max(float(self.floor) ** 2, np.finfo(np.float64).tiny) + 1
        most = int(min(np.ceil(most), self._within))
        sure = _lower_edge(self._bin + 1, self._dtype) if self._bin + 1 < BINS else self._dtype.type(np.inf)
        return Reach(self.floor, sure, most, self._above + most)

    def see(self, values: Array) -> None:
        """Count entries of the second pass, at or above :attr:`floor`."""
        if self._bin is None:
            return
        for start in range(0, values.size, TILE):
            near = np.abs(values[start : start + TILE]).astype(self._dtype, copy=False)
            near = near[_leading_bits(near) == self._bin]
            if self._low is not None:
                low = near.view(np.uint32) & np.uint32(self._low.size - 1)
                self._low += np.bincount(low, minlength=self._low.size)
            else:
                self._known = _merged(self._known, np.unique(near, return_counts=True))

    def _distinct(self) -> tuple[Array, Array]:
        """The magnitudes of the last bin in descending order, and the number of entries of each."""
        if self._low is None:
            return self._known[0][::-1], self._known[1][::-1]
        assert self._bin is not None
        low = np.flatnonzero(self._low)[::-1]
        pattern = (low + (self._bin << _layout(self._dtype)[1])).astype(np.uint32)
        return pattern.view(self._dtype), self._low[low]

    def decide(self) -> tuple[Any, int]:
        """The smallest selected magnitude, and how many entries that equal it are selected.

        To be called when :meth:`see` has had all entries at or above :attr:`floor`.
        """
        if self._bin is None:
            return self.floor, np.iinfo(np.int64).max
        magnitudes, counts = self._distinct()
        if magnitudes.size == 0:
            return self.floor, np.iinfo(np.int64).max
        each = magnitudes.astype(np.float64) ** 2 if self._by_energy else np.ones(magnitudes.size)
        falling = np.cumsum(counts * each)
        position = min(int(np.searchsorted(falling, self._missing)), magnitudes.size - 1)
        before = falling[position - 1] if position else 0.0
        ties = int(np.ceil((self._missing - before) / each[position])) if each[position] else int(counts[position])
        return magnitudes[position], min(max(ties, 1), int(counts[position]))


def above(change: Change, reach: Reach, workers: Workers, progress: Progress) -> Pool:
    """The second pass over one change: all entries that may be selected."""
    pool = Pool(change, reach.most, reach.floor, reach.sure, min(reach.expected, change.size))

    def work(start: int, tile: Tile, _energy: float) -> Entries:
        return Entries.of_tile(change, start, tile, reaching(tile.values, pool.floor))

    for entries in tiles(workers, change, work, progress):
        pool.add(entries)
    return pool


def cut(entries: Entries, edge: Any, ties: int, energy: float) -> tuple[Entries, int]:
    """The selected entries of a change, and the number of ties that are left for later tensors."""
    magnitudes = np.abs(entries.values)
    kept = entries.kept(at_least(magnitudes, edge, ties))
    equal = int(np.count_nonzero(magnitudes == edge))
    return Entries(kept.indices, kept.values, kept.base, kept.target, energy), max(0, ties - equal)


def by_energy(
    change: Change, rule: TopK, workers: Workers, progress: Progress
) -> tuple[int, Callable[[], Entries]]:
    """The fewest entries of one change that hold the share of its energy that ``rule`` asks for.

    Returns:
        The number of candidates in memory, and what finishes the result, on one thread, while the next change is read.
    """
    lowest = rule.lowest(change.dtype)
    seen = survey(change, rule, change.dtype, lowest, workers, progress)
    edge = Edge(rule, seen, change.size, change.dtype)
    pool = above(change, edge.reach, workers, progress)

    def rest() -> Entries:
        entries = pool.all()  # selected once, as these may be many
        edge.see(entries.values)
        found = completed(change, cut(entries, *edge.decide(), seen.energy)[0])
        pool.close()
        return found

    return pool.size, rest


def common_dtype(changes: Sequence[Change]) -> np.dtype[Any]:
    """The dtype in which magnitudes of all changes compare exactly."""
    return np.result_type(*(change.dtype for change in changes)) if changes else np.dtype(np.float32)


def _leading_bits(magnitudes: Array) -> npt.NDArray[np.int64]:
    """The 16 bits after the sign, as bin numbers that increase with the magnitude."""
    unsigned, shift = _layout(magnitudes.dtype)
    return np.asarray(np.right_shift(magnitudes.view(unsigned), shift), np.int64)


def _lower_edge(bin_number: int, dtype: np.dtype[Any]) -> Any:
    """The smallest magnitude of a bin."""
    unsigned, shift = _layout(dtype)
    return np.array(bin_number << shift, unsigned).view(dtype)[()]


def _layout(dtype: np.dtype[Any]) -> tuple[np.dtype[Any], int]:
    """An unsigned dtype of the same size, and the number of bits below the leading 16 after the sign."""
    return np.dtype(f"u{dtype.itemsize}"), 8 * dtype.itemsize - 17


def _merged(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    values, where = np.unique(np.concatenate([a[0], b[0]]), return_inverse=True)
    counts = np.zeros(values.size, np.int64)
    np.add.at(counts, where, np.concatenate([a[1], b[1]]))
    return values, counts
