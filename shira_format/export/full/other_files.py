"""The files of a checkpoint's folder other than weights: indexes of shards, config and tokenizer."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

from shira_format._core.files import naming, open_regular
from shira_format.errors import SourceError
from shira_format.export.full.layout import Piece
from shira_format.storage.output_folder import new_file, write_json
from shira_format.storage.paths import resolve_path

# Weights in any format, which are not copied.
_WEIGHTS = re.compile(
    r".*(\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|onnx_data|distcp|st)|\.index(\.\w+)?\.json)|\.metadata",
    re.IGNORECASE,
)
_MODEL_CONFIGS = ("config.json", "model_index.json")
_SHARD = re.compile(r"(?P<stem>.+?)(?P<variant>\.[^./]+)?-\d{5}-of-\d{5}\.safetensors")


def component_prefix(file: str, components: tuple[str, ...]) -> str:
    """What names in the adapter have before those in a file of a pipeline: ``"unet/"``, or nothing."""
    component = file.rpartition("/")[0]
    return f"{component}/" if component in components else ""


def write_indexes(folder: Path, shards: dict[str, list[Piece]], components: tuple[str, ...]) -> None:
    """Write the index of each group of shards, with the name that transformers and diffusers look for."""
    groups: dict[str, dict[str, list[Piece]]] = {}
    several = len(shards) > 1 and not components  # with names of their own, so that only an index connects them
    for shard, pieces in shards.items():
        if match := _SHARD.fullmatch(shard):
            variant = match["variant"] or ""
            groups.setdefault(f"{match['stem']}.safetensors.index{variant}.json", {})[shard] = pieces
        elif several:
            groups.setdefault("model.safetensors.index.json", {})[shard] = pieces
    for name, group in groups.items():
        prefix = component_prefix(name, components)
        weight_map = {
            piece.name.removeprefix(prefix): shard.rpartition("/")[2]
            for shard, pieces in group.items()
            for piece in pieces
        }
        total = sum(piece.nbytes for pieces in group.values() for piece in pieces)
        write_json(folder / name, {"metadata": {"total_size": total}, "weight_map": weight_map})


def copy_model_files(
    folder: Path, base_folder: Path | None, files_from: str | os.PathLike[str] | None
) -> list[str] | None:
    """Copy config, tokenizer and the like; links are followed, weights and hidden files are left out.

    Args:
        folder: where to.
        base_folder: the base's folder, if it has one.
        files_from: another folder to copy from.

    Returns:
        The names of the copies; None if the base has no folder with a config.

    Raises:
        SourceError: ``files_from`` is not the folder of a model.
    """
    source = base_folder if files_from is None else resolve_path(files_from)
    if files_from is not None and (source is None or not source.is_dir()):
        raise SourceError(f"{files_from}: no such folder")
    if source is None or not any((source / name).is_file() for name in _MODEL_CONFIGS):
        if files_from is not None:
            raise SourceError(
                f"{files_from}: not the folder of a model: it has neither {' nor '.join(_MODEL_CONFIGS)}"
            )
        return None
    copied = []
    for name, path in _other_files(source):
        target = new_file(folder, name)
        with naming(target), target.open("wb") as file:
            file.writelines(_parts(path))
        copied.append(name)
    return copied


def _parts(path: Path) -> Iterator[bytes]:
    # A pipe would block, and a device never end.
    with (
        naming(path),
        io.BufferedReader(open_regular(path)) if isinstance(path, Path) else path.open("rb") as file,
    ):
        while part := file.read(1 << 20):
            yield part


def _other_files(folder: Path, inside: str = "") -> Iterator[tuple[str, Path]]:
    """Files of a model's folder that hold no weights, by their path in it."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        name = f"{inside}{path.name}"
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not path.is_symlink():  # which could lead back here
                yield from _other_files(path, f"{name}/")
        elif not _WEIGHTS.fullmatch(path.name):
            yield name, path
