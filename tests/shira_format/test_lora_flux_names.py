"""FLUX.1 in the names of its authors, against diffusers' converter of kohya's LoRAs."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

from shira_format.names.modules import flat
from shira_format.names.row_blocks import take_rows
from shira_format.names.spaces import other_names

RANK = 5  # not a multiple of 3 or 4, lest the converter looks for blocks of zeros


def test_loras() -> None:
    with torch.device("meta"):  # of the real size, without memory: the converter knows no other
        model = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {
        name.removesuffix(".weight"): location
        for name, location in other_names(shapes, shapes.__getitem__).items()
        if name.endswith(".weight") and len(location.shape) == 2
    }
    assert found["double_blocks.1.txt_attn.qkv"].shape == (9216, 3072)
    assert found["single_blocks.1.linear1"].shape == (21504, 3072)
    matrices = {name for name, shape in shapes.items() if len(shape) == 2}
    assert {block.name for location in found.values() for block in location.blocks} == matrices
    state = {}
    for module, location in found.items():
        key = f"lora_unet_{flat(module)}"
        state |= {
            f"{key}.lora_up.weight": torch.rand(location.shape[0], RANK),
            f"{key}.lora_down.weight": torch.rand(RANK, 2),
        }
    converted = {
        key.removeprefix("transformer."): tensor.numpy()
        for key, tensor in _convert_kohya_flux_lora_to_diffusers(dict(state)).items()
    }
    for module, location in found.items():
        key = f"lora_unet_{flat(module)}"
        for block in location.blocks:
            part = block.name.removesuffix(".weight")
            up = take_rows(state[f"{key}.lora_up.weight"].numpy(), block.rows)
            assert (converted.pop(f"{part}.lora_B.weight") == up).all()
            assert (converted.pop(f"{part}.lora_A.weight") == state[f"{key}.lora_down.weight"].numpy()).all()
    assert not converted
