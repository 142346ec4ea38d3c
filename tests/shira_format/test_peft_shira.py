"""PEFT's sparse adapters, both ways, against PEFT itself."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, ShiraConfig, SupertuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from shira_format._core.arrays import Array, array_digest, as_array, bits_differ
from shira_format._core.dtypes import FLOATS
from shira_format.adapter import Adapter
from shira_format.checkpoints import open_checkpoint
from shira_format.convert.peft_shira import peft_to_shira
from shira_format.convert.peft_shira.files import KINDS
from shira_format.convert.peft_shira.layers import ShiraLayer
from shira_format.errors import BaseMismatch, ShiraError, SourceError
from shira_format.export.peft_shira import shira_to_peft
from shira_format.export.peft_shira.padding import padded
from shira_format.format import AdapterFile, load, save
from shira_format.tensors import DenseTensor, SparseTensor, same_bits
from tests import models
from tests.strategies import adapters, any_bits, float_dtypes, masks

# torch says this of any sparse tensor, and PEFT's forward pass makes one.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
OPTIONS: dict[str, dict[str, Any]] = {
    "net": {"r": 2, "target_modules": ["wide", "square"], "modules_to_save": ["head"]},
    "llama": {"r": 2, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["norm"]},
    "bert": {"r": 1, "target_modules": ["query", "intermediate.dense"], "task_type": "SEQ_CLS"},
}
WEIGHTS = "adapter_model.safetensors"


def under(model: nn.Module, config: Any, scale: float = 0.05) -> PeftModel:
    """``model`` (changed in place) under a new adapter with noise on all that it trains."""
    peft = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_((scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return peft.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def merged(peft: PeftModel) -> dict[str, torch.Tensor]:
    """The weights that PEFT itself makes of base and adapter."""
    return {k: v.clone() for k, v in copy.deepcopy(peft).merge_and_unload().state_dict().items()}


def applied(adapter: Path, base: Path) -> dict[str, Array]:
    """The weights of the base with our adapter."""
    found, opened = {}, load(adapter)
    checkpoint = open_checkpoint(base)
    for name in checkpoint:
        weight = np.array(checkpoint[name])
        if name in opened:
            flat, tensor = weight.reshape(-1), opened[name]
            flat[tensor.indices] = tensor.applied(tensor.checked_base(weight), opened.alpha)
        found[name] = opened.dense[name].values if name in opened.dense else weight
    return found


def same_weights(ours: dict[str, Array], theirs: dict[str, torch.Tensor]) -> bool:
    return all(same_bits(array, as_array(theirs[name])) for name, array in ours.items())


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with PEFT's adapter ``a`` of a net, and ``base``."""
    models.save_base(models.net(), tmp_path / "base")
    models.save_lora(under(models.net(), ShiraConfig(**OPTIONS["net"])), tmp_path / "a")
    return tmp_path


# ---- from PEFT ----


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_targets_are_what_peft_merges(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = models.MODELS[name]().to(dtype)
    base = models.save_base(model, tmp_path / "base", dtype)
    peft = under(model, ShiraConfig(**OPTIONS[name]))
    folder = models.save_lora(peft, tmp_path / "a")
    report = peft_to_shira(folder, base, tmp_path / "a.st")
    assert report.nnz > 0 and report.whole
    assert same_weights(applied(tmp_path / "a.st", base), merged(peft))
    assert {"kind": "shira", "dialect": "peft", "r": OPTIONS[name]["r"]}.items() <= load(
        tmp_path / "a.st"
    ).manifest["source"].items()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_deltas_come_back_equal(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = models.MODELS[name]().to(dtype)
    base = models.save_base(model, tmp_path / "base", dtype)
    folder = models.save_lora(under(model, ShiraConfig(**OPTIONS[name]), 1e-4), tmp_path / "a")
    peft_to_shira(folder, base, tmp_path / "a.st", values="delta")
    adapter = load(tmp_path / "a.st")
    assert all(adapter[t].value_kind == "delta" and adapter[t].base_digest is not None for t in adapter)
    for with_base in (None, base):
        shira_to_peft(tmp_path / "a.st", tmp_path / "b", base=with_base, force=True)
        assert equal(tensors(folder), tensors(tmp_path / "b"))
    assert OPTIONS[name]["r"] == json.loads((tmp_path / "b" / "adapter_config.json").read_text())["r"]


@pytest.mark.parametrize("values", ["target", "delta"])
def test_compact_adapters_from_peft(values: str, small: Path) -> None:
    options: dict[str, Any] = {"values": values}
    peft_to_shira(small / "a", small / "base", small / "plain.st", **options)
    peft_to_shira(small / "a", small / "base", small / "compact.st", compact=True, **options)
    assert load(small / "plain.st") == load(small / "compact.st", base=open_checkpoint(small / "base"))
    assert AdapterFile(small / "compact.st").manifest.raw["features"]


def test_entries_that_change_nothing(tmp_path: Path) -> None:
    model = models.net().bfloat16()
    base = models.save_base(model, tmp_path / "base", torch.bfloat16)
    peft = under(model, ShiraConfig(r=2, target_modules=["wide"]), 1e-4)
    folder = models.save_lora(peft, tmp_path / "a")
    report = peft_to_shira(folder, base, tmp_path / "t.st")
    lost = 128 - load(tmp_path / "t.st")["wide.weight"].nnz
    assert 0 < lost < 128
    assert f"{lost} of 128 entries do not change" in report.notices[-1]
    assert same_weights(applied(tmp_path / "t.st", base), merged(peft))
    assert 128 == peft_to_shira(folder, base, tmp_path / "d.st", values="delta").nnz
    with pytest.raises(SourceError, match=rf"'wide.weight' has {128 - lost} .*--pad"):
        shira_to_peft(tmp_path / "t.st", tmp_path / "b", base=base)


@pytest.mark.parametrize("values", ["target", "delta"])
def test_self_contained(values: Any, small: Path) -> None:
    report = peft_to_shira(small / "a", small / "base", small / "a.st", values=values, self_contained=True)
    assert (small / "a.st").stat().st_size == report.file_bytes
    adapter = load(small / "a.st")
    weight = open_checkpoint(small / "base")["wide.weight"]
    assert same_bits(adapter["wide.weight"].base, weight.reshape(-1)[adapter["wide.weight"].indices])
    assert adapter.dense["head.weight"].base is not None
    shira_to_peft(small / "a.st", small / "b")
    assert tensors(small / "b").keys() == tensors(small / "a").keys()


def test_a_dry_run_says_the_same(small: Path) -> None:
    dry = peft_to_shira(small / "a", small / "base", None)
    wet = peft_to_shira(small / "a", small / "base", small / "a.st")
    assert (dry.tensors, dry.whole, dry.file_bytes) == (wet.tensors, wet.whole, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_super_tuning(dtype: torch.dtype, tmp_path: Path) -> None:
    model = models.llama().to(dtype)
    base = models.save_base(model, tmp_path / "base", dtype)
    config = SupertuningConfig(sparsity=0.9, target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft = under(model, config, 1e-2)
    folder = models.save_lora(peft, tmp_path / "a")
    stored = tensors(folder)["base_model.model.model.layers.0.self_attn.q_proj.supertuning_indices"]
    assert not torch.equal(stored, stored.sort().values)
    peft_to_shira(folder, base, tmp_path / "t.st")
    assert same_weights(applied(tmp_path / "t.st", base), merged(peft))
    report = peft_to_shira(folder, base, tmp_path / "d.st", values="delta")
    assert (dtype == torch.bfloat16) == any("Super-Tuning rounds" in text for text in report.notices)
    tensor = load(tmp_path / "d.st")["model.layers.0.self_attn.q_proj.weight"]
    order = np.argsort(stored.numpy())
    values = tensors(folder)["base_model.model.model.layers.0.self_attn.q_proj.supertuning_values"].numpy()
    assert same_bits(values[order], tensor.values)


def test_supra_and_files_without_indices_are_refused(tmp_path: Path) -> None:
    base = models.save_base(models.net(), tmp_path / "base")
    config = SupertuningConfig(sparsity=0.9, target_modules=["wide"], r=2)
    with pytest.raises(SourceError, match=r"adapter_config.json: r is set \(Supra\)"):
        peft_to_shira(models.save_lora(under(models.net(), config), tmp_path / "a"), base, None)
    with pytest.warns(UserWarning, match="save_precomputed_indices"):
        config = SupertuningConfig(sparsity=0.9, target_modules=["wide"], save_precomputed_indices=False)
    with pytest.raises(SourceError, match="save_precomputed_indices is not set"):
        peft_to_shira(models.save_lora(under(models.net(), config), tmp_path / "b"), base, None)


def test_torch_files_and_float_indices(small: Path) -> None:
    peft_to_shira(small / "a", small / "base", small / "a.st")
    state = {k: v.float() if k.endswith("indices") else v for k, v in tensors(small / "a").items()}  # Windows
    (small / "bin").mkdir()
    torch.save(state, small / "bin" / "adapter_model.bin")
    (small / "bin" / "adapter_config.json").write_bytes((small / "a" / "adapter_config.json").read_bytes())
    peft_to_shira(small / "bin" / "adapter_model.bin", small / "base", small / "b.st")
    assert load(small / "a.st") == load(small / "b.st")


def test_entries_in_any_order(small: Path) -> None:
    """PEFT's masks are in order; nothing asks for it."""
    peft_to_shira(small / "a", small / "base", small / "a.st")

    def shuffled(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        order = torch.randperm(128, generator=torch.Generator().manual_seed(3))
        key = "base_model.model.wide.shira_"
        return found | {f"{key}indices": found[f"{key}indices"][:, order].contiguous(), f"{key}weight": found[f"{key}weight"][order]}  # fmt: skip

    models.edit_weights(small / "a", shuffled)
    peft_to_shira(small / "a", small / "base", small / "b.st")
    assert load(small / "a.st") == load(small / "b.st")


def test_a_named_adapter_and_several(small: Path) -> None:
    (small / "outer").mkdir()
    (small / "a").rename(small / "outer" / "one")
    assert peft_to_shira(small / "outer", small / "base", None).nnz
    models.save_lora(under(models.net(), ShiraConfig(**OPTIONS["net"])), small / "outer" / "two")
    with pytest.raises(SourceError, match=r"several adapters \(one, two\)"):
        peft_to_shira(small / "outer", small / "base", None)


def test_a_head_that_is_adapted(tmp_path: Path) -> None:
    """PEFT saves the base's weight under it, too."""
    base = models.save_base(models.llama(), tmp_path / "base")
    config = ShiraConfig(r=1, target_modules=["lm_head"])
    folder = models.save_lora(under(models.llama(), config), tmp_path / "a")
    key = "base_model.model.lm_head.base_layer.weight"
    assert key in tensors(folder)
    report = peft_to_shira(folder, base, tmp_path / "a.st", values="delta")
    assert [] == report.whole
    shira_to_peft(tmp_path / "a.st", tmp_path / "b", base=base)
    ours = tensors(tmp_path / "b")
    assert equal({k: v for k, v in tensors(folder).items() if k != key}, ours)
    models.edit_weights(folder, lambda found: found | {key: found[key] + 1})
    with pytest.raises(SourceError, match="is not the base's 'lm_head.weight'"):
        peft_to_shira(folder, base, None)


def test_names_of_a_bare_base(tmp_path: Path) -> None:
    model = models.bert()
    base = models.save_base(model.bert, tmp_path / "base")
    peft = under(model, ShiraConfig(**OPTIONS["bert"]))
    folder = models.save_lora(peft, tmp_path / "a")
    report = peft_to_shira(folder, base, tmp_path / "a.st", values="delta")
    assert any("the prefix 'bert.' is left out" in text for text in report.notices)
    assert ["classifier.bias", "classifier.weight"] == sorted(report.whole)
    adapter = load(tmp_path / "a.st")
    assert "encoder.layer.0.attention.self.query.weight" in adapter
    # The head is not under "bert.": sparse tensors and head are two prefixes.
    shira_to_peft(tmp_path / "a.st", tmp_path / "b", base=base, prefix="bert.", exclude=["classifier"])
    theirs = {k: v for k, v in tensors(folder).items() if "classifier" not in k}
    assert equal(theirs, tensors(tmp_path / "b"))


def test_filters(small: Path) -> None:
    report = peft_to_shira(small / "a", small / "base", small / "a.st", include=["w", "head"], exclude=["square"])
    assert (["wide.weight"], ["head.weight"]) == ([t.name for t in report.tensors], report.whole)
    assert {"include": ["w", "head"], "exclude": ["square"]} == load(small / "a.st").manifest["selection"]
    with pytest.raises(SourceError, match="no tensor is left"):
        peft_to_shira(small / "a", small / "base", None, include=["nothing"])


WIDE = "base_model.model.wide.shira_"
Edit = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def with_index(row: int, at: int, value: float, dtype: torch.dtype = torch.int32) -> Edit:
    def edit(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        indices = found[f"{WIDE}indices"].to(dtype)
        indices[row, at] = value
        return found | {f"{WIDE}indices": indices}

    return edit


def with_value(value: float) -> Edit:
    def edit(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found[f"{WIDE}weight"][3] = value
        return found

    return edit


def twice(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found[f"{WIDE}indices"][:, 5] = found[f"{WIDE}indices"][:, 0]
    return found


BAD_WEIGHTS: dict[str, tuple[Edit, str]] = {
    "prefix": (lambda f: f | {"wide.shira_weight": torch.ones(1)}, "'wide.shira_weight': it does not start with"),
    "foreign key": (lambda f: f | {f"{WIDE[:-6]}lora_A.weight": torch.ones(1)}, "unmatched key .*lora_A"),
    "other kind": (
        lambda f: f | {f"{WIDE[:-6]}supertuning_values": torch.ones(1)},
        "unmatched key .*supertuning_values'",
    ),
    "unknown": (lambda f: f | {"base_model.model.new.weight": torch.ones(1)}, "'base_model.model.new.weight': neither"),
    "module": (
        lambda f: {k.replace("wide", "narrow"): v for k, v in f.items()},
        "1 of 2 adapted weights are not in the base, for example 'narrow.weight'",
    ),
    "no weight": (lambda f: {k: v for k, v in f.items() if k != f"{WIDE}weight"}, f"'{WIDE}indices' has no partner"),
    "no indices": (lambda f: {k: v for k, v in f.items() if k != f"{WIDE}indices"}, f"'{WIDE}weight' has no partner"),
    "nothing": (lambda f: {k: v for k, v in f.items() if "shira" not in k}, "no key ends in shira_indices"),
    "shape of values": (lambda f: f | {f"{WIDE}weight": torch.ones(2, 64)}, r"has shape \[2, 64\], not \[n\]"),
    "shape of indices": (
        lambda f: f | {f"{WIDE}indices": torch.zeros(3, 128, dtype=torch.int32)},
        r"has shape \[3, 128\], should have \[2, 128\]",
    ),
    "flat indices": (
        lambda f: f | {f"{WIDE}indices": torch.zeros(128, dtype=torch.int32)},
        r"has shape \[128\], should have \[2, 128\]",
    ),
    "count": (
        lambda f: f | {f"{WIDE}weight": torch.ones(4), f"{WIDE}indices": torch.zeros(2, 4, dtype=torch.int32)},
        r"has 4 entries; PEFT holds r \* \(rows \+ columns\) = 2 \* 64",
    ),
    "dtype of values": (lambda f: f | {f"{WIDE}weight": torch.ones(128, dtype=torch.int32)}, "not a float"),
    "dtype of indices": (with_index(0, 0, 0, torch.int64), "is of dtype int64, not int32 or float32"),
    "row": (with_index(0, 127, 40), r"names row 40, out of range in 'wide.weight' of shape \[40, 24\]"),
    "column": (with_index(1, 127, 24), "names column 24, out of range"),
    "negative": (with_index(1, 0, -1), "names column -1, out of range"),
    "half": (with_index(1, 0, 0.5, torch.float32), "not an integer"),
    "nan index": (with_index(1, 0, float("nan"), torch.float32), "not an integer"),
    "inf index": (with_index(1, 0, float("-inf"), torch.float32), "from 2\\^24 on"),
    "large float": (with_index(0, 0, 2**24, torch.float32), "from 2\\^24 on in float32"),
    "twice": (twice, r"names the element \[\d+, \d+\] twice"),
    "nan": (with_value(float("nan")), "'base_model.model.wide.shira_weight' holds NaN or Inf"),
    "inf": (with_value(float("inf")), "holds NaN or Inf"),
    "shape of head": (
        lambda f: f | {"base_model.model.head.weight": torch.ones(6, 41)},
        r"'base_model.model.head.weight' has shape \[6, 41\], the base's 'head.weight' \[6, 40\]",
    ),
    "nan in head": (
        lambda f: f | {"base_model.model.head.weight": torch.full((6, 40), float("nan"))},
        "head.weight' holds NaN or Inf",
    ),
    "both": (
        lambda f: f | {"base_model.model.wide.weight": torch.ones(40, 24)},
        "'base_model.model.wide.weight' replaces a weight that is adapted",
    ),
    "two keys": (
        lambda f: f | {"base_model.model.head.modules_to_save.weight": torch.ones(6, 40)},
        "two keys for tensor 'head.weight'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_bad_weights(edit: Edit, message: str, small: Path) -> None:
    models.edit_weights(small / "a", edit)
    with pytest.raises(SourceError, match=message) as caught:
        peft_to_shira(small / "a", small / "base", small / "a.st")
    assert str(small / "a" / WEIGHTS) in str(caught.value)
    assert not (small / "a.st").exists()


def test_a_target_that_overflows(small: Path) -> None:
    models.save_base(models.net().half(), small / "half", torch.float16)
    models.edit_weights(small / "a", with_value(1e6))
    with pytest.raises(
        SourceError, match=r"model.safetensors: tensor 'wide.weight': base \+ update overflows F16"
    ):
        peft_to_shira(small / "a", small / "half", None)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"peft_type": "LORA"}, "peft_type is 'LORA', not one of SHIRA, SUPERTUNING"),
    "no type": ({"peft_type": ["SHIRA"]}, "peft_type is"),
    "r": ({"r": 0}, "r must be a positive integer, not 0"),
    "r is true": ({"r": True}, "r must be a positive integer, not True"),
    "conv": ({"fan_in_fan_out": True}, "fan_in_fan_out is set"),
    "saved": ({"modules_to_save": "head"}, "modules_to_save must be a list of names"),
}


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configs(change: dict[str, Any], message: str, small: Path) -> None:
    models.edit_config(small / "a", **change)
    with pytest.raises(SourceError, match=rf"adapter_config.json: {message}"):
        peft_to_shira(small / "a", small / "base", None)


def test_bad_places(small: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        peft_to_shira(small / "none", small / "base", None)
    with pytest.raises(SourceError, match="no PEFT adapter"):
        peft_to_shira(small / "base", small / "base", None)
    with pytest.raises(SourceError, match="no adapter_config.json beside it"):
        peft_to_shira(small / "base" / "model.safetensors", small / "base", None)
    with pytest.raises(SourceError, match="is one of the inputs"):
        peft_to_shira(small / "a", small / "base", small / "base" / "model.safetensors")
    with pytest.raises(SourceError, match="is one of the inputs"):
        peft_to_shira(small / "a", small / "base", small / "a" / WEIGHTS)
    with pytest.raises(ValueError, match="neither 'target' nor 'delta'"):
        peft_to_shira(small / "a", small / "base", None, values="none")  # type: ignore[arg-type]


def test_other_shapes_than_matrices(small: Path) -> None:
    models.save_arrays(small / "c.safetensors", {"wide.weight": np.zeros((40, 24, 1), np.float32), "square.weight": np.zeros((40, 40), np.float32), "head.weight": np.zeros((6, 40), np.float32)})  # fmt: skip
    with pytest.raises(SourceError, match=r"adapts 'wide.weight' of shape \[40, 24, 1\]: not a linear layer"):
        peft_to_shira(small / "a", small / "c.safetensors", None)
    models.save_arrays(small / "i.safetensors", {"wide.weight": np.zeros((40, 24), np.int8), "square.weight": np.zeros((40, 40), np.float32), "head.weight": np.zeros((6, 40), np.float32)})  # fmt: skip
    with pytest.raises(SourceError, match="is of dtype int8, not a float dtype"):
        peft_to_shira(small / "a", small / "i.safetensors", None)


def test_a_layer_is_an_update(small: Path) -> None:
    opened = open_checkpoint(small / "a" / WEIGHTS)
    layer = ShiraLayer(
        "wide.weight", (40, 24), np.dtype(np.float32), KINDS["SHIRA"], opened, f"{WIDE}indices", f"{WIDE}weight", small
    )  # fmt: skip
    indices, values = (tensors(small / "a")[f"{WIDE}{what}"] for what in ("indices", "weight"))
    dense = torch.zeros(40, 24)
    dense[indices[0].long(), indices[1].long()] = values
    out = np.full((7, 24), np.nan, np.float32)
    layer.tile(11, 18, out)
    assert np.array_equal(dense[11:18].numpy(), out)


# ---- to PEFT ----


def entries(dtype: Any, shape: tuple[int, int], count: int, seed: int = 0) -> tuple[Array, Array]:
    """Positions and values of a tune."""
    random = np.random.default_rng(seed)
    indices = np.sort(random.choice(shape[0] * shape[1], count, replace=False))
    return indices, random.normal(0, 0.05, count).astype(dtype)


def tuned(
    base: Path, out: Path, rank: int, names: list[str], whole: dict[str, Array] | None = None, **manifest: Any
) -> Path:
    """An adapter of ``base`` with ``rank * (rows + columns)`` targets in each of ``names``, close to the base's values."""
    checkpoint, found = open_checkpoint(base), []
    for seed, name in enumerate(names):
        weight = checkpoint[name]
        indices, values = entries(np.float32, weight.shape, rank * sum(weight.shape), seed)  # type: ignore[arg-type]
        start = weight.reshape(-1)[indices]
        target = (start.astype(np.float32) * (1 + values)).astype(weight.dtype)
        found.append(SparseTensor(name, weight.shape, indices, target, base=start))
    replaced = [DenseTensor(n, a, base=checkpoint.get(n)) for n, a in (whole or {}).items()]
    save(Adapter(found, dense=replaced, manifest=manifest), out)
    return out


LLAMA = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
BERT = ["bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.1.output.dense.weight"]
TUNES: dict[str, tuple[list[str], dict[str, tuple[int, ...]]]] = {
    "net": (["wide.weight", "square.weight"], {"head.weight": (6, 40)}),
    "llama": (LLAMA, {"model.norm.weight": (32,)}),
    "bert": (BERT, {"classifier.bias": (3,), "bert.pooler.dense.weight": (32, 32)}),
}


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", TUNES)
def test_peft_loads_it(name: str, dtype: torch.dtype, trainable: bool, tmp_path: Path) -> None:
    base = models.save_base(models.MODELS[name]().to(dtype), tmp_path / "base", dtype)
    numpy_dtype = next(iter(open_checkpoint(base).values())).dtype
    names, shapes = TUNES[name]
    whole = {n: np.linspace(0.5, 1, int(np.prod(s))).reshape(s).astype(numpy_dtype) for n, s in shapes.items()}
    adapter = tuned(base, tmp_path / "a.st", 1, names, whole)
    report = shira_to_peft(adapter, tmp_path / "out", base=base)
    assert 0 == sum(tensor.inexact or 0 for tensor in report.tensors)
    plain = models.MODELS[name]().to(dtype)
    plain.load_state_dict({k: torch.from_numpy(v.astype(np.float64)).to(dtype) for k, v in applied(adapter, base).items()}, strict=False)  # fmt: skip
    # Warnings are errors here: PEFT has none to give.
    peft = PeftModel.from_pretrained(models.MODELS[name]().to(dtype), tmp_path / "out", is_trainable=trainable)
    assert torch.equal(models.outputs(plain), models.outputs(peft.eval()))
    assert not torch.equal(models.outputs(models.MODELS[name]().to(dtype)), models.outputs(peft))
    assert same_weights(applied(adapter, base), merged(peft))
    models.save_lora(peft, tmp_path / "again")
    again, ours = tensors(tmp_path / "again"), tensors(tmp_path / "out")
    own_base = {k: v for k, v in again.items() if ".base_layer." in k}  # of lm_head
    assert equal(ours, {k: v for k, v in again.items() if k not in own_base})
    peft_to_shira(tmp_path / "again", base, tmp_path / "b.st", self_contained=True)
    ours_again = applied(tmp_path / "b.st", base)  # targets with the bits of the base have no entry there
    assert all(same_bits(weight, ours_again[n]) for n, weight in applied(adapter, base).items())


def test_a_bare_adapter_under_a_head(tmp_path: Path) -> None:
    base = models.save_base(models.bert().bert, tmp_path / "base")
    adapter = tuned(base, tmp_path / "a.st", 1, [name.removeprefix("bert.") for name in BERT])
    shira_to_peft(adapter, tmp_path / "wrong", base=base)
    with pytest.raises(ValueError, match="not found in the base model"):
        PeftModel.from_pretrained(models.bert(), tmp_path / "wrong")
    shira_to_peft(adapter, tmp_path / "out", base=base, prefix="bert.")
    peft = PeftModel.from_pretrained(models.bert(), tmp_path / "out")
    ours = {f"bert.{name}": weight for name, weight in applied(adapter, base).items()}
    assert same_weights(ours, merged(peft))


class Twins(nn.Module):
    """A module whose name is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 8)
        self.inner = nn.ModuleDict({"head": nn.Linear(4, 8), "forehead": nn.Linear(4, 8)})
        self.forehead = nn.Linear(4, 8)


def test_a_name_that_ends_like_another(tmp_path: Path) -> None:
    base = models.save_base(Twins(), tmp_path / "base")
    shira_to_peft(tuned(base, tmp_path / "a.st", 2, ["head.weight"]), tmp_path / "out", base=base)
    peft = PeftModel.from_pretrained(Twins(), tmp_path / "out")
    assert ["head"] == [n.removeprefix("base_model.model.") for n, m in peft.named_modules() if hasattr(m, "shira_weight")]  # fmt: skip
    # As a list, PEFT would take "head" for the end of a name, and allocate a layer that the file has nothing for.
    models.edit_config(tmp_path / "out", target_modules=["head"])
    with pytest.warns(UserWarning, match="missing adapter keys.*inner.head"):
        PeftModel.from_pretrained(Twins(), tmp_path / "out")


def test_saved_modules_whose_names_end_alike(tmp_path: Path) -> None:
    base = models.save_base(Twins(), tmp_path / "base")
    bias = np.ones(8, np.float32)
    adapter = tuned(base, tmp_path / "a.st", 2, ["inner.forehead.weight"], {"head.bias": bias})
    with pytest.raises(
        SourceError, match="'head.bias': PEFT saves whole modules .*'inner.forehead.weight' is adapted"
    ):
        shira_to_peft(adapter, tmp_path / "out", base=base)
    # Without the base nothing tells of the others; PEFT itself then fails, and changes nothing silently.
    adapter = tuned(base, tmp_path / "b.st", 2, ["inner.head.weight"], {"forehead.bias": bias, "forehead.weight": np.ones((8, 4), np.float32)})  # fmt: skip
    with pytest.raises(SourceError, match="PEFT would save 'inner.forehead' whole too"):
        shira_to_peft(adapter, tmp_path / "out", base=base)
    report = shira_to_peft(adapter, tmp_path / "out")
    assert "forehead: PEFT needs all tensors of a saved module" in report.notices[0]
    with pytest.raises(KeyError):
        PeftModel.from_pretrained(Twins(), tmp_path / "out")


def test_saved_modules_that_are_all_there(tmp_path: Path) -> None:
    base = models.save_base(Twins(), tmp_path / "base")
    whole = {"forehead.bias": f32(*range(8)), "inner.forehead.bias": f32(*range(1, 9))}
    adapter = tuned(base, tmp_path / "a.st", 2, ["inner.head.weight"], whole)
    report = shira_to_peft(adapter, tmp_path / "out", base=base)
    assert ["forehead", "inner.forehead"] == report.modules_to_save
    assert same_weights(applied(adapter, base), merged(PeftModel.from_pretrained(Twins(), tmp_path / "out")))


def test_the_rest_of_a_saved_module_comes_from_the_base(tmp_path: Path) -> None:
    base = models.save_base(models.bert(), tmp_path / "base")
    adapter = tuned(base, tmp_path / "a.st", 1, BERT[:1], {"classifier.bias": np.ones(3, np.float32)})
    report = shira_to_peft(adapter, tmp_path / "out", base=base)
    assert (["classifier"], ["classifier.bias"], ["classifier.weight"]) == (report.modules_to_save, report.whole, report.filled)  # fmt: skip
    assert "1 tensors of modules that PEFT saves whole come from the base" in report.notices[-1]
    assert same_weights(applied(adapter, base), merged(PeftModel.from_pretrained(models.bert(), tmp_path / "out")))


def test_a_module_within_a_saved_one(tmp_path: Path) -> None:
    base = models.save_base(models.bert(), tmp_path / "base")
    path = "bert.embeddings.LayerNorm.weight"
    whole = {
        path: np.ones(32, np.float32),
        "bert.embeddings.word_embeddings.weight": np.ones((50, 32), np.float32),
    }
    report = shira_to_peft(tuned(base, tmp_path / "a.st", 1, BERT[:1], whole), tmp_path / "a", base=base)
    assert ["bert.embeddings.LayerNorm", "bert.embeddings.word_embeddings"] == report.modules_to_save
    assert same_weights(applied(tmp_path / "a.st", base), merged(PeftModel.from_pretrained(models.bert(), tmp_path / "a")))  # fmt: skip
    # A tensor of the outer module itself: all that is in it is saved.
    found = [DenseTensor(path, whole[path]), DenseTensor("bert.embeddings.scale", np.ones(1, np.float32))]
    tensors_ = [load(tmp_path / "a.st")[BERT[0]]]
    save(Adapter(tensors_, dense=found), tmp_path / "b.st")
    report = shira_to_peft(tmp_path / "b.st", None, base=base)
    assert ["bert.embeddings"] == report.modules_to_save
    assert "bert.embeddings.word_embeddings.weight" in report.filled


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


def plain(name: str = "a.weight", shape: tuple[int, ...] = (2, 3), count: int = 5, **more: Any) -> SparseTensor:
    """A tensor with ``count`` entries."""
    more = {"base": np.zeros(count, np.float32)} | more
    return SparseTensor(name, shape, np.arange(count), np.ones(count, np.float32), **more)


def padding_of(rows: int, columns: int, count: int, name: str) -> SparseTensor:
    return plain(name, (rows, columns), count)


REFUSED: dict[str, tuple[list[SparseTensor], dict[str, Any], str]] = {
    "mask": ([SparseTensor("a.weight", (2, 3), np.arange(5), value_kind="none")], {}, "'a.weight': a mask"),
    "renamed": ([plain(base_name="b.weight")], {}, "'a.weight': part of a patch"),
    "rows": ([plain(rows=2)], {}, "'a.weight': part of a patch"),
    "removed": ([plain()], {"manifest": {"removed": ["z"]}}, "a patch that removes 'z'"),
    "pipeline": ([plain("unet/a.weight")], {"manifest": {"components": {"unet": {}}}}, "an adapter of a pipeline"),
    "vector": ([plain(shape=(6,))], {}, r"'a.weight': has shape \[6\]"),
    "conv": ([plain(shape=(2, 3, 1))], {}, r"'a.weight': has shape \[2, 3, 1\]"),
    "parameter": ([plain("attn.in_proj_weight")], {}, "not the 'weight' of a module"),
    "no module": ([plain(".weight")], {}, "not the 'weight' of a module"),
    "embedding": ([plain("model.embed_tokens.weight")], {}, "an embedding by its name"),
    "nothing": ([plain(count=0, base=np.zeros(0, np.float32))], {}, "needs an adapted layer"),
    "no tensor": ([], {}, "needs an adapted layer"),
    "targets": (
        [plain(base=None, base_digest=array_digest(np.zeros(5, np.float32)))], {}, "'a.weight': holds target values .* pass --base"
    ),
    "bias": ([plain()], {"dense": [DenseTensor("a.bias", f32(1))]}, "'a.bias': PEFT saves whole modules"),
    "around": ([plain("m.a.weight")], {"dense": [DenseTensor("m.scale", f32(1))]}, "'m.scale': PEFT saves whole modules"),
    "root": ([plain()], {"dense": [DenseTensor("logit_scale", f32(1))]}, "'logit_scale' is in no module"),
    "regex": ([plain()], {"dense": [DenseTensor("b(.c", f32(1))]}, r"'b\(.c': PEFT cannot save"),
    "dots of a regex": ([plain("aXb.weight")], {"dense": [DenseTensor("a.b.bias", f32(1))]}, "'aXb.weight' is adapted"),
    "nan": ([plain()], {"dense": [DenseTensor("b.bias", f32(np.nan))]}, "'b.bias' holds NaN"),
    "inf": ([plain(base=f32(0, 0, 0, -np.inf, 0))], {}, "flat index 3 is not finite"),
    "overflow": ([plain()], {"manifest": {"alpha": 1e60}}, "flat index 0 is not finite"),
}  # fmt: skip


@pytest.mark.parametrize(("found", "more", "message"), REFUSED.values(), ids=REFUSED)
def test_what_peft_cannot_hold(
    found: list[SparseTensor], more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save(Adapter(found, **more), tmp_path / "a.st")
    with pytest.raises(SourceError, match=rf"a.st: .*{message}"):
        shira_to_peft(tmp_path / "a.st", tmp_path / "out")
    assert ["a.st"] == [path.name for path in tmp_path.iterdir()]


COUNTS: dict[str, tuple[list[SparseTensor], bool, str]] = {
    "not a multiple": (
        [padding_of(10, 10, 25, "a.weight"), padding_of(10, 10, 20, "b.weight")], False,
        r"here 'a.weight' has 25 \(r \* \(10 \+ 10\), r = 1.25\), 'b.weight' has 20 .*r = 1\)\. --pad fills them up with zeros, to r = 2",
    ),
    "two r": (
        [padding_of(10, 10, 20, "a.weight"), padding_of(10, 10, 40, "b.weight")], False, r"to r = 2",
    ),
    "many": ([padding_of(10, 10, 1, f"{n}.weight") for n in range(8)], False, r"'5.weight' has 1 [^']*, \.\.\. \(8 layers\)"),
    "too dense to pad": ([padding_of(9, 9, 80, "a.weight")], True, r"needs r = 5, under which 'a.weight' .* more entries than"),
    "another": (
        [padding_of(10, 10, 100, "a.weight"), padding_of(2, 3, 5, "b.weight")], True,
        r"'a.weight' has 100 .* needs r = 5, under which 'b.weight' has 5 .* would have more entries than elements",
    ),
    "another, not asked to pad": (
        [padding_of(10, 10, 100, "a.weight"), padding_of(2, 3, 5, "b.weight")], False,
        r"here 'a.weight' has 100 .*--pad cannot help, as 'b.weight'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("found", "pad", "message"), COUNTS.values(), ids=COUNTS)
def test_counts(found: list[SparseTensor], pad: bool, message: str, tmp_path: Path) -> None:
    save(Adapter(found), tmp_path / "a.st")
    with pytest.raises(SourceError, match=rf"PEFT's SHiRA holds r \* \(rows \+ columns\) .*{message}"):
        shira_to_peft(tmp_path / "a.st", tmp_path / "out", pad=pad)
    assert not (tmp_path / "out").exists()


def test_padding(tmp_path: Path) -> None:
    model = models.net()
    base = models.save_base(model, tmp_path / "base")
    tuned(base, tmp_path / "full.st", 2, ["wide.weight", "square.weight"])
    full = load(tmp_path / "full.st")
    # 100 of 128 entries of the one, 2 of 160 of the other.
    cut = [SparseTensor(n, full[n].shape, full[n].indices[:c], full[n].values[:c], base=full[n].base[:c]) for n, c in (("wide.weight", 100), ("square.weight", 2))]  # fmt: skip
    save(Adapter(cut), tmp_path / "a.st")
    report = shira_to_peft(tmp_path / "a.st", tmp_path / "out", pad=True)
    assert [(128, 28), (160, 158)] == [(tensor.nnz, tensor.zeros) for tensor in report.tensors]
    assert f"--pad added 186 zeros to 102 entries, {186 * 12} bytes, for r = 2" in report.notices
    peft = PeftModel.from_pretrained(models.net(), tmp_path / "out")
    assert same_weights(applied(tmp_path / "a.st", base), merged(peft))
    peft_to_shira(tmp_path / "out", base, tmp_path / "b.st", self_contained=True)
    assert load(tmp_path / "a.st") == load(tmp_path / "b.st")
    first = (tmp_path / "out" / WEIGHTS).read_bytes()
    shira_to_peft(tmp_path / "a.st", tmp_path / "out", pad=True, force=True)
    assert first == (tmp_path / "out" / WEIGHTS).read_bytes()


@given(st.data())
def test_zeros_fill_the_first_free_places(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 60))
    indices = data.draw(masks((size,)))
    count = data.draw(st.integers(indices.size, size))
    values = np.arange(1, indices.size + 1, dtype=np.float32)
    places, filled = padded(indices, values, count)
    free = [place for place in range(size) if place not in set(indices.tolist())][: count - indices.size]
    dense = dict(zip(indices.tolist(), values.tolist(), strict=True)) | dict.fromkeys(free, 0.0)
    assert sorted(dense.items()) == list(zip(places.tolist(), filled.tolist(), strict=True))
    assert np.signbit(filled[filled == 0]).all()


def test_layers_without_entries_are_left_out(tmp_path: Path) -> None:
    save(Adapter([plain(), plain("b.weight", count=0)]), tmp_path / "a.st")
    report = shira_to_peft(tmp_path / "a.st", tmp_path / "out")
    assert ["a"] == [tensor.module for tensor in report.tensors]
    assert report.notices == ["1 tensors without entries are left out, 'b.weight' for example"]


def test_strength_is_worked_in(tmp_path: Path) -> None:
    """Base + fl(alpha * (target - base)) is what the format asks for, so PEFT's result is ours to the bit."""
    base = models.save_base(models.net().bfloat16(), tmp_path / "base", torch.bfloat16)
    adapter = tuned(base, tmp_path / "a.st", 2, ["wide.weight"], alpha=0.7)
    report = shira_to_peft(adapter, tmp_path / "out")
    assert "the adapter's strength 0.7 is worked into the deltas: in PEFT it acts at scale 1" in report.notices
    peft = PeftModel.from_pretrained(models.net().bfloat16(), tmp_path / "out")
    assert same_weights(applied(adapter, base), merged(peft))
    assert [0] == [tensor.inexact for tensor in report.tensors]


def test_conv1d_is_refused_where_the_base_tells(tmp_path: Path) -> None:
    base = models.save_base(models.gpt2(), tmp_path / "base")
    adapter = tuned(base, tmp_path / "a.st", 1, ["transformer.h.0.mlp.c_fc.weight"])
    with pytest.raises(
        SourceError, match=r"c_fc.weight': its bias has 128 elements, one a column: the module is Conv1D"
    ):
        shira_to_peft(adapter, tmp_path / "out", base=base)
    # PEFT raises by itself.
    shira_to_peft(adapter, tmp_path / "out")
    with pytest.raises(TypeError, match="Conv1D.* is not supported"):
        PeftModel.from_pretrained(models.gpt2(), tmp_path / "out")


def test_the_wrong_base(tmp_path: Path) -> None:
    base = models.save_base(models.net(), tmp_path / "base")
    adapter = tuned(base, tmp_path / "a.st", 2, ["wide.weight"], {"head.weight": np.ones((6, 40), np.float32)})
    before = sorted(path.name for path in tmp_path.iterdir())
    torch.manual_seed(5)
    other = models.Net()
    with pytest.raises(BaseMismatch, match="'wide.weight': the base .* holds other values"):
        shira_to_peft(adapter, tmp_path / "out", base=models.save_base(other, tmp_path / "other"))
    other.wide = models.net().wide
    with pytest.raises(BaseMismatch, match="'head.weight': the base .* holds another tensor"):
        shira_to_peft(adapter, tmp_path / "out", base=models.save_base(other, tmp_path / "other"))
    with pytest.raises(BaseMismatch, match="'wide.weight': the base .* has none of this name"):
        shira_to_peft(adapter, tmp_path / "out", base=models.save_base(models.bert(), tmp_path / "other"))
    assert [*before, "other"] == sorted(path.name for path in tmp_path.iterdir())


def test_what_is_replaced(small: Path) -> None:
    adapter = tuned(small / "base", small / "a.st", 2, ["wide.weight"])
    out = small / "out"
    shira_to_peft(adapter, out)
    with pytest.raises(SourceError, match="out: exists"):
        shira_to_peft(adapter, out)
    (out / ".DS_Store").touch()
    shira_to_peft(adapter, out, force=True)
    assert ["adapter_config.json", WEIGHTS] == sorted(path.name for path in out.iterdir())
    for folder, message in [
        (small / "a", "holds 'README.md', which shira_to_peft did not write"),
        (small / "base", "not a folder that shira_to_peft wrote"),
        (adapter, "not a folder"),
    ]:
        with pytest.raises(SourceError, match=message):
            shira_to_peft(adapter, folder, force=True)
    (out / "notes").mkdir()
    with pytest.raises(SourceError, match="holds 'notes'"):
        shira_to_peft(adapter, out, force=True)
    (out / "notes").rmdir()
    models.edit_config(out, peft_type="LORA")
    with pytest.raises(SourceError, match="not a folder that shira_to_peft wrote"):
        shira_to_peft(adapter, out, force=True)
    (small / "empty").mkdir()
    with pytest.raises(SourceError, match="not a folder that shira_to_peft wrote"):
        shira_to_peft(adapter, small / "empty", force=True)


def test_a_folder_that_holds_an_input_is_kept(small: Path) -> None:
    out = small / "out"
    shira_to_peft(tuned(small / "base", small / "a.st", 2, ["wide.weight"]), out)
    (small / "a.st").rename(out / "adapter_model.safetensors")
    with pytest.raises(SourceError, match="and is not replaced"):
        shira_to_peft(out / "adapter_model.safetensors", out, force=True)


def test_a_dry_run_of_the_export(small: Path) -> None:
    adapter = tuned(
        small / "base", small / "a.st", 2, ["wide.weight"], {"head.weight": np.ones((6, 40), np.float32)}
    )
    dry, wet = shira_to_peft(adapter, None), shira_to_peft(adapter, small / "out")
    assert sum(path.stat().st_size for path in (small / "out").iterdir()) == wet.folder_bytes
    wet.folder_bytes = None
    assert dry == wet


def test_choosing_tensors(small: Path) -> None:
    adapter = tuned(small / "base", small / "a.st", 2, ["wide.weight", "square.weight"], {"head.weight": np.ones((6, 40), np.float32)})  # fmt: skip
    report = shira_to_peft(adapter, small / "out", exclude=["square", "head"])
    assert (["wide"], []) == ([tensor.module for tensor in report.tensors], report.modules_to_save)
    assert {f"{WIDE}indices", f"{WIDE}weight"} == tensors(small / "out").keys()


def test_the_model_it_is_for(small: Path) -> None:
    adapter = tuned(
        small / "base", small / "a.st", 2, ["wide.weight"], base_model={"id": "me/base", "revision": "main"}
    )
    shira_to_peft(adapter, small / "out")
    config = json.loads((small / "out" / "adapter_config.json").read_text())
    assert ("me/base", "main") == (config["base_model_name_or_path"], config["revision"])
    assert ShiraConfig(**config).to_dict().keys() - {"peft_version"} == config.keys()


def test_sizes_are_as_told(tmp_path: Path) -> None:
    """Twelve bytes an entry, and a header."""
    base = models.save_base(models.net().bfloat16(), tmp_path / "base", torch.bfloat16)
    shira_to_peft(tuned(base, tmp_path / "a.st", 5, ["wide.weight"]), tmp_path / "out")
    raw = (tmp_path / "out" / WEIGHTS).read_bytes()
    assert 5 * 64 * 12 == len(raw) - 8 - int.from_bytes(raw[:8], "little")


# ---- laws ----


def full_rank(dtype: np.dtype[Any]) -> st.SearchStrategy[SparseTensor]:
    """A tensor that PEFT holds as it is: ``r * (rows + columns)`` targets of any finite bits, with base values."""

    @st.composite
    def make(draw: st.DrawFn) -> SparseTensor:
        shape = draw(st.tuples(st.integers(2, 6), st.integers(2, 6)))
        rank = draw(st.integers(1, max(1, shape[0] * shape[1] // sum(shape))))
        count = rank * sum(shape)
        places = draw(st.permutations(range(shape[0] * shape[1])))[:count]
        values, base = draw(any_bits(dtype, (count,))), draw(any_bits(dtype, (count,)))
        for array in (values, base):
            with np.errstate(invalid="ignore"):  # signalling NaN
                array[~np.isfinite(array.astype(np.float64))] = 1
        return SparseTensor("a.weight", shape, np.sort(np.array(places, np.int64)), values, base=base)

    return make()


def dense(tensor: SparseTensor, at: Array) -> Array:
    weight = np.ones(tensor.numel, tensor.dtype)
    weight[tensor.indices] = at
    return weight


@given(st.data())
def test_the_report_counts_what_a_round_trip_loses(data: st.DataObject) -> None:
    dtype = data.draw(float_dtypes)
    tensor = data.draw(full_rank(dtype))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        save(Adapter([tensor]), path / "a.st")
        before, after = dense(tensor, tensor.base), dense(tensor, tensor.values)
        models.save_arrays(path / "base.safetensors", {"a.weight": before.reshape(tensor.shape)})
        try:
            report = shira_to_peft(path / "a.st", path / "out")
        except SourceError as error:
            assert "is not finite" in str(error)  # a difference beyond float32
            return
        try:
            peft_to_shira(path / "out", path / "base.safetensors", path / "b.st")
        except SourceError as error:
            assert re.search("beyond 1e\\+150|overflows", str(error))
            return
        back = load(path / "b.st")["a.weight"]
        found = before.copy()
        found[back.indices] = back.values
        assert report.tensors[0].inexact == np.count_nonzero(bits_differ(found, after))
        told = [text for text in report.notices if "cannot reproduce" in text]
        assert bool(told) == bool(report.tensors[0].inexact)


@given(st.data())
def test_close_targets_are_exact(data: st.DataObject) -> None:
    """Within a factor of two the difference of two floats is a float (Sterbenz), and so base + delta is the target."""
    dtype = data.draw(float_dtypes)
    tensor = data.draw(full_rank(dtype))
    start = np.where(tensor.base == 0, np.ones(1, dtype), tensor.base)  # nothing but -0.0 added to -0.0 gives -0.0
    wide = start.astype(np.float64)
    close = (wide * np.random.default_rng(data.draw(st.integers(0, 99))).uniform(0.5, 2, wide.size)).astype(dtype)
    ratio = np.divide(close.astype(np.float64), wide, out=np.zeros_like(wide), where=wide != 0)
    target = np.where((ratio >= 0.5) & (ratio <= 2), close, start)
    with tempfile.TemporaryDirectory() as folder:
        save(Adapter([SparseTensor("a.weight", tensor.shape, tensor.indices, target, base=start)]), Path(folder, "a.st"))  # fmt: skip
        assert 0 == shira_to_peft(Path(folder, "a.st"), None).tensors[0].inexact


def test_targets_that_peft_cannot_reach(tmp_path: Path) -> None:
    """1 + fl(1e-8 - 1) is 0 in float32, whatever the base's dtype."""
    for dtype in (np.float32, ml_dtypes.bfloat16):
        base, target = np.ones(5, dtype), np.array([1e-8, 0.5, 2, 0.75, -0.0], dtype)
        base[4] = 0
        save(Adapter([SparseTensor("a.weight", (2, 3), np.arange(5), target, base=base)]), tmp_path / "a.st")
        report = shira_to_peft(tmp_path / "a.st", None)
        assert [2] == [tensor.inexact for tensor in report.tensors]
        assert "PEFT's additive form cannot reproduce 2 of 5 targets bit for bit" in report.notices


@given(st.data())
def test_deltas_in_any_dtype_come_back(data: st.DataObject) -> None:
    """PEFT's file to deltas and back is the same file, for a float32 base and values of float32."""
    dtype = data.draw(st.sampled_from([FLOATS["F32"], FLOATS["BF16"], FLOATS["F16"]]))
    tensor = data.draw(full_rank(np.dtype(np.float32)))
    rank = tensor.nnz // sum(tensor.shape)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        weight = np.ones(tensor.shape, dtype)
        models.save_arrays(path / "base.safetensors", {"a.weight": weight})
        pairs = np.stack(np.divmod(tensor.indices, tensor.shape[1])).astype(np.int32)
        keys = {"base_model.model.a.shira_indices": pairs, "base_model.model.a.shira_weight": tensor.values}
        models.save_arrays(path / "in" / WEIGHTS, keys)
        (path / "in" / "adapter_config.json").write_text(json.dumps({"peft_type": "SHIRA", "r": rank}))
        try:
            peft_to_shira(path / "in", path / "base.safetensors", path / "a.st", values="delta")
        except SourceError as error:
            assert "overflows" in str(error)  # float16
            return
        report = shira_to_peft(path / "a.st", path / "out", base=path / "base.safetensors")
        assert [0] == [t.inexact for t in report.tensors]
        assert models.read_arrays(path / "in") == models.read_arrays(path / "out")


@given(adapters())
def test_any_adapter_is_exported_or_refused(adapter: Adapter) -> None:
    """No adapter makes anything but a report or one of our errors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.st")
        save(adapter, path)
        try:
            shira_to_peft(path, Path(folder, "out"), pad=True)
        except ShiraError:
            assert ["a.st"] == [p.name for p in Path(folder).iterdir()]
