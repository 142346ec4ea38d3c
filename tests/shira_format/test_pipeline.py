"""Conversion and application: what is stored, what is reported, what is refused; on tiny models and the real MiniLM."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

import shira_format
from shira_format._core.arrays import Array, as_array
from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.errors import BaseMismatch, SourceError
from shira_format.live import apply
from shira_format.lora import open_lora
from shira_format.tensors import same_bits
from tests import models

LORA = {"r": 3, "lora_alpha": 5, "target_modules": ["wide", "square", "head"]}


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    base = models.save_base(models.net(), tmp_path / "base", getattr(torch, request.param))
    return base, models.save_lora(models.random_lora(models.net(), **LORA), tmp_path / "lora")


def dense(base: Path, lora: Path) -> dict[str, tuple[Array, Array]]:
    """Base and update of each adapted weight, whole."""
    checkpoint = open_checkpoint(base)
    found = {}
    for update in open_lora(lora, checkpoint).updates:
        delta = np.empty(update.shape, update.dtype)
        update.tile(0, update.shape[0], delta)
        found[update.name] = checkpoint[update.name], delta
    return found


@pytest.mark.parametrize("self_contained", [False, True])
@pytest.mark.parametrize("density", [0.01, 0.2, 1.0])
def test_targets_are_base_plus_update_rounded_once(
    pair: tuple[Path, Path], density: float, self_contained: bool, tmp_path: Path
) -> None:
    out = tmp_path / "out.st"
    report = lora_to_shira(pair[1], pair[0], out, density=density, self_contained=self_contained)
    adapter = shira_format.load(out)
    lost = kept = whole = 0.0
    for name, (weight, delta) in dense(*pair).items():
        flat, changes = weight.reshape(-1), delta.reshape(-1)
        k = max(1, round(density * changes.size))
        chosen = np.sort(np.argsort(-np.abs(changes), kind="stable")[:k])
        target = (flat[chosen].astype(np.float32) + changes[chosen]).astype(weight.dtype)
        moved = np.array([a.tobytes() != b.tobytes() for a, b in zip(flat[chosen], target, strict=True)], bool)
        tensor = adapter[name]
        assert np.array_equal(chosen[moved], tensor.indices)
        assert same_bits(target[moved], tensor.values)
        assert (tensor.base is not None) == self_contained
        stored = np.zeros(changes.size)
        stored[chosen[moved]] = target[moved].astype(np.float64) - flat[chosen[moved]].astype(np.float64)
        lost += np.sum((changes.astype(np.float64) - stored) ** 2)
        kept += np.sum(changes[chosen[moved]].astype(np.float64) ** 2)
        whole += np.sum(changes.astype(np.float64) ** 2)
    assert report.energy_kept == pytest.approx(kept / whole, rel=1e-4)
    assert report.relative_error == pytest.approx(np.sqrt(lost / whole), rel=1e-3, abs=1e-5)
    assert report.nnz == sum(tensor.nnz for tensor in adapter.values())
    assert adapter.manifest["selection"]["energy_kept"] == pytest.approx(report.energy_kept, rel=1e-5)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_the_bytes_do_not_depend_on_the_threads(scope: str, tmp_path: Path) -> None:
    files = []
    for threads in (1, 2, 5):
        out = tmp_path / f"{threads}.st"
        lora_to_shira(models.LORAS / "spam", models.minilm(), out, density=0.01, scope=scope, threads=threads)
        files.append(out.read_bytes())
    assert files[0] == files[1] == files[2]


def test_provenance_is_in_the_manifest(tmp_path: Path) -> None:
    out = tmp_path / "spam.st"
    lora_to_shira(models.LORAS / "spam", models.minilm(), out, top_k=500, exclude=["intermediate"])
    manifest = shira_format.load(out).manifest
    assert "sentence-transformers/all-MiniLM-L6-v2" == manifest["base_model"]["id"]
    assert ("lora", "peft", 8) == tuple(manifest["source"][key] for key in ("kind", "dialect", "r"))
    assert ("top-k", "tensor", 500, ["intermediate"]) == tuple(
        manifest["selection"][key] for key in ("rule", "scope", "top_k", "exclude")
    )
    assert {"classifier.weight", "classifier.bias"} == set(shira_format.load(out).dense)
    assert all("intermediate" not in name for name in shira_format.load(out))


def test_little_energy_is_said_in_words(tmp_path: Path) -> None:
    report = lora_to_shira(models.LORAS / "spam", models.minilm(), None, density=0.01)
    assert report.file_bytes is None
    assert "only 14.0% of the update's energy is kept" in report.warnings()[0]
    assert [] == lora_to_shira(models.LORAS / "spam", models.minilm(), None, density=1.0).warnings()


def test_a_refused_conversion_writes_nothing(tmp_path: Path) -> None:
    base = models.save_base(models.net(), tmp_path / "base")
    lora = models.save_lora(models.random_lora(models.net(), **LORA), tmp_path / "lora")
    models.edit_weights(lora, lambda state: {k: v * 1e30 for k, v in state.items()})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SourceError, match=r"'(wide|square|head)\.weight'"):
        lora_to_shira(lora, base, tmp_path / "out.st")
    assert before == sorted(tmp_path.rglob("*"))


def test_an_overflow_of_the_base_dtype_is_refused(tmp_path: Path) -> None:
    base = models.save_base(models.net(), tmp_path / "base", torch.float16)
    lora = models.save_lora(models.random_lora(models.net(), **LORA), tmp_path / "lora")
    models.edit_config(lora, lora_alpha=1e9)
    with pytest.raises(SourceError, match="overflows F16"):
        lora_to_shira(lora, base, tmp_path / "out.st")


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    lora = models.save_lora(models.random_lora(models.net(), **LORA), tmp_path / "lora")
    state = {name: tensor.to(torch.int8) for name, tensor in models.net().state_dict().items()}
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base" / "model.safetensors")
    with pytest.raises(SourceError, match="int8, not a float dtype"):
        lora_to_shira(lora, tmp_path / "base", tmp_path / "out.st")


def test_a_regex_that_leaves_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no adapted weight is left"):
        lora_to_shira(pair[1], pair[0], tmp_path / "out.st", include=["nowhere"])
    with pytest.raises(SourceError, match="not a regular expression"):
        lora_to_shira(pair[1], pair[0], tmp_path / "out.st", include=["("])


# --- checkpoints ---


def sharded(folder: Path) -> Path:
    """Two shards and their index."""
    folder.mkdir()
    save_numpy({"a": np.arange(6, dtype=np.float32)}, folder / "m-1.safetensors")
    save_numpy({"b": np.ones((2, 3), np.float16)}, folder / "m-2.safetensors")
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "base")
    for path in (folder, folder / "model.safetensors.index.json"):
        checkpoint = open_checkpoint(path)
        assert ["a", "b"] == list(checkpoint)
        assert ((2, 3), np.float16) == (checkpoint.shape("b"), checkpoint.dtype("b"))
        assert np.array_equal(np.arange(6, dtype=np.float32), checkpoint["a"])


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"a": "../m-1.safetensors"}, "not a file name"),
        ({"a": "m-3.safetensors"}, "missing"),
        ({"a": "m-2.safetensors"}, "which does not have it"),
        ([], "not an object"),
    ],
)
def test_an_index_that_lies(weight_map: object, reason: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "base")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(SourceError, match=reason):
        open_checkpoint(folder)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(SourceError, match="not a checkpoint of a supported layout"):
        open_checkpoint(tmp_path)
    for name in ("a", "b"):
        save_numpy({"x": np.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(SourceError, match="several checkpoints"):
        open_checkpoint(tmp_path)


# --- application ---


def converted(tmp_path: Path, dtype: torch.dtype) -> tuple[shira_format.Adapter, dict[str, torch.Tensor]]:
    base = models.save_base(models.net(), tmp_path / "base", dtype)
    lora = models.save_lora(models.random_lora(models.net(), **LORA), tmp_path / "lora")
    lora_to_shira(lora, base, tmp_path / "a.st", density=0.1)
    return shira_format.load(tmp_path / "a.st"), dict(models.net().to(dtype).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, -2.0])
def test_apply_and_revert(dtype: torch.dtype, alpha: float, tmp_path: Path) -> None:
    adapter, weights = converted(tmp_path, dtype)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    applied = apply(adapter, weights, alpha)
    for name, tensor in adapter.items():
        work = np.float64 if dtype == torch.float64 else np.float32
        b, t = as_array(before[name]).reshape(-1)[tensor.indices], tensor.values
        step = work(alpha) * (t.astype(work) - b.astype(work))
        expected = t if alpha == 1 else (b.astype(work) + step).astype(t.dtype)
        assert same_bits(expected, as_array(weights[name]).reshape(-1)[tensor.indices])
        rest = np.delete(np.arange(tensor.numel), tensor.indices)
        assert torch.equal(before[name].reshape(-1)[rest], weights[name].reshape(-1)[rest])
    applied.revert()
    applied.revert()
    assert all(torch.equal(before[name], weights[name]) for name in before)


def test_the_wrong_base_is_refused_before_a_weight_changes(tmp_path: Path) -> None:
    adapter, weights = converted(tmp_path, torch.float32)
    last = list(adapter)[-1]
    with torch.no_grad():
        weights[last].view(-1)[int(adapter[last].indices[0])] += 1
    before = {name: tensor.clone() for name, tensor in weights.items()}
    with pytest.raises(BaseMismatch, match=last):
        apply(adapter, weights)
    assert all(torch.equal(before[name], weights[name]) for name in before)
    del weights[last]
    with pytest.raises(BaseMismatch, match=f"has no '{last}'"):
        apply(adapter, weights)


def test_weights_that_are_not_contiguous_and_read_only(tmp_path: Path) -> None:
    base = np.zeros((4, 3), ml_dtypes.bfloat16)
    tensor = shira_format.SparseTensor("w", (4, 3), [1, 11], np.array([1, 2], base.dtype), base=base.ravel()[:2])
    adapter = shira_format.Adapter([tensor])
    strided = np.zeros((3, 4), base.dtype).T
    applied = apply(adapter, {"w": strided})
    assert [0, 1, 0, 2] == [float(strided[i]) for i in ((0, 0), (0, 1), (3, 1), (3, 2))]
    applied.revert()
    assert not strided.any()
    base.flags.writeable = False
    with pytest.raises(BaseMismatch, match="read-only"):
        apply(adapter, {"w": base})


def test_whole_tensors_replace_and_are_new() -> None:
    old = np.arange(3, dtype=np.float32)
    adapter = shira_format.Adapter(
        dense=[shira_format.DenseTensor("bias", old + 1, base=old), shira_format.DenseTensor("head", old * 2)]
    )
    weights = {"bias": old.copy()}
    applied = apply(adapter, weights)
    assert np.array_equal(old + 1, weights["bias"])
    assert np.array_equal(old * 2, weights["head"])
    applied.revert()
    assert np.array_equal(old, weights["bias"])
    assert {"bias"} == set(weights)
    with pytest.raises(BaseMismatch, match="another tensor"):
        apply(adapter, {"bias": old + 5})
