"""How many of the largest entries to keep (:class:`TopK`), and the k largest of one change, in one pass over its tiles."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from shira_format._core.arrays import Array, Indices, scratch, sum_of_squares, where_true
from shira_format._core.threads import Progress, Workers
from shira_format.entries.changes import COLUMNS, TILE, Change, Entries, Tile, tile_size
from shira_format.errors import SourceError

AMOUNTS = ("density", "top_k", "energy")


@dataclass(frozen=True)
class TopK:
    """How many of the largest entries to keep, of each tensor or of all.

    Attributes:
        density: share of the elements, in (0, 1]; rounded to the nearest count, at least 1.
        top_k: instead, a count: for each tensor, or in total under the global scope.
        scope: ``"tensor"``: each tensor keeps its own largest entries; ``"global"``: the largest of all tensors.
        energy: instead, a share in (0, 1]: the fewest entries that hold this share of the energy (the sum of squares).
        min_change: changes of a smaller magnitude are never kept.
    """

    density: float | None = 0.01
    top_k: int | None = None
    scope: str = "tensor"
    energy: float | None = None
    min_change: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for invalid values."""
        if sum(getattr(self, amount) is not None for amount in AMOUNTS) != 1:
            raise ValueError("give one of density, top-k and energy")
        for share in ("density", "energy"):
            if (value := getattr(self, share)) is not None and not 0 < value <= 1:
                raise ValueError(f"{share} {value} is not in (0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k {self.top_k} is not a positive count")
        if self.scope not in ("tensor", "global"):
            raise ValueError(f"scope {self.scope!r} is neither 'tensor' nor 'global'")
        if not 0 <= self.min_change < float("inf"):
            raise ValueError(f"min-change {self.min_change} is not a magnitude")

    def count(self, elements: int) -> int:
        """The number of entries to keep at most, of ``elements``."""
        if self.top_k is not None:
            return min(self.top_k, elements)
        if self.density is None:
            return elements
        return min(max(1, int(self.density * elements + 0.5)), elements)

    def lowest(self, dtype: np.dtype[Any]) -> Any:
        """The smallest magnitude of ``dtype`` that may be kept; always above 0."""
        with np.errstate(over="ignore"):
            least = dtype.type(self.min_change)
        if float(least) < self.min_change:
            least = np.nextafter(least, dtype.type(np.inf))
        return max(least, np.finfo(dtype).smallest_subnormal)


Mask = npt.NDArray[np.bool_]


def largest(magnitudes: Array, k: int) -> Mask:
    """A mask of the ``k`` largest, ``[n]`` from ``[n]``; of equal ones the first."""
    if k <= 0 or k >= magnitudes.size:
        return np.full(magnitudes.size, k > 0)
    edge = np.partition(magnitudes, magnitudes.size - k)[magnitudes.size - k]
    return at_least(magnitudes, edge, k - int(np.count_nonzero(magnitudes > edge)))


def at_least(magnitudes: Array, edge: Any, ties: int) -> Mask:
    """A mask of those above ``edge``, and of the first ``ties`` of those that equal it."""
    keep: Mask = magnitudes > edge
    keep[np.flatnonzero(magnitudes == edge)[:ties]] = True
    return keep


_R = TypeVar("_R")


def tiles(
    workers: Workers,
    change: Change,
    work: Callable[[int, Tile, float], _R],
    progress: Progress = lambda _: None,
) -> Iterator[_R]:
    """``work(start, tile, energy)`` for each tile: its first flat index, the tile, and its sum of squares."""

    def one(start: int, stop: int) -> _R:
        with np.errstate(over="ignore", invalid="ignore"):  # the energy shows it, and the error names the tensor
            tile = change.tile(start, stop, scratch("values", stop - start, change.dtype))
            energy = sum_of_squares(tile.values)
            if tile.moved is not None and not np.isfinite(energy):
                tile.values[~tile.moved()] = 0
                energy = sum_of_squares(tile.values)
        return work(start, tile, energy)

    return workers.ranges(change.size, tile_size(change), one, progress)


_SAMPLES = 8  # pieces of a change that are sampled
_SAMPLE = 1 << 12  # elements of a piece


def reaching(values: Array, floor: Any) -> Indices:
    """Positions of magnitudes of at least ``floor``, strictly increasing."""
    mask = values >= floor
    mask |= values <= -floor
    return where_true(mask)


def completed(change: Change, entries: Entries) -> Entries:
    """``entries`` with the base's and the new values, which the tiles of some changes do not have."""
    if entries.complete:
        return entries
    base, target = change.completed(entries.indices, entries.values)
    return Entries(entries.indices, entries.values, base, target, entries.energy)


def check_energy(change: Change, energy: float) -> None:
    """Raise SourceError if the change is not finite."""
    if not np.isfinite(energy):
        raise SourceError(f"the update of tensor {change.name!r} holds NaN or Inf, or overflows")


def largest_entries(
    change: Change, rule: TopK, workers: Workers, progress: Progress
) -> tuple[int, Callable[[], Entries]]:
    """The entries of one change that ``rule`` keeps; it gives a count, not a share of the energy.

    A sample gives a magnitude that somewhat more than k entries reach; one pass collects these, and the k largest of them are
    kept. If too few reach it, the pass is repeated without a sample.

    Returns:
        The number of candidates in memory, and what finishes the result, on one thread, while the next change is read.
    """
    k, lowest = rule.count(change.size), rule.lowest(change.dtype)
    floor = max(lowest, _sampled_floor(change, k))
    while True:
        pool = Pool(change, k, floor)

        def work(start: int, tile: Tile, energy: float, pool: Pool = pool) -> tuple[Entries, float]:
            return Entries.of_tile(change, start, tile, reaching(tile.values, pool.floor)), energy

        energy = 0.0
        for entries, part in tiles(workers, change, work, progress):
            energy += part
            pool.add(entries)
        check_energy(change, energy)
        if pool.size >= k or floor <= lowest:
            break
        floor = lowest

    def rest() -> Entries:
        found = completed(change, pool.result())
        pool.close()
        # If all are kept, the energy must not differ by rounding from the sum over the entries.
        whole = k == change.size and rule.min_change == 0
        own = sum_of_squares(found.values.astype(np.float64)) if whole else energy
        return Entries(found.indices, found.values, found.base, found.target, own)

    return pool.size, rest


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
            tile = change.tile(first, first + piece.size, piece)
        magnitudes = np.zeros(piece.size, change.dtype)
        magnitudes[: tile.values.size] = np.abs(tile.values)
        pieces.append(magnitudes)
    sample = np.concatenate(pieces)
    share = 1.3 * k / change.size
    reach = int(share * sample.size + 4 * np.sqrt(share * sample.size)) + 1
    if reach >= sample.size or not np.isfinite(sample).all():
        return zero
    return np.partition(sample, sample.size - reach)[sample.size - reach]


class Pool:
    """Candidates in index order; memory is proportional to what is kept, however many entries tie.

    All of magnitude ``sure`` or more are kept, and the ``k`` largest of the others; of equal ones the lower indices.
    """

    def __init__(self, change: Change, k: int, floor: Any, sure: Any = np.inf, expected: int = 0) -> None:
        """Args: ``expected``: the number of candidates, if known."""
        self.floor = floor
        self.size = 0
        self._change, self._k, self._sure = change, k, sure
        self._complete = True
        self._limit = max(2 * k, expected) + TILE
        self._columns = self._buffers(min(self._limit, change.size) + TILE)

    def _buffers(self, size: int) -> list[Array]:
        """Buffers for :data:`COLUMNS`; pages that are never written take no memory."""
        change = self._change
        dtypes = (np.dtype(np.int64), change.dtype, change.weight_dtype, change.weight_dtype)
        return [_buffer_cache.take(size, dtype) for dtype in dtypes]

    def close(self) -> None:
        """Release the memory to later pools; the arrays of :meth:`all` must not be used any more."""
        for column in self._columns:
            _buffer_cache.give(column)
        self._columns = []

    def add(self, entries: Entries) -> None:
        """Add the candidates of the next tile; some may be below the floor, which may have increased meanwhile."""
        stop = self.size + entries.size
        if stop > self._columns[0].size:
            old, self._columns = self._columns, self._buffers(2 * stop)
            self._fill(0, [column[: self.size] for column in old])
        self._fill(self.size, [getattr(entries, column) for column in COLUMNS])
        self.size = stop
        self._complete &= entries.complete  # an empty one is complete
        if self.size > self._limit:
            kept = self.result()
            self._fill(0, [getattr(kept, column) for column in COLUMNS])
            self.size = kept.size
            self._limit = max(self._limit, 2 * self.size)
            magnitudes = np.abs(kept.values)
            rest = magnitudes if self._sure == np.inf else magnitudes[magnitudes < self._sure]
            if rest.size == self._k:
                # Later entries that tie with the k-th have higher indices and lose.
                self.floor = np.nextafter(rest.min(initial=self._sure), self._change.dtype.type(np.inf))

    def _fill(self, start: int, columns: list[Array]) -> None:
        for own, column in zip(self._columns, columns, strict=True):
            own[start : start + column.size] = column

    def all(self) -> Entries:
        """All candidates."""
        indices, values, base, target = (column[: self.size] for column in self._columns)
        if not self._complete:
            base, target = base[:0], target[:0]
        return Entries(indices, values, base, target)

    def result(self) -> Entries:
        """The candidates that are kept."""
        entries = self.all()
        magnitudes = np.abs(entries.values)
        if self._sure == np.inf:
            return entries.copied() if self.size <= self._k else entries.kept(largest(magnitudes, self._k))
        rest = np.flatnonzero(magnitudes < self._sure)
        if rest.size <= self._k:
            return entries.copied()
        keep = magnitudes >= self._sure
        keep[rest[largest(magnitudes[rest], self._k)]] = True
        return entries.kept(keep)


class _BufferCache:
    """Memory that is reused: getting it from the system for each tensor takes longer than filling it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Array] = []

    def take(self, size: int, dtype: np.dtype[Any]) -> Array:
        nbytes = size * dtype.itemsize
        with self._lock:
            for place, room in enumerate(self._free):
                if nbytes <= room.size <= 4 * nbytes:
                    return self._free.pop(place)[:nbytes].view(dtype)
        return np.empty(nbytes, np.uint8).view(dtype)

    def give(self, column: Array) -> None:
        room = column
        while room.base is not None:
            room = room.base
        if room.size > _LARGEST_BUFFER:
            return
        with self._lock:
            self._free.append(room)
            if len(self._free) > _MOST_BUFFERS:
                self._free.pop(0)


_MOST_BUFFERS = 16  # kept at most: four for each pool that is in use at a time
_LARGEST_BUFFER = 1 << 25  # bytes of one that is kept, at most
_buffer_cache = _BufferCache()
