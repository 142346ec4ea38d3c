"""A Llama-shaped bf16 base with 0.97 G adapted parameters (or a small one), and a PEFT LoRA of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

RANK = 32
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    hidden: int = 2048
    intermediate: int = 5632
    layers: int = 22
    heads: int = 32
    key_heads: int = 4
    vocabulary: int = 32000

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=False,
            dtype="bfloat16",
        )

    def linear(self) -> Iterator[tuple[str, int, int]]:
        """Name, out_features and in_features of every linear layer of the blocks."""
        keys = self.hidden // self.heads * self.key_heads
        sizes = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        for layer in range(self.layers):
            for name, (rows, columns) in sizes.items():
                yield f"model.layers.{layer}.{name}", rows, columns

    @property
    def adapted(self) -> int:
        """Parameters of all these layers."""
        return sum(rows * columns for _, rows, columns in self.linear())


LARGE = Shape()
SMALL = Shape(hidden=512, intermediate=1408, layers=4, heads=8, key_heads=2, vocabulary=1000)


def make_base(shape: Shape, folder: Path) -> Path:
    """Write the base as one file with its config, one tensor in memory at a time; weights normal, of a usual size."""
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(0)
    sizes = tensor_sizes(shape)
    with open(folder / "model.safetensors", "wb") as file:
        header = header_of(sizes)
        file.write(len(header).to_bytes(8, "little") + header)
        weights = (weight_of(size, random).bfloat16() for size in sizes.values())
        file.writelines(weight.view(torch.int16).numpy().data for weight in weights)
    shape.config().save_pretrained(folder)
    return folder


def tensor_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by its name, in the order of the file."""
    sizes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, cols) for name, rows, cols in shape.linear()}
    for name in ("model.embed_tokens", "lm_head"):
        sizes[f"{name}.weight"] = (shape.vocabulary, shape.hidden)
    norms = [
        f"model.layers.{i}.{n}"
        for i in range(shape.layers)
        for n in ("input_layernorm", "post_attention_layernorm")
    ]
    for name in (*norms, "model.norm"):
        sizes[f"{name}.weight"] = (shape.hidden,)
    return sizes


def weight_of(size: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    """A weight in float32: a matrix is normal, of a usual size; a norm is all ones."""
    return torch.randn(size, generator=random).mul_(0.02) if len(size) == 2 else torch.ones(size)


def header_of(sizes: dict[str, tuple[int, ...]]) -> bytes:
    """A safetensors header of bf16 tensors that lie in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, size in sizes.items():
        end = at + 2 * math.prod(size)
        entries[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    return text + b" " * (-len(text) % 8)


def make_lora(shape: Shape, folder: Path, seed: int = 1) -> Path:
    """Write a PEFT LoRA with random factors, as ``save_pretrained`` lays it out."""
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    factors: dict[str, torch.Tensor] = {}
    for name, rows, columns in shape.linear():
        key = f"base_model.model.{name}"
        factors[f"{key}.lora_A.weight"] = torch.randn(RANK, columns, generator=random) / math.sqrt(columns)
        factors[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=random) * 0.01
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK,
        "target_modules": list(LINEAR), "base_model_name_or_path": "llama-shaped",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
