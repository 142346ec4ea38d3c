"""Tiny pipelines of the shapes of Stable Diffusion 1.5 and SDXL: the same blocks and names, a few channels."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from shira_format.names.spaces import other_names

WIDTH = 8  # of the text encoders


def unet(*, xl: bool) -> UNet2DConditionModel:
    """Random weights, the same every time."""
    torch.manual_seed(21)
    if not xl:
        return UNet2DConditionModel(
            sample_size=8, layers_per_block=2, block_out_channels=(4, 8, 8, 8), norm_num_groups=2,
            cross_attention_dim=WIDTH, attention_head_dim=2,
        )  # fmt: skip
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=2, block_out_channels=(4, 8, 12), norm_num_groups=2,
        cross_attention_dim=2 * WIDTH, attention_head_dim=2, use_linear_projection=True,
        transformer_layers_per_block=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=24 + WIDTH,
    )  # fmt: skip


def text_config(**options: Any) -> CLIPTextConfig:
    """Of a text encoder of two layers."""
    return CLIPTextConfig(
        vocab_size=20, hidden_size=WIDTH, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=WIDTH, bos_token_id=0, eos_token_id=1, **options,
    )  # fmt: skip


def pipeline(*, xl: bool) -> Any:
    """A pipeline without tokenizers."""
    made = unet(xl=xl)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    if not xl:
        return StableDiffusionPipeline(
            vae=vae, text_encoder=CLIPTextModel(text_config()), unet=made, tokenizer=None, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(text_config()),
        text_encoder_2=CLIPTextModelWithProjection(text_config(hidden_act="gelu")),
        unet=made, tokenizer=None, tokenizer_2=None, scheduler=scheduler,
    )  # fmt: skip


def save(pipe: Any, folder: Path) -> Path:
    """The pipeline as diffusers saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.save_pretrained(folder)
    return folder


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a pipeline that was saved, as our checkpoints name them."""
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted(folder.glob("*/*.safetensors"))
        for name, tensor in load_file(file).items()
    }


PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


def layers(pipe: Any, wanted: str, *, te: str = "lora_te1") -> dict[str, nn.Module]:
    """Linear layers and convolutions whose names match the regex ``wanted``, by kohya's name of diffusers' modules.

    As kohya does, text encoders have a ``text_model`` in their names, whatever transformers calls its modules today.
    """
    found = {}
    for component, prefix in PREFIXES.items():
        model = getattr(pipe, component, None)
        for name, module in [] if model is None else model.named_modules():
            if not isinstance(module, (nn.Linear, nn.Conv2d)) or not re.search(wanted, f"{component}.{name}"):
                continue
            full = name
            if component != "unet" and not name.startswith(("text_model.", "text_projection")):
                full = f"text_model.{name}"
            found[f"{te if prefix == 'lora_te' else prefix}.{full}".replace(".", "_")] = module
    return found


def in_other_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a model by the names that its authors give them."""
    found, used = {}, set()
    for name, location in other_names(state, lambda name: tuple(state[name].shape)).items():
        rows = torch.empty(location.shape, dtype=state[location.blocks[0].name].dtype)
        for block in location.blocks:
            at = block.start
            for start, stop in block.rows:
                rows[start:stop] = state[block.name][at : at + stop - start]
                at += stop - start
        found[name] = rows
        used |= {block.name for block in location.blocks}
    return found | {name: tensor for name, tensor in state.items() if name not in used}  # names that both have


def unet_other_names(modules: Collection[str]) -> dict[str, str]:
    """The names of a UNet's modules in the other set."""
    found = other_names({f"{module}.weight" for module in modules}, lambda _: (1, 1))
    names: dict[str, str] = {}
    for name, location in found.items():  # label_emb has two names in diffusers
        names.setdefault(location.blocks[0].name.removesuffix(".weight"), name.removesuffix(".weight"))
    return {module: names[module] for module in modules if module in names}


def sgm_state(model: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The weights of a UNet by SGM's names."""
    return in_other_names(model.state_dict())


def open_clip_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a text encoder with a projection by OpenCLIP's names, written down without our tables."""
    state = model.state_dict()
    found = {
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "ln_final.weight": state["text_model.final_layer_norm.weight"],
        "ln_final.bias": state["text_model.final_layer_norm.bias"],
    }
    for number in range(2):
        ours, theirs = f"text_model.encoder.layers.{number}.", f"transformer.resblocks.{number}."
        for kind in ("weight", "bias"):
            found[f"{theirs}attn.in_proj_{kind}"] = torch.cat(
                [state[f"{ours}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            )
            for inner, outer in (
                ("attn.out_proj", "self_attn.out_proj"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
                ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
            ):  # fmt: skip
                found[f"{theirs}{inner}.{kind}"] = state[f"{ours}{outer}.{kind}"]
    return found


def sd3() -> SD3Transformer2DModel:
    """A transformer of Stable Diffusion 3.5, medium: its first block attends twice."""
    torch.manual_seed(31)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4, pos_embed_max_size=8,
        dual_attention_layers=(0, 1), qk_norm=None,
    )  # fmt: skip
