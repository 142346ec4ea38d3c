"""Adapters on bases that hold their tensors under other names: exports, against transformers' and diffusers' own conversions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import scipy.sparse
import torch
from safetensors.torch import load_file, save_file

from shira_format.adapter import Adapter
from shira_format.convert import full_to_shira, lora_to_shira
from shira_format.convert.peft_shira import peft_to_shira
from shira_format.errors import BaseMismatch, SourceError
from shira_format.export.csr import shira_to_csr
from shira_format.export.full import shira_to_full
from shira_format.export.lora import shira_to_lora
from shira_format.export.peft_shira import shira_to_peft
from shira_format.format import load, save
from shira_format.tensors import DenseTensor, SparseTensor
from tests.shira_format.test_experts import FULL, JOINED, forms, in_memory, on_disk, tuned, under
from tests.shira_format.test_names_models import CASES, Case, other_spaces

State = dict[str, torch.Tensor]


def state(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def saved(folder: Path, tensors: State) -> Path:
    folder.mkdir()
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def same(ours: State, theirs: State) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


# Experts


@pytest.mark.parametrize("made_for", ["disk", "memory"])
@pytest.mark.parametrize("name", FULL)
def test_experts_in_the_other_form(name: str, made_for: str, tmp_path: Path) -> None:
    """The base in the other form, patched, has the bits that transformers' own conversion of the patched base has."""
    disk, memory = forms(JOINED[name], tmp_path)
    tune = (on_disk if made_for == "disk" else in_memory)(tuned(JOINED[name]), tmp_path / "tune")
    own, other = (disk, memory) if made_for == "disk" else (memory, disk)
    for number, options in enumerate(({"density": 0.2}, {"density": 0.2, "self_contained": True})):
        full_to_shira(tune, own, tmp_path / "x.st", **options)  # type: ignore[arg-type]
        for alpha in (None, 0.5, 0):
            out = tmp_path / f"{number}-{alpha}"
            shira_to_full(tmp_path / "x.st", own, out / "own" if out.mkdir() is None else out, alpha=alpha)
            report = shira_to_full(tmp_path / "x.st", other, out / "other", alpha=alpha)
            model = JOINED[name]()
            patched = under(model.state_dict(), state(out / "own")) if made_for == "memory" else None
            if patched is not None:
                model.load_state_dict(patched, strict=False)
                wanted = state(on_disk(model, out / "wanted"))
            else:
                loaded = type(model).from_pretrained(_with_config(out / "own", disk), dtype=torch.float32)  # type: ignore[attr-defined]
                wanted = state(in_memory(loaded, out / "wanted"))
            same(state(out / "other"), under(state(out / "other"), wanted))
            if alpha != 0:
                assert any("tensors of other names in the base" in notice for notice in report.notices)
                assert any(not torch.equal(t, state(other)[n]) for n, t in state(out / "other").items())


def _with_config(folder: Path, model: Path) -> Path:
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    return folder


# Diffusion

DIFFUSION = [
    "Wan, image to video",
    "FLUX.2",
    "FLUX.3",
    "SD 3.5",
    "Z-Image",
    "LTX-Video",
    "AuraFlow",
    "Mochi 1",
]


def diffusion(case: Case) -> tuple[State, State]:
    """The weights of a tiny model in diffusers' names, and in those of its authors, as diffusers converts them."""
    torch.manual_seed(2)
    model = getattr(diffusers, case.cls)(**case.options)
    ours = {name: torch.randn_like(tensor).bfloat16() for name, tensor in model.state_dict().items()}
    theirs = {}
    for name, location in other_spaces(case, {name: tuple(tensor.shape) for name, tensor in ours.items()}).items():
        theirs[case.prefix + name] = torch.empty(location.shape, dtype=torch.bfloat16)
        for block in location.blocks:
            at = block.start
            for start, stop in block.rows:
                theirs[case.prefix + name][start:stop] = ours[block.name][at : at + stop - start]
                at += stop - start
    return ours, theirs | {name: tensor.bfloat16() for name, tensor in case.more(ours).items()}


def fine_tune(weights: State) -> State:
    rng = torch.Generator().manual_seed(3)
    return {
        name: tensor + torch.randn(tensor.shape, generator=rng).to(tensor.dtype) / 16
        for name, tensor in weights.items()
    }


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", DIFFUSION)
def test_diffusion_models_in_the_other_names(name: str, prefix: str, tmp_path: Path) -> None:
    case = CASES[name]
    ours, theirs = diffusion(case)
    convert: Callable[[State], State] = lambda tensors: case.convert(  # noqa: E731
        {n.removeprefix(prefix): t.clone() for n, t in tensors.items()}
    )
    base = saved(tmp_path / "ours", ours)
    single = saved(tmp_path / "theirs", {prefix + n: t for n, t in theirs.items()})
    same(convert(state(single)), ours)
    # Made for diffusers' names, onto the authors' file.
    full_to_shira(saved(tmp_path / "tune", fine_tune(ours)), base, tmp_path / "x.st", density=0.2)
    shira_to_full(tmp_path / "x.st", base, tmp_path / "own")
    shira_to_full(tmp_path / "x.st", single, tmp_path / "other")
    same(convert(state(tmp_path / "other")), state(tmp_path / "own"))
    assert any(not torch.equal(t, ours[n]) for n, t in state(tmp_path / "own").items())
    # Made for the authors', onto diffusers'.
    dropped = {prefix + n for n in case.more(ours)}
    tuned_theirs = {n: t for n, t in fine_tune(state(single)).items() if n not in dropped}
    tune = saved(tmp_path / "tune2", tuned_theirs | {n: t for n, t in state(single).items() if n in dropped})
    full_to_shira(tune, single, tmp_path / "y.st", density=0.2)
    shira_to_full(tmp_path / "y.st", single, tmp_path / "own2")
    shira_to_full(tmp_path / "y.st", base, tmp_path / "other2")
    same(state(tmp_path / "other2"), convert(state(tmp_path / "own2")))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", DIFFUSION)
def test_a_full_fine_tune_in_the_other_names(name: str, prefix: str, tmp_path: Path) -> None:
    """Top-k of a fine-tune in the other names is that of the fine-tune in the base's names."""
    case = CASES[name]
    ours, theirs = diffusion(case)
    dropped = case.more(ours)
    after = fine_tune({n: t for n, t in theirs.items() if n not in dropped}) | {n: theirs[n] for n in dropped}
    base, single = (
        saved(tmp_path / "ours", ours),
        saved(tmp_path / "theirs", {prefix + n: t for n, t in theirs.items()}),
    )
    tune = saved(tmp_path / "tune", case.convert({n: t.clone() for n, t in after.items()}))
    single_tune = saved(tmp_path / "single_tune", {prefix + n: t for n, t in after.items()})
    for here, same_form, other_form in ((base, tune, single_tune), (single, single_tune, tune)):
        options: Any = {"density": 0.1, "exclude": [f"{re.escape(n)}$" for n in dropped]}
        full_to_shira(same_form, here, tmp_path / "same.st", **options)
        report = full_to_shira(other_form, here, tmp_path / "other.st", **options)
        assert any("of the fine-tune" in notice for notice in report.names)
        assert load(tmp_path / "same.st") == load(tmp_path / "other.st")


# Other exports


def test_matrices_of_a_moved_adapter(tmp_path: Path) -> None:
    disk, memory = forms(JOINED["qwen3_moe"], tmp_path)
    full_to_shira(on_disk(tuned(JOINED["qwen3_moe"]), tmp_path / "tune"), disk, tmp_path / "x.st", density=0.1)
    for values in ("target", "delta"):
        report = shira_to_csr(tmp_path / "x.st", tmp_path / values, base=memory, values=values)
        before = state(memory)
        shira_to_full(tmp_path / "x.st", memory, tmp_path / f"full-{values}")
        after = state(tmp_path / f"full-{values}")
        names = {tensor.name for tensor in report.tensors}
        assert "model.layers.0.mlp.experts.gate_up_proj" in names
        assert names == {n for n in before if not torch.equal(before[n], after[n])}
        for tensor in report.tensors:
            matrix = scipy.sparse.load_npz(tmp_path / values / tensor.file).toarray().reshape(tensor.shape)
            wanted = after[tensor.name] - before[tensor.name] if values == "delta" else after[tensor.name]
            changed = (before[tensor.name] != after[tensor.name]).numpy()
            np.testing.assert_array_equal(matrix[changed], wanted.numpy()[changed])
    other = shira_to_csr(tmp_path / "x.st", None, values="target", exclude=["experts"])
    assert all("experts" in name for name in other.left_out["by --include and --exclude"])


def fused() -> tuple[State, State]:
    """Attention of Z-Image in diffusers' names, and the fused weight of its authors."""
    ours, theirs = diffusion(CASES["Z-Image"])
    return {n: t.float() for n, t in ours.items()}, {n: t.float() for n, t in theirs.items()}


def test_a_lora_of_a_moved_adapter(tmp_path: Path) -> None:
    """The LoRA of full rank changes the base in the other names as the adapter does."""
    ours, theirs = fused()
    base, single = saved(tmp_path / "ours", ours), saved(tmp_path / "theirs", theirs)
    changed = {
        n: fine_tune({n: t})[n] if re.search(r"layers.0.*\.(to_[qkv]|qkv)\.", n) else t for n, t in ours.items()
    }
    full_to_shira(saved(tmp_path / "tune", changed), base, tmp_path / "x.st", density=0.05, include=["to_[qkv]"])
    report = shira_to_lora(tmp_path / "x.st", single, tmp_path / "lora", energy=1.0)
    assert all(layer.name.endswith("attention.qkv.weight") for layer in report.layers)
    assert any("tensors of other names in the base" in notice for notice in report.notices)
    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    shira_to_full(tmp_path / "x.st", single, tmp_path / "full")
    after = state(tmp_path / "full")
    for layer in report.layers:
        key = f"base_model.model.{layer.module}"
        delta = factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()
        config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] or config.get("alpha_pattern") is not None
        torch.testing.assert_close(after[layer.name].double() - theirs[layer.name], delta, rtol=0, atol=1e-5)


def test_peft_shira_of_a_moved_adapter(tmp_path: Path) -> None:
    """PEFT's SHiRA for the base's own names, read back, patches the base as the adapter does."""
    ours, theirs = fused()
    base, single = saved(tmp_path / "ours", ours), saved(tmp_path / "theirs", theirs)
    name = "layers.0.attention.qkv.weight"
    rows, columns = theirs[name].shape
    rng = np.random.default_rng(4)
    at = np.sort(rng.choice(rows * columns, 2 * (rows + columns), replace=False)).astype(np.int64)
    delta = rng.standard_normal(at.size).astype(np.float32)
    before = theirs[name].numpy().reshape(-1)[at]
    save(Adapter([SparseTensor(name, (rows, columns), at, delta, value_kind="delta", dtype=np.dtype("f4"), base=before)]), tmp_path / "y.st")  # fmt: skip
    shira_to_peft(tmp_path / "y.st", tmp_path / "same", base=single)
    shira_to_full(tmp_path / "y.st", base, tmp_path / "full")
    # Read by peft_to_shira onto diffusers' names, which hold the weight in three.
    report = peft_to_shira(tmp_path / "same", base, tmp_path / "z.st")
    assert {t.name for t in report.tensors} == {name}
    assert any("'layers.0.attention.to_q.weight'" in notice for notice in report.names)
    assert set(load(tmp_path / "z.st")) == {f"layers.0.attention.to_{x}.weight" for x in "qkv"}
    shira_to_full(tmp_path / "z.st", base, tmp_path / "again")
    same(state(tmp_path / "again"), state(tmp_path / "full"))
    # Out: r * (rows + columns) entries are needed of each, so that zeros are added.
    out = shira_to_peft(tmp_path / "y.st", tmp_path / "other", base=base, pad=True)
    assert [t.module for t in out.tensors] == [f"layers.0.attention.to_{x}" for x in "qkv"]
    peft_to_shira(tmp_path / "other", base, tmp_path / "w.st")
    shira_to_full(tmp_path / "w.st", base, tmp_path / "third")
    same(state(tmp_path / "third"), state(tmp_path / "full"))


def test_experts_are_no_linear_layers_of_peft(tmp_path: Path) -> None:
    disk, memory = forms(JOINED["qwen3_moe"], tmp_path)
    full_to_shira(on_disk(tuned(JOINED["qwen3_moe"]), tmp_path / "tune"), disk, tmp_path / "x.st", density=0.1, include=["experts"])  # fmt: skip
    with pytest.raises(
        SourceError, match=r"x\.st: tensor 'model.layers.0.mlp.experts.\w+'.*not the 'weight' of a module"
    ):
        shira_to_peft(tmp_path / "x.st", tmp_path / "out", base=memory)
    with pytest.raises(SourceError, match=r"x\.st: tensor 'model.layers.0.mlp.experts.\w+' has 3 dimensions"):
        shira_to_lora(tmp_path / "x.st", memory, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


# What is refused, and whole tensors


def test_another_base_and_one_that_lacks_a_tensor_are_refused(tmp_path: Path) -> None:
    disk, memory = forms(JOINED["qwen3_moe"], tmp_path)
    full_to_shira(on_disk(tuned(JOINED["qwen3_moe"]), tmp_path / "tune"), disk, tmp_path / "x.st", density=0.1)
    weights = state(memory)
    weights["model.layers.0.mlp.experts.down_proj"] *= 2
    other = saved(tmp_path / "other", weights)
    with pytest.raises(
        BaseMismatch, match=r"x\.st: tensor 'model.layers.0.mlp.experts.\d.down_proj.weight'.*digest differs"
    ):
        shira_to_full(tmp_path / "x.st", other, tmp_path / "out")
    del weights["model.layers.1.mlp.experts.down_proj"]
    lacking = saved(tmp_path / "lacking", weights)
    with pytest.raises(BaseMismatch, match="'model.layers"):
        shira_to_full(tmp_path / "x.st", lacking, tmp_path / "out")
    report = shira_to_full(tmp_path / "x.st", lacking, tmp_path / "out", exclude=["experts"])
    assert report.left_out["by --include and --exclude"]


def test_whole_tensors(tmp_path: Path) -> None:
    """Of all parts of a tensor: replaced at any strength; of some, as entries at strength 1 alone."""
    ours, theirs = fused()
    base, single = saved(tmp_path / "ours", ours), saved(tmp_path / "theirs", theirs)
    names = [f"layers.0.attention.to_{x}.weight" for x in "qkv"]
    new = {name: torch.randn_like(ours[name]) for name in names}
    for count in (3, 2):
        dense = [DenseTensor(n, new[n].numpy(), base=ours[n].numpy()) for n in names[:count]]
        save(Adapter(dense=dense), tmp_path / "x.st")
        wanted = dict(ours) | {n: new[n] for n in names[:count]}
        shira_to_full(tmp_path / "x.st", single, tmp_path / f"out{count}")
        same(CASES["Z-Image"].convert(state(tmp_path / f"out{count}")), wanted)
        if count == 3:
            shira_to_full(tmp_path / "x.st", single, tmp_path / "half", alpha=0.5)
            same(state(tmp_path / "half"), state(tmp_path / "out3"))
        else:
            with pytest.raises(SourceError, match="a part of it is replaced"):
                shira_to_full(tmp_path / "x.st", single, tmp_path / "half2", alpha=0.5)
    assert base.exists()


def test_a_new_tensor_that_is_a_part_of_one_of_the_base_is_refused(tmp_path: Path) -> None:
    ours, theirs = fused()
    single = saved(tmp_path / "theirs", theirs)
    to_q, to_k = (f"layers.0.attention.to_{x}.weight" for x in "qk")
    dense = [
        DenseTensor(to_q, ours[to_q].numpy() + 1),
        DenseTensor(to_k, ours[to_k].numpy() + 1, base=ours[to_k].numpy()),
    ]
    save(Adapter(dense=dense), tmp_path / "x.st")
    with pytest.raises(SourceError, match=r"x\.st: .*(is new by the adapter|has targets and deltas)"):
        shira_to_full(tmp_path / "x.st", single, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_part_of_a_pipeline_on_a_single_file(tmp_path: Path) -> None:
    """An adapter of a pipeline's transformer on its authors' file, and the other way round."""
    ours, theirs = fused()
    single = saved(tmp_path / "theirs", {f"model.diffusion_model.{n}": t for n, t in theirs.items()})
    name = "layers.0.attention.to_k.weight"
    values = np.float32([9, 8])
    at = np.int64([3, 40])
    tensor = SparseTensor(
        f"transformer/{name}", tuple(ours[name].shape), at, values, base=ours[name].numpy().reshape(-1)[at]
    )
    save(Adapter([tensor], manifest={"components": {"transformer": {}}}), tmp_path / "x.st")
    shira_to_full(tmp_path / "x.st", single, tmp_path / "out")
    found = {n.removeprefix("model.diffusion_model."): t for n, t in state(tmp_path / "out").items()}
    wanted = ours[name].clone()
    wanted.view(-1)[at] = torch.from_numpy(values)
    same(CASES["Z-Image"].convert(found), ours | {name: wanted})


def test_two_towers_are_told_apart_by_values_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    towers = {f"{tower}.encoder.layers.{i}.q.weight": torch.from_numpy(rng.standard_normal((6, 6), np.float32)) for tower in ("text_model", "vision_model") for i in (0, 1)}  # fmt: skip
    base = saved(tmp_path / "base", towers)
    at = np.int64([1, 20])
    for known in (True, False):
        tensors = [
            SparseTensor(
                f"encoder.layers.{i}.q.weight", (6, 6), at, np.float32([1, 2]), value_kind="delta", dtype=np.dtype("f4"),
                base=towers[f"vision_model.encoder.layers.{i}.q.weight"].numpy().reshape(-1)[at] if known else None,
            )
            for i in (0, 1)
        ]  # fmt: skip
        save(Adapter(tensors), tmp_path / "x.st")
        if known:
            shira_to_full(tmp_path / "x.st", base, tmp_path / "out")
            found = state(tmp_path / "out")
            assert {n for n in found if not torch.equal(found[n], towers[n])} == {
                n for n in towers if "vision" in n
            }
        else:
            with pytest.raises(BaseMismatch, match=r"x\.st: .*text_model.*vision_model"):
                shira_to_full(tmp_path / "x.st", base, tmp_path / "out2")


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_of_mlx_on_3_d_tensors(name: str, tmp_path: Path) -> None:
    """mlx-lm's LoRA of all experts changes the rows that transformers would join from changed single ones."""
    disk, memory = forms(JOINED[name], tmp_path)
    torch.manual_seed(5)
    before = state(disk)
    home, words = (
        ("mlp", {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"})
        if name == "qwen3_moe"
        else ("block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"})
    )
    factors = {}
    for theirs, ours in words.items():
        rows, columns = before[f"model.layers.1.{home}.experts.0.{ours}.weight"].shape
        key = f"model.layers.1.{home}.switch_mlp.{theirs}"
        factors |= {f"{key}.lora_a": torch.randn(3, 2, columns), f"{key}.lora_b": torch.randn(3, rows, 2)}
    q = before["model.layers.0.self_attn.q_proj.weight"]
    key = "model.layers.0.self_attn.q_proj"
    factors |= {f"{key}.lora_a": torch.randn(q.shape[1], 2), f"{key}.lora_b": torch.randn(2, q.shape[0])}
    (tmp_path / "lora").mkdir()
    save_file(factors, tmp_path / "lora" / "adapters.safetensors")
    config = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 2, "scale": 0.5, "dropout": 0.0},
    }
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    lora_to_shira(tmp_path / "lora", disk, tmp_path / "disk.st", density=1.0)
    report = lora_to_shira(tmp_path / "lora", memory, tmp_path / "memory.st", density=1.0)
    assert any("another program" in notice for notice in report.names)
    shira_to_full(tmp_path / "disk.st", disk, tmp_path / "wanted")
    shira_to_full(tmp_path / "disk.st", memory, tmp_path / "moved")
    shira_to_full(tmp_path / "memory.st", memory, tmp_path / "found")
    same(state(tmp_path / "found"), state(tmp_path / "moved"))
    after = state(tmp_path / "wanted")
    for (theirs, ours), expert in ((word, e) for word in words.items() for e in range(3)):
        key, weight = (
            f"model.layers.1.{home}.switch_mlp.{theirs}",
            f"model.layers.1.{home}.experts.{expert}.{ours}.weight",
        )
        delta = 0.5 * factors[f"{key}.lora_b"][expert].double() @ factors[f"{key}.lora_a"][expert].double()
        torch.testing.assert_close(after[weight].double(), before[weight].double() + delta, rtol=0, atol=1e-5)
