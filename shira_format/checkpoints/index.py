"""What layouts with shards share: the search in a folder, and the index from tensor name to file."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from shira_format.errors import SourceError


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
