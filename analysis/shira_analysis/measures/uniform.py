"""How evenly entries are spread, compared with the exact mean and standard deviation for uniformly random masks.

*Uniform* means K of N elements drawn without replacement. Then entries per row (or column) are hypergeometric, and the K + 1 gaps
between entries, which sum to N - K, are uniform over all such sequences, so nearly geometric. The *index of dispersion* is the
sample variance over the mean; its mean and standard deviation follow from factorial moments, computed exactly in rationals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from shira_format._core.arrays import Array

# (a, b) -> E[(X)_a (Y)_b] for two of the counts X, Y, with (X)_a = X (X - 1) ... (X - a + 1); b = 0 for one count.
Moments = Callable[[int, int], Fraction]
# What is expected is kept for so many sizes: an adapter has many tensors of few sizes.
_KEPT = 1 << 12


@dataclass(frozen=True)
class Compared:
    """A figure, with its mean and standard deviation for uniform masks of the same nnz."""

    found: float
    expected: float
    deviation: float

    @property
    def z(self) -> float | None:
        """Standard deviations above the mean; None if the deviation is 0."""
        return (self.found - self.expected) / self.deviation if self.deviation else None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"found": self.found, "uniform": self.expected, "deviation": self.deviation, "z": self.z}


def mean_of(figures: Sequence[Compared]) -> Compared | None:
    """The mean of figures of several tensors with independent masks; None if there are none."""
    if not figures:
        return None
    count = len(figures)
    return Compared(
        sum(figure.found for figure in figures) / count,
        sum(figure.expected for figure in figures) / count,
        math.hypot(*(figure.deviation for figure in figures)) / count,
    )


def dispersion_of_counts(counts: Array, boxes: int, size: int) -> Compared | None:
    """The index of dispersion of the number of entries per row, or per column.

    Args:
        counts: entries of each nonempty row, int64.
        boxes: number of rows.
        size: elements per row.

    Returns:
        None if there are no entries or fewer than two rows.
    """
    entries = int(counts.sum())
    return _dispersion(counts, boxes, entries, lambda: _of_counts(entries, boxes, size))


@lru_cache(_KEPT)
def _of_counts(entries: int, boxes: int, size: int) -> tuple[float, float]:
    """Mean and deviation of the index of dispersion of counts."""

    def moments(a: int, b: int) -> Fraction:
        if entries < a + b:
            return Fraction(0)
        return Fraction(
            math.perm(size, a) * math.perm(size, b) * math.perm(entries, a + b), math.perm(boxes * size, a + b)
        )

    return _expected(boxes, entries, moments)


def dispersion_of_gaps(indices: Array, total: int) -> Compared | None:
    """The index of dispersion of the gaps before, between and after the entries.

    Args:
        indices: flat, strictly increasing, int64 ``[nnz]``.
        total: elements of the tensor.

    Returns:
        None if there are no entries, or no gaps.
    """
    parts, left = indices.size + 1, total - indices.size
    gaps = np.diff(indices, prepend=-1, append=total) - 1
    return _dispersion(gaps, parts, left, lambda: _of_gaps(parts, left))


@lru_cache(_KEPT)
def _of_gaps(parts: int, left: int) -> tuple[float, float]:
    """Mean and deviation of the index of dispersion of gaps."""

    def moments(a: int, b: int) -> Fraction:
        rising = math.prod(range(parts, parts + a + b))
        return Fraction(math.perm(left, a + b) * math.factorial(a) * math.factorial(b), rising)

    return _expected(parts, left, moments)


def _dispersion(
    counts: Array, boxes: int, total: int, expected: Callable[[], tuple[float, float]]
) -> Compared | None:
    """For ``boxes`` exchangeable counts with the sum ``total``; ``counts`` may omit zeros."""
    if boxes < 2 or total == 0:
        return None
    mean = total / boxes
    squares = float(np.square(counts - mean).sum()) + (boxes - counts.size) * mean * mean
    return Compared(squares / ((boxes - 1) * mean), *expected())


def _expected(boxes: int, total: int, moments: Moments) -> tuple[float, float]:
    """Mean and deviation of the index of dispersion under uniform masks."""
    # With Y the sum of X (X - 1), the sum of squares is Y + total, so both have the same variance. X (X - 1) squared is
    # (X)_4 + 4 (X)_3 + 2 (X)_2.
    first = boxes * moments(2, 0)
    own = moments(4, 0) + 4 * moments(3, 0) + 2 * moments(2, 0)
    second = boxes * own + boxes * (boxes - 1) * moments(2, 2)
    scale = Fraction(boxes, (boxes - 1) * total)
    expected = scale * (first + total - Fraction(total * total, boxes))
    variance = second - first * first
    return float(expected), math.sqrt(float(scale * scale * variance)) if variance > 0 else 0.0


def lines_with_entries(found: int, boxes: int, size: int, entries: int) -> Compared:
    """The number of nonempty rows, or columns: ``found`` of ``boxes``, with ``size`` elements each."""
    return Compared(found, *_of_lines(boxes, size, entries))


@lru_cache(_KEPT)
def _of_lines(boxes: int, size: int, entries: int) -> tuple[float, float]:
    """Mean and deviation of the number of nonempty rows."""
    total = boxes * size
    if size == 1:
        return entries, 0.0
    # Logarithms of P(a row is empty) and of P(two rows are empty) / P(a row is empty)^2, as products over the fewer factors.
    # The ratio is computed directly, since a difference of logarithms would lose it to rounding.
    steps = np.arange(min(size, entries), dtype=np.float64)
    more = max(size, entries)
    one = _product(-more / (total - steps))
    if entries <= size:
        two = _product(-((size / np.maximum(total - size - steps, 0.5)) ** 2))
    else:
        left = np.maximum(total - entries - steps, 0.5)
        two = _product(-size * entries / (np.maximum(total - size - steps, 0.5) * left))
    empty = math.exp(one)
    variance = boxes * empty * (1 - empty)
    if empty and boxes > 1:
        variance += boxes * (boxes - 1) * empty * empty * math.expm1(two)
    return boxes * -math.expm1(one), math.sqrt(max(0.0, variance))


def _product(terms: Array) -> float:
    """The logarithm of the product of ``1 + terms``."""
    if (terms <= -1).any():
        return -math.inf
    return float(np.log1p(terms).sum())


def adjacent_entries(found: int, entries: int, total: int) -> Compared:
    """The number of entries directly after another in flat order."""
    return Compared(found, *_of_neighbours(entries, total))


@lru_cache(_KEPT)
def _of_neighbours(entries: int, total: int) -> tuple[float, float]:
    """Mean and deviation of the number of entries directly after another."""

    def chance(count: int) -> Fraction:
        return Fraction(math.perm(entries, count), math.perm(total, count)) if entries >= count else Fraction(0)

    pairs = max(0, total - 1)  # adjacent positions; two of these pairs share one position, or none
    chained = 2 * max(0, total - 2)
    first = pairs * chance(2)
    second = first + chained * chance(3) + (pairs * pairs - pairs - chained) * chance(4)
    variance = second - first * first
    return float(first), math.sqrt(float(variance)) if variance > 0 else 0.0
