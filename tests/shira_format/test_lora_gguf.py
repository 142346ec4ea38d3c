"""llama.cpp's LoRAs: files of the gguf package, read as llama.cpp applies them to the model that is stored as GGUF."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file

from shira_format._core.arrays import Array
from shira_format.checkpoints import open_checkpoint
from shira_format.checkpoints.gguf_names import ADAPTED, ARCHITECTURES
from shira_format.errors import SourceError
from shira_format.lora import DIALECTS, open_lora
from tests import models
from tests.shira_format.test_checkpoints_gguf import (
    CONFIGS,
    WITHOUT_PEER,
    converted,
    finish,
    header,
    model,
    paired,
    peer,
    put,
    write,
)
from tests.updates import close, dense

ALPHA, RANK = 6.0, 4
Factors = Mapping[str, Array]
_SQUARE = ("attn.c_proj.weight",)  # of GPT-2, and turned


def write_lora(
    path: Path, architecture: str, tensors: Factors, *, kind: Kind = Kind.F32, alpha: float | None = ALPHA,
    edit: Callable[[Any], None] = lambda _: None, types: tuple[str, ...] = ("adapter", "lora"),
) -> Path:  # fmt: skip
    """A file with the keys and tensors that ``convert_lora_to_gguf.py`` writes."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in zip(("general.type", "adapter.type"), types, strict=False):
        writer.add_string(key, value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    edit(writer)
    for name, array in tensors.items():
        if kind == Kind.F32 or array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            writer.add_tensor(name, np.ascontiguousarray(array))
        else:
            writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    finish(writer)
    return path


def names_of(architecture: str, layers: int = 2) -> Any:
    """From Hugging Face's names to GGUF's, by the gguf package."""
    return gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture), layers)


def random_factors(architecture: str, state: Mapping[str, torch.Tensor], rank: int = RANK) -> dict[str, Array]:
    """Factors for every matrix of the layers, in the shape that GGUF stores the matrix in."""
    rng = np.random.default_rng(8)
    names, found = names_of(architecture), {}
    for name, weight in state.items():
        if weight.ndim != 2 or "layers." not in name and ".h." not in name or name.endswith(_SQUARE):
            continue
        outs, ins = converted(architecture, name, weight).shape
        known = names.get_name(name, try_suffixes=(".weight",))
        found[f"{known}.lora_a"] = rng.standard_normal((rank, ins), np.float32)
        found[f"{known}.lora_b"] = rng.standard_normal((outs, rank), np.float32)
    return found


def save_hf(folder: Path, architecture: str, state: Mapping[str, torch.Tensor]) -> Path:
    """A folder of Hugging Face: weights and ``config.json``."""
    folder.mkdir()
    save_file(dict(state), folder / "model.safetensors")
    CONFIGS[architecture]().save_pretrained(folder)
    return folder


class Saved:
    """A Llama as GGUF and as Hugging Face has it, and a LoRA of its layers."""

    def __init__(self, folder: Path, architecture: str = "llama", **options: Any) -> None:
        self.state = write(folder / "model.gguf", architecture)
        self.gguf = folder / "model.gguf"
        self.hf = save_hf(folder / "hf", architecture, self.state)
        self.factors = random_factors(architecture, self.state)
        self.path = write_lora(folder / "lora.gguf", architecture, self.factors, **options)

    def rewrite(self, changes: Mapping[str, Array | None], **options: Any) -> None:
        tensors = self.factors | changes
        write_lora(self.path, "llama", {key: array for key, array in tensors.items() if array is not None}, **options)  # fmt: skip

    def updates(self, base: Path | None = None) -> dict[str, Array]:
        found = open_lora(self.path, open_checkpoint(base or self.gguf))
        return {update.name: dense(update) for update in found.updates}


@pytest.fixture
def llama(tmp_path: Path) -> Saved:
    return Saved(tmp_path)


def refused(saved: Saved, reason: str, base: Path | None = None) -> None:
    with pytest.raises(SourceError) as caught:
        saved.updates(base)
    assert f"{saved.path}: {reason}" == str(caught.value)


def test_every_architecture_is_tested() -> None:
    assert {*CONFIGS, "bert"} == set(ADAPTED)
    assert set(ADAPTED) - {"bert"} == set(ARCHITECTURES)


@pytest.mark.parametrize("base", ["gguf", "hf"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_update_is_that_of_the_stored_model(architecture: str, base: str, tmp_path: Path) -> None:
    """llama.cpp computes ``W x + scale * b (a x)`` with the W of the file: what the converter makes of ours."""
    saved = Saved(tmp_path, architecture)
    names = names_of(architecture)
    found = saved.updates(getattr(saved, base))
    assert len(found) * 2 == len(saved.factors)
    for name, update in found.items():
        known = names.get_name(name, try_suffixes=(".weight",))
        a, b = (saved.factors[f"{known}.lora_{x}"].astype(np.float64) for x in "ab")
        close(ALPHA / RANK * (b @ a), converted(architecture, name, torch.from_numpy(update)).numpy())


@pytest.mark.parametrize("architecture", sorted(set(CONFIGS) - WITHOUT_PEER))
def test_merged_as_gguf_and_read_by_transformers(architecture: str, tmp_path: Path) -> None:
    """``llama-export-lora``'s sum, in the file's own layout, undone by transformers' reader."""
    saved = Saved(tmp_path, architecture)
    names = names_of(architecture)
    (tmp_path / "merged").mkdir()
    writer = gguf.GGUFWriter(tmp_path / "merged" / "model.gguf", architecture)
    header(writer)
    for name, weight in saved.state.items():
        known, stored = (
            names.get_name(name, try_suffixes=(".weight", ".bias")),
            converted(architecture, name, weight).numpy(),
        )
        if f"{known}.lora_a" in saved.factors:
            a, b = (saved.factors[f"{known}.lora_{x}"] for x in "ab")
            stored = stored + ALPHA / RANK * (b @ a)
        put(writer, known, stored, Kind.F32)
    finish(writer)
    merged = peer(tmp_path / "merged" / "model.gguf")
    for name, update in saved.updates().items():
        close(merged[name], saved.state[name].numpy() + update)


def test_the_embedding_is_the_other_way_round(llama: Saved) -> None:
    """``llm_build_inp_embd``: ``mul_mat(lora_b, get_rows(lora_a, tokens))``, scaled."""
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((48, RANK), np.float32), rng.standard_normal((64, RANK), np.float32)
    llama.rewrite({"token_embd.weight.lora_a": a, "token_embd.weight.lora_b": b})
    update = llama.updates()["model.embed_tokens.weight"]
    assert update.shape == (48, 64)
    for token in (0, 17, 47):
        close(ALPHA / RANK * (b @ a[token]), update[token])


def test_the_head(llama: Saved) -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((RANK, 64), np.float32), rng.standard_normal((48, RANK), np.float32)
    llama.rewrite({"output.weight.lora_a": a, "output.weight.lora_b": b})
    close(ALPHA / RANK * (b @ a), llama.updates()["lm_head.weight"])


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_without_alpha_the_scale_is_1(llama: Saved, alpha: float | None) -> None:
    """``llama_adapter_lora_weight::get_scale``."""
    llama.rewrite({}, alpha=alpha)
    a, b = (llama.factors[f"blk.1.ffn_up.weight.lora_{x}"] for x in "ab")
    close(b @ a, llama.updates()["model.layers.1.mlp.up_proj.weight"])


def test_every_tensor_has_its_own_rank(llama: Saved) -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 64), np.float32), rng.standard_normal((96, 2), np.float32)
    llama.rewrite({"blk.1.ffn_up.weight.lora_a": a, "blk.1.ffn_up.weight.lora_b": b})
    read = open_lora(llama.path, open_checkpoint(llama.gguf))
    assert read.source["r"] == [2, RANK]
    (update,) = (update for update in read.updates if update.name == "model.layers.1.mlp.up_proj.weight")
    close(ALPHA / 2 * (b @ a), dense(update))


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0])
def test_other_types(kind: Kind, tmp_path: Path) -> None:
    state = write(tmp_path / "model.gguf", "llama")
    factors = random_factors("llama", state, rank=32)
    path = write_lora(tmp_path / "lora.gguf", "llama", factors, kind=kind)
    read = open_lora(path, open_checkpoint(tmp_path / "model.gguf"))
    (update,) = (update for update in read.updates if update.name == "model.layers.0.self_attn.k_proj.weight")
    stored = {tensor.name: gguf.dequantize(tensor.data, kind) for tensor in gguf.GGUFReader(path).tensors}
    a, b = (stored[f"blk.0.attn_k.weight.lora_{x}"].astype(np.float64) for x in "ab")
    assert not np.array_equal(factors["blk.0.attn_k.weight.lora_a"], a)
    close(ALPHA / 32 * (b @ a), paired(torch.from_numpy(dense(update)), 2).numpy())
    expected = ["the LoRA is quantised (Q8_0): its dequantised values are used"] if kind == Kind.Q8_0 else []
    assert read.notices == expected


def test_what_the_lora_says_of_itself(tmp_path: Path) -> None:
    def edit(writer: Any) -> None:
        writer.add_string("general.base_model.0.repo_url", "https://huggingface.co/some/base")

    read = open_lora(Saved(tmp_path, edit=edit).path, open_checkpoint(tmp_path / "model.gguf"))
    assert read.source == {
        "kind": "lora", "dialect": "gguf", "lora_alpha": ALPHA, "architecture": "llama", "r": RANK,
    }  # fmt: skip
    assert read.base_model == {"id": "some/base"}
    assert read.files == [tmp_path / "lora.gguf"]
    assert read.notices == []


@pytest.mark.parametrize("head", [False, True])
def test_bert_has_a_prefix_or_not(head: bool, tmp_path: Path) -> None:
    made = models.bert()
    base = models.save_base(made if head else made.bert, tmp_path / "base")
    a, b = np.ones((RANK, 32), np.float32), np.ones((48, RANK), np.float32)
    tensors = {"blk.1.ffn_up.weight.lora_a": a, "blk.1.ffn_up.weight.lora_b": b}
    read = open_lora(write_lora(tmp_path / "lora.gguf", "bert", tensors), open_checkpoint(base))
    assert [update.name for update in read.updates] == [
        f"{'bert.' * head}encoder.layer.1.intermediate.dense.weight"
    ]
    assert bool(read.notices) == head
    close(ALPHA / RANK * (b @ a), dense(read.updates[0]))


# Heads


def test_heads_are_those_of_the_config(llama: Saved) -> None:
    expected = llama.updates(llama.gguf)
    assert all(np.array_equal(expected[name], found) for name, found in llama.updates(llama.hf).items())
    config = json.loads((llama.hf / "config.json").read_text())
    (llama.hf / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))
    name = "model.layers.0.self_attn.k_proj.weight"
    assert not np.array_equal(expected[name], llama.updates(llama.hf)[name])
    (llama.hf / "config.json").write_text(json.dumps({"model_type": "vision", "text_config": config}))
    assert all(np.array_equal(expected[name], found) for name, found in llama.updates(llama.hf).items())


def test_without_heads(llama: Saved) -> None:
    config = llama.hf / "config.json"
    for text in ("{}", '{"model_type": "llama"}', '{"model_type": "llama", "num_attention_heads": true}'):
        config.write_text(text)
        refused(llama, f"{config} does not state the model's type and number of heads", llama.hf)
    config.unlink()
    refused(
        llama,
        "the rows of queries and keys have another rotary embedding's order within each head: the number of heads is "
        f"needed, but {llama.hf / 'model.safetensors'} has no config.json beside it and is no GGUF file",
        llama.hf,
    )
    llama.rewrite(dict.fromkeys([key for key in llama.factors if "attn_q" in key or "attn_k" in key]))
    assert len(llama.updates(llama.hf)) == 10  # where no rows have moved, none are needed


def test_heads_in_the_file_itself(llama: Saved) -> None:
    """Converters of 2024 wrote them."""
    llama.rewrite({}, edit=lambda writer: (writer.add_head_count(4), writer.add_head_count_kv(2)))
    assert len(llama.updates()) == 14
    llama.rewrite({}, edit=lambda writer: (writer.add_head_count(4), writer.add_head_count_kv(4)))
    refused(llama, "llama.attention.head_count_kv is 4, the base has 2")


def test_rows_that_are_no_pairs(llama: Saved) -> None:
    b = np.ones((12, RANK), np.float32)
    llama.rewrite({"blk.0.attn_q.weight.lora_b": b})
    refused(llama, "'blk.0.attn_q.weight': shape [12, 4] cannot be split into 4 heads of an even number of rows")


# What is refused


def add_tokens(writer: Any) -> None:
    writer.add_array("adapter.alora.invocation_tokens", [1, 2])


KNOWN = ", ".join(ADAPTED)
ONES = np.ones((RANK, 64), np.float32)


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({}, {"types": ("model",)}, "general.type is 'model', not 'adapter': not a LoRA of llama.cpp"),
        ({}, {"types": ()}, "general.type is None, not 'adapter': not a LoRA of llama.cpp"),
        ({}, {"types": ("adapter", "ia3")}, "adapter.type is 'ia3', not 'lora': not a LoRA of llama.cpp"),
        ({}, {"types": ("adapter",)}, "adapter.type is None, not 'lora': not a LoRA of llama.cpp"),
        ({}, {"edit": add_tokens}, "an activated LoRA (adapter.alora.invocation_tokens) acts on some tokens only, and is no change of weights"),
        ({}, {"alpha": float("nan")}, "adapter.lora.alpha is nan, not a number"),
        ({"blk.0.attn_norm.weight": np.ones(64, np.float32)}, {}, "unmatched key 'blk.0.attn_norm.weight': llama.cpp ignores vectors of norms; convert the adapter that the file was made from"),
        ({"blk.0.ffn_up.weight": ONES}, {}, "unmatched key 'blk.0.ffn_up.weight': it ends neither in .lora_a nor .lora_b"),
        ({"blk.0.ffn_up.weight.lora_b": None}, {}, "'blk.0.ffn_up.weight' has lora_a only"),
        ({"blk.0.ffn_gate_exps.weight.lora_a": ONES, "blk.0.ffn_gate_exps.weight.lora_b": ONES.T}, {}, "tensor 'blk.0.ffn_gate_exps.weight' has no known Hugging Face name for llama, or is none that a LoRA adapts"),
        ({"blk.0.ffn_up.bias.lora_a": ONES, "blk.0.ffn_up.bias.lora_b": ONES.T}, {}, "tensor 'blk.0.ffn_up.bias' has no known Hugging Face name for llama, or is none that a LoRA adapts"),
        ({"blk.7.ffn_up.weight.lora_a": ONES, "blk.7.ffn_up.weight.lora_b": ONES.T}, {}, "1 of 15 adapted weights are not in the base, for example 'model.layers.7.mlp.up_proj.weight'; the base has names like 'model.embed_tokens.weight'"),
        ({"blk.0.ffn_up.weight.lora_b": np.ones((95, RANK), np.float32)}, {}, "'blk.0.ffn_up.weight': updates a weight of shape [95, 64], the base's 'model.layers.0.mlp.up_proj.weight' has [96, 64]"),
        ({"blk.0.ffn_up.weight.lora_b": np.ones((96, 3), np.float32)}, {}, "'blk.0.ffn_up.weight': factors of shapes [96, 3] and [4, 64] do not fit each other"),
        ({"blk.0.ffn_up.weight.lora_b": np.ones((2, 96, RANK), np.float32)}, {}, "'blk.0.ffn_up.weight': lora_a has shape [4, 64], lora_b [2, 96, 4]: not two matrices"),
        ({"blk.0.ffn_up.weight.lora_b": np.full((96, RANK), np.inf, np.float32)}, {}, "'blk.0.ffn_up.weight.lora_b' holds NaN or Inf"),
        ({"blk.0.ffn_up.weight.lora_b": np.ones((96, RANK), np.int32)}, {}, "'blk.0.ffn_up.weight.lora_b' is of dtype int32, not a float"),
    ],
)  # fmt: skip
def test_files_that_are_refused(llama: Saved, changes: Any, options: Any, reason: str) -> None:
    llama.rewrite(changes, **options)
    refused(llama, reason)


def test_an_architecture_without_a_table(llama: Saved) -> None:
    write_lora(llama.path, "deepseek2", llama.factors)
    refused(
        llama,
        f"how the architecture 'deepseek2' stores its tensors is not known; supported are {KNOWN}",
    )


def test_a_file_without_tensors(llama: Saved) -> None:
    llama.rewrite(dict.fromkeys(llama.factors))
    refused(llama, "it holds no tensors")


def test_positions_are_not_adapted(tmp_path: Path) -> None:
    """llama.cpp never looks at such a LoRA; if it is square, it would not even notice."""
    saved = Saved(tmp_path, "gpt2")
    square = np.ones((64, 64), np.float32)
    write_lora(saved.path, "gpt2", {"position_embd.weight.lora_a": square, "position_embd.weight.lora_b": square})
    refused(
        saved,
        "tensor 'position_embd.weight' has no known Hugging Face name for gpt2, or is none that a LoRA adapts",
    )


def test_a_square_weight_of_gpt2_is_not_guessed_at(tmp_path: Path) -> None:
    saved = Saved(tmp_path, "gpt2")
    write_lora(
        saved.path, "gpt2", {"blk.0.attn_output.weight.lora_a": ONES, "blk.0.attn_output.weight.lora_b": ONES.T}
    )
    refused(
        saved,
        "'blk.0.attn_output.weight': the base's 'transformer.h.0.attn.c_proj.weight' is square and stored as [in, out], and "
        "convert_lora_to_gguf.py transposes the factors of such layers: whether they are transposed cannot be determined",
    )


# Files


def test_a_folder_with_one_file(llama: Saved, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    known = DIALECTS["gguf"]
    assert not known.recognises(folder)
    llama.path.rename(folder / "LORA.GGUF")
    base = open_checkpoint(llama.gguf)
    assert len(open_lora(folder, base).updates) == 14
    (folder / "adapter_config.json").write_text("{}")  # PEFT's, beside which the converter writes by default
    assert not known.recognises(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "other.gguf").write_bytes(b"")
    assert not known.recognises(folder)
    with pytest.raises(SourceError) as caught:
        known.read(folder, base)
    assert str(caught.value) == f"{folder}: no LoRA of llama.cpp: need one .gguf file"


def test_a_damaged_file(llama: Saved) -> None:
    content = llama.path.read_bytes()
    for length in (0, 20, 200, len(content) - 1):
        llama.path.write_bytes(content[:length])
        with pytest.raises(SourceError) as caught:
            llama.updates()
        assert str(caught.value).startswith(f"{llama.path}: ")


def test_without_the_package(llama: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_checkpoint(llama.hf)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SourceError) as caught:
        open_lora(llama.path, base)
    assert str(caught.value) == f"{llama.path}: GGUF files need the gguf package: pip install 'shira-format[gguf]'"


def test_small_models_have_every_matrix() -> None:
    """So that the comparisons above leave none out."""
    assert len(random_factors("llama", model("llama"))) == 2 * 14
    assert len(random_factors("gpt2", model("gpt2"))) == 2 * 6
