"""WM: the largest weights by magnitude (SHiRA, arXiv 2406.13175, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.dtypes import upcast, working_dtype
from shira_format.masks.base import Gradients, ScoredRule
from shira_format.masks.scores import Scores
from shira_format.masks.weights import Weight


@dataclass(frozen=True)
class WM(ScoredRule):
    """``|w|``. With a band, the paper's non-overlapping masks: the next so many for each further task."""

    name: ClassVar[str] = "wm"

    def scores(self, weight: Weight, gradients: Gradients | None) -> Scores:
        """``|w|`` in float32, in float64 of a float64 weight."""
        return Scores(weight, partial(magnitudes, weight), working_dtype(weight.dtype))


def magnitudes(weight: Weight, start: int, stop: int, out: Array) -> None:
    """Write ``|w|`` of the elements ``start`` to ``stop`` to ``out``."""
    upcast(weight.part(start, stop), out)
    np.abs(out, out=out)


def values(weight: Weight, start: int, stop: int, dtype: np.dtype[Any]) -> Array:
    """The elements ``start`` to ``stop`` in ``dtype``."""
    return weight.part(start, stop).astype(dtype)
