"""Scores of a weight's entries, computed tile by tile, in the form in which the exact selection of the largest takes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, Indices, scratch
from shira_format.entries.changes import TILE, Tile
from shira_format.errors import SourceError
from shira_format.masks.limits import Allowed
from shira_format.masks.weights import Weight

_NOTHING = np.dtype(np.int8)  # of the columns for values, which a mask has not


@dataclass(frozen=True)
class Scores:
    """Scores of all entries of one weight: numbers of at least 0.

    Attributes:
        weight: the weight.
        fill: ``fill(start, stop, out)`` writes the scores of these flat positions to ``out``, ``[stop - start]`` in ``dtype``.
        dtype: float32 or float64.
        grain: pieces start at multiples of this, and end there or at the end of the weight.
        smallest: whether the smallest scores are the best, not the largest.
    """

    weight: Weight
    fill: Callable[[int, int, Array], None]
    dtype: np.dtype[Any] = np.dtype(np.float32)  # noqa: RUF009 - immutable
    grain: int = 1
    smallest: bool = False


@dataclass(frozen=True)
class Ranking:
    """The ranking of a weight's entries, or of its runs, as a change whose largest values are the best.

    Every value is above 0, and two scores compare as their values do: the selection takes no zeros, but a mask needs its full
    count where scores are 0. So a score's bits, read as an integer, are raised by one; and if the smallest are the best, they are
    first subtracted from those of the second largest number. Floats of one sign sort like their bits, so nothing is rounded.

    Attributes:
        scores: of the entries.
        length: entries of a run, whose score is the sum of theirs, added one after the other; 1: single entries.
        allowed: which of them may be chosen; None: all.
    """

    scores: Scores
    length: int = 1
    allowed: Allowed | None = None

    @property
    def name(self) -> str:
        return self.scores.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.scores.weight.shape if self.length == 1 else (self.size,)

    @property
    def weight_dtype(self) -> np.dtype[Any]:
        return _NOTHING

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.scores.dtype

    @property
    def size(self) -> int:
        return -(-self.scores.weight.size // self.length)

    @property
    def available(self) -> int:
        """How many may be chosen."""
        return self.size if self.allowed is None else self.allowed.count

    @property
    def grain(self) -> int:
        return self.scores.grain // math.gcd(self.scores.grain, self.length)

    def tile(self, start: int, stop: int, out: Array) -> Tile:
        """The ranks of these entries or runs, in ``out``, ``[stop - start]`` in ``dtype``.

        Raises:
            SourceError: a score is negative, infinite or no number.
        """
        if self.length == 1:
            self._fill(start, stop, out)
        else:
            step = max(1, TILE // self.length // self.grain) * self.grain
            for first in range(start, stop, step):
                last = min(first + step, stop)
                self._sum(first, last, out[first - start : last - start])
        unsigned = np.dtype(f"u{self.dtype.itemsize}")
        bits = out.view(unsigned)
        if self.scores.smallest:
            np.subtract(self._most().view(unsigned) - unsigned.type(1), bits, out=bits)
        bits += unsigned.type(1)
        if self.allowed is not None:
            self.allowed.bar(start, out)
        return Tile(out)

    def _most(self) -> Array:
        """The largest number, which a score stays below, so that its bits can be raised by one."""
        return np.array(np.finfo(self.dtype).max)

    def _fill(self, start: int, stop: int, out: Array) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            self.scores.fill(start, stop, out)
        if out.size and not (np.min(out) >= 0 and np.max(out) < self._most()):  # false for NaN, too
            raise SourceError(f"tensor {self.name!r}: a score is negative, infinite or not a number")
        out += out.dtype.type(0)  # -0 becomes 0, whose bits are 0

    def _sum(self, start: int, stop: int, out: Array) -> None:
        first, last = start * self.length, min(stop * self.length, self.scores.weight.size)
        padded = scratch("scores of runs", (stop - start) * self.length, self.dtype)
        self._fill(first, last, padded[: last - first])
        padded[last - first :] = 0
        columns = padded.reshape(-1, self.length)
        out[:] = columns[:, 0]
        with np.errstate(over="ignore"):
            for place in range(1, self.length):
                out += columns[:, place]
        if out.size and not np.max(out) < self._most():
            raise SourceError(f"tensor {self.name!r}: the score of a run overflows {self.dtype}")

    def completed(self, indices: Indices, values: Array) -> tuple[Array, Array]:
        """Nothing, once for each entry: a mask has no values."""
        nothing = np.zeros(indices.size, _NOTHING)
        return nothing, nothing

    def entries(self, found: Indices) -> Indices:
        """The flat positions in the weight of entries or runs, int64, strictly increasing."""
        if self.length == 1:
            return found
        indices: Indices = (found[:, None] * self.length + np.arange(self.length)).reshape(-1)
        return indices[indices < self.scores.weight.size]
