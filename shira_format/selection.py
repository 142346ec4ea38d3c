"""Exact top-k by magnitude over updates that are computed tile by tile and never held whole.

Work goes in tiles of fixed size, one thread each with BLAS on one thread, so that no value depends on how many threads
there are; results are joined in order. Ties are broken by position: the lower index is taken first, and under the
global scope the earlier tensor.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from shira_format.arrays import Array
from shira_format.errors import SourceError
from shira_format.tensors import matrix_view, numel
from shira_format.update import Update

_T = TypeVar("_T")

TILE = 1 << 18  # elements: 1 MB of float32, which stays in a second-level cache beside its factors
_SAMPLES = 8  # pieces of an update that are looked at first
_SAMPLE = 1 << 14  # elements a piece


@dataclass(frozen=True)
class TopK:
    """How many entries to keep, and among what.

    Attributes:
        density: share of the elements, in (0, 1]; rounded to the nearest count, at least one entry.
        top_k: a count instead: for each tensor, or in all under the global scope.
        scope: ``"tensor"``: each tensor keeps its own largest entries; ``"global"``: the largest of all tensors.
    """

    density: float | None = 0.01
    top_k: int | None = None
    scope: str = "tensor"

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be meant."""
        if (self.density is None) == (self.top_k is None):
            raise ValueError("give a density or a top-k, not both")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density {self.density} is not in (0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k {self.top_k} is not a positive count")
        if self.scope not in ("tensor", "global"):
            raise ValueError(f"scope {self.scope!r} is neither 'tensor' nor 'global'")

    def count(self, elements: int) -> int:
        """How many of ``elements`` to keep."""
        if self.top_k is not None:
            return min(self.top_k, elements)
        assert self.density is not None
        return min(max(1, int(self.density * elements + 0.5)), elements)


@dataclass(frozen=True)
class Selected:
    """The kept entries of one update.

    Attributes:
        indices: int64 ``[n]``, strictly increasing flat positions; no entry of value 0.
        values: ``[n]`` the update at these.
        energy: sum of squares of the whole update.
    """

    indices: npt.NDArray[np.int64]
    values: Array
    energy: float


Progress = Callable[[int], object]


def select(
    updates: Sequence[Update], rule: TopK, *, threads: int | None = None, progress: Progress = lambda _: None
) -> Iterator[tuple[Update, Selected]]:
    """The selected entries of each update, in order; memory stays at one tensor's selection.

    Args:
        updates: what to select from.
        rule: how many.
        threads: at most this many; all cores by default. The result does not depend on it.
        progress: called with the number of elements done; all passes together make ``passes(rule) * numel``.

    Raises:
        SourceError: an update holds NaN or Inf.
    """
    with _tiles(threads) as tiles:
        if rule.scope == "global":
            k = rule.count(sum(numel(update.shape) for update in updates))
            edge, ties = _global_edge(updates, k, tiles, progress)
            for update in updates:
                chosen, ties = _above(update, edge, ties, tiles, progress)
                yield update, chosen
        else:
            for update in updates:
                yield update, _largest(update, rule.count(numel(update.shape)), tiles, progress)


def passes(rule: TopK) -> int:
    """How often each update is computed."""
    return 3 if rule.scope == "global" else 1


class _Tiles:
    """Runs a function over the tiles of an update on several threads, and yields its results in tile order."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int) -> None:
        self._pool = pool
        self._ahead = 2 * threads
        self._local = threading.local()

    def map(self, update: Update, work: Callable[[int, Array, Array], _T], progress: Progress) -> Iterator[_T]:
        """``work(start, values, magnitudes)`` for each tile: its first flat index, and its elements, flat."""
        rows, columns = matrix_view(update.shape)
        if rows * columns == 0:
            return
        height = max(1, TILE // columns)

        def one(start: int) -> _T:
            stop = min(start + height, rows)
            values, magnitudes = self._buffers((stop - start) * columns, update.dtype)
            with np.errstate(over="ignore", invalid="ignore"):  # found, and named, by the energy
                update.tile(start, stop, values.reshape(stop - start, columns))
                np.abs(values, out=magnitudes)
            return work(start * columns, values, magnitudes)

        running: deque[tuple[Future[_T], int]] = deque()
        for start in range(0, rows, height):
            running.append((self._pool.submit(one, start), min(height, rows - start) * columns))
            if len(running) > self._ahead:
                yield _finish(running, progress)
        while running:
            yield _finish(running, progress)

    def _buffers(self, size: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
        """Two arrays that belong to this thread and are used again: fresh ones cost more than the arithmetic."""
        held: tuple[Array, Array] | None = getattr(self._local, "buffers", None)
        if held is None or held[0].size < size or held[0].dtype != dtype:
            held = np.empty(size, dtype), np.empty(size, dtype)
            self._local.buffers = held
        return held[0][:size], held[1][:size]


def _finish(running: deque[tuple[Future[_T], int]], progress: Progress) -> _T:
    future, size = running.popleft()
    result = future.result()
    progress(size)
    return result


@contextmanager
def _tiles(threads: int | None) -> Iterator[_Tiles]:
    threads = threads or usable_cores()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="shira-tiles")
    try:
        with threadpool_limits(1, user_api="blas"):
            yield _Tiles(pool, threads)
    finally:
        pool.shutdown(cancel_futures=True)


def usable_cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def _energy(values: Array) -> float:
    """The sum of squares, in the values' own type unless it leaves that type's normal range."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        energy = float(np.dot(values, values))
    if not 1e-30 < energy < 1e30:  # squares may have vanished, or overflowed; or there is a NaN, which stays
        wide = values.astype(np.float64)
        energy = float(np.dot(wide, wide))
    return energy


def _check_energy(update: Update, energy: float) -> None:
    if not np.isfinite(energy):
        raise SourceError(f"the update of tensor {update.name!r} holds NaN or Inf, or overflows")


def _largest(update: Update, k: int, tiles: _Tiles, progress: Progress) -> Selected:
    """The k entries of largest magnitude of one update.

    A sample gives a magnitude that somewhat more than k entries reach; one pass collects these, and the k-th largest
    among them decides. If the sample misled (too few reach it), the pass is made again without it.
    """
    floor = _sampled_floor(update, k)
    while True:
        pool = _Pool(k, floor, update.dtype)

        def work(start: int, values: Array, magnitudes: Array, pool: _Pool = pool) -> tuple[Array, Array, float]:
            found = np.flatnonzero(magnitudes >= pool.floor)
            return found + start, values[found], _energy(values)

        energy = 0.0
        for indices, values, part in tiles.map(update, work, progress):
            energy += part
            pool.add(indices, values)
        _check_energy(update, energy)
        if pool.size >= k or floor <= pool.smallest:
            indices, values = pool.result()
            if k == numel(update.shape):  # nothing is left out, and sums in two precisions must not say otherwise
                energy = float(np.dot(values.astype(np.float64), values.astype(np.float64)))
            return Selected(indices, values, energy)
        floor = pool.smallest


def _sampled_floor(update: Update, k: int) -> float:
    rows, columns = matrix_view(update.shape)
    if rows * columns <= _SAMPLES * _SAMPLE:
        return 0.0
    height = min(rows, max(1, _SAMPLE // columns))
    pieces = []
    for start in np.linspace(0, rows - height, _SAMPLES, dtype=np.int64):
        piece = np.empty((height, columns), update.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            update.tile(int(start), int(start) + height, piece)
        pieces.append(np.abs(piece).ravel())
    sample = np.concatenate(pieces)
    share = 1.3 * k / (rows * columns)
    reach = int(share * sample.size + 4 * np.sqrt(share * sample.size)) + 1
    if reach >= sample.size or not np.isfinite(sample).all():
        return 0.0
    return float(np.partition(sample, sample.size - reach)[sample.size - reach])


class _Pool:
    """Candidates in index order; memory stays in proportion to k, however many entries tie."""

    def __init__(self, k: int, floor: float, dtype: np.dtype[Any]) -> None:
        # A value of 0 changes nothing, so nothing below the smallest number is ever a candidate.
        self.smallest = float(np.finfo(dtype).smallest_subnormal)
        self.floor = dtype.type(max(floor, self.smallest))
        self.k = k
        self.size = 0
        self._parts: list[tuple[Array, Array]] = []

    def add(self, indices: Array, values: Array) -> None:
        """Add the candidates of the next tile; some may be below a floor that has risen since they were found."""
        self._parts.append((indices, values))
        self.size += indices.size
        if self.size > 4 * self.k + TILE:
            self._parts = [self.result()]
            self.size = self._parts[0][0].size
            # Later entries that only tie with the k-th lose to it by index.
            smallest = np.abs(self._parts[0][1]).min()
            self.floor = np.nextafter(smallest, smallest.dtype.type(np.inf))

    def result(self) -> tuple[npt.NDArray[np.int64], Array]:
        """The k largest in index order, lower indices first among equals."""
        if not self._parts:
            return np.empty(0, np.int64), np.empty(0, self.floor.dtype)
        indices = np.concatenate([part[0] for part in self._parts])
        values = np.concatenate([part[1] for part in self._parts])
        if indices.size <= self.k:
            return indices, values
        magnitudes = np.abs(values)
        edge = np.partition(magnitudes, indices.size - self.k)[indices.size - self.k]
        keep = magnitudes > edge
        ties = np.flatnonzero(magnitudes == edge)
        keep[ties[: self.k - int(np.count_nonzero(keep))]] = True
        return indices[keep], values[keep]


def _global_edge(updates: Iterable[Update], k: int, tiles: _Tiles, progress: Progress) -> tuple[Any, int]:
    """The k-th largest magnitude over all updates, and how many entries of just this magnitude belong to the k.

    Two passes in bounded memory. The first counts magnitudes by their leading bits, which sort like the numbers
    themselves; only those at or above the bin that the k-th is known to reach so far are counted. The second counts
    the distinct magnitudes within the bin in which the k-th lies.
    """
    updates = list(updates)
    dtype = np.result_type(*(update.dtype for update in updates)) if updates else np.dtype(np.float32)
    histogram = np.zeros(1 << 16, np.int64)
    floor = np.array(np.finfo(dtype).smallest_subnormal, dtype)

    def count(_start: int, values: Array, magnitudes: Array) -> tuple[npt.NDArray[np.int64], float]:
        bins = _leading_bits(magnitudes[magnitudes >= floor].astype(dtype, copy=False))
        return np.bincount(bins, minlength=1 << 16), _energy(values)

    for update in updates:
        energy = 0.0
        for counts, part in tiles.map(update, count, progress):
            histogram += counts
            energy += part
        _check_energy(update, energy)
        floor = np.maximum(floor, _lower_edge(_bin_of(histogram, k), dtype))
    edge_bin = _bin_of(histogram, k)
    above = int(histogram[edge_bin + 1 :].sum())
    if histogram.sum() <= k:  # there are no more entries that are not 0
        for update in updates:
            progress(numel(update.shape))
        return np.finfo(dtype).smallest_subnormal, int(histogram.sum())

    def distinct(_start: int, _values: Array, magnitudes: Array) -> tuple[Array, Array]:
        near = magnitudes[magnitudes >= floor].astype(dtype, copy=False)
        return np.unique(near[_leading_bits(near) == edge_bin], return_counts=True)

    known = np.empty(0, dtype), np.empty(0, np.int64)
    for update in updates:
        for found in tiles.map(update, distinct, progress):
            known = _merge_counts(known, found)
    falling = np.cumsum(known[1][::-1]) + above
    position = int(np.searchsorted(falling, k))
    before = int(falling[position - 1]) if position else above
    return known[0][::-1][position], k - before


def _leading_bits(magnitudes: Array) -> npt.NDArray[np.int64]:
    """The 16 bits after the sign, as bin numbers that grow with the magnitude."""
    unsigned, shift = _layout(magnitudes.dtype)
    return np.asarray(np.right_shift(magnitudes.view(unsigned), shift), np.int64)


def _lower_edge(bin_number: int, dtype: np.dtype[Any]) -> Array:
    """The smallest magnitude of a bin."""
    unsigned, shift = _layout(dtype)
    return np.array(bin_number << shift, unsigned).view(dtype)


def _layout(dtype: np.dtype[Any]) -> tuple[np.dtype[Any], int]:
    """An unsigned type of the same size, and how many bits lie below the leading 16 after the sign."""
    return np.dtype(f"u{dtype.itemsize}"), 8 * dtype.itemsize - 17


def _bin_of(histogram: npt.NDArray[np.int64], k: int) -> int:
    """The bin in which the k-th largest lies; 0 if there are fewer."""
    falling = np.cumsum(histogram[::-1])
    position = int(np.searchsorted(falling, k))
    return max(0, histogram.size - 1 - position)


def _merge_counts(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    values, where = np.unique(np.concatenate([a[0], b[0]]), return_inverse=True)
    counts = np.zeros(values.size, np.int64)
    np.add.at(counts, where, np.concatenate([a[1], b[1]]))
    return values, counts


def _above(update: Update, edge: Any, ties: int, tiles: _Tiles, progress: Progress) -> tuple[Selected, int]:
    """The entries above ``edge``, and the first ``ties`` of those that equal it; returns how many ties are left."""

    def work(start: int, values: Array, magnitudes: Array) -> tuple[Array, Array, float]:
        found = np.flatnonzero(magnitudes >= edge)
        return found + start, values[found], _energy(values)

    indices, values, energy = [np.empty(0, np.int64)], [np.empty(0, update.dtype)], 0.0
    for found, kept, part in tiles.map(update, work, progress):
        energy += part
        equal = np.flatnonzero(np.abs(kept) == edge)
        keep = np.ones(found.size, bool)
        keep[equal[ties:]] = False
        ties = max(0, ties - equal.size)
        indices.append(found[keep])
        values.append(kept[keep])
    return Selected(np.concatenate(indices), np.concatenate(values), energy), ties
