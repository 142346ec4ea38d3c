"""The files that trainers and loaders write, rebuilt by the names of their keys: each is converted exactly, or refused by name.

OneTrainer (``modules/modelSaver/mixin/LoRASaverMixin.py``) writes a LoRA in six formats, for each of its models and kinds of
adapters; diffusers reads what other trainers write (``diffusers/loaders/lora_conversion_utils.py``).
"""

from __future__ import annotations

import math
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.loaders import lora_conversion_utils as peers
from safetensors.torch import save_file

from shira_format.convert import lora_to_shira
from shira_format.errors import SourceError
from shira_format.format import load
from shira_format.live import apply
from tests.lora_grid import Parts, delta, hada, lora
from tests.shira_format.test_names_models import CASES, other_spaces, shapes_of

State = dict[str, torch.Tensor]
RANK = 2


def randn(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Model:
    """A tiny model in diffusers' names and in those of its authors."""

    def __init__(self, name: str) -> None:
        self.case = CASES[name]
        generator = torch.Generator().manual_seed(1)
        shapes = shapes_of(self.case)
        self.ours: State = {key: randn(generator, *shape) for key, shape in shapes.items()}
        located = other_spaces(self.case, shapes)
        self.theirs: State = {}
        for key, location in located.items():
            whole = torch.empty(location.shape, dtype=torch.float64)
            for block in location.blocks:
                row = block.start
                for start, stop in block.rows:
                    whole[start:stop] = self.ours[block.name][row : row + stop - start]
                    row += stop - start
            self.theirs[key] = whole
        # Tensors of which there is no table; diffusers' conversion needs them, and LoRAs have none.
        self.more = self.case.more(self.ours)
        assert all(torch.equal(tensor, self.ours[key]) for key, tensor in self.in_diffusers(self.theirs).items())

    def in_diffusers(self, theirs: State) -> State:
        """The authors' tensors by diffusers' own conversion."""
        return self.case.convert(
            {**theirs, **{key: tensor for key, tensor in self.more.items() if key not in theirs}}
        )


_MODELS: dict[str, Model] = {}


def model_of(name: str) -> Model:
    if name not in _MODELS:
        _MODELS[name] = Model(name)
    return _MODELS[name]


def converted(keys: State, base: State, folder: Path) -> State:
    """The base's weights after the conversion."""
    folder.mkdir(exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in base.items()}, folder / "base.safetensors")
    save_file({key: tensor.clone().contiguous() for key, tensor in keys.items()}, folder / "lora.safetensors")
    lora_to_shira(
        folder / "lora.safetensors", folder / "base.safetensors", folder / "x.st", density=1.0, threads=1
    )
    weights = {key: tensor.clone() for key, tensor in base.items()}
    apply(load(folder / "x.st"), weights)
    return weights


def assert_close(found: State, expected: State, base: State | None = None) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(
            found[key], tensor, rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
        )
    if base is not None:
        assert any(not torch.equal(found[key], base[key]) for key in expected)


# --- OneTrainer ------------------------------------------------------------------------------------------------------------


def lokr(shape: tuple[int, ...], generator: torch.Generator) -> Parts:
    """A whole first factor, and a second in two."""
    a, b = (2 if length % 2 == 0 else 1 for length in shape[:2])
    rest = (shape[1] // b) * math.prod(shape[2:])
    return {
        "lokr_w1": randn(generator, a, b),
        "lokr_w2_a": randn(generator, shape[0] // a, RANK), "lokr_w2_b": randn(generator, RANK, rest),
    }  # fmt: skip


KINDS: dict[str, Callable[[tuple[int, ...], torch.Generator], Parts | None]] = {
    "LoRA": lora, "DoRA": lora, "DoRA on outputs": lora, "LoHa": hada, "LoKr": lokr,
}  # fmt: skip
# Prefix, whether "." is "_", whose names the modules have, the factors' spelling, whether alpha is folded into a factor.
FORMATS = {
    "diffusers": ("transformer.", False, "ours", ("lora_B.weight", "lora_A.weight"), True),
    "kohya": ("lora_unet_", True, "theirs", ("lora_up.weight", "lora_down.weight"), False),
    "legacy": ("lora_transformer_", True, "ours", ("lora_up.weight", "lora_down.weight"), False),
    "original": ("", False, "theirs", ("lora_B.weight", "lora_A.weight"), False),
    "comfy": ("diffusion_model.", False, "theirs", ("lora_B.weight", "lora_A.weight"), False),
    "internal": ("transformer.", False, "ours", ("lora_up.weight", "lora_down.weight"), False),
}
TRAINED = (
    "SD 3", "SD 3.5", "FLUX.2", "Z-Image", "Sana", "Krea 2", "Cosmos Predict 2", "Wan, text to video", "Wan, image to video",
    "AuraFlow", "LTX-Video",
)  # fmt: skip


def some_modules(state: State, count: int, seed: int, wanted: str = "") -> list[str]:
    """Modules with a weight that OneTrainer adapts: linear layers and convolutions."""
    found = [
        key.removesuffix(".weight")
        for key, tensor in state.items()
        if key.endswith(".weight") and tensor.ndim > 1 and re.search(wanted, key)
    ]
    return random.Random(seed).sample(found, min(count, len(found)))


def written(
    kind: str, form: str, modules: list[str], state: State, generator: torch.Generator
) -> tuple[State, dict[str, torch.Tensor]]:
    """A file of OneTrainer, and the weights that it stands for."""
    prefix, is_flat, _, (up, down), folded = FORMATS[form]
    keys, tuned = {}, {}
    for module in modules:
        weight = state[f"{module}.weight"]
        parts = KINDS[kind](tuple(weight.shape), generator)
        assert parts is not None
        alpha = torch.tensor(1.5)
        merged = weight + delta(parts, tuple(weight.shape), alpha, "kohya")  # type: ignore[operator]
        stem = prefix + (module.replace(".", "_") if is_flat else module)
        if kind.startswith("DoRA"):
            on_outputs = kind.endswith("outputs")
            kept = 0 if on_outputs else 1
            magnitude = 1 + randn(generator, *(n if i == kept else 1 for i, n in enumerate(weight.shape))).abs()
            norms = merged.transpose(0, kept).flatten(1).norm(dim=1).reshape(magnitude.shape)
            merged = magnitude * merged / norms
            if form == "diffusers" and on_outputs:
                keys[f"{stem}.lora_magnitude_vector.weight"] = magnitude.reshape(-1)
            else:
                keys[f"{stem}.dora_scale"] = magnitude
        tuned[f"{module}.weight"] = merged
        if "up" in parts:
            scale = 1.5 / RANK if folded else 1.0
            keys |= {f"{stem}.{up}": parts["up"] * scale, f"{stem}.{down}": parts["down"]}
        else:
            keys |= {f"{stem}.{part}": tensor for part, tensor in parts.items()}
        if not folded or "up" not in parts:
            keys[f"{stem}.alpha"] = alpha
    return keys, tuned


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", TRAINED)
def test_formats_of_onetrainer(name: str, form: str, tmp_path: Path) -> None:
    model = model_of(name)
    space = FORMATS[form][2]
    own = model.ours if space == "ours" else model.theirs
    for number, kind in enumerate(KINDS):
        generator = torch.Generator().manual_seed(number)
        modules = some_modules(own, 8, number)
        keys, tuned = written(kind, form, modules, own, generator)
        expected = own | tuned
        assert_close(converted(keys, own, tmp_path), expected, own)
        other = model.theirs if space == "ours" else model.ours
        try:
            found = converted(keys, other, tmp_path)
        except SourceError as error:
            # A column's norm is that of all its rows, which the other space has in parts or within others.
            if kind == "DoRA" and "DoRA by columns" in str(error):
                continue
            raise
        if space == "ours":
            assert_close(model.in_diffusers(found), expected)
        else:
            assert_close(found, model.in_diffusers(expected))


# --- Converters of diffusers -----------------------------------------------------------------------------------------------


def linear(state: State, wanted: str) -> list[str]:
    return [
        key.removesuffix(".weight")
        for key, tensor in state.items()
        if key.endswith(".weight") and tensor.ndim == 2 and re.search(wanted, key)
    ]


def lora_file(
    modules: list[str], state: State, prefix: str, spelling: tuple[str, str], *, alpha: float | None, is_flat: bool = False,
    diff_b: bool = False,
) -> State:  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    keys: State = {}
    for module in modules:
        rows, columns = state[f"{module}.weight"].shape
        stem = prefix + (module.replace(".", "_") if is_flat else module)
        keys[f"{stem}.{spelling[0]}.weight"] = randn(generator, rows, RANK)
        keys[f"{stem}.{spelling[1]}.weight"] = randn(generator, RANK, columns)
        if alpha is not None:
            keys[f"{stem}.alpha"] = torch.tensor(alpha)
        if diff_b and f"{module}.bias" in state:
            keys[f"{stem}.diff_b"] = randn(generator, rows)
    return keys


def _cloned(keys: State) -> State:
    """Some converters scale in place."""
    return {key: tensor.clone() for key, tensor in keys.items()}


def by_peer(keys: State, convert: Callable[[State], State], base: State) -> State:
    """The base with what diffusers reads from a file: PEFT's factors, whose scale it takes to be 1."""
    read = {key.removeprefix("transformer."): tensor for key, tensor in convert(_cloned(keys)).items()}
    expected = {key: tensor.clone() for key, tensor in base.items()}
    for key, a in read.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            expected[f"{module}.weight"] += read[f"{module}.lora_B.weight"] @ a
        elif key.endswith(".lora_B.bias"):
            expected[f"{key.removesuffix('.lora_B.bias')}.bias"] += a
        else:
            assert key.endswith(".lora_B.weight"), key
    return expected


def flux2_of_fal(keys: State) -> State:
    """Its pipeline changes the prefix first."""
    return peers._convert_non_diffusers_flux2_lora_to_diffusers(
        {key.replace("base_model.model.", "diffusion_model."): tensor for key, tensor in keys.items()}
    )


AB, DOWN = ("lora_B", "lora_A"), ("lora_up", "lora_down")
WAN_BLOCKS = r"\Ablocks\.\d+\.(?:self_attn|cross_attn|ffn)\.(?:[qkvo]|[kv]_img|0|2)\.weight"
# Of FLUX.2's last modulation, diffusers exchanges the halves when it converts a checkpoint, but not in a LoRA: there it is wrong.
# Model, converter, modules by their authors' names, prefix, flat, spelling, alpha, biases.
READ = {
    "Wan, A and B": ("Wan, text to video", peers._convert_non_diffusers_wan_lora_to_diffusers, WAN_BLOCKS, "diffusion_model.", False, AB, None, False),
    "Wan, down and up": ("Wan, text to video", peers._convert_non_diffusers_wan_lora_to_diffusers, WAN_BLOCKS, "diffusion_model.", False, DOWN, None, True),
    "Wan, with alpha": ("Wan, text to video", peers._convert_non_diffusers_wan_lora_to_diffusers, WAN_BLOCKS, "diffusion_model.", False, DOWN, 1.0, True),
    "Wan, images": ("Wan, image to video", peers._convert_non_diffusers_wan_lora_to_diffusers, WAN_BLOCKS, "diffusion_model.", False, DOWN, 4.0, False),
    "Wan, ends": ("Wan, text to video", peers._convert_non_diffusers_wan_lora_to_diffusers, WAN_BLOCKS + r"|\A(?:time|text)_embedding|\Atime_projection|\Ahead\.head", "diffusion_model.", False, AB, None, False),
    "musubi's Wan": ("Wan, text to video", peers._convert_musubi_wan_lora_to_diffusers, WAN_BLOCKS, "lora_unet_", True, DOWN, 1.0, False),
    "musubi's Wan, images": ("Wan, image to video", peers._convert_musubi_wan_lora_to_diffusers, WAN_BLOCKS, "lora_unet_", True, DOWN, 1.0, False),
    "LTX": ("LTX-Video", peers._convert_non_diffusers_ltxv_lora_to_diffusers, r"transformer_blocks", "diffusion_model.", False, AB, None, False),
    "LTX 2": ("LTX-2", peers._convert_non_diffusers_ltx2_lora_to_diffusers, r"transformer_blocks|adaln_single|patchify_proj", "diffusion_model.", False, AB, None, False),
    "Z-Image": ("Z-Image", peers._convert_non_diffusers_z_image_lora_to_diffusers, r"feed_forward|adaLN_modulation\.0|attention\.out", "diffusion_model.", False, DOWN, 1.0, False),
    "FLUX.2": ("FLUX.2", peers._convert_non_diffusers_flux2_lora_to_diffusers, r"(?:double|single)_blocks|_in\.|stream_modulation", "diffusion_model.", False, AB, None, False),
    "FLUX.2, fal": ("FLUX.2", flux2_of_fal, r"(?:double|single)_blocks", "base_model.model.", False, AB, None, False),
    "FLUX.2, kohya": ("FLUX.2", peers._convert_kohya_flux2_lora_to_diffusers, r"(?:double|single)_blocks", "lora_unet_", True, DOWN, 1.0, False),
    "Krea 2": ("Krea 2", peers._convert_non_diffusers_krea2_lora_to_diffusers, r"blocks", "diffusion_model.", False, AB, None, False),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_what_diffusers_reads(name: str, tmp_path: Path) -> None:
    model_name, convert, wanted, prefix, is_flat, spelling, alpha, diff_b = READ[name]
    model = model_of(model_name)
    modules = linear(model.theirs, wanted)
    assert len(modules) > 3
    keys = lora_file(modules, model.theirs, prefix, spelling, alpha=alpha, is_flat=is_flat, diff_b=diff_b)
    expected = by_peer(keys, convert, model.ours)
    assert_close(converted(keys, model.ours, tmp_path), expected, model.ours)
    assert_close(model.in_diffusers(converted(keys, model.theirs, tmp_path)), expected)


# --- Models with diffusers' names alone --------------------------------------------------------------------------------------

TINY = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
OWN: dict[str, tuple[str, dict[str, object]]] = {
    "Qwen-Image": ("QwenImageTransformer2DModel", TINY | {"in_channels": 4, "out_channels": 4, "joint_attention_dim": 6, "axes_dims_rope": (2, 2, 4)}),
    "FLUX": ("FluxTransformer2DModel", TINY | {"num_single_layers": 2, "in_channels": 4, "joint_attention_dim": 6, "pooled_projection_dim": 5, "guidance_embeds": True}),
    "Chroma": ("ChromaTransformer2DModel", TINY | {"num_single_layers": 2, "in_channels": 4, "joint_attention_dim": 6, "approximator_layers": 2, "approximator_num_channels": 8, "approximator_hidden_dim": 8}),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", TINY | {"num_single_layers": 2, "num_refiner_layers": 1, "in_channels": 4, "text_embed_dim": 6, "pooled_projection_dim": 5}),
    "PixArt": ("PixArtTransformer2DModel", TINY | {"in_channels": 4, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 6, "sample_size": 8}),
}  # fmt: skip


def own_state(name: str) -> State:
    cls, options = OWN[name]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(diffusers, cls)(**options)
    generator = torch.Generator().manual_seed(2)
    return {key: randn(generator, *tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", OWN)
def test_formats_with_names_of_diffusers(name: str, form: str, tmp_path: Path) -> None:
    base = own_state(name)
    for number, kind in enumerate(KINDS):
        generator = torch.Generator().manual_seed(number)
        keys, tuned = written(kind, form, some_modules(base, 8, number), base, generator)
        assert_close(converted(keys, base, tmp_path), base | tuned, base)


@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model.", "lora_unet_"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lightning(prefix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Qwen-Image Lightning: factors and an alpha of 1 in bf16, no prefix; as diffusers reads it."""
    base = own_state("Qwen-Image")
    keys = lora_file(
        linear(base, "transformer_blocks"), base, prefix, DOWN, alpha=1.0, is_flat=prefix == "lora_unet_"
    )
    keys = {key: tensor.to(dtype) for key, tensor in keys.items()}
    wide = {key: tensor.double() for key, tensor in keys.items()}
    named = {
        key if prefix == "lora_unet_" else key.removeprefix("transformer."): tensor for key, tensor in wide.items()
    }
    expected = by_peer(named, peers._convert_non_diffusers_qwen_lora_to_diffusers, base)
    found = converted(keys, base, tmp_path)
    for key, tensor in expected.items():  # our update of factors that are no float64 is in float32
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5)


def test_norms_and_biases_of_wan(tmp_path: Path) -> None:
    """LoRAs that ComfyUI extracts have norms and modulations as ``diff``, and biases as ``diff_b``."""
    model = model_of("Wan, text to video")
    generator = torch.Generator().manual_seed(6)
    keys = lora_file(
        linear(model.theirs, WAN_BLOCKS), model.theirs, "diffusion_model.", DOWN, alpha=None, diff_b=True
    )
    expected = {key: tensor.clone() for key, tensor in model.theirs.items()}
    for module in linear(model.theirs, WAN_BLOCKS):
        stem = f"diffusion_model.{module}"
        expected[f"{module}.weight"] += keys[f"{stem}.lora_up.weight"] @ keys[f"{stem}.lora_down.weight"]
        expected[f"{module}.bias"] += keys[f"{stem}.diff_b"]
    for name in (
        "blocks.0.self_attn.norm_q.weight",
        "blocks.1.norm3.weight",
        "blocks.0.modulation",
        "head.modulation",
    ):
        change = randn(generator, *model.theirs[name].shape)
        keys[f"diffusion_model.{name.removesuffix('.weight')}.diff"] = change
        expected[name] = expected[name] + change
    change = randn(generator, *model.theirs["blocks.1.norm3.bias"].shape)
    keys["diffusion_model.blocks.1.norm3.diff_b"] = change
    expected["blocks.1.norm3.bias"] = expected["blocks.1.norm3.bias"] + change
    assert_close(converted(keys, model.theirs, tmp_path), expected, model.theirs)
    assert_close(converted(keys, model.ours, tmp_path), model.in_diffusers(expected), model.ours)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("PixArt", "blocks.0.attn.qkv"), ("Qwen-Image", "blocks.0.attn.qkv"), ("FLUX", "transformer.single_blocks.0.attn.qkv_proj"),
        ("Qwen-Image", "transformer_blocks.7.attn.to_q"), ("HunyuanVideo", "double_blocks.2.img_attn_qkv"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["kohya", "comfy"])
def test_modules_that_the_base_has_not(name: str, module: str, form: str, tmp_path: Path) -> None:
    base = own_state(name)
    keys, _ = written("LoRA", form, [module], {f"{module}.weight": torch.zeros(48, 16)}, torch.Generator())
    with pytest.raises(
        SourceError,
        match=r"lora\.safetensors.*(?:are not in the base|no module).*"
        + re.escape(module.replace(".", "_") if form == "kohya" else module),
    ):
        converted(keys, base, tmp_path)
