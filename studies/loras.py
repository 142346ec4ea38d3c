"""LoRAs by PEFT on some matrices of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def add_lora(model: nn.Module, rank: int, where: str, seed: int, ranks: Mapping[str, int] | None = None) -> Any:
    """Put a new LoRA with alpha 2 r and without dropout into a model, in evaluation mode.

    Args:
        model: is changed.
        rank: of the LoRA.
        where: a pattern of the names of the weights that it is on.
        seed: of what it starts with.
        ranks: of other weights of those, by a pattern of their names.

    Returns:
        PEFT's model around it.
    """
    from peft import LoraConfig, get_peft_model

    other = {_modules(pattern): number for pattern, number in (ranks or {}).items()}
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0, target_modules=f".*{_modules(where)}",
        rank_pattern=other, alpha_pattern={pattern: 2 * number for pattern, number in other.items()},
    )  # fmt: skip
    wrapped: Any = get_peft_model(model, config)
    wrapped.eval()
    return wrapped


def lora_parameters(model: nn.Module) -> list[Any]:
    """The factors of a model's LoRAs."""
    return [one for name, one in model.named_parameters() if "lora_" in name]


def _modules(weights: str) -> str:
    return weights.removesuffix(r"\.weight$")
