"""The encoder with and without adapters, heads beside it, and how far a text's right class is ahead."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shira_format.adapter import Adapter
from shira_format.live import Switcher
from studies import texts
from studies.learning import Tokens, load_model, tokenize

_AT_ONCE = 32  # texts

Head = tuple[Tensor, Tensor]
"""Weight ``[2, width]`` and bias ``[2]``."""


@lru_cache
def base_model(folder: Path) -> nn.Module:
    """The pretrained encoder with a head of two classes, which nobody may change."""
    return load_model(folder)


@lru_cache(maxsize=16)
def tokens_of(folder: Path, base: Path, task: str, length: int) -> dict[str, Tokens]:
    """The texts of a task by part."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    parts = texts.read(folder / f"{task}.json")
    return {part: tokenize(tokenizer, pairs, length) for part, pairs in parts.items()}


def some(tokens: Tokens, count: int, seed: int) -> Tokens:
    """Texts drawn by the seed."""
    return tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:count]]


def head_of(model: nn.Module) -> Head:
    """A copy of the model's head."""
    head: Any = model.get_submodule("classifier")
    return head.weight.detach().clone(), head.bias.detach().clone()


def set_head(model: nn.Module, head: Head) -> None:
    """Give the model this head."""
    found: Any = model.get_submodule("classifier")
    with torch.no_grad():
        found.weight.copy_(head[0])
        found.bias.copy_(head[1])


def write_head(head: Head, path: Path) -> None:
    """Write a head, whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file({"weight": head[0], "bias": head[1]}, new)
    os.replace(new, path)


def read_head(path: Path) -> Head:
    """What :func:`write_head` wrote."""
    from safetensors.torch import load_file

    found = load_file(path)
    return found["weight"], found["bias"]


@torch.no_grad()
def features(model: nn.Module, tokens: Tokens) -> Tensor:
    """What the encoder hands to a head: ``[texts, width]``."""
    encoder: Any = model.get_submodule("bert")
    return torch.cat(
        [
            encoder(input_ids=batch.ids, attention_mask=batch.mask).pooler_output
            for batch in tokens.batches(_AT_ONCE)
        ]
    )


def margins(found: Tensor, head: Head, labels: Tensor) -> list[float]:
    """Of each text the logit of its class minus that of the other: it is classified right if that is above 0."""
    logits = found @ head[0].T + head[1]
    ahead = (logits[:, 1] - logits[:, 0]) * (2 * labels - 1)
    return [round(one, 3) for one in ahead.tolist()]


class Encoder:
    """A copy of the base in which sparse adapters are shown for a while."""

    def __init__(self, base: Path) -> None:
        import copy

        self.model = copy.deepcopy(base_model(base))
        self._switcher = Switcher(self.model, threads=1)

    @contextmanager
    def showing(self, adapter: Adapter, alpha: float | None = None) -> Iterator[nn.Module]:
        """The model with an adapter; afterwards it is the base again, bit for bit."""
        with self._switcher.applied(adapter, alpha):
            yield self.model


class LoraEncoder:
    """A copy of the base with several LoRAs, which PEFT shows and merges."""

    def __init__(self, base: Path, folders: dict[str, Path]) -> None:
        import copy

        from peft import PeftModel

        self.model = copy.deepcopy(base_model(base))
        (first, folder), *rest = folders.items()
        self._wrapped = PeftModel.from_pretrained(self.model, folder, adapter_name=first)
        for name, other in rest:
            self._wrapped.load_adapter(other, adapter_name=name)
        self._wrapped.eval()
        self.model.requires_grad_(False)

    @contextmanager
    def showing(
        self, names: list[str], weights: list[float], method: str = "cat", **options: Any
    ) -> Iterator[nn.Module]:
        """The model with a merge of LoRAs by PEFT; ``cat`` is their exact sum."""
        torch.manual_seed(0)  # of what a method drops
        self._wrapped.add_weighted_adapter(names, weights, "merged", combination_type=method, **options)
        self._wrapped.set_adapter("merged", inference_mode=True)
        try:
            yield self.model
        finally:
            self._wrapped.delete_adapter("merged")

    def updates(self, name: str) -> dict[str, Tensor]:
        """Of each weight, by its name without PEFT, what a LoRA adds to it."""
        from peft.tuners.lora import LoraLayer

        found = {
            f"{path}.weight": module.get_delta_weight(name).detach()
            for path, module in self.model.named_modules()
            if isinstance(module, LoraLayer)
        }
        assert found
        return found
