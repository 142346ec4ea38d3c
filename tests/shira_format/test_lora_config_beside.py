"""PEFT's configuration beside a LoRA of another dialect: used, or refused, never dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shira_format._core.arrays import Array
from shira_format.checkpoints import open_checkpoint
from shira_format.errors import SourceError
from shira_format.lora import open_lora
from tests.models import save_arrays

T = "blocks.0.attn.to_q"
A = np.arange(32, dtype=np.float32).reshape(4, 8) / 8
B = np.arange(32, dtype=np.float32).reshape(8, 4) / 4


def saved(folder: Path, file: str, tensors: dict[str, Array], **config: Any) -> tuple[Path, Path]:
    save_arrays(folder / file, tensors)
    options = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config
    (folder / "adapter_config.json").write_text(json.dumps(options))
    return folder, save_arrays(
        folder / "base" / "model.safetensors", {f"{T}.weight": np.zeros((8, 8), np.float32)}
    )


def update(folder: Path, base: Path, dialect: str | None = None) -> Array:
    (found,) = open_lora(folder, open_checkpoint(base), dialect=dialect).updates
    out = np.empty((8, 8), found.dtype)
    found.tile(0, 8, out)
    return out


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors", "any.safetensors"]
)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer."])
@pytest.mark.parametrize(("config", "scale"), [
    ({}, 2.0), ({"use_rslora": True}, 4.0), ({"alpha_pattern": {"to_q": 2}}, 0.5),
    ({"r": 16, "rank_pattern": {"attn.to_q": 4}}, 2.0),
])  # fmt: skip
def test_its_scale_is_used(prefix: str, file: str, config: dict[str, Any], scale: float, tmp_path: Path) -> None:
    tensors = {f"{prefix}{T}.lora_A.weight": A, f"{prefix}{T}.lora_B.weight": B}
    folder, base = saved(tmp_path, file, tensors, **config)
    expected = scale * B.astype(np.float64) @ A
    assert np.array_equal(expected, update(folder, base))
    assert np.array_equal(expected, update(folder / file, base))


def test_a_wrong_rank_or_an_alpha_as_well_is_refused(tmp_path: Path) -> None:
    tensors = {f"transformer.{T}.lora_A.weight": A, f"transformer.{T}.lora_B.weight": B}
    file = "pytorch_lora_weights.safetensors"
    with pytest.raises(SourceError, match="rank 8"):
        update(*saved(tmp_path / "rank", file, tensors, r=8))
    alpha = {f"transformer.{T}.alpha": np.ones((), np.float32)}
    with pytest.raises(SourceError, match="adapter_config.json") as caught:
        update(*saved(tmp_path / "alpha", file, tensors | alpha))
    assert file in str(caught.value)


@pytest.mark.parametrize("file", ["kohya.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("name", ["lora_unet_" + T.replace(".", "_"), f"transformer.{T}"])
def test_a_dialect_that_has_no_use_for_it_refuses_it(name: str, file: str, tmp_path: Path) -> None:
    tensors = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
    folder, base = saved(tmp_path, file, tensors)
    with pytest.raises(SourceError, match=rf"{file} and .*adapter_config.json: a LoRA of kohya has no such"):
        update(folder, base)
