"""The k entries of largest magnitude of one change, in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from shira_format.arrays import Array, positions
from shira_format.changes import TILE, Change, Ends, Entries
from shira_format.errors import SourceError
from shira_format.selection.rule import TopK
from shira_format.selection.workers import Progress, Workers

_SAMPLES = 8  # pieces of a change that are looked at first
_SAMPLE = 1 << 14  # elements a piece


def sum_of_squares(values: Array) -> float:
    """In the values' own type, unless it leaves that type's normal range."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        energy = float(np.dot(values, values))
    if not 1e-30 < energy < 1e30:  # squares may have vanished, or overflowed; or there is a NaN, which stays
        wide = values.astype(np.float64)
        energy = float(np.dot(wide, wide))
    return energy


def completed(change: Change, entries: Entries, workers: Workers) -> Entries:
    """With the base's and the new values, which the tiles of some changes do not give."""
    if entries.complete:
        return entries
    step = max(1 << 14, -(-entries.size // workers.threads))
    parts = list(
        workers.ranges(
            entries.size, step, lambda a, b: change.completed(entries.indices[a:b], entries.values[a:b])
        )
    )
    base, target = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
    return Entries(entries.indices, entries.values, base, target, entries.energy)


def check_energy(change: Change, energy: float) -> None:
    """Raise SourceError for a change that is not finite."""
    if not np.isfinite(energy):
        raise SourceError(f"the update of tensor {change.name!r} holds NaN or Inf, or overflows")


def largest(change: Change, rule: TopK, workers: Workers, progress: Progress) -> Entries:
    """The entries that ``rule`` keeps of this change alone; the rule gives a count, not a share of the energy.

    A sample gives a magnitude that somewhat more than k entries reach; one pass collects these, and the k-th largest
    among them decides. If the sample misled (too few reach it), the pass is made again without it.
    """
    k, lowest = rule.count(change.size), rule.lowest(change.dtype)
    floor = max(lowest, _sampled_floor(change, k))
    while True:
        pool = Pool(change, k, floor)

        def work(
            start: int, values: Array, magnitudes: Array, ends: Ends | None, pool: Pool = pool
        ) -> tuple[Entries, float]:
            found = positions(magnitudes >= pool.floor)
            return Entries.of_tile(change, start, found, values, ends), sum_of_squares(values)

        energy = 0.0
        for entries, part in workers.tiles(change, work, progress):
            energy += part
            pool.add(entries)
        check_energy(change, energy)
        if pool.size >= k or floor <= lowest:
            found = pool.result()
            if k == change.size and rule.min_change == 0:
                # Nothing is left out, and sums in two precisions must not say otherwise.
                energy = sum_of_squares(found.values.astype(np.float64))
            return Entries(found.indices, found.values, found.base, found.target, energy)
        floor = lowest


def _sampled_floor(change: Change, k: int) -> Any:
    zero = change.dtype.type(0)
    if change.size <= _SAMPLES * _SAMPLE:
        return zero
    length = max(1, _SAMPLE // change.grain) * change.grain
    pieces = []
    for start in np.linspace(0, max(0, change.size - length), _SAMPLES, dtype=np.int64):
        first = int(start) // change.grain * change.grain
        piece = np.empty(min(length, change.size - first), change.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            change.tile(first, first + piece.size, piece)
        pieces.append(np.abs(piece))
    sample = np.concatenate(pieces)
    share = 1.3 * k / change.size
    reach = int(share * sample.size + 4 * np.sqrt(share * sample.size)) + 1
    if reach >= sample.size or not np.isfinite(sample).all():
        return zero
    return np.partition(sample, sample.size - reach)[sample.size - reach]


class Pool:
    """Candidates in index order; memory stays in proportion to what is kept, however many entries tie.

    All of magnitude ``free`` or more are kept, and of the others the ``k`` largest, lower indices first among equals.
    """

    def __init__(self, change: Change, k: int, floor: Any, free: Any = np.inf) -> None:
        self.floor = floor
        self.size = 0
        self._change, self._k, self._free = change, k, free
        self._parts: list[Entries] = []
        self._limit = 4 * k + TILE

    def add(self, entries: Entries) -> None:
        """Add the candidates of the next tile; some may be below a floor that has risen since they were found."""
        self._parts.append(entries)
        self.size += entries.size
        if self.size > self._limit:
            self._parts = [self.result()]
            self.size = self._parts[0].size
            self._limit = max(self._limit, 2 * self.size)
            magnitudes = np.abs(self._parts[0].values)
            rest = magnitudes[magnitudes < self._free]
            if rest.size == self._k:
                # Later entries that only tie with the k-th lose to it by index.
                self.floor = np.nextafter(rest.min(initial=self._free), self._change.dtype.type(np.inf))

    def result(self) -> Entries:
        """What is kept of all that came."""
        entries = Entries.joined(self._parts, self._change)
        magnitudes = np.abs(entries.values)
        rest = np.flatnonzero(magnitudes < self._free)
        if rest.size <= self._k:
            return entries
        keep = magnitudes >= self._free
        if self._k:
            among = magnitudes[rest]
            edge = np.partition(among, rest.size - self._k)[rest.size - self._k]
            keep[rest] = at_least(among, edge, self._k - int(np.count_nonzero(among > edge)))
        return entries.kept(keep)


def at_least(magnitudes: Array, edge: Any, ties: int) -> Array:
    """A mask of those above ``edge``, and of the first ``ties`` of those that equal it."""
    keep: Array = magnitudes > edge
    keep[np.flatnonzero(magnitudes == edge)[:ties]] = True
    return keep
