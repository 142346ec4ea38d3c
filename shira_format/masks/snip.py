"""SNIP: the largest products of gradient and weight (SHiRA, arXiv 2406.13175, section 3.1; Lee et al., arXiv 1810.02340)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from shira_format._core.arrays import Array
from shira_format.masks.base import Gradients, ScoredRule
from shira_format.masks.scores import Scores
from shira_format.masks.weights import Weight
from shira_format.masks.wm import values


@dataclass(frozen=True)
class Snip(ScoredRule):
    """``|g w|``, where ``g`` is the sum of the batches' gradients."""

    name: ClassVar[str] = "snip"
    gradients: ClassVar[str] = "sum"

    def scores(self, weight: Weight, gradients: Gradients | None) -> Scores:
        """``|g w|`` in float32."""
        assert gradients is not None
        gradient = gradients(weight.name)

        def fill(start: int, stop: int, out: Array) -> None:
            np.multiply(gradient(start, stop), values(weight, start, stop, out.dtype), out=out)
            np.abs(out, out=out)

        return Scores(weight, fill)
