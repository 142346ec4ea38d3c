"""Full checkpoints of any layout as lazy mappings from tensor name to array; a file per layout.

A new layout is a module with an ``open_...`` function that returns a :class:`Checkpoint`, or None if the path has
another layout, and one line in :data:`LAYOUTS`.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

from shira_format.checkpoints.base import Checkpoint
from shira_format.checkpoints.beside import not_read, weight_files_beside
from shira_format.checkpoints.wrapped import unwrapped
from shira_format.errors import SourceError
from shira_format.storage.paths import check_exists, naming_remote, resolve_path

# Module and function of each layout, in the order in which they are tried; and the file that a folder of it holds, if
# that is enough to tell that a path has another layout. A module is imported when its layout is tried.
LAYOUTS = [
    ("diffusers:open_diffusers", "model_index.json"),
    ("safetensors:open_safetensors", None),
    ("torch_bin:open_torch_bin", None),
    ("gguf:open_gguf", None),
    ("dcp:open_dcp", None),
]

__all__ = ["LAYOUTS", "Checkpoint", "open_checkpoint"]


def open_checkpoint(path: str | os.PathLike[str] | Checkpoint, *, wrapped: bool = False) -> Checkpoint:
    """Open the checkpoint at ``path``; one that is open already is returned.

    It is a safetensors file, a file of ``torch.save`` (.bin, .pt, .pth, .ckpt), an index of shards of either, a GGUF file,
    or a folder with one of these; a diffusers pipeline; or a folder of ``torch.distributed.checkpoint``.

    Names come without the words of wrappers such as ``_orig_mod.``, see :mod:`shira_format.checkpoints.wrapped`, unless
    ``wrapped``.

    Raises:
        SourceError: there is none, its layout is not supported, or two names are one without the words of wrappers.
        FormatError: a safetensors file is damaged.
    """
    if isinstance(path, Checkpoint):
        return path
    path = resolve_path(path)
    with naming_remote(path):
        return _opened(path, wrapped=wrapped)


def _opened(path: Path, *, wrapped: bool) -> Checkpoint:
    check_exists(path)
    if (checkpoint := try_layouts(path)) is not None:
        checkpoint.notices += not_read(path, weight_files_beside(path, checkpoint.files))
        return checkpoint if wrapped else unwrapped(checkpoint)
    raise SourceError(f"{path}: not a checkpoint of a supported layout: a .safetensors, .bin, .pt, .pth, .ckpt or .gguf file, an .index.json of shards, a folder with one of these, a diffusers pipeline, or a distributed checkpoint")  # fmt: skip


def try_layouts(path: Path) -> Checkpoint | None:
    """The checkpoint at ``path`` in the first layout that fits; None if none does."""
    for place, file in LAYOUTS:
        module, _, function = place.partition(":")
        if file is not None and path.name != file and not (path / file).exists():
            continue
        checkpoint: Checkpoint | None = getattr(import_module(f"{__name__}.{module}"), function)(path)
        if checkpoint is not None:
            return checkpoint
    return None
