"""LoRA files as updates of named weights; a file per dialect.

A new dialect is a module with a :class:`Dialect` and one line in :data:`DIALECTS`. It says whether a path is of its
kind, and turns it into a :class:`Lora`: updates that can fill any tile of ``delta W``, and tensors to replace.
"""

from __future__ import annotations

import os

from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.diffusers import Diffusers
from shira_format.lora.gguf import Gguf
from shira_format.lora.kohya import Kohya
from shira_format.lora.lycoris import Lycoris
from shira_format.lora.mlx import Mlx
from shira_format.lora.peft import Peft
from shira_format.lora.products import LowRank
from shira_format.lora.torchtune import Torchtune
from shira_format.lora.updates import Dialect, Lora
from shira_format.lora.xlabs import Xlabs
from shira_format.storage.paths import resolve_path

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (Mlx(), Peft(), Gguf(), Torchtune(), Xlabs(), Diffusers(), Kohya(), Lycoris())
}

__all__ = ["DIALECTS", "Dialect", "Lora", "LowRank", "open_lora"]


def open_lora(path: str | os.PathLike[str], base: Checkpoint, *, dialect: str | None = None) -> Lora:
    """Read the LoRA at ``path`` as updates of the tensors of ``base``.

    Args:
        path: a file or folder.
        base: the checkpoint that it adapts; names and shapes are resolved against it.
        dialect: a key of :data:`DIALECTS`; recognised from the files by default.

    Raises:
        SourceError: not a LoRA, or one with a key, a shape or an option that cannot be taken over exactly.
        FormatError: a safetensors file is damaged.
    """
    path = resolve_path(path)
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    if dialect is not None:
        return DIALECTS[dialect].read(path, base)
    for candidate in DIALECTS.values():
        if candidate.recognises(path):
            return candidate.read(path, base)
    raise SourceError(f"{path}: not a LoRA of a known dialect ({', '.join(DIALECTS)})")
