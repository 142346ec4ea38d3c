"""Adapters on live models that hold a checkpoint's tensors otherwise, found by names: experts that transformers fuses, and others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from shira_format.adapter import Adapter
from shira_format.convert import full_to_shira, lora_to_shira
from shira_format.errors import BaseMismatch
from shira_format.export.full import shira_to_full
from shira_format.format import load, save
from shira_format.live import AdapterPool, Switcher
from shira_format.names import spaces
from shira_format.names.row_blocks import Location, RowBlock
from shira_format.tensors import DenseTensor, SparseTensor

SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 40,
    "head_dim": 4,
}  # fmt: skip
CONFIGS = {
    "mixtral": transformers.MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SIZES, intermediate_size=24, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2
    ),
}
Weights = dict[str, torch.Tensor]


def state(model: Any) -> Weights:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def assert_same(ours: Weights, theirs: Weights) -> None:
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.dtype == theirs[name].dtype, name
        assert torch.equal(weight.view(torch.uint8), theirs[name].view(torch.uint8)), name


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.fixture(scope="module", params=CONFIGS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose experts are one by one, as transformers writes it."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.bfloat16)
    model.save_pretrained(folder)
    names = load_file(folder / "model.safetensors").keys()
    assert any(".experts.0." in name for name in names)
    assert any(name.endswith(".experts.gate_up_proj") for name in model.state_dict())
    return folder


def fine_tune(base: Path, folder: Path) -> Path:
    """A checkpoint that differs in some entries of every tensor."""
    rng = torch.Generator().manual_seed(1)
    weights = load_file(base / "model.safetensors")
    for weight in weights.values():
        at = torch.rand(weight.shape, generator=rng) < 0.3
        weight[at] += torch.randn(int(at.sum()), generator=rng).to(weight.dtype)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


def lora(base: Path, folder: Path) -> Path:
    """A LoRA of single experts and of attention, in PEFT's format."""
    rng = torch.Generator().manual_seed(2)
    weights = load_file(base / "model.safetensors")
    factors = {}
    for name, weight in weights.items():
        if ".experts." in name or "q_proj" in name:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{key}.lora_A.weight"] = torch.randn(2, weight.shape[1], generator=rng)
            factors[f"{key}.lora_B.weight"] = torch.randn(weight.shape[0], 2, generator=rng)
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    config = '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "all-linear", "base_model_name_or_path": "x"}'
    (folder / "adapter_config.json").write_text(config)
    return folder


@pytest.mark.parametrize("kind", ["full", "exact", "lora"])
def test_experts_that_transformers_fuses_while_loading(kind: str, base: Path, tmp_path: Path) -> None:
    """An adapter of the checkpoint on the live model is what a model loaded from the patched checkpoint is."""
    out = tmp_path / "a.st"
    if kind == "lora":
        lora_to_shira(lora(base, tmp_path / "lora"), base, out, density=0.2)
    else:
        tune = fine_tune(base, tmp_path / "tune")
        full_to_shira(tune, base, out, **({"exact": True} if kind == "exact" else {"density": 0.2}))
    adapter = load(out)
    assert any(".experts.3." in name for name in adapter)
    model = loaded(base)
    before = state(model)
    switcher = Switcher(model)
    for alpha in (1.0, 0.5):
        shira_to_full(out, base, tmp_path / f"patched-{alpha}", alpha=alpha)
        expected = state(loaded(tmp_path / f"patched-{alpha}"))
        report = switcher.switch(out, alpha)
        assert_same(state(model), expected)
        assert report.entries == sum(tensor.nnz for tensor in adapter.values())
        assert "tensors of the adapter are in other parameters of the model, for example" in report.notices[0]
        switcher.revert()
        assert_same(state(model), before)
        with switcher.applied(out, alpha):
            assert_same(state(model), expected)
        assert_same(state(model), before)


def test_a_pool_of_adapters_of_the_checkpoint(base: Path, tmp_path: Path) -> None:
    """Translated once for the model, while the pool holds them; two together."""
    (tmp_path / "adapters").mkdir()
    full_to_shira(fine_tune(base, tmp_path / "tune"), base, tmp_path / "adapters" / "a.st", density=0.2)
    lora_to_shira(lora(base, tmp_path / "lora"), base, tmp_path / "adapters" / "b.st", density=0.2)
    single = load_file(base / "model.safetensors")
    Switcher(single).set([(tmp_path / "adapters" / f"{name}.st", 0.5) for name in "ab"])
    (tmp_path / "together").mkdir()
    save_file(single, tmp_path / "together" / "model.safetensors", {"format": "pt"})
    (tmp_path / "together" / "config.json").write_bytes((base / "config.json").read_bytes())
    model = loaded(base)
    before = state(model)
    pool = AdapterPool(tmp_path / "adapters")
    switcher = Switcher(model, pool=pool)
    for _ in range(2):
        switcher.set([("a", 0.5), ("b", 0.5)])
        assert len(switcher._placed) == 2
        assert_same(state(model), state(loaded(tmp_path / "together")))
        assert switcher.report.overlapping
    switcher.unload("a")
    switcher.unload(pool.get_adapter("b"))
    assert_same(state(model), before)
    pool.clear()
    assert not len(switcher._placed)


def test_the_reverse_an_adapter_of_fused_experts_on_single_ones(base: Path, tmp_path: Path) -> None:
    model = loaded(base)
    fused = state(model)
    rng = np.random.default_rng(0)
    tensors = []
    from shira_format._core.arrays import as_array

    for name, weight in fused.items():
        flat = as_array(weight).reshape(-1)
        at = np.flatnonzero(rng.random(flat.size) < 0.2)
        known = SparseTensor(
            name, tuple(weight.shape), at, rng.standard_normal(at.size).astype(flat.dtype), base=flat[at]
        )
        tensors.append(SparseTensor(name, known.shape, at, known.values, base_digest=known.base_digest))
    save(Adapter(tensors), tmp_path / "fused.st")
    single = load_file(base / "model.safetensors")
    before = {name: weight.clone() for name, weight in single.items()}
    switcher = Switcher(single)
    switcher.load(tmp_path / "fused.st")
    save_file(single, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    Switcher(model).load(tmp_path / "fused.st")
    assert_same(state(loaded(tmp_path)), state(model))
    switcher.revert()
    assert_same(single, before)


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    """A single value that differs, in the base of a fused parameter; and another adapter is on meanwhile."""
    for name in ("a", "b"):
        full_to_shira(
            fine_tune(base, tmp_path / name), base, tmp_path / f"{name}.st", density=0.2 if name == "a" else 0.1
        )
    model = loaded(base)
    switcher = Switcher(model)
    switcher.load(tmp_path / "b.st")
    on = state(model)
    switcher.load(tmp_path / "a.st")  # the values below those of the first adapter are compared
    switcher.unload(str(tmp_path / "a.st"))
    assert_same(state(model), on)
    switcher.revert()
    name = next(
        name
        for name in load(tmp_path / "a.st")
        if ".experts.2." in name and name.endswith(("w3.weight", "up_proj.weight"))
    )
    row, column = divmod(int(load(tmp_path / "a.st")[name].indices[0]), 16)
    layer = name.split(".")[2]
    fused = model.state_dict()[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
    fused[2, fused.shape[1] // 2 + row, column] += 1
    changed = state(model)
    with pytest.raises(BaseMismatch, match=rf"a\.st: tensor '{name}': the base holds other values"):
        switcher.load(tmp_path / "a.st")
    assert_same(state(model), changed)


def test_an_adapter_of_another_model_is_refused(base: Path) -> None:
    model = loaded(base)
    before = state(model)
    tensors = [
        SparseTensor(f"transformer.h.{n}.mlp.c_fc.weight", (4, 4), [1], np.float32([1]), base=np.float32([0]))
        for n in range(2)
    ]
    for adapter in (Adapter(tensors), Adapter([*tensors, next(iter(self_of(model).values()))])):
        with pytest.raises(BaseMismatch, match="the model has no"):
            Switcher(model).load(adapter)
        assert_same(state(model), before)
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    wrong = Adapter([SparseTensor(name, (3, 16), [1], np.float32([1]), base=np.float32([0]))])
    with pytest.raises(
        BaseMismatch, match=rf"tensor '{name}': the adapter is for shape \[3, 16\], the weight has"
    ):
        Switcher(model).load(wrong)


def self_of(model: Any) -> dict[str, SparseTensor]:
    from shira_format._core.arrays import as_array

    return {
        name: SparseTensor(
            name, tuple(weight.shape), [0], as_array(weight).reshape(-1)[:1], base=as_array(weight).reshape(-1)[:1]
        )
        for name, weight in model.state_dict().items()
    }


# A pipeline, with a table of a model of its own


def split(names: Any, shape: Any) -> dict[str, Location]:
    """``M.qkv`` is the rows of ``M.v``, ``M.q`` (its halves exchanged) and ``M.k``."""
    found = {}
    for name in names:
        if name.endswith("to_q.weight"):
            module = name.removesuffix("to_q.weight")
            rows = shape(name)[0]
            half = rows // 2
            blocks = (
                RowBlock(f"{module}to_v.weight", 0, ((2 * rows, 3 * rows),)),
                RowBlock(name, 0, ((half, rows), (0, half))),
                RowBlock(f"{module}to_k.weight", 0, ((rows, 2 * rows),)),
            )
            found[f"{module}qkv.weight"] = Location((3 * rows, *shape(name)[1:]), blocks)
    return found


class Pipeline:
    def __init__(self, **components: Any) -> None:
        self.components = components


def transformer(seed: int, rows: int = 4) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = torch.nn.ModuleDict(
        {name: torch.nn.Linear(3, rows, bias=False) for name in ("to_q", "to_k", "to_v", "out")}
    )
    return torch.nn.ModuleDict({"block": model})


def fused(model: torch.nn.Module) -> torch.Tensor:
    q, k, v = (model["block"][f"to_{name}"].weight.detach() for name in "qkv")
    return torch.cat([q[2:], q[:2], k, v])


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("prefix", ["", "transformer/", "model.diffusion_model."])
def test_a_pipeline(prefix: str, alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spaces, "TABLES", (split,))
    model, other = transformer(0), torch.nn.Linear(2, 2)
    whole, out = fused(model), model["block"]["out"].weight.detach()
    rng = np.random.default_rng(0)
    at = np.flatnonzero(rng.random(36) < 0.6)
    values = rng.standard_normal(at.size).astype(np.float32)
    qkv = SparseTensor(f"{prefix}block.qkv.weight", (12, 3), at, values, base=whole.reshape(-1).numpy()[at])
    qkv = SparseTensor(qkv.name, qkv.shape, at, values, base_digest=qkv.base_digest)
    new = torch.full_like(out, 7)
    dense = DenseTensor(f"{prefix}block.out.weight", new.numpy(), base=out.numpy())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = whole.clone()
    expected.view(-1)[torch.from_numpy(at)] = torch.from_numpy(
        qkv.applied(whole.reshape(-1).numpy()[at], alpha).copy()
    )
    switcher = Switcher(Pipeline(transformer=model, other=other))
    switcher.load(Adapter([qkv], dense=[dense]), alpha)
    assert torch.equal(fused(model), expected)
    assert torch.equal(model["block"]["out"].weight, new)
    switcher.revert()
    assert_same(dict(model.state_dict()), before)
    replaced = DenseTensor(qkv.name, expected.numpy(), base=whole.numpy())  # the whole of it
    replaced = DenseTensor(qkv.name, expected.numpy(), base_digest=replaced.base_digest)
    switcher.load(Adapter(dense=[replaced]), alpha)
    assert torch.equal(fused(model), expected)
    switcher.revert()
    assert_same(dict(model.state_dict()), before)
    wrong = DenseTensor(qkv.name, expected.numpy(), base=whole.numpy() + 1)
    with pytest.raises(BaseMismatch, match="holds other values"):
        switcher.load(Adapter(dense=[wrong]), alpha)
    assert_same(dict(model.state_dict()), before)


def test_a_pipeline_with_two_parts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spaces, "TABLES", (split,))
    low, high = transformer(0), transformer(1)
    pipeline = Pipeline(transformer=low, transformer_2=high)
    whole = fused(high).reshape(-1).numpy()

    def qkv(name: str) -> Adapter:
        return Adapter([SparseTensor(name, (12, 3), [5], np.float32([9]), base=whole[[5]])])

    with pytest.raises(BaseMismatch, match="fit the base in several ways.*transformer/block.*transformer_2/block"):
        Switcher(pipeline).load(qkv("block.qkv.weight"))
    before = fused(low)
    Switcher(pipeline, prefix="transformer_2/").load(qkv("block.qkv.weight"))
    assert 9 == fused(high).reshape(-1)[5]
    assert torch.equal(before, fused(low))
    Switcher(Pipeline(transformer=low, transformer_2=(other := transformer(1, 6)))).load(
        Adapter(
            [
                SparseTensor(
                    "block.qkv.weight", (12, 3), [5], np.float32([9]), base=fused(low).reshape(-1).numpy()[[5]]
                )
            ]
        )
    )
    assert 9 == fused(low).reshape(-1)[5]
    assert other is not None


def test_tied_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spaces, "TABLES", (split,))
    model = transformer(0)
    tied = torch.nn.ModuleDict({"one": model["block"], "two": model["block"]})
    whole = fused(model).reshape(-1).numpy()

    def adapter(*values: float) -> Adapter:
        return Adapter(
            [
                SparseTensor(
                    f"{name}.qkv.weight", (12, 3), [5, 30], np.float32([value, 8]), base_digest=known.base_digest
                )
                for name, value in zip(("one", "two"), values, strict=False)
            ]
        )

    known = SparseTensor("x", (12, 3), [5, 30], np.float32([9, 8]), base=whole[[5, 30]])
    before = state(model)
    switcher = Switcher(tied)
    with pytest.raises(BaseMismatch, match="are tied in the model, and the adapter changes them differently"):
        switcher.load(adapter(9, 7))
    assert_same(state(model), before)
    for values in ((9.0, 9.0), (9.0,)):
        switcher.switch(adapter(*values))
        assert [9, 8] == fused(model).reshape(-1)[[5, 30]].tolist()
        switcher.revert()
        assert_same(state(model), before)


# A model of diffusers, an adapter of its authors' single file


SD3 = {
    "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12, "sample_size": 8,
    "caption_projection_dim": 16, "pooled_projection_dim": 10, "pos_embed_max_size": 8, "qk_norm": "rms_norm",
    "dual_attention_layers": (0, 1),
}  # fmt: skip


def random_authors(model: torch.nn.Module) -> Weights:
    """Weights by the names of the authors' file: the table has names and shapes, diffusers' conversion says what they become."""
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    others = spaces.other_names(shapes, shapes.__getitem__)
    claimed = {block.name for location in others.values() for block in location.blocks}
    same = {name: shape for name, shape in shapes.items() if name not in claimed}
    return {
        name: torch.randn(shape) for name, shape in {**same, **{n: o.shape for n, o in others.items()}}.items()
    }


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_an_adapter_of_the_authors_file_on_a_pipeline_of_diffusers(prefix: str, tmp_path: Path) -> None:
    """What diffusers' own conversion makes of the patched file is what the live model becomes."""
    import diffusers
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(**SD3)
    authors = random_authors(model)
    assert any("attn.qkv" in name for name in authors)
    tuned = {name: weight.clone() for name, weight in authors.items()}
    for weight in tuned.values():
        weight[torch.rand(weight.shape) < 0.2] += 1

    def on_disk(weights: Weights, name: str) -> Path:
        save_file({prefix + key: weight for key, weight in weights.items()}, tmp_path / name)
        return tmp_path / name

    def converted(weights: Weights) -> Weights:
        return convert_sd3_transformer_checkpoint_to_diffusers(dict(weights))

    full_to_shira(
        on_disk(tuned, "tuned.safetensors"), on_disk(authors, "base.safetensors"), tmp_path / "a.st", exact=True
    )
    model.load_state_dict(converted(authors), strict=True)
    before = state(model)
    for live in (model, Pipeline(transformer=model, text_encoder=torch.nn.Linear(2, 2))):
        switcher = Switcher(live)
        switcher.load(tmp_path / "a.st")
        assert_same(state(model), converted(tuned))
        assert switcher.report.notices
        switcher.revert()
        assert_same(state(model), before)


def test_an_adapter_of_diffusers_on_the_authors_weights(tmp_path: Path) -> None:
    import diffusers
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(**SD3)
    authors = random_authors(model)
    before = {name: weight.clone() for name, weight in authors.items()}
    base = convert_sd3_transformer_checkpoint_to_diffusers(dict(before))
    tuned = {name: weight + (torch.rand(weight.shape) < 0.2) for name, weight in base.items()}
    save_file({name: weight.contiguous() for name, weight in base.items()}, tmp_path / "base.safetensors")
    save_file({name: weight.contiguous() for name, weight in tuned.items()}, tmp_path / "tuned.safetensors")
    full_to_shira(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", tmp_path / "a.st", exact=True)
    switcher = Switcher(authors)
    switcher.load(tmp_path / "a.st")
    found = convert_sd3_transformer_checkpoint_to_diffusers(dict(authors))
    assert_same(found, tuned)
    switcher.revert()
    assert_same(authors, before)


def test_at_strength_zero_another_model_is_refused() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})
    for name, shape in (("x.y.weight", (2, 2)), ("a.weight", (2, 3))):
        adapter = Adapter([SparseTensor(name, shape, [1], np.float32([1]), base=np.float32([0]))])
        with pytest.raises(BaseMismatch, match=f"tensor '{name}'"):
            Switcher(model).load(adapter, 0)
