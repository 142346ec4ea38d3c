"""Which strengths of an update explain a merged weight: an interval that every entry narrows.

Whoever merges an update ``u`` at strength ``s`` into a weight ``b`` stores ``m``, which is ``b + s u`` rounded. So each entry says
of the strength what its rounding leaves open:

    |m - (b + s u)| <= h + s t

``h`` is half an ulp of ``m``, in the dtype in which it was rounded. ``t`` is how far the update itself may be off, as others sum it
up in another order or type: ``share * (|u| + row * column)``, where ``column`` is the root mean square of ``u`` over its column, as
far as the tile goes, and ``row`` that of its row in units of these: what is off in a dot product goes by the length of its
factors and not by what is left of it. The strengths that fit all entries are an interval, exactly: no entry is averaged away, and no
distribution is supposed. Where the update is far above the rounding it is narrow; where rounding hides the update, it
reaches down to zero, and then nobody can tell a merge from none.

What is allowed is tried in the order of :data:`LEVELS`, from the strictest:

* the update in float32, rounded once: ``share`` is 2^-19, which is 32 half ulps of float32;
* the update in bfloat16 or float16, as a model that is held in these merges it: 2^-6, four roundings to bfloat16 (of
  factors, products, the scale). Strengths that are nearer to each other than this are not told apart. What is off goes either
  way in arithmetic, so of all entries together, what is left beyond ``h`` must stay below 2^-7 of the update's norm: all
  four roundings leave 0.3 %, and an addition that is small everywhere more;
* rounded twice, as in a weight that was merged, rounded and changed again: ``2 h``.

Each of them with the base as it is, and, where the merged dtype cannot hold it, with the base rounded first, as by whoever
loads a float32 model in bfloat16. A weight-decomposed update (DoRA) scales the weight itself by a number that is rounded
as well: it is allowed 2^-19 of the weight more, and four half ulps where the arithmetic is of 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import ml_dtypes
import numpy as np

from shira_format._core.arrays import Array, bits_differ, scratch, sum_of_squares
from shira_format._core.dtypes import FLOATS, is_float, round_to, upcast, working_dtype
from shira_format._core.threads import Progress, Workers
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.base import Update
from shira_format.tensors import numel

FINE, COARSE = 2.0**-19, 2.0**-6
_OVER = 2.0**-7  # of the update's norm
_ROWS = (
    1 << 15
)  # elements of a tile: some twenty arrays that small stay in the cache, and are not mapped anew each time
_FAR = 64  # half ulps from which on an entry that moved says much
_EVIDENCE = 16  # bits that an update must have left behind
_RUNS, _RUN = 16, 256
_HALF = 1 + 2.0**-10  # a sum in float32 that is rounded to a narrower type is rounded twice


@dataclass(frozen=True)
class Level:
    """What is allowed between a merged weight and the sum.

    Attributes:
        share: how far the update may be off; see above.
        halves: of an ulp.
        rounded: whether the base is rounded to the merged dtype before anything is added.
        words: what it is, for people; "" for the plain case.
    """

    share: float = FINE
    halves: int = 1
    rounded: bool = False
    words: str = ""


LEVELS = (
    Level(),
    Level(rounded=True, words="base rounded first"),
    Level(COARSE, words="update in 16 bits"),
    Level(COARSE, rounded=True, words="base rounded first, update in 16 bits"),
    Level(COARSE, 2, words="rounded twice"),
    Level(COARSE, 2, rounded=True, words="base rounded first, then twice more"),
)


@dataclass(frozen=True)
class Beside:
    """A weight of the base, what shall have been added to it, and what became of it.

    Attributes:
        update: the change at strength 1.
        exact: gives the very values that are due, in place of the rounded sum: ``exact(start, base, strength)`` for the
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
        """The type in which all is compared."""
        dtypes = (self.base.dtype(self.base_name), self.merged.dtype(self.merged_name))
        return np.result_type(self.update.dtype, *map(working_dtype, dtypes))


@dataclass(frozen=True)
class Strengths:
    """What a pass over one weight found; sums are over all its entries.

    Attributes:
        low, high: the strengths that fit every entry; none does if ``low > high``.
        along: the sum of change times update.
        energy: the sum of squares of the update.
        moved: the sum of squares of the change.
        left: the sum of squares of what the expected strength leaves of the change.
        replayed: the sum of update times what it becomes by rounding, at the expected strength.
        equal: entries that have the bits that are due at the expected strength.
        changed: entries that have other bits than the base.
        evidence: bits, by which an update shows: one for an entry that rounding the base does not explain, six where
            it is far away.
        off: the largest distance from what is due at the expected strength, in ulps.
        over: the sum of squares of what is left beyond rounding.
        not_finite: entries that are Inf or NaN.
        off_grid: entries that the dtype supposed by :func:`held_dtype` cannot hold.
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
        return self.low <= self.high and not self.not_finite

    def includes(self, strength: float) -> bool:
        """Whether this one explains every entry."""
        return self.fits and self.low <= strength <= self.high

    def holds(self, strength: float) -> bool:
        """Whether the expected one explains every entry, and all of them together."""
        return self.includes(strength) and self.over <= (_OVER * strength) ** 2 * self.energy

    @property
    def tells(self) -> bool:
        """Whether the entries cannot be those of the base alone, by far."""
        return self.low > 0 and self.evidence >= _EVIDENCE

    @property
    def estimate(self) -> float:
        """The strength of least squares."""
        return self.along / self.energy if self.energy else 0.0

    def joined(self, other: Strengths) -> Self:
        """With what another tile found."""
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


@dataclass(frozen=True)
class Explained:
    """The first level that explains a weight, and how.

    Attributes:
        level: None if none does; then ``found`` is what the strictest one found.
        found: the pass.
        sign: -1 if the update was subtracted.
    """

    level: Level | None
    found: Strengths
    sign: int = 1


def explain(beside: Beside, strength: float, workers: Workers, progress: Progress = lambda _: None) -> Explained:
    """How the merged weight came about.

    Of the levels that allow one rounding only, the first that explains ``strength`` counts; if none does, the first that
    explains any. In a bias of few entries some odd strength may fit by chance.

    Args:
        beside: the weight.
        strength: the expected one, not zero.
        workers: threads.
        progress: told of elements, once each.

    Raises:
        SourceError: the update holds NaN or Inf, or the base or the merged weight is not of floats.
    """
    for checkpoint, name in ((beside.base, beside.base_name), (beside.merged, beside.merged_name)):
        if not is_float(checkpoint.dtype(name)):
            raise SourceError(
                f"{checkpoint.path}: tensor {name!r} is of dtype {checkpoint.dtype(name)}, not a float"
            )
    held = held_dtype(beside.merged, beside.merged_name)
    sign, strength = (1, strength) if strength > 0 else (-1, -strength)
    first = _pass(beside, LEVELS[0], held, sign, strength, workers, progress)
    if first.off_grid:
        held = beside.merged.dtype(beside.merged_name)
        first = _pass(beside, LEVELS[0], held, sign, strength, workers)
    if not np.isfinite(first.energy):
        raise SourceError(f"the update of tensor {beside.update.name!r} holds NaN or Inf")
    if first.not_finite:
        return Explained(None, first)
    found = _levels(beside, first, held, sign, strength, workers)
    if found.level is None and first.along < 0:
        other = _pass(beside, LEVELS[0], held, -sign, strength, workers)
        found = _levels(beside, other, held, -sign, strength, workers)
    # What is said of the expected strength is said of the update as it is.
    return found if found.level is not None else Explained(None, first)


def _levels(
    beside: Beside, first: Strengths, held: np.dtype[Any], sign: int, strength: float, workers: Workers
) -> Explained:
    keeps = _holds(held, beside.base.dtype(beside.base_name))
    other: Explained | None = None
    for level in LEVELS:
        if level.rounded and keeps:
            continue
        # A weight without a changed bit was not rounded twice: it was not touched.
        if level.halves > 1 and (other is not None or not first.changed):
            break
        found = first
        if level is not LEVELS[0]:
            # With another strength known already, only the expected one is of interest.
            over = _hopeless(strength if other is not None else None)
            found = _pass(beside, level, held, sign, strength, workers, over=over)
        if found.holds(strength):
            return Explained(level, found, sign)
        if found.fits and other is None and not found.includes(strength):
            other = Explained(level, found, sign)
    return other or Explained(None, first, sign)


def _hopeless(strength: float | None) -> Callable[[Strengths], bool]:
    """Whether no strength is left, or not the one that is looked for."""
    return lambda found: not (found.fits if strength is None else found.includes(strength))


def _pass(
    beside: Beside, level: Level, held: np.dtype[Any], sign: int, strength: float, workers: Workers,
    progress: Progress = lambda _: None, *, over: Callable[[Strengths], bool] = lambda _: False,
) -> Strengths:  # fmt: skip
    """Look at every entry, or only until it is ``over``."""
    columns = beside.update.columns
    step = max(1, _ROWS // max(1, columns)) * columns
    found = Strengths()

    def look(start: int, stop: int) -> Strengths:
        with np.errstate(all="ignore"):
            return _look(beside, level, held, sign, strength, start, stop)

    for tile in workers.ranges(beside.size, step, look, progress) if step else ():
        found = found.joined(tile)
        if over(found):
            break
    return found


def _look(
    beside: Beside, level: Level, held: np.dtype[Any], sign: int, strength: float, start: int, stop: int
) -> Strengths:
    size, work = stop - start, beside.work
    update, before, after, raw_before, raw_after = _read(beside, start, stop)
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
    if beside.exact is None:
        due = round_to(round_to(before + work.type(strength) * update, held), raw_after.dtype)
    else:
        due = round_to(beside.exact(start, raw_before, sign * strength), raw_after.dtype)
    equal = size - int(np.count_nonzero(bits_differ(due, raw_after)))
    change = after - before
    not_finite = 0
    if not np.isfinite(moved := sum_of_squares(change)):
        bad = ~np.isfinite(change)
        not_finite = int(np.count_nonzero(bad))
        change[bad] = 0
        moved = sum_of_squares(change)
    energy = sum_of_squares(update)
    becomes = upcast(due, scratch("strengths due", size, work)) - before
    half = _half_ulp(after, held, raw_after.dtype)
    half *= work.type(_HALF)
    left = change - work.type(strength) * update
    away = np.abs(left)
    off = float((away / half).max(initial=0)) / 2
    if beside.scales:
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
    low, high = _interval(update, change, half, level.share, beside.update.columns)
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


def _read(beside: Beside, start: int, stop: int) -> tuple[Array, Array, Array, Array, Array]:
    """The update and both weights in one type, and the weights as they are stored; in buffers of this thread."""
    size, work, columns = stop - start, beside.work, beside.update.columns
    update = scratch("strengths update", size, beside.update.dtype)
    beside.update.tile(start // columns, stop // columns, update.reshape(-1, columns))
    if update.dtype != work:
        update = upcast(update, scratch("strengths wide update", size, work))
    found = []
    for use, checkpoint, name in (
        ("base", beside.base, beside.base_name),
        ("merged", beside.merged, beside.merged_name),
    ):
        raw = checkpoint.part(name, start, stop, scratch(f"strengths {use}", size, checkpoint.dtype(name)))
        found.append((upcast(raw, scratch(f"strengths wide {use}", size, work)), raw))
    (before, raw_before), (after, raw_after) = found
    return update, before, after, raw_before, raw_after


def _interval(update: Array, change: Array, half: Array, share: float, columns: int) -> tuple[float, float]:
    """The strengths from zero on that fit every entry: ``low > high`` if none does."""
    reach = np.abs(update)
    slack = _spread(update.reshape(-1, columns)).reshape(-1)
    slack += reach
    slack *= update.dtype.type(share)
    change = np.copysign(1, update) * change  # along the update
    most, least = reach + slack, reach - slack
    near, far = change - half, change + half
    low = float(np.fmax.reduce(np.divide(near, most, out=near), initial=0))
    if far.min(initial=0) < 0:
        # An entry that moves less than the update may be off sets no upper limit, but may have moved the other way.
        against = (least <= 0) & (far < 0)
        low = max(low, float((np.abs(far[against]) / np.abs(least[against])).max(initial=0)))
        far[against] = np.inf
    np.maximum(least, np.finfo(least.dtype).tiny, out=least)
    return low, float(np.fmin.reduce(np.divide(far, least, out=far), initial=np.inf))


def _spread(update: Array) -> Array:
    """``[rows, columns]``: how large the update is there by its row and its column, as far as this tile tells."""
    count, width = update.shape
    squares = update * update
    columns = squares.mean(0)
    if not 0 < float(columns.mean()) < np.inf:
        return np.zeros_like(update)
    # What has few entries may look small by chance.
    columns += 4 * columns.mean() / count
    # Rows in units of their columns: a massive column shall not speak for all.
    rows = squares @ (1 / columns) / width
    rows += 4 * rows.mean() / width
    return np.asarray(np.multiply.outer(np.sqrt(rows), np.sqrt(columns)))


def _half_ulp(values: Array, held: np.dtype[Any], stored: np.dtype[Any]) -> Array:
    """Half the distance from each value to the next larger one of dtype ``held``: no rounding to it is larger."""
    half: Array
    if values.dtype == np.float64:
        half = (values.view(np.uint64) & np.uint64(0x7FF << 52)).view(np.float64)
    else:
        half = (values.view(np.uint32) & np.uint32(0xFF << 23)).view(np.float32)
    half *= values.dtype.type(2.0 ** -(_info(held).nmant + 1))
    least = max(float(_info(dtype).smallest_subnormal) for dtype in (held, stored)) / 2
    np.maximum(half, max(values.dtype.type(least), np.finfo(values.dtype).smallest_subnormal), out=half)
    return half


def _info(dtype: np.dtype[Any]) -> Any:
    return ml_dtypes.finfo(dtype)


def _holds(dtype: np.dtype[Any], other: np.dtype[Any]) -> bool:
    """Whether ``dtype`` has every value of ``other``."""
    mine, its = _info(dtype), _info(other)
    return bool(
        mine.nmant >= its.nmant
        and float(mine.smallest_subnormal) <= float(its.smallest_subnormal)
        and float(mine.max) >= float(its.max)
    )


def held_dtype(checkpoint: Checkpoint, name: str) -> np.dtype[Any]:
    """The narrowest dtype that seems to hold all values: a float32 file may hold what was computed in bfloat16.

    By a sample; a tensor with few different values is taken as it is stored.
    """
    stored, size = checkpoint.dtype(name), numel(checkpoint.shape(name))
    work = working_dtype(stored)
    values = np.concatenate([np.empty(0, work), *(part.astype(work) for part in sample(checkpoint, name, size))])
    if np.unique(values[values != 0]).size < 3 or not np.isfinite(values).all():
        return stored
    for narrow in (FLOATS["BF16"], FLOATS["F16"], FLOATS["F32"]):
        if _info(narrow).nmant < _info(stored).nmant:
            with np.errstate(over="ignore"):
                if np.array_equal(round_to(values, narrow).astype(work), values):
                    return narrow
    return stored


def sample(checkpoint: Checkpoint, name: str, size: int) -> Iterator[Array]:
    """Some runs of elements, from the first to the last."""
    length = min(_RUN, size)
    for start in sorted({i * (size - length) // (_RUNS - 1) for i in range(_RUNS)}) if length else ():
        yield checkpoint.part(name, start, start + length).copy()


def scatter(beside: Beside, strength: float, workers: Workers) -> float:
    """The standard error of an estimate by least squares, from what it leaves: whatever the noise is (White's)."""
    columns = beside.update.columns
    step = max(1, _ROWS // columns) * columns

    def look(start: int, stop: int) -> tuple[float, float]:
        update, before, after, _, _ = _read(beside, start, stop)
        left = (after - before - beside.work.type(strength) * update) * update
        return sum_of_squares(left), sum_of_squares(update)

    meat, energy = (sum(values) for values in zip(*workers.ranges(beside.size, step, look), strict=True))
    return float(np.sqrt(meat) / energy) if energy else float("inf")


def due_of_whole(values: Array, merged: Checkpoint, name: str) -> tuple[bool, float, float]:
    """Whether ``merged`` has ``values``, the share of equal bits, and the largest distance in ulps.

    They may have been rounded twice, first to the dtype of the model that was merged.
    """
    stored = merged.dtype(name)
    if not is_float(stored) or not is_float(values.dtype):
        found = merged[name]
        same = np.asarray(found == values)
        return bool(same.all()), float(same.mean()) if same.size else 1.0, 0.0
    work = np.result_type(working_dtype(stored), working_dtype(values.dtype))
    held, flat = held_dtype(merged, name), np.ascontiguousarray(values).reshape(-1)
    equal, off, fits = 0, 0.0, True
    for start in range(0, flat.size, _ROWS):
        stop = min(start + _ROWS, flat.size)
        raw = merged.part(name, start, stop)
        with np.errstate(all="ignore"):
            due, after = round_to(flat[start:stop], stored), raw.astype(work)
            differs = bits_differ(due, raw)
            away = np.abs(after - flat[start:stop].astype(work)) / _half_ulp(after.copy(), held, stored)
        away[~differs] = 0
        equal += int(np.count_nonzero(~differs))
        off = max(off, float(away.max(initial=0)) / 2)
        fits &= bool((away <= 2 * _HALF).all())
    return fits, equal / flat.size if flat.size else 1.0, off if np.isfinite(off) else 0.0


def unchanged(
    base: Checkpoint, base_name: str, merged: Checkpoint, name: str, workers: Workers | None = None
) -> bool:
    """Whether a weight of ``merged`` is that of the base: bit for bit, or as far as its dtype can tell."""
    before, after = base.dtype(base_name), merged.dtype(name)
    size = numel(base.shape(base_name))

    def look(start: int, stop: int) -> bool:
        a, b = base.part(base_name, start, stop), merged.part(name, start, stop)
        if before == after:
            return not bool(bits_differ(a, b).any())
        if not is_float(before) or not is_float(after):
            return np.array_equal(a, b)
        with np.errstate(all="ignore"):
            differs = bits_differ(round_to(a, after), b)
            if not differs.any():
                return True
            # Rounded twice, such as through the dtype in which the model was held.
            work = np.result_type(working_dtype(before), working_dtype(after))
            old, new = a[differs].astype(work), b[differs].astype(work)
            return bool((np.abs(new - old) <= 2 * _HALF * _half_ulp(new, held, after)).all())

    held = held_dtype(merged, name) if is_float(after) and before != after else after
    if workers is None:
        return all(look(start, min(start + _ROWS, size)) for start in range(0, size, _ROWS))
    return all(workers.ranges(size, 4 * _ROWS, look))


def same_tensor(a: Checkpoint, name: str, b: Checkpoint, other: str) -> bool:
    """Whether two tensors have the same dtype, shape and bits, as tied ones do."""
    if (a.dtype(name), a.shape(name)) != (b.dtype(other), b.shape(other)):
        return False
    size = numel(a.shape(name))
    first = zip(sample(a, name, size), sample(b, other, size), strict=True)
    return not any(bits_differ(x, y).any() for x, y in first) and unchanged(a, name, b, other)
