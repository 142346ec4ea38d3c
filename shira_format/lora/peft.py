"""PEFT's LoRA: ``adapter_config.json`` with ``adapter_model.safetensors`` or ``.bin``.

The rules are those of ``peft.tuners.lora``: ``delta W = scale * B @ A`` with scale ``alpha / r``, or ``alpha /
sqrt(r)`` under rslora; ``rank_pattern`` and ``alpha_pattern`` are regexes on module names, first hit wins.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shira_format.arrays import Array
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.files import is_number, is_rank, read_json, read_tensors
from shira_format.lora.names import match_names
from shira_format.lora.products import LowRank
from shira_format.lora.updates import Lora

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."

_FACTOR = re.compile(r"(?P<module>.+)\.(?P<factor>lora_[AB])\.(?P<what>weight|bias)")
_OTHER_LORA = re.compile(r"\.lora_|_magnitude_vector|trainable_tokens")

# Options under which B @ A is not the update, and what to do about them.
_NOT_PLAIN = {
    "use_dora": "DoRA rescales whole weights; merge it with PEFT and convert the full checkpoint",
    "use_qalora": "QALoRA pools the inputs of its layers",
    "use_bdlora": "block-diagonal LoRA is not read",
    "kasa_config": "KaSA is not read",
    "monteclora_config": "MonteCLoRA is not read",
    "arrow_config": "an Arrow router chooses among several LoRAs as the model runs",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only and is no change of weights",
    "layer_replication": "layer_replication repeats layers of the base, each with an update of its own",
    "target_parameters": "target_parameters (3-D expert weights) are not read",
    "trainable_token_indices": "trainable_token_indices are not read",
    "megatron_config": "Megatron's parallel layers are not read",
}
# Initialisations that subtract the start of the LoRA from the base's weights.
_CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga")


class Peft:
    """PEFT's own files, as ``save_pretrained`` writes them."""

    name = "peft"

    def recognises(self, path: Path) -> bool:
        return _find(path) is not None

    def read(self, path: Path, base: Checkpoint) -> Lora:
        found = _find(path)
        if found is None:
            raise SourceError(f"{path}: no PEFT adapter: need {CONFIG} beside {' or '.join(WEIGHTS)}")
        weights, config_path = found
        config = _read_config(config_path)
        return _Reader(weights, config, base).read([weights, config_path])


def _find(path: Path) -> tuple[Path, Path] | None:
    """The weights and the configuration at ``path``; a named adapter lies in a subfolder."""
    if path.is_file():
        config = path.with_name(CONFIG)
        return (path, config) if config.is_file() and path.suffix in (".safetensors", ".bin") else None
    for name in WEIGHTS:
        if (path / name).is_file() and (path / CONFIG).is_file():
            return path / name, path / CONFIG
    inner = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and (folder / CONFIG).is_file()]
    if len(inner) > 1:
        raise SourceError(f"{path}: several adapters ({', '.join(f.name for f in inner)}); name one")
    return _find(inner[0]) if inner else None


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise SourceError(f"{path}: not a LoRA (peft_type is {config.get('peft_type')!r})")
    for option, reason in _NOT_PLAIN.items():
        if config.get(option):
            raise SourceError(f"{path}: {option} is set: {reason}")
    if isinstance(start := config.get("init_lora_weights"), str) and _CHANGES_BASE.match(start):
        raise SourceError(
            f"{path}: init_lora_weights={start!r} changed the base's weights in training, so B @ A is not an update of "
            "the base; save the adapter with PEFT's path_initial_model_for_weight_conversion first"
        )
    if not is_rank(config.get("r")) or not is_number(config.get("lora_alpha")):
        raise SourceError(f"{path}: r and lora_alpha must be numbers, r a positive integer")
    for key, good in (("rank_pattern", is_rank), ("alpha_pattern", is_number)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(good, pattern.values())):
            raise SourceError(f"{path}: {key} must map module names to numbers")
    if not _is_names(config.get("modules_to_save") or []):
        raise SourceError(f"{path}: modules_to_save must be a list of names")
    return config


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


class _Reader:
    """One adapter on its way from keys to updates."""

    def __init__(self, path: Path, config: Mapping[str, Any], base: Checkpoint) -> None:
        self.path = path
        self.config = config
        self.base = base
        self.factors: dict[str, dict[str, Array]] = {}
        self.plain: dict[str, Array] = {}
        self.biases: dict[str, Array] = {}
        self._rename: Callable[[str], str] = str

    def read(self, files: list[Path]) -> Lora:
        for key, array in read_tensors(self.path)[0].items():
            self._sort(key, array)
        if not self.factors:
            raise SourceError(f"{self.path}: no key ends in lora_A.weight and lora_B.weight: not a LoRA")
        needed = {f"{module}.weight": None for module in self.factors}.keys()
        self._rename, words = match_names(needed, self.base, self.path)
        rename = self._rename
        for name in needed & self.plain.keys():
            self._check_own_base(name, self.plain.pop(name), rename(name))
        return Lora(
            updates=[
                self._update(module, pair, rename(f"{module}.weight")) for module, pair in self.factors.items()
            ],
            whole=dict(self._replacement(name, array, rename(name)) for name, array in self.plain.items()),
            additions=dict(
                self._addition(module, bias, rename(f"{module}.bias")) for module, bias in self.biases.items()
            ),
            source=self._source(),
            base_model=self._base_model(),
            files=files,
            notices=[f"names of the LoRA are not those of the base: {words}"] if words else [],
        )

    def _sort(self, key: str, array: Array) -> None:
        name = key.removeprefix(PREFIX)
        if name == key:
            raise SourceError(f"{self.path}: unmatched key {key!r}: it does not start with {PREFIX!r}")
        if match := _FACTOR.fullmatch(name):
            # A second target on one module nests: "base_layer" inside the name would be another parameter.
            module, factor, what = match["module"], match["factor"], match["what"]
            if what == "weight":
                self.factors.setdefault(module, {})[factor] = array
            elif factor == "lora_B" and self.config.get("lora_bias"):
                self.biases[module] = array
            else:
                raise SourceError(f"{self.path}: unmatched key {key!r}: lora_bias is not set")
        elif _OTHER_LORA.search(name):
            raise SourceError(
                f"{self.path}: unmatched key {key!r}: embeddings, convolutions and DoRA are not read"
            )
        else:
            self.plain[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = array

    def _check_own_base(self, name: str, array: Array, base_name: str) -> None:
        """PEFT saves the weight under an adapted ``lm_head``, too: it must be that of the base, maybe rounded."""
        weight = self.base[base_name]
        if weight.shape != array.shape or not np.array_equal(weight.astype(array.dtype), array):
            raise SourceError(
                f"{self.path}: {name!r} lies below its LoRA and is not the base's {base_name!r} (resized or trained): "
                "merge the LoRA with PEFT and convert the full checkpoint"
            )

    def _update(self, module: str, pair: Mapping[str, Array], name: str) -> LowRank:
        if pair.keys() != {"lora_A", "lora_B"}:
            raise SourceError(f"{self.path}: {module!r} has {', '.join(pair)} only")
        a, b = pair["lora_A"], pair["lora_B"]
        if a.ndim != 2 or b.ndim != 2:
            raise SourceError(f"{self.path}: {module!r} is not a linear layer (lora_A has shape {list(a.shape)})")
        rank = self._by_pattern("rank_pattern", module, self.config["r"])
        if a.shape[0] != rank or b.shape[1] != rank:
            raise SourceError(
                f"{self.path}: {module!r} should have rank {rank} by {CONFIG}, "
                f"lora_A has shape {list(a.shape)} and lora_B {list(b.shape)}"
            )
        work = np.dtype(np.float64 if np.float64 in (a.dtype, b.dtype) else np.float32)
        with np.errstate(over="ignore"):  # an update that overflows is found, and named, when it is computed
            a, b = a.astype(work), b.astype(work) * np.asarray(self._scale(module)).astype(work)
        if self._is_transposed(module, name, (b.shape[0], a.shape[1])):
            a, b = b.T, a.T
        return LowRank(name, self.base.shape(name), np.ascontiguousarray(b), np.ascontiguousarray(a))

    def _scale(self, module: str) -> float:
        rank = self._by_pattern("rank_pattern", module, self.config["r"])
        alpha = self._by_pattern("alpha_pattern", module, self.config["lora_alpha"])
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def _by_pattern(self, key: str, module: str, default: float) -> Any:
        """PEFT's ``get_pattern_key``."""
        for pattern, value in (self.config.get(key) or {}).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise SourceError(f"{self.path.with_name(CONFIG)}: {key} {pattern!r}: {error}") from None
        return default

    def _is_transposed(self, module: str, name: str, update: tuple[int, int]) -> bool:
        """Whether the base stores the weight as ``[in, out]`` (transformers' ``Conv1D``).

        PEFT decides by the layer's class and corrects ``fan_in_fan_out`` by it; here the shape decides, and the
        option where the weight is square.
        """
        shape = self.base.shape(name)
        if shape == update == update[::-1]:
            transposed = bool(self.config.get("fan_in_fan_out"))
            # PEFT leaves the option as the last adapted layer set it, so other layers can prove it wrong.
            if (not transposed) in self._orientations:
                raise SourceError(
                    f"{self.path}: {module!r} updates a square weight, and other layers are not stored as "
                    f"fan_in_fan_out={transposed} says (Conv1D or Linear): nothing tells how this one is"
                )
            return transposed
        if shape == update:
            return False
        if shape == update[::-1]:
            return True
        raise SourceError(
            f"{self.path}: {module!r} updates a weight of shape {list(update)}, the base's {name!r} has {list(shape)}"
        )

    @cached_property
    def _orientations(self) -> set[bool]:
        """Which ways of storing weights this LoRA and its base surely have: ``[out, in]`` (False), ``[in, out]`` (True).

        A layer that is not square tells by its shape, or, where it is not adapted, by the length of its bias.
        """
        found = set()
        for module, pair in self.factors.items():
            if len(pair) == 2 and all(factor.ndim == 2 for factor in pair.values()):
                update = (pair["lora_B"].shape[0], pair["lora_A"].shape[1])
                shape = self.base.shape(self._rename(f"{module}.weight"))
                if update != update[::-1] and shape in (update, update[::-1]):
                    found.add(shape != update)
        for name in self.base:
            shape, bias = self.base.shape(name), f"{name.removesuffix('weight')}bias"
            if (
                len(shape) == 2
                and shape[0] != shape[1]
                and bias in self.base
                and self.base.shape(bias) == shape[1:]
            ):
                found.add(True)
        return found

    def _replacement(self, name: str, array: Array, base_name: str) -> tuple[str, Array]:
        saved = self.config.get("modules_to_save") or []
        in_base = base_name in self.base
        is_saved = any(re.search(rf"(^|\.){re.escape(module)}\.", name) for module in saved)
        if not in_base and not is_saved:
            raise SourceError(f"{self.path}: unmatched key {name!r}: neither in the base nor of modules_to_save")
        if in_base and self.base.shape(base_name) != array.shape:
            raise SourceError(
                f"{self.path}: {name!r} has shape {list(array.shape)}, "
                f"the base's {base_name!r} has {list(self.base.shape(base_name))}"
            )
        return (base_name if in_base else name), array

    def _addition(self, module: str, bias: Array, name: str) -> tuple[str, Array]:
        if name not in self.base:
            raise SourceError(f"{self.path}: lora_bias for {module!r}, but the base has no {name!r}")
        if self.base.shape(name) != bias.shape:
            raise SourceError(f"{self.path}: {module}.lora_B.bias has shape {list(bias.shape)}, {name!r} {list(self.base.shape(name))}")  # fmt: skip
        with np.errstate(over="ignore"):  # found, and named, when it is added
            return name, bias.astype(np.float32) * np.asarray(self._scale(module)).astype(np.float32)

    def _source(self) -> dict[str, Any]:
        keys = (
            "r",
            "lora_alpha",
            "use_rslora",
            "rank_pattern",
            "alpha_pattern",
            "bias",
            "modules_to_save",
            "peft_version",
        )
        return {"kind": "lora", "dialect": "peft"} | {
            key: self.config[key] for key in keys if self.config.get(key)
        }

    def _base_model(self) -> dict[str, Any]:
        wanted = {"id": self.config.get("base_model_name_or_path"), "revision": self.config.get("revision")}
        return {key: value for key, value in wanted.items() if isinstance(value, str) and value}
