"""The files of a PEFT adapter, and the options in ``adapter_config.json``: which ones change the update, and how."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shira_format.errors import SourceError
from shira_format.lora.files import is_number, is_rank, read_json
from shira_format.lora.peft.end_patterns import EndPatterns
from shira_format.storage.paths import is_file

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
# The way out of what cannot be converted as an adapter.
MERGE_FIRST = "merge the LoRA with PEFT and convert the full checkpoint (full_to_shira)"

# Options that are read.
READ = frozenset(
    {
        "peft_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "r", "lora_alpha",
        "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "bias", "lora_bias", "use_dora",
        "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "target_parameters",
        "layer_replication", "init_lora_weights", "lora_B_layout",
    }
)  # fmt: skip
# Options for the choice of layers, which the keys show too, and for training. VeLoRA only compresses activations for the
# backward pass.
HARMLESS = frozenset(
    {
        "task_type", "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
        "qalora_group_size", "megatron_core", "runtime_config",
    }
)  # fmt: skip
# Options under which the update is another one than is computed here, and why.
REFUSED = {
    "use_qalora": "QALoRA pools the inputs of its layers",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "kasa_config": f"KaSA truncates the base's weights before it adapts them, so B @ A is not an update of the base; {MERGE_FIRST}",
    "monteclora_config": "MonteCLoRA is not supported",
    "arrow_config": "an Arrow router selects among several LoRAs at run time",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only, and is no change of weights",
    "megatron_config": "Megatron's parallel layers are not supported",
}

# Initialisations that subtract the initial LoRA from the base's weights, or quantise them; and those that do not.
CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")


def find_peft_files(path: Path) -> tuple[Path, Path] | None:
    """The weights and the configuration of the adapter at ``path``: a file of weights, or a folder.

    In a folder without weights, the adapter may be in a subfolder: PEFT saves adapters of other names than "default" there.

    Raises:
        SourceError: several subfolders have adapters.
    """
    if path.is_file():
        config = path.with_name(CONFIG)
        return (path, config) if is_file(config) else None
    config = path / CONFIG
    found = next((path / name for name in WEIGHTS if is_file(path / name)), None)
    if found is not None and is_file(config):
        return found, config
    inner = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and is_file(folder / CONFIG)]
    if len(inner) > 1:
        raise SourceError(f"{path}: several adapters ({', '.join(folder.name for folder in inner)}); name one")
    return find_peft_files(inner[0]) if inner else None


@dataclass(frozen=True)
class Scales:
    """Rank and scale of each module; made by :func:`read_scales`.

    Attributes:
        where: the file, for messages.
        r: the rank of modules that no pattern matches.
        lora_alpha: their alpha.
        ranks: those by pattern.
        alphas: those by pattern.
        use_rslora: whether the scale is ``alpha / sqrt(rank)``, not ``alpha / rank``.
    """

    where: str
    r: int
    lora_alpha: float
    ranks: EndPatterns
    alphas: EndPatterns
    use_rslora: bool

    def rank(self, module: str) -> int:
        """The rank of a module, given its name in the trained model.

        Raises:
            SourceError: matching takes too long, or several alphas match.
        """
        return int(self.ranks.number(module, self.r))

    def alpha(self, module: str) -> float:
        """The alpha of a module; as :meth:`rank`."""
        return self.alphas.number(module, self.lora_alpha)

    def scale(self, module: str) -> float:
        """The factor of ``B @ A``; as :meth:`rank`."""
        rank = self.rank(module)
        return float(self.alpha(module) / (math.sqrt(rank) if self.use_rslora else rank))


def read_scales(config: Mapping[str, Any], where: object) -> Scales:
    """The options of one adapter.

    Raises:
        SourceError: invalid ranks, alphas or patterns; the message begins with ``where``.
    """
    if not is_rank(config.get("r")) or not is_number(config.get("lora_alpha")):
        raise SourceError(f"{where}: r and lora_alpha must be numbers, r a positive integer")
    if config.get("use_rslora") not in (None, True, False):
        raise SourceError(f"{where}: use_rslora must be true or false, not {config['use_rslora']!r}")
    patterns: dict[str, EndPatterns] = {}
    for key, good in (("rank_pattern", is_rank), ("alpha_pattern", is_number)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(good, pattern.values())):
            raise SourceError(f"{where}: {key} must map module names to numbers")
        patterns[key] = EndPatterns(where, key, pattern)
    return Scales(
        where=str(where), r=config["r"], lora_alpha=config["lora_alpha"], use_rslora=bool(config.get("use_rslora")),
        ranks=patterns["rank_pattern"], alphas=patterns["alpha_pattern"],
    )  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The options of one adapter, checked.

    Attributes:
        path: the file.
        raw: its content.
        scales: rank and scale by module.
        saved: ``modules_to_save``: names of modules that are saved whole.
        parameters: ``target_parameters``: ends of names of parameters.
        tokens: ``trainable_token_indices``: trained rows by the end of a module's name, or one list for the input
            embeddings.
        replication: ``layer_replication``: ranges of layers of the base.
        stated_by: what states rank and alpha, for messages.
    """

    path: Path
    raw: Mapping[str, Any]
    scales: Scales
    saved: list[str]
    parameters: list[str]
    tokens: Mapping[str, list[int]] | list[int]
    replication: list[tuple[int, int]]
    stated_by: str = CONFIG

    def __getitem__(self, option: str) -> Any:
        return self.raw.get(option)

    @property
    def weights_before_swap(self) -> bool | None:
        """Whether the writer was PEFT before 0.19, which took every 3-D parameter for ``[experts, in, out]``; None if unknown."""
        match = re.match(r"(\d+)\.(\d+)", str(self["peft_version"] or ""))
        return None if match is None else (int(match[1]), int(match[2])) < (0, 19)


def read_config(path: Path) -> Config:
    """Read the options.

    Raises:
        SourceError: not a LoRA, or an option is invalid or not supported; the message names it.
    """
    return checked_config(path, read_json(path))


def checked_config(path: Path, raw: Mapping[str, Any], stated_by: str = CONFIG) -> Config:
    """The options ``raw`` of the file ``path``, checked as in :func:`read_config`."""
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
    config = Config(path, raw, scales, saved, parameters, _tokens(path, raw), _replication(path, raw), stated_by)
    try:  # what goes into the adapter's manifest must be JSON and UTF-8, on which Python's reader does not insist
        json.dumps([source_of(config), base_model_of(config)], ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: holds a value that an adapter's header cannot: {error}") from None
    return config


def _check_options(path: Path, raw: Mapping[str, Any]) -> None:
    for option, reason in REFUSED.items():
        if raw.get(option):
            raise SourceError(f"{path}: {option} is set: {reason}")
    # PEFT warns of an unknown option and ignores it. Empty or false ones have changed nothing in any version so far; any
    # other may change the update in a later version or another trainer.
    for option in raw.keys() - READ - HARMLESS - REFUSED.keys():
        if raw[option]:
            raise SourceError(
                f"{path}: the option {option!r} is set, which is unknown and may change the update; if it does not, remove it "
                "from the file"
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
            f"{path}: init_lora_weights={start!r} is unknown: it may have changed the base's weights"
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
    """The options that go into the manifest's ``source``."""
    keys = (
        "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "bias", "lora_bias",
        "modules_to_save", "target_parameters", "layer_replication", "peft_version",
    )  # fmt: skip
    return {"kind": "lora", "dialect": "peft"} | {key: config[key] for key in keys if config[key]}


def base_model_of(config: Config) -> dict[str, Any]:
    """``id`` and ``revision`` of the base, as far as they are set."""
    wanted = {"id": config["base_model_name_or_path"], "revision": config["revision"]}
    return {key: value for key, value in wanted.items() if isinstance(value, str) and value}
