"""How evenly entries are spread, beside what a mask drawn uniformly at random would give: exact means and deviations.

*Uniform* means that every set of as many entries is as likely: K of N elements without replacement. Then the counts of rows (and
of columns) are hypergeometric, and the elements left out between the entries, K + 1 numbers that add up to N - K, are any such
numbers with the same chance, close to the geometric law. The *index of dispersion* of some numbers is their sample variance over
their mean; its mean and standard deviation follow from factorial moments, computed here in rational numbers without rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from shira_format._core.arrays import Array

# E[(X)_a (Y)_b] for two of the numbers, (X)_a = X (X - 1) ... (X - a + 1); with b = 0, of one.
Moments = Callable[[int, int], Fraction]


@dataclass(frozen=True)
class Compared:
    """A figure, and its mean and standard deviation for uniform masks of as many entries."""

    found: float
    expected: float
    deviation: float

    @property
    def z(self) -> float | None:
        """How many standard deviations it is above the mean; None if uniform masks have no other value."""
        return (self.found - self.expected) / self.deviation if self.deviation else None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"found": self.found, "uniform": self.expected, "deviation": self.deviation, "z": self.z}


def mean_of(figures: Sequence[Compared]) -> Compared | None:
    """The mean of figures of several tensors, whose masks are drawn apart; None of none."""
    if not figures:
        return None
    count = len(figures)
    return Compared(
        sum(figure.found for figure in figures) / count,
        sum(figure.expected for figure in figures) / count,
        math.hypot(*(figure.deviation for figure in figures)) / count,
    )


def dispersion_of_counts(counts: Array, boxes: int, size: int) -> Compared | None:
    """The index of dispersion of how many entries each row, or each column, has.

    Args:
        counts: of the rows that have some, int64.
        boxes: how many rows there are.
        size: elements of each.

    Returns:
        None if there are no entries or fewer than two rows.
    """
    entries, total = int(counts.sum()), boxes * size

    def moments(a: int, b: int) -> Fraction:
        if entries < a + b:
            return Fraction(0)
        return Fraction(
            math.perm(size, a) * math.perm(size, b) * math.perm(entries, a + b), math.perm(total, a + b)
        )

    return _dispersion(counts, boxes, entries, moments)


def dispersion_of_gaps(indices: Array, total: int) -> Compared | None:
    """The index of dispersion of how many elements are left out before, between and after the entries.

    Args:
        indices: flat, strictly increasing, int64 ``[nnz]``.
        total: elements of the tensor.

    Returns:
        None if there are no entries, or none is left out.
    """
    parts, left = indices.size + 1, total - indices.size
    gaps = np.diff(indices, prepend=-1, append=total) - 1

    def moments(a: int, b: int) -> Fraction:
        rising = math.prod(range(parts, parts + a + b))
        return Fraction(math.perm(left, a + b) * math.factorial(a) * math.factorial(b), rising)

    return _dispersion(gaps, parts, left, moments)


def _dispersion(counts: Array, boxes: int, total: int, moments: Moments) -> Compared | None:
    """For ``boxes`` numbers, any two as any other two, that add up to ``total``; ``counts`` has those that are not 0."""
    if boxes < 2 or total == 0:
        return None
    mean = total / boxes
    apart = float(np.square(counts - mean).sum()) + (boxes - counts.size) * mean * mean
    # With Y the sum of X (X - 1), the sum of squares is Y + total, so both vary alike. X (X - 1) squared is
    # (X)_4 + 4 (X)_3 + 2 (X)_2.
    first = boxes * moments(2, 0)
    own = moments(4, 0) + 4 * moments(3, 0) + 2 * moments(2, 0)
    second = boxes * own + boxes * (boxes - 1) * moments(2, 2)
    scale = Fraction(boxes, (boxes - 1) * total)
    expected = scale * (first + total - Fraction(total * total, boxes))
    variance = second - first * first
    return Compared(
        apart / ((boxes - 1) * mean),
        float(expected),
        math.sqrt(float(scale * scale * variance)) if variance > 0 else 0.0,
    )


def lines_with_entries(found: int, boxes: int, size: int, entries: int) -> Compared:
    """How many rows, or columns, have entries: ``found`` of ``boxes`` with ``size`` elements each."""
    total = boxes * size
    if size == 1:
        return Compared(found, entries, 0.0)
    # The chance that a row is empty, and that two are, over the square of the first; products over the fewer factors, in
    # logarithms, and the second as itself: as a difference of logarithms it would drown in rounding.
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
    return Compared(found, boxes * -math.expm1(one), math.sqrt(max(0.0, variance)))


def _product(terms: Array) -> float:
    """The logarithm of the product of ``1 + terms``."""
    if (terms <= -1).any():
        return -math.inf
    return float(np.log1p(terms).sum())


def adjacent_entries(found: int, entries: int, total: int) -> Compared:
    """How many entries follow the one before them at once, in flat order."""

    def chance(count: int) -> Fraction:
        return Fraction(math.perm(entries, count), math.perm(total, count)) if entries >= count else Fraction(0)

    pairs = max(0, total - 1)  # places for two; two of these places share one, or none
    chained = 2 * max(0, total - 2)
    first = pairs * chance(2)
    second = first + chained * chance(3) + (pairs * pairs - pairs - chained) * chance(4)
    variance = second - first * first
    return Compared(found, float(first), math.sqrt(float(variance)) if variance > 0 else 0.0)
