"""PEFT's LoRA: ``adapter_config.json`` with ``adapter_model.safetensors`` or ``.bin``.

The rules are those of ``peft.tuners.lora``: ``delta W = scale * B @ A`` with scale ``alpha / r``, or ``alpha /
sqrt(r)`` under rslora; ``rank_pattern`` and ``alpha_pattern`` are regexes on module names, first hit wins.
"""

from __future__ import annotations

from pathlib import Path

from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.peft.config import CONFIG, PREFIX, WEIGHTS, named_in, pair_in
from shira_format.lora.peft.reader import read
from shira_format.lora.updates import Lora

__all__ = ["CONFIG", "PREFIX", "WEIGHTS", "Peft"]


class Peft:
    """PEFT's own files, as ``save_pretrained`` writes them."""

    name = "peft"

    def recognises(self, path: Path) -> bool:
        return _find(path) is not None

    def read(self, path: Path, base: Checkpoint) -> Lora:
        found = _find(path)
        if found is None:
            raise SourceError(f"{path}: no PEFT adapter: need {CONFIG} beside {' or '.join(WEIGHTS)}")
        return read(*found, base)


def _find(path: Path) -> tuple[Path, Path] | None:
    """The weights and the configuration at ``path``; a named adapter lies in a subfolder."""
    if path.is_file():
        config = path.with_name(CONFIG)
        return (path, config) if config.is_file() and path.suffix in (".safetensors", ".bin") else None
    if (found := pair_in(path)) is not None:
        return found
    inner = named_in(path)
    return None if inner is None else _find(inner)
