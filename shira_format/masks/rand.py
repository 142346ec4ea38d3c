"""Rand: a uniformly random mask (SHiRA, arXiv 2406.13175, section 3.1), other entries for each weight's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format.format.codecs import seed_of
from shira_format.format.codecs.seeded import Permutation, drawn
from shira_format.masks.base import Gradients, ScoredRule
from shira_format.masks.scores import Scores
from shira_format.masks.weights import Weight


@dataclass(frozen=True)
class Rand(ScoredRule):
    """The first entries of a random permutation, that of the format's codec ``random`` (spec, section 5.7).

    The text that determines it is ``"SEED NAME"``, so that neither the number of threads nor the order of the weights matters,
    and bands are disjoint. A file stores the text in place of the entries.

    Attributes:
        seed: an integer of at least 0.
    """

    name: ClassVar[str] = "rand"
    seed: int = 0

    @property
    def notes(self) -> dict[str, Any]:
        """The seed."""
        return {"seed": self.seed}

    def drawn(self, weight: Weight, size: int, count: int, band: int) -> Indices:
        """``count`` of ``size`` entries (or runs) of a weight: those of the best scores, in time proportional to their number."""
        return drawn(seed_of(self.notes, weight.name), size, count, band)

    def scores(self, weight: Weight, gradients: Gradients | None) -> Scores:
        """Equally spaced in (0, 1], float64: 1 for the entry that the permutation gives first."""
        permutation = Permutation(seed_of(self.notes, weight.name), max(1, weight.size))

        def fill(start: int, stop: int, out: Array) -> None:
            np.subtract(weight.size, permutation.back(np.arange(start, stop, dtype=np.int64)), out=out)
            out /= weight.size

        return Scores(weight, fill, np.dtype(np.float64))
