"""From class numbers to contexts: which classes share a table (spec, section 5.10.2)."""

from __future__ import annotations

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format.errors import FormatError
from shira_format.format.compact.bits import BitReader, BitWriter

MAX_CONTEXTS = 63
_NUMBER = 12  # bits of a class number


def merged(classes: Indices, costs: Array) -> Indices:
    """Neighbouring classes put together so that all take the fewest bits.

    Args:
        classes: the class numbers that have entries, int64 ``[k]``, strictly increasing.
        costs: float64 ``[k + 1, k + 1]``: at ``[i, j]``, ``i < j``, the bits of the classes from the ``i``-th to the one before the
            ``j``-th together, their table included.

    Returns:
        The bounds, int64 ``[contexts + 1]``: context ``c`` has the classes from ``bounds[c]`` to the one before ``bounds[c + 1]``.
    """
    count = classes.size
    best = np.full(count + 1, np.inf)
    best[0] = 0
    came = np.zeros(count + 1, np.int64)
    steps = np.zeros(count + 1, np.int64)
    for j in range(1, count + 1):
        totals = best[:j] + costs[:j, j]
        totals[steps[:j] >= MAX_CONTEXTS] = np.inf
        came[j] = int(np.argmin(totals))
        best[j], steps[j] = totals[came[j]], steps[came[j]] + 1
    starts, j = [], count
    while j:
        j = int(came[j])
        starts.append(int(classes[j]))
    return np.array([*reversed(starts), int(classes[-1]) + 1], np.int64)


def lookup(bounds: Indices, size: int) -> Array:
    """The context of each class number below ``size``, uint8; the number of contexts for a class that is in none."""
    found = np.searchsorted(bounds, np.arange(size), "right") - 1
    found[(found < 0) | (found >= bounds.size - 1)] = bounds.size - 1
    return found.astype(np.uint8)


def write_bounds(bits: BitWriter, bounds: Indices) -> None:
    """Append the number of contexts and their bounds."""
    bits.put(bounds.size - 1, 6)
    for bound in bounds.tolist():
        bits.put(bound, _NUMBER)


def read_bounds(bits: BitReader) -> Indices:
    """What :func:`write_bounds` wrote.

    Raises:
        FormatError: there are no contexts, or the bounds do not increase.
    """
    count = bits.take(6)
    bounds = np.array([bits.take(_NUMBER) for _ in range(count + 1)], np.int64)
    if count == 0 or (np.diff(bounds) <= 0).any():
        raise FormatError("coder", "the bounds of the contexts do not increase")
    return bounds


def exponent_field(dtype: np.dtype[np.generic]) -> tuple[int, int]:
    """Of a float dtype, how far its exponent is shifted in its bits, and the exponent's mask after that."""
    width = 8 * dtype.itemsize
    exponent = {"float64": 11, "float32": 8, "float16": 5, "bfloat16": 8, "float8_e4m3fn": 4, "float8_e5m2": 5}[
        dtype.name
    ]
    return width - 1 - exponent, (1 << exponent) - 1
