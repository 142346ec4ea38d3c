"""The two sets of names of a UNet, against diffusers' conversion of single files and LyCORIS' of LoRAs."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_open_clip_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from lycoris.utils import convert_diffusers_name_to_compvis
from transformers import CLIPTextModelWithProjection

from shira_format.names.modules import flat
from tests.diffusion import in_other_names, open_clip_state, sd3, sgm_state, text_config, unet, unet_other_names


def small(**options: object) -> UNet2DConditionModel:
    torch.manual_seed(5)
    return UNet2DConditionModel(
        sample_size=8, norm_num_groups=2, cross_attention_dim=8, attention_head_dim=2, **options
    )


MODELS = {
    "SD 1.5": lambda: unet(xl=False),
    "SDXL": lambda: unet(xl=True),
    "one layer a block": lambda: small(
        layers_per_block=1, block_out_channels=(4, 8), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "three layers a block": lambda: small(
        layers_per_block=3, block_out_channels=(4, 8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ),
}  # fmt: skip


def modules(model: torch.nn.Module) -> set[str]:
    return {name.removesuffix(".weight") for name in model.state_dict() if name.endswith(".weight")}


@pytest.mark.parametrize("kind", MODELS)
def test_diffusers_reads_our_names_of_sgm(kind: str) -> None:
    model = MODELS[kind]()
    state = model.state_dict()
    sgm = {f"model.diffusion_model.{name}": tensor for name, tensor in sgm_state(model).items()}
    back = convert_ldm_unet_checkpoint(dict(sgm), dict(model.config))
    assert back.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())


@pytest.mark.parametrize("kind", MODELS)
def test_both_ways(kind: str) -> None:
    names = modules(MODELS[kind]())
    found = unet_other_names(names)
    assert found.keys() == names
    assert {sgm: ours for ours, sgm in found.items()} == unet_other_names(set(found.values()))


def test_lycoris_agrees() -> None:
    """LyCORIS has a table of SDXL."""
    found = unet_other_names(modules(unet(xl=True)))
    theirs = {name: convert_diffusers_name_to_compvis(f"lora_unet_{flat(name)}") for name in found}
    differing = {name for name in found if f"lora_unet_{flat(found[name])}" != theirs[name]}
    # Of these, and of nothing else, it has no names.
    assert differing == {name for name in found if name.startswith("add_embedding") or name == "conv_norm_out"}
    assert all(theirs[name] == f"lora_unet_{flat(name)}" for name in differing)


@pytest.mark.parametrize(
    "names", [set(), {"a", "b.c"}, {"encoder.layers.0.self_attn.q_proj"}, {"down_blocks.0.x.0"}]
)
def test_other_models_have_no_other_names(names: set[str]) -> None:
    assert unet_other_names(names) == {}


def test_open_clip() -> None:
    torch.manual_seed(6)
    model = CLIPTextModelWithProjection(text_config())
    state = open_clip_state(model)
    back = convert_open_clip_checkpoint(
        model, {f"x.{name}": tensor for name, tensor in state.items()}, prefix="x."
    )
    expected = model.state_dict()
    assert {name for name in back if "position_ids" not in name} == expected.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())


def test_sd3() -> None:
    model = sd3()
    state = model.state_dict()
    original = in_other_names(state) | {"pos_embed": state["pos_embed.pos_embed"]}
    back = convert_sd3_transformer_checkpoint_to_diffusers(original)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    assert isinstance(model, SD3Transformer2DModel)
