"""One pass over a merged weight: which strengths fit all entries at a given tolerance, and sums over the entries.

The rule for one entry is in :mod:`shira_analysis.merging.check.fit`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from shira_analysis.merging.check.stored import HALF, TILE, half_ulp
from shira_format._core.arrays import Array, bits_differ, scratch, sum_of_squares
from shira_format._core.dtypes import round_to, upcast, working_dtype
from shira_format._core.threads import Progress, Workers
from shira_format.checkpoints import Checkpoint
from shira_format.lora.base import Update
from shira_format.tensors import numel

FINE, COARSE = 2.0**-19, 2.0**-6
_OVER = 2.0**-7  # of the update's norm
_FAR = 64  # half ulps: a larger change is strong evidence
_EVIDENCE = 16  # points of evidence that a verdict needs


@dataclass(frozen=True)
class Level:
    """A tolerance: how far a merged weight may be from the sum.

    Attributes:
        share: relative tolerance of the update.
        halves: tolerance of the sum, in half ulps.
        rounded: whether the base is rounded to the merged dtype before anything is added.
        words: a description for reports; "" for the plain case.
    """

    share: float = FINE
    halves: int = 1
    rounded: bool = False
    words: str = ""


@dataclass(frozen=True)
class MergedWeight:
    """A weight of the base, the update that should have been added, and the merged weight.

    Attributes:
        update: the change at strength 1.
        exact: computes the exact expected values, in place of the rounded sum: ``exact(start, base, strength)`` for the
            part ``base`` from flat index ``start`` on; None for an update.
        scales: whether the update scales the weight (DoRA).
    """

    update: Update
    base: Checkpoint
    base_name: str
    merged: Checkpoint
    merged_name: str
    exact: Any = None
    scales: bool = False

    @property
    def size(self) -> int:
        """Elements."""
        return numel(self.update.shape)

    @property
    def work(self) -> np.dtype[Any]:
        """The dtype of the comparison."""
        dtypes = (self.base.dtype(self.base_name), self.merged.dtype(self.merged_name))
        return np.result_type(self.update.dtype, *map(working_dtype, dtypes))


@dataclass(frozen=True)
class Strengths:
    """What a pass over one weight found; sums are over its entries.

    Attributes:
        low, high: the strengths in between fit every entry; none does if ``low > high``.
        along: the sum of change times update.
        energy: the sum of squares of the update.
        moved: the sum of squares of the change.
        left: the sum of squares of change minus expected strength times update.
        replayed: the sum of update times expected change, after rounding.
        equal: entries with the expected bits.
        changed: entries whose bits differ from the base's.
        evidence: one point for each entry that rounding the base does not explain, six for one that is far off.
        off: the largest distance from the expected value, in ulps.
        over: the sum of squares of the remainder that rounding does not explain.
        not_finite: entries that are Inf or NaN.
        off_grid: entries that the dtype guessed by :func:`held_dtype` cannot hold.
    """

    low: float = 0.0
    high: float = np.inf
    along: float = 0.0
    energy: float = 0.0
    moved: float = 0.0
    left: float = 0.0
    replayed: float = 0.0
    equal: int = 0
    changed: int = 0
    evidence: int = 0
    off: float = 0.0
    over: float = 0.0
    not_finite: int = 0
    off_grid: int = 0

    @property
    def fits(self) -> bool:
        """Whether a strength explains every entry."""
        return self.low <= self.high and self.low < np.inf and not self.not_finite

    def includes(self, strength: float) -> bool:
        """Whether ``strength`` explains every entry."""
        return self.fits and self.low <= strength <= self.high

    def holds(self, strength: float) -> bool:
        """Whether ``strength`` explains every entry, and the remainders of all of them together are small enough."""
        return self.includes(strength) and self.over <= (_OVER * strength) ** 2 * self.energy

    @property
    def tells(self) -> bool:
        """Whether the base alone clearly does not explain the entries."""
        return self.low > 0 and self.evidence >= _EVIDENCE

    @property
    def estimate(self) -> float:
        """The least-squares strength."""
        return self.along / self.energy if self.energy else 0.0

    def combined(self, other: Strengths) -> Self:
        """Together with another tile's."""
        return replace(
            self,
            low=max(self.low, other.low),
            high=min(self.high, other.high),
            along=self.along + other.along,
            energy=self.energy + other.energy,
            moved=self.moved + other.moved,
            left=self.left + other.left,
            replayed=self.replayed + other.replayed,
            equal=self.equal + other.equal,
            changed=self.changed + other.changed,
            evidence=self.evidence + other.evidence,
            off=max(self.off, other.off),
            over=self.over + other.over,
            not_finite=self.not_finite + other.not_finite,
            off_grid=self.off_grid + other.off_grid,
        )


def scan(
    weight: MergedWeight, level: Level, held: np.dtype[Any], sign: int, strength: float, workers: Workers,
    progress: Progress = lambda _: None, *, over: Callable[[Strengths], bool] = lambda _: False,
) -> Strengths:  # fmt: skip
    """Compare every entry, or stop after the tile at which ``over`` is true."""
    columns = weight.update.columns
    step = max(1, TILE // max(1, columns)) * columns
    found = Strengths()

    def look(start: int, stop: int) -> Strengths:
        with np.errstate(all="ignore"):
            return _look(weight, level, held, sign, strength, start, stop)

    for tile in workers.ranges(weight.size, step, look, progress) if step else ():
        found = found.combined(tile)
        if over(found):
            break
    return found


def _look(
    weight: MergedWeight, level: Level, held: np.dtype[Any], sign: int, strength: float, start: int, stop: int
) -> Strengths:
    size, work = stop - start, weight.work
    update, before, after, raw_before, raw_after = _read(weight, start, stop)
    if sign < 0:
        np.negative(update, out=update)
    same = raw_before.dtype == raw_after.dtype
    plain = raw_before if same else round_to(round_to(before, held), raw_after.dtype)
    changed = int(np.count_nonzero(bits_differ(plain, raw_after)))
    off_grid = 0
    if held != raw_after.dtype:
        off_grid = int(np.count_nonzero(round_to(after, held).astype(work) != after))
    if level.rounded:
        before = round_to(before, held).astype(work)
    if weight.exact is None:
        due = round_to(round_to(before + work.type(strength) * update, held), raw_after.dtype)
    else:
        due = round_to(weight.exact(start, raw_before, sign * strength), raw_after.dtype)
    equal = size - int(np.count_nonzero(bits_differ(due, raw_after)))
    change = after - before
    not_finite = 0
    if not np.isfinite(moved := sum_of_squares(change)):
        bad = ~np.isfinite(change)
        not_finite = int(np.count_nonzero(bad))
        change[bad] = 0
        moved = sum_of_squares(change)
    energy = sum_of_squares(update)
    becomes = upcast(due, scratch("fit due", size, work)) - before
    half = half_ulp(after, held, raw_after.dtype)
    half *= work.type(HALF)
    left = change - work.type(strength) * update
    away = np.abs(left)
    off = float((away / half).max(initial=0)) / 2
    if weight.scales:
        half *= 4 if level.share == COARSE else 1
        half += work.type(FINE) * np.abs(after)
    half *= level.halves
    over = sum_of_squares(np.maximum(away - half, 0))
    along, replayed = (float(np.dot(update, other)) for other in (change, becomes))
    remains = sum_of_squares(left)
    size_of_change = np.abs(change)
    evidence = int(np.count_nonzero(size_of_change > half)) + 5 * int(
        np.count_nonzero(size_of_change > _FAR * half)
    )
    low, high = _interval(update, change, half, level.share, weight.update.columns)
    return Strengths(
        low,
        high,
        along,
        energy,
        moved,
        remains,
        replayed,
        equal,
        changed,
        evidence,
        off,
        over,
        not_finite,
        off_grid,
    )


def _read(weight: MergedWeight, start: int, stop: int) -> tuple[Array, Array, Array, Array, Array]:
    """The update and both weights in one dtype, and both weights as stored; in buffers of this thread."""
    size, work, columns = stop - start, weight.work, weight.update.columns
    update = scratch("fit update", size, weight.update.dtype)
    weight.update.tile(start // columns, stop // columns, update.reshape(-1, columns))
    if update.dtype != work:
        update = upcast(update, scratch("fit wide update", size, work))
    found = []
    for use, checkpoint, name in (
        ("base", weight.base, weight.base_name),
        ("merged", weight.merged, weight.merged_name),
    ):
        raw = checkpoint.part(name, start, stop, scratch(f"fit {use}", size, checkpoint.dtype(name)))
        found.append((upcast(raw, scratch(f"fit wide {use}", size, work)), raw))
    (before, raw_before), (after, raw_after) = found
    return update, before, after, raw_before, raw_after


def _interval(update: Array, change: Array, half: Array, share: float, columns: int) -> tuple[float, float]:
    """The strengths from 0 up that fit every entry: ``low > high`` if none does."""
    reach = np.abs(update)
    slack = _spread(update.reshape(-1, columns)).reshape(-1)
    slack += reach
    slack *= update.dtype.type(share)
    change = np.copysign(1, update) * change  # along the update
    most, least = reach + slack, reach - slack
    near, far = change - half, change + half
    low = float(np.fmax.reduce(np.divide(near, most, out=near), initial=0))
    # An entry whose update is within its own tolerance sets no upper limit, but may have moved the other way.
    free = least <= 0
    if far.min(initial=0) < 0:
        against = free & (far < 0)
        low = max(low, float((np.abs(far[against]) / np.abs(least[against])).max(initial=0)))
    far[free] = np.inf
    np.maximum(least, np.finfo(least.dtype).tiny, out=least)
    return low, float(np.fmin.reduce(np.divide(far, least, out=far), initial=np.inf))


def _spread(update: Array) -> Array:
    """``[rows, columns]``: the size of the update at each entry, estimated from its row and its column in this tile."""
    count, width = update.shape
    squares = update * update
    columns = squares.mean(0)
    if not 0 < float(columns.mean()) < np.inf:
        return np.zeros_like(update)
    # With few entries, a column or row may look small by chance.
    columns += 4 * columns.mean() / count
    # Rows in units of their columns, so that one massive column does not dominate.
    rows = squares @ (1 / columns) / width
    rows += 4 * rows.mean() / width
    return np.asarray(np.multiply.outer(np.sqrt(rows), np.sqrt(columns)))


def standard_error(weight: MergedWeight, strength: float, workers: Workers) -> float:
    """The standard error of a least-squares strength, by White's estimator, which assumes no distribution of the residuals."""
    columns = weight.update.columns
    step = max(1, TILE // columns) * columns

    def look(start: int, stop: int) -> tuple[float, float]:
        update, before, after, _, _ = _read(weight, start, stop)
        left = (after - before - weight.work.type(strength) * update) * update
        return sum_of_squares(left), sum_of_squares(update)

    meat, energy = (sum(values) for values in zip(*workers.ranges(weight.size, step, look), strict=True))
    return float(np.sqrt(meat) / energy) if energy else float("inf")
