"""Fits of a diffusers denoiser, whose inputs the caller gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shira_format
from shira_format.convert.fit import outputs
from shira_format.convert.fit.distill import Distillation
from shira_format.convert.fit.live import LiveModel
from shira_format.convert.fit.run import FitOptions, fit_lora
from shira_format.live import Switcher

diffusers = pytest.importorskip("diffusers")


def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(4, 8), norm_num_groups=2,
        cross_attention_dim=8, attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        {
            "sample": torch.randn(2, 4, 8, 8, generator=draw),
            "timestep": torch.randint(0, 1000, (2,), generator=draw),
            "encoder_hidden_states": torch.randn(2, 5, 8, generator=draw),
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("method", ["distill", "moments"])
def test_a_lora_that_diffusers_wrote(method: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    base, lora, out = tmp_path / "base", tmp_path / "lora", tmp_path / "out.st"
    unet().save_pretrained(base)
    tuned = unet()
    tuned.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    tuned.save_lora_adapter(lora)
    (file,) = lora.glob("*.safetensors")
    draw = torch.Generator().manual_seed(2)
    save_file({name: 0.5 * torch.randn(one.shape, generator=draw) for name, one in load_file(file).items()}, file)
    live = LiveModel(unet(), outputs=outputs.states)
    options = FitOptions(method, Distillation(steps=40, learning_rate=0.03))
    report = fit_lora(file, base, out, batches(24), density=0.2, model=live, options=options)
    assert report.kept == "fit"
    assert report.fit.r2 > report.plain.r2 + 0.03
    # What the file does to a model, against the model with diffusers' own LoRA.
    with_lora, found = unet(), unet()
    with_lora.load_lora_adapter(str(lora), prefix=None, use_safetensors=True)
    Switcher(found).load(out)
    error = before = 0.0
    with torch.no_grad():
        for batch in batches(30)[24:]:
            want = with_lora(**batch).sample
            error += float((found(**batch).sample - want).square().sum())
            before += float((unet()(**batch).sample - want).square().sum())
    assert 1 - error / before == pytest.approx(report.fit.r2, abs=0.25)
    assert sum(tensor.nnz for tensor in shira_format.load(out).values()) == report.budget
