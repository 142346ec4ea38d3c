"""Adapters of models whose vocabulary was resized: embeddings and head are saved whole, with other numbers of rows."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.convert.peft_shira import peft_to_shira
from shira_format.errors import SourceError
from shira_format.export.full import shira_to_full
from shira_format.lora import open_lora
from tests import models
from tests.shira_format.test_lora_peft_embeddings import tied

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WAY_OUT = r"merge the (LoRA|adapter) with PEFT and convert the full checkpoint \(full_to_shira\)"


def resized(make: Any, rows: int) -> LlamaForCausalLM:
    model: LlamaForCausalLM = make()
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(rows)
    return model


def adapter(folder: Path, make: Any, rows: int, *, save_embedding_layers: bool = False, **options: Any) -> tuple[Path, Path, dict[str, torch.Tensor]]:  # fmt: skip
    """The base before it was resized, the LoRA of the resized model, and the weights that PEFT merges."""
    base = models.save_base(make(), folder / "base")
    peft = models.random_lora(resized(make, rows), seed=5, scale=0.2, **options)
    lora = models.save_lora(peft, folder / "lora", save_embedding_layers=save_embedding_layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = models.load_lora(resized(make, rows), lora).merge_and_unload().state_dict()
    return base, lora, merged


def check(base: Path, lora: Path, merged: dict[str, torch.Tensor], rows: int, folder: Path) -> None:
    report = lora_to_shira(lora, base, folder / "x.st", density=1.0)
    assert any(f"{rows} rows, the base has 50 (a resized vocabulary): replaced whole" in n for n in report.notices)
    assert not any("is not in the base" in notice for notice in report.notices if EMBED in notice)
    shira_to_full(folder / "x.st", base, folder / "ours")
    found = load_file(folder / "ours" / "model.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-6, msg=name)
    assert found[EMBED].shape[0] == rows
    assert merged.keys() - found.keys() <= {HEAD}


@pytest.mark.parametrize("rows", [43, 57])
@pytest.mark.parametrize("how", ["modules_to_save", "save_embedding_layers"])
def test_a_resized_vocabulary(how: str, rows: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]} if how == "modules_to_save" else {"save_embedding_layers": True}  # fmt: skip
    check(*adapter(tmp_path, models.llama, rows, r=2, target_modules=["q_proj"], **options), rows, tmp_path)


@pytest.mark.parametrize("says", [True, False])
def test_a_resized_vocabulary_of_a_tied_head(says: bool, tmp_path: Path) -> None:
    base, lora, merged = adapter(tmp_path, tied, 57, r=2, target_modules=["q_proj"], save_embedding_layers=True)
    (base / "config.json").write_text(json.dumps({"tie_word_embeddings": says}))
    check(base, lora, merged, 57, tmp_path)


def test_one_of_the_two_alone_is_refused(tmp_path: Path) -> None:
    for i, module in enumerate(("embed_tokens", "lm_head")):
        base, lora, _ = adapter(
            tmp_path / str(i), models.llama, 57, r=2, target_modules=["q_proj"], modules_to_save=[module]
        )
        state = load_file(lora / "adapter_model.safetensors")  # PEFT saves the other as well
        kept = {n: t for n, t in state.items() if "lora_" in n or module in n}
        save_file(kept, lora / "adapter_model.safetensors")
        with pytest.raises(
            SourceError, match=rf"has 57 rows, the base 50 \(a resized vocabulary\), but .* has 50: {WAY_OUT}"
        ):
            lora_to_shira(lora, base, None)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_lora_of_resized_weights_is_refused(module: str, tmp_path: Path) -> None:
    base, lora, _ = adapter(tmp_path, models.llama, 57, r=2, target_modules=[module])
    with pytest.raises(SourceError, match=WAY_OUT):
        open_lora(lora, open_checkpoint(base))
    state = load_file(lora / "adapter_model.safetensors")
    save_file({n: t for n, t in state.items() if "lora_" in n}, lora / "adapter_model.safetensors")
    with pytest.raises(SourceError, match=rf"the base's '.*' has \[50, 32\] \(a resized vocabulary\): {WAY_OUT}"):
        open_lora(lora, open_checkpoint(base))


def test_trained_rows_beyond_the_base_are_refused(tmp_path: Path) -> None:
    base, lora, _ = adapter(
        tmp_path,
        models.llama,
        57,
        r=2,
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [1, 55]},
    )
    state = load_file(lora / "adapter_model.safetensors")
    kept = {n: t for n, t in state.items() if "lora_" in n or n.endswith("trainable_tokens_delta")}
    save_file(kept, lora / "adapter_model.safetensors")
    with pytest.raises(SourceError, match=rf"has row 55, the base's .* has 50 \(was it resized\?\): {WAY_OUT}"):
        open_lora(lora, open_checkpoint(base))


def test_a_resized_vocabulary_in_a_sparse_adapter(tmp_path: Path) -> None:
    base = models.save_base(models.llama(), tmp_path / "base")
    folder = tmp_path / "shira"
    folder.mkdir()
    flat = torch.randperm(32 * 32)[: 2 * 64]
    key = "base_model.model.model.layers.0.self_attn.q_proj.shira_"
    state = {f"{key}indices": torch.stack([flat // 32, flat % 32]).int(), f"{key}weight": torch.randn(128)}
    both = {f"base_model.model.{name}": torch.randn(57, 32) for name in (EMBED, HEAD)}
    save_file(state | both, folder / "adapter_model.safetensors")
    config = {"peft_type": "SHIRA", "r": 2, "modules_to_save": ["embed_tokens", "lm_head"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    report = peft_to_shira(folder, base, tmp_path / "x.st")
    assert any("57 rows, the base has 50" in notice for notice in report.notices)
    shira_to_full(tmp_path / "x.st", base, tmp_path / "ours")
    found = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(found[name], both[f"base_model.model.{name}"]) for name in (EMBED, HEAD))
    save_file(state | {f"base_model.model.{EMBED}": torch.randn(57, 32)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["embed_tokens"]}))
    with pytest.raises(SourceError, match=WAY_OUT):
        peft_to_shira(folder, base, None)
