"""What layouts with shards share: the search in a folder, and the index from tensor name to file."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shira_format.errors import SourceError
from shira_format.storage.paths import MOST_INDEX, read_file

# model-00001-of-00002.safetensors; with a variant, model-00001-of-00002.fp16.safetensors
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<variant>(?:\.[\w-]+)?)(?P<ending>\.\w+)")
# Tensor-parallel parts, each with a slice of every tensor: consolidated.00.pth, mp_rank_00_model_states.pt
_SLICE = re.compile(r"(?P<head>consolidated\.|mp_rank_)(?P<number>\d{2})(?P<tail>\D*)")
_NAMED = 4
_MOST_SHARDS = 10_000  # a larger count in a file name is no number of shards


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
        if len(found) > 1 and len({_shard_set(path.name) or path.name for path in found}) > 1:
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
        weight_map: Any = json.loads(read_file(path, MOST_INDEX).decode())["weight_map"]
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


def listed_files(path: Path, weight_map: Mapping[str, str]) -> list[Path]:
    """The shards of the index at ``path``, in its order; those that it does not list, by their names, are among them.

    Raises:
        SourceError: a shard that it does not list is missing.
    """
    names = dict.fromkeys(weight_map.values())
    for file in tuple(names):
        siblings = _siblings(file)
        if missing := [name for name in siblings if name not in names and not path.with_name(name).is_file()]:
            raise SourceError(f"{path}: {file} is one of {len(siblings)} shards; missing: {some(missing)}")
        names |= dict.fromkeys(siblings)
    return [path.with_name(name) for name in names]


def shards_of(path: Path) -> Path | list[Path]:
    """What has all the tensors that belong to the file of weights at ``path``: the index that lists it, or its files.

    Raises:
        SourceError: it is one of several shards of which others are missing, one that the index beside it does not list,
            or a tensor-parallel part of a checkpoint.
    """
    match = _SHARD.fullmatch(path.name)
    if match is None:
        _check_not_slice(path)
        return [path]
    for index in _indexes(match):
        if path.with_name(index).is_file():
            listed = listed_files(path.with_name(index), read_weight_map(path.with_name(index)))
            if path not in listed:
                raise SourceError(f"{path}: the index {index} beside it does not list it")
            return path.with_name(index)
    siblings = _siblings(path.name)
    if path.name not in siblings:
        raise SourceError(f"{path}: shard {int(match['number'])} of {int(match['count'])}")
    if missing := [name for name in siblings if not path.with_name(name).is_file()]:
        raise SourceError(f"{path}: one of {len(siblings)} shards; missing: {some(missing)}")
    return [path.with_name(name) for name in siblings]


def _siblings(name: str) -> list[str]:
    """The names of all shards of the checkpoint that has a shard ``name``; empty if it is no shard's name."""
    match = _SHARD.fullmatch(name)
    if match is None:
        return []
    stem, width, rest = match["stem"], len(match["number"]), match["variant"] + match["ending"]
    if int(match["count"]) > _MOST_SHARDS:
        return []
    return [f"{stem}-{number:0{width}d}-of-{match['count']}{rest}" for number in range(1, int(match["count"]) + 1)]


def _shard_set(name: str) -> tuple[str, ...] | None:
    """What the names of the shards of one checkpoint have in common; None if it is no shard's name."""
    match = _SHARD.fullmatch(name)
    return None if match is None else (match["stem"], match["count"], match["variant"], match["ending"])


def _indexes(match: re.Match[str]) -> Iterable[str]:
    """The names that the index of a shard may have."""
    stem, variant, ending = match["stem"], match["variant"], match["ending"]
    if variant:
        yield f"{stem}{ending}.index{variant}.json"
    else:
        head, dot, last = stem.rpartition(".")
        if dot:
            yield f"{head}{ending}.index.{last}.json"
    yield f"{stem}{variant}{ending}.index.json"


def _check_not_slice(path: Path) -> None:
    if (match := _SLICE.fullmatch(path.name)) is None:
        return
    for other in sorted(path.parent.iterdir()):
        found = _SLICE.fullmatch(other.name)
        if found and other != path and (found["head"], found["tail"]) == (match["head"], match["tail"]):
            raise SourceError(
                f"{path}: a tensor-parallel part, with slices of tensors; {other.name} has others: convert the "
                "checkpoint to whole tensors first"
            )


def merged_weight_map(path: Path, opened: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The file of each tensor, from the names in each file; raises SourceError if two files have the same tensor."""
    found: dict[str, str] = {}
    for file, names in opened.items():
        for name in names:
            if (other := found.setdefault(name, file)) != file:
                raise SourceError(f"{path}: both {other} and {file} have the tensor {name!r}")
    return found


def some(names: Sequence[str]) -> str:
    """The first few names, and how many there are."""
    text = ", ".join(names[:_NAMED])
    return text if len(names) <= _NAMED else f"{text}, ... ({len(names)})"


def is_file_name(name: Any) -> bool:
    """Whether ``name`` is a plain file name, without folders, and one that a system can be asked for."""
    if not isinstance(name, str) or Path(name).name != name or "\\" in name or "\0" in name:
        return False
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def check_weight_map(path: Path, weight_map: Mapping[str, str], opened: Mapping[str, Collection[str]]) -> None:
    """Raise SourceError unless the index at ``path`` lists exactly the tensors that each file has."""
    for name, file in weight_map.items():
        if name not in opened[file]:
            raise SourceError(f"{path}: the index lists {name!r} in {file}, which does not have it")
    for file, names in opened.items():
        if unlisted := [name for name in names if weight_map.get(name) != file]:
            raise SourceError(
                f"{path}: the index does not list all tensors of {file}: {some(list(map(repr, unlisted)))}"
            )
