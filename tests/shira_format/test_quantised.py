"""Quantised weights with scales beside: refused by name, whatever the scheme."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from shira_analysis.measures.adapter import measure
from shira_cli.convert import main
from shira_format._core.arrays import Array
from shira_format.checkpoints import open_checkpoint
from shira_format.checkpoints.quantised import SCHEMES as SCHEMES_OF_PROGRAMS
from shira_format.checkpoints.quantised import any_quantised, find_quantised
from shira_format.convert import full_to_shira, lora_to_shira
from shira_format.convert.peft_shira import peft_to_shira
from shira_format.errors import SourceError
from tests.models import save_arrays

X = "layers.0.q_proj"
OTHER = {"layers.0.up_proj.weight": np.ones((16, 16), np.float32)}
FP8 = np.arange(256).reshape(16, 16).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
ONE = np.ones((), np.float32)
U8 = np.zeros((128, 1), np.uint8)
I32 = np.zeros((2, 16), np.int32)
SCHEMES: dict[str, tuple[str, dict[str, Array]]] = {
    "block": ("block scales", {f"{X}.weight": FP8, f"{X}.weight_scale_inv": np.ones((2, 2), np.float32)}),
    "scale": ("codes with scales", {f"{X}.weight": FP8, f"{X}.weight_scale": ONE}),
    "comfy": ("ComfyUI", {f"{X}.weight": FP8, f"{X}.scale_weight": ONE}),
    "comfy-input": ("ComfyUI", {f"{X}.weight": FP8, f"{X}.scale_input": ONE}),
    "nf4": ("bitsandbytes 4-bit", {f"{X}.weight": U8, f"{X}.weight.absmax": np.ones(4, np.float32)}),
    "nf4-state": ("bitsandbytes 4-bit", {f"{X}.weight": U8, f"{X}.weight.quant_state.bitsandbytes__nf4": np.zeros(9, np.uint8)}),
    "int8": ("bitsandbytes 8-bit", {f"{X}.weight": np.ones((16, 16), np.int8), f"{X}.SCB": np.ones(16, np.float32)}),
    "gptq": ("GPTQ or AWQ", {f"{X}.qweight": I32, f"{X}.qzeros": I32, f"{X}.scales": np.ones((1, 16), np.float16), f"{X}.g_idx": np.zeros(16, np.int32)}),
    "compressed": ("compressed-tensors", {f"{X}.weight_packed": I32, f"{X}.weight_scale": np.ones((16, 1), np.float32)}),
    "nvfp4": ("NVFP4", {f"{X}.weight": U8, f"{X}.weight_scale": FP8, f"{X}.weight_scale_2": ONE}),
    "mlx": ("MLX", {f"{X}.weight": I32.astype(np.uint32), f"{X}.scales": np.ones((16, 1), np.float16)}),
}  # fmt: skip
EVERY = pytest.mark.parametrize("scheme", SCHEMES)


def save_lora(folder: Path) -> Path:
    folder.mkdir()
    save_arrays(
        folder / "adapter_model.safetensors",
        {
            f"base_model.model.{X}.lora_A.weight": np.ones((2, 16), np.float32),
            f"base_model.model.{X}.lora_B.weight": np.ones((16, 2), np.float32),
        },
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def save(folder: Path, arrays: dict[str, Array], config: Any = None) -> Path:
    path = save_arrays(folder / "model.safetensors", arrays | OTHER)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return path


@EVERY
def test_lora_to_shira_refuses_it(scheme: str, tmp_path: Path) -> None:
    name, arrays = SCHEMES[scheme]
    base = save(tmp_path / "base", arrays)
    with pytest.raises(SourceError) as caught:
        lora_to_shira(save_lora(tmp_path / "lora"), base, tmp_path / "out.st", density=1.0)
    for words in (str(base), name, X, "unquantised", *list(arrays)[:1]):
        assert words in str(caught.value)
    assert any(repr(other) in str(caught.value) for other in list(arrays)[1:])
    assert not (tmp_path / "out.st").exists()


@EVERY
def test_full_to_shira_refuses_it_but_for_exact_patches(scheme: str, tmp_path: Path) -> None:
    name, arrays = SCHEMES[scheme]
    base = save(tmp_path / "base", arrays)
    changed = {key: array + array.dtype.type(1) for key, array in arrays.items()}
    tuned = save(tmp_path / "tuned", changed)
    plain = save(tmp_path / "plain", {f"{X}.weight": np.eye(16, dtype=np.float32)})
    for pair in ((tuned, base), (plain, base), (tuned, plain)):
        with pytest.raises(SourceError, match=name):
            full_to_shira(*pair, tmp_path / "out.st", density=1.0)
    full_to_shira(tuned, base, tmp_path / "out.st", exact=True)
    if next(iter(arrays)) == f"{X}.weight" and arrays[f"{X}.weight"] is FP8:
        full_to_shira(tuned, base, None, density=1.0, include=["up_proj"])


@pytest.mark.parametrize("scheme", ["block", "scale", "comfy"])
def test_measures_refuse_it(scheme: str, tmp_path: Path) -> None:
    name, arrays = SCHEMES[scheme]
    base = save(tmp_path / "base", arrays)
    codes = FP8.copy()
    codes[0, 0] = 7
    tuned = save(tmp_path / "tuned", arrays | {f"{X}.weight": codes})
    full_to_shira(tuned, base, tmp_path / "a.st", exact=True)
    with pytest.raises(SourceError, match=name):
        measure(tmp_path / "a.st", base)


@EVERY
def test_check_merge_cannot_tell(scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, arrays = SCHEMES[scheme]
    plain = save(tmp_path / "plain", {f"{X}.weight": np.eye(16, dtype=np.float32)})
    quantised = save(tmp_path / "quantised", arrays)
    requantised = save(tmp_path / "more", {key: array + array.dtype.type(1) for key, array in arrays.items()})
    lora = ["check_merge", "--lora", str(save_lora(tmp_path / "lora"))]
    assert 3 == main([*lora, "--base", str(plain), "--merged", str(quantised)])
    assert name in capsys.readouterr().out
    # A LoRA cannot be read onto packed weights: their shapes are unknown.
    assert main([*lora, "--base", str(quantised), "--merged", str(requantised)]) in (2, 3)
    assert name in "".join(capsys.readouterr())


def test_plain_weights_are_not_quantised(tmp_path: Path) -> None:
    arrays = {
        "a.weight": FP8, "b.weight": np.ones((4, 4), np.float32), "b.weight_scale": ONE, "b.scales": ONE,
        "ids": np.arange(4), "c.scales": ONE, "d.scale": ONE,
    }  # fmt: skip
    assert any_quantised(open_checkpoint(save(tmp_path / "m", arrays, {"model_type": "llama"}))) is None
    lora_to_shira(save_lora(tmp_path / "lora"), save(tmp_path / "fp8", {f"{X}.weight": FP8}), None)


def test_a_configuration_that_says_so(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "fp8"}}
    found = find_quantised(open_checkpoint(save(tmp_path / "m", {f"{X}.weight": FP8}, config)), f"{X}.weight")
    assert found is not None
    assert "fp8 (quantization_config)" in str(found)
    assert "config.json" in str(found)
    assert find_quantised(open_checkpoint(tmp_path / "m"), "layers.0.up_proj.weight") is None


def test_three_dimensional_experts(tmp_path: Path) -> None:
    arrays = {
        "experts.gate_up_proj": np.ones((2, 4, 4), FP8.dtype), "experts.gate_up_proj_scale_inv": ONE,
        "experts.down_proj_blocks": U8, "experts.down_proj_scales": U8,
    }  # fmt: skip
    checkpoint = open_checkpoint(save(tmp_path / "m", arrays))
    found = find_quantised(checkpoint, "experts.gate_up_proj")
    assert found is not None and "block scales" in found.scheme.name
    found = find_quantised(checkpoint, "experts.down_proj")
    assert found is not None and found.scheme.name == "MXFP4"


def test_the_guide_has_the_table() -> None:
    place = Path(__file__).parents[2] / "docs"
    spec = importlib.util.spec_from_file_location("hooks", place / "hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    assert "<!-- quantised -->" in (place / "guides" / "refused.md").read_text("utf-8")
    rows = hooks.quantised().splitlines()[2:]
    assert len(rows) == len(SCHEMES_OF_PROGRAMS)
    for row, scheme in zip(rows, SCHEMES_OF_PROGRAMS, strict=True):
        assert all(words in row.replace("\\", "") for words in (scheme.name, scheme.codes, *scheme.beside, scheme.way_out))  # fmt: skip


@EVERY
def test_peft_to_shira_refuses_it(scheme: str, tmp_path: Path) -> None:
    name, arrays = SCHEMES[scheme]
    folder, flat = tmp_path / "shira", np.arange(32)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "SHIRA", "r": 1}))
    key = f"base_model.model.{X}.shira_"
    state = {f"{key}indices": np.stack([flat // 16, flat % 16]).astype(np.int32), f"{key}weight": np.ones(32, np.float32)}  # fmt: skip
    save_arrays(folder / "adapter_model.safetensors", state)
    base = save(tmp_path / "base", arrays)
    with pytest.raises(SourceError, match=name):
        peft_to_shira(folder, base, tmp_path / "out.st")
    assert (
        main(["peft_to_shira", str(folder), "--base", str(base), "-o", str(tmp_path / "out.st"), "--force"]) == 1
    )
    assert not (tmp_path / "out.st").exists()
