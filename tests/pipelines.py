"""Tiny pipelines with random weights, and what diffusers makes of them with a LoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from shira_format._core.arrays import Array
from shira_format.convert import lora_to_shira
from shira_format.convert.report import ConversionReport
from shira_format.format import load

MODELS = ("unet", "transformer", "text_encoder", "text_encoder_2")


def _text(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=20, hidden_size=width, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, projection_dim=6,
    )  # fmt: skip


def _unet(**options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(4, 8),
        norm_num_groups=2, attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **options,
    )  # fmt: skip


def sd() -> StableDiffusionPipeline:
    """As Stable Diffusion 1.5: a UNet with convolutions as ``proj_in``, one text encoder."""
    torch.manual_seed(1)
    return StableDiffusionPipeline(
        vae=None, text_encoder=CLIPTextModel(_text(8)), unet=_unet(cross_attention_dim=8), tokenizer=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def sdxl() -> StableDiffusionXLPipeline:
    """As SDXL: linear layers as ``proj_in``, two text encoders."""
    torch.manual_seed(2)
    unet = _unet(
        cross_attention_dim=14, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=30, transformer_layers_per_block=2,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=None, text_encoder=CLIPTextModel(_text(8)), text_encoder_2=CLIPTextModelWithProjection(_text(6)),
        tokenizer=None, tokenizer_2=None, unet=unet, scheduler=DDIMScheduler(),
    )  # fmt: skip


def flux() -> FluxPipeline:
    """As FLUX.1-dev, with one text encoder."""
    torch.manual_seed(3)
    transformer = FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=CLIPTextModel(_text(8)), tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip


def models(pipe: Any) -> Iterator[tuple[str, nn.Module]]:
    """Its models by component."""
    return ((name, model) for name in MODELS if (model := getattr(pipe, name, None)) is not None)


def weights(model: nn.Module) -> dict[str, Array]:
    """Its weights in float64, under the names that it has without LoRA layers."""
    return {
        name.replace(".base_layer.", "."): tensor.detach().double().numpy()
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }


def fused(pipe: Any, load_lora: Callable[[Any], None]) -> dict[str, Array]:
    """The weights of ``pipe`` with a LoRA, by diffusers itself, in float64, as ``COMPONENT/NAME``.

    Args:
        pipe: is not changed.
        load_lora: puts the LoRA into a copy.
    """
    pipe = copy.deepcopy(pipe)
    for component, model in models(pipe):
        model.double()
        if component.startswith("text_encoder"):
            model.load_adapter = _load_adapter(model)
    load_lora(pipe)
    found = {}
    for component, model in models(pipe):
        model.double()  # the LoRA as well
        for module in model.modules():
            if hasattr(module, "merge") and hasattr(module, "lora_A"):
                module.merge()
        found |= {f"{component}/{name}": array for name, array in weights(model).items()}
    return found


def _load_adapter(model: nn.Module) -> Callable[..., None]:
    """What transformers' method does for diffusers, by PEFT's own functions: it refuses some released versions of PEFT."""

    def load_adapter(
        *, adapter_name: str, adapter_state_dict: dict[str, torch.Tensor], peft_config: LoraConfig, **_: Any
    ) -> None:
        inject_adapter_in_model(peft_config, model, adapter_name, state_dict=adapter_state_dict)
        result = set_peft_model_state_dict(model, adapter_state_dict, adapter_name)
        assert not result.unexpected_keys

    return load_adapter


def base_weights(pipe: Any) -> dict[str, Array]:
    """The weights of ``pipe``, as ``COMPONENT/NAME``."""
    return {f"{part}/{name}": array for part, model in models(pipe) for name, array in weights(model).items()}


def check(
    lora: Path, base: Path, out: Path, before: dict[str, Array], after: dict[str, Array]
) -> ConversionReport:
    """Our conversion of ``lora`` at full density gives ``after``, and what it leaves out does not change.

    Returns:
        what the conversion reports.
    """
    report = lora_to_shira(lora, base, out, density=1.0)
    adapter = load(out)
    found = {name: np.array(array) for name, array in before.items()}
    for name, tensor in adapter.items():
        assert tensor.value_kind == "target"
        found[name].reshape(-1)[tensor.indices] = tensor.values.astype(np.float64)
    for name, whole in adapter.dense.items():
        found[name] = whole.values.astype(np.float64)
    assert found.keys() == after.keys()
    changed = {name for name, array in after.items() if not np.array_equal(array, before[name])}
    assert changed
    assert changed == {*adapter, *adapter.dense}
    for name, array in after.items():
        if name in changed:
            scale = float(np.abs(array - before[name]).max())
            assert scale > 1e-3  # more than rounding
            np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=2e-7 * max(1.0, scale), err_msg=name)
    return report
