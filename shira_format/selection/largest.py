"""The k largest of some magnitudes; of equal ones those at lower positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from shira_format._core.arrays import Array

Mask = npt.NDArray[np.bool_]


def largest(magnitudes: Array, k: int) -> Mask:
    """A mask of the ``k`` largest, ``[n]`` from ``[n]``; of equal ones the first."""
    if k <= 0 or k >= magnitudes.size:
        return np.full(magnitudes.size, k > 0)
    edge = np.partition(magnitudes, magnitudes.size - k)[magnitudes.size - k]
    return at_least(magnitudes, edge, k - int(np.count_nonzero(magnitudes > edge)))


def at_least(magnitudes: Array, edge: Any, ties: int) -> Mask:
    """A mask of those above ``edge``, and of the first ``ties`` of those that equal it."""
    keep: Mask = magnitudes > edge
    keep[np.flatnonzero(magnitudes == edge)[:ties]] = True
    return keep
