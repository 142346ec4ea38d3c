"""Zeros that fill a layer up to the number of entries that PEFT requires."""

from __future__ import annotations

import numpy as np

from shira_format._core.arrays import Array, Indices


def padded(indices: Indices, values: Array, size: int) -> tuple[Indices, Array]:
    """``size`` entries: those given, and zeros at the first free positions.

    Args:
        indices: int64 ``[n]``, strictly increasing.
        values: ``[n]`` floats.
        size: ``n`` or more, and no more than the weight has elements.

    Returns:
        Indices, strictly increasing, and values, both ``[size]``.
    """
    count = size - indices.size
    if count == 0:
        return indices, values
    # The number of free positions before each entry; the j-th free one follows all entries with at most j.
    before = indices - np.arange(indices.size)
    free = np.arange(count)
    free += np.searchsorted(before, free, side="right")
    places = np.concatenate([indices, free])
    # -0.0, which when added keeps even a -0.0 of the base.
    filled = np.concatenate([values, np.full(count, -0.0, values.dtype)])
    order = np.argsort(places, kind="stable")
    return places[order], filled[order]
