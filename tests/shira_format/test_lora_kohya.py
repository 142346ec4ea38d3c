"""kohya's files, against diffusers, which loads and fuses them, and by hand where it does not."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from lycoris.utils import convert_diffusers_name_to_compvis
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5EncoderModel

from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.errors import SourceError
from shira_format.format import load
from shira_format.live import apply
from shira_format.lora import DIALECTS, open_lora
from shira_format.names.modules import flat
from tests.diffusion import (
    in_other_names,
    layers,
    open_clip_state,
    pipeline,
    save,
    saved_weights,
    sd3,
    sgm_state,
    unet_other_names,
)

# What diffusers adapts by the names of its own UNet, convolutions included.
WANTED = r"attn[12]\.to_|proj_in|proj_out|ff\.net|conv1|conv2|time_emb_proj|downsamplers.0.conv|upsamplers.0.conv|conv_shortcut|self_attn|mlp\.fc"


@pytest.fixture(scope="module", params=[False, True], ids=["sd15", "sdxl"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, bool]:
    """A pipeline, where it is saved, and whether it is SDXL."""
    pipe = pipeline(xl=request.param)
    return pipe, save(pipe, tmp_path_factory.mktemp("pipeline") / "base"), request.param


def factors(
    modules: Mapping[str, nn.Module],
    *,
    alphas: bool = True,
    ranks: tuple[int, ...] = (1, 2, 3),
    linear: bool = False,
) -> dict[str, torch.Tensor]:
    """A LoRA of these modules, with another rank and alpha for each; ``linear``: matrices for convolutions of kernel 1."""
    generator = torch.Generator().manual_seed(4)
    state = {}
    for number, (name, module) in enumerate(modules.items()):
        rank = ranks[number % len(ranks)]
        weight = module.weight
        down = 0.3 * torch.randn(rank, *weight.shape[1:], generator=generator)
        up = 0.3 * torch.randn(weight.shape[0], rank, *(1 for _ in weight.shape[2:]), generator=generator)
        if linear and weight.shape[2:] == (1, 1):
            down, up = down[:, :, 0, 0], up[:, :, 0, 0]
        state |= {f"{name}.lora_down.weight": down.contiguous(), f"{name}.lora_up.weight": up.contiguous()}
        if alphas:
            state[f"{name}.alpha"] = torch.tensor(0.5 + number % 4)
    return state


def in_sgm(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names that kohya uses for SDXL; the renaming is LyCORIS' own."""
    return {
        f"{convert_diffusers_name_to_compvis(key.partition('.')[0])}.{key.partition('.')[2]}": tensor
        for key, tensor in state.items()
    }


def fused(folder: Path, state: Mapping[str, torch.Tensor], *, xl: bool, out: Path) -> dict[str, torch.Tensor]:
    """What diffusers makes of the pipeline."""
    pipe = pipeline(xl=xl)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_lora_weights(dict(state), adapter_name="a")
        pipe.fuse_lora(components=["unet", "text_encoder", *(["text_encoder_2"] if xl else [])])
        pipe.unload_lora_weights()
    return saved_weights(save(pipe, out))


def converted(lora: Path, base: Path, dialect: str = "kohya") -> dict[str, torch.Tensor]:
    """All weights of the base after the whole conversion, everything kept."""
    out = lora.with_name("adapter.st")
    lora_to_shira(lora, base, out, density=1.0)
    adapter = load(out)
    assert adapter.manifest["source"]["dialect"] == dialect
    assert [name for name, found in DIALECTS.items() if found.recognises(lora)] == [dialect]
    weights = saved_weights(base) if base.is_dir() else load_file(base)
    apply(adapter, weights)
    return weights


def write(folder: Path, state: Mapping[str, torch.Tensor], **header: str) -> Path:
    (folder / "lora").mkdir(exist_ok=True)
    save_file(dict(state), folder / "lora" / "lora.safetensors", header or None)
    return folder / "lora" / "lora.safetensors"


def compare(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float = 1e-6
) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            error = (found[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-9)
            assert error <= tolerance, (name, error)


def summed(
    base: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], names: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """The base and the updates by kohya's formula; ``names``: from kohya's to the base's."""
    result = dict(base)
    for module, name in names.items():
        up, down = state[f"{module}.lora_up.weight"].double(), state[f"{module}.lora_down.weight"].double()
        scale = float(state[f"{module}.alpha"]) / down.shape[0] if f"{module}.alpha" in state else 1.0
        weight = base[name]
        update = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        result[name] = (weight.double() + scale * update).to(weight.dtype)
    return result


def base_names(pipe: Any, folder: Path, te: str) -> dict[str, str]:
    """From kohya's names of diffusers' modules to those in the saved folder."""
    known = saved_weights(folder)
    found = {}
    for component, prefix in (("unet", "lora_unet"), ("text_encoder", te), ("text_encoder_2", "lora_te2")):
        for name, module in (
            [] if getattr(pipe, component, None) is None else getattr(pipe, component).named_modules()
        ):
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                full = name if component == "unet" or name.startswith("text_") else f"text_model.{name}"
                found[f"{prefix}.{full}".replace(".", "_")] = f"{component}/{name}.weight"
    assert set(found.values()) <= known.keys()
    return found


def te_of(xl: bool) -> str:
    return "lora_te1" if xl else "lora_te"


@pytest.mark.parametrize("alphas", [True, False], ids=["one alpha", "no alphas"])
def test_diffusers_fuses_the_same(made: tuple[Any, Path, bool], alphas: bool, tmp_path: Path) -> None:
    """Ranks differ. Where alphas do as well, diffusers (0.42) gives most layers another layer's alpha: see the next test."""
    pipe, base, xl = made
    modules = layers(pipe, WANTED, te=te_of(xl))
    assert any(isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) for module in modules.values())
    state = factors(modules, alphas=alphas)
    state = {key: torch.tensor(1.5) if key.endswith("alpha") else tensor for key, tensor in state.items()}
    if xl:
        state = in_sgm(state)
        assert any("input_blocks" in key for key in state)
        assert any("emb_layers_1" in key for key in state)
    expected = fused(base, state, xl=xl, out=tmp_path / "fused")
    before = saved_weights(base)
    assert sum(not torch.equal(expected[name], before[name]) for name in before) == len(modules)
    compare(converted(write(tmp_path, state), base), expected)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("naming", ["diffusers", "sgm"])
def test_every_layer_has_its_own_rank_and_alpha(
    made: tuple[Any, Path, bool], naming: str, linear: bool, tmp_path: Path
) -> None:
    """By kohya's formula; all linear layers and convolutions, also those that diffusers does not know how to load."""
    pipe, base, xl = made
    names = base_names(pipe, base, te_of(xl))
    state = factors(layers(pipe, "", te=te_of(xl)), linear=linear)
    expected = summed(saved_weights(base), state, names)
    if naming == "sgm":
        state = renamed(state, pipe)
    path = write(
        tmp_path, state, ss_network_dim="8", ss_network_alpha="4.0", ss_base_model_version="sd_v1", ss_tag="x"
    )
    compare(converted(path, base), expected)
    source = load(path.with_name("adapter.st")).manifest["source"]
    assert source["ranks"] == [1, 2, 3]
    assert source["alphas"] == [0.5, 1.5, 2.5, 3.5]
    assert {key: value for key, value in source.items() if key.startswith("ss_")} == {
        "ss_network_dim": "8", "ss_network_alpha": "4.0", "ss_base_model_version": "sd_v1"
    }  # fmt: skip


def renamed(state: Mapping[str, torch.Tensor], pipe: Any) -> dict[str, torch.Tensor]:
    """By SGM's names; that these are right is in test_lora_unet_names.py."""
    names = {name.removesuffix(".weight") for name in pipe.unet.state_dict() if name.endswith(".weight")}
    table = {f"lora_unet_{flat(ours)}": f"lora_unet_{flat(sgm)}" for ours, sgm in unet_other_names(names).items()}
    return {f"{table.get(key.partition('.')[0], key.partition('.')[0])}.{key.partition('.')[2]}": tensor for key, tensor in state.items()}  # fmt: skip


def single_file(weights: Mapping[str, torch.Tensor], pipe: Any, *, xl: bool) -> dict[str, torch.Tensor]:
    """The weights of a saved pipeline as its authors' single file; the VAE, which no LoRA touches, is left out."""
    clone = pipeline(xl=xl)
    for component in ("unet", "text_encoder", "text_encoder_2"):
        if getattr(pipe, component, None) is not None:
            of = {
                name.partition("/")[2]: tensor
                for name, tensor in weights.items()
                if name.startswith(f"{component}/")
            }
            getattr(clone, component).load_state_dict(of)
    found = {f"model.diffusion_model.{name}": tensor for name, tensor in sgm_state(clone.unet).items()}
    clip = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
    found |= {f"{clip}text_model.{name}": tensor for name, tensor in clone.text_encoder.state_dict().items()}
    if xl:
        state = open_clip_state(clone.text_encoder_2)
        found |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in state.items()}
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


@pytest.mark.parametrize("naming", ["diffusers", "sgm"])
def test_single_files(made: tuple[Any, Path, bool], naming: str, tmp_path: Path) -> None:
    """OpenCLIP's text encoder holds queries, keys and values as one weight: of one layer, only keys are adapted."""
    pipe, base, xl = made
    before = saved_weights(base)
    save_file(single_file(before, pipe, xl=xl), tmp_path / "base.safetensors")
    modules = layers(pipe, r"^unet|self_attn.k_proj|layers.0.self_attn|mlp", te=te_of(xl))
    state = factors(modules)
    changed = {name: value for name, value in base_names(pipe, base, te_of(xl)).items() if name in modules}
    expected = single_file(summed(before, state, changed), pipe, xl=xl)
    state = renamed(state, pipe) if naming == "sgm" else state
    compare(converted(write(tmp_path, state), tmp_path / "base.safetensors"), expected)


@pytest.mark.parametrize("component", ["unet", "text_encoder", "text_encoder_2"])
def test_a_lone_model(component: str, tmp_path: Path) -> None:
    pipe = pipeline(xl=True)
    base = save(pipe, tmp_path / "base")
    state = factors(layers(pipe, f"^{component}\\."))
    names = base_names(pipe, base, "lora_te1")
    expected = summed(
        saved_weights(base), state, {key: names[key] for key in {key.partition(".")[0] for key in state}}
    )
    lora = write(tmp_path, state)
    file = next((base / component).glob("*.safetensors"))
    compare(converted(lora, file), {name.partition("/")[2]: value for name, value in expected.items() if name.startswith(f"{component}/")})  # fmt: skip
    both = write(tmp_path, state | factors(layers(pipe, "proj_in|self_attn.q_proj")))
    with pytest.raises(SourceError, match="the base must be the whole pipeline"):
        open_lora(both, open_checkpoint(file))


@pytest.mark.parametrize("base_has", [True, False])
@pytest.mark.parametrize("lora_has", [True, False])
def test_prefix_of_text_encoders(base_has: bool, lora_has: bool, tmp_path: Path) -> None:
    """transformers 5 saves CLIP's text encoder without "text_model.", earlier ones with it; LoRAs can have either."""
    pipe = pipeline(xl=False)
    state = factors(layers(pipe, "^text_encoder"))
    names = {key.partition(".")[0]: "" for key in state}
    prefix = "text_model." if base_has else ""
    weights = {f"{prefix}{name}": tensor.clone() for name, tensor in pipe.text_encoder.state_dict().items()}
    for name, module in pipe.text_encoder.named_modules():
        if isinstance(module, nn.Linear):
            names[f"lora_te1_text_model_{flat(name)}"] = f"{prefix}{name}.weight"
    save_file(weights, tmp_path / "base.safetensors")
    expected = summed(weights, state, names)
    if not lora_has:
        state = {key.replace("_text_model_", "_"): tensor for key, tensor in state.items()}
    lora = write(tmp_path, state)
    compare(converted(lora, tmp_path / "base.safetensors"), expected)
    notices = open_lora(lora, open_checkpoint(tmp_path / "base.safetensors")).notices
    assert len(notices) == (base_has != lora_has)


def test_files_by_diffusers_converter(tmp_path: Path) -> None:
    """PEFT's keys of a text encoder; for a UNet it keeps the dots, which are ComfyUI's way."""
    pipe = pipeline(xl=False)
    base = save(pipe, tmp_path / "base")
    state = factors(layers(pipe, "^text_encoder.*self_attn", te="lora_te"))
    peft = {}
    for key, tensor in state.items():
        module, _, part = key.partition(".")
        dotted = base_names(pipe, base, "lora_te")[module].removeprefix("text_encoder/").removesuffix(".weight")
        part = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "alpha": "alpha"}[part]
        peft[f"text_encoder.text_model.{dotted}.{part}"] = tensor
    theirs = convert_state_dict_to_kohya({key: tensor for key, tensor in peft.items() if "alpha" not in key})
    theirs = {key.replace("lora_te1_", "lora_te_"): tensor for key, tensor in theirs.items()}
    without = {key: tensor for key, tensor in state.items() if not key.endswith("alpha")}
    assert theirs.keys() >= without.keys()
    theirs = {key: tensor for key, tensor in theirs.items() if key in without}
    alphas = {key: tensor for key, tensor in state.items() if key.endswith("alpha")}
    found = converted(write(tmp_path, theirs | alphas), base)
    names = base_names(pipe, base, "lora_te")
    compare(found, summed(saved_weights(base), state, {key.partition(".")[0]: names[key.partition(".")[0]] for key in state}))  # fmt: skip


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(41)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip


FLUX = {  # of the authors' modules: the parts in diffusers, top to bottom; written down without our tables
    "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.net.2"],
    "single_blocks.0.linear1": [
        *(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"), "single_transformer_blocks.0.proj_mlp",
    ],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}  # fmt: skip


def to_authors(module: str, weight: torch.Tensor) -> torch.Tensor:
    """The last modulation's halves change places."""
    return torch.cat(weight.chunk(2)[::-1]) if module.startswith("final_layer.ada") else weight


@pytest.mark.parametrize("layout", ["authors", "diffusers", "pipeline"])
def test_flux(layout: str, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in flux().state_dict().items()}
    authors = {
        f"{module}.weight": to_authors(module, torch.cat([state[f"{part}.weight"] for part in parts]))
        for module, parts in FLUX.items()
    }
    linear = {}
    for name, weight in authors.items():
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear[f"lora_unet_{flat(name.removesuffix('.weight'))}"] = layer
    lora = factors(linear)
    changed = summed(authors, lora, {f"lora_unet_{flat(module)}": f"{module}.weight" for module in FLUX})
    expected = dict(state)
    for module, parts in FLUX.items():
        weight, at = to_authors(module, changed[f"{module}.weight"]), 0
        for part in parts:
            height = state[f"{part}.weight"].shape[0]
            expected[f"{part}.weight"] = weight[at : at + height]
            at += height
    path = write(tmp_path, lora)
    if layout == "authors":
        save_file(authors, tmp_path / "base.safetensors")
        compare(converted(path, tmp_path / "base.safetensors"), changed)
    elif layout == "diffusers":
        save_file(state, tmp_path / "base.safetensors")
        compare(converted(path, tmp_path / "base.safetensors"), expected)
    else:
        folder = flux_pipeline(tmp_path / "base", state)
        t5 = saved_weights(folder)["text_encoder_2/encoder.block.0.layer.0.SelfAttention.q.weight"]
        more = factors({"lora_te3_encoder_block_0_layer_0_SelfAttention_q": nn.Linear(*t5.shape[::-1])})
        found = converted(write(tmp_path, lora | more), folder)
        compare({name.partition("/")[2]: value for name, value in found.items() if name.startswith("transformer/")}, expected)  # fmt: skip
        name = "text_encoder_2/encoder.block.0.layer.0.SelfAttention.q.weight"
        compare(
            {name: found[name]},
            summed({name: t5}, more, {"lora_te3_encoder_block_0_layer_0_SelfAttention_q": name}),
        )


def flux_pipeline(folder: Path, state: Mapping[str, torch.Tensor]) -> Path:
    """As diffusers saves it: FLUX's T5, kohya's third text encoder, is its second."""
    folder.mkdir()
    entries = {
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
    }
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **entries}))
    (folder / "transformer").mkdir()
    save_file(dict(state), folder / "transformer" / "diffusion_pytorch_model.safetensors")
    torch.manual_seed(42)
    config = T5Config(vocab_size=10, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder_2")
    return folder


def test_sd3(tmp_path: Path) -> None:
    """Against diffusers' converter of the authors' checkpoint, before and after."""
    model = sd3()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(7)
    authors = {
        name: torch.randn(tensor.shape, generator=generator) for name, tensor in in_other_names(state).items()
    } | {"pos_embed": state["pos_embed.pos_embed"]}
    linear = {
        f"lora_unet_{flat(name.removesuffix('.weight'))}": nn.Conv2d(*tensor.shape[1::-1], tensor.shape[2:])
        if tensor.ndim == 4
        else nn.Linear(*tensor.shape[::-1])
        for name, tensor in authors.items()
        if name.endswith(".weight")
    }
    lora = factors(linear)
    names = {
        f"lora_unet_{flat(name.removesuffix('.weight'))}": name for name in authors if name.endswith(".weight")
    }
    expected = convert_sd3_transformer_checkpoint_to_diffusers(summed(authors, lora, names))
    base = convert_sd3_transformer_checkpoint_to_diffusers(dict(authors))
    assert any("attn2" in name for name in base)
    save_file({name: tensor.contiguous() for name, tensor in base.items()}, tmp_path / "base.safetensors")
    compare(converted(write(tmp_path, lora), tmp_path / "base.safetensors"), expected)


# What cannot be read.

NAME = "lora_unet_conv_in"


def lone(tmp_path: Path, state: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor] | None = None) -> str:
    """The message with which a LoRA is refused, without the file's name."""
    shapes = {"conv_in.weight": (4, 3, 3, 3), "conv_in.bias": (4,), "to.q.weight": (6, 4), "mid.norm.weight": (4,)}
    save_file(
        dict(base or {name: torch.ones(shape) for name, shape in shapes.items()}), tmp_path / "base.safetensors"
    )
    path = write(tmp_path, {key: tensor.contiguous() for key, tensor in state.items()})
    with pytest.raises(SourceError) as caught:
        open_lora(path, open_checkpoint(tmp_path / "base.safetensors"))
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def pair(
    name: str = NAME, rank: int = 2, down: tuple[int, ...] = (3, 3, 3), up: int = 4
) -> dict[str, torch.Tensor]:
    ones = (1,) * (len(down) - 1)
    return {
        f"{name}.lora_down.weight": torch.ones(rank, *down),
        f"{name}.lora_up.weight": torch.ones(up, rank, *ones),
    }


BAD: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "no partner": ({f"{NAME}.lora_up.weight": torch.ones(4, 2)}, "'lora_unet_conv_in.lora_up.weight' has no partner: lora_down is missing"),
    "ranks": (
        {f"{NAME}.lora_up.weight": torch.ones(4, 2, 1, 1), f"{NAME}.lora_down.weight": torch.ones(3, 3, 3, 3)},
        "'lora_unet_conv_in.lora_down.weight' of shape [3, 3, 3, 3] and 'lora_unet_conv_in.lora_up.weight' of shape [4, 2, 1, 1] have no rank in common",
    ),
    "rank 0": (pair(rank=0), "'lora_unet_conv_in.lora_down.weight' of shape [0, 3, 3, 3] and 'lora_unet_conv_in.lora_up.weight' of shape [4, 0, 1, 1] have no rank in common"),
    "kernel": (pair(down=(3, 1, 1)), "'lora_unet_conv_in.lora_up.weight': updates a weight of shape [4, 3, 1, 1], the base's 'conv_in.weight' has [4, 3, 3, 3]"),
    "unknown module": (
        pair("lora_unet_conv_out"),
        "the base has no module that is written 'conv_out'",
    ),
    "near": (pair("lora_unet_conv_inn"), "the base has no module that is written 'conv_inn'; there is 'conv_in'"),
    "unmatched": (pair() | {"x.weight": torch.ones(1)}, "1 of 1 adapted weights are not in the base, for example 'x.weight'; the base has names like 'conv_in.weight'"),
    "bundle": (
        pair() | {"bundle_emb.cat.string_to_param.*": torch.ones(1, 4)},
        "unmatched key 'bundle_emb.cat.string_to_param.*': the LoRA is bundled with an embedding of new tokens, which is no change of the base's weights",
    ),
    "alpha": (pair() | {f"{NAME}.alpha": torch.ones(2)}, "'lora_unet_conv_in.alpha' has shape [2], not one number"),
    "nan": (pair() | {f"{NAME}.alpha": torch.tensor(float("nan"))}, "'lora_unet_conv_in.alpha' holds NaN or Inf"),
    "integers": (
        {key: tensor.int() for key, tensor in pair().items()},
        "'lora_unet_conv_in.lora_down.weight' is of dtype int32, not a float",
    ),
    "both namings": (
        pair("diffusion_model.conv_in") | pair(),
        "'diffusion_model.conv_in' and 'lora_unet_conv_in' both adapt the base's 'conv_in.weight'",
    ),
    "norm": (pair("lora_unet_mid_norm", down=(1,)), "'lora_unet_mid_norm': LoRA of the base's 'mid.norm.weight', whose shape is [4]"),
    "two models": (pair() | pair("lora_te_x"), "adapts 'text_encoder' and other components: the base must be the whole pipeline (a folder with model_index.json), not one model of it"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refusals(case: str, tmp_path: Path) -> None:
    state, reason = BAD[case]
    assert reason == lone(tmp_path, state)


def test_ambiguous_names(tmp_path: Path) -> None:
    base = {"a.b_c.weight": torch.ones(4, 3), "a_b.c.weight": torch.ones(4, 3), "d.weight": torch.ones(4, 3)}
    reason = lone(tmp_path, pair("lora_unet_a_b_c", down=(3,)), base)
    assert reason == "'a_b_c' could be any of the base's modules 'a.b_c', 'a_b.c'"
    path = write(tmp_path, pair("lora_unet_d", down=(3,)))  # what nobody asks for harms nobody
    assert open_lora(path, open_checkpoint(tmp_path / "base.safetensors")).updates[0].name == "d.weight"


def test_ambiguous_prefixes(tmp_path: Path) -> None:
    base = {f"{side}.fc.weight": torch.ones(4, 3) for side in ("text_model", "vision_model")}
    reason = lone(tmp_path, pair("lora_te_fc", down=(3,)), base)
    assert reason == (
        "text_encoder: 'fc' and the others fit the base in several ways: the prefix 'text_model.' is added "
        "('text_model.fc'), or the prefix 'vision_model.' is added ('vision_model.fc'); choose with --prefix text_model. or "
        "--prefix vision_model."
    )


def test_two_denoisers(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    (folder).mkdir()
    parts = ("transformer", "transformer_2")
    (folder / "model_index.json").write_text(
        json.dumps({part: ["diffusers", "WanTransformer3DModel"] for part in parts})
    )
    for part in parts:
        (folder / part).mkdir()
        save_file({"fc.weight": torch.ones(4, 3)}, folder / part / "diffusion_pytorch_model.safetensors")
    path = write(tmp_path, pair("lora_unet_fc", down=(3,)))
    with pytest.raises(SourceError, match="give the folder of one of them as the base"):
        open_lora(path, open_checkpoint(folder))
    assert open_lora(path, open_checkpoint(folder / "transformer")).updates[0].name == "fc.weight"
    missing = write(tmp_path, pair("lora_te_fc", down=(3,)))
    with pytest.raises(
        SourceError, match="adapts the component 'text_encoder', the base has transformer, transformer_2"
    ):
        open_lora(missing, open_checkpoint(folder))


def test_a_single_file_without_the_model(tmp_path: Path) -> None:
    base = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 3, 3, 3)}
    reason = lone(tmp_path, pair("lora_te_fc", down=(3,)), base)
    assert reason.startswith("adapts 'text_encoder', which ")


@pytest.mark.parametrize("alpha", [None, 0.0, 4, 1.0])
def test_alpha(alpha: float | None, tmp_path: Path) -> None:
    """None and 0 are the rank; integers are numbers, too."""
    weight = torch.zeros(4, 3)
    save_file({"fc.weight": weight}, tmp_path / "base.safetensors")
    state = pair("lora_unet_fc", rank=2, down=(3,))
    if alpha is not None:
        state["lora_unet_fc.alpha"] = torch.tensor(alpha)
    found = converted(write(tmp_path, state), tmp_path / "base.safetensors")
    scale = {None: 1.0, 0.0: 1.0, 4: 2.0, 1.0: 0.5}[alpha]
    assert torch.equal(found["fc.weight"], torch.full((4, 3), 2 * scale))


def test_headers_of_strangers(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.zeros(4, 3)}, tmp_path / "base.safetensors")
    header = {"ss_network_dim": "8" * 1000, "ss_network_alpha": "1\n2", "ss_base_model_version": "sdxl_base_v1-0"}
    path = write(tmp_path, pair("lora_unet_fc", down=(3,)), **header, ss_output_name="secret")
    source = open_lora(path, open_checkpoint(tmp_path / "base.safetensors")).source
    assert source == {
        "kind": "lora", "dialect": "kohya", "ranks": [2], "alphas": [2.0], "ss_base_model_version": "sdxl_base_v1-0",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_torch_files(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    save_file({"fc.weight": weight}, tmp_path / "base.safetensors")
    state = {key: tensor.to(dtype) for key, tensor in factors({"lora_unet_fc": nn.Linear(3, 4)}).items()}
    lora = tmp_path / "lora" / "lora.pt"
    lora.parent.mkdir()
    torch.save(state, lora)
    expected = summed({"fc.weight": weight}, state, {"lora_unet_fc": "fc.weight"})
    compare(converted(lora, tmp_path / "base.safetensors"), expected)
    assert [lora] == open_lora(lora.parent, open_checkpoint(tmp_path / "base.safetensors")).files


@pytest.mark.parametrize("prefix", ["diffusion_model.blocks.0.to_q", "lora_transformer_blocks_0_to_q"])
def test_prefixes_of_others(prefix: str, tmp_path: Path) -> None:
    """ComfyUI's, which leaves the dots in the names, and OneTrainer's."""
    save_file({"blocks.0.to_q.weight": torch.zeros(4, 3)}, tmp_path / "base.safetensors")
    found = converted(write(tmp_path, pair(prefix, down=(3,))), tmp_path / "base.safetensors")
    assert torch.equal(found["blocks.0.to_q.weight"], torch.full((4, 3), 2.0))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"{}"])
def test_other_files_are_not_recognised(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    (tmp_path / "x.txt").write_bytes(content)
    assert not any(DIALECTS[name].recognises(tmp_path / file) for name in ("kohya", "lycoris") for file in ("x.bin", "x.txt"))  # fmt: skip
    assert not any(DIALECTS[name].recognises(tmp_path) for name in ("kohya", "lycoris"))
    save_file({"a.weight": torch.ones(1)}, tmp_path / "m.safetensors")
    assert not any(DIALECTS[name].recognises(tmp_path / "m.safetensors") for name in ("kohya", "lycoris"))
    with pytest.raises(SourceError, match="no key is a part of a LoRA"):
        DIALECTS["kohya"].read(tmp_path, open_checkpoint(tmp_path / "m.safetensors"))
