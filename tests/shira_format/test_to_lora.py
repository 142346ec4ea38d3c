"""Adapters as LoRAs: what PEFT makes of the folder is the base plus the truncated SVD of the adapter, on models of all kinds."""

from __future__ import annotations

import json
import re
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from shira_format._core.arrays import Array, as_array
from shira_format._core.dtypes import FLOATS
from shira_format.adapter import Adapter
from shira_format.convert import full_to_shira, lora_to_shira
from shira_format.errors import BaseMismatch, SourceError
from shira_format.export.lora import LoraReport, shira_to_lora
from shira_format.format import load, save
from shira_format.tensors import DenseTensor, SparseTensor, matrix_shape
from tests import models

GPT2 = r"c_attn|c_proj|c_fc"
State = dict[str, torch.Tensor]


def changed(weight: torch.Tensor, density: float = 0.1, seed: int = 0) -> tuple[Array, Array]:
    """Entries of a weight and what they become: indices, and targets in its dtype."""
    random = np.random.default_rng(seed)
    size = weight.numel()
    indices = np.sort(random.choice(size, max(1, int(size * density)), replace=False))
    flat = as_array(weight).reshape(-1)
    delta = 0.1 * random.standard_normal(indices.size)
    return indices, (flat[indices].astype(np.float64) + delta).astype(flat.dtype)


def adapter_of(path: Path, model: nn.Module, choose: str, *, density: float = 0.1, **more: Any) -> Path:
    """An adapter, with base values, of all weights of ``model`` in whose name ``choose`` is found."""
    tensors = []
    for seed, (name, weight) in enumerate(model.state_dict().items()):
        if re.search(choose, name):
            indices, values = changed(weight, density, seed)
            tensors.append(
                SparseTensor(
                    name, tuple(weight.shape), indices, values, base=as_array(weight).reshape(-1)[indices]
                )
            )
    assert tensors
    save(Adapter(tensors, **more), path)
    return path


def expected(model: nn.Module, adapter: Path, rank: int, prefix: str = "") -> State:
    """The weights of ``model``, plus numpy's truncated SVD of what the adapter adds."""
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = load(adapter)
    for name, tensor in found.items():
        dense = np.zeros(tensor.numel)
        dense[tensor.indices] = found.alpha * tensor.delta().astype(np.float64)
        u, s, v = np.linalg.svd(dense.reshape(matrix_shape(tensor.shape)), full_matrices=False)
        update = torch.from_numpy(((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(tensor.shape))
        state[prefix + name] = (state[prefix + name].double() + update).float()
    return state


def check_merged(peft: PeftModel, wanted: State) -> None:
    """The weights after PEFT merged the LoRA are those."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = peft.merge_and_unload().state_dict()
    assert state.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert (state[name] - weight).abs().max() <= 2e-7 * max(1, weight.abs().max()), name


def check(
    build: Callable[[], nn.Module],
    tmp_path: Path,
    choose: str,
    rank: int = 3,
    *,
    tied: bool = False,
    **options: Any,
) -> LoraReport:
    """Convert an adapter of a model, load it with PEFT, and compare weights and outputs with what they should be."""
    base = models.save_base(build(), tmp_path / "base")
    adapter = adapter_of(tmp_path / "a.st", build(), choose)
    report = shira_to_lora(adapter, base, tmp_path / "lora", rank=rank, **options)
    wanted = expected(build(), adapter, rank)
    with warnings.catch_warnings():  # such as PEFT's of missing keys, and of patterns that hit nothing
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        peft = PeftModel.from_pretrained(build(), tmp_path / "lora").eval()
    assert set(models.layers(peft)) == {name.removesuffix(".weight") for name in load(adapter)}
    if not tied:
        plain = build()
        plain.load_state_dict(wanted)
        assert torch.allclose(models.outputs(plain), models.outputs(peft), atol=2e-6, rtol=1e-5)
        assert not torch.allclose(models.outputs(build()), models.outputs(peft), atol=1e-4)
    if tied:  # the head shares the embedding's weight
        wanted["lm_head.weight"] = wanted["transformer.wte.weight"]
    check_merged(peft, wanted)
    return report


def config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter_config.json").read_text()))


def test_linear_layers(tmp_path: Path) -> None:
    report = check(models.net, tmp_path, "weight")
    assert [(layer.kind, layer.rank) for layer in report.layers] == [("linear", 3)] * 3
    assert report.notices == []
    assert config(tmp_path / "lora")["rank_pattern"] == {}
    assert config(tmp_path / "lora")["target_modules"] == ["head", "square", "wide"]
    sizes = [
        (tmp_path / "lora" / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    assert (report.folder_bytes, report.adapter_bytes) == (sum(sizes), (tmp_path / "a.st").stat().st_size)


def test_bert(tmp_path: Path) -> None:
    check(models.bert, tmp_path, r"query\.weight|dense\.weight|classifier\.weight")


def test_llama_with_embeddings_and_head(tmp_path: Path) -> None:
    report = check(models.llama, tmp_path, r"proj\.weight|embed_tokens|lm_head")
    kinds = {layer.name: layer.kind for layer in report.layers}
    assert kinds["model.embed_tokens.weight"] == "embedding"
    assert kinds["lm_head.weight"] == "linear"
    assert ["taken as embeddings, by their names (--embedding): model.embed_tokens.weight"] == report.notices


def test_gpt2(tmp_path: Path) -> None:
    """Square Conv1D weights are as the others of the base; a tied head gets an embedding's LoRA by merging alone."""
    report = check(models.gpt2, tmp_path, r"(c_attn|c_proj|c_fc)\.weight")
    assert {layer.kind for layer in report.layers} == {"conv1d"}
    assert config(tmp_path / "lora")["fan_in_fan_out"] is True
    assert len(report.notices) == 1
    assert report.notices[0].startswith("square, and taken as [in, out] like the base's other layers: transformer.h.0.attn.c_proj")  # fmt: skip


def test_gpt2_embeddings(tmp_path: Path) -> None:
    report = check(models.gpt2, tmp_path, r"wte|wpe", tied=True)
    assert {layer.kind for layer in report.layers} == {"embedding"}
    assert "if the model's head shares the weight of 'transformer.wte.weight'" in report.notices[1]
    assert len(report.notices) == 2


def test_orientation_is_never_guessed_in_silence(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "a.st", models.gpt2(), r"(c_attn|attn.c_proj)\.weight")
    with pytest.raises(
        SourceError, match=r"h\.0\.attn\.c_attn\.weight' may be stored as \[in, out\].*--fan-in-fan-out"
    ):
        shira_to_lora(adapter, None, None, rank=2)
    base = models.save_base(models.gpt2(), tmp_path / "base")
    plain = shira_to_lora(adapter, base, None, rank=2)
    said = shira_to_lora(adapter, base, None, rank=2, fan_in_fan_out=GPT2)
    alone = shira_to_lora(adapter, None, None, rank=2, fan_in_fan_out=GPT2)
    assert [layer.kind for report in (plain, said, alone) for layer in report.layers] == ["conv1d"] * 12
    assert said.notices == alone.notices == []
    # A base with layers of both kinds leaves square ones open.
    state = load_file(base / "model.safetensors")
    save_file(state | {"mlp.weight": torch.zeros(3, 4), "mlp.bias": torch.zeros(3)}, base / "model.safetensors")
    with pytest.raises(SourceError, match=r"attn\.c_proj\.weight' is square, and the base has layers that store"):
        shira_to_lora(adapter, base, None, rank=2)
    assert shira_to_lora(adapter, base, None, rank=2, fan_in_fan_out=GPT2).layers == said.layers
    net = adapter_of(tmp_path / "b.st", models.net(), "weight")
    base = models.save_base(models.net(), tmp_path / "net")
    with pytest.raises(
        SourceError, match=r"'wide\.weight' is \[in, out\] by --fan-in-fan-out, but .* bias has 40"
    ):
        shira_to_lora(net, base, None, rank=2, fan_in_fan_out="wide")
    report = shira_to_lora(net, None, None, rank=2)
    (notice,) = report.notices
    assert notice == (
        "taken as [out, in], as torch.nn.Linear stores them, without proof (--fan-in-fan-out): "
        "wide.weight, square.weight, head.weight"
    )


class Convolutions(nn.Module):
    """One of each."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 6, (3, 2), stride=2, bias=False)
        self.three = nn.Conv3d(2, 5, 2)
        self.last = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.one(x)).reshape(2, 8, 4, 10)
        x = self.two(x).reshape(2, 2, 3, 1, 5)
        x = torch.nn.functional.pad(x, (0, 0, 0, 1))
        return self.last(self.three(x).sum((2, 3, 4)))


def convolutions() -> nn.Module:
    torch.manual_seed(5)
    return Convolutions().eval()


def test_convolutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(6)
    x = torch.randn(2, 3, 40)

    def outputs(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(x)

    monkeypatch.setattr(models, "outputs", outputs)
    report = check(convolutions, tmp_path, "weight", rank=2)
    assert [layer.kind for layer in report.layers] == ["conv", "conv", "conv", "linear"]
    shapes = {
        name: tuple(factor.shape)
        for name, factor in load_file(tmp_path / "lora/adapter_model.safetensors").items()
    }
    assert shapes["base_model.model.two.lora_A.weight"] == (2, 8, 3, 2)
    assert shapes["base_model.model.two.lora_B.weight"] == (6, 2, 1, 1)
    (notice,) = report.notices
    assert notice == (
        "taken as convolutions without groups and dilation, which PEFT's LoRA does not do: "
        "one.weight, two.weight, three.weight"
    )


def test_transposed_convolutions_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 5, 2))
    base, adapter = models.save_base(model, tmp_path / "base"), adapter_of(tmp_path / "a.st", model, "weight")
    with pytest.raises(
        SourceError, match=r"'0\.weight' has shape \[3, 5, 2, 2\] and a bias of 5: a transposed conv"
    ):
        shira_to_lora(adapter, base, None, rank=2)


class Nested(nn.Module):
    """Modules whose names end like others'."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(12, 12)
        self.inner = nn.Module()
        self.inner.lin = nn.Linear(12, 12)
        self.inner.inner = nn.Module()
        self.inner.inner.lin = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.other_norm = nn.LayerNorm(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lin(self.norm(x))
        return self.inner.inner.lin(self.other_norm(self.inner.lin(x)))


def nested() -> nn.Module:
    torch.manual_seed(8)
    return Nested().eval()


@pytest.mark.parametrize("choose", [r"^lin\.weight", r"^inner\.lin\.weight", r"^(inner\.)?lin\.weight"])
@pytest.mark.parametrize("with_base", [True, False])
def test_modules_that_end_like_others_are_told_apart(tmp_path: Path, choose: str, with_base: bool) -> None:
    base = models.save_base(nested(), tmp_path / "base") if with_base else None
    adapter = adapter_of(tmp_path / "a.st", nested(), choose)
    shira_to_lora(adapter, base, tmp_path / "lora", rank=2)
    peft = models.load_lora(nested(), tmp_path / "lora")
    assert set(models.layers(peft)) == {name.removesuffix(".weight") for name in load(adapter)}
    check_merged(peft, expected(nested(), adapter, 2))


def test_ranks_of_modules_that_end_like_others(tmp_path: Path) -> None:
    names = ["inner.inner.lin.weight", "inner.lin.weight", "lin.weight"]
    base = models.save_base(nested(), tmp_path / "base")
    state = nested().state_dict()
    tensors = []
    for rows, name in enumerate(names, 1):
        indices, values = changed(state[name][:rows], 1.0, rows)
        tensors.append(
            SparseTensor(name, (12, 12), indices, values, base=as_array(state[name]).reshape(-1)[indices])
        )
    save(Adapter(tensors), tmp_path / "a.st")
    report = shira_to_lora(tmp_path / "a.st", base, tmp_path / "lora", energy=1.0)
    assert [(layer.rank, layer.full_rank) for layer in report.layers] == [(1, 1), (2, 2), (3, 3)]
    told = config(tmp_path / "lora")
    assert (told["r"], told["lora_alpha"], told["rank_pattern"]) == (3, 3, told["alpha_pattern"])
    peft = models.load_lora(nested(), tmp_path / "lora")
    assert {name: layer.r["default"] for name, layer in models.layers(peft).items()} == {
        "lin": 3, "inner.lin": 2, "inner.inner.lin": 1,
    }  # fmt: skip
    assert {layer.scaling["default"] for layer in models.layers(peft).values()} == {1}
    check_merged(peft, expected(nested(), tmp_path / "a.st", 12))


def test_energy_takes_the_least_ranks(tmp_path: Path) -> None:
    base = models.save_base(models.net(), tmp_path / "base")
    adapter = adapter_of(tmp_path / "a.st", models.net(), "weight")
    report = shira_to_lora(adapter, base, tmp_path / "lora", energy=0.8)
    assert len({layer.rank for layer in report.layers}) == 3
    for layer in report.layers:
        tensor = load(adapter)[layer.name]
        dense = np.zeros(tensor.numel)
        dense[tensor.indices] = tensor.delta()
        kept = np.cumsum(np.linalg.svd(dense.reshape(tensor.shape), compute_uv=False) ** 2)
        kept /= kept[-1]
        assert layer.rank == np.searchsorted(kept, 0.8) + 1
        assert layer.energy_kept == pytest.approx(kept[layer.rank - 1])
    assert 0.8 <= report.energy_kept < 0.9
    assert report.relative_error == pytest.approx(np.sqrt(1 - report.energy_kept), rel=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        peft = PeftModel.from_pretrained(models.net(), tmp_path / "lora")
    assert {name: layer.r["default"] for name, layer in models.layers(peft).items()} == {
        layer.module: layer.rank for layer in report.layers
    }


def test_ranks_beyond_what_there_is(tmp_path: Path) -> None:
    base = models.save_base(models.net(), tmp_path / "base")
    adapter = adapter_of(tmp_path / "a.st", models.net(), "weight", density=0.9)
    report = shira_to_lora(adapter, base, tmp_path / "lora", rank=30)
    assert [layer.rank for layer in report.layers] == [24, 30, 6]
    assert config(tmp_path / "lora")["rank_pattern"] == {"^wide": 24, "^head": 6}
    assert report.notices == [
        "2 of 3 updates have a lower rank than 30 and are held exactly, for example 'wide.weight' of rank 24"
    ]
    check_merged(models.load_lora(models.net(), tmp_path / "lora"), expected(models.net(), adapter, 30))
    everything = shira_to_lora(adapter, base, None, rank=1000)
    assert [layer.rank for layer in everything.layers] == [24, 40, 6]
    assert everything.relative_error < 1e-6


def test_updates_of_zero_are_left_out(tmp_path: Path) -> None:
    state = models.net().state_dict()
    square = as_array(state["square.weight"]).reshape(-1)
    indices, values = changed(state["wide.weight"])
    wide = as_array(state["wide.weight"]).reshape(-1)[indices]
    tensors = [
        SparseTensor("wide.weight", (40, 24), indices, values, base=wide),
        SparseTensor("square.weight", (40, 40), [3, 9], square[[3, 9]], base=square[[3, 9]]),
        SparseTensor("head.weight", (6, 40), np.arange(0), np.float32([]), base=np.float32([])),
    ]
    save(Adapter(tensors), tmp_path / "a.st")
    report = shira_to_lora(
        tmp_path / "a.st", models.save_base(models.net(), tmp_path / "b"), tmp_path / "lora", rank=2
    )
    assert report.left_out == {"since their updates are zero": ["square.weight", "head.weight"]}
    assert report.notices == ["left out, since their updates are zero: square.weight, head.weight"]
    assert set(models.layers(models.load_lora(models.net(), tmp_path / "lora"))) == {"wide"}
    save(Adapter(tensors[1:]), tmp_path / "zero.st")
    with pytest.raises(
        SourceError, match=r"zero\.st: all updates are zero: PEFT has no LoRA without an adapted module"
    ):
        shira_to_lora(tmp_path / "zero.st", None, tmp_path / "none", rank=2)
    assert not (tmp_path / "none").exists()
    assert not list(tmp_path.glob(".none*"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bases_of_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    def build() -> nn.Module:
        return models.net().to(dtype)

    base = models.save_base(build(), tmp_path / "base", dtype)
    adapter = adapter_of(tmp_path / "a.st", build(), "weight", density=0.3)
    report = shira_to_lora(adapter, base, tmp_path / "lora", rank=40)
    assert report.relative_error < 1e-6
    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {factor.dtype for factor in factors.values()} == {torch.float32}
    for name, tensor in load(adapter).items():
        start = f"base_model.model.{name.removesuffix('weight')}"
        product = factors[f"{start}lora_B.weight"].double() @ factors[f"{start}lora_A.weight"].double()
        found = as_array(product).reshape(-1)[tensor.indices]
        assert np.abs(found - tensor.delta()).max() <= 1e-6
    models.load_lora(build(), tmp_path / "lora")


def test_strength_is_part_of_the_factors(tmp_path: Path) -> None:
    base = models.save_base(models.net(), tmp_path / "base")
    adapter = adapter_of(tmp_path / "a.st", models.net(), "weight", manifest={"alpha": -0.5})
    report = shira_to_lora(adapter, base, tmp_path / "lora", rank=4)
    assert report.notices == ["the adapter's strength of -0.5 is part of the factors"]
    check_merged(models.load_lora(models.net(), tmp_path / "lora"), expected(models.net(), adapter, 4))


def test_deltas_need_no_base(tmp_path: Path) -> None:
    tensors = [SparseTensor("wide.weight", (40, 24), [0, 30, 100], np.float32([1, 2, 3]), value_kind="delta")]
    save(Adapter(tensors), tmp_path / "a.st")
    alone = shira_to_lora(tmp_path / "a.st", None, tmp_path / "lora", rank=3)
    assert alone.relative_error < 1e-6
    peft = models.load_lora(models.net(), tmp_path / "lora")
    assert set(models.layers(peft)) == {"wide"}
    with_base = shira_to_lora(tmp_path / "a.st", models.save_base(models.net(), tmp_path / "base"), None, rank=3)
    assert with_base.layers == alone.layers


def test_a_prefix_of_the_live_model(tmp_path: Path) -> None:
    bare = models.bert().bert
    base, adapter = models.save_base(bare, tmp_path / "base"), adapter_of(tmp_path / "a.st", bare, r"key\.weight")
    save(
        Adapter(
            dict(load(adapter)), dense=[DenseTensor("embeddings.LayerNorm.weight", np.full(32, 2, np.float32))]
        ),
        tmp_path / "b.st",
    )
    shira_to_lora(tmp_path / "b.st", base, tmp_path / "lora", rank=3, prefix="bert.")
    peft = models.load_lora(models.bert(), tmp_path / "lora")
    wanted = expected(models.bert(), adapter, 3, "bert.")
    wanted["bert.embeddings.LayerNorm.weight"][:] = 2
    check_merged(peft, wanted)


def test_whole_modules_are_saved(tmp_path: Path) -> None:
    """Whole tensors and sparse vectors, completed from the base, in ``modules_to_save``."""
    build = models.bert
    base, state = models.save_base(build(), tmp_path / "base"), build().state_dict()
    adapter = adapter_of(tmp_path / "a.st", build(), r"query\.weight|LayerNorm\.bias")
    head = {name: torch.randn(state[name].shape) for name in ("classifier.weight", "classifier.bias")}
    head["bert.pooler.dense.bias"] = torch.randn(32)
    wholes = [DenseTensor(name, as_array(value), base=as_array(state[name])) for name, value in head.items()]
    save(Adapter(dict(load(adapter)), dense=wholes), tmp_path / "b.st")
    report = shira_to_lora(tmp_path / "b.st", base, tmp_path / "lora", rank=3)
    assert "classifier" in config(tmp_path / "lora")["modules_to_save"]
    assert {"classifier.bias", "bert.pooler.dense.weight", "bert.embeddings.LayerNorm.weight"} <= set(report.saved)
    wanted = expected(build(), adapter, 3) | head
    for name, tensor in load(adapter).items():
        if len(tensor.shape) == 1:  # not approximated
            wanted[name] = state[name].clone()
            wanted[name][tensor.indices.copy()] = torch.from_numpy(tensor.values.copy())
    peft = models.load_lora(build(), tmp_path / "lora")
    assert set(models.layers(peft)) == {f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)}
    plain = build()
    plain.load_state_dict(wanted)
    assert torch.allclose(models.outputs(plain), models.outputs(peft), atol=2e-6, rtol=1e-5)
    check_merged(peft, wanted)


def test_saved_tensors_of_any_dtype_are_aligned(tmp_path: Path) -> None:
    kinds = [np.float64, np.float32, FLOATS["BF16"], np.float16]
    whole = [DenseTensor(f"m{i}.weight", np.arange(i + 1).astype(kind)) for i, kind in enumerate(kinds)]
    tensor = SparseTensor("l.weight", (3, 3), [0], np.float32([1]), value_kind="delta")
    save(Adapter([tensor], dense=whole), tmp_path / "a.st")
    save_file({"l.weight": torch.zeros(3, 3)}, tmp_path / "base.safetensors")
    shira_to_lora(tmp_path / "a.st", tmp_path / "base.safetensors", tmp_path / "lora", rank=1)
    path = tmp_path / "lora" / "adapter_model.safetensors"
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    sizes = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert len(entries) == 6
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in entries.values())
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    assert load_file(path)["base_model.model.m2.weight"].tolist() == [0, 1, 2]


def refused(tmp_path: Path, reason: str, *tensors: SparseTensor, error: type = SourceError, **more: Any) -> None:
    """An adapter of these, and a good tensor, is refused before anything is written or computed."""
    base = more.pop("base", None)
    good = SparseTensor("wide.weight", (40, 24), [0], np.float32([1]), value_kind="delta")
    save(Adapter([good, *tensors], **more), tmp_path / "a.st")
    done: list[int] = []
    with pytest.raises(error, match=reason):
        shira_to_lora(tmp_path / "a.st", base, tmp_path / "lora", rank=2, progress=done.append)
    assert done == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.st", *(["base"] if base else [])]


def delta(name: str, *shape: int) -> SparseTensor:
    return SparseTensor(name, shape, [0], np.float32([1]), value_kind="delta")


def test_what_a_lora_cannot_hold_is_refused(tmp_path: Path) -> None:
    one = np.float32([1])
    refused(tmp_path, r"'m\.weight' is a mask", SparseTensor("m.weight", (2, 2), [0], value_kind="none"))
    resized = SparseTensor("p.weight", (2, 2), [0], one, base=one, rows=3, new_rows=np.zeros((1, 2), np.float32))
    refused(tmp_path, r"'p\.weight' is part of a patch", resized)
    refused(tmp_path, r"'gone' is removed by the adapter", manifest={"removed": ["gone"]})
    experts = delta("mlp.experts.gate_up_proj", 4, 6, 8)
    refused(tmp_path, r"'mlp\.experts\.gate_up_proj' has 3 dimensions .* target_parameters", experts)
    refused(
        tmp_path,
        r"'in_proj_weight' has 2 dimensions and is not the weight of a module",
        delta("in_proj_weight", 4, 6),
    )
    refused(tmp_path, r"'weight' has 2 dimensions and is not the weight of a module", delta("weight", 4, 6))
    refused(
        tmp_path, r"'c\.weight' has 6 dimensions, and PEFT adapts at most 5", delta("c.weight", 1, 1, 1, 1, 1, 1)
    )
    seen = SparseTensor("t.weight", (2, 2), [0], one, base_digest="0" * 64)
    refused(tmp_path, r"'t\.weight' holds target values without those of the base: pass --base", seen)
    refused(tmp_path, r"'n\.bias' is no matrix.*--base", delta("n.bias", 4))
    refused(tmp_path, r"'n\.bias' is replaced as a whole.*--base", dense=[DenseTensor("n.bias", one)])
    refused(
        tmp_path, r"'scale' is replaced as a whole, and it belongs to no module", dense=[DenseTensor("scale", one)]
    )
    refused(
        tmp_path, r"'wide\.bias' is replaced as a whole, and .* this one is adapted",
        dense=[DenseTensor("wide.bias", np.zeros(40, np.float32))],
    )  # fmt: skip


def test_what_does_not_fit_the_base_is_refused(tmp_path: Path) -> None:
    base = models.save_base(nested(), tmp_path / "base")
    with pytest.raises(BaseMismatch, match=r"'wide\.weight': the base .* has no 'wide\.weight'"):
        save(Adapter([delta("wide.weight", 40, 24)]), tmp_path / "a.st")
        shira_to_lora(tmp_path / "a.st", base, None, rank=1)
    save(Adapter([delta("lin.weight", 12, 13)]), tmp_path / "a.st")
    with pytest.raises(BaseMismatch, match=r"for shape \[12, 13\], the base .* has \[12, 12\]"):
        shira_to_lora(tmp_path / "a.st", base, None, rank=1)
    norms = [DenseTensor(f"norm.{what}", np.ones(12, np.float32)) for what in ("weight", "bias")]
    save(Adapter([delta("lin.weight", 12, 12)], dense=norms), tmp_path / "a.st")
    with pytest.raises(
        SourceError, match=r"'norm\.weight' is of the module 'norm', which PEFT cannot tell from 'other_norm'"
    ):
        shira_to_lora(tmp_path / "a.st", base, None, rank=1)
    other = [DenseTensor("other_norm.weight", np.ones(12, np.float32), base=np.zeros(12, np.float32))]
    save(Adapter([delta("lin.weight", 12, 12)], dense=other), tmp_path / "a.st")
    with pytest.raises(BaseMismatch, match=r"'other_norm\.weight': the base .* holds another tensor"):
        shira_to_lora(tmp_path / "a.st", base, tmp_path / "lora", rank=1)
    wrong = SparseTensor("lin.weight", (12, 12), [0], np.float32([1]), base=np.float32([9]))
    save(Adapter([wrong]), tmp_path / "a.st")
    with pytest.raises(BaseMismatch, match=r"'lin\.weight': the base holds other values"):
        shira_to_lora(tmp_path / "a.st", base, tmp_path / "lora", rank=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.st", "base"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_updates_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    tensor = SparseTensor("wide.weight", (40, 24), [0, 77], np.float32([1, bad]), value_kind="delta")
    save(Adapter([tensor]), tmp_path / "a.st")
    with pytest.raises(
        SourceError, match=r"a\.st: tensor 'wide\.weight': its update is not finite at flat index 77"
    ):
        shira_to_lora(tmp_path / "a.st", None, None, rank=1)


def test_a_component_of_a_pipeline(tmp_path: Path) -> None:
    components = {"components": {"unet": {}, "text_encoder": {}}}
    tensors = [delta("unet/a.weight", 3, 3), delta("text_encoder/a.weight", 3, 3)]
    save(Adapter(tensors, manifest=components), tmp_path / "a.st")
    report = shira_to_lora(tmp_path / "a.st", None, tmp_path / "lora", rank=1, include=["^unet/"])
    assert [layer.module for layer in report.layers] == ["a"]
    assert report.notices[0] == "the LoRA is for the component 'unet' alone"
    with pytest.raises(
        SourceError, match=r"holds changes of text_encoder, unet, and .* --include '\^text_encoder/'"
    ):
        shira_to_lora(tmp_path / "a.st", None, None, rank=1)


def test_choice_of_names(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "a.st", models.net(), "weight|bias")
    report = shira_to_lora(adapter, None, None, rank=2, exclude=["bias", "wide"])
    assert [layer.name for layer in report.layers] == ["square.weight", "head.weight"]
    with pytest.raises(SourceError, match="no tensor is left by the choice of names"):
        shira_to_lora(adapter, None, None, rank=2, include=["nothing"])
    for option in ("embedding", "fan_in_fan_out"):
        with pytest.raises(SourceError, match=rf"not a regular expression: --{option.replace('_', '-')} '\('"):
            shira_to_lora(adapter, None, None, rank=2, **{option: "("})


def test_embeddings_by_the_users_names(tmp_path: Path) -> None:
    save(Adapter([delta("codes.weight", 9, 4), delta("wte.weight", 9, 4)]), tmp_path / "a.st")

    def kinds(**options: Any) -> list[str]:
        return [layer.kind for layer in shira_to_lora(tmp_path / "a.st", None, None, rank=1, **options).layers]

    assert kinds() == ["linear", "embedding"]
    assert kinds(embedding="codes") == ["embedding", "linear"]
    assert kinds(embedding="(?!)") == ["linear", "linear"]


def test_only_its_own_folders_are_replaced(tmp_path: Path) -> None:
    save(Adapter([delta("wide.weight", 40, 24)]), tmp_path / "a.st")

    def convert(**options: Any) -> None:
        shira_to_lora(tmp_path / "a.st", None, tmp_path / "lora", rank=1, **options)

    convert()
    before = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}
    with pytest.raises(SourceError, match="lora: exists"):
        convert()
    convert(force=True)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}
    (tmp_path / "lora" / "notes.txt").touch()
    with pytest.raises(SourceError, match=r"holds 'notes\.txt', which shira_to_lora did not write"):
        convert(force=True)
    (tmp_path / "lora" / "notes.txt").unlink()
    models.save_lora(models.random_lora(models.net(), target_modules=["wide"]), tmp_path / "peft")
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(
        (tmp_path / "peft" / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(SourceError, match="not a folder that shira_to_lora wrote"):
        convert(force=True)
    assert (tmp_path / "lora" / "adapter_config.json").is_file()


def test_memory_is_that_of_one_layer(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shape = (3000, 2000)
    tensors = []
    for i in range(6):
        indices = np.sort(random.choice(shape[0] * shape[1], 30_000, replace=False))
        values = random.standard_normal(30_000).astype(np.float32)
        tensors.append(SparseTensor(f"l{i}.weight", shape, indices, values, value_kind="delta"))
    save(Adapter(tensors), tmp_path / "a.st")
    del tensors
    peaks = []
    for count in (1, 6):
        tracemalloc.start()
        shira_to_lora(tmp_path / "a.st", None, tmp_path / f"lora{count}", rank=8, include=[f"l[0-{count - 1}]"])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.1
    assert peaks[1] < shape[0] * shape[1] * 8  # no layer is ever dense


def test_minilm_there_and_back(tmp_path: Path) -> None:
    """A real LoRA at 1 %: little is left of it at rank 8; at 100 % the same rank gives it back to float32's rounding."""
    lora = min(path for path in models.LORAS.iterdir() if path.is_dir())
    base = models.minilm()
    lora_to_shira(lora, base, tmp_path / "sparse.st", density=0.01)
    sparse = shira_to_lora(tmp_path / "sparse.st", base, tmp_path / "sparse", rank=8)
    assert sparse.layers
    for layer in sparse.layers:
        assert layer.rank == 8
        assert layer.error == pytest.approx(layer.bound, rel=1e-6)
        assert layer.spectral_error == pytest.approx(layer.spectral_bound, rel=1e-4)
    assert 0.2 < sparse.energy_kept < 0.99
    lora_to_shira(lora, base, tmp_path / "dense.st", density=1.0)
    rank = int(config(lora)["r"])
    dense = shira_to_lora(tmp_path / "dense.st", base, tmp_path / "dense", rank=rank, prefix="bert.")
    assert {layer.rank for layer in dense.layers} == {rank}
    assert dense.saved == ["classifier.bias", "classifier.weight"]  # which the base lacks
    given = load_file(lora / "adapter_model.safetensors")
    found = load_file(tmp_path / "dense" / "adapter_model.safetensors")
    assert given.keys() == found.keys()
    scale = config(lora)["lora_alpha"] / rank
    state = load_file(base / "model.safetensors")
    for name in given:
        if not name.endswith("lora_A.weight"):
            continue
        other = name.replace("lora_A", "lora_B")
        wanted = scale * given[other].double() @ given[name].double()
        update = found[other].double() @ found[name].double()
        # The targets are rounded to float32: an error as large as that of the weights, not of the update.
        weight = state[name.removeprefix("base_model.model.bert.").replace("lora_A.", "")].double()
        rounding = 2**-24 * (weight + wanted).norm()
        assert (update - wanted).norm() <= 2 * rounding + 1e-6 * wanted.norm()


def test_fine_tunes_come_along(tmp_path: Path) -> None:
    """An adapter of a full fine-tune, with vectors, of a Llama: norms are saved as whole modules."""
    base = models.save_base(models.llama(), tmp_path / "base")
    tuned = models.llama()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(
                0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    full_to_shira(models.save_base(tuned, tmp_path / "tuned"), base, tmp_path / "a.st", density=1.0)
    report = shira_to_lora(tmp_path / "a.st", base, tmp_path / "lora", rank=64)
    assert any("norm" in name for name in report.saved)
    peft = models.load_lora(models.llama(), tmp_path / "lora")
    assert torch.allclose(models.outputs(tuned), models.outputs(peft), atol=2e-5, rtol=1e-4)
    assert report.relative_error < 1e-6
    assert report.warnings() == []
    little = shira_to_lora(tmp_path / "a.st", base, None, rank=1)
    assert little.warnings()[0].startswith(f"only {little.energy_kept:.1%} of the update's energy is kept")


def test_same_bytes(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "a.st", models.llama(), "weight$")
    base = models.save_base(models.llama(), tmp_path / "base")
    for name in ("one", "two"):
        shira_to_lora(adapter, base, tmp_path / name, rank=3)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_amounts_that_cannot_be_meant(tmp_path: Path) -> None:
    save(Adapter([delta("wide.weight", 40, 24)]), tmp_path / "a.st")
    wrong: list[dict[str, Any]] = [{}, {"rank": 1, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.1}]
    for options in wrong:
        with pytest.raises(ValueError):
            shira_to_lora(tmp_path / "a.st", None, None, **options)
