"""The one thing that every source of an adapter offers: dense changes of named weights, computed piece by piece."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from shira_format._core.arrays import Array


class Update(Protocol):
    """A dense change of one weight that is never held whole: any rows of it can be computed."""

    @property
    def name(self) -> str:
        """The weight's name in the base."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32 or float64, in which the update is computed."""

    @property
    def columns(self) -> int:
        """How many elements come together: the flat weight is rows of so many."""

    def tile(self, start: int, stop: int, out: Array) -> None:
        """Fill ``out``, ``[stop - start, columns]`` in ``dtype``, with rows ``start`` to ``stop`` of the update; safe from several threads."""
