"""PEFT's weights without their configuration: rank and alpha are given by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shira_format.checkpoints import Checkpoint
from shira_format.errors import FormatError, SourceError
from shira_format.lora.files import PICKLES, SAFETENSORS, open_tensors
from shira_format.lora.peft.config import CONFIG, PREFIX, WEIGHTS, Config, checked_config, find_peft_files
from shira_format.storage.paths import is_file

_PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_GIVEN = "the given rank"


def bare_weights(path: Path, base: Checkpoint | None = None) -> Path | None:
    """The file at ``path``, or in this folder, whose keys are PEFT's and beside which no configuration is; or None."""
    if path.is_dir():
        path = next((path / name for name in WEIGHTS if is_file(path / name)), path)
    if path.suffix not in (SAFETENSORS, *PICKLES) or is_file(path.with_name(CONFIG)):
        return None
    try:
        keys = list(open_tensors(path, base))
    except (FormatError, SourceError):  # reported by who reads it
        return None
    return path if any(key.startswith(PREFIX) and key.endswith(_PARTS) for key in keys) else None


def missing_config(weights: Path) -> SourceError:
    """The refusal of such a file."""
    return SourceError(
        f"{weights}: PEFT's weights, and {CONFIG} is missing beside them, which has the scale: add it, or give rank and "
        "alpha by hand (--rank, --alpha)"
    )


def config_by_hand(path: Path, base: Checkpoint, rank: int | None, alpha: float | None) -> tuple[Path, Config]:
    """The weights at ``path``, and a configuration of this rank and alpha; DoRA and biases as their keys tell.

    Raises:
        SourceError: no such weights, a configuration beside them, or a number is missing or none that can be.
    """
    weights = bare_weights(path, base)
    if weights is None:
        found = find_peft_files(path)
        raise SourceError(
            f"{path}: rank and alpha by hand are for PEFT's weights without their configuration"
            + (f", and {found[1]} is there: it states its own" if found else "; these are none")
        )
    if rank is None or alpha is None:
        raise SourceError(f"{weights}: give both rank and alpha (--rank, --alpha): the scale is alpha / rank")
    keys = list(open_tensors(weights, base))
    raw: dict[str, Any] = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha,
        "use_dora": any(".lora_magnitude_vector" in key for key in keys),
        "lora_bias": any(key.endswith(".lora_B.bias") for key in keys),
    }  # fmt: skip
    return weights, checked_config(weights, raw, _GIVEN)


def notice_of(config: Config) -> str:
    """What was assumed."""
    scale = config.scales.lora_alpha / config.scales.r
    return (
        f"no {CONFIG}: all layers have the scale {scale:g} = alpha / rank as given; if the LoRA was trained with rslora "
        "(alpha / sqrt(rank)) or other alphas for some layers, this is wrong"
    )
