"""torchtune's LoRAs against a decoder as torchtune has it, written again: neighbours turned by its rotary embedding.

torchtune does not install beside today's torch, so that it cannot be the peer itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from transformers import (
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from shira_format._core.arrays import Array
from shira_format.checkpoints import open_checkpoint
from shira_format.errors import SourceError
from shira_format.lora import DIALECTS, Lora, open_lora
from tests import models
from tests.shira_format.test_checkpoints_gguf import write
from tests.updates import close, dense, merge

RANK, ALPHA = 4, 6
HEADS, KEYS, WIDTH, HEAD = 4, 2, 64, 24  # a head is not WIDTH / HEADS
SIZES: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS, "intermediate_size": 96, "max_position_embeddings": 32, "head_dim": HEAD,
    "tie_word_embeddings": False,
}  # fmt: skip
HF_NAMES = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}  # fmt: skip
Q = "layers.0.attn.q_proj"


def hf_name(module: str) -> str:
    if module == "output":
        return "lm_head"
    _, number, inner = module.split(".", 2)
    return f"model.layers.{number}.{HF_NAMES[inner]}"


def made() -> PreTrainedModel:
    torch.manual_seed(11)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def neighbours(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Hugging Face's rows as torchtune has them: row ``i`` of a head's first half beside row ``i`` of its second."""
    moved = []
    for head in rows.chunk(heads):
        first, second = head.chunk(2)
        moved += [row for pair in zip(first, second, strict=True) for row in pair]
    return torch.stack(moved)


class Tuned:
    """A Llama of torchtune's: its names, its row order, LoRA or DoRA in every linear layer."""

    def __init__(self, model: PreTrainedModel, dora: bool = False) -> None:
        torch.manual_seed(12)
        self.state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.modules = [f"layers.{number}.{inner}" for number in range(2) for inner in HF_NAMES] + ["output"]
        self.weights: dict[str, torch.Tensor] = {}
        self.adapter: dict[str, torch.Tensor] = {}
        for module in self.modules:
            weight = self.state[f"{hf_name(module)}.weight"]
            if module.endswith(("q_proj", "k_proj")):
                weight = neighbours(weight, HEADS if module.endswith("q_proj") else KEYS)
            self.weights[module] = weight
            self.adapter[f"{module}.lora_a.weight"] = 0.2 * torch.randn(RANK, weight.shape[1])
            self.adapter[f"{module}.lora_b.weight"] = 0.2 * torch.randn(weight.shape[0], RANK)
            if dora:
                self.adapter[f"{module}.magnitude"] = weight.norm(dim=1) * (1 + 0.2 * torch.randn(len(weight)))

    def linear(self, module: str, x: torch.Tensor) -> torch.Tensor:
        """The forward passes of ``LoRALinear`` and ``DoRALinear``."""
        weight = self.weights[module]
        a, b = (self.adapter[f"{module}.lora_{x}.weight"] for x in "ab")
        out, lora = x @ weight.T, x @ a.T @ b.T
        magnitude = self.adapter.get(f"{module}.magnitude")
        if magnitude is None:
            return out + ALPHA / RANK * lora
        scale = magnitude / (weight + ALPHA / RANK * b @ a).norm(dim=1)
        return (scale - 1) * out + scale * lora * (ALPHA / RANK) + out

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """``RotaryPositionalEmbeddings``: entries ``2i`` and ``2i + 1`` are one complex number. ``[batch, length, heads, HEAD]``."""
        angles = torch.outer(torch.arange(x.shape[1]), 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD))
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        def norm(name: str, x: torch.Tensor) -> torch.Tensor:
            return rms_norm(x, (WIDTH,), self.state[f"{name}.weight"], eps=1e-6)

        x = self.state["model.embed_tokens.weight"][tokens]
        for number in range(2):
            layer = f"layers.{number}"
            y = norm(f"model.{layer}.input_layernorm", x)
            q, k, v = (
                self.linear(f"{layer}.attn.{name}_proj", y).unflatten(-1, (-1, HEAD)) for name in ("q", "k", "v")
            )
            q, k = self.turned(q), self.turned(k)
            k, v = (each.repeat_interleave(HEADS // KEYS, dim=2) for each in (k, v))
            mixed = scaled_dot_product_attention(*(each.swapaxes(1, 2) for each in (q, k, v)), is_causal=True)
            x = x + self.linear(f"{layer}.attn.output_proj", mixed.swapaxes(1, 2).flatten(-2))
            y = norm(f"model.{layer}.post_attention_layernorm", x)
            gate, up = (self.linear(f"{layer}.mlp.{name}", y) for name in ("w1", "w3"))
            x = x + self.linear(f"{layer}.mlp.w2", silu(gate) * up)
        return self.linear("output", norm("model.norm", x))


def configure(folder: Path, **changes: Any) -> None:
    """What torchtune's recipes write beside the tensors."""
    config = {
        "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"], "peft_type": "LORA",
        "base_model_name_or_path": "some/base",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


class Saved:
    """A base and a LoRA of it on disk, and the model as torchtune runs it."""

    def __init__(self, folder: Path, dora: bool = False) -> None:
        model = made()
        self.base = folder / "base"
        model.save_pretrained(self.base)
        self.running = Tuned(model, dora)
        self.lora = folder / "epoch_0"
        self.lora.mkdir()
        self.path = self.lora / "adapter_model.pt"
        torch.save(self.running.adapter, self.path)
        configure(self.lora)

    def edit(self, changes: Mapping[str, torch.Tensor | None]) -> None:
        state = self.running.adapter | changes
        torch.save({key: tensor for key, tensor in state.items() if tensor is not None}, self.path)

    def read(self) -> Lora:
        return open_lora(self.lora, open_checkpoint(self.base))


@pytest.fixture
def llama(tmp_path: Path) -> Saved:
    return Saved(tmp_path)


def refused(saved: Saved, reason: str, path: Path | None = None) -> None:
    with pytest.raises(SourceError) as caught:
        saved.read()
    assert f"{path or saved.path}: {reason}" == str(caught.value)


@pytest.mark.parametrize("dora", [False, True])
def test_the_model_says_what_it_says_under_torchtune(dora: bool, tmp_path: Path) -> None:
    saved = Saved(tmp_path, dora)
    tokens = torch.randint(0, 48, (3, 9), generator=torch.Generator().manual_seed(1))
    expected = saved.running.logits(tokens)
    with torch.no_grad():
        ours = merge(saved.lora, saved.base, made(), tmp_path)(tokens).logits
        assert not torch.allclose(made()(tokens).logits, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_updates_are_what_torchtune_would_merge(dora: bool, tmp_path: Path) -> None:
    """``get_merged_lora_ckpt``, in float64 and torchtune's row order."""
    saved = Saved(tmp_path, dora)
    found = {update.name: dense(update) for update in saved.read().updates}
    assert set(found) == {f"{hf_name(module)}.weight" for module in saved.running.modules}
    for module in saved.running.modules:
        weight = saved.running.weights[module].double()
        a, b = (saved.running.adapter[f"{module}.lora_{x}.weight"].double() for x in "ab")
        merged = weight + ALPHA / RANK * b @ a
        if dora:
            merged *= (saved.running.adapter[f"{module}.magnitude"].double() / merged.norm(dim=1)).view(-1, 1)
        ours = torch.from_numpy(found[f"{hf_name(module)}.weight"])
        if module.endswith(("q_proj", "k_proj")):
            ours = neighbours(ours, HEADS if module.endswith("q_proj") else KEYS)
        close((merged - weight).numpy(), ours.numpy())


def test_what_the_lora_says_of_itself(llama: Saved, tmp_path: Path) -> None:
    read = llama.read()
    assert read.source == {"kind": "lora", "dialect": "torchtune", "r": RANK, "lora_alpha": ALPHA}
    assert read.base_model == {"id": "some/base"}
    assert [path.name for path in read.files] == ["adapter_model.pt", "adapter_config.json"]
    assert read.notices == []
    (tmp_path / "dora").mkdir()
    assert Saved(tmp_path / "dora", dora=True).read().source["use_dora"] is True


def moved(config: Any, folder: Path) -> bool:
    """Whether the rows of queries and keys move for a model of this kind, each over its own heads."""
    saved = Saved(folder)
    config.save_pretrained(saved.base)
    updates = {update.name: dense(update) for update in saved.read().updates}

    def plain(module: str) -> Array:
        a, b = (saved.running.adapter[f"{module}.lora_{x}.weight"] for x in "ab")
        return (ALPHA / RANK * b @ a).numpy()

    found = set()
    for module, heads in ((Q, HEADS), ("layers.1.attn.k_proj", KEYS)):
        ours, expected = updates[f"{hf_name(module)}.weight"], plain(module)
        back = neighbours(torch.from_numpy(ours), heads).numpy()
        same = [np.allclose(each, expected, rtol=1e-5, atol=1e-6) for each in (back, ours)]
        assert sum(same) == 1
        found.add(same[0])
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (LlamaConfig, True),
        (MistralConfig, True),
        (GemmaConfig, True),
        (Gemma2Config, True),
        (Qwen2Config, False),
        (Qwen3Config, False),
    ],
)
def test_kinds_of_models(make: Callable[..., Any], expected: bool, tmp_path: Path) -> None:
    """``hf_to_tune`` and ``gemma2_hf_to_tune`` move rows; ``qwen2_hf_to_tune`` and ``qwen3_hf_to_tune`` do not."""
    assert moved(make(**SIZES), tmp_path) == expected


def test_other_kinds_of_models_are_refused(llama: Saved) -> None:
    config = json.loads((llama.base / "config.json").read_text())
    (llama.base / "config.json").write_text(json.dumps(config | {"model_type": "phi3"}))
    refused(
        llama,
        f"'{Q}': how torchtune stores a model of type 'phi3' is not known; supported are llama, mistral, gemma, gemma2, "
        "qwen2, qwen3",
    )


def test_a_base_without_heads(llama: Saved) -> None:
    (llama.base / "config.json").unlink()
    refused(
        llama,
        "the rows of queries and keys have another rotary embedding's order within each head: the number of heads is "
        f"needed, but {llama.base / 'model.safetensors'} has no config.json beside it and is no GGUF file",
    )
    llama.edit({key: None for key in llama.running.adapter if "q_proj" in key or "k_proj" in key})
    assert len(llama.read().updates) == 11  # the others do not need them


def test_a_gguf_as_the_base(tmp_path: Path) -> None:
    """Its header says what ``config.json`` says elsewhere."""
    state = write(tmp_path / "model.gguf", "llama")
    torch.manual_seed(2)
    name = "model.layers.1.self_attn.k_proj.weight"
    a, b = torch.randn(RANK, 64), torch.randn(state[name].shape[0], RANK)
    torch.save(
        {"layers.1.attn.k_proj.lora_a.weight": a, "layers.1.attn.k_proj.lora_b.weight": b},
        tmp_path / "adapter_0.pt",
    )
    configure(tmp_path)
    (update,) = open_lora(tmp_path / "adapter_0.pt", open_checkpoint(tmp_path / "model.gguf")).updates
    assert update.name == name
    close((ALPHA / RANK * b @ a).numpy(), neighbours(torch.from_numpy(dense(update)), 2).numpy())


# Files


def test_files_that_are_recognised(llama: Saved, tmp_path: Path) -> None:
    known = DIALECTS["torchtune"]
    assert known.recognises(llama.lora)
    assert known.recognises(llama.path)
    assert not known.recognises(llama.base)
    state = tmp_path / "state.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in llama.running.adapter.items()}, state)
    assert known.recognises(state)
    torch.save({"a": 1}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no")
    (tmp_path / "text.safetensors").write_text("no")
    for name in ("other.pt", "text.pt", "text.safetensors"):
        assert not known.recognises(tmp_path / name)
    with pytest.raises(SourceError) as caught:
        known.read(llama.base, open_checkpoint(llama.base))
    assert str(caught.value) == f"{llama.base}: no LoRA of torchtune: need adapter_model.pt or a file like it"


def test_a_folder_that_has_pefts_format_as_well_is_pefts(tmp_path: Path) -> None:
    """As torchtune's HF checkpointer leaves it; the file of torchtune can be named."""
    saved = Saved(tmp_path)
    peft = models.save_lora(
        models.random_lora(made(), r=RANK, lora_alpha=ALPHA, target_modules=["v_proj"]), tmp_path / "peft"
    )
    (peft / "adapter_model.safetensors").rename(saved.lora / "adapter_model.safetensors")
    assert [name for name, known in DIALECTS.items() if known.recognises(saved.lora)] == ["peft"]
    assert len(saved.read().updates) == 2
    base = open_checkpoint(saved.base)
    for read in (open_lora(saved.path, base), open_lora(saved.lora, base, dialect="torchtune")):
        assert read.source["dialect"] == "torchtune"
        assert len(read.updates) == 15


def test_several_epochs(llama: Saved) -> None:
    torch.save(llama.running.adapter, llama.lora / "adapter_1.pt")
    refused(llama, "several adapters (adapter_1.pt, adapter_model.pt); name one", llama.lora)
    assert len(open_lora(llama.lora / "adapter_1.pt", open_checkpoint(llama.base)).updates) == 15


# What is refused


def test_alpha_is_not_guessed_at(llama: Saved) -> None:
    (llama.lora / "adapter_config.json").unlink()
    refused(
        llama,
        "alpha is not in the file, and adapter_config.json, to which torchtune writes it, is not beside it: create one, "
        '{"r": ..., "lora_alpha": ...}, with lora_rank and lora_alpha of the recipe',
    )
    (llama.lora / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 6}')
    assert len(llama.read().updates) == 15
    assert llama.read().base_model == {}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 0}, "r and lora_alpha must be numbers, r a positive integer"),
        ({"lora_alpha": None}, "r and lora_alpha must be numbers, r a positive integer"),
        ({"use_rslora": True}, "use_rslora is set, which torchtune does not support"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is set, which torchtune does not support"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern is set, which torchtune does not support"),
    ],
)
def test_configurations_that_are_refused(llama: Saved, changes: dict[str, Any], reason: str) -> None:
    configure(llama.lora, **changes)
    refused(llama, reason, llama.lora / "adapter_config.json")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers.0.mlp.experts.lora_gate_a": torch.ones(2, 3, 4)}, "unmatched key 'layers.0.mlp.experts.lora_gate_a': it ends neither in lora_a.weight nor lora_b.weight nor magnitude (experts are not supported)"),
        ({f"{Q}.lora_b.weight": None}, f"'{Q}' has lora_a only"),
        ({f"{Q}.lora_a.weight": None, f"{Q}.lora_b.weight": None, f"{Q}.magnitude": torch.ones(96)}, f"'{Q}' has magnitude only"),
        ({"layers.0.attn.no.lora_a.weight": torch.ones(4, 64), "layers.0.attn.no.lora_b.weight": torch.ones(64, 4)}, "module 'layers.0.attn.no' has no known Hugging Face name"),
        ({"layers.00.mlp.w1.lora_a.weight": torch.ones(4, 64), "layers.00.mlp.w1.lora_b.weight": torch.ones(96, 4)}, "module 'layers.00.mlp.w1' has no known Hugging Face name"),
        ({"layers.9.mlp.w1.lora_a.weight": torch.ones(4, 64), "layers.9.mlp.w1.lora_b.weight": torch.ones(96, 4)}, "1 of 16 adapted weights are not in the base, for example 'model.layers.9.mlp.gate_proj.weight'; the base has names like 'lm_head.weight'"),
        ({f"{Q}.lora_a.weight": torch.ones(5, 64), f"{Q}.lora_b.weight": torch.ones(96, 5)}, f"'{Q}': should have rank 4 by adapter_config.json, lora_a has shape [5, 64] and lora_b [96, 5]"),
        ({f"{Q}.lora_b.weight": torch.ones(96, 5)}, f"'{Q}': should have rank 4 by adapter_config.json, lora_a has shape [4, 64] and lora_b [96, 5]"),
        ({f"{Q}.lora_b.weight": torch.ones(4)}, f"'{Q}': should have rank 4 by adapter_config.json, lora_a has shape [4, 64] and lora_b [4]"),
        ({f"{Q}.lora_b.weight": torch.ones(88, 4)}, f"'{Q}': updates a weight of shape [88, 64], the base's 'model.layers.0.self_attn.q_proj.weight' has [96, 64]"),
        ({f"{Q}.lora_b.weight": torch.ones(94, 4)}, f"'{Q}': shape [94, 4] cannot be split into 4 heads of an even number of rows"),
        ({f"{Q}.magnitude": torch.ones(95)}, f"'{Q}': magnitude has shape [95], the weight [96, 64]"),
        ({f"{Q}.lora_a.weight": torch.full((4, 64), torch.nan)}, f"'{Q}.lora_a.weight' holds NaN or Inf"),
        ({f"{Q}.lora_a.weight": torch.ones(4, 64, dtype=torch.int8)}, f"'{Q}.lora_a.weight' is of dtype int8, not a float"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(llama: Saved, changes: dict[str, Any], reason: str) -> None:
    llama.edit(changes)
    refused(llama, reason)
