"""Full checkpoints as lazy mappings from tensor name to array, whatever their layout; a file per layout.

A new layout is a module with an ``open_...`` function that returns a :class:`Checkpoint`, or None if the path is not
of its kind, and one line in :data:`LAYOUTS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from shira_format.checkpoints.base import Checkpoint
from shira_format.checkpoints.safetensors import open_safetensors
from shira_format.errors import SourceError

LAYOUTS: list[Callable[[Path], Checkpoint | None]] = [open_safetensors]

__all__ = ["LAYOUTS", "Checkpoint", "open_checkpoint"]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open the checkpoint at ``path``: a safetensors file, an index of shards, or a folder with one of these.

    Raises:
        SourceError: there is none, or it is of a layout that is not read.
        FormatError: a safetensors file is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    for layout in LAYOUTS:
        if (checkpoint := layout(path)) is not None:
            return checkpoint
    raise SourceError(f"{path}: not a safetensors checkpoint: need a .safetensors file, its .index.json, or a folder with one")  # fmt: skip
