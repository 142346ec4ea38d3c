"""Live weights as a checkpoint: the tensors of a model where they are, by the names that they are published under."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, read_only
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.checkpoints.base import IndexedCheckpoint
from shira_format.convert.exact import tensor_digest
from shira_format.convert.unused import check_all_used
from shira_format.errors import SourceError
from shira_format.live.memory import Places
from shira_format.live.models import weights_of
from shira_format.live.weights import ArrayWeight, LiveWeight, live_weight
from shira_format.storage.paths import resolve_path
from shira_format.tensors import numel

Model = Any  # a module, a pipeline, a dictionary of arrays or tensors; a checkpoint or its path
Map = Callable[[Callable[[str], str], list[str]], Iterable[str]]


class LiveCheckpoint(IndexedCheckpoint[LiveWeight]):
    """Live weights; reading copies nothing where they are in CPU memory."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        """Args: ``weights``: arrays or tensors by name.

        Raises:
            BaseMismatch: one of them is quantised, without data or distributed; the message names it.
        """
        self.path, self.files = Path("(live weights)"), []
        self._where = {name: readable(name, weight) for name, weight in weights.items()}

    def __getitem__(self, name: str) -> Array:
        weight = self._where[name]
        return read_only(weight.part(0, numel(weight.shape)).reshape(weight.shape))

    def part(self, name: str, start: int, stop: int, out: Array | None = None) -> Array:
        return self._where[name].part(start, stop)

    def at(self, name: str, indices: Array) -> Array:
        return self._where[name].get(indices)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._where[name].dtype


def readable(name: str, weight: Any) -> LiveWeight:
    """A weight that is only read, so that an array may be read-only."""
    return ArrayWeight(np.asarray(weight)) if isinstance(weight, np.ndarray) else live_weight(name, weight)


def open_source(model: Model) -> tuple[Checkpoint, dict[str, str]]:
    """What is to be published, and names of tied tensors, each with the name under which its tensor is published.

    Of a module these are its parameters and persistent buffers, tied ones under their first name.

    Raises:
        BaseMismatch: a weight cannot be read, see :func:`shira_format.live.weights.live_weight`.
        SourceError: a checkpoint has weights that are not read, or are dequantised on reading.
        TypeError: neither a model nor a checkpoint.
    """
    if isinstance(model, (str, os.PathLike, Checkpoint)):
        return _stored(model), {}
    weights = weights_of(model).saved()
    tied = {name: first for name, first in Places(weights).first.items() if first != name}
    return LiveCheckpoint({name: weight for name, weight in weights.items() if name not in tied}), tied


def _stored(path: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
    found = open_checkpoint(path)
    check_all_used(
        found.path if isinstance(path, Checkpoint) else resolve_path(path), found.files, [found], allow=False
    )
    if name := next((name for name in found if found.is_quantised(name)), None):
        raise SourceError(
            f"{found.path}: tensor {name!r} is quantised: its values are made on reading, and cannot be published"
        )
    return found


def digests_of(checkpoint: Checkpoint, names: Iterable[str], map_: Map) -> dict[str, str]:
    """SHA-256 of the bytes of tensors, by name; ``map_`` may use threads."""
    wanted = list(names)
    return dict(zip(wanted, map_(lambda name: tensor_digest(checkpoint, name), wanted), strict=True))
