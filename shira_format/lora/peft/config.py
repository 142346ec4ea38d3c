"""``adapter_config.json``: which options change the update, and what they say of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shira_format.errors import SourceError
from shira_format.lora.files import read_json
from shira_format.lora.peft_scale import Scales, read_scales

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."

# Options that this package reads.
READ = frozenset(
    {
        "peft_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "r", "lora_alpha",
        "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "bias", "lora_bias", "use_dora",
        "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "target_parameters",
        "layer_replication", "init_lora_weights", "lora_B_layout",
    }
)  # fmt: skip
# Options that say which layers are adapted, which the keys say too, or how the LoRA was trained. VeLoRA compresses
# activations for the backward pass and nothing else.
HARMLESS = frozenset(
    {
        "task_type", "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
        "qalora_group_size", "megatron_core", "runtime_config",
    }
)  # fmt: skip
# Options under which the update is not what is read here, and why.
REFUSED = {
    "use_qalora": "QALoRA pools the inputs of its layers",
    "use_bdlora": "block-diagonal LoRA is not read",
    "kasa_config": "KaSA cuts the base's weights down before it adapts them, so B @ A is not an update of the base; "
    "merge it with PEFT and convert the full checkpoint",
    "monteclora_config": "MonteCLoRA is not read",
    "arrow_config": "an Arrow router chooses among several LoRAs as the model runs",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only and is no change of weights",
    "megatron_config": "Megatron's parallel layers are not read",
}

# Initialisations that subtract the start of the LoRA from the base's weights, or quantise these; and those that do not.
CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")


def pair_in(folder: Path) -> tuple[Path, Path] | None:
    """The weights and the configuration that lie in ``folder`` itself."""
    config = folder / CONFIG
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    return (found, config) if found is not None and config.is_file() else None


def named_in(folder: Path) -> Path | None:
    """The subfolder of the adapter that has a name.

    Raises:
        SourceError: there are several.
    """
    inner = [found for found in sorted(folder.iterdir()) if found.is_dir() and (found / CONFIG).is_file()]
    if len(inner) > 1:
        raise SourceError(f"{folder}: several adapters ({', '.join(found.name for found in inner)}); name one")
    return inner[0] if inner else None


@dataclass(frozen=True)
class Config:
    """The options of one adapter, checked.

    Attributes:
        path: the file.
        raw: all that it says.
        scales: rank and scale by module.
        saved: names of modules that are saved whole.
        parameters: ``target_parameters``: ends of names of parameters.
        tokens: the rows that ``trainable_token_indices`` trains: by the end of a module's name, or one list for the
            input embeddings.
        replication: ``layer_replication``: ranges of layers of the base.
    """

    path: Path
    raw: Mapping[str, Any]
    scales: Scales
    saved: list[str]
    parameters: list[str]
    tokens: Mapping[str, list[int]] | list[int]
    replication: list[tuple[int, int]]

    def __getitem__(self, option: str) -> Any:
        return self.raw.get(option)

    @property
    def weights_before_swap(self) -> bool | None:
        """Whether the writer was PEFT before 0.19, which took every 3-D parameter for ``[experts, in, out]``."""
        match = re.match(r"(\d+)\.(\d+)", str(self["peft_version"] or ""))
        return None if match is None else (int(match[1]), int(match[2])) < (0, 19)


def read_config(path: Path) -> Config:
    """Read the options.

    Raises:
        SourceError: not a LoRA, or one whose update is not read here; the message names the option.
    """
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise SourceError(f"{path}: not a LoRA (peft_type is {raw.get('peft_type')!r})")
    _check_options(path, raw)
    scales = read_scales(raw, path)
    saved, parameters = raw.get("modules_to_save") or [], raw.get("target_parameters") or []
    for option, value in (("modules_to_save", saved), ("target_parameters", parameters)):
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise SourceError(f"{path}: {option} must be a list of names")
    if raw.get("bias") not in (None, "none", "all", "lora_only"):
        raise SourceError(f"{path}: bias must be 'none', 'all' or 'lora_only', not {raw['bias']!r}")
    config = Config(path, raw, scales, saved, parameters, _tokens(path, raw), _replication(path, raw))
    try:  # what goes into the adapter's manifest has to be JSON and UTF-8, which Python's reader does not ask for
        json.dumps([source_of(config), base_model_of(config)], ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: holds what an adapter cannot repeat: {error}") from None
    return config


def _check_options(path: Path, raw: Mapping[str, Any]) -> None:
    for option, reason in REFUSED.items():
        if raw.get(option):
            raise SourceError(f"{path}: {option} is set: {reason}")
    # PEFT warns of an option that it does not know, and goes on without it. What is empty or false changes nothing in
    # any version so far; anything else may be what a later version, or another trainer, computes the update by.
    for option in raw.keys() - READ - HARMLESS - REFUSED.keys():
        if raw[option]:
            raise SourceError(
                f"{path}: the option {option!r} is set, which is not known here and may change the update; "
                "if it does not, take it out of the file"
            )
    start = raw.get("init_lora_weights")
    if start is None or isinstance(start, bool):
        return
    if isinstance(start, str) and CHANGES_BASE.match(start):
        raise SourceError(
            f"{path}: init_lora_weights={start!r} changed the base's weights in training, so B @ A is not an update of "
            "the base; save the adapter with PEFT's path_initial_model_for_weight_conversion first"
        )
    if not isinstance(start, str) or start.lower() not in _KEEPS_BASE:
        raise SourceError(
            f"{path}: init_lora_weights={start!r} is not known: it may have changed the base's weights"
        )


def _tokens(path: Path, raw: Mapping[str, Any]) -> Mapping[str, list[int]] | list[int]:
    found = raw.get("trainable_token_indices") or []
    for rows in found.values() if isinstance(found, dict) else [found]:
        if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
            raise SourceError(
                f"{path}: trainable_token_indices must be a list of rows, or map modules to such lists"
            )
        if len(set(rows)) < len(rows):
            raise SourceError(f"{path}: trainable_token_indices names a row twice")
    return found


def _replication(path: Path, raw: Mapping[str, Any]) -> list[tuple[int, int]]:
    found = raw.get("layer_replication") or []
    if not isinstance(found, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)
        for pair in found
    ):
        raise SourceError(f"{path}: layer_replication must be a list of pairs of layers, [first, end]")
    return [(first, end) for first, end in found]


def source_of(config: Config) -> dict[str, Any]:
    """What the manifest says of the source."""
    keys = (
        "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "bias", "lora_bias",
        "modules_to_save", "target_parameters", "layer_replication", "peft_version",
    )  # fmt: skip
    return {"kind": "lora", "dialect": "peft"} | {key: config[key] for key in keys if config[key]}


def base_model_of(config: Config) -> dict[str, Any]:
    """What it says of the base."""
    wanted = {"id": config["base_model_name_or_path"], "revision": config["revision"]}
    return {key: value for key, value in wanted.items() if isinstance(value, str) and value}
