"""Corners of the conversion: biases and heads, odd dtypes, updates of nothing, and failures that must leave no trace."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shira_format._core.arrays import array_digest, as_array
from shira_format.checkpoints import open_checkpoint
from shira_format.convert.lora import LoraConversion, lora_inputs, lora_to_shira
from shira_format.convert.pipeline import convert
from shira_format.errors import ShiraError, SourceError
from shira_format.format import load
from shira_format.lora import Lora, LowRank, open_lora
from shira_format.selection import TopK
from shira_format.tensors import same_bits
from tests import models

WIDE = {"r": 3, "lora_alpha": 5, "target_modules": ["wide"]}


def saved(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Path, Path]:
    """The folders of a LoRA and of its base."""
    base = models.save_base(models.net(), folder / "base", dtype)
    return models.save_lora(models.random_lora(models.net(), **WIDE | options), folder / "lora"), base


def update_of(lora: Path, base: Path, name: str) -> torch.Tensor:
    update = next(u for u in open_lora(lora, open_checkpoint(base)).updates if u.name == name)
    out = np.empty(update.shape, update.dtype)
    update.tile(0, update.shape[0], out)
    return torch.from_numpy(out)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64])
def test_torch_rounds_to_the_same_targets(dtype: torch.dtype, tmp_path: Path) -> None:
    lora, base = saved(tmp_path, dtype)
    lora_to_shira(lora, base, tmp_path / "a.st", density=1.0)
    weight = load_file(base / "model.safetensors")["wide.weight"]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (weight.to(work) + update_of(lora, base, "wide.weight")).to(dtype)
    tensor = load(tmp_path / "a.st")["wide.weight"]
    actual = as_array(weight).copy()
    actual.flat[tensor.indices] = tensor.values
    assert same_bits(as_array(expected), actual)
    moved = (
        (as_array(weight).view(np.uint8) != as_array(expected).view(np.uint8)).reshape(weight.numel(), -1).any(1)
    )
    assert np.array_equal(
        np.flatnonzero(moved), tensor.indices
    )  # entries that keep the bits of the base are absent


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_trained_biases_of_a_lora_are_added_once(dtype: torch.dtype, tmp_path: Path) -> None:
    lora, base = saved(tmp_path, dtype, lora_bias=True)
    report = lora_to_shira(lora, base, tmp_path / "a.st", self_contained=True)
    bias = load_file(lora / "adapter_model.safetensors")["base_model.model.wide.lora_B.bias"]
    before = load_file(base / "model.safetensors")["wide.bias"]
    whole = load(tmp_path / "a.st").dense["wide.bias"]
    assert ["wide.bias"] == report.whole
    assert same_bits(as_array((before.float() + bias * np.float32(5 / 3)).to(dtype)), whole.values)
    assert whole.base is not None
    assert same_bits(as_array(before), whole.base)


def test_replaced_and_new_tensors(tmp_path: Path) -> None:
    lora, base = saved(tmp_path, torch.bfloat16, modules_to_save=["head"])
    state = load_file(base / "model.safetensors")
    head = load_file(lora / "adapter_model.safetensors")["base_model.model.head.weight"]
    for number, known in enumerate((True, False)):
        if not known:
            save_file({n: t for n, t in state.items() if n != "head.weight"}, base / "model.safetensors")
        report = lora_to_shira(lora, base, tmp_path / f"{number}.st")
        whole = load(tmp_path / f"{number}.st").dense["head.weight"]
        assert ["head.weight"] == report.whole
        # In the base's dtype if the base has the tensor, else as it came.
        assert same_bits(as_array(head.bfloat16() if known else head), whole.values)
        assert (array_digest(as_array(state["head.weight"])) if known else None) == whole.base_digest
        notice = "tensor 'head.weight' is not in the base: stored whole, as a new tensor"
        assert known == (notice not in report.notices)


def test_filters_apply_to_replaced_tensors_too(tmp_path: Path) -> None:
    lora, base = saved(tmp_path, modules_to_save=["head"], target_modules=["wide", "square"])
    report = lora_to_shira(lora, base, tmp_path / "a.st", include=["wide", "square"], exclude=[r"^square\."])
    assert (["wide.weight"], []) == ([t.name for t in report.tensors], report.whole)
    selection = load(tmp_path / "a.st").manifest["selection"]
    assert (["wide", "square"], [r"^square\."]) == (selection["include"], selection["exclude"])


def test_the_manifest_names_files_by_digest_and_no_paths(tmp_path: Path) -> None:
    lora, base = saved(tmp_path)
    lora_to_shira(lora, base, tmp_path / "a.st", density=0.25, scope="global")
    manifest = load(tmp_path / "a.st").manifest
    assert str(tmp_path) not in json.dumps(manifest)
    assert [
        {"name": name, "digest": hashlib.sha256((lora / name).read_bytes()).hexdigest()}
        for name in ("adapter_model.safetensors", "adapter_config.json")
    ] == manifest["source"]["files"]
    assert [{"name": "model.safetensors"}] == manifest["base_model"]["files"]
    assert ("top-k", "global", 0.25) == tuple(manifest["selection"][key] for key in ("rule", "scope", "density"))


@pytest.mark.parametrize("self_contained", [False, True])
def test_the_same_input_gives_the_same_bytes(self_contained: bool, tmp_path: Path) -> None:
    lora, base = saved(tmp_path, target_modules=["wide", "square", "head"], modules_to_save=["head"], bias="all")
    files = []
    for number in range(2):
        lora_to_shira(lora, base, tmp_path / f"{number}.st", self_contained=self_contained, threads=number + 1)
        files.append((tmp_path / f"{number}.st").read_bytes())
    assert files[0] == files[1]


def test_an_update_of_nothing(tmp_path: Path) -> None:
    lora, base = saved(tmp_path)
    models.edit_weights(lora, lambda state: {n: 0 * t for n, t in state.items()})
    report = lora_to_shira(lora, base, tmp_path / "a.st")
    assert (0, 1.0, 0.0) == (report.nnz, report.energy_kept, report.relative_error)
    expected = (
        "1 of 1 tensors keep no entry at all, for example 'wide.weight': "
        "their updates are zero, or none of their entries was selected"
    )
    assert [expected] == report.warnings()
    assert 0 == load(tmp_path / "a.st")["wide.weight"].nnz


def test_an_update_that_the_base_cannot_show(tmp_path: Path) -> None:
    lora, base = saved(tmp_path, torch.bfloat16)
    state = load_file(base / "model.safetensors")
    save_file({n: torch.ones_like(t) for n, t in state.items()}, base / "model.safetensors")
    models.edit_weights(lora, lambda state: {n: t / 1000 for n, t in state.items()})
    with pytest.raises(SourceError, match="less than a thousandth"):
        lora_to_shira(lora, base, tmp_path / "a.st", density=1.0)
    report = lora_to_shira(lora, base, tmp_path / "a.st", density=1.0, force=True)
    assert (0, 0.0) == (report.nnz, report.energy_kept)
    assert 1.0 == pytest.approx(report.relative_error)
    assert 2 == len(report.warnings())


FAILURES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "overflow": (
        {"lora_alpha": 1e7},
        torch.float16,
        r"tensor 'wide\.weight': base \+ update overflows F16 at flat index",
    ),
    "update": (
        {"lora_alpha": 1e300},
        torch.float32,
        r"the update of tensor 'wide\.weight' holds NaN or Inf, or overflows",
    ),
    "head": (
        {"modules_to_save": ["head"]},
        torch.float16,
        r"tensor 'head\.weight' does not fit the base's dtype F16",
    ),
}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_leaves_everything_as_it_was(case: str, exists: bool, tmp_path: Path) -> None:
    options, dtype, reason = FAILURES[case]
    lora, base = saved(tmp_path, dtype, **options)
    if case == "head":
        key = "base_model.model.head.weight"
        models.edit_weights(lora, lambda state: state | {key: state[key] + 1e6})
    out = tmp_path / "out" / "a.st"
    out.parent.mkdir()
    if exists:
        out.write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SourceError, match=f"^{lora / 'adapter_model.safetensors'}: {reason}"):
        lora_to_shira(lora, base, out)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("when", ["select", "fsync", "replace"])
def test_an_interrupt_leaves_everything_as_it_was(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, base = saved(tmp_path)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    where = {"select": "shira_format.convert.pipeline.sparse_target", "fsync": "os.fsync", "replace": "os.replace"}
    monkeypatch.setattr(where[when], stop)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        lora_to_shira(lora, base, tmp_path / "a.st")
    assert before == sorted(tmp_path.rglob("*"))


def test_tensors_that_are_named_twice(tmp_path: Path) -> None:
    _, base = saved(tmp_path)
    checkpoint = open_checkpoint(base)
    one = LowRank("wide.weight", (40, 24), np.ones((40, 1), np.float32), np.ones((1, 24), np.float32))
    bias = np.ones(40, np.float32)
    for source, reason in (
        (Lora([one, one]), "two updates of tensor 'wide.weight'"),
        (
            Lora([one], {"wide.bias": bias}, {"wide.bias": bias}),
            "tensor 'wide.bias' is both replaced and added to",
        ),
        (Lora([one], {"wide.weight": bias}), "'wide.weight'"),
    ):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ShiraError, match=reason):
            conversion = LoraConversion("unused", str(base))
            convert(conversion, tmp_path / "a.st", rule=TopK(), inputs=lora_inputs(source, checkpoint))
        assert before == sorted(tmp_path.iterdir())


def test_a_top_k_beyond_the_tensor_keeps_all(tmp_path: Path) -> None:
    lora, base = saved(tmp_path)
    report = lora_to_shira(lora, base, tmp_path / "a.st", top_k=10**9)
    full = lora_to_shira(lora, base, None, density=1.0)
    assert (full.nnz, full.energy_kept) == (report.nnz, report.energy_kept)
    assert (tmp_path / "a.st").stat().st_size == report.file_bytes
