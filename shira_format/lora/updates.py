"""What a LoRA is once its dialect has been left behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint
from shira_format.lora.update import Update


@dataclass(frozen=True)
class Lora:
    """A LoRA as updates of a base.

    Attributes:
        updates: changes of weights, to be made sparse.
        whole: tensors that replace the base's, or are new to it, by name.
        additions: small tensors (biases) that are added to the base's as a whole, by name.
        copies: names that the result has and the base has under another name, as repeated layers do: from the new
            name to the base's. Updates speak of new names.
        removed: names of base tensors that the result lacks.
        source: provenance: dialect, rank, alpha and so on, as plain JSON values.
        base_model: ``id`` and ``revision`` of the base, as far as the LoRA says.
        files: the files that were read.
        notices: what a user should know: names that had to be mapped, and the like.
    """

    updates: list[Update]
    whole: dict[str, Array] = field(default_factory=dict)
    additions: dict[str, Array] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)
    base_model: dict[str, Any] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


class Dialect(Protocol):
    """One way of writing LoRAs to disk."""

    name: str

    def recognises(self, path: Path) -> bool:
        """Whether ``path`` looks like this dialect; reads no more than names."""

    def read(self, path: Path, base: Checkpoint) -> Lora:
        """Read it; see :func:`shira_format.lora.open_lora`."""
