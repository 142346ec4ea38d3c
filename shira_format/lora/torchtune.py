"""torchtune's LoRA and DoRA: ``adapter_model.pt`` (``adapter_0.pt`` before 2025) with ``adapter_config.json``.

The rules are those of ``torchtune/modules/peft`` and ``torchtune/models/convert_weights.py`` (pytorch/torchtune):
``delta W = alpha / r * lora_b @ lora_a``; DoRA scales the rows of the sum to norm ``magnitude``. Modules have
torchtune's names, and queries and keys the row order of its rotary embedding. torchtune writes the same LoRA in PEFT's
format next to these files (``adapter_model.safetensors``): a folder that has both is read as PEFT's.

For Qwen2 and Qwen3, torchtune's model has Hugging Face's row order (``qwen2/_convert_weights.py`` permutes nothing), but
``tune_to_peft_adapter_weights`` permutes the rows of ``lora_b`` nevertheless: here the model's order counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint
from shira_format.errors import FormatError, SourceError
from shira_format.lora.base import Lora, Update
from shira_format.lora.decomposed import Decomposed
from shira_format.lora.files import PICKLES, SAFETENSORS, is_number, is_rank, open_tensors, read_json, read_tensors
from shira_format.lora.keys import by_pattern, group_keys
from shira_format.lora.peft.config import CONFIG
from shira_format.lora.peft.config import WEIGHTS as PEFT_WEIGHTS
from shira_format.lora.products import fits_factors, low_rank
from shira_format.lora.rope import Attention, attention_of, deinterleave_heads
from shira_format.names.prefixes import match_names
from shira_format.storage.paths import is_file

_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_[ab](?=\.weight\Z)|magnitude\Z)(?:\.weight)?")
_LAYER = re.compile(r"layers\.(?P<number>0|[1-9][0-9]*)\.(?P<inner>.+)")
_INNER = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_OUTPUT = {"output": "lm_head"}
# Whether torchtune's rotary embedding rotates adjacent rows (2i with 2i + 1) together, as Meta's does, by model type.
# GGUF's architecture of Mistral is llama.
_ROTATES_ADJACENT = {
    "llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False, "qwen3": False,
}  # fmt: skip


class Torchtune:
    """Files that torchtune writes."""

    name = "torchtune"

    def recognises(self, path: Path) -> bool:
        if path.is_dir() and any(is_file(path / name) for name in PEFT_WEIGHTS):
            return False
        return any(map(_is_torchtune, _candidates(path)))

    def read(self, path: Path, base: Checkpoint, prefix: str | None = None) -> Lora:
        found = _candidates(path)
        if len(found) > 1:
            raise SourceError(f"{path}: several adapters ({', '.join(file.name for file in found)}); name one")
        if not found:
            raise SourceError(f"{path}: no LoRA of torchtune: need adapter_model.pt or a file like it")
        return _Reader(found[0], base, prefix).read()


def _candidates(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix in (SAFETENSORS, *PICKLES) else []
    return sorted(
        file for file in path.iterdir() if file.name.startswith("adapter_") and file.suffix == ".pt" and file.is_file()
    )  # fmt: skip


def _is_torchtune(path: Path) -> bool:
    """Whether a key ends in ``lora_a.weight``, in lower case, which no other program writes."""
    try:
        return any(key.endswith(".lora_a.weight") for key in open_tensors(path))
    except (SourceError, FormatError):
        return False


class _Reader:
    """Turns the tensors of one adapter into updates."""

    def __init__(self, path: Path, base: Checkpoint, prefix: str | None) -> None:
        self.path = path
        self.prefix = prefix
        self.base = base
        self.config = path.with_name(CONFIG)
        self.rank, self.alpha = _parameters(path, self.config)

    def read(self) -> Lora:
        modules = self._modules(read_tensors(self.path, self.base)[0])
        targets = {module: f"{self._target(module)}.weight" for module in modules}
        by_name = {target: modules[module] for module, target in targets.items()}

        def fits(name: str, found: str) -> bool:
            return fits_factors(self.base.shape(found), by_name[name]["lora_b"], by_name[name]["lora_a"])

        rename = match_names(by_name, self.base, self.path, fits=fits, prefix=self.prefix)
        return Lora(
            updates=[self._update(module, parts, rename(targets[module])) for module, parts in modules.items()],
            source={"kind": "lora", "dialect": "torchtune", "r": self.rank, "lora_alpha": self.alpha}
            | ({"use_dora": True} if any("magnitude" in parts for parts in modules.values()) else {}),
            base_model=_base_model(self.config),
            files=[self.path, self.config],
            notices=rename.notices("the LoRA"),
        )

    def _modules(self, tensors: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
        ends = "it ends neither in lora_a.weight nor lora_b.weight nor magnitude (experts are not supported)"
        groups = group_keys(tensors, by_pattern(_KEY), self.path, ends)
        for module, parts in groups.items():
            if not parts.keys() >= {"lora_a", "lora_b"}:
                raise SourceError(f"{self.path}: {module!r} has {', '.join(sorted(parts))} only")
        return {module: {part: tensors[key] for part, key in parts.items()} for module, parts in groups.items()}

    def _target(self, module: str) -> str:
        """The module's name in Hugging Face's checkpoint."""
        match = _LAYER.fullmatch(module)
        name = _OUTPUT.get(module) if match is None else _INNER.get(match["inner"])
        if name is None:
            raise SourceError(f"{self.path}: module {module!r} has no known Hugging Face name")
        return name if match is None else f"model.layers.{match['number']}.{name}"

    def _update(self, module: str, parts: Mapping[str, Array], name: str) -> Update:
        where, a, b = f"{self.path}: {module!r}", parts["lora_a"], parts["lora_b"]
        if a.ndim != 2 or b.ndim != 2 or {a.shape[0], b.shape[1]} != {self.rank}:
            raise SourceError(
                f"{where}: should have rank {self.rank} by {CONFIG}, lora_a has shape {list(a.shape)} and lora_b "
                f"{list(b.shape)}"
            )
        up = self._rows(module, b, where)
        update = low_rank(name, self.base.shape(name), up, a, self.alpha / self.rank, where)
        if (magnitude := parts.get("magnitude")) is None:
            return update
        if magnitude.shape != update.shape[:1]:
            raise SourceError(
                f"{where}: magnitude has shape {list(magnitude.shape)}, the weight {list(update.shape)}"
            )
        return Decomposed(update, self.base, self._rows(module, magnitude, where).astype(update.dtype))

    def _rows(self, module: str, rows: Array, where: str) -> Array:
        """``rows`` in Hugging Face's order, from which those of queries and keys may differ."""
        if not module.endswith(("attn.q_proj", "attn.k_proj")):
            return rows
        attention = self._attention
        if attention.kind not in _ROTATES_ADJACENT:
            raise SourceError(
                f"{where}: how torchtune stores a model of type {attention.kind!r} is not known; supported are "
                f"{', '.join(_ROTATES_ADJACENT)}"
            )
        if not _ROTATES_ADJACENT[attention.kind]:
            return rows
        return deinterleave_heads(rows, attention.key if module.endswith("k_proj") else attention.query, where)

    @cached_property
    def _attention(self) -> Attention:
        return attention_of(self.base, self.path)


def _parameters(path: Path, config: Path) -> tuple[int, float]:
    """Rank and alpha, which torchtune writes only to PEFT's configuration."""
    if not is_file(config):
        raise SourceError(
            f"{path}: alpha is not in the file, and {CONFIG}, to which torchtune writes it, is not beside it: create one, "
            '{"r": ..., "lora_alpha": ...}, with lora_rank and lora_alpha of the recipe'
        )
    found = read_json(config)
    if not is_rank(found.get("r")) or not is_number(found.get("lora_alpha")):
        raise SourceError(f"{config}: r and lora_alpha must be numbers, r a positive integer")
    for option in ("use_rslora", "rank_pattern", "alpha_pattern"):
        if found.get(option):
            raise SourceError(f"{config}: {option} is set, which torchtune does not support")
    return found["r"], found["lora_alpha"]


def _base_model(config: Path) -> dict[str, str]:
    name = read_json(config).get("base_model_name_or_path")
    return {"id": name} if isinstance(name, str) and name else {}
