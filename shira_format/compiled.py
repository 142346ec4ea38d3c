"""Inner loops as machine code, if numba is installed; the same in numpy, if it is not.

numpy makes several passes where these make one: decoding gap8 takes a fifth of the time. numba takes half a second to
import and to compile once for each machine, so :func:`load` is called by whoever switches adapters on live models, and a
program that only looks at a file pays nothing.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from shira_format.arrays import Array

Indices = npt.NDArray[np.int64]

_loading = threading.Lock()
_kernels: Any = None


def load() -> bool:
    """Use machine code from now on, if numba is there; whether it is used."""
    global _kernels  # noqa: PLW0603 - set once
    with _loading:
        if _kernels is None:
            try:
                from shira_format import kernels
            except ImportError:
                return False
            _kernels = kernels
    return True


def loaded() -> Any:
    """The compiled functions of :mod:`shira_format.kernels`, or None."""
    return _kernels


def unsigned(flat: Array) -> Array:
    """The bits of a contiguous array as unsigned integers of its item's size, ``[n]``, in the same memory."""
    return flat.reshape(-1).view(f"u{flat.dtype.itemsize}")


def take(flat: Array, indices: Indices) -> Array:
    """``flat[indices]`` for indices that were checked, as a new array of the same dtype."""
    out = np.empty(indices.size, flat.dtype)
    source, bits = unsigned(flat), unsigned(out)
    if _kernels is not None:
        _kernels.take(source, indices, bits)
    elif indices.size:
        np.take(source, indices, out=bits, mode="clip")  # "raise" would make another copy
    return out


def put(flat: Array, indices: Indices, values: Array) -> None:
    """``flat[indices] = values`` for indices that were checked and values of the same dtype."""
    target, bits = unsigned(flat), unsigned(np.ascontiguousarray(values))
    if _kernels is not None:
        _kernels.put(target, indices, bits)
    else:
        target[indices] = bits


def rises(indices: Indices) -> bool:
    """Whether ``indices`` strictly rise."""
    if _kernels is not None:
        return bool(_kernels.rises(indices))
    return bool((indices[1:] > indices[:-1]).all())


def exchange(flat: Array, old: Indices, old_base: Array, new: Indices, new_values: Array) -> Array:
    """Put ``old_base`` back at ``old``, then ``new_values`` at ``new``; what was at ``new`` in between.

    All indices rise and were checked; all values are of the dtype of ``flat``.
    """
    if _kernels is None:
        put(flat, old, old_base)
        base = take(flat, new)
        put(flat, new, new_values)
        return base
    base = np.empty(new.size, flat.dtype)
    arrays = [unsigned(np.ascontiguousarray(array)) for array in (old_base, new_values)]
    _kernels.exchange(unsigned(flat), old, arrays[0], new, arrays[1], unsigned(base))
    return base


def overlay(values: Array, indices: Indices, other: Indices, other_values: Array) -> int:
    """Where ``indices`` and ``other`` (both rising) meet, let ``values`` be ``other_values``; how often that is."""
    if _kernels is not None:
        return int(_kernels.overlay(unsigned(values), indices, other, unsigned(other_values)))
    if not indices.size or not other.size:
        return 0
    at = np.searchsorted(other, indices)
    at[at == other.size] = 0
    meet = other[at] == indices
    values[meet] = other_values[at[meet]]
    return int(np.count_nonzero(meet))
