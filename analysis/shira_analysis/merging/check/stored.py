"""Comparing stored tensors of two checkpoints: equal bits, or equal up to the rounding of their dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from shira_format._core.arrays import Array, bits_differ, distinct
from shira_format._core.dtypes import FLOATS, is_float, round_to, working_dtype
from shira_format._core.threads import Workers
from shira_format.checkpoints import Checkpoint
from shira_format.tensors import numel

TILE = 1 << 15  # elements: some twenty arrays of this size stay in the cache, and are not mapped anew each time
HALF = 1 + 2.0**-10  # half an ulp: a sum in float32 that is rounded to a narrower type is rounded twice
_RUNS, _RUN = 16, 256


def same_tensor(a: Checkpoint, name: str, b: Checkpoint, other: str) -> bool:
    """Whether two tensors have the same dtype, shape and bits, as tied ones do."""
    if (a.dtype(name), a.shape(name)) != (b.dtype(other), b.shape(other)):
        return False
    size = numel(a.shape(name))
    first = zip(sample(a, name, size), sample(b, other, size), strict=True)
    return not any(bits_differ(x, y).any() for x, y in first) and unchanged(a, name, b, other)


def unchanged(
    base: Checkpoint, base_name: str, merged: Checkpoint, name: str, workers: Workers | None = None
) -> bool:
    """Whether a weight of ``merged`` is the base's: bit for bit, or up to rounding where the dtypes differ."""
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
            return bool((np.abs(new - old) <= 2 * HALF * half_ulp(new, held, after)).all())

    held = held_dtype(merged, name) if is_float(after) and before != after else after
    if workers is None:
        return all(look(start, min(start + TILE, size)) for start in range(0, size, TILE))
    return all(workers.ranges(size, 4 * TILE, look))


def compare_replaced(values: Array, merged: Checkpoint, name: str) -> tuple[bool, float, float]:
    """Whether ``merged`` holds ``values``, the share of entries with equal bits, and the largest distance in ulps.

    The values may have been rounded twice, first to the dtype of the model that was merged.
    """
    stored = merged.dtype(name)
    if not is_float(stored) or not is_float(values.dtype):
        found = merged[name]
        same = np.asarray(found == values)
        return bool(same.all()), float(same.mean()) if same.size else 1.0, 0.0
    work = np.result_type(working_dtype(stored), working_dtype(values.dtype))
    held, flat = held_dtype(merged, name), np.ascontiguousarray(values).reshape(-1)
    equal, off, fits = 0, 0.0, True
    for start in range(0, flat.size, TILE):
        stop = min(start + TILE, flat.size)
        raw = merged.part(name, start, stop)
        with np.errstate(all="ignore"):
            due, after = round_to(flat[start:stop], stored), raw.astype(work)
            differs = bits_differ(due, raw)
            away = np.abs(after - flat[start:stop].astype(work)) / half_ulp(after.copy(), held, stored)
        away[~differs] = 0
        equal += int(np.count_nonzero(~differs))
        off = max(off, float(away.max(initial=0)) / 2)
        fits &= bool((away <= 2 * HALF).all())
    return fits, equal / flat.size if flat.size else 1.0, off if np.isfinite(off) else 0.0


def held_dtype(checkpoint: Checkpoint, name: str) -> np.dtype[Any]:
    """The narrowest dtype that holds all sampled values: a float32 file may hold values that were computed in bfloat16.

    It is the stored dtype if the sample has fewer than three distinct values.
    """
    stored, size = checkpoint.dtype(name), numel(checkpoint.shape(name))
    work = working_dtype(stored)
    values = np.concatenate([np.empty(0, work), *(part.astype(work) for part in sample(checkpoint, name, size))])
    if distinct(values[values != 0]).size < 3 or not np.isfinite(values).all():
        return stored
    for narrow in (FLOATS["BF16"], FLOATS["F16"], FLOATS["F32"]):
        if float_info(narrow).nmant < float_info(stored).nmant:
            with np.errstate(over="ignore"):
                if np.array_equal(round_to(values, narrow).astype(work), values):
                    return narrow
    return stored


def sample(checkpoint: Checkpoint, name: str, size: int) -> Iterator[Array]:
    """Runs of elements, evenly spaced from the first to the last."""
    length = min(_RUN, size)
    for start in sorted({i * (size - length) // (_RUNS - 1) for i in range(_RUNS)}) if length else ():
        yield checkpoint.part(name, start, start + length).copy()


def half_ulp(values: Array, held: np.dtype[Any], stored: np.dtype[Any]) -> Array:
    """Half the distance from each value to the next larger one of dtype ``held``: no rounding to it is larger."""
    half: Array
    if values.dtype == np.float64:
        half = (values.view(np.uint64) & np.uint64(0x7FF << 52)).view(np.float64)
    else:
        half = (values.view(np.uint32) & np.uint32(0xFF << 23)).view(np.float32)
    half *= values.dtype.type(2.0 ** -(float_info(held).nmant + 1))
    least = max(float(float_info(dtype).smallest_subnormal) for dtype in (held, stored)) / 2
    np.maximum(half, max(values.dtype.type(least), np.finfo(values.dtype).smallest_subnormal), out=half)
    return half


def holds_all_of(dtype: np.dtype[Any], other: np.dtype[Any]) -> bool:
    """Whether ``dtype`` has every value of ``other``."""
    mine, its = float_info(dtype), float_info(other)
    return bool(
        mine.nmant >= its.nmant
        and float(mine.smallest_subnormal) <= float(its.smallest_subnormal)
        and float(mine.max) >= float(its.max)
    )


def float_info(dtype: np.dtype[Any]) -> Any:
    """Limits and precision of a float dtype, one of ml_dtypes' too."""
    return ml_dtypes.finfo(dtype)
