"""diffusers' LoRAs, against what diffusers itself makes of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shira_format._core.arrays import Array
from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.errors import SourceError
from shira_format.format import load
from shira_format.lora import DIALECTS, open_lora
from shira_format.lora.peft.config import read_scales
from tests import pipelines
from tests.pipelines import base_weights, check, fused

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "conv_in", "proj_in", "proj_out", "time_emb_proj"]


class Saved:
    """A pipeline, and the folder that it is saved in."""

    def __init__(self, pipe: Any, folder: Path) -> None:
        self.pipe, self.folder = pipe, folder
        pipe.save_pretrained(folder)


@pytest.fixture(scope="module", params=["sd", "sdxl", "flux"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(getattr(pipelines, request.param)(), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(pipelines.sd(), tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(pipelines.sdxl(), tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(pipelines.flux(), tmp_path_factory.mktemp("flux"))


def trained(pipe: Any, configs: dict[str, LoraConfig], seed: int = 0) -> Any:
    """A copy of ``pipe`` whose models have LoRAs of random numbers."""
    pipe = copy.deepcopy(pipe)
    torch.manual_seed(seed)
    for component, config in configs.items():
        model = getattr(pipe, component)
        if component.startswith("text_encoder"):  # whose own method, transformers', refuses some versions of PEFT
            inject_adapter_in_model(config, model)
        else:
            model.add_adapter(config)
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.data *= 1 + torch.rand_like(parameter)
            elif "lora_" in name:
                parameter.data = torch.randn_like(parameter) / 3
    return pipe


def save(pipe: Any, components: Any, folder: Path, *, metadata: bool = True, **options: Any) -> Path:
    """By diffusers' own ``save_lora_weights``."""
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(getattr(pipe, part)) for part in components}
    headers = _collate_lora_metadata({part: getattr(pipe, part) for part in components}) if metadata else {}
    assert bool(headers) is metadata
    pipe.save_lora_weights(folder, **layers, **headers, **options)
    return folder


def by_diffusers(saved: Saved, lora: Path) -> dict[str, Array]:
    return fused(saved.pipe, lambda pipe: pipe.load_lora_weights(lora))


def convert(saved: Saved, lora: Path, out: Path, expected: dict[str, Array]) -> None:
    check(lora, saved.folder, out, base_weights(saved.pipe), expected)


def factors(
    saved: Saved, modules: dict[str, int], *, seed: int = 5
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """``down`` and ``up`` of random numbers for modules ``COMPONENT.NAME`` of a pipeline, of these ranks."""
    torch.manual_seed(seed)
    found = {}
    for module, rank in modules.items():
        component, _, name = module.partition(".")
        shape = getattr(saved.pipe, component).get_parameter(f"{name}.weight").shape
        kernel = (1,) * (len(shape) - 2)
        found[module] = (torch.randn(rank, *shape[1:]) / 3, torch.randn(shape[0], rank, *kernel) / 3)
    return found


BLOCK = "unet.down_blocks.1.attentions.0.transformer_blocks.0"


# What diffusers saves.


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "dora": {"r": 3, "lora_alpha": 5, "use_dora": True},
    "bias": {"r": 3, "lora_alpha": 5, "lora_bias": True},
    "patterns": {
        "r": 3, "lora_alpha": 5, "rank_pattern": {"to_k": 2, ".*0.*to_v": 4},
        "alpha_pattern": {"to_k": 7, ".*0.attn.*to_q": 1.5},
    },
}  # fmt: skip


def config_of(component: str, case: str) -> LoraConfig:
    targets = {
        "unet": [*ATTENTION, *CONVOLUTIONS],
        "transformer": [*ATTENTION, "add_q_proj", "to_add_out", "proj_mlp", "norm.linear", "x_embedder"],
    }.get(component, TEXT)
    if case == "bias":  # PEFT merges a bias into layers that have one
        targets = ["to_out.0", "conv1"] if component == "unet" else targets
    options = CONFIGS[case]
    if case == "patterns" and targets is TEXT:
        options = {
            "r": 3, "lora_alpha": 5, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"layers.1.self_attn.v_proj": 2},
        }  # fmt: skip
    return LoraConfig(target_modules=targets, **options)


@pytest.mark.filterwarnings("ignore:.*have invalid shape:peft.utils.warning.PeftWarning")  # a bias is no matrix
@pytest.mark.parametrize("case", CONFIGS)
def test_saved_with_its_options(saved: Saved, case: str, tmp_path: Path) -> None:
    components = [part for part, _ in pipelines.models(saved.pipe)]
    pipe = trained(saved.pipe, {part: config_of(part, case) for part in components})
    save(pipe, components, tmp_path)
    expected = by_diffusers(saved, tmp_path)
    merged = fused(pipe, lambda pipe: None)
    for name, array in expected.items():  # diffusers loads what was trained
        np.testing.assert_allclose(array, merged[name], rtol=1e-9, atol=1e-12)
    convert(saved, tmp_path, tmp_path / "out.st", expected)
    source = load(tmp_path / "out.st").manifest["source"]
    assert source["dialect"] == "diffusers"
    assert source["options"]["text_encoder"]["lora_alpha"] == 5
    assert source["options"]["text_encoder"].get("use_dora", False) is (case == "dora")
    assert source["ranks"] == ([1, 2, 3, 4] if case == "patterns" else [3])


@pytest.mark.parametrize("safe", [True, False])
def test_saved_without_options(saved: Saved, safe: bool, tmp_path: Path) -> None:
    components = [part for part, _ in pipelines.models(saved.pipe)]
    pipe = trained(saved.pipe, {part: config_of(part, "plain") for part in components})
    save(pipe, components, tmp_path, metadata=False, safe_serialization=safe)
    assert (tmp_path / "pytorch_lora_weights.bin").exists() is not safe
    convert(saved, tmp_path, tmp_path / "out.st", by_diffusers(saved, tmp_path))


def test_options_of_some_components_only(sdxl: Saved, tmp_path: Path) -> None:
    """diffusers itself cannot load it."""
    targets = {"unet": ATTENTION, "text_encoder": TEXT}
    pipe = trained(
        sdxl.pipe, {part: LoraConfig(r=8, lora_alpha=3, target_modules=t) for part, t in targets.items()}
    )
    save(pipe, ["unet"], tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    text = {f"text_encoder.{k}": t for k, t in get_peft_model_state_dict(pipe.text_encoder).items()}
    save_file(load_file(path) | text, path, header)
    with pytest.raises(ValueError, match="target_modules"):
        by_diffusers(sdxl, tmp_path)
    with pytest.raises(SourceError, match="the scale of text_encoder is unknown"):
        open_lora(tmp_path, open_checkpoint(sdxl.folder))


def test_a_lone_model_saves_its_own(sd: Saved, tmp_path: Path) -> None:
    """No component in keys or options; the base is the model, or the pipeline."""
    pipe = trained(sd.pipe, {"unet": config_of("unet", "patterns")})
    pipe.unet.save_lora_adapter(tmp_path)

    def load_lora(pipe: Any) -> None:
        pipe.unet.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)

    expected = fused(sd.pipe, load_lora)
    convert(sd, tmp_path, tmp_path / "out.st", expected)
    lora_to_shira(tmp_path, sd.folder / "unet", tmp_path / "alone.st")
    lora_to_shira(tmp_path, sd.folder, tmp_path / "inside.st")
    alone, inside = load(tmp_path / "alone.st"), load(tmp_path / "inside.st")
    assert {f"unet/{name}" for name in alone} == set(inside)
    assert all((alone[name].values == inside[f"unet/{name}"].values).all() for name in alone)


def test_a_lone_component_as_base(sd: Saved, tmp_path: Path) -> None:
    pipe = trained(sd.pipe, {"text_encoder": config_of("text_encoder", "rslora")})
    save(pipe, ["text_encoder"], tmp_path)
    lora_to_shira(tmp_path, sd.folder / "text_encoder", tmp_path / "out.st")
    lora_to_shira(tmp_path, sd.folder, tmp_path / "pipe.st")
    assert {f"text_encoder/{name}" for name in load(tmp_path / "out.st")} == set(load(tmp_path / "pipe.st"))


# Ranks and alphas.


@pytest.mark.parametrize("first", [2, 8])
def test_ranks_that_differ_without_alpha(flux: Saved, first: int, tmp_path: Path) -> None:
    """Each layer's scale is 1, whichever comes first; one alpha for all once made it a quarter, or four times."""
    block = "transformer.transformer_blocks.0.attn"
    other = 10 - first
    made = factors(flux, {f"{block}.to_q": first, f"{block}.to_k": other, f"{block}.to_v": other})
    state = {}
    for module, (down, up) in made.items():
        state |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    save_file(state, tmp_path / "mixed.safetensors")
    expected = by_diffusers(flux, tmp_path / "mixed.safetensors")
    before = base_weights(flux.pipe)
    for module, (down, up) in made.items():  # lest diffusers changes its mind again
        name = f"{module.replace('.', '/', 1)}.weight"
        np.testing.assert_allclose(
            expected[name] - before[name], (up.double() @ down.double()).numpy(), atol=1e-12
        )
    convert(flux, tmp_path / "mixed.safetensors", tmp_path / "out.st", expected)
    assert load(tmp_path / "out.st").manifest["source"]["ranks"] == [2, 8]


def test_alphas_in_keys(flux: Saved, tmp_path: Path) -> None:
    block = "transformer.single_transformer_blocks.1"
    made = factors(flux, {f"{block}.attn.to_q": 2, f"{block}.proj_out": 4, f"{block}.norm.linear": 4})
    state = {}
    for alpha, (module, (down, up)) in enumerate(made.items(), 3):
        state |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        state[f"{module}.alpha"] = torch.tensor(float(alpha))
    path = tmp_path / "alphas.safetensors"
    save_file(state, path)
    convert(flux, path, tmp_path / "out.st", by_diffusers(flux, path))
    assert load(tmp_path / "out.st").manifest["source"]["alphas"] == [3, 4, 5]
    del state[f"{block}.proj_out.alpha"]
    save_file(state, path)
    with pytest.raises(SourceError, match=r"alphas\.safetensors: .*proj_out\.lora_A\.weight.* has no alpha"):
        open_lora(path, open_checkpoint(flux.folder))


# What diffusers saved in 2023.


def old_keys(saved: Saved, style: str) -> dict[str, torch.Tensor]:
    """A UNet's attention, and a text encoder's."""
    state = {}
    projections = {f"{BLOCK}.{attn}.{name}": 4 for attn in ("attn1", "attn2") for name in ATTENTION}
    for module, (down, up) in factors(saved, projections).items():
        head, _, name = module.removesuffix(".0").rpartition(".")
        key = {
            "processors": f"{head}.processor.{name}_lora",
            "layers": f"{head}.processor.{name}.lora" if name != "to_out" else f"{module}.lora",
        }[style]
        state |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    layer = "text_encoder.encoder.layers.0"
    attention = {f"{layer}.self_attn.{name}": 4 for name in TEXT[:4]}
    for module, (down, up) in factors(saved, attention).items():
        name = module.replace("text_encoder.", "text_encoder.text_model.")
        if style == "processors":
            for new, old in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
                name = name.replace(new, f"{old}_lora")
        else:
            name += ".lora_linear_layer"
        state |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    return state


@pytest.mark.parametrize("style", ["processors", "layers"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_old_keys(sd: Saved, style: str, suffix: str, tmp_path: Path) -> None:
    state = old_keys(sd, style)
    path = tmp_path / f"pytorch_lora_weights{suffix}"
    if suffix == ".bin":
        torch.save(state, path)
    else:
        save_file(state, path)
    convert(sd, tmp_path, tmp_path / "out.st", by_diffusers(sd, tmp_path))


def test_old_keys_without_a_component(sd: Saved, tmp_path: Path) -> None:
    """Attention processors of the first DreamBooth LoRAs."""
    state = {k.removeprefix("unet."): t for k, t in old_keys(sd, "processors").items() if k.startswith("unet.")}
    torch.save(state, tmp_path / "pytorch_lora_weights.bin")
    # Today's diffusers needs the prefix.
    expected = fused(sd.pipe, lambda pipe: pipe.load_lora_weights({f"unet.{k}": t for k, t in state.items()}))
    convert(sd, tmp_path, tmp_path / "out.st", expected)


def test_convolutions_of_old_keys(sd: Saved, tmp_path: Path) -> None:
    made = factors(
        sd, {f"unet.down_blocks.1.resnets.0.{name}": 2 for name in ("conv1", "conv_shortcut", "time_emb_proj")}
    )
    state = {}
    for module, (down, up) in made.items():
        state |= {f"{module}.lora.down.weight": down, f"{module}.lora.up.weight": up}
    save_file(state, tmp_path / "any name.safetensors")
    convert(
        sd,
        tmp_path / "any name.safetensors",
        tmp_path / "out.st",
        by_diffusers(sd, tmp_path / "any name.safetensors"),
    )


# FLUX in other keys.


@pytest.mark.parametrize("prefix", ["diffusion_model.", "base_model.model."])
def test_names_of_the_authors_of_flux(flux: Saved, prefix: str, tmp_path: Path) -> None:
    """The same updates, in fused projections."""
    shape = {name: tuple(t.shape) for name, t in flux.pipe.transformer.state_dict().items()}
    width = shape["transformer_blocks.0.attn.to_q.weight"][0]
    qkv = {"img_attn.qkv": ["to_q", "to_k", "to_v"], "txt_attn.qkv": ["add_q_proj", "add_k_proj", "add_v_proj"]}
    original, ours = {}, {}
    torch.manual_seed(4)
    for module, names in qkv.items():
        down, up, bias = torch.randn(5, width), torch.randn(3 * width, 5), torch.randn(3 * width)
        key = f"{prefix}double_blocks.1.{module}"
        original |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.lora_B.bias": bias}
        for name, rows, more in zip(names, up.chunk(3), bias.chunk(3), strict=True):
            key = f"transformer.transformer_blocks.1.attn.{name}"
            ours |= {f"{key}.lora_A.weight": down.clone(), f"{key}.lora_B.weight": rows.clone()}
            ours[f"{key}.lora_B.bias"] = more.clone()
    save_file(original, tmp_path / "original.safetensors")
    expected = fused(flux.pipe, lambda pipe: pipe.load_lora_weights(ours))
    convert(flux, tmp_path / "original.safetensors", tmp_path / "out.st", expected)
    original[f"{prefix}double_blocks.1.img_attn.qkv.lora_B.weight"] = torch.randn(3 * width - 1, 5)
    save_file(original, tmp_path / "original.safetensors")
    with pytest.raises(
        SourceError,
        match=r"updates a weight of shape \[47, 16\], the base's .*to_q.weight, .*to_k.weight, .*to_v.weight' has \[48, 16\]",
    ):
        open_lora(tmp_path / "original.safetensors", open_checkpoint(flux.folder))


def test_prefix_of_comfyui(flux: Saved, tmp_path: Path) -> None:
    """Where the names behind it are the base's, it stands for the transformer."""
    made = factors(flux, {"transformer.transformer_blocks.0.ff.net.2": 2})
    ((down, up),) = made.values()
    key = "transformer_blocks.0.ff.net.2"
    save_file({f"diffusion_model.{key}.lora_A.weight": down, f"diffusion_model.{key}.lora_B.weight": up}, tmp_path / "a.safetensors")  # fmt: skip
    ours = {f"transformer.{key}.lora_A.weight": down, f"transformer.{key}.lora_B.weight": up}
    convert(
        flux,
        tmp_path / "a.safetensors",
        tmp_path / "out.st",
        fused(flux.pipe, lambda pipe: pipe.load_lora_weights(ours)),
    )
    save_file({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": down, "diffusion_model.blocks.0.self_attn.q.lora_B.weight": up}, tmp_path / "wan.safetensors")  # fmt: skip
    with pytest.raises(SourceError, match=r"wan\.safetensors: transformer: .*'blocks\.0\.self_attn\.q\.weight'"):
        open_lora(tmp_path / "wan.safetensors", open_checkpoint(flux.folder))


# Recognition.


def test_whose_file_it_is(sd: Saved, tmp_path: Path) -> None:
    tensors = {f"model.layers.0.q_proj.lora_{f}.weight": torch.ones(1, 1) for f in "AB"}

    def recognised(name: str, state: dict[str, torch.Tensor], header: dict[str, str] | None = None) -> list[str]:
        save_file(state, tmp_path / name, header)
        return [dialect.name for dialect in DIALECTS.values() if dialect.recognises(tmp_path / name)]

    assert recognised("x.safetensors", tensors) == []  # a PEFT file that lost its configuration
    assert recognised("x.safetensors", tensors, {"lora_adapter_metadata": "{}"}) == ["diffusers"]
    assert recognised("pytorch_lora_weights.safetensors", tensors) == ["diffusers"]
    assert recognised("y.safetensors", {f"base_model.model.{k}": t for k, t in tensors.items()}) == []
    assert recognised("y.safetensors", {f"transformer.{k}": t for k, t in tensors.items()}) == ["diffusers"]
    assert recognised("y.safetensors", {f"unet.{k}": t for k, t in tensors.items()} | {"a.lora_down.weight": torch.ones(1)}) != ["diffusers"]  # fmt: skip
    assert recognised("y.safetensors", {"unet.a.alpha": torch.ones(1)}) == []
    (tmp_path / "bad.bin").write_bytes(b"no pickle")
    assert not DIALECTS["diffusers"].recognises(tmp_path / "bad.bin")
    (tmp_path / "text.txt").write_text("no tensors")
    assert not DIALECTS["diffusers"].recognises(tmp_path / "text.txt")
    with pytest.raises(SourceError, match="no LoRA of diffusers: need one file that ends in"):
        DIALECTS["diffusers"].read(tmp_path / "text.txt", open_checkpoint(sd.folder))


def test_which_file_of_a_folder(sd: Saved, tmp_path: Path) -> None:
    base = open_checkpoint(sd.folder)
    ((down, up),) = factors(sd, {f"{BLOCK}.attn1.to_q": 2}).values()
    state = {f"{BLOCK}.attn1.to_q.lora_A.weight": down, f"{BLOCK}.attn1.to_q.lora_B.weight": up}
    for name in ("a.safetensors", "b.safetensors"):
        save_file(state, tmp_path / name)
    assert not DIALECTS["diffusers"].recognises(tmp_path)
    with pytest.raises(SourceError, match=r"several files \(a\.safetensors, b\.safetensors\)"):
        open_lora(tmp_path, base, dialect="diffusers")
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    assert [path.name for path in open_lora(tmp_path, base).files] == ["pytorch_lora_weights.safetensors"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SourceError, match="no LoRA of diffusers"):
        open_lora(empty, base, dialect="diffusers")


# Refusals.


TO_Q = f"{BLOCK}.attn1.to_q"


@pytest.fixture(scope="module")
def good(sd: Saved) -> dict[str, torch.Tensor]:
    ((down, up),) = factors(sd, {TO_Q: 2}).values()
    return {f"{TO_Q}.lora_A.weight": down, f"{TO_Q}.lora_B.weight": up}


def options(**more: Any) -> dict[str, str]:
    values = {"r": 2, "lora_alpha": 4} | more
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in values.items()})}


Change = Callable[[dict[str, torch.Tensor]], None]


def rename(old: str, new: str) -> Change:
    def change(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if old in key]:
            state[key.replace(old, new)] = state.pop(key)

    return change


REFUSED: dict[str, tuple[Change, dict[str, str] | None, str]] = {
    "unmatched key": (lambda s: s.update({"unet.conv_in.running_mean": torch.ones(4)}), None, r"unmatched key 'unet\.conv_in\.running_mean'"),
    "no such module": (rename("to_q", "to_x"), None, r"unet: 1 of 1 adapted weights are not in the base.*to_x\.weight"),
    "no partner": (lambda s: s.pop(f"{TO_Q}.lora_A.weight"), None, r"to_q\.lora_B\.weight' has no partner"),
    "alpha alone": (lambda s: s.update({f"{BLOCK}.attn1.to_k.alpha": torch.ones(())}), None, r"to_k\.alpha' has no partner"),
    "no such component": (rename("unet.", "text_encoder_2."), None, r"adapts the component 'text_encoder_2', the base has text_encoder, unet"),
    "wrong shape": (lambda s: s.update({f"{TO_Q}.lora_B.weight": torch.ones(5, 2)}), None, r"to_q\.lora_B\.weight': updates a weight of shape \[5, 8\].*has \[8, 8\]"),
    "ranks differ": (lambda s: s.update({f"{TO_Q}.lora_B.weight": torch.ones(8, 3)}), None, r"to_q\.lora_A\.weight' of shape \[2, 8\].* no rank in common"),
    "rank 0": (lambda s: s.update({f"{TO_Q}.lora_A.weight": torch.ones(0, 8), f"{TO_Q}.lora_B.weight": torch.ones(8, 0)}), None, "no rank in common"),
    "a number as factor": (lambda s: s.update({f"{TO_Q}.lora_A.weight": torch.ones(())}), None, "no rank in common"),
    "NaN": (lambda s: s.update({f"{TO_Q}.lora_B.weight": torch.full((8, 2), torch.nan)}), None, r"to_q\.lora_B\.weight' holds NaN"),
    "integers": (lambda s: s.update({f"{TO_Q}.lora_B.weight": torch.ones(8, 2, dtype=torch.int32)}), None, "not a float"),
    "twice": (lambda s: s.update({f"{BLOCK}.attn1.processor.to_q_lora.up.weight": torch.ones(8, 2)}), None, "are the same part of one LoRA"),
    "alpha of two numbers": (lambda s: s.update({f"{TO_Q}.alpha": torch.ones(2)}), None, r"to_q\.alpha' has shape \[2\]"),
    "rank against options": (lambda s: None, options(r=3), r"to_q\.lora_A\.weight' has shape \[2, 8\], and should have rank 3"),
    "options are no JSON": (lambda s: None, {"lora_adapter_metadata": "{"}, "lora_adapter_metadata: unreadable JSON"),
    "options without rank": (lambda s: None, options(r=None), r"lora_adapter_metadata of unet: r and lora_alpha must be numbers"),
    "options of others": (lambda s: None, {"lora_adapter_metadata": '{"r": 2, "lora_alpha": 2}'}, "the scale of unet is unknown"),
    "another kind": (lambda s: None, options(peft_type="LOKR"), "not a LoRA"),
    "experts": (lambda s: None, options(target_parameters=["x"]), "target_parameters is set"),
    "pissa": (lambda s: None, options(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4' changed the base"),
    "bad pattern": (lambda s: None, options(rank_pattern={"(": 2}), r"lora_adapter_metadata of unet: rank_pattern '\('"),
    "options and alpha": (lambda s: s.update({f"{TO_Q}.alpha": torch.ones(())}), options(), "has keys of alphas as well"),
    "bias without option": (lambda s: s.update({f"{TO_Q}.lora_B.bias": torch.ones(8)}), options(), r"to_q\.lora_B\.bias': lora_bias is not set"),
    "bias of a layer without": (lambda s: s.update({f"{TO_Q}.lora_B.bias": torch.ones(8)}), None, r"to_q\.lora_B\.bias': the base has no 'unet/.*to_q\.bias'"),
    "dora without option": (lambda s: s.update({f"{TO_Q}.lora_magnitude_vector": torch.ones(8)}), options(), "use_dora is not set"),
    "dora without magnitude": (lambda s: None, options(use_dora=True), r"to_q\.lora_A\.weight' has no lora_magnitude_vector"),
    "bias that was not saved": (lambda s: None, options(lora_bias=True), r"to_q\.lora_A\.weight' has no lora_bias, and lora_bias is set"),
    "dora of another size": (lambda s: s.update({f"{TO_Q}.lora_magnitude_vector": torch.ones(7)}), None, r"magnitude_vector' has shape \[7\], not one number for each of 8 rows"),
    "dora and bias": (lambda s: s.update({f"{TO_Q}.lora_magnitude_vector": torch.ones(8), f"{TO_Q}.lora_B.bias": torch.ones(8)}), None, "DoRA with a bias"),
    "nothing": (lambda s: s.clear(), None, "it holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(sd: Saved, good: dict[str, torch.Tensor], case: str, tmp_path: Path) -> None:
    change, header, message = REFUSED[case]
    path = tmp_path / "pytorch_lora_weights.safetensors"
    state = {key: tensor.clone() for key, tensor in good.items()}
    save_file(state, path, options())
    open_lora(path, open_checkpoint(sd.folder), dialect="diffusers")
    change(state)
    save_file(state, path, header)
    with pytest.raises(SourceError, match=message) as error:
        open_lora(path, open_checkpoint(sd.folder), dialect="diffusers")
    assert str(error.value).startswith(str(path))


def test_a_pipeline_without_a_denoiser(flux: Saved, sdxl: Saved, tmp_path: Path) -> None:
    state = {f"x.y.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"}
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    base = open_checkpoint(sdxl.folder)
    base.components = ("text_encoder", "text_encoder_2")  # type: ignore[misc]
    with pytest.raises(SourceError, match="neither unet nor transformer nor prior"):
        open_lora(tmp_path, base)


def test_several_components_need_the_pipeline(sd: Saved, tmp_path: Path) -> None:
    save_file(old_keys(sd, "layers"), tmp_path / "a.safetensors")
    with pytest.raises(SourceError, match="the base must be the whole pipeline"):
        open_lora(tmp_path, open_checkpoint(sd.folder / "unet"))


def test_bias_of_another_size(sd: Saved, tmp_path: Path) -> None:
    module = f"{BLOCK}.attn1.to_out.0"
    ((down, up),) = factors(sd, {module: 2}).values()
    state = {
        f"{module}.lora_A.weight": down,
        f"{module}.lora_B.weight": up,
        f"{module}.lora_B.bias": torch.ones(9),
    }
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(SourceError, match=r"to_out\.0\.lora_B\.bias' has shape \[9\], the base's .* \[8\]"):
        open_lora(tmp_path, open_checkpoint(sd.folder))


# PEFT's rules for scales.


def test_scales() -> None:
    config = {
        "r": 4, "lora_alpha": 6, "use_rslora": False, "rank_pattern": {"b.q": 2, "q": 3, "^c.k": 5},
        "alpha_pattern": {"q": 12}, "other": None,
    }  # fmt: skip
    scales = read_scales(config, "x")
    assert [scales.rank(name) for name in ("a.q", "b.q", "a.b.q", "bb.q", "c.k", "a.c.k", "xq")] == [
        3,
        2,
        2,
        3,
        5,
        4,
        4,
    ]
    assert (scales.scale("a.q"), scales.scale("a.v")) == (4.0, 1.5)
    assert read_scales(config | {"use_rslora": True}, "x").scale("v") == 3.0
    for bad in ({"r": 0}, {"r": True}, {"r": 2.0}, {"lora_alpha": float("nan")}, {"lora_alpha": "4"},
                {"rank_pattern": []}, {"rank_pattern": ["q"]}, {"rank_pattern": {"q": 1.5}}, {"alpha_pattern": {"q": None}}):  # fmt: skip
        if bad == {"rank_pattern": []}:
            assert read_scales(config | bad, "x").rank("b.q") == 4
            continue
        with pytest.raises(SourceError, match="^x: "):
            read_scales(config | bad, "x")
    with pytest.raises(SourceError, match=r"^x: alpha_pattern '\['"):
        read_scales(config | {"alpha_pattern": {"[": 1}}, "x").scale("q")
