"""LoRAs as PEFT writes them against what PEFT itself makes of them."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from shira_format._core.arrays import as_array
from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.errors import BaseMismatch, SourceError
from shira_format.format import load
from shira_format.live import apply
from shira_format.lora import Lora, open_lora
from shira_format.selection import TopK
from tests import models

EVERYTHING = TopK(1.0)
EPS = float(np.finfo(np.float32).eps)

LINEAR_OF_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("net", {"r": 4, "lora_alpha": 6, "target_modules": ["wide", "square", "head"]}),
    "rslora": ("net", {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["wide", "square"]}),
    "lora_bias": ("net", {"r": 3, "lora_bias": True, "target_modules": ["wide", "square"]}),
    "lora_bias_rslora": ("net", {"r": 3, "lora_bias": True, "use_rslora": True, "target_modules": ["wide"]}),
    "bias_lora_only": ("net", {"r": 2, "bias": "lora_only", "target_modules": ["wide", "head"]}),
    "bias_all": ("net", {"r": 2, "bias": "all", "target_modules": ["square"]}),
    "gaussian_start": ("net", {"r": 2, "init_lora_weights": "gaussian", "target_modules": ["wide"]}),
    "orthogonal_start": ("net", {"r": 2, "init_lora_weights": "orthogonal", "target_modules": ["wide"]}),
    "full_rank": ("net", {"r": 40, "lora_alpha": 1, "target_modules": ["square"]}),
    "bert": ("bert", {"r": 4, "target_modules": ["query", "value", "dense"]}),
    "bert_head": ("bert", {"r": 4, "target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "bert_bias": ("bert", {"r": 4, "target_modules": ["query", "output.dense"], "bias": "all"}),
    "bert_patterns": (
        "bert",
        {
            "r": 4,
            "lora_alpha": 5,
            "use_rslora": True,
            "target_modules": ["query", "key", "value", "dense"],
            "rank_pattern": {r"layer\.0\..*query": 2, "layer.1.attention.self.key": 7, "query": 3},
            "alpha_pattern": {r"encoder\.layer\.[01]\.output\.dense": 9, "^bert.pooler.dense": 2.5, "value": 0.5},
        },
    ),
    "bert_all_linear": ("bert", {"r": 2, "target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "llama": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": LINEAR_OF_LLAMA}),
    "llama_some_layers": (
        "llama",
        {"r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    ),
    "llama_norms": ("llama", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm", "embed_tokens"]}),
    "llama_head": ("llama", {"r": 4, "target_modules": ["q_proj", "lm_head"]}),
    "gpt2": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2_square_only": ("gpt2", {"r": 4, "target_modules": ["attn.c_proj"]}),
    "gpt2_bias": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "lora_bias": True}),
    "gpt2_declared": ("gpt2", {"r": 4, "target_modules": ["c_proj"], "fan_in_fan_out": True}),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}


class Saved:
    """A base and a LoRA of it on disk."""

    def __init__(self, folder: Path, model: str, options: dict[str, Any]) -> None:
        self.make = models.MODELS[model]
        self.base = models.save_base(self.make(), folder / "base")
        self.lora = models.save_lora(models.random_lora(self.make(), **options), folder / "lora")

    def read(self) -> Lora:
        return open_lora(self.lora, open_checkpoint(self.base))


@pytest.fixture
def net(tmp_path: Path) -> Saved:
    return Saved(tmp_path, "net", {"r": 4, "lora_alpha": 6, "target_modules": ["wide", "square"]})


def dense(update: Any) -> np.ndarray[Any, Any]:
    rows = update.shape[0]
    out = np.empty((rows, int(np.prod(update.shape[1:]))), update.dtype)
    update.tile(0, rows, out)
    return out.reshape(update.shape)


def peers(peft: Any, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """PEFT's update of the weight ``name``, and how far two float32 computations of it may be apart.

    A dot product of ``r`` terms in any order, with the scale multiplied in anywhere, is off by at most ``(r + 2)``
    half ulps of the sum of the absolute terms; two of them by twice that.
    """
    layer = models.layers(peft)[name.removesuffix(".weight")]
    with torch.no_grad():
        update = layer.get_delta_weight("default").double().numpy()
        a, b = layer.lora_A["default"].weight.double().abs(), layer.lora_B["default"].weight.double().abs()
        reach = (b @ a).numpy() * abs(layer.scaling["default"]) * EPS * (a.shape[0] + 2)
    return update, reach if reach.shape == update.shape and not layer.fan_in_fan_out else reach.T


@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_peft(case: str, tmp_path: Path) -> None:
    model, options = CASES[case]
    saved = Saved(tmp_path, model, options)
    peft = models.load_lora(saved.make(), saved.lora)
    updates = saved.read().updates
    assert {f"{name}.weight" for name in models.layers(peft)} == {update.name for update in updates}
    for update in updates:
        expected, tolerance = peers(peft, update.name)
        assert expected.shape == update.shape
        assert (np.abs(expected - dense(update)) <= tolerance).all(), update.name
        assert np.abs(expected).max() > 100 * tolerance.max()  # the comparison means something


@pytest.mark.parametrize("case", CASES)
def test_a_full_conversion_is_the_merged_model(case: str, tmp_path: Path) -> None:
    model, options = CASES[case]
    saved = Saved(tmp_path, model, options)
    merged = models.load_lora(saved.make(), saved.lora).merge_and_unload()
    lora_to_shira(saved.lora, saved.base, tmp_path / "adapter.st", density=1.0)
    ours = saved.make()
    applied = apply(load(tmp_path / "adapter.st"), ours.state_dict())
    expected, actual = merged.state_dict(), ours.state_dict()
    assert expected.keys() == actual.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=4 * EPS, atol=4 * EPS, msg=name)
    assert not torch.equal(models.outputs(saved.make()), models.outputs(ours))
    torch.testing.assert_close(models.outputs(ours), models.outputs(merged), rtol=1e-5, atol=1e-5)
    applied.revert()
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in saved.make().state_dict().items())


@pytest.mark.parametrize("lora_dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("case", ["plain", "gpt2"])
def test_targets_are_the_merge_rounded_once(case: str, base_dtype: str, lora_dtype: str, tmp_path: Path) -> None:
    model, options = CASES[case]
    make = models.MODELS[model]
    base = models.save_base(make(), tmp_path / "base", DTYPES[base_dtype])
    lora = models.save_lora(models.random_lora(make(), **options), tmp_path / "lora", DTYPES[lora_dtype])
    lora_to_shira(lora, base, tmp_path / "adapter.st", density=1.0)
    adapter, weights = load(tmp_path / "adapter.st"), load_file(base / "model.safetensors")
    # PEFT in float32 on the values of the base, whatever their dtype: what it says of the update does not depend on it.
    peft = models.load_lora(make(), lora)
    assert len(adapter) == len(models.layers(peft))
    for name, tensor in adapter.items():
        update, tolerance = peers(peft, name)
        wide = weights[name].double().numpy()
        # Rounding is monotonic, so the target lies between those of the smallest and the largest possible update.
        low, high = (
            _rounded(wide + update + side * tolerance, wide + update, base_dtype, side) for side in (-1, 1)
        )
        ours = np.array(as_array(weights[name]).astype(np.float64))
        ours.flat[tensor.indices] = tensor.values.astype(np.float64)
        assert str(weights[name].dtype).removeprefix("torch.") == str(tensor.dtype)
        assert (low <= ours).all(), name
        assert (ours <= high).all(), name
        if base_dtype in ("fp16", "bf16"):
            assert (low == high).mean() > 0.95  # the bounds are tight: PEFT's result, rounded once


def _rounded(bound: np.ndarray[Any, Any], centre: np.ndarray[Any, Any], dtype: str, side: int) -> Any:
    """``bound`` as the working precision may see it (half an ulp of the sum further out), rounded to ``dtype``."""
    working = EPS / 2 if dtype != "fp64" else np.finfo(np.float64).eps
    return torch.from_numpy(bound + side * working * np.abs(centre)).to(DTYPES[dtype]).double().numpy()


def test_a_float64_lora_is_computed_in_float64(net: Saved, tmp_path: Path) -> None:
    models.edit_weights(net.lora, lambda state: {name: tensor.double() / 3 for name, tensor in state.items()})
    state = load_file(net.lora / "adapter_model.safetensors")
    for update in net.read().updates:
        module = f"base_model.model.{update.name.removesuffix('.weight')}"
        expected = (state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"]).numpy() * 1.5
        assert np.dtype(np.float64) == update.dtype
        np.testing.assert_allclose(dense(update), expected, rtol=1e-13, atol=1e-15)


def test_a_bin_file_means_the_same(net: Saved, tmp_path: Path) -> None:
    state = load_file(net.lora / "adapter_model.safetensors")
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(net.lora / "adapter_config.json", old)
    torch.save(state, old / "adapter_model.bin")
    expected = {update.name: dense(update) for update in net.read().updates}
    for path in (old, old / "adapter_model.bin"):
        read = open_lora(path, open_checkpoint(net.base))
        assert expected.keys() == {update.name for update in read.updates}
        assert all(np.array_equal(expected[update.name], dense(update)) for update in read.updates)


def test_peft_writes_bin_files(net: Saved, tmp_path: Path) -> None:
    peft = models.load_lora(net.make(), net.lora)
    old = models.save_lora(peft, tmp_path / "old", safe_serialization=False)
    assert (old / "adapter_model.bin").is_file()
    expected = {update.name: dense(update) for update in net.read().updates}
    actual = {update.name: dense(update) for update in open_lora(old, open_checkpoint(net.base)).updates}
    assert expected.keys() == actual.keys()
    assert all(np.array_equal(expected[name], actual[name]) for name in expected)


def test_bf16_in_a_bin_file(net: Saved, tmp_path: Path) -> None:
    state = {n: t.bfloat16() for n, t in load_file(net.lora / "adapter_model.safetensors").items()}
    (net.lora / "adapter_model.safetensors").unlink()
    torch.save(state, net.lora / "adapter_model.bin")
    wide = next(update for update in net.read().updates if update.name == "wide.weight")
    a, b = (state[f"base_model.model.wide.lora_{x}.weight"].float() for x in "AB")
    np.testing.assert_allclose(dense(wide), (b @ a).numpy() * 1.5, rtol=1e-5, atol=1e-6)


def test_a_named_adapter_lies_in_a_subfolder(tmp_path: Path) -> None:
    base = models.save_base(models.net(), tmp_path / "base")
    peft = models.random_lora(models.net(), adapter="style", r=2, target_modules=["wide"])
    lora = models.save_lora(peft, tmp_path / "lora")
    assert [path.name for path in lora.iterdir() if path.is_dir()] == ["style"]
    from_folder, direct = (open_lora(p, open_checkpoint(base)) for p in (lora, lora / "style"))
    assert from_folder.files == direct.files
    assert np.array_equal(dense(from_folder.updates[0]), dense(direct.updates[0]))
    assert from_folder.updates[0].name == "wide.weight"


def test_several_adapters_in_a_folder_are_ambiguous(net: Saved, tmp_path: Path) -> None:
    several = tmp_path / "several"
    for name in ("first", "second"):
        shutil.copytree(net.lora, several / name)
    with pytest.raises(SourceError, match=r"several: several adapters \(first, second\); name one"):
        open_lora(several, open_checkpoint(net.base))
    assert len(open_lora(several / "second", open_checkpoint(net.base)).updates) == 2


def test_the_real_loras_of_minilm() -> None:
    base = open_checkpoint(models.minilm())
    for task in ("spam", "genre"):
        source = open_lora(models.LORAS / task, base)
        assert len(source.updates) == 36
        assert {"classifier.weight", "classifier.bias"} == set(source.whole)
        assert source.notices == ["names of the LoRA are not those of the base: the prefix 'bert.' is left out"]
        assert source.base_model["id"] == "sentence-transformers/all-MiniLM-L6-v2"
        state = load_file(models.LORAS / task / "adapter_model.safetensors")
        name = "encoder.layer.3.attention.self.query"
        update = next(u for u in source.updates if u.name == f"{name}.weight")
        a, b = (state[f"base_model.model.bert.{name}.lora_{x}.weight"].double() for x in "AB")
        np.testing.assert_allclose(dense(update), 2 * (b @ a).numpy(), rtol=0, atol=1e-7)


# Names


def test_a_prefix_of_the_lora_is_left_out(tmp_path: Path) -> None:
    base = models.save_base(models.bert().bert, tmp_path / "base")
    lora = models.save_lora(
        models.random_lora(models.bert(), r=2, target_modules=["query"], modules_to_save=["classifier"]),
        tmp_path / "lora",
    )
    source = open_lora(lora, open_checkpoint(base))
    assert {"encoder.layer.0.attention.self.query.weight", "encoder.layer.1.attention.self.query.weight"} == {
        update.name for update in source.updates
    }
    assert {
        "classifier.weight",
        "classifier.bias",
    } == source.whole.keys()  # new to the base, under their own names
    assert source.notices == ["names of the LoRA are not those of the base: the prefix 'bert.' is left out"]


def test_a_prefix_of_the_base_is_added(tmp_path: Path) -> None:
    base = models.save_base(models.llama(), tmp_path / "base")
    lora = models.save_lora(
        models.random_lora(models.llama().model, r=2, target_modules=["q_proj"]), tmp_path / "lora"
    )
    source = open_lora(lora, open_checkpoint(base))
    assert [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)] == sorted(u.name for u in source.updates)
    assert source.notices == ["names of the LoRA are not those of the base: the prefix 'model.' is added"]


def test_a_prefix_becomes_another(tmp_path: Path) -> None:
    base = models.save_base(models.llama(), tmp_path / "base")
    path = base / "model.safetensors"
    state = load_file(path)
    save_file({n.replace("model.", "backbone.", 1): t for n, t in state.items()}, path)
    lora = models.save_lora(models.random_lora(models.llama(), r=2, target_modules=["q_proj"]), tmp_path / "lora")
    source = open_lora(lora, open_checkpoint(base))
    assert [f"backbone.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)] == sorted(
        u.name for u in source.updates
    )
    assert source.notices == [
        "names of the LoRA are not those of the base: the prefix 'model.' becomes 'backbone.'"
    ]
    stacks = {
        n.replace("model.", f"{stack}.", 1): t.clone() for n, t in state.items() for stack in ("text", "vision")
    }
    save_file(stacks, path)
    notice = "the prefix 'model.' becomes 'text.' (as base_model_class 'LlamaForCausalLM' says)"
    assert open_lora(lora, open_checkpoint(base)).notices[0].endswith(notice)
    models.edit_config(lora, auto_mapping=None)
    with pytest.raises(SourceError, match=r"choose with --prefix text\. or --prefix vision\."):
        open_lora(lora, open_checkpoint(base))  # either of two


def test_replaced_tensors_follow_the_prefix(tmp_path: Path) -> None:
    base = models.save_base(models.bert().bert, tmp_path / "base")
    options = {"r": 2, "target_modules": ["query"], "bias": "all"}
    lora = models.save_lora(models.random_lora(models.bert(), **options), tmp_path / "lora")
    saved = open_checkpoint(base)
    with pytest.raises(
        SourceError, match=r"unmatched key 'classifier\.bias': neither in the base nor in modules_to_save"
    ):
        open_lora(lora, saved)  # the bias of a head whose weight is nowhere
    models.edit_weights(lora, lambda state: {n: t for n, t in state.items() if "classifier" not in n})
    whole = open_lora(lora, saved).whole
    assert "encoder.layer.0.output.dense.bias" in whole
    assert not [name for name in whole if name.startswith("bert.")]


def test_equal_names_need_no_notice(net: Saved) -> None:
    assert net.read().notices == []


# Refusals: exact reasons, and never a guess


def refused(saved: Saved, reason: str, path: Path | None = None) -> None:
    """``reason`` is all that the message says after the path of the file that is to blame."""
    path = path or saved.lora / "adapter_config.json"
    with pytest.raises(SourceError) as caught:
        saved.read()
    assert f"{path}: {reason}" == str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("use_qalora", True, "QALoRA pools the inputs of its layers"),
        ("use_bdlora", {"nblocks": 2}, "block-diagonal LoRA is not supported"),
        (
            "kasa_config",
            {"beta": 1},
            (
                "KaSA truncates the base's weights before it adapts them, so B @ A is not an update of the base; "
                "merge the LoRA with PEFT and convert the full checkpoint (full_to_shira)"
            ),
        ),
        ("monteclora_config", {"num_samples": 8}, "MonteCLoRA is not supported"),
        ("arrow_config", {"top_k": 1}, "an Arrow router selects among several LoRAs at run time"),
        ("megatron_config", {"a": 1}, "Megatron's parallel layers are not supported"),
        (
            "alora_invocation_tokens",
            [1],
            "an activated LoRA acts on some tokens only, and is no change of weights",
        ),
    ],
)
def test_options_that_are_no_plain_lora(net: Saved, option: str, value: Any, reason: str) -> None:
    models.edit_config(net.lora, **{option: value})
    refused(net, f"{option} is set: {reason}")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_starts_that_change_the_base(net: Saved, start: str) -> None:
    models.edit_config(net.lora, init_lora_weights=start)
    refused(
        net,
        f"init_lora_weights={start!r} changed the base's weights in training, so B @ A is not an update of the base; "
        "save the adapter with PEFT's path_initial_model_for_weight_conversion first",
    )


Edit = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
A, B = "base_model.model.wide.lora_A.weight", "base_model.model.wide.lora_B.weight"
SHAPES = "{path}: 'wide' should have rank 4 by adapter_config.json, lora_A has shape "
BAD_WEIGHTS: dict[str, tuple[Edit, str]] = {
    "rank": (lambda s: s | {A: s[A][:3], B: s[B][:, :3].contiguous()}, f"{SHAPES}[3, 24] and lora_B [40, 3]"),
    "rank_of_a": (lambda s: s | {A: s[A][:3]}, f"{SHAPES}[3, 24] and lora_B [40, 4]"),
    "rank_of_b": (lambda s: s | {B: s[B][:, :3].contiguous()}, f"{SHAPES}[4, 24] and lora_B [40, 3]"),
    "no_b": (lambda s: {n: t for n, t in s.items() if n != B}, "{path}: 'wide' has lora_A only"),
    "no_a": (lambda s: {n: t for n, t in s.items() if n != A}, "{path}: 'wide' has lora_B only"),
    "columns": (
        lambda s: s | {A: s[A][:, :23].contiguous()},
        "{path}: 'wide': updates a weight of shape [40, 23], the base's 'wide.weight' has [40, 24]",
    ),
    "flat": (
        lambda s: s | {A: s[A].flatten()},
        "{path}: 'wide' is of no known layer type (lora_A has shape [96] and lora_B [40, 4])",
    ),
    "unmatched": (
        lambda s: s | {"base_model.model.wide.extra": torch.ones(2)},
        "{path}: unmatched key 'wide.extra': neither in the base nor in modules_to_save",
    ),
    "unmatched_lora": (
        lambda s: s | {"base_model.model.wide.lora_magnitude_vector": torch.ones(2)},
        "{path}: unmatched key 'base_model.model.wide.lora_magnitude_vector': use_dora is not set",
    ),
    "unknown_lora": (
        lambda s: s | {"base_model.model.wide.lora_C.weight": torch.ones(2)},
        "{path}: unmatched key 'base_model.model.wide.lora_C.weight': not a known part of a LoRA",
    ),
    "bias": (
        lambda s: s | {"base_model.model.wide.lora_B.bias": torch.ones(40)},
        "{path}: unmatched key 'base_model.model.wide.lora_B.bias': lora_bias is not set",
    ),
    "prefix": (
        lambda s: {n.removeprefix("base_model.model."): t for n, t in s.items()},
        "{path}: unmatched key 'square.lora_A.weight': it does not start with 'base_model.model.'",
    ),
    "nan": (lambda s: s | {A: s[A] * torch.nan}, f"{{path}}: {A!r} holds NaN or Inf"),
    "inf": (lambda s: s | {B: s[B] / 0}, f"{{path}}: {B!r} holds NaN or Inf"),
    "integers": (lambda s: s | {B: s[B].to(torch.int8)}, f"{{path}}: {B!r} is of dtype int8, not a float"),
    "replacement": (
        lambda s: s | {"base_model.model.head.weight": torch.ones(6, 41)},
        "{path}: 'head.weight' has shape [6, 41], the base's 'head.weight' has [6, 40]: merge the LoRA with PEFT and convert the full checkpoint (full_to_shira)",
    ),
    "no_lora": (
        lambda s: {"base_model.model.head.weight": torch.ones(6, 40)},
        "{path}: no key ends in lora_A.weight and lora_B.weight: not a LoRA",
    ),
    "another_layer": (
        lambda s: s | {n.replace("wide", "deep"): t.clone() for n, t in s.items() if "wide" in n},
        (
            "{path}: 1 of 3 adapted weights are not in the base, for example 'deep.weight'; "
            "the base has names like 'head.weight'"
        ),
    ),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights(net: Saved, case: str) -> None:
    edit, reason = BAD_WEIGHTS[case]
    models.edit_weights(net.lora, edit)
    path = net.lora / "adapter_model.safetensors"
    with pytest.raises(SourceError) as caught:
        net.read()
    assert reason.format(path=path) == str(caught.value)


def test_lora_bias_needs_a_bias_in_the_base(tmp_path: Path) -> None:
    saved = Saved(tmp_path, "net", {"r": 2, "lora_bias": True, "target_modules": ["wide"]})
    state = load_file(saved.base / "model.safetensors")
    save_file({n: t for n, t in state.items() if n != "wide.bias"}, saved.base / "model.safetensors")
    reason = "lora_bias for 'wide', but the base has no 'wide.bias'"
    refused(saved, reason, saved.lora / "adapter_model.safetensors")
    save_file(state | {"wide.bias": torch.ones(3)}, saved.base / "model.safetensors")
    refused(saved, "wide.lora_B.bias has shape [40], 'wide.bias' [3]", saved.lora / "adapter_model.safetensors")


def test_a_base_without_the_tensor(net: Saved) -> None:
    state = load_file(net.base / "model.safetensors")
    save_file({n: t for n, t in state.items() if n != "wide.weight"}, net.base / "model.safetensors")
    reason = "1 of 2 adapted weights are not in the base, for example 'wide.weight'; the base has names like 'head.weight'"
    refused(net, reason, net.lora / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "SOMETHING"}, "not a LoRA (peft_type is 'SOMETHING')"),
        ({"peft_type": None}, "not a LoRA (peft_type is None)"),
        ({"r": 0}, "r and lora_alpha must be numbers, r a positive integer"),
        ({"r": 4.0}, "r and lora_alpha must be numbers, r a positive integer"),
        ({"r": True}, "r and lora_alpha must be numbers, r a positive integer"),
        ({"lora_alpha": "8"}, "r and lora_alpha must be numbers, r a positive integer"),
        ({"lora_alpha": float("nan")}, "r and lora_alpha must be numbers, r a positive integer"),
        ({"lora_alpha": 10**400}, "r and lora_alpha must be numbers, r a positive integer"),
        ({"rank_pattern": {"wide": -1}}, "rank_pattern must map module names to numbers"),
        ({"rank_pattern": ["wide"]}, "rank_pattern must map module names to numbers"),
        ({"alpha_pattern": {"wide": None}}, "alpha_pattern must map module names to numbers"),
        ({"modules_to_save": 5}, "modules_to_save must be a list of names"),
        ({"modules_to_save": "head"}, "modules_to_save must be a list of names"),
        ({"modules_to_save": [5]}, "modules_to_save must be a list of names"),
    ],
)
def test_bad_configs(net: Saved, changes: dict[str, Any], reason: str) -> None:
    models.edit_config(net.lora, **changes)
    refused(net, reason)


def test_a_bad_regex_in_a_pattern(net: Saved) -> None:
    models.edit_config(net.lora, rank_pattern={"(": 3})
    with pytest.raises(SourceError, match=r"adapter_config.json: rank_pattern '\(': "):
        net.read()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '"LORA"', "[" * 5000, "\ufeff{}", '{"r": 1' + "0" * 5000 + "}"]
)
def test_configs_that_are_no_json_object(net: Saved, text: str) -> None:
    (net.lora / "adapter_config.json").write_text(text, "utf-8")
    with pytest.raises(SourceError, match=r"adapter_config\.json: (unreadable JSON|not a (LoRA|JSON object))"):
        net.read()


def test_a_config_that_is_no_text(net: Saved) -> None:
    (net.lora / "adapter_config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(SourceError, match=r"adapter_config\.json: unreadable JSON"):
        net.read()


def test_paths_that_are_no_lora(net: Saved, tmp_path: Path) -> None:
    base = open_checkpoint(net.base)
    nowhere, empty = tmp_path / "nowhere", tmp_path / "empty"
    empty.mkdir()
    not_one = "not a LoRA that can be converted:"
    weights = "whole weights of a model, such as a full checkpoint, which full_to_shira converts"
    for path, reason in (
        (nowhere, "no such file or folder"),
        (empty, f"{not_one} the folder has no file that ends in .safetensors or .bin, .pt, .pth, .ckpt"),
        (net.base, f"{not_one} model.safetensors: {weights}"),
        (net.base / "model.safetensors", f"{not_one} {weights}"),
    ):
        with pytest.raises(SourceError) as caught:
            open_lora(path, base)
        assert f"{path}: {reason}" == str(caught.value)
    (net.lora / "adapter_config.json").unlink()
    with pytest.raises(SourceError) as caught:
        open_lora(net.lora, base, dialect="peft")
    assert str(caught.value).startswith(
        f"{net.lora / 'adapter_model.safetensors'}: PEFT's weights, and adapter_config.json is missing"
    )
    (net.lora / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceError) as caught:
        open_lora(net.lora, base, dialect="peft")
    need = "no PEFT adapter: need adapter_config.json beside adapter_model.safetensors or adapter_model.bin"
    assert f"{net.lora}: {need}" == str(caught.value)


class Payload:
    """A pickle that would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(net: Saved, how: str, tmp_path: Path) -> None:
    (net.lora / "adapter_model.safetensors").unlink()
    path, mark = net.lora / "adapter_model.bin", tmp_path / "mark"
    state = {A: torch.ones(4, 24), "payload": Payload(mark)}
    if how == "torch":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps({"payload": Payload(mark)}))
    with pytest.raises(SourceError) as caught:
        net.read()
    assert not mark.exists()
    message = str(caught.value)
    # In the old form of torch.save, pickles follow each other, and a pickle of one dict is not it.
    assert message.startswith(f"{path}: ")
    assert "the pickle needs " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"PK\x03\x04" + b"\0" * 40, b"\x80\x02}.", bytes(range(256)), b"\0" * 64]
)
def test_bin_files_that_are_none(net: Saved, content: bytes) -> None:
    (net.lora / "adapter_model.safetensors").unlink()
    path = net.lora / "adapter_model.bin"
    path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        net.read()
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "state",
    [
        [torch.ones(2)],
        {"a": 1},
        {A: torch.ones(4, 24).to_sparse()},
        {A: torch.ones(4, 24, dtype=torch.complex64)},
        {A: torch.ones(4, 24, device="meta")},
        {A: torch.ones(4, 24).to(torch.float8_e4m3fnuz)},
    ],
    ids=["list", "numbers", "sparse", "complex", "meta", "float8fnuz"],
)
def test_bin_files_with_other_things(net: Saved, state: Any) -> None:
    (net.lora / "adapter_model.safetensors").unlink()
    path = net.lora / "adapter_model.bin"
    torch.save(state, path)
    with pytest.raises(SourceError) as caught:
        net.read()
    assert str(caught.value).startswith(f"{path}: ")


class Untied(nn.Module):
    """``Conv1D`` and ``Linear``, square both; one more ``Conv1D`` with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Conv1D(8, 8)
        self.second = nn.Linear(8, 8)
        self.third = Conv1D(12, 8)
        self.fourth = nn.Linear(8, 6)


@pytest.mark.parametrize("targets", [["first", "second"], ["first", "fourth"], ["second"]])
def test_a_square_weight_of_unknown_orientation_is_not_guessed(targets: list[str], tmp_path: Path) -> None:
    """With ``Conv1D`` and ``Linear`` in one model, PEFT's ``fan_in_fan_out`` tells only of the last one it adapted."""
    base = models.save_base(Untied(), tmp_path / "base")
    lora = models.save_lora(models.random_lora(Untied(), r=2, target_modules=targets), tmp_path / "lora")
    with pytest.raises(SourceError) as caught:
        open_lora(lora, open_checkpoint(base))
    assert (
        f"{lora / 'adapter_model.safetensors'}: {targets[0]!r} updates a square weight, and other layers "
        "contradict fan_in_fan_out=False (Conv1D or Linear): how this one is stored is unknown"
    ) == str(caught.value)


def test_a_square_weight_whose_orientation_is_plain(tmp_path: Path) -> None:
    base = models.save_base(Untied(), tmp_path / "base")
    lora = models.save_lora(
        models.random_lora(Untied(), r=2, target_modules=["first", "third"]), tmp_path / "lora"
    )
    peft = models.load_lora(Untied(), lora)
    for update in open_lora(lora, open_checkpoint(base)).updates:
        expected, tolerance = peers(peft, update.name)
        assert (np.abs(expected - dense(update)) <= tolerance).all()


def test_the_head_under_a_lora_must_be_that_of_the_base(tmp_path: Path) -> None:
    """PEFT saves an adapted ``lm_head`` itself beside its LoRA."""
    saved = Saved(tmp_path, "llama", {"r": 2, "target_modules": ["lm_head"]})
    key = "base_model.model.lm_head.base_layer.weight"
    assert key in load_file(saved.lora / "adapter_model.safetensors")
    assert saved.read().whole == {}
    models.edit_weights(saved.lora, lambda state: state | {key: state[key].bfloat16()})
    assert saved.read().whole == {}
    models.edit_weights(saved.lora, lambda state: state | {key: state[key] * 2})
    reason = (
        "'lm_head.weight' lies below its LoRA and is not the base's 'lm_head.weight' (resized or trained): "
        "merge the LoRA with PEFT and convert the full checkpoint (full_to_shira)"
    )
    refused(saved, reason, saved.lora / "adapter_model.safetensors")
    models.edit_weights(saved.lora, lambda state: state | {key: torch.ones(51, 32)})
    refused(saved, reason, saved.lora / "adapter_model.safetensors")


def test_the_base_of_a_lora_is_checked_when_it_is_applied(net: Saved, tmp_path: Path) -> None:
    lora_to_shira(net.lora, net.base, tmp_path / "adapter.st")
    torch.manual_seed(0)
    with pytest.raises(BaseMismatch, match="digest differs"):
        apply(load(tmp_path / "adapter.st"), models.Net().state_dict())
