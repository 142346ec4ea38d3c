"""What every dialect yields: updates of named weights, computed in tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint


class Update(Protocol):
    """A dense change of one weight that is never held in memory whole: any rows of it can be computed."""

    @property
    def name(self) -> str:
        """The weight's name in the base."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32 or float64, in which the update is computed."""

    @property
    def columns(self) -> int:
        """Row length of the matrix view: the flat weight is ``[rows, columns]``."""

    def tile(self, start: int, stop: int, out: Array) -> None:
        """Fill ``out``, ``[stop - start, columns]`` in ``dtype``, with rows ``start`` to ``stop``; thread-safe."""


@dataclass(frozen=True)
class Lora:
    """A LoRA as updates of a base.

    Attributes:
        updates: changes of weights, to be made sparse.
        whole: tensors that replace the base's or are new to it, by name.
        additions: small tensors (biases) to add to the base's, by name.
        copies: base names by new name, for tensors that the result has under another name than the base (repeated layers).
            Updates use the new names.
        removed: names of base tensors that the result lacks.
        source: provenance (dialect, rank, alpha and so on) as plain JSON values.
        base_model: ``id`` and ``revision`` of the base, as far as the LoRA states them.
        files: the files that were read.
        left_out: keys or names that need no place in an adapter, by the reason.
        notices: what a user should know, such as renamed tensors.
    """

    updates: list[Update]
    whole: dict[str, Array] = field(default_factory=dict)
    additions: dict[str, Array] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)
    base_model: dict[str, Any] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


class Dialect(Protocol):
    """One file format for LoRAs."""

    name: str

    def recognises(self, path: Path) -> bool:
        """Whether ``path`` looks like this dialect; reads file names and keys at most."""

    def read(self, path: Path, base: Checkpoint, prefix: str | None = None) -> Lora:
        """Read it; see :func:`shira_format.lora.open_lora`."""
