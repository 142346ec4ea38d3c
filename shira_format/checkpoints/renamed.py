"""A checkpoint under other tensor names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format.checkpoints.base import Checkpoint


class RenamedCheckpoint(Checkpoint):
    """``names`` maps this checkpoint's names to those of ``base``: several to one, or not all."""

    def __init__(self, base: Checkpoint, names: Mapping[str, str]) -> None:
        self.base = base
        self.names = names
        self.path = base.path
        self.files = base.files
        self.components = base.components
        self.unused = base.unused
        self.beside = base.beside
        self.notices = base.notices

    def __getitem__(self, name: str) -> Array:
        return self.base[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(self.names[name])

    def dtype(self, name: str) -> np.dtype[Any]:
        return self.base.dtype(self.names[name])

    def part(self, name: str, start: int, stop: int, out: Array | None = None) -> Array:
        return self.base.part(self.names[name], start, stop, out)

    def is_quantised(self, name: str) -> bool:
        return self.base.is_quantised(self.names[name])

    def at(self, name: str, indices: Array) -> Array:
        return self.base.at(self.names[name], indices)

    @property
    def folder(self) -> Path | None:
        return self.base.folder


def rearranged(base: Checkpoint, copies: Mapping[str, str], removed: list[str]) -> Checkpoint:
    """``base`` as a patch changes it: with ``copies`` (from new names to those of the base), without ``removed``."""
    if not copies and not removed:
        return base
    gone = {*removed, *copies}
    return RenamedCheckpoint(base, {name: name for name in base if name not in gone} | dict(copies))
