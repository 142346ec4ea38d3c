"""The interface of a checkpoint, whatever its layout."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from shira_format._core.arrays import Array

_TILE = 1 << 28  # bytes

_T = TypeVar("_T")


class Checkpoint(Mapping[str, Array]):
    """A lazy mapping from tensor name to a read-only array, which the checkpoint does not keep.

    Attributes:
        path: the path that was opened.
        files: the files that hold the tensors.
        components: of a pipeline, whose tensors are all named ``COMPONENT/NAME``; else empty.
        unused: entries of the files with tensors that are not read, other than those of an optimizer and the like.
        beside: entries that are not tensors beside those of a file of ``torch.save``, such as a trainer's settings, by the path of
            keys (``hyper_parameters/lora_alpha``); without those of an optimizer and the like.
        notices: remarks for the user, such as that a quantised file was dequantised.
    """

    path: Path
    files: list[Path]
    components: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of a tensor, without reading it."""

    def part(self, name: str, start: int, stop: int, out: Array | None = None) -> Array:
        """Elements ``start`` to ``stop`` of the flat tensor, ``[stop - start]``.

        Most layouts read no more than that from storage. Safe from several threads.

        Args:
            name: the tensor.
            start: first flat index.
            stop: flat index after the last.
            out: a contiguous buffer of the tensor's dtype with at least that many elements, of which a part is filled
                and returned; some layouts return another array.
        """
        return self[name].reshape(-1)[start:stop]

    def at(self, name: str, indices: Array) -> Array:
        """The elements at flat ``indices`` (int64 ``[n]``, increasing), ``[n]``; safe from several threads."""
        size, dtype = math.prod(self.shape(name)), self.dtype(name)
        step = self._tile(name) // dtype.itemsize
        found, tile = np.empty(indices.size, dtype), np.empty(min(step, size), dtype)
        cuts = np.searchsorted(indices, np.arange(0, size + step, step))
        for first, last in pairwise(cuts.tolist()):
            if first < last:
                start, stop = int(indices[first]), int(indices[last - 1]) + 1
                part = self.part(name, start, stop, tile)
                found[first:last] = part[indices[first:last] - start]
        return found

    def _tile(self, name: str) -> int:
        """How many bytes of a tensor :meth:`at` reads at once; it reads none between the last element of a tile and the next."""
        return _TILE

    def is_quantised(self, name: str) -> bool:
        """Whether the tensor was dequantised, so that the file has other values."""
        return False

    @property
    def shards(self) -> dict[str, list[str]] | None:
        """The tensor names of each safetensors file (relative to a folder) of a copy in the same layout, in order.

        None: the layout has no such files, and a copy is sharded by size.
        """
        return None

    @property
    def folder(self) -> Path | None:
        """The folder with the model's other files (config, tokenizer), or None."""
        return None

    def metadata(self, shard: str) -> dict[str, str]:
        """``__metadata__`` of one of :attr:`shards`, or of a file that would take its place."""
        return {"format": "pt"}


class IndexedCheckpoint(Checkpoint, Generic[_T]):
    """A checkpoint that indexes its tensors when it is opened: ``_where`` has what the layout needs of each, by name."""

    _where: Mapping[str, _T]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where  # without reading the tensor
