"""TaLoS: the lowest Fisher information (Iurada et al., arXiv 2504.02620; github.com/iurada/talos-task-arithmetic)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shira_format._core.arrays import Array
from shira_format.masks.base import Gradients, ScoredRule
from shira_format.masks.scores import Scores
from shira_format.masks.weights import Weight


@dataclass(frozen=True)
class Talos(ScoredRule):
    """The smallest sums of squared gradients: the diagonal of the Fisher information, if each batch is one sample and the loss is
    the negative log-probability of an output drawn from the model itself, as in the paper. With the labels of the data it is the
    empirical Fisher information. The paper ranks all weights together: give it the scope ``"global"``.
    """

    name: ClassVar[str] = "talos"
    gradients: ClassVar[str] = "squares"

    def scores(self, weight: Weight, gradients: Gradients | None) -> Scores:
        """The sum of squares in float32, the smallest first."""
        assert gradients is not None
        squares = gradients(weight.name)

        def fill(start: int, stop: int, out: Array) -> None:
            out[:] = squares(start, stop)

        return Scores(weight, fill, smallest=True)
