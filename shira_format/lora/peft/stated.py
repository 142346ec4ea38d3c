"""What ``adapter_config.json`` says about the model that an adapter was trained on, where names and shapes leave a choice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.names.patterns import Pattern, PatternError, UnsupportedPattern
from shira_format.names.prefixes import Statement
from shira_format.names.renaming import leading
from shira_format.names.towers import tower_of_class, towers_in
from shira_format.storage.paths import MOST_JSON, is_file, read_file

_LIBRARY = re.compile(r"transformers\.models\.(\w+)\.")
_SHOWN = 100  # characters of a value in a message


def statements(config: Mapping[str, Any], base: Checkpoint) -> list[Statement]:
    """What the options say of the towers of ``base``.

    * ``auto_mapping``: the class of the trained model (``CLIPTextModel``), or the library that it is from where only one tower
      of the base's ``config.json`` is of that kind (``text_config`` with ``model_type`` "llama").
    * ``target_modules``: a regex or paths that name the tower.
    * ``base_model_name_or_path``: a folder that is called like the tower (``.../text_model``).
    """
    return [*_of_class(config, base), *_of_targets(config), *_of_path(config)]


def _of_class(config: Mapping[str, Any], base: Checkpoint) -> Iterator[Statement]:
    mapping = config.get("auto_mapping")
    if not isinstance(mapping, dict):
        return
    name, library = mapping.get("base_model_class"), mapping.get("parent_library")
    if isinstance(name, str) and (tower := tower_of_class(name)):
        yield Statement(f"base_model_class {name[:_SHOWN]!r}", _in_tower(tower))
    elif isinstance(library, str) and (match := _LIBRARY.match(library)):
        towers = _towers_of_kind(match[1], base_config(base))
        if len(towers) == 1:
            yield Statement(f"parent_library {library[:_SHOWN]!r}", _in_tower(towers.pop()))


def _in_tower(tower: str) -> Callable[[str, str], bool]:
    def allows(_name: str, found: str) -> bool:
        towers = towers_in(".".join(leading(found)))
        # What a wrapper adds to a language model is named; the language model itself may not be.
        return not towers & {"vision", "audio"} if tower == "text" else tower in towers

    return allows


def _towers_of_kind(kind: str, config: Mapping[str, Any]) -> set[str]:
    """The towers of a model whose own configuration is of a kind of model."""
    found: set[str] = set()
    for key, inner in config.items():
        model_type = inner.get("model_type") if isinstance(inner, dict) else None
        if isinstance(model_type, str) and (model_type == kind or model_type.startswith(f"{kind}_")):
            found |= towers_in(key.removesuffix("_config"))
    return found


def _of_targets(config: Mapping[str, Any]) -> Iterator[Statement]:
    targets = config.get("target_modules")
    if isinstance(targets, str):
        what = f"target_modules {targets[:_SHOWN]!r}"
        try:
            pattern = Pattern(targets)
        except UnsupportedPattern as error:
            raise SourceError(f"{what}: {error}") from None
        except PatternError:
            return

        def allows(_name: str, found: str) -> bool:
            try:
                return pattern.fullmatch(found.removesuffix(".weight"))
            except PatternError as error:
                raise SourceError(f"{what}: {error}") from None

        yield Statement(what, allows, is_about_base=False)
    elif isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        ends = tuple(f".{target}" for target in targets)
        yield Statement(
            "target_modules",
            lambda _, found: f".{found.removesuffix('.weight')}".endswith(ends),
            is_about_base=False,
        )


def _of_path(config: Mapping[str, Any]) -> Iterator[Statement]:
    path = config.get("base_model_name_or_path")
    if isinstance(path, str) and (last := path.rstrip("/\\").replace("\\", "/").rpartition("/")[2]):
        yield Statement(
            f"base_model_name_or_path {path[-_SHOWN:]!r}",
            lambda _, found: last in leading(found),
            is_about_base=False,
        )


def base_config(base: Checkpoint) -> dict[str, Any]:
    """``config.json`` in the base's folder; {} if it is missing or unreadable."""
    folder = base.folder
    if folder is None or not is_file(folder / "config.json"):
        return {}
    try:
        config = json.loads(read_file(folder / "config.json", MOST_JSON))
    except (ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
