"""PEFT's files: finding them, reading the configuration, sorting the keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shira_format.errors import SourceError
from shira_format.lora.files import is_rank, read_json
from shira_format.lora.peft.config import CONFIG, PREFIX, WEIGHTS, find_peft_files


@dataclass(frozen=True)
class Kind:
    """One of PEFT's two sparse methods.

    Attributes:
        peft_type: its name in the configuration.
        dialect: its name in the manifest.
        indices: last part of the keys of positions.
        values: last part of the keys of values.
        flat: whether a position is one number, row-major, and not a row and a column.
        rounds_first: whether PEFT rounds values to the base's dtype before it adds them.
    """

    peft_type: str
    dialect: str
    indices: str
    values: str
    flat: bool
    rounds_first: bool


SHIRA = Kind("SHIRA", "peft", "shira_indices", "shira_weight", flat=False, rounds_first=False)
SUPERTUNING = Kind(
    "SUPERTUNING", "peft-supertuning", "supertuning_indices", "supertuning_values", flat=True, rounds_first=True
)
KINDS = {kind.peft_type: kind for kind in (SHIRA, SUPERTUNING)}

_OF_PEFT = re.compile(r"\.(shira|supertuning|lora)_")


@dataclass
class ShiraKeys:
    """The keys of an adapter.

    Attributes:
        indices: the key of the positions, by the adapted module.
        values: that of the values.
        own_base: by name of a tensor: keys of copies of the base's tensors below an adapted module, which PEFT saves for a
            head.
        plain: by name of a tensor: keys of whole tensors.
    """

    indices: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    own_base: dict[str, str] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)


def find(path: Path) -> tuple[Path, Path]:
    """The weights and the configuration at ``path``; a named adapter is in a subfolder.

    Raises:
        SourceError: there is none, or there are several.
    """
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    if (found := find_peft_files(path)) is None:
        if path.is_file():
            raise SourceError(f"{path}: no {CONFIG} beside it")
        raise SourceError(f"{path}: no PEFT adapter: need {CONFIG} beside {' or '.join(WEIGHTS)}")
    return found


def read_config(path: Path) -> tuple[Kind, dict[str, Any]]:
    """The method and the checked configuration.

    Raises:
        SourceError: not a configuration of one of :data:`KINDS`, or one under which the file is not the whole change.
    """
    config = read_json(path)
    peft_type = config.get("peft_type")
    kind = KINDS.get(peft_type) if isinstance(peft_type, str) else None
    if kind is None:
        raise SourceError(f"{path}: peft_type is {peft_type!r:.80}, not one of {', '.join(KINDS)}")
    if kind is SHIRA and not is_rank(config.get("r")):
        raise SourceError(f"{path}: r must be a positive integer, not {config.get('r')!r:.80}")
    if kind is SHIRA and config.get("fan_in_fan_out"):
        # PEFT adapts nn.Linear only and unsets the option, so that none of its own files has it.
        raise SourceError(f"{path}: fan_in_fan_out is set, which PEFT's SHiRA has no layers for")
    if kind is SUPERTUNING and config.get("r") is not None:
        raise SourceError(f"{path}: r is set (Supra): a LoRA is added to the entries, and the sum is not sparse; merge it with PEFT and convert the full checkpoint")  # fmt: skip
    if kind is SUPERTUNING and config.get("save_precomputed_indices", True) is not True:
        raise SourceError(f"{path}: save_precomputed_indices is not set: the file lacks its indices; load it with PEFT and save it with them")  # fmt: skip
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise SourceError(f"{path}: modules_to_save must be a list of names")
    return kind, config


def sort_keys(keys: Iterable[str], kind: Kind, path: Path) -> ShiraKeys:
    """What each key is.

    Raises:
        SourceError: a key that belongs to nothing, or lacks its partner.
    """
    found = ShiraKeys()
    for key in keys:
        name = key.removeprefix(PREFIX)
        module, _, last = name.rpartition(".")
        if name == key:
            raise SourceError(f"{path}: unmatched key {key!r}: it does not start with {PREFIX!r}")
        if module and last in (kind.indices, kind.values):
            (found.indices if last == kind.indices else found.values)[module] = key
            continue
        if _OF_PEFT.search(name):
            raise SourceError(f"{path}: unmatched key {key!r}: not of a {kind.peft_type} adapter")
        own = ".base_layer." in name
        name = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if name in found.own_base or name in found.plain:
            raise SourceError(f"{path}: two keys for tensor {name!r}, one of them {key!r}")
        (found.own_base if own else found.plain)[name] = key
    if not found.values and not found.indices:
        raise SourceError(
            f"{path}: no key ends in {kind.indices} and {kind.values}: not a {kind.peft_type} adapter"
        )
    _check_partners(found.values, found.indices, kind.indices, path)
    _check_partners(found.indices, found.values, kind.values, path)
    for module in found.values:
        if f"{module}.weight" in found.plain:
            raise SourceError(f"{path}: {found.plain[f'{module}.weight']!r} replaces a weight that is adapted")
    return found


def _check_partners(keys: Mapping[str, str], others: Mapping[str, str], lacking: str, path: Path) -> None:
    if alone := [module for module in keys if module not in others]:
        raise SourceError(f"{path}: {keys[alone[0]]!r} has no partner {PREFIX}{alone[0]}.{lacking}")
