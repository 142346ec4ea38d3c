"""The tables of known models, against diffusers' own conversion of the authors' files."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import lora_conversion_utils as lora
from diffusers.loaders import single_file_utils as single_file
from hypothesis import given
from hypothesis import strategies as st
from lycoris.utils import convert_diffusers_name_to_compvis

from shira_format.names.models.cosmos import cosmos1, cosmos2
from shira_format.names.models.flux import FLUX_NORMS
from shira_format.names.models.hunyuan_video import hunyuan_video
from shira_format.names.models.locations import through, whole
from shira_format.names.models.tables import Model
from shira_format.names.row_blocks import Location, RowBlock
from shira_format.names.spaces import TABLES, other_names
from tests.diffusion import open_clip_state, text_config, unet

Shapes = dict[str, tuple[int, ...]]
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A model of diffusers, and how diffusers converts its authors' files.

    Attributes:
        cls, options: the model.
        convert: diffusers' conversion.
        left_out: a regex of diffusers' tensors that are in no table.
        more: tensors of the authors that go with it: those left out, and those that diffusers drops.
        prefix: of the authors' names.
    """

    cls: str
    options: Mapping[str, Any]
    convert: Callable[..., State]
    left_out: str = r"(?!)"
    more: Callable[[State], State] = field(default=lambda _state: {})
    prefix: str = ""


WIDE = {"num_layers": 2, "num_single_layers": 2}  # of a size that diffusers' conversion takes for granted
COSMOS_OPTIONS = {
    "num_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "text_embed_dim": 6,
    "adaln_lora_dim": 4,
    "max_size": (4, 8, 8),
}
TINY = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
WAN = {**TINY, "text_dim": 6, "freq_dim": 4, "ffn_dim": 10, "in_channels": 3}


def wan_motion(state: State) -> State:
    """The authors' biases in the motion encoder, of four dimensions."""
    found = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"motion_encoder\.(?:conv_in|res_blocks\.(\d+)\.conv([12]))\.act_fn\.bias", name):
            place = "0.1" if match[1] is None else f"{int(match[1]) + 1}.conv{match[2]}.{match[2]}"
            found[f"motion_encoder.enc.net_app.convs.{place}.bias"] = tensor.reshape(1, -1, 1, 1)
    return found


def krea_modulations(state: State) -> State:
    return {
        name.replace("transformer_blocks", "blocks").replace("scale_shift_table", "mod.lin"): tensor.reshape(-1)
        for name, tensor in state.items()
        if name.startswith("transformer_blocks") and name.endswith("scale_shift_table")
    }


def dropped(*names: str) -> Callable[[State], State]:
    return lambda _state: {name: torch.zeros(1) for name in names}


FLUX = single_file.convert_flux_transformer_checkpoint_to_diffusers
SD3 = single_file.convert_sd3_transformer_checkpoint_to_diffusers


class Kept(dict[str, torch.Tensor]):
    """A state from which nothing is taken: the conversion of Cosmos looks for a name that it has taken out before."""

    def pop(self, key: str) -> torch.Tensor:  # type: ignore[override]
        return self[key]


def convert_cosmos(state: State) -> State:
    return single_file.convert_cosmos_transformer_checkpoint_to_diffusers(Kept(state))


WAN_CONVERT = single_file.convert_wan_transformer_to_diffusers
SD3_OPTIONS = {
    "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12, "sample_size": 8,
    "caption_projection_dim": 16, "pooled_projection_dim": 10, "pos_embed_max_size": 8,
}  # fmt: skip

CASES = {
    "FLUX.1 dev": Case("FluxTransformer2DModel", WIDE | {"guidance_embeds": True}, FLUX),
    "FLUX.1 schnell": Case("FluxTransformer2DModel", WIDE, FLUX),
    "Chroma": Case(
        "ChromaTransformer2DModel", WIDE | {"approximator_layers": 2},
        single_file.convert_chroma_transformer_checkpoint_to_diffusers,
    ),
    "FLUX.2": Case(
        "Flux2Transformer2DModel", TINY | {"num_single_layers": 2, "joint_attention_dim": 12, "in_channels": 4},
        single_file.convert_flux2_transformer_checkpoint_to_diffusers,
    ),
    "FLUX.3": Case(
        "Flux3Transformer2DModel",
        TINY | {"num_single_layers": 2, "joint_attention_dim": 12, "in_channels": 4, "axes_dims_rope": (2, 2, 2, 2), "flow_map": True},
        single_file.convert_flux3_transformer_checkpoint_to_diffusers,
    ),
    "SD 3": Case("SD3Transformer2DModel", SD3_OPTIONS, SD3),
    "SD 3.5": Case("SD3Transformer2DModel", SD3_OPTIONS | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}, SD3),
    "Wan, text to video": Case("WanTransformer3DModel", WAN, WAN_CONVERT),
    "Wan, image to video": Case("WanTransformer3DModel", WAN | {"image_dim": 6, "added_kv_proj_dim": 16}, WAN_CONVERT),
    "Wan VACE": Case("WanVACETransformer3DModel", WAN | {"vace_layers": [0, 1], "vace_in_channels": 5}, WAN_CONVERT),
    "Wan Animate": Case(
        "WanAnimateTransformer3DModel",
        WAN | {
            "image_dim": 6, "added_kv_proj_dim": 16, "in_channels": 10, "latent_channels": 3, "inject_face_latents_blocks": 1,
            "motion_encoder_dim": 4, "motion_style_dim": 6, "motion_dim": 3, "face_encoder_hidden_dim": 8,
            "motion_encoder_channel_sizes": dict.fromkeys(("4", "8", "16", "32", "64", "128", "256", "512", "1024"), 4),
        },
        WAN_CONVERT, r"motion_encoder\..*act_fn\.bias", wan_motion,
    ),
    "Wan Animate 2": Case(
        "WanAnimate2Transformer3DModel",
        {"num_layers": 2, "dim": 16, "ffn_dim": 10, "freq_dim": 4, "text_dim": 6, "num_heads": 2},
        single_file.convert_wan_animate_2_transformer_to_diffusers,
        r"(?!blocks)\w+\..*",  # all others have one name
        lambda state: {name: tensor for name, tensor in state.items() if not name.startswith("blocks.")},
    ),
    "SkyReels V2": Case("SkyReelsV2Transformer3DModel", WAN, WAN_CONVERT),
    "HunyuanVideo": Case(
        "HunyuanVideoTransformer3DModel",
        WIDE | {"num_refiner_layers": 2, "guidance_embeds": True, "text_embed_dim": 6, "pooled_projection_dim": 5},
        single_file.convert_hunyuan_video_transformer_to_diffusers,
    ),
    "Lumina 2": Case(
        "Lumina2Transformer2DModel", {"num_layers": 2, "cap_feat_dim": 6},
        single_file.convert_lumina2_to_diffusers, more=dropped("norm_final.weight"),
    ),
    "Z-Image": Case(
        "ZImageTransformer2DModel",
        {"dim": 24, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 10, "axes_dims": [4, 4, 4], "in_channels": 4},
        single_file.convert_z_image_transformer_checkpoint_to_diffusers, more=dropped("norm_final.weight"),
    ),
    "Qwen-Image 2.1": Case(
        "QwenImage21Transformer2DModel", TINY | {"context_in_dim": 6, "axes_dims_rope": (2, 2, 4)},
        single_file.convert_qwen_image21_transformer_checkpoint_to_diffusers,
        r"(?!.*img_mlp\.(?:gate_layer|proj)).*",
        lambda state: {name: tensor for name, tensor in state.items() if not re.search(r"img_mlp\.(?:gate_layer|proj)", name)},
    ),
    "Krea 2": Case(
        "Krea2Transformer2DModel",
        TINY | {
            "num_key_value_heads": 1, "intermediate_size": 12, "timestep_embed_dim": 4, "text_hidden_dim": 8,
            "num_text_layers": 2, "text_num_attention_heads": 1, "text_num_key_value_heads": 1,
            "text_intermediate_size": 10, "in_channels": 4, "axes_dims_rope": (2, 2, 4),
        },
        single_file.convert_krea2_transformer_checkpoint_to_diffusers,
        r"transformer_blocks\.\d+\.scale_shift_table", krea_modulations,
    ),
    "LTX-Video": Case(
        "LTXVideoTransformer3DModel",
        TINY | {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "caption_channels": 6},
        single_file.convert_ltx_transformer_checkpoint_to_diffusers,
    ),
    "LTX-2": Case(
        "LTX2VideoTransformer3DModel",
        TINY | {
            "in_channels": 4, "cross_attention_dim": 16, "caption_channels": 6, "audio_in_channels": 3,
            "audio_num_attention_heads": 2, "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8,
            "gated_attn": True, "audio_gated_attn": True,
        },
        single_file.convert_ltx2_transformer_to_diffusers,
    ),
    "Cosmos 1": Case("CosmosTransformer3DModel", COSMOS_OPTIONS, convert_cosmos, prefix="net."),
    "Cosmos Predict 2": Case(
        "CosmosTransformer3DModel", COSMOS_OPTIONS | {"extra_pos_embed_type": None}, convert_cosmos,
    ),
    "Cosmos Predict 2, with a prefix": Case(
        "CosmosTransformer3DModel", COSMOS_OPTIONS | {"extra_pos_embed_type": None}, convert_cosmos,
        prefix="net.",
    ),
    "Sana": Case(
        "SanaTransformer2DModel",
        TINY | {"in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 6},
        single_file.convert_sana_transformer_to_diffusers, more=dropped("pos_embed", "y_embedder.y_embedding"),
    ),
    "AuraFlow": Case(
        "AuraFlowTransformer2DModel",
        {"num_mmdit_layers": 2, "num_single_dit_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16, "pos_embed_max_size": 9},
        single_file.convert_auraflow_transformer_checkpoint_to_diffusers,
    ),
    "Mochi 1": Case(
        "MochiTransformer3DModel",
        {"attention_head_dim": 8, "num_attention_heads": 2, "pooled_projection_dim": 8, "text_embed_dim": 12, "time_embed_dim": 4},
        single_file.convert_mochi_transformer_checkpoint_to_diffusers,
    ),
}  # fmt: skip


def shapes_of(case: Case) -> Shapes:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)  # by a model of diffusers
        model = getattr(diffusers, case.cls)(**case.options)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def narrow(shapes: Shapes) -> State:
    """Tensors with the rows of ``shapes`` and few columns; no two values are the same, so that a wrong row shows."""
    state, start = {}, 0
    for name, shape in shapes.items():
        size = (*shape[:1], *(min(length, 2) for length in shape[1:]))
        state[name] = torch.arange(start, start + int(np.prod(size))).reshape(size)
        start += state[name].numel()
    return state


def assembled(location: Location, state: State) -> torch.Tensor:
    """The tensor that is at ``location`` in a checkpoint."""
    columns = state[location.blocks[0].name].shape[1:]
    whole_tensor = torch.full((location.shape[0], *columns), -1, dtype=state[location.blocks[0].name].dtype)
    for block in location.blocks:
        at = block.start
        for start, stop in block.rows:
            assert (whole_tensor[start:stop] == -1).all()
            whole_tensor[start:stop] = state[block.name][at : at + stop - start]
            at += stop - start
    assert (whole_tensor != -1).all()
    return whole_tensor


def claimed_once(found: Mapping[str, Location], shapes: Shapes, left_out: str) -> None:
    """Each row of a checkpoint is in one of the tensors found, but for those left out."""
    rows = {name: Counter[int]() for name in shapes}
    for location in found.values():
        for block in location.blocks:
            rows[block.name].update(range(block.start, block.start + block.height))
    for name, shape in shapes.items():
        if not re.fullmatch(left_out, name):
            assert rows[name] == dict.fromkeys(range(shape[0]), 1), name


def table_of(shapes: Shapes) -> Model:
    """The one table that finds something, without names of a third space."""
    fitting = [table for table in TABLES if table(shapes, shapes.__getitem__)]
    assert len(fitting) == 1, fitting
    assert isinstance(fitting[0], Model)
    return replace(fitting[0], spellings=())


@pytest.mark.parametrize("name", CASES)
def test_both_ways_as_diffusers_converts(name: str) -> None:
    case = CASES[name]
    ours = shapes_of(case)
    state = narrow(ours)

    located = {f"{case.prefix}{key}": found for key, found in other_spaces(case, ours).items()}
    claimed_once(located, ours, case.left_out)
    authors = {key: assembled(location, state) for key, location in located.items()}
    more = case.more(state)
    assert not more.keys() & (authors.keys() - ours.keys())
    converted = case.convert(dict(authors | more))
    assert converted.keys() == ours.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in converted.items())

    theirs = {key: location.shape for key, location in located.items()}
    back = table_of(theirs)(theirs, theirs.__getitem__)
    # A name that both spaces have is of the same tensor: it can be looked up without knowing its space.
    for key in ours.keys() & theirs.keys():
        assert located[key] == back[key] == whole(key, ours[key])
    assert back.keys() == {key for key in ours if not re.fullmatch(case.left_out, key)}
    claimed_once(back, theirs, r"(?!)")
    for key, location in back.items():
        assert location.shape == ours[key]
        assert torch.equal(assembled(location, authors), state[key])


def other_spaces(case: Case, ours: Shapes) -> dict[str, Location]:
    """The authors' tensors of a model of diffusers."""
    if case.cls == "CosmosTransformer3DModel":  # two models of one class, told apart by the authors' names alone
        table = cosmos2[0] if case.options.get("extra_pos_embed_type", "") is None else cosmos1[0]
        return table(ours, ours.__getitem__)
    return table_of(ours)(ours, ours.__getitem__)


# diffusers' conversions of LoRAs, the prefix that they expect, and the modules that they know. Those of final modulations are
# not asked: diffusers leaves the halves of FLUX.2's where they are, and swaps HunyuanVideo's in both factors.
LORAS: dict[str, tuple[str, Callable[[State], State], str, str]] = {
    "Wan": (
        "Wan, image to video", lora._convert_non_diffusers_wan_lora_to_diffusers, "diffusion_model.",
        r"blocks.*_attn\.(?:[qkvo]|[kv]_img)$|blocks.*ffn|time_|text_|head\.head",
    ),
    "Wan, of musubi-tuner": (
        "Wan, image to video", lora._convert_musubi_wan_lora_to_diffusers, "lora_unet_",
        r"blocks.*_attn\.(?:[qkvo]|[kv]_img)$|blocks.*ffn",
    ),
    "HunyuanVideo": (
        "HunyuanVideo", lora._convert_hunyuan_video_lora_to_diffusers, "diffusion_model.", r"(?!txt_in)(?!final_layer\.adaLN)",
    ),
    "Lumina 2": (
        "Lumina 2", lora._convert_non_diffusers_lumina2_lora_to_diffusers, "diffusion_model.",
        r"layers|noise_refiner|context_refiner",
    ),
    "FLUX.1, of kohya": ("FLUX.1 dev", lora._convert_kohya_flux_lora_to_diffusers, "lora_unet_", r".*"),
    "FLUX.2": ("FLUX.2", lora._convert_non_diffusers_flux2_lora_to_diffusers, "diffusion_model.", r"(?!final_layer\.adaLN)"),
    "FLUX.2, of kohya": (
        "FLUX.2", lora._convert_kohya_flux2_lora_to_diffusers, "lora_unet_", r".*_blocks|img_in|txt_in|time_in|final_layer.linear",
    ),
    "FLUX.3": ("FLUX.3", lora._convert_non_diffusers_flux3_lora_to_diffusers, "diffusion_model.", r".*_blocks"),
    "Krea 2": ("Krea 2", lora._convert_non_diffusers_krea2_lora_to_diffusers, "diffusion_model.", r".*"),
    "LTX-2": ("LTX-2", lora._convert_non_diffusers_ltx2_lora_to_diffusers, "diffusion_model.", r".*"),
    "Anima": ("Cosmos Predict 2", lora._convert_non_diffusers_anima_lora_to_diffusers, "diffusion_model.", r".*"),
    "Ideogram 4": ("", lora._convert_non_diffusers_ideogram4_lora_to_diffusers, "diffusion_model.", r".*"),
}  # fmt: skip


@pytest.mark.parametrize("name", LORAS)
def test_loras_as_diffusers_converts(name: str) -> None:
    model, convert, prefix, wanted = LORAS[name]
    ours = shapes_of(CASES[model]) if model else IDEOGRAM
    located = other_spaces(CASES[model], ours) if model else table_of(ours)(ours, ours.__getitem__)
    theirs = {key: location.shape for key, location in located.items()}
    modules = [
        key.removesuffix(".weight")
        for key, shape in theirs.items()
        if key.endswith(".weight") and len(shape) == 2 and re.match(wanted, key.removesuffix(".weight"))
    ]
    state: State = {}
    downs: State = {}
    ups: State = {}
    for number, module in enumerate(modules):
        weight = f"{module}.weight"
        downs[weight] = torch.full((1, 2), float(number))
        ups[weight] = torch.arange(theirs[weight][0], dtype=torch.float32).reshape(-1, 1) + 100_000 * number
        if prefix == "lora_unet_":
            key = f"{prefix}{module.replace('.', '_')}"
            state |= {f"{key}.lora_down.weight": downs[weight], f"{key}.lora_up.weight": ups[weight]}
            state[f"{key}.alpha"] = torch.tensor(1.0)
        else:
            key = f"{prefix}{module}"
            state |= {f"{key}.lora_A.weight": downs[weight], f"{key}.lora_B.weight": ups[weight]}
    converted = convert(state)
    back = table_of(theirs)(theirs, theirs.__getitem__)
    seen = set()
    for key, tensor in converted.items():
        module, _, factor = key.removeprefix("transformer.").removesuffix(".weight").rpartition(".")
        location = back[f"{module}.weight"]
        (block,) = location.blocks
        seen.add(block.name)
        assert torch.equal(tensor, downs[block.name] if factor == "lora_A" else assembled(location, ups))
    assert seen == {f"{module}.weight" for module in modules}


IDEOGRAM: Shapes = {
    f"layers.{number}.{module}.weight": (6, 6)
    for number in range(2)
    for module in ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "feed_forward.w1",
    "feed_forward.w2", "feed_forward.w3", "adaln_modulation")
}  # fmt: skip


NEIGHBOURS = (
    "QwenImageTransformer2DModel", "BriaTransformer2DModel", "BriaFibo2Transformer2DModel", "LongCatImageTransformer2DModel",
    "OvisImageTransformer2DModel", "HunyuanImageTransformer2DModel", "HunyuanVideo15Transformer3DModel",
    "SanaVideoTransformer3DModel", "MiniMaxH3Transformer3DModel", "CogView4Transformer2DModel", "UNet3DConditionModel",
)  # fmt: skip


@pytest.mark.parametrize("cls", NEIGHBOURS)
def test_models_with_similar_names_are_told_apart(cls: str) -> None:
    """Models without a table (Qwen-Image: whose names agree everywhere) that share names with some of one."""
    with torch.device("meta"):
        model = getattr(diffusers, cls)()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert other_names(shapes, shapes.__getitem__) == {}


@pytest.mark.parametrize("name", CASES)
def test_a_name_has_one_place_even_without_its_dots(name: str) -> None:
    """Whichever tables find it, and as kohya writes it, with "_" for each "."."""
    ours = shapes_of(CASES[name])
    located = other_spaces(CASES[name], ours)
    for shapes in (ours, {key: location.shape for key, location in located.items()}):
        places: dict[str, Location] = {}
        own = {key: whole(key, shape) for key, shape in shapes.items()}
        for found in (own, *(table(shapes, shapes.__getitem__) for table in TABLES)):
            for key, location in found.items():
                assert places.setdefault(key.replace(".", "_"), location) == location, key


MODULES = {
    "double_blocks.0.img_attn.qkv.weight": (9, 3),
    "single_blocks.0.linear1.weight": (21, 3),
    "single_blocks.0.linear1.bias": (21,),
    "final_layer.adaLN_modulation.1.weight": (6, 3),
}


def test_rows_of_flux() -> None:
    found = other_names(MODULES, MODULES.__getitem__)
    linear1 = "single_blocks.0.linear1"
    assert found["single_transformer_blocks.0.attn.to_k.weight"] == Location(
        (3, 3), (RowBlock(f"{linear1}.weight", 3, ((0, 3),)),)
    )
    assert found["single_transformer_blocks.0.proj_mlp.bias"] == Location(
        (12,), (RowBlock(f"{linear1}.bias", 9, ((0, 12),)),)
    )
    assert found["norm_out.linear.weight"].blocks == (
        RowBlock("final_layer.adaLN_modulation.1.weight", 0, ((3, 6), (0, 3))),
    )
    assert not any("single_blocks" in name for name in found)


def test_the_next_hunyuan_models_have_no_table() -> None:
    """They have HunyuanVideo's blocks; diffusers converts no single file of theirs."""
    shapes = {"double_blocks.0.img_attn_qkv.weight": (9, 3), "byt5_in.fc1.weight": (4, 3)}
    assert other_names(shapes, shapes.__getitem__) == {}
    del shapes["byt5_in.fc1.weight"]
    assert "transformer_blocks.0.attn.to_k.weight" in other_names(shapes, shapes.__getitem__)


def test_grouped_keys_and_values() -> None:
    """Of a Z-Image with fewer heads of keys than of queries."""
    shapes = {"layers.0.attention.qkv.weight": (8, 4), "layers.0.adaLN_modulation.0.weight": (16, 4)}
    found = other_names(shapes, shapes.__getitem__)
    assert [found[f"layers.0.attention.to_{name}.weight"].shape for name in "qkv"] == [(4, 4), (2, 4), (2, 4)]
    assert found["layers.0.attention.to.v.weight"] == found["layers.0.attention.to_v.weight"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("double_blocks.0.img_attn.qkv.weight", (8, 3)),  # no three parts
        ("single_blocks.0.linear1.weight", (9, 3)),  # no row left for the MLP
        ("single_blocks.0.linear1.bias", (21,)),  # its weight, by which it is cut, is not there
        ("final_layer.adaLN_modulation.1.weight", (5, 3)),  # no halves
        ("layers.0.attention.qkv.weight", (3, 4)),
        ("layers.0.attention.qkv.weight", (7, 4)),
    ],
)
def test_what_does_not_fit_is_not_found(name: str, shape: tuple[int, ...]) -> None:
    shapes = {"double_blocks.0.img_attn.qkv.weight": (8, 3), name: shape}
    assert other_names(shapes, shapes.__getitem__) == {}


def test_parts_that_are_not_all_there_are_no_fused_weight() -> None:
    shapes = {
        "single_transformer_blocks.0.proj_mlp.weight": (12, 3),
        "single_transformer_blocks.0.attn.to_q.weight": (3, 3),
        "single_transformer_blocks.0.attn.to_k.weight": (3, 3),
        "single_transformer_blocks.0.proj_out.weight": (3, 15),
    }
    assert other_names(shapes, shapes.__getitem__).keys() == {"single_blocks.0.linear2.weight"}
    assert not other_names(shapes | {"norm_out.linear.weight": (5, 3)}, lambda name: (5, 3)).keys() & {
        "final_layer.adaLN_modulation.1.weight"  # no halves
    }
    shapes["single_transformer_blocks.0.attn.to_v.weight"] = (3, 2)
    assert "single_blocks.0.linear1.weight" not in other_names(shapes, shapes.__getitem__)


def test_three_name_spaces_of_hunyuan_video() -> None:
    ours = shapes_of(CASES["HunyuanVideo"])
    state = narrow(ours)
    found = other_names(ours, ours.__getitem__)
    spaces = {"diffusers": state}
    comfy = tuple(block for block in hunyuan_video.spellings if block not in FLUX_NORMS)
    for space, blocks in (("authors", hunyuan_video.blocks), ("ComfyUI", comfy)):
        located = replace(hunyuan_video, blocks=blocks, spellings=())(ours, ours.__getitem__)
        claimed_once(located, ours, r"(?!)")
        assert located.items() <= {**found, **{name: whole(name, shape) for name, shape in ours.items()}}.items()
        spaces[space] = {name: assembled(location, state) for name, location in located.items()}
    assert "double_blocks.1.txt_attn.norm.key_norm.scale" in spaces["ComfyUI"].keys() - spaces["authors"].keys()
    for space, tensors in spaces.items():
        shapes = {
            name: ours[name] if space == "diffusers" else found[name].shape if name in found else ours[name]
            for name in tensors
        }
        others = other_names(shapes, shapes.__getitem__)
        expected = {name: tensor for one in spaces.values() for name, tensor in one.items() if name not in tensors}
        assert expected.keys() <= others.keys()
        assert all(name.endswith("_norm.weight") for name in others.keys() - expected.keys())
        for name, tensor in expected.items():
            location = others[name]
            assert torch.equal(assembled(location, tensors), tensor)
            # Of the two names of one tensor, rows are not cut where they need not be.
            assert len({block.name for block in location.blocks}) == len(location.blocks)


@pytest.mark.parametrize("name", ["FLUX.1 dev", "Chroma", "FLUX.2"])
def test_norms_of_flux_with_weights_or_scales(name: str) -> None:
    ours = shapes_of(CASES[name])
    state = narrow(ours)
    scales = {key: assembled(location, state) for key, location in table_of(ours)(ours, ours.__getitem__).items()}
    weights = {
        re.sub(r"(query|key)_norm\.scale", r"\1_norm.weight", key): tensor for key, tensor in scales.items()
    }
    assert scales.keys() != weights.keys()
    found = other_names(ours, ours.__getitem__)
    shapes = {key: found[key].shape if key in found else ours[key] for key in weights}
    others = other_names(shapes, shapes.__getitem__)
    for key, tensor in (state | scales).items():
        if key not in weights:
            assert torch.equal(assembled(others[key], weights), tensor)


def small_unet(**options: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8, norm_num_groups=2, cross_attention_dim=8, attention_head_dim=2, **options
    )


UNETS: dict[str, Callable[[], Any]] = {
    "SD 1.5": lambda: unet(xl=False),
    "SDXL": lambda: unet(xl=True),
    "one layer a block": lambda: small_unet(
        layers_per_block=1, block_out_channels=(4, 8), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "three layers a block": lambda: small_unet(
        layers_per_block=3, block_out_channels=(4, 8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNETS)
def test_unet(kind: str) -> None:
    model = UNETS[kind]()
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = other_names(shapes, shapes.__getitem__)
    claimed_once(found, shapes, r"(?!)")
    sgm = {name: state[location.blocks[0].name] for name, location in found.items()}
    assert all(location == whole(location.blocks[0].name, location.shape) for location in found.values())
    converted = single_file.convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{name}": tensor for name, tensor in sgm.items()}, dict(model.config)
    )
    assert converted.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in converted.items())

    shapes = {name: tuple(tensor.shape) for name, tensor in sgm.items()}
    back = other_names(shapes, shapes.__getitem__)
    # With SGM's names alone, what is added to the time could be a class.
    assert {name for name in back if name not in state} == {
        name.replace("add_embedding", "class_embedding") for name in state if name.startswith("add_embedding")
    }
    assert all(torch.equal(sgm[back[name].blocks[0].name], tensor) for name, tensor in state.items())


def test_lycoris_agrees_on_sdxl() -> None:
    """LyCORIS has a table of SDXL, without what is added to the time and the last norm."""
    shapes = {name: tuple(tensor.shape) for name, tensor in unet(xl=True).state_dict().items()}
    for name, location in other_names(shapes, shapes.__getitem__).items():
        ours = location.blocks[0].name
        if ours.endswith(".weight") and not ours.startswith(("add_embedding", "conv_norm_out")):
            flat = [f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}" for key in (ours, name)]
            assert convert_diffusers_name_to_compvis(flat[0]) == flat[1]


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_open_clip(prefix: str) -> None:
    from transformers import CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection(text_config())
    state = {name.replace("text_model.", prefix): tensor for name, tensor in model.state_dict().items()}
    expected = open_clip_state(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = other_names(shapes, shapes.__getitem__)
    assert found.keys() == expected.keys() - {"text_projection"}
    claimed_once(found, shapes, r"text_projection\.weight")
    for name, location in found.items():
        parts = [state[block.name] for block in location.blocks]
        assert torch.equal(torch.cat(parts), expected[name])

    theirs = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    back = other_names(theirs, theirs.__getitem__)
    for name, tensor in model.state_dict().items():
        if name != "text_projection.weight":
            (block,) = back[name].blocks
            assert torch.equal(expected[block.name][block.start : block.start + block.height], tensor)


def test_other_models_are_refused_without_a_look_at_their_tensors() -> None:
    names = [f"model.layers.{number}.mlp.experts.gate.weight" for number in range(1000)]
    names += ["x.weight", "transformer.h.0.attn.weight", "layers.0.attention.wq.weight", "encoder.layers.0.self_attn.q_proj.weight"]  # fmt: skip

    def shape(name: str) -> tuple[int, ...]:
        raise AssertionError(name)

    assert other_names(names, shape) == {}


@given(st.data())
def test_any_shapes(data: st.DataObject) -> None:
    """Files come from strangers: whatever shapes the known names have, rows that are found exist, and fill the tensor."""
    shapes = {
        name: tuple(data.draw(st.lists(st.integers(0, 6), max_size=3)))
        for name in data.draw(st.sampled_from([FLUX_NAMES, DIFFUSERS_NAMES]))
    }
    for location in other_names(shapes, shapes.__getitem__).values():
        rows = [row for block in location.blocks for start, stop in block.rows for row in range(start, stop)]
        assert sorted(rows) == list(range(location.shape[0]))
        for block in location.blocks:
            assert 0 <= block.start <= block.start + block.height <= shapes[block.name][0]
            assert shapes[block.name][1:] == location.shape[1:]


FLUX_NAMES = [
    *(f"{module}.{kind}" for module in ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "final_layer.adaLN_modulation.1") for kind in ("weight", "bias")),
    "layers.0.attention.qkv.weight", "joint_blocks.0.x_block.attn.qkv.weight", "joint_blocks.0.context_block.adaLN_modulation.1.weight",
]  # fmt: skip
DIFFUSERS_NAMES = [
    *(f"single_transformer_blocks.0.{module}.{kind}" for module in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp") for kind in ("weight", "bias")),
    "norm_out.linear.weight", "norm_out.linear.bias", "transformer_blocks.0.norm1_context.linear.weight",
    "transformer_blocks.0.attn.add_q_proj.weight", "layers.0.attention.to_q.weight", "layers.0.attention.to_k.weight",
    "layers.0.attention.to_v.weight",
]  # fmt: skip


def test_a_lone_number_is_no_tensor_with_rows() -> None:
    shapes: Shapes = {"double_blocks.0.img_attn.qkv.weight": (), "single_blocks.0.linear2.weight": ()}
    assert other_names(shapes, shapes.__getitem__) == {}


def test_through() -> None:
    """Rows by way of another tensor: cut there, put together again where they are neighbours."""
    swap = ((2, 4), (0, 2))
    hub = {
        "a": Location((4,), (RowBlock("base", 6, swap),)),
        "b": Location((2,), (RowBlock("base", 4, ((0, 2),)),)),
    }
    sought = Location((6,), (RowBlock("a", 0, swap), RowBlock("b", 0, ((4, 6),))))
    assert through(sought, hub) == Location((6,), (RowBlock("base", 4, ((4, 6), (0, 4))),))
    apart = {**hub, "b": Location((2,), (RowBlock("other", 1, ((1, 2), (0, 1))),))}
    assert through(sought, apart) == Location(
        (6,), (RowBlock("base", 6, ((0, 4),)), RowBlock("other", 1, ((5, 6), (4, 5))))
    )
