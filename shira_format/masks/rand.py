"""Rand: a uniformly random mask (SHiRA, arXiv 2406.13175, section 3.1), other entries for each weight's name."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from shira_format._core.arrays import Array
from shira_format.masks.base import Gradients, ScoredRule
from shira_format.masks.scores import Scores
from shira_format.masks.weights import Weight

_WORDS = 4  # that the generator makes at a time


@dataclass(frozen=True)
class Rand(ScoredRule):
    """Random scores: the entry at position ``i`` has the ``i``-th number of a Philox generator.

    Its key is the first 16 bytes of the SHA-256 of ``"SEED NAME"``, so that neither the number of threads nor the order of the
    weights matters, bands are disjoint random masks, and runs are random runs.

    Attributes:
        seed: an integer of at least 0.
    """

    name: ClassVar[str] = "rand"
    seed: int = 0

    @property
    def notes(self) -> dict[str, Any]:
        """The seed."""
        return {"seed": self.seed}

    def scores(self, weight: Weight, gradients: Gradients | None) -> Scores:
        """Uniform in [0, 1), float64: 53 random bits."""
        digest = hashlib.sha256(f"{self.seed} {weight.name}".encode()).digest()
        key = np.frombuffer(digest[:16], "<u8").astype(np.uint64)

        def fill(start: int, stop: int, out: Array) -> None:
            generator = np.random.Philox(key=key)
            generator.advance(start // _WORDS)
            words = generator.random_raw(stop - start)
            np.multiply(words >> np.uint64(11), 2.0**-53, out=out)

        return Scores(weight, fill, np.dtype(np.float64), _WORDS)
