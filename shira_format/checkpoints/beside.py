"""Weight files that lie beside those that are read: what a reader of one file would never tell.

A file in the same folder is part of what the user named. One in a subfolder is if the folder says so: a component of a pipeline,
a module of sentence-transformers, another adapter of PEFT's. Other subfolders have checkpoints of their own.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shira_format.checkpoints.index import some
from shira_format.errors import SourceError
from shira_format.storage.paths import MOST_INDEX, read_file
from shira_format.storage.weight_files import TRAINING

ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz")
# Folders of a trainer's earlier states, and mlx-lm's files of them.
_NUMBERED = re.compile(r"\d+_(?P<name>.+)")
_EARLIER = re.compile(r"checkpoint-\d+|global_step\d+|epoch[-_]?\d+")


def weight_files_beside(folder: Path, read: Iterable[Path]) -> list[Path]:
    """The weight files in ``folder`` and its subfolders, other than ``read``, sorted.

    Files of training are not counted: optimizers and the like, subfolders of earlier states, and mlx-lm's numbered
    ``0000100_adapters.safetensors``. Of a distributed checkpoint, single files are the trainer's.
    """
    if not folder.is_dir():
        return []
    used = {_identity(path) for path in read}
    found = []
    inner = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for place in (folder, *(path for path in inner if _EARLIER.fullmatch(path.name) is None)):
        if (place / ".metadata").is_file():
            continue
        for path in place.iterdir():
            is_weights = path.name.endswith(ENDINGS) and not path.name.startswith((*TRAINING, "."))
            if is_weights and path.is_file() and not {_identity(path), _identity(_last(path))} & used:
                found.append(path)
    return sorted(found, key=lambda path: (path.parent != folder, str(path)))


def not_read(folder: Path, files: Iterable[Path]) -> tuple[str, ...]:
    """A notice of files that are not read; none for none."""
    names = names_in(folder, files)
    return (f"{folder.name}: not read: {some(names)}",) if names else ()


def _last(path: Path) -> Path:
    """The file that mlx-lm writes at the end of a run, of one that it writes on the way."""
    match = _NUMBERED.fullmatch(path.name)
    return path if match is None else path.with_name(match["name"])


def _identity(path: Path) -> str:
    return os.path.realpath(path) if isinstance(path, Path) else str(path)  # of a URL as it is


def is_part(folder: Path, file: Path) -> bool:
    """Whether a file of :func:`weight_files_beside` is part of the model or adapter in ``folder``."""
    inner = file.parent
    if inner == folder or (inner / "adapter_config.json").is_file():
        return True
    listed = _json(folder / "modules.json")
    modules = (
        [module.get("path") for module in listed if isinstance(module, dict)] if isinstance(listed, list) else []
    )
    pipeline = _json(folder / "model_index.json")
    return inner.name in modules or (isinstance(pipeline, dict) and inner.name in pipeline)


def _json(path: Path) -> Any:
    try:
        return json.loads(read_file(path, MOST_INDEX)) if path.is_file() else None
    except (ValueError, RecursionError, SourceError):  # no reader of weights needs it
        return None


def names_in(folder: Path, files: Iterable[Path]) -> list[str]:
    """Their names in ``folder``."""
    return [path.name if path.parent == folder else f"{path.parent.name}/{path.name}" for path in files]
