"""Inner loops, compiled by numba if it is installed, else in numpy.

Compiled loops make one pass where numpy makes several: gap8 decodes five times as fast. Importing numba takes half a
second, so :func:`load` is called only by code that switches adapters on live models.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format.errors import FormatError

_loading = threading.Lock()
_kernels: Any = None


def load() -> bool:
    """Use compiled loops from now on if numba is installed; returns whether they are used."""
    global _kernels  # noqa: PLW0603 - set once
    with _loading:
        if _kernels is None:
            try:
                from shira_format._core import kernels
            except ImportError:
                return False
            _kernels = kernels
    return True


def loaded() -> Any:
    """The compiled functions of :mod:`shira_format._core.kernels`, or None."""
    return _kernels


def as_unsigned(flat: Array) -> Array:
    """A contiguous array's bits as flat unsigned integers of the same item size, in the same memory."""
    return flat.reshape(-1).view(f"u{flat.dtype.itemsize}")


def check_within(indices: Indices, size: int) -> None:
    """Check that strictly increasing indices are within ``size`` elements: in any case, before memory is written there.

    Raises:
        FormatError: the first or the last is not.
    """
    if indices.size and not (indices[0] >= 0 and indices[-1] < size):
        raise FormatError("out-of-range", f"indices {indices[0]} to {indices[-1]} for {size} elements")


def check_count(size: int, *arrays: Array) -> None:
    """Raise FormatError unless all arrays have ``size`` elements."""
    for array in arrays:
        if array.size != size:
            raise FormatError("count-mismatch", f"{array.size} values for {size} entries")


def take(flat: Array, indices: Indices) -> Array:
    """``flat[indices]`` as a new array of the same dtype; indices are strictly increasing.

    Raises:
        FormatError: they lead outside.
    """
    check_within(indices, flat.size)
    out = np.empty(indices.size, flat.dtype)
    source, bits = as_unsigned(flat), as_unsigned(out)
    if _kernels is not None:
        _kernels.take(source, indices, bits)
    elif indices.size:
        np.take(source, indices, out=bits, mode="clip")  # "raise" would make another copy
    return out


def put(flat: Array, indices: Indices, values: Array) -> None:
    """``flat[indices] = values``, of the same dtype; indices are strictly increasing.

    Raises:
        FormatError: they lead outside, or there is another number of values; nothing was written.
    """
    check_within(indices, flat.size)
    check_count(indices.size, values)
    target, bits = as_unsigned(flat), as_unsigned(np.ascontiguousarray(values))
    if _kernels is not None:
        _kernels.put(target, indices, bits)
    else:
        target[indices] = bits


def is_strictly_increasing(indices: Indices) -> bool:
    """Whether ``indices`` are strictly increasing."""
    if _kernels is not None:
        return bool(_kernels.is_strictly_increasing(indices))
    return bool((indices[1:] > indices[:-1]).all())


def exchange(flat: Array, old: Indices, old_base: Array, new: Indices, new_values: Array) -> Array:
    """Write ``old_base`` at ``old``, then ``new_values`` at ``new``; returns what was at ``new`` in between.

    Indices are strictly increasing; values have the dtype of ``flat``.

    Raises:
        FormatError: they lead outside, or there is another number of values; nothing was written.
    """
    check_within(old, flat.size)
    check_within(new, flat.size)
    check_count(old.size, old_base)
    check_count(new.size, new_values)
    if _kernels is None:
        put(flat, old, old_base)
        base = take(flat, new)
        put(flat, new, new_values)
        return base
    base = np.empty(new.size, flat.dtype)
    arrays = [as_unsigned(np.ascontiguousarray(array)) for array in (old_base, new_values)]
    _kernels.exchange(as_unsigned(flat), old, arrays[0], new, arrays[1], as_unsigned(base))
    return base


def overlay(values: Array, indices: Indices, other: Indices, other_values: Array) -> int:
    """Where ``indices`` are also in ``other`` (both strictly increasing), set ``values`` to ``other_values``; returns how many."""
    check_count(indices.size, values)
    check_count(other.size, other_values)
    if _kernels is not None:
        return int(_kernels.overlay(as_unsigned(values), indices, other, as_unsigned(other_values)))
    if not indices.size or not other.size:
        return 0
    at = np.searchsorted(other, indices)
    at[at == other.size] = 0
    meet = other[at] == indices
    values[meet] = other_values[at[meet]]
    return int(np.count_nonzero(meet))


def union(lists: Sequence[Indices]) -> tuple[Indices, list[Indices]]:
    """The union of strictly increasing lists, strictly increasing, and where in it the items of each list are."""
    filled = [one for one in lists if one.size]
    if len(filled) <= 1:
        every = filled[0] if filled else np.empty(0, np.int64)
        return every, [np.arange(one.size, dtype=np.int64) for one in lists]
    if _kernels is not None:
        return _union_two_by_two(lists)
    together = np.concatenate(lists)
    order = np.argsort(together, kind="stable")  # a merge: each list is sorted
    ordered = together[order]
    first = np.ones(ordered.size, bool)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    at = np.empty(together.size, np.int64)
    at[order] = np.cumsum(first) - 1
    return ordered[first], np.split(at, np.cumsum([one.size for one in lists])[:-1])


def _union_two_by_two(lists: Sequence[Indices]) -> tuple[Indices, list[Indices]]:
    every, places = lists[0], [np.arange(lists[0].size, dtype=np.int64)]
    for other in lists[1:]:
        joined = np.empty(every.size + other.size, np.int64)
        moved, at = np.empty(every.size, np.int64), np.empty(other.size, np.int64)
        every = joined[: _kernels.union(every, other, joined, moved, at)]
        places = [moved[old] for old in places] if len(places) > 1 else [moved]
        places.append(at)
    return every, places


def mixed(target: Array, own: Array, factors: Array) -> Array:
    """``own + factors * (target - own)``, rounded once; where a factor is 1, ``target`` bit for bit.

    Args:
        target: ``[k]``.
        own: ``[k]``, in the same dtype.
        factors: float32 (float64 for float64 values) ``[k]``, or ``[1]`` for all.
    """
    check_count(target.size, own, *([factors] if factors.size != 1 else []))
    if factors.size == 1 and factors[0] == 1:
        return target
    if _kernels is not None and target.dtype.name == "bfloat16":
        new = np.empty(target.size, target.dtype)
        arrays = (as_unsigned(np.ascontiguousarray(one)) for one in (target, own))
        _kernels.mix_bfloat16(*arrays, factors, as_unsigned(new))
        return new
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are values like any other
        origin = own.astype(factors.dtype)
        new = np.asarray((origin + factors * (target.astype(factors.dtype) - origin)).astype(target.dtype))
    exact = np.flatnonzero(factors == 1)
    new[exact] = target[exact]
    return new


def scatter(
    at: Indices, new: Array, own: Array, factors: Array, values: Array, base: Array, known: Array, count: Array
) -> int:
    """Write one adapter's values to entries of a weight that other adapters may have set already.

    ``base[at] = own`` and ``known[at]`` is set; where the factor is not 0, ``count[at]`` counts one more and
    ``values[at] = new``.

    Args:
        at: int64 ``[k]``, strictly increasing positions in the arrays ``[n]``.
        new: ``[k]``, in the weight's dtype.
        own: ``[k]`` the base's values as this adapter has them.
        factors: ``[k]``, or ``[1]`` for all, then not 0.
        values: ``[n]``, changed.
        base: ``[n]``, changed.
        known: bool ``[n]``: where ``base`` is known, changed.
        count: int32 ``[n]``, changed.

    Returns:
        The number of an entry whose ``base`` was known and differs, or -1.

    Raises:
        FormatError: positions lead outside, or the arrays have other sizes; nothing was written.
    """
    check_within(at, values.size)
    check_count(values.size, base, known, count)
    check_count(at.size, new, own, *([factors] if factors.size != 1 else []))
    if _kernels is not None:
        arrays = (as_unsigned(np.ascontiguousarray(one)) for one in (new, own))
        return int(_kernels.scatter(at, *arrays, factors, as_unsigned(values), as_unsigned(base), known, count))
    met = np.flatnonzero(known[at])
    other = met[as_unsigned(base[at[met]]) != as_unsigned(own[met])]
    base[at], known[at] = own, True
    written = np.arange(at.size) if factors.size == 1 else np.flatnonzero(factors)
    count[at[written]] += 1
    values[at[written]] = new[written]
    return int(other[-1]) if other.size else -1
