"""What every checkpoint layout looks like to the rest of the package."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from shira_format._core.arrays import Array

_MAPPED = 1 << 28  # bytes of a tensor up to which it is mapped whole to look at some of its elements

_T = TypeVar("_T")


class Checkpoint(Mapping[str, Array]):
    """A lazy mapping from tensor name to a read-only array, which lives in memory only as long as it is held.

    Attributes:
        path: what was opened.
        files: the files that hold the tensors.
        components: the parts of a model of several, such as a pipeline; then every name is ``COMPONENT/NAME``.
        notices: what a user should know, such as that a quantised file was dequantised.
    """

    path: Path
    files: list[Path]
    components: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of a tensor, without reading it."""

    def part(self, name: str, start: int, stop: int, out: Array | None = None) -> Array:
        """Elements ``start`` to ``stop`` of the flat tensor, read from storage alone: ``[stop - start]``.

        Memory stays at the part, not the tensor, in layouts that can do so. Safe from several threads.

        Args:
            name: the tensor.
            start: first flat index.
            stop: flat index after the last.
            out: a contiguous buffer of the tensor's dtype and of at least this many elements, to fill and return a
                part of; some layouts return another array.
        """
        return self[name].reshape(-1)[start:stop]

    def at(self, name: str, indices: Array) -> Array:
        """The elements at flat ``indices`` (int64 ``[n]``, rising), ``[n]``; safe from several threads."""
        size, dtype = math.prod(self.shape(name)), self.dtype(name)
        if size * dtype.itemsize <= _MAPPED:
            return self[name].reshape(-1)[indices]
        found = np.empty(indices.size, dtype)
        step = _MAPPED // dtype.itemsize
        for start in range(0, size, step):
            first, last = np.searchsorted(indices, [start, start + step])
            if first < last:
                part = self.part(name, start, min(start + step, size))
                found[first:last] = part[indices[first:last] - start]
        return found

    def is_quantised(self, name: str) -> bool:
        """Whether the file holds other numbers than these, from which they were dequantised."""
        return False

    @property
    def shards(self) -> dict[str, list[str]] | None:
        """The names by the safetensors file, relative to a folder, that a copy in the same layout has; in order.

        None: the layout has no such files; whoever writes a copy divides it by size.
        """
        return None

    @property
    def folder(self) -> Path | None:
        """The folder whose other files (config, tokenizer) belong to the model; None if there is none."""
        return None

    def metadata(self, shard: str) -> dict[str, str]:
        """``__metadata__`` of one of :attr:`shards`, or of a file that would take its place."""
        return {"format": "pt"}


class IndexedCheckpoint(Checkpoint, Generic[_T]):
    """A checkpoint whose tensors are listed when it is opened, in ``_where``: what is known of each, by name."""

    _where: Mapping[str, _T]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where  # without reading the tensor
