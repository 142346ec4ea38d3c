"""Embeddings and heads under PEFT's LoRA: trained rows, copies of the base, tied weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.errors import SourceError
from shira_format.format import load
from shira_format.selection import TopK
from tests import models
from tests.merges import Adapted, check_merge, results
from tests.rules import arguments

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [7, 1, 49]}


def tied() -> LlamaForCausalLM:
    """A Llama whose head is its embeddings' weight."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=56, max_position_embeddings=16, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def say_tied(adapted: Adapted) -> None:
    (adapted.base / "config.json").write_text('{"tie_word_embeddings": true}')


def same_outputs(adapted: Adapted) -> None:
    live, ours = models.outputs(adapted.peft()), models.outputs(adapted.applied())
    torch.testing.assert_close(ours, live, rtol=1e-4, atol=1e-4)
    assert (models.outputs(adapted.make()) - live).abs().max() > 1e-2


def refused(adapted: Adapted, reason: str, name: str = "adapter_model.safetensors") -> None:
    with pytest.raises(SourceError) as caught:
        adapted.read()
    assert str(caught.value).startswith(f"{adapted.lora / name}: {reason}")


# Rows


@pytest.mark.parametrize(
    "indices", [[7, 1, 49], {"embed_tokens": [3]}, {"model.embed_tokens": [0, 2], "lm_head": [4, 3]}]
)
def test_trained_rows(indices: Any, tmp_path: Path) -> None:
    adapted = Adapted(tmp_path, models.llama, **ROWS | {"trainable_token_indices": indices})
    check_merge(adapted, changed=2 + (len(indices) if isinstance(indices, dict) else 1))
    same_outputs(adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trained_rows_are_replaced_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    adapted = Adapted(tmp_path, models.llama, dtype=dtype, **ROWS)
    trained = load_file(adapted.lora / "adapter_model.safetensors")
    rows = trained["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    for rule in (TopK(1.0), TopK(1.0, scope="global")):
        lora_to_shira(adapted.lora, adapted.base, tmp_path / "all.st", **arguments(rule))
        tensor = load(tmp_path / "all.st")[EMBED]
        found = load_file(adapted.base / "model.safetensors")[EMBED].float().flatten().numpy().copy()
        found[tensor.indices] = tensor.values.astype(np.float32)
        assert np.array_equal(found.reshape(50, 32)[[7, 1, 49]], rows.to(dtype).float().numpy())
        assert set(tensor.indices // 32) <= {1, 7, 49}
        assert tensor.nnz > 3 * 32 * 0.9


def test_trained_rows_of_a_tied_head(tmp_path: Path) -> None:
    """PEFT ties what it trains to the head; the base stores the weight once."""
    adapted = Adapted(tmp_path, tied, **ROWS)
    say_tied(adapted)
    assert HEAD not in load_file(adapted.base / "model.safetensors")
    assert len(adapted.read().updates) == 3
    same_outputs(adapted)
    assert adapted.read().notices == []


def test_a_copy_of_the_embeddings_beside_trained_rows(tmp_path: Path) -> None:
    adapted = Adapted(tmp_path, models.llama, **ROWS)
    expected = results(adapted)
    models.save_lora(adapted.peft(), adapted.lora, save_embedding_layers=True)
    assert len(load_file(adapted.lora / "adapter_model.safetensors")) > 5
    assert all(np.array_equal(expected[name], found) for name, found in results(adapted).items())
    assert adapted.read().whole == {}


DELTA = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
Edit = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@pytest.mark.parametrize(
    ("indices", "edit", "file", "reason"),
    [
        ([1, 2], None, "adapter_model.safetensors", f"{DELTA[17:]} has shape [3, 32]; 2 rows of {EMBED!r}, [50, 32], are"),
        ([1, 2, 50], None, "adapter_config.json", f"trainable_token_indices has row 50, the base's {EMBED!r} has 50"),
        ([1, 2, 1], None, "adapter_config.json", "trainable_token_indices names a row twice"),
        ([1, 2, -1], None, "adapter_config.json", "trainable_token_indices must be a list of rows, or map"),
        ({"other": [1, 2, 3]}, None, "adapter_config.json", "trainable_token_indices does not say which rows of 'model.e"),
        ([], None, "adapter_config.json", "trainable_token_indices does not say which rows of 'model.embed_tokens' are"),
        (5, None, "adapter_config.json", "trainable_token_indices must be a list of rows, or map"),
        ([1, 2, 3], lambda s: {n: t for n, t in s.items() if n != DELTA}, "adapter_model.safetensors",
         "trainable_token_indices is set, and no key ends in trainable_tokens_delta"),
        ([1, 2, 3], lambda s: s | {DELTA: torch.ones(3, 31)}, "adapter_model.safetensors",
         f"{DELTA[17:]} has shape [3, 31]; 3 rows"),
        ([1, 2, 3], lambda s: s | {DELTA.replace("_delta", "_other"): torch.ones(3)}, "adapter_model.safetensors",
         "unmatched key 'base_model.model.model.embed_tokens.token_adapter.trainable_tokens_other': not a known part"),
    ],
)  # fmt: skip
def test_bad_rows(indices: Any, edit: Edit | None, file: str, reason: str, tmp_path: Path) -> None:
    adapted = Adapted(tmp_path, models.llama, **ROWS)
    models.edit_config(adapted.lora, trainable_token_indices=indices)
    if edit is not None:
        models.edit_weights(adapted.lora, edit)
    refused(adapted, reason, file)


def test_rows_that_the_base_cannot_hold(tmp_path: Path) -> None:
    adapted = Adapted(tmp_path, models.llama, dtype=torch.float16, **ROWS)
    models.edit_weights(adapted.lora, lambda s: s | {DELTA: s[DELTA] * 1e7})
    refused(adapted, "new rows of 'model.embed_tokens' do not fit the base's dtype float16")


# Copies of the base


def test_embeddings_that_are_saved_beside(tmp_path: Path) -> None:
    """``save_embedding_layers`` writes them whole; what equals the base is nothing new, and what does not replaces it."""
    adapted = Adapted(tmp_path, models.llama, r=2, target_modules=["q_proj"])
    models.save_lora(adapted.peft(), adapted.lora, save_embedding_layers=True)
    key = f"base_model.model.{EMBED}"
    assert {key, f"base_model.model.{HEAD}"} < load_file(adapted.lora / "adapter_model.safetensors").keys()
    assert adapted.read().whole == {}
    models.edit_weights(adapted.lora, lambda s: s | {key: s[key].bfloat16()})
    assert adapted.read().whole == {}
    models.edit_weights(adapted.lora, lambda s: s | {key: s[key].float() * 2})
    assert set(adapted.read().whole) == {EMBED}
    models.edit_weights(adapted.lora, lambda s: s | {key: torch.ones(52, 32)})
    refused(
        adapted,
        f"{EMBED!r} has 52 rows, the base 50 (a resized vocabulary), but {HEAD!r} has 50: merge the adapter",
    )
    models.edit_weights(adapted.lora, lambda s: s | {key: torch.ones(50, 31)})
    refused(adapted, f"{EMBED!r} has shape [50, 31], the base's {EMBED!r} has [50, 32]: merge the LoRA with PEFT")


def test_the_embeddings_under_a_lora_must_be_those_of_the_base(tmp_path: Path) -> None:
    adapted = Adapted(tmp_path, models.llama, r=2, target_modules=["embed_tokens", "lm_head"])
    check_merge(adapted, changed=2)
    same_outputs(adapted)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    models.edit_weights(adapted.lora, lambda s: s | {key: s[key] + 1})
    refused(adapted, f"{EMBED!r} lies below its LoRA and is not the base's {EMBED!r} (resized or trained)")


# Tied weights


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "lm_head"], ["embed_tokens", "q_proj"]])
def test_a_tied_lora_changes_the_weight_once(targets: list[str], tmp_path: Path) -> None:
    """As PEFT's forward pass has it; its merge adds the update of embeddings and head to their one weight."""
    adapted = Adapted(tmp_path, tied, r=2, lora_alpha=3, target_modules=targets, ensure_weight_tying=True)
    say_tied(adapted)
    assert any("lm_head.lora_A" in key for key in load_file(adapted.lora / "adapter_model.safetensors"))
    same_outputs(adapted)
    assert adapted.read().notices == []
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        merged = adapted.peft().merge_and_unload()
    assert (models.outputs(merged) - models.outputs(adapted.peft())).abs().max() > 0.1


def test_a_head_with_a_lora_of_its_own_needs_a_weight(tmp_path: Path) -> None:
    adapted = Adapted(tmp_path, tied, r=2, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    key = "base_model.model.lm_head.lora_A.weight"
    models.edit_weights(adapted.lora, lambda s: s | {key: s[key] * 2})
    reason = (
        "'lm_head' has a LoRA of its own, and the base has no weight of it: if its head is tied to its embeddings"
    )
    refused(adapted, reason)
    refused(Adapted(tmp_path / "alone", tied, r=2, target_modules=["lm_head"]), reason)


@pytest.mark.parametrize(
    ("config", "is_tied"),
    [
        ({"architectures": ["LlamaModel"]}, False),
        ({"architectures": ["LlamaForSequenceClassification"]}, False),
        ({"architectures": ["LlamaForCausalLM"]}, True),
        ({"architectures": []}, True),
    ],
)
def test_embeddings_of_a_model_without_a_head_are_tied_to_nothing(
    config: dict[str, list[str]], is_tied: bool, tmp_path: Path
) -> None:
    adapted = Adapted(tmp_path, tied, r=2, target_modules=["embed_tokens"])
    (adapted.base / "config.json").write_text(json.dumps({"tie_word_embeddings": True} | config))
    if is_tied:
        refused(adapted, "changes 'model.embed_tokens.weight', to which the base's head is tied")
    else:
        refused(
            adapted, "changes 'model.embed_tokens.weight', to which the base's head is tied"
        )  # its own model had one
        models.edit_config(adapted.lora, auto_mapping={"base_model_class": "LlamaForSequenceClassification"})
        assert len(adapted.read().updates) == 1


def test_embeddings_of_a_tied_head_cannot_change_alone(tmp_path: Path) -> None:
    """PEFT's model changes the input embeddings and keeps the head: one tensor cannot be both."""
    adapted = Adapted(tmp_path, tied, r=2, target_modules=["embed_tokens"])
    (notice,) = adapted.read().notices
    assert notice.startswith(
        "'model.embed_tokens.weight' changes: if the base's model ties its head to it, the head "
    )
    say_tied(adapted)
    refused(adapted, "changes 'model.embed_tokens.weight', to which the base's head is tied")
    # The way out: a base whose head has a weight of its own.
    state = load_file(adapted.base / "model.safetensors")
    save_file(state | {HEAD: state[EMBED].clone()}, adapted.base / "model.safetensors")
    (adapted.base / "config.json").write_text('{"tie_word_embeddings": false}')
    assert adapted.read().notices == []

    def untied() -> nn.Module:
        model = tied()
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
        return model

    live = models.outputs(adapted.peft())
    adapted.make = untied
    torch.testing.assert_close(models.outputs(adapted.applied()), live, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["", "[]", '{"tie_word_embeddings": 1}', "[" * 5000])
def test_configs_of_the_base_that_say_nothing(text: str, tmp_path: Path) -> None:
    adapted = Adapted(tmp_path, tied, r=2, target_modules=["embed_tokens"])
    (adapted.base / "config.json").write_text(text)
    assert len(adapted.read().notices) == 1


def test_saved_modules_of_a_tied_head(tmp_path: Path) -> None:
    options = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    both = Adapted(tmp_path / "both", tied, **options | {"ensure_weight_tying": True})
    say_tied(both)
    assert f"base_model.model.{HEAD}" in load_file(both.lora / "adapter_model.safetensors")
    assert set(both.read().whole) == {EMBED}
    same_outputs(both)
    alone = Adapted(tmp_path / "alone", tied, **options)
    say_tied(alone)
    refused(alone, "changes 'model.embed_tokens.weight', to which the base's head is tied")
    head = Adapted(tmp_path / "head", tied, **options | {"modules_to_save": ["lm_head"]})
    assert set(head.read().whole) == {HEAD}
    (notice,) = head.read().notices
    assert notice.startswith("tensor 'lm_head.weight' is new: if the base's model ties its head")


def test_what_is_saved_of_a_tied_head_is_no_new_tensor(tmp_path: Path) -> None:
    adapted = Adapted(tmp_path, tied, r=2, target_modules=["q_proj"])
    models.save_lora(adapted.peft(), adapted.lora, save_embedding_layers=True)
    assert f"base_model.model.{HEAD}" in load_file(adapted.lora / "adapter_model.safetensors")
    assert adapted.read().whole == {}
    models.edit_weights(adapted.lora, lambda s: s | {f"base_model.model.{HEAD}": torch.ones(50, 32)})
    refused(adapted, f"unmatched key {HEAD!r}: neither in the base nor in modules_to_save")


def test_nothing_of_the_tied_base_is_left_out(tmp_path: Path) -> None:
    """The whole way of a tied LoRA: the file has the embeddings, and no head."""
    adapted = Adapted(tmp_path, tied, r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    lora_to_shira(adapted.lora, adapted.base, tmp_path / "all.st")
    assert list(load(tmp_path / "all.st")) == [EMBED]
    assert json.loads((adapted.lora / "adapter_config.json").read_text())["ensure_weight_tying"] is True
    assert EMBED in open_checkpoint(adapted.base)
