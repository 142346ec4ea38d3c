"""The two sets of names of FLUX.1, against both of diffusers' converters."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

from shira_format.names.flux import flux_parts, is_diffusers_flux
from shira_format.names.row_blocks import FusedPart

RANK = 5  # not a multiple of 3 or 4, lest the converter looks for blocks of zeros


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    """Of the real size, without memory: the converters know no other."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def pieces(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[FusedPart, ...]]:
    return flux_parts(shapes, lambda name: shapes[name][0])


def heights(pieces: dict[str, tuple[FusedPart, ...]]) -> dict[str, int]:
    return {
        name: sum(stop - start for piece in found for start, stop in piece.rows) for name, found in pieces.items()
    }


def test_all_modules_of_a_real_flux(
    pieces: dict[str, tuple[FusedPart, ...]], shapes: dict[str, tuple[int, ...]]
) -> None:
    assert heights(pieces)["double_blocks.1.txt_attn.qkv"] == 9216
    assert heights(pieces)["single_blocks.1.linear1"] == 21504
    matrices = {name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2}
    assert {piece.module for found in pieces.values() for piece in found} == matrices


def test_weights_and_biases(pieces: dict[str, tuple[FusedPart, ...]]) -> None:
    """diffusers' converter of whole checkpoints."""
    state = {
        f"{module}.{what}": torch.rand(rows, *columns)
        for module, rows in heights(pieces).items()
        for what, columns in (("weight", (1,)), ("bias", ()))
    }
    norms = [f"double_blocks.{i}.{kind}_attn.norm" for i in range(2) for kind in ("img", "txt")]
    norms += [f"single_blocks.{i}.norm" for i in range(2)]
    state |= {f"{norm}.{which}_norm.scale": torch.ones(1) for norm in norms for which in ("query", "key")}
    converted = convert_flux_transformer_checkpoint_to_diffusers(dict(state))
    for module, found in pieces.items():
        for piece in found:
            for what in ("weight", "bias"):
                expected = converted.pop(f"{piece.module}.{what}").numpy()
                assert (piece.take(state[f"{module}.{what}"].numpy()) == expected).all()
    assert all(".norm_" in name for name in converted)


def test_loras(pieces: dict[str, tuple[FusedPart, ...]]) -> None:
    """diffusers' converter of kohya's LoRAs."""
    state = {}
    for module, rows in heights(pieces).items():
        key = f"lora_unet_{module.replace('.', '_')}"
        state |= {f"{key}.lora_up.weight": torch.rand(rows, RANK), f"{key}.lora_down.weight": torch.rand(RANK, 2)}
    converted = _convert_kohya_flux_lora_to_diffusers(dict(state))
    converted = {key.removeprefix("transformer."): tensor.numpy() for key, tensor in converted.items()}
    for module, found in pieces.items():
        key = f"lora_unet_{module.replace('.', '_')}"
        for piece in found:
            up = converted.pop(f"{piece.module}.lora_B.weight")
            assert (piece.take(state[f"{key}.lora_up.weight"].numpy()) == up).all()
            down = converted.pop(f"{piece.module}.lora_A.weight")
            assert (state[f"{key}.lora_down.weight"].numpy() == down).all()
    assert not converted


def test_what_a_base_lacks_is_not_listed(shapes: dict[str, tuple[int, ...]]) -> None:
    schnell = {name: shape for name, shape in shapes.items() if "guidance" not in name and "to_k" not in name}
    found = flux_parts(schnell, lambda name: schnell[name][0])
    assert "guidance_in.in_layer" not in found
    assert "double_blocks.0.img_attn.qkv" not in found
    assert "double_blocks.0.img_attn.proj" in found
    assert flux_parts(["x.weight"], lambda name: 1) == {}


def test_flux_is_told_from_others(shapes: dict[str, tuple[int, ...]]) -> None:
    from diffusers import SD3Transformer2DModel

    assert is_diffusers_flux(shapes)
    with torch.device("meta"):
        other = SD3Transformer2DModel(num_layers=1)
    assert not is_diffusers_flux(other.state_dict())
    assert not is_diffusers_flux(["double_blocks.0.img_attn.qkv.weight"])
