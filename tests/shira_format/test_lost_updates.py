"""An adapter whose stored values do not change the base, since rounding takes the update away, is not written unasked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from shira_cli.convert import main
from shira_format._core.arrays import Array
from shira_format.convert import full_to_shira, lora_to_shira
from shira_format.convert.effect import Effect, refuse_lost
from shira_format.convert.peft_shira import peft_to_shira
from shira_format.convert.resume import partial_folder
from shira_format.errors import SourceError
from shira_format.format import load
from tests.models import save_arrays

BF16 = np.dtype(ml_dtypes.bfloat16)
A, B = "layers.0.q_proj", "layers.1.q_proj"


def base_of(folder: Path, dtype: np.dtype[Any] = BF16, **more: Array) -> Path:
    """Weights of 1, which take no update below 2 ** -8 in bf16."""
    arrays = {f"{module}.weight": np.ones((16, 16), dtype) for module in (A, B)}
    return save_arrays(folder / "model.safetensors", arrays | more)


def lora_of(
    folder: Path, first: float, second: float, config: dict[str, Any] | None = None, **more: Array
) -> Path:
    """Each update is constant."""
    folder.mkdir()
    arrays = {}
    for module, update in ((A, first), (B, second)):
        arrays[f"base_model.model.{module}.lora_A.weight"] = np.ones((1, 16), np.float32)
        arrays[f"base_model.model.{module}.lora_B.weight"] = np.full((16, 1), update, np.float32)
    save_arrays(folder / "adapter_model.safetensors", arrays | more)
    options = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]} | (config or {})
    (folder / "adapter_config.json").write_text(json.dumps(options))
    return folder


def test_it_is_refused_with_both_norms_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, lora, out = base_of(tmp_path / "base"), lora_of(tmp_path / "lora", 1e-3, 5e-3), tmp_path / "out.st"
    arguments = ["lora_to_shira", str(lora), "--base", str(base), "-o", str(out), "--density", "1"]
    for more in ([], ["--dry-run"]):
        assert main([*arguments, *more]) == 1
        error = capsys.readouterr().err
        # 5e-3 is rounded up to 2 ** -7; all of 1e-3 is lost: sqrt(256) * 1e-3
        for words in (str(lora), f"'{A}.weight' (0 of 0.016)", "0.125 of 0.0816", "--exclude", "--force"):
            assert words in error
        assert f"{B}.weight" not in error
    assert list(tmp_path.glob("out*")) == []
    assert main([*arguments, "--force", "--json"]) == 0
    captured = capsys.readouterr()
    assert f"'{A}.weight' (0 of 0.016)" in captured.err
    assert any(f"'{A}.weight' (0 of 0.016)" in words for words in json.loads(captured.out)["warnings"])
    assert {name: load(out)[name].nnz for name in load(out)} == {f"{A}.weight": 0, f"{B}.weight": 256}
    assert main([*arguments, "--force", "--exclude", A]) == 0


def test_tensors_with_little_of_the_update_are_only_named(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    report = lora_to_shira(lora_of(tmp_path / "lora", 1e-3, 0.5), base, tmp_path / "out.st", density=1.0)
    assert any(f"'{A}.weight' (0 of 0.016)" in words for words in report.warnings())


@pytest.mark.parametrize("update", [0.0, 1e-3])
def test_float32_and_updates_of_zero_pass(update: float, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", np.dtype(np.float32) if update else BF16)
    lora_to_shira(lora_of(tmp_path / "lora", 0.0, update), base, tmp_path / "out.st", density=1.0)


def test_codes_whose_scales_are_not_known_as_such(tmp_path: Path) -> None:
    codes = (np.arange(256).reshape(16, 16) + 64).astype(ml_dtypes.float8_e4m3fn)
    base = base_of(
        tmp_path / "base", **{f"{module}.weight": codes for module in (A, B)}, table=np.ones(2, np.float32)
    )
    with pytest.raises(SourceError, match="less than a thousandth.*codes of a quantisation"):
        lora_to_shira(lora_of(tmp_path / "lora", 0.02, 0.01), base, None, density=1.0)


@pytest.mark.parametrize(
    ("update", "extra", "lost", "refused"),
    [(0.5, 0.5, False, False), (0.5, 1e-3, True, False), (0.005, 3e-3, True, True)],
)
def test_additions_to_biases(update: float, extra: float, lost: bool, refused: bool, tmp_path: Path) -> None:
    bias = f"{B}.bias"
    base = base_of(tmp_path / "base", **{f"{module}.bias": np.ones(16, BF16) for module in (A, B)})
    lora = lora_of(
        tmp_path / "lora", update, update, {"lora_bias": True},
        **{f"base_model.model.{B}.lora_B.bias": np.full(16, extra, np.float32)},
        **{f"base_model.model.{A}.lora_B.bias": np.zeros(16, np.float32)},
    )  # fmt: skip
    report = lora_to_shira(lora, base, None, density=1.0, force=True)
    effect = next(effect for effect in report.effects if effect.name == bias)
    assert math.isclose(effect.asked, 16 * extra**2, rel_tol=1e-5)
    assert math.isclose(effect.moved, 0 if lost else 16 * extra**2, rel_tol=1e-5)
    assert any(bias in words for words in report.warnings()) == lost
    if refused:
        with pytest.raises(SourceError, match=bias):
            lora_to_shira(lora, base, None, density=1.0)
    else:
        lora_to_shira(lora, base, None, density=1.0)


def test_a_fine_tune_of_the_base_s_dtype_is_never_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    tuned = save_arrays(
        tmp_path / "tuned" / "model.safetensors",
        {f"{A}.weight": np.ones((16, 16), BF16), f"{B}.weight": np.full((16, 16), 1 + 2**-7, BF16)},
    )
    full_to_shira(tuned, base, tmp_path / "out.st", top_k=1)
    wide = save_arrays(
        tmp_path / "wide" / "model.safetensors",
        {f"{m}.weight": np.full((16, 16), 1.001, np.float32) for m in (A, B)},
    )
    with pytest.raises(SourceError, match=rf"wide.*{A}.weight"):
        full_to_shira(wide, base, tmp_path / "other.st", top_k=3)
    assert not (tmp_path / "other.st").exists()
    full_to_shira(wide, base, tmp_path / "other.st", top_k=3, force=True)


def test_sparse_adapters_of_peft(tmp_path: Path) -> None:
    folder, out = tmp_path / "shira", tmp_path / "out.st"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "SHIRA", "r": 1}))
    key = f"base_model.model.{A}.shira_"
    flat = np.arange(32)
    save_arrays(
        folder / "adapter_model.safetensors",
        {f"{key}indices": np.stack([flat // 16, flat % 16]).astype(np.int32), f"{key}weight": np.full(32, 1e-3, np.float32)},
    )  # fmt: skip
    base = base_of(tmp_path / "base")
    arguments = ["peft_to_shira", str(folder), "--base", str(base), "-o", str(out)]
    assert main(arguments) == 1
    assert not out.exists()
    peft_to_shira(folder, base, None, values="delta")  # keeps what was asked for
    assert main([*arguments, "--force"]) == 0


def test_parts_that_are_kept_for_resuming_serve_once_it_is_forced(tmp_path: Path) -> None:
    base, lora, out = base_of(tmp_path / "base"), lora_of(tmp_path / "lora", 1e-3, 1e-3), tmp_path / "out.st"
    for _ in range(2):  # the second time from the parts
        with pytest.raises(SourceError, match="less than a thousandth"):
            lora_to_shira(lora, base, out, resume=True)
        assert partial_folder(out).is_dir()
    lora_to_shira(lora, base, out, resume=True, force=True)
    assert out.exists() and not partial_folder(out).exists()


def test_the_rule() -> None:
    refuse_lost([])
    refuse_lost([Effect("a", 0.0, 0.0)])
    refuse_lost([Effect("a", 1.0, 1.1e-6), Effect("b", math.inf, math.inf), Effect("c", math.nan, 0.0)])
    for effects in ([Effect("a", 1.0, 0.9e-6)], [Effect("a", 0.02, 0.0), Effect("b", 1.0, 1.0)]):
        with pytest.raises(SourceError, match="'a'"):
            refuse_lost(effects)
    refuse_lost([Effect("a", 0.009, 0.0), Effect("b", 1.0, 1.0)])
