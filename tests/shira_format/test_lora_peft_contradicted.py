"""Options of PEFT that the file beside them or the base contradicts, or that can be read in two ways: refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel, T5Config, T5ForConditionalGeneration

from shira_format.errors import SourceError
from tests import models
from tests.merges import Adapted, check_merge


def refused(adapted: Adapted, *words: str) -> None:
    with pytest.raises(SourceError) as caught:
        adapted.read()
    for word in words:
        assert word in str(caught.value)


def without(adapted: Adapted, ending: str) -> None:
    models.edit_weights(
        adapted.lora, lambda state: {key: found for key, found in state.items() if not key.endswith(ending)}
    )


# Trained tensors that are not in the file.


def test_a_module_to_save_that_was_not_saved(tmp_path: Path) -> None:
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    adapted = Adapted(tmp_path, models.llama, **options)
    check_merge(adapted, changed=3)
    models.edit_config(adapted.lora, modules_to_save=["lm_head", "score"])  # no module of this model
    adapted.read()
    without(adapted, "lm_head.weight")
    refused(adapted, "modules_to_save has 'lm_head', and no tensor of it is here")
    models.edit_config(adapted.lora, modules_to_save=["score"])
    adapted.read()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_that_were_not_saved(bias: str, tmp_path: Path) -> None:
    adapted = Adapted(tmp_path, models.bert, r=2, target_modules=["query"], bias=bias)
    adapted.read()
    without(adapted, ".bias")
    refused(
        adapted,
        f"bias is {bias!r}, and no bias is here",
        "attention.self.query.bias" if bias == "lora_only" else ".bias",
    )
    models.edit_config(adapted.lora, bias="none")
    adapted.read()


def test_a_model_without_biases_has_none_to_save(tmp_path: Path) -> None:
    for bias in ("all", "lora_only"):
        check_merge(Adapted(tmp_path / bias, models.llama, r=2, target_modules=["q_proj"], bias=bias), changed=2)


def test_a_lora_bias_that_was_not_saved(tmp_path: Path) -> None:
    adapted = Adapted(tmp_path, models.bert, r=2, target_modules=["query"], lora_bias=True)
    adapted.read()
    without(adapted, "layer.1.attention.self.query.lora_B.bias")
    refused(adapted, "layer.1.attention.self.query' has no lora_B.bias, and lora_bias is set")


# Several patterns for one module.


def test_alphas_of_sorted_patterns(tmp_path: Path) -> None:
    """PEFT sorts patterns when it saves, and takes the first that matches: after loading it is another one."""
    alphas = {"q_proj": 8, "layers.1.self_attn.q_proj": 2}
    adapted = Adapted(tmp_path, models.llama, r=2, lora_alpha=3, target_modules=["q_proj"], alpha_pattern=alphas)
    trained = models.layers(models.random_lora(models.llama(), r=2, lora_alpha=3, target_modules=["q_proj"], alpha_pattern=alphas))  # fmt: skip
    assert {layer.scaling["default"] for layer in trained.values()} == {4.0}
    assert {layer.scaling["default"] for layer in models.layers(adapted.peft()).values()} == {4.0, 1.0}
    refused(adapted, "'layers.1.self_attn.q_proj' (2) and 'q_proj' (8)", "the file has them sorted")
    models.edit_config(adapted.lora, alpha_pattern={"q_proj": 8, "layers.1.self_attn.q_proj": 8})
    check_merge(adapted, changed=2)
    models.edit_config(adapted.lora, alpha_pattern=alphas)  # not sorted: as someone wrote it
    check_merge(adapted, changed=2)


# Layouts that nothing in the base shows.


class Square(nn.Module):
    """Linear layers without biases, the adapted ones square, as the query of a Llama."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 12, bias=False)


def test_a_transposed_layout_that_nothing_shows(tmp_path: Path) -> None:
    adapted = Adapted(tmp_path, Square, r=2, target_modules=["first"])
    check_merge(adapted, changed=1)
    models.edit_config(adapted.lora, fan_in_fan_out=True)
    refused(adapted, "'first' updates a square weight, and other layers do not show fan_in_fan_out=True")


# Embeddings that other modules share.


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(1)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)
    )


def openai() -> OpenAIGPTLMHeadModel:
    torch.manual_seed(1)
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q", "shared"]}, {"target_modules": ["q"], "modules_to_save": ["shared"]},
        {"target_modules": ["q", "shared"], "ensure_weight_tying": True},
    ],
)  # fmt: skip
def test_embeddings_that_encoder_and_decoder_share(options: dict[str, Any], tmp_path: Path) -> None:
    """PEFT's model changes one module of those that share the weight, its merged model changes all."""
    adapted = Adapted(tmp_path, t5, r=2, **options)
    refused(adapted, "changes 'shared.weight', which the encoder's and the decoder's embeddings share")
    check_merge(Adapted(tmp_path / "q", t5, r=2, target_modules=["q"]), changed=3)


def test_tied_embeddings_by_their_number_of_rows(tmp_path: Path) -> None:
    adapted = Adapted(tmp_path, openai, r=2, target_modules=["c_attn", "tokens_embed"], fan_in_fan_out=True)
    for text in ('{"tie_word_embeddings": true, "vocab_size": 50}', '{"tie_word_embeddings": true}'):
        (adapted.base / "config.json").write_text(text)
        refused(adapted, "changes 'transformer.tokens_embed.weight', to which the base's head is tied")
