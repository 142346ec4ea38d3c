"""GaLLoP: large gradients on small weights (Choudhary et al., arXiv 2510.19778)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from shira_format._core.arrays import Array
from shira_format.masks.base import Gradients, ScoredRule
from shira_format.masks.scores import Scores
from shira_format.masks.weights import Weight


@dataclass(frozen=True)
class Gallop(ScoredRule):
    """``|g| / (|w| + epsilon)``, where ``g`` is the sum of the batches' gradients (the paper's mean ranks alike).

    Attributes:
        epsilon: above 0; it decides among the weights that are 0.
    """

    name: ClassVar[str] = "gallop"
    gradients: ClassVar[str] = "sum"
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        """Raise ValueError unless epsilon is positive."""
        if not self.epsilon > 0:
            raise ValueError(f"epsilon {self.epsilon} is not above 0")

    @property
    def notes(self) -> dict[str, Any]:
        """Epsilon."""
        return {"epsilon": self.epsilon}

    def scores(self, weight: Weight, gradients: Gradients | None) -> Scores:
        """The ratio in float64: with a weight of 0 it is 10^8 times the gradient."""
        assert gradients is not None
        gradient = gradients(weight.name)

        def fill(start: int, stop: int, out: Array) -> None:
            out[:] = weight.part(start, stop)
            np.abs(out, out=out)
            out += self.epsilon
            np.divide(np.abs(gradient(start, stop)), out, out=out)

        return Scores(weight, fill, np.dtype(np.float64))
