"""LyCORIS: LoCon, LoHa, LoKr, full deltas and norms, with or without DoRA and Tucker cores, in files like kohya's.

What each part does is in :mod:`shira_format.lora.algorithms`. Other programs (ComfyUI, OneTrainer) write the same parts behind
other prefixes, or behind names with dots.
"""

from __future__ import annotations

from pathlib import Path

from shira_format.checkpoints import Checkpoint
from shira_format.lora.base import Lora
from shira_format.lora.keyed import dialect_of, read_keyed
from shira_format.lora.kohya import WithHeader


class Lycoris:
    """Files of LyCORIS, in kohya's trainer or around any model."""

    name = "lycoris"

    def recognises(self, path: Path) -> bool:
        return dialect_of(path) == self.name

    def read(self, path: Path, base: Checkpoint, prefix: str | None = None) -> Lora:
        return read_keyed(path, base, self.name, prefix, scaling=WithHeader())
