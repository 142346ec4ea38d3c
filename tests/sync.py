"""A place that fails where a test wants it to, and weights of every kind that a model has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from shira_format._core.arrays import Array
from shira_format.storage.places import Place

Weights = dict[str, Array]


class Crash(BaseException):
    """The end of a process, as far as its place can tell."""


class Fragile:
    """A place whose ``fails_at``-th access from now on ends in a crash.

    Attributes:
        how: ``"before"`` it does anything, ``"after"`` all is done, or ``"torn"``: half of what was to be written is there.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.label = place.label
        self.fails_at: int | None = None
        self.how = "before"

    @contextmanager
    def failing(self, at: int, how: str = "before") -> Iterator[None]:
        """Crash at the ``at``-th access within this block, from 0 on."""
        self.fails_at, self.how = at, how
        try:
            yield
        finally:
            self.fails_at = None

    def names(self, folder: str) -> list[str]:
        self._reading()
        return self.place.names(folder)

    def read(self, name: str) -> bytes:
        self._reading()
        return self.place.read(name)

    def create(self, name: str, data: bytes) -> None:
        how = self._next()
        if how == "before":
            raise Crash
        self.place.create(name, data[: len(data) // 2] if how == "torn" else data)
        if how:
            raise Crash

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        how = self._next()
        if how == "before":
            raise Crash
        with self.place.writing(name) as path:
            yield path
            if how == "torn":
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        if how:
            raise Crash

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        self._reading()
        with self.place.local(name) as path:
            yield path

    def remove(self, name: str) -> None:
        how = self._next()
        if how == "before":
            raise Crash
        self.place.remove(name)
        if how:
            raise Crash

    def _reading(self) -> None:
        if self._next():
            raise Crash

    def _next(self) -> str:
        """How the access that comes now fails; empty if it does not."""
        if self.fails_at is None:
            return ""
        self.fails_at -= 1
        return self.how if self.fails_at == -1 else ""


def some_weights(seed: int = 0) -> Weights:
    """Weights of every kind: narrow and wide floats, codes with their scales, buffers, scalars, and nothing at all."""
    random = np.random.default_rng(seed)

    def floats(*shape: int, dtype: Any = np.float32) -> Array:
        return random.standard_normal(shape).astype(dtype)

    return {
        "embed.weight": floats(30, 8, dtype=ml_dtypes.bfloat16),
        "layer.weight": floats(16, 8, dtype=ml_dtypes.float8_e4m3fn),
        "layer.weight_scale_inv": floats(2, 1),
        "norm.weight": floats(8),
        "norm.running_mean": floats(8, dtype=np.float64),
        "norm.num_batches_tracked": np.array(0, np.int64),
        "temperature": np.array(1, np.float16),
        "mask": random.random((4, 4)) < 0.5,
        "empty": np.empty((0, 3), np.float32),
    }


def like(weights: Weights) -> Weights:
    """Weights of the same names, dtypes and shapes, all zeros."""
    return {name: np.zeros_like(array) for name, array in weights.items()}


def copied(weights: Weights) -> Weights:
    """The same weights in memory of their own."""
    return {name: array.copy() for name, array in weights.items()}


def bits(weights: Any) -> dict[str, bytes]:
    """The bytes of each weight."""
    return {name: array.tobytes() for name, array in weights.items()}
