"""Grad: the largest gradients of a calibration set (SHiRA, arXiv 2406.13175, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from shira_format._core.arrays import Array
from shira_format.masks.base import Gradients, ScoredRule
from shira_format.masks.scores import Scores
from shira_format.masks.weights import Weight


@dataclass(frozen=True)
class Grad(ScoredRule):
    """``|g|``, where ``g`` is the sum of the batches' gradients."""

    name: ClassVar[str] = "grad"
    gradients: ClassVar[str] = "sum"

    def scores(self, weight: Weight, gradients: Gradients | None) -> Scores:
        """``|g|`` in float32."""
        assert gradients is not None
        gradient = gradients(weight.name)

        def fill(start: int, stop: int, out: Array) -> None:
            np.abs(gradient(start, stop), out=out)

        return Scores(weight, fill)
