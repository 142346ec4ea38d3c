"""Generated LoRA files: every prefix with every part, alpha, wrapper word and layout of the base, and what each must do.

A combination is described without the package: an oracle in plain torch says what the base's weights become, or the
combination says beforehand that it must be refused. ``python -m tests.lora_grid`` runs all and prints counts.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.errors import SourceError
from shira_format.format import load
from shira_format.live import apply

State = dict[str, torch.Tensor]
# Rows of a module's weight in the base, top to bottom: the base's module, its first row there, the number of rows.
Rows = tuple[tuple[str, int, int], ...]

RANK = 2
D = 8  # rows and columns that split well


# --- Bases -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A module that a LoRA file names.

    Attributes:
        name: its name in the file, with dots.
        rows: where the base has its rows.
    """

    name: str
    rows: Rows


@dataclass(frozen=True)
class Layout:
    """A base, and the modules of it that LoRA files adapt.

    Attributes:
        state: the base's tensors, as an adapter names them.
        targets: by component: "denoiser", "text_encoder", "text_encoder_2".
        single: whether the base is one model, so that any component's prefix means it.
        refused: why a file for this base must be refused, given whether its names are flat; None if it need not.
        option: ``prefix`` of the conversion.
    """

    state: State
    targets: Mapping[str, tuple[Target, ...]]
    single: bool = True
    refused: Callable[[bool], str | None] = lambda _flat: None
    option: str | None = None


def tensors(generator: torch.Generator, shapes: Mapping[str, tuple[int, ...]]) -> State:
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def with_biases(modules: Mapping[str, tuple[int, ...]], without: str = r"(?!)") -> dict[str, tuple[int, ...]]:
    """Shapes of weights and biases."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in modules.items():
        found[f"{name}.weight"] = shape
        if not re.search(without, name):
            found[f"{name}.bias"] = shape[:1]
    return found


PLAIN = {
    "blocks.0.attn1.to_q": (D, 4), "blocks.0.attn1.to_out.0": (4, D), "blocks.1.attn1.to_q": (D, 4),
    "blocks.1.attn1.to_k": (4, 4), "conv_in": (4, 2, 3, 3), "proj_in": (6, 4, 1, 1), "out_norm": (4,),
}  # fmt: skip
TEXT = {
    f"encoder.layers.{layer}.{module}": shape
    for layer in (0, 1)
    for module, shape in {"self_attn.q_proj": (4, 4), "mlp.fc1": (D, 4), "layer_norm1": (4,)}.items()
}


def at(names: Mapping[str, tuple[int, ...]], place: str = "", called: str = "") -> tuple[Target, ...]:
    """Modules that the base has under the prefix ``place`` and the file under ``called``."""
    return tuple(Target(called + name, ((place + name, 0, shape[0]),)) for name, shape in names.items())


def denoiser(state: State, targets: tuple[Target, ...], **options: object) -> Layout:
    return Layout(state, {"denoiser": targets}, **options)  # type: ignore[arg-type]


def prefixed(state: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in state.items()}


def layouts() -> dict[str, Layout]:
    """All bases."""
    made = torch.Generator().manual_seed(5)
    plain, text = with_biases(PLAIN, r"to_out"), with_biases(TEXT)
    found: dict[str, Layout] = {"one model": denoiser(tensors(made, plain), at(PLAIN))}
    found["a prefix more in the base"] = denoiser(tensors(made, prefixed(plain, "net.")), at(PLAIN, "net."))
    found["a prefix less in the base"] = denoiser(tensors(made, plain), at(PLAIN, "", "net."))
    found["another prefix in the base"] = denoiser(
        tensors(made, prefixed(plain, "net.")), at(PLAIN, "net.", "backbone."),
        refused=lambda flat: "no module" if flat else None,
    )  # fmt: skip
    found["other numbers"] = denoiser(
        tensors(made, plain), tuple(Target(one.name.replace("blocks.", "blocks.3"), one.rows) for one in at(PLAIN)),
        refused=lambda flat: "no module" if flat else "are not in the base",
    )  # fmt: skip
    found["a number less"] = denoiser(
        tensors(made, prefixed(plain, "stages.0.")), at(PLAIN, "stages.0."),
        refused=lambda flat: "no module" if flat else "are not in the base",
    )  # fmt: skip
    towers = prefixed(text, "text_model.") | prefixed(text, "vision_model.")
    found["two towers, named"] = denoiser(tensors(made, towers), at(TEXT, "vision_model.", "vision_model."))
    found["two equal towers, not named"] = denoiser(
        tensors(made, towers), at(TEXT, "text_model."), refused=lambda _flat: "fit the base in several ways"
    )
    found["two equal towers, chosen"] = denoiser(
        tensors(made, towers), at(TEXT, "text_model."), option="text_model."
    )
    wide = {name: tuple(2 * length for length in shape) for name, shape in TEXT.items()}
    different = prefixed(text, "text_model.") | prefixed(with_biases(wide), "vision_model.")
    found["two different towers, not named"] = denoiser(tensors(made, different), at(wide, "vision_model."))
    twins = {"a_b.c": (D, 4), "a.b_c": (D, 4), "d": (4, 4)}
    found["flat names that two modules share"] = denoiser(
        tensors(made, with_biases(twins)),
        at(twins),
        refused=lambda flat: "could be any of|are one name" if flat else None,
    )
    words = {"text_model." + name: shape for name, shape in TEXT.items()}
    for kind in ("unet", "transformer"):
        pipeline = (
            prefixed(plain, f"{kind}/")
            | prefixed(text, "text_encoder/")
            | prefixed(text, "text_encoder_2/text_model.")
        )
        found[f"pipeline with a {kind}"] = Layout(
            tensors(made, pipeline),
            {
                "denoiser": at(PLAIN, f"{kind}/"),
                # transformers has saved CLIP with and without this prefix.
                "text_encoder": at(TEXT, "text_encoder/", "text_model."),
                "text_encoder_2": at(words, "text_encoder_2/"),
            },
            single=False,
        )  # fmt: skip
    two = prefixed(plain, "transformer/") | prefixed(plain, "transformer_2/")
    found["pipeline with two denoisers"] = Layout(
        tensors(made, two), {"transformer": at(PLAIN, "transformer/"), "transformer_2": at(PLAIN, "transformer_2/")},
        single=False,
    )  # fmt: skip
    single_file = prefixed(plain, "model.diffusion_model.") | prefixed(
        text, "cond_stage_model.transformer.text_model."
    )
    found["single file"] = Layout(
        tensors(made, single_file),
        {
            "denoiser": at(PLAIN, "model.diffusion_model."),
            "text_encoder": at(words, "cond_stage_model.transformer."),
        },
        single=False,
    )
    return found | models(made)


def models(made: torch.Generator) -> dict[str, Layout]:
    """Bases in the names of one program, and files in those of another; the pairs of names are written here by hand."""
    found: dict[str, Layout] = {}

    def both(name: str, theirs: dict[str, tuple[int, ...]], ours: dict[str, tuple[int, ...]], pairs: dict[str, tuple[str, ...]], without: str = r"(?!)") -> None:  # fmt: skip
        """``pairs``: from a module of the authors to diffusers', top to bottom."""
        split = [
            Target(part, ((module, sum(ours[other][0] for other in parts[:place]), ours[part][0]),))
            for module, parts in pairs.items()
            for place, part in enumerate(parts)
        ]
        joined = [
            Target(module, tuple((part, 0, ours[part][0]) for part in parts)) for module, parts in pairs.items()
        ]
        found[f"{name}, the authors' base"] = denoiser(tensors(made, with_biases(theirs, without)), tuple(split))
        found[f"{name}, diffusers' base"] = denoiser(tensors(made, with_biases(ours, without)), tuple(joined))

    qkv = ("to_q", "to_k", "to_v")
    flux_pairs: dict[str, tuple[str, ...]] = {}
    theirs: dict[str, tuple[int, ...]] = {}
    ours: dict[str, tuple[int, ...]] = {}
    for number in (0, 1):
        double, block = f"double_blocks.{number}", f"transformer_blocks.{number}"
        single, alone = f"single_blocks.{number}", f"single_transformer_blocks.{number}"
        flux_pairs |= {
            f"{double}.img_attn.qkv": tuple(f"{block}.attn.{x}" for x in qkv),
            f"{double}.txt_attn.qkv": tuple(f"{block}.attn.add_{x}_proj" for x in "qkv"),
            f"{double}.img_attn.proj": (f"{block}.attn.to_out.0",),
            f"{double}.txt_mlp.0": (f"{block}.ff_context.net.0.proj",),
            f"{single}.linear1": (*(f"{alone}.attn.{x}" for x in qkv), f"{alone}.proj_mlp"),
            f"{single}.linear2": (f"{alone}.proj_out",),
        }
        theirs |= {
            f"{double}.img_attn.qkv": (12, 4), f"{double}.txt_attn.qkv": (12, 4), f"{double}.img_attn.proj": (4, 4),
            f"{double}.txt_mlp.0": (D, 4), f"{single}.linear1": (20, 4), f"{single}.linear2": (4, 12),
        }  # fmt: skip
        ours |= {name: (4, 4) for parts in flux_pairs.values() for name in parts}
    for name in ours:
        if name.endswith(("proj_mlp", "net.0.proj")):
            ours[name] = (D, 4)
        elif name.endswith(".proj_out"):
            ours[name] = (4, 12)
    both("FLUX", theirs, ours, flux_pairs)
    pairs = {
        f"joint_blocks.{n}.{stream}_block.{theirs}": tuple(f"transformer_blocks.{n}.{part}" for part in parts)
        for n in (0, 1)
        for stream, theirs, parts in (
            ("x", "attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
            ("context", "attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
            ("x", "attn.proj", ("attn.to_out.0",)), ("x", "mlp.fc1", ("ff.net.0.proj",)), ("context", "mlp.fc2", ("ff_context.net.2",)),
        )
    }  # fmt: skip
    sizes: dict[str, tuple[int, ...]] = {
        "attn.qkv": (12, 4),
        "attn.proj": (4, 4),
        "mlp.fc1": (D, 4),
        "mlp.fc2": (4, D),
    }
    theirs = {module: sizes[".".join(module.split(".")[-2:])] for module in pairs}
    ours = {
        part: (theirs[module][0] // len(parts), theirs[module][1])
        for module, parts in pairs.items()
        for part in parts
    }
    both("SD3", theirs, ours, pairs)
    one = {
        f"blocks.{n}.{theirs}": (f"blocks.{n}.{ours}",)
        for n in (0, 1)
        for theirs, ours in {
            "self_attn.q": "attn1.to_q", "self_attn.o": "attn1.to_out.0", "cross_attn.q": "attn2.to_q",
            "cross_attn.k_img": "attn2.add_k_proj", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
        }.items()
    } | {"head.head": ("proj_out",), "patch_embedding": ("patch_embedding",)}  # fmt: skip
    both(
        "Wan",
        {module: _wan(module) for module in one},
        {part: _wan(module) for module, (part,) in one.items()},
        one,
    )
    unet: dict[str, tuple[str, ...]] = {
        "input_blocks.0.0": ("conv_in",), "input_blocks.1.0.in_layers.2": ("down_blocks.0.resnets.0.conv1",),
        "input_blocks.1.1.proj_in": ("down_blocks.0.attentions.0.proj_in",),
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q": ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",),
        "input_blocks.2.0.op": ("down_blocks.0.downsamplers.0.conv",), "input_blocks.3.0.in_layers.2": ("down_blocks.1.resnets.0.conv1",),
        "middle_block.0.in_layers.2": ("mid_block.resnets.0.conv1",), "middle_block.2.out_layers.3": ("mid_block.resnets.1.conv2",),
        "output_blocks.0.0.in_layers.2": ("up_blocks.0.resnets.0.conv1",), "output_blocks.0.1.conv": ("up_blocks.0.upsamplers.0.conv",),
        "output_blocks.1.0.emb_layers.1": ("up_blocks.1.resnets.0.time_emb_proj",), "time_embed.0": ("time_embedding.linear_1",),
        "out.2": ("conv_out",),
    }  # fmt: skip
    linear = ("to_q", "emb_layers.1", "time_embed.0")
    theirs = {module: (D, 4) if module.endswith(linear) else (4, 2, 3, 3) for module in unet}
    both("UNet", theirs, {part: theirs[module] for module, (part,) in unet.items()}, unet)
    llama = {
        f"layers.{n}.{module}": shape
        for n in (0, 1)
        for module, shape in {"self_attn.q_proj": (4, 4), "mlp.gate_proj": (D, 4), "input_layernorm": (4,)}.items()
    }
    state = with_biases(prefixed(llama, "model."), "") | {"lm_head.weight": (D, 4)}
    found["causal LM, named"] = denoiser(
        tensors(made, state), (*at(llama, "model.", "model."), *at({"lm_head": (D, 4)}))
    )
    found["causal LM, its body's names"] = denoiser(tensors(made, state), at(llama, "model."))
    return found


def _wan(module: str) -> tuple[int, ...]:
    return (4, 2, 1, 2, 2) if module == "patch_embedding" else (D, 4) if module.endswith("ffn.0") else (4, D) if module.endswith("ffn.2") else (4, 4)  # fmt: skip


# --- Prefixes of keys ------------------------------------------------------------------------------------------------------

# Component, and whether "." is "_".
PREFIXES = {
    "": ("denoiser", False), "unet.": ("denoiser", False), "transformer.": ("denoiser", False),
    "diffusion_model.": ("denoiser", False), "model.diffusion_model.": ("denoiser", False),
    "base_model.model.": ("denoiser", False), "lora_unet_": ("denoiser", True), "lora_transformer_": ("denoiser", True),
    "lora_prior_unet_": ("denoiser", True), "lycoris_": ("denoiser", True), "prior.": ("denoiser", False),
    "lora_te_": ("text_encoder", True), "lora_te1_": ("text_encoder", True), "text_encoder.": ("text_encoder", False),
    "clip_l.": ("text_encoder", False), "text_encoders.clip_l.transformer.": ("text_encoder", False),
    "lora_te2_": ("text_encoder_2", True), "text_encoder_2.": ("text_encoder_2", False), "clip_g.": ("text_encoder_2", False),
    "transformer_2.": ("transformer_2", False),
}  # fmt: skip


# --- Parts -----------------------------------------------------------------------------------------------------------------

Parts = dict[str, torch.Tensor]
Shape = tuple[int, ...]


def _factors(out: int, inner: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return _random(generator, out, RANK), _random(generator, RANK, inner)


def _random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)


def lora(shape: Shape, generator: torch.Generator) -> Parts | None:
    if len(shape) < 2:
        return None
    return {
        "up": _random(generator, shape[0], RANK, *(1 for _ in shape[2:])),
        "down": _random(generator, RANK, *shape[1:]),
    }


def tucker(shape: Shape, generator: torch.Generator) -> Parts | None:
    if len(shape) < 4 or math.prod(shape[2:]) == 1:
        return lora(shape, generator)
    ones = [1 for _ in shape[2:]]
    return {
        "up": _random(generator, shape[0], RANK, *ones),
        "down": _random(generator, RANK, shape[1], *ones),
        "lora_mid.weight": _random(generator, RANK, RANK, *shape[2:]),
    }


def hada(shape: Shape, generator: torch.Generator) -> Parts | None:
    if len(shape) < 2:
        return None
    columns = math.prod(shape[1:])
    first, second = _factors(shape[0], columns, generator), _factors(shape[0], columns, generator)
    return {"hada_w1_a": first[0], "hada_w1_b": first[1], "hada_w2_a": second[0], "hada_w2_b": second[1]}


def hada_tucker(shape: Shape, generator: torch.Generator) -> Parts | None:
    if len(shape) < 4 or math.prod(shape[2:]) == 1:
        return hada(shape, generator)
    found = {}
    for n in "12":
        found |= {
            f"hada_w{n}_a": _random(generator, RANK, shape[0]),
            f"hada_w{n}_b": _random(generator, RANK, shape[1]),
            f"hada_t{n}": _random(generator, RANK, RANK, *shape[2:]),
        }
    return found


def lokr(first: str, second: str) -> Callable[[Shape, torch.Generator], Parts | None]:
    """``first`` and ``second``: "whole", "split", and for the second "core"."""

    def made(shape: Shape, generator: torch.Generator) -> Parts | None:
        if len(shape) < 2:
            return None
        a, b = 2, 2
        c, d, kernel = shape[0] // a, shape[1] // b, shape[2:]
        found: Parts = {}
        if first == "whole":
            found["lokr_w1"] = _random(generator, a, b)
        else:
            found["lokr_w1_a"], found["lokr_w1_b"] = _factors(a, b, generator)
        if second == "whole":
            found["lokr_w2"] = _random(generator, c, d, *kernel)
        elif second == "core" and len(kernel) > 1 and math.prod(kernel) > 1:
            found["lokr_t2"] = _random(generator, RANK, RANK, *kernel)
            found["lokr_w2_a"], found["lokr_w2_b"] = _random(generator, RANK, c), _random(generator, RANK, d)
        else:
            found["lokr_w2_a"], found["lokr_w2_b"] = _factors(c, d * math.prod(kernel), generator)
        return found

    return made


def diff(shape: Shape, generator: torch.Generator) -> Parts | None:
    return {"diff": _random(generator, *shape)}


def norm(shape: Shape, generator: torch.Generator) -> Parts | None:
    if len(shape) > 1:
        return None
    return {"w_norm": _random(generator, *shape), "b_norm": _random(generator, *shape)}


def whole(shape: Shape, generator: torch.Generator) -> Parts | None:
    return {"weight": _random(generator, *shape)} if len(shape) == 1 else lora(shape, generator)


def set_weight(shape: Shape, generator: torch.Generator) -> Parts | None:
    return {"set_weight": _random(generator, *shape)} if len(shape) == 1 else lora(shape, generator)


def dora(
    inner: Callable[[Shape, torch.Generator], Parts | None], by: str
) -> Callable[[Shape, torch.Generator], Parts | None]:
    """With norms: "out" or "in" as LyCORIS, "vector" as PEFT."""

    def made(shape: Shape, generator: torch.Generator) -> Parts | None:
        if (found := inner(shape, generator)) is None:
            return None
        ones = [1 for _ in shape[2:]]
        sizes = {"out": (shape[0], 1, *ones), "in": (1, shape[1], *ones), "vector": (shape[0],)}
        key = "lora_magnitude_vector" if by == "vector" else "dora_scale"
        return found | {key: 1 + _random(generator, *sizes[by]).abs()}

    return made


def biased(
    inner: Callable[[Shape, torch.Generator], Parts | None], key: str
) -> Callable[[Shape, torch.Generator], Parts | None]:
    """With a change of the bias."""

    def made(shape: Shape, generator: torch.Generator) -> Parts | None:
        found = inner(shape, generator)
        return None if found is None else found | {key: _random(generator, shape[0])}

    return made


def mixed(
    *kinds: Callable[[Shape, torch.Generator], Parts | None],
) -> Callable[[Shape, torch.Generator], Parts | None]:
    """One kind after the other, module by module."""
    turns = itertools.cycle(kinds)
    return lambda shape, generator: next(turns)(shape, generator)


SPELLINGS = {
    "A": ("lora_B.weight", "lora_A.weight"), "down": ("lora_up.weight", "lora_down.weight"),
    "dot": ("lora.up.weight", "lora.down.weight"),
    "linear_layer": ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"), "processor": ("", ""),
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """A kind of parts, and how its factors are spelled."""

    make: Callable[[Shape, torch.Generator], Parts | None]
    spelling: str = "down"


FORMS = {
    **{f"lora, {spelling}": Form(lora, spelling) for spelling in SPELLINGS},
    "tucker": Form(tucker, "down"),
    "hada": Form(hada),
    "hada, tucker": Form(hada_tucker),
    **{
        f"lokr, {first} and {second}": Form(lokr(first, second))
        for first in ("whole", "split")
        for second in ("whole", "split", "core")
    },
    "diff": Form(diff),
    "norm and lora": Form(lambda shape, generator: norm(shape, generator) or lora(shape, generator)),
    "whole weights and lora": Form(whole),
    "whole weights and A": Form(whole, "A"),
    "set_weight and lora": Form(set_weight),
    **{
        f"{name}, dora by {by}": Form(dora(make, by), spelling)
        for name, make, spelling in (("lora", lora, "down"), ("A", lora, "A"), ("hada", hada, "down"), ("lokr", lokr("whole", "split"), "down"))
        for by in ("out", "in")
    },
    "A with a magnitude vector": Form(dora(lora, "vector"), "A"),
    "A with a bias": Form(biased(lora, "lora_B.bias"), "A"),
    "lora with diff_b": Form(biased(lora, "diff_b")),
    "A with diff_b": Form(biased(lora, "diff_b"), "A"),
    "hada with diff_b": Form(biased(hada, "diff_b")),
    "lora, hada and lokr": Form(mixed(lora, hada, lokr("split", "whole"))),
    "A and diff": Form(mixed(lora, diff), "A"),
}  # fmt: skip

ALPHAS: dict[str, Callable[[], torch.Tensor] | None] = {
    "none": None, "rank": lambda: torch.tensor(float(RANK)), "other": lambda: torch.tensor(1.5), "zero": lambda: torch.tensor(0.0),
    "bf16": lambda: torch.tensor(3.0, dtype=torch.bfloat16), "int": lambda: torch.tensor(4), "of one element": lambda: torch.tensor([0.5]),
    "some": lambda: torch.tensor(1.0),
}  # fmt: skip
WRAPPERS = (
    "none",
    "module, in front",
    "_orig_mod, in front",
    "_fsdp_wrapped_module, between",
    "adapter's name",
    "both",
)
DEFECTS = {
    "a partner is missing": "partner|without|missing|no rank|nothing",
    "another shape": "shape|do not fit|have no rank in common|not have the shape|ranks|in several ways",
    "not a number": "NaN or Inf",
    "an unknown part": "unmatched key",
    "a module too many": "no module|not in the base|lacks|in several ways",
    "a part twice": "same part|no such part|both|in several ways|no partner",
    "integers": "not a float",
}


# --- Combinations ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Combination:
    """One file, one base."""

    layout: str
    prefixes: tuple[str, ...]
    form: str
    alpha: str = "none"
    wrapper: str = "none"
    defect: str = ""
    seed: int = 0

    @property
    def is_flat(self) -> bool:
        return any(PREFIXES[prefix][1] for prefix in self.prefixes)


@dataclass
class Module:
    """An adapted module, before it is written.

    Attributes:
        prefix: of its keys.
        name: with dots.
        rows: where the base has it.
        shape: of its weight.
        parts: by canonical name: "up", "down", and the others by their names in files.
        alpha: if the file has one.
    """

    prefix: str
    name: str
    rows: Rows
    shape: Shape
    parts: Parts
    alpha: torch.Tensor | None = None


@dataclass
class Case:
    """A combination made concrete.

    Attributes:
        keys: the file.
        expected: the base's tensors afterwards; None if the file must be refused.
        reasons: regexes, of which one must be found in the message.
    """

    keys: State
    expected: State | None
    reasons: list[str]


_PARTS_OF_LYCORIS = re.compile(r"hada_|lokr_|lora_mid|diff|w_norm|b_norm|dora_scale|set_weight")


def make(combination: Combination, layout: Layout) -> Case:
    """The file, and what must come of it."""
    generator = torch.Generator().manual_seed(combination.seed)
    chooser = random.Random(combination.seed)
    reasons: list[str] = []
    modules: list[Module] = []
    form = FORMS[combination.form]
    if layout.single and len({PREFIXES[prefix][0] for prefix in combination.prefixes}) > 1:
        reasons.append("must be the whole pipeline")
    for prefix in combination.prefixes:
        targets = layout.targets["denoiser"] if layout.single else _targets(layout, prefix, reasons)
        for target in targets:
            shape = _shape(target, layout.state)
            parts = form.make(shape, generator)
            if parts is None:
                continue
            if f"{target.rows[0][0]}.bias" not in layout.state:
                parts = {
                    part: tensor
                    for part, tensor in parts.items()
                    if part not in ("lora_B.bias", "diff_b", "b_norm")
                }
            modules.append(Module(prefix, target.name, target.rows, shape, parts))
    _add_alphas(modules, combination.alpha)
    if reason := layout.refused(combination.is_flat):
        reasons.append(reason)
    rule = _scale_rule(combination, modules, reasons)
    _check_alone(modules, layout, reasons)
    spelled = {id(module): _spelled(module, form.spelling, combination.wrapper) for module in modules}
    expected = dict(layout.state)
    if not reasons:
        for module in modules:
            _apply(module, rule, layout.state, expected)
    keys = {key: tensor for found in spelled.values() for key, tensor in found.items()}
    has_factors = any({"up", "hada_w1_a", "lokr_w1", "lokr_w1_a"} & module.parts.keys() for module in modules)
    if combination.defect and (has_factors or combination.defect != "a partner is missing"):
        _damage(combination.defect, modules, spelled, keys, chooser)
        reasons = [*reasons, DEFECTS[combination.defect], "known dialect|be converted"]
    return Case(keys, None if reasons else expected, reasons)


def _targets(layout: Layout, prefix: str, reasons: list[str]) -> tuple[Target, ...]:
    component, _ = PREFIXES[prefix]
    names = [name for name in layout.targets if name.startswith("transformer")]
    if names:  # two denoisers: only diffusers' own prefixes say which
        if prefix.removesuffix(".") in names:
            return layout.targets[prefix.removesuffix(".")]
        reasons.append("two denoisers|adapts the component")
        return layout.targets[names[0]]
    if component not in layout.targets:
        reasons.append("adapts|lacks")
        return layout.targets["denoiser"]
    bases = {name.partition("/")[0] for name in layout.state if "/" in name}
    if prefix in ("unet.", "transformer.", "prior.") and bases and prefix.removesuffix(".") not in bases:
        reasons.append("adapts the component")
    return layout.targets[component]


def _shape(target: Target, state: State) -> Shape:
    rows = [state[f"{module}.weight"][start : start + count] for module, start, count in target.rows]
    return tuple(torch.cat(rows).shape)


def _add_alphas(modules: list[Module], kind: str) -> None:
    make_alpha = ALPHAS[kind]
    if make_alpha is None:
        return
    scaled = [module for module in modules if not {"diff", "w_norm", "weight", "set_weight"} & module.parts.keys()]
    for place, module in enumerate(scaled):
        if kind != "some" or place == 0:
            module.alpha = make_alpha()


def _scale_rule(combination: Combination, modules: list[Module], reasons: list[str]) -> str:
    """Whose rule scales: "kohya" (alpha is the rank if it is missing or 0) or "diffusers" (the scale is 1 if it is missing)."""
    form = FORMS[combination.form]
    flux = any(module.name.startswith(("double_blocks", "single_blocks")) for module in modules)
    for module in modules:  # as PEFT writes its LoHa and LoKr, with the scale elsewhere
        of_peft = any(part.startswith(("hada_", "lokr_")) for part in module.parts) or (
            form.spelling == "A" and module.parts.keys() & {"up", "down", "lora_magnitude_vector", "lora_B.bias"}
        )
        if module.prefix == "base_model.model." and of_peft and module.alpha is None and not flux:
            reasons.append("adapter_config.json")
    parts = {part for module in modules for part in module.parts}
    low_rank = [module for module in modules if "down" in module.parts]
    if any(_PARTS_OF_LYCORIS.match(part) for part in parts) or combination.is_flat:
        return "kohya"
    if form.spelling == "down":
        return "kohya"
    named = any(prefix not in ("", "base_model.model.") or (prefix and flux) for prefix in combination.prefixes)
    if form.spelling == "A" and not named:
        if not all(module.alpha is not None for module in low_rank):
            reasons.append("adapter_config.json")
        return "kohya"
    with_alpha = [module.alpha is not None for module in low_rank]
    if any(with_alpha) and not all(with_alpha):
        reasons.append("alpha")
    if combination.alpha == "zero":
        reasons.append("alpha")
    return "diffusers"


def _check_alone(modules: list[Module], layout: Layout, reasons: list[str]) -> None:
    """What cannot be decided, or has no place, in a base that holds a module in parts."""
    for module in modules:
        scale = module.parts.get("dora_scale")
        name, start, count = module.rows[0]
        is_whole = len(module.rows) == 1 and layout.state[f"{name}.weight"].shape[0] == count and not start
        if scale is not None and scale.shape[0] == 1 and not is_whole:
            reasons.append("DoRA by columns")


def delta(parts: Parts, shape: Shape, alpha: torch.Tensor | None, rule: str) -> torch.Tensor | None:
    """The change of a weight by its parts, dense, in float64."""
    number = None if alpha is None else float(alpha.reshape(-1)[0])

    def scale(rank: int) -> float:
        if rule == "kohya":
            return (number or rank) / rank
        return 1.0 if number is None else number / rank

    def dense(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(shape)

    if "up" in parts:
        up, down = parts["up"], parts["down"]
        if "lora_mid.weight" in parts:
            up, down = up.flatten(1), down.flatten(1)
            return scale(len(down)) * torch.einsum("ij...,oi,jc->oc...", parts["lora_mid.weight"], up, down)
        return scale(len(down)) * dense(up, down)
    if "hada_w1_a" in parts:
        halves = []
        for n in "12":
            a, b = parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"]
            core = parts.get(f"hada_t{n}")
            halves.append(dense(a, b) if core is None else torch.einsum("ij...,io,jc->oc...", core, a, b))
        return scale(len(parts["hada_w1_b"])) * halves[0] * halves[1]
    if any(part.startswith("lokr") for part in parts):
        ranks = [len(parts[part]) for part in ("lokr_w1_b", "lokr_w2_b") if part in parts]
        first = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        c, d = shape[0] // len(first), shape[1] // first.shape[1]
        if "lokr_w2" in parts:
            second = parts["lokr_w2"]
        elif "lokr_t2" in parts:
            second = torch.einsum("ij...,io,jc->oc...", parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
        else:
            second = parts["lokr_w2_a"] @ parts["lokr_w2_b"]
        second = second.reshape(c, d, -1)
        product = torch.einsum("ab,cdk->acbdk", first, second).reshape(shape)
        return product * (scale(ranks[0]) if ranks else 1.0)
    return parts.get("diff", parts.get("w_norm"))


def _apply(module: Module, rule: str, base: State, expected: State) -> None:
    """Change the tensors that the module's rows are in."""
    parts = module.parts

    def rows_of(kind: str) -> torch.Tensor:
        return torch.cat([base[f"{name}.{kind}"][start : start + count] for name, start, count in module.rows])

    def put(kind: str, tensor: torch.Tensor) -> None:
        done = 0
        for name, start, count in module.rows:
            whole = expected[f"{name}.{kind}"].clone()
            whole[start : start + count] = tensor[done : done + count]
            expected[f"{name}.{kind}"] = whole
            done += count

    weight = rows_of("weight")
    for part in ("weight", "set_weight"):
        if part in parts:
            put("weight", parts[part])
    change = delta(parts, module.shape, module.alpha, rule)
    if change is not None:
        tuned = weight + change
        if "dora_scale" in parts or "lora_magnitude_vector" in parts:
            magnitude = parts.get("dora_scale", parts.get("lora_magnitude_vector"))
            assert magnitude is not None
            if magnitude.ndim == 1 or magnitude.shape[0] == len(tuned) != 1:
                norms = tuned.flatten(1).norm(dim=1).reshape(-1, *(1 for _ in module.shape[1:]))
                tuned = magnitude.reshape(norms.shape) * tuned / norms
            else:
                norms = tuned.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *(1 for _ in module.shape[2:]))
                tuned = magnitude * tuned / norms
        put("weight", tuned)
    if "lora_B.bias" in parts:
        scale = delta({"up": torch.eye(RANK, dtype=torch.float64), "down": torch.eye(RANK, dtype=torch.float64)}, (RANK, RANK), module.alpha, rule)  # fmt: skip
        assert scale is not None
        put("bias", rows_of("bias") + scale[0, 0] * parts["lora_B.bias"])
    for part in ("diff_b", "b_norm"):
        if part in parts:
            put("bias", rows_of("bias") + parts[part])


_PROCESSORS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
_OF_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def _spelled(module: Module, spelling: str, wrapper: str) -> State:
    """The module's tensors by their keys."""
    is_flat = PREFIXES[module.prefix][1]
    words = module.name.split(".")
    if " in front" in wrapper or wrapper == "both":
        words = [wrapper.partition(",")[0] if wrapper != "both" else "_orig_mod", *words]
    elif "between" in wrapper and len(words) > 1:
        words = [words[0], wrapper.partition(",")[0], *words[1:]]
    stem = module.prefix + ("_" if is_flat else ".").join(words).replace(".", "_" if is_flat else ".")
    adapter = ".default" if wrapper in ("adapter's name", "both") else ""
    found: State = {}
    if module.alpha is not None:
        found[f"{stem}.alpha"] = module.alpha
    for part, tensor in module.parts.items():
        if part in ("up", "down"):
            found[_factor_key(stem, part, spelling, adapter, is_flat=is_flat)] = tensor
        elif part == "lora_magnitude_vector":
            found[f"{stem}.{part}{adapter}"] = tensor
        elif part == "lora_B.bias":
            found[f"{stem}.lora_B{adapter}.bias"] = tensor
        else:
            found[f"{stem}.{part}"] = tensor
    return found


def _factor_key(stem: str, part: str, spelling: str, adapter: str, *, is_flat: bool) -> str:
    if spelling == "processor":
        for module, word in (_OF_TEXT if stem.startswith("text_encoder") else _PROCESSORS).items():
            if not is_flat and stem.endswith(f".{module}"):
                return f"{stem.removesuffix(module)}processor.{word}_lora.{part}.weight"
        spelling = "dot"
    key = SPELLINGS[spelling][part == "down"]
    if spelling == "A":
        key = key.replace(".weight", f"{adapter}.weight")
    return f"{stem}.{key}"


def _damage(
    defect: str, modules: list[Module], spelled: Mapping[int, State], keys: State, chooser: random.Random
) -> None:
    """Change one module's keys so that the file is wrong."""
    able = [module for module in modules if {"up", "hada_w1_a"} & module.parts.keys()] or modules
    module = chooser.choice(able)
    own = {key: tensor for key, tensor in spelled[id(module)].items() if not key.endswith(".alpha")}
    key = next(
        (key for key in own if re.search(r"(?:up|lora_B(?:\.default)?)\.weight$|_w[12]_[ab]$|_w[12]$|diff$", key)),
        next(iter(own)),
    )
    if defect == "a partner is missing":
        del keys[key]
    elif defect == "another shape":
        keys[key] = torch.cat([keys[key], keys[key][:1]], 0)
    elif defect == "not a number":
        keys[key] = keys[key].clone().fill_(torch.nan)
    elif defect == "integers":
        keys[key] = keys[key].to(torch.int32)
    elif defect == "an unknown part":
        keys[f"{_stem(key)}.lora_mad.weight"] = keys[key]
    elif defect == "a part twice":
        other = "lora_up.weight" if "lora_B" in key else "lora_B.weight"
        keys[f"{_stem(key)}.{other}"] = keys[key].clone()
    elif defect == "a module too many":
        stem = _stem(key)
        for old in spelled[id(module)]:
            if old.startswith(stem):
                keys[old.replace(stem, f"{stem}_and_more")] = keys[old].clone()


def _stem(key: str) -> str:
    match = re.match(
        r"(.+?)(?:\.processor\.\w+_lora)?\.(?:lora_[ABudm]|lora\.|lora_linear_layer|hada_|lokr_|(?:diff|diff_b|[wb]_norm|dora_scale|"
        r"weight|set_weight|alpha)\Z)", key,
    )  # fmt: skip
    assert match is not None
    return match[1]


# --- Running ---------------------------------------------------------------------------------------------------------------


def combinations(seed: int = 0) -> Iterator[Combination]:
    """All: every layout with every prefix and every form, each with an alpha, wrapper words and a defect chosen by the seed."""
    chooser = random.Random(seed)
    several = (
        ("lora_unet_", "lora_te1_", "lora_te2_"), ("lora_unet_", "lora_te_"), ("unet.", "text_encoder."),
        ("transformer.", "text_encoder.", "text_encoder_2."), ("diffusion_model.", "clip_l."), ("lora_transformer_", "lora_te1_"),
        ("transformer.", "transformer_2."),
    )  # fmt: skip
    for name in layouts():
        for prefixes in (*((prefix,) for prefix in PREFIXES), *several):
            for form in FORMS:
                defect = chooser.choice([*DEFECTS]) if chooser.random() < 0.15 else ""
                yield Combination(
                    name, prefixes, form, chooser.choice([*ALPHAS]), chooser.choice(WRAPPERS), defect, chooser.randrange(1 << 30)
                )  # fmt: skip


def save_base(layout: Layout, folder: Path) -> Path:
    """A file, or the folder of a pipeline."""
    folder.mkdir()
    components: dict[str, State] = {}
    for name, tensor in layout.state.items():
        component, slash, inner = name.partition("/")
        components.setdefault(component if slash else "", {})[inner if slash else name] = tensor
    if "" in components:
        save_file(components[""], folder / "model.safetensors")
        return folder / "model.safetensors"
    index: dict[str, object] = {"_class_name": "SomePipeline"}
    for component, state in components.items():
        text = component.startswith("text")
        index[component] = ["transformers", "CLIPTextModel"] if text else ["diffusers", "SomeModel"]
        (folder / component).mkdir()
        save_file(
            state, folder / component / ("model.safetensors" if text else "diffusion_pytorch_model.safetensors")
        )
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


class Grid:
    """Runs combinations in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._layouts = layouts()
        self._bases = {
            name: open_checkpoint(save_base(layout, folder / f"base {place}"))
            for place, (name, layout) in enumerate(self._layouts.items())
        }
        self.counts: Counter[str] = Counter()

    def run(self, combination: Combination) -> str | None:
        """What is wrong with a combination; None if it does what it must."""
        layout = self._layouts[combination.layout]
        case = make(combination, layout)
        lora, out = self._folder / "lora.safetensors", self._folder / "adapter.st"
        save_file({key: tensor.clone() for key, tensor in case.keys.items()}, lora)
        out.unlink(missing_ok=True)
        try:
            lora_to_shira(lora, self._bases[combination.layout], out, density=1.0, prefix=layout.option, threads=1)
        except SourceError as error:
            self.counts["refused"] += 1
            message = str(error)
            if case.expected is not None:
                return f"refused: {message}"
            if out.exists():
                return "refused, and something was written"
            if not re.search("|".join(case.reasons), message):
                return f"refused for another reason than {case.reasons}: {message}"
            return None if lora.name in message else f"the message does not name the file: {message}"
        if case.expected is None:
            return f"converted, and should have been refused: {case.reasons}"
        self.counts["equal"] += 1
        weights = {name: tensor.clone() for name, tensor in layout.state.items()}
        apply(load(out), weights)
        if weights.keys() != case.expected.keys():
            return f"other tensors: {sorted(weights.keys() ^ case.expected.keys())[:3]}"
        for name, tensor in case.expected.items():
            if not torch.allclose(weights[name], tensor, rtol=1e-9, atol=1e-9):
                return f"{name} differs by {(weights[name] - tensor).abs().max():.3g} of {(tensor - layout.state[name]).abs().max():.3g}"
        return None


def main(step: int = 1, seed: int = 0) -> None:
    """Print what is wrong, and counts."""
    with tempfile.TemporaryDirectory() as folder:
        grid = Grid(Path(folder))
        wrong = total = 0
        for combination in itertools.islice(combinations(seed), 0, None, step):
            total += 1
            if (fault := grid.run(combination)) is not None:
                wrong += 1
                sys.stdout.write(f"{combination}\n    {fault}\n")
        sys.stdout.write(
            f"{total} combinations: {grid.counts['equal']} equal, {grid.counts['refused']} refused, {wrong} wrong\n"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
