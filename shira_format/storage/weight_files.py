"""Which files of a folder hold its weights: by the names that transformers and diffusers give them, and by an index.

:func:`find_weights` uses names alone, so that it works for a folder on disk and for the file list of a repository.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shira_format.errors import SourceError

STEMS = {
    ".safetensors": ("model", "diffusion_pytorch_model"),
    ".bin": ("pytorch_model", "diffusion_pytorch_model"),
}
# model.safetensors.index.json; with a variant: model.safetensors.index.fp16.json
_INDEX = re.compile(r"(?P<stem>.+)(?P<ending>\.safetensors|\.bin)\.index\.(?:(?P<variant>[\w-]+)\.)?json")
# model.fp16.safetensors and its shards, model.fp16-00001-of-00002.safetensors or model-00001-of-00002.fp16.safetensors
_OF = r"-\d{5}-of-\d{5}"
_VARIANT = re.compile(
    rf"(?P<stem>[A-Za-z_]+)(?P<old>{_OF})?\.(?P<variant>\w[\w-]*?)(?P<new>{_OF})?(?P<ending>\.safetensors|\.bin)"
)


@dataclass(frozen=True)
class WeightFiles:
    """The file to open, and the variants beside it.

    Attributes:
        name: a file of weights, or an index of several.
        variant: such as ``"fp16"``; None for the plain weights.
        others: the variants that are not used.
    """

    name: str
    variant: str | None = None
    others: tuple[str, ...] = ()


def is_index(name: str, ending: str | None = None) -> bool:
    """Whether ``name`` is that of an index of shards; with ``ending``, of shards with that ending."""
    found = _INDEX.fullmatch(name)
    return found is not None and ending in (None, found["ending"])


def find_weights(names: Collection[str]) -> WeightFiles | None:
    """The weights of a folder with these files; None if none has a standard name.

    Plain weights are preferred to variants, safetensors to PyTorch files, an index to a single file. Of several variants
    without plain weights, the first in alphabetical order is returned, with the others in ``others``.
    """
    variants = _variants(names)
    for ending, stems in STEMS.items():
        for stem in stems:
            for name in (f"{stem}{ending}.index.json", f"{stem}{ending}"):
                if name in names:
                    return WeightFiles(name, None, tuple(variants))
    for variant, name in variants.items():
        return WeightFiles(name, variant, tuple(other for other in variants if other != variant))
    return None


def _variants(names: Iterable[str]) -> dict[str, str]:
    """The file to open for each variant."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    for name in names:
        index = _INDEX.fullmatch(name)
        match = index or _VARIANT.fullmatch(name)
        if match is None or match["variant"] is None or match["stem"] not in STEMS[match["ending"]]:
            continue
        if index is None and (match["old"] or match["new"]):
            continue  # a shard, listed in an index
        order = (list(STEMS).index(match["ending"]), 0 if index else 1, name)
        found.setdefault(match["variant"], []).append(order)
    return {variant: min(files)[2] for variant, files in sorted(found.items())}


def find(
    folder: Path, usual: tuple[str, ...], index: str, files: tuple[str, ...], ignored: tuple[str, ...] = ()
) -> Path | None:
    """The checkpoint in ``folder``: one with a standard name, else the only one; None if there is none.

    Args:
        folder: where to look, without its subfolders.
        usual: standard names without ending, the preferred first.
        index: the ending of an index, which is preferred to a single file.
        files: the endings of single files.
        ignored: beginnings of the names of files that are not weights.

    Raises:
        SourceError: there are several.
    """
    for stem in usual:
        for ending in (index, *files):
            if (path := folder / f"{stem}{ending}").is_file():
                return path
    for endings in ((index,), files):
        found = sorted(p for p in folder.iterdir() if p.name.endswith(endings) and not p.name.startswith(ignored))
        if len(found) > 1:
            raise SourceError(f"{folder}: several checkpoints ({found[0].name}, {found[1].name}, ...); name one")
        if found:
            return found[0]
    return None


def read_weight_map(path: Path) -> dict[str, str]:
    """The ``weight_map`` of an index: from tensor name to the name of an existing file in the same folder.

    Raises:
        SourceError: it is not an index, a file name is a path, or a file is missing.
    """
    try:
        weight_map: Any = json.loads(path.read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceError(f"{path}: not an index of shards: {error!r}") from None
    if not isinstance(weight_map, dict):
        raise SourceError(f"{path}: weight_map is not an object")
    for name, file in weight_map.items():
        # A stranger's index must not point outside of its folder.
        if not is_file_name(file):
            raise SourceError(f"{path}: weight_map has {file!r} for {name!r}, which is not a file name")
        if not (path.parent / file).is_file():
            raise SourceError(f"{path}: the shard {file} is missing")
    return weight_map


def is_file_name(name: Any) -> bool:
    """Whether ``name`` is a plain file name, without folders."""
    return isinstance(name, str) and Path(name).name == name and "\\" not in name


def check_weight_map(path: Path, weight_map: Mapping[str, str], opened: Mapping[str, Container[str]]) -> None:
    """Raise SourceError unless every file has the tensors that the index at ``path`` lists for it."""
    for name, file in weight_map.items():
        if name not in opened[file]:
            raise SourceError(f"{path}: the index lists {name!r} in {file}, which does not have it")
