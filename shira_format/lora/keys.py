"""Keys of LoRA files taken apart: the component of a pipeline, the module in it, and the part of the module's LoRA.

The three are independent of each other: any prefix may stand before any module, and any part behind it. Words of wrappers
and names of adapters are left out of keys before (:mod:`shira_format.lora.files`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple, TypeVar

from shira_format.errors import SourceError

DOWN, UP, MID, ALPHA, BIAS = "lora_down", "lora_up", "lora_mid", "alpha", "lora_bias"
MAGNITUDE, DORA = "lora_magnitude_vector", "dora_scale"
# A tensor of the model itself; that of a bias or another tensor than a weight has the whole name as its module.
WHOLE = "weight"


class Key(NamedTuple):
    """A parsed key.

    Attributes:
        prefix: what stands for a component of a pipeline, without its separator: ``unet``, ``lora_te1``; "" if nothing does.
        module: its name in the component, with "." or "_" between the parts.
        part: its canonical name, such as ``lora_down``.
        is_flat: whether "." is "_" in the module, as kohya and LyCORIS write it.
        style: whose spelling of the part it is: ``peft`` (lora_A), ``kohya`` (lora_down), ``diffusers`` (lora.down, to_q_lora),
            ``xlabs``, ``lycoris``, or "" for what several programs write.
    """

    prefix: str
    module: str
    part: str
    is_flat: bool = False
    style: str = ""


# lora_transformer is OneTrainer's, lycoris that of LyCORIS' wrapper for any model, oft_unet that of kohya's OFT.
FLAT = re.compile(
    r"(?P<prefix>lora_(?:unet|transformer|prior_unet|prior_te|prior|te[123]?)|oft_unet|lycoris)_(?P<module>[^.]+)"
)
# Of diffusers' pipelines; of ComfyUI, which other trainers adopted; of PEFT; of OneTrainer and ComfyUI for text encoders.
_DOTTED = re.compile(
    r"(?P<prefix>unet|transformer(?:_2|_3|_ref)?|text_encoder(?:_[2-9])?|prior|connectors|controlnet"
    r"|(?:model\.)?diffusion_model|base_model\.model"
    r"|(?:text_encoders\.)?(?:clip_[lg]|t5(?:xxl)?)(?:\.transformer)?)\.(?P<module>.+)"
)

# Spelling of a part at the end of a key, its canonical name, and whose spelling it is.
_PARTS = {
    "lora_down.weight": (DOWN, "kohya"), "lora_up.weight": (UP, "kohya"), "lora_mid.weight": (MID, "lycoris"),
    "lora_A.weight": (DOWN, "peft"), "lora_B.weight": (UP, "peft"), "lora_B.bias": (BIAS, "peft"),
    "lora.down.weight": (DOWN, "diffusers"), "lora.up.weight": (UP, "diffusers"), "lora.alpha": (ALPHA, "diffusers"),
    "lora_linear_layer.down.weight": (DOWN, "diffusers"), "lora_linear_layer.up.weight": (UP, "diffusers"),
    "lora_linear_layer.alpha": (ALPHA, "diffusers"),
    "lora_magnitude_vector.weight": (MAGNITUDE, "peft"), "lora_magnitude_vector": (MAGNITUDE, "peft"),
    "alpha": (ALPHA, ""), DORA: (DORA, "lycoris"), "scalar": ("scalar", "lycoris"),
} | {
    part: (part, "lycoris")
    for part in (
        "diff", "diff_b", "w_norm", "b_norm", "reshape_weight", "hada_w1_a", "hada_w1_b", "hada_w2_a",
        "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1",
        "lokr_t2", "oft_blocks", "oft_diag", "rescale", "on_input", "a1.weight", "a2.weight", "b1.weight", "b2.weight",
        "bm1.weight", "bm2.weight", "lambda_layer", "q_layer.weight", "p_layer.weight", "bias_indices", "bias_values",
        "bias_size",
    )
} | {"weight": (WHOLE, ""), "set_weight": (WHOLE, "lycoris"), "bias": (WHOLE, ""), "scale": (WHOLE, "")}  # fmt: skip

# LoRAs as attention processors (diffusers, 2023), named by the adapted projection; and those of XLabs' FLUX.
_PROCESSOR = re.compile(
    r"(?P<module>.+)\.(?P<projection>to_[qkv]|to_out|add_[kv]_proj)_lora\.(?:(?P<part>down|up)\.weight|(?P<alpha>alpha))"
)
_XLABS = re.compile(
    r"(?P<module>(?:double_blocks\.\d+\.processor\.(?:qkv|proj)_lora[12]|single_blocks\.\d+\.processor\.(?:qkv|proj)_lora))"
    r"\.(?P<part>down|up)\.weight"
)
# In the name of a tensor that is no tensor of a model, but a part of an adapter that is not known here.
_OF_ADAPTER = re.compile(r"(?:\A|[._])(?:lora|hada|lokr|b?oft|vera|shira)[._]|_lora\w?(?:\.|\Z)")
# Attention processors' names of a text encoder's projections; of others, to_out is a list of a linear layer and a dropout.
_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_SIDES = {"down": DOWN, "up": UP}


def parse_key(key: str) -> Key | None:
    """The parsed key; None if it ends in no known part."""
    prefix, rest, is_flat = "", key, False
    if match := _DOTTED.fullmatch(key):
        prefix, rest = match.groups()
    elif (match := FLAT.match(key)) and key[match.end() : match.end() + 1] == ".":
        prefix, rest, is_flat = match["prefix"], key[match.start("module") :], True
    if match := _XLABS.fullmatch(rest):
        return Key(prefix, match["module"], _SIDES[match["part"]], is_flat, "xlabs")
    if match := _PROCESSOR.fullmatch(rest):
        module = f"{match['module'].removesuffix('.processor')}.{_projection(match['projection'], prefix)}"
        return Key(prefix, module, _SIDES.get(match["part"], ALPHA), is_flat, "diffusers")
    # The longest part that is known: "lora_down.weight" rather than "weight".
    dots = [place for place, letter in enumerate(rest) if letter == "."]
    for dot in dots[-3:]:
        if dot and (found := _PARTS.get(rest[dot + 1 :])):
            part, style = found
            module = rest if rest.endswith((".bias", ".scale")) and part == WHOLE else rest[:dot]
            if (is_flat and "." in module) or (part == WHOLE and _OF_ADAPTER.search(module)):
                return None
            return Key(prefix, module.replace(".processor.", ".") if style == "diffusers" else module, part, is_flat, style)  # fmt: skip
    return None


def _projection(name: str, prefix: str) -> str:
    if prefix.startswith("text_encoder"):
        return _TEXT.get(name, name)
    return "to_out.0" if name == "to_out" else name


Module = TypeVar("Module", bound=Hashable)


def group_keys(
    keys: Iterable[str],
    parse: Callable[[str], tuple[Module, str] | None],
    where: object,
    unmatched: str | Callable[[str], str],
) -> dict[Module, dict[str, str]]:
    """The keys of a file by module and part.

    Args:
        keys: all keys of the file.
        parse: the module and the part that a key means, or None if it is not of the dialect.
        where: the file, for messages.
        unmatched: why a key is not of the dialect, for messages; may depend on the key.

    Raises:
        SourceError: a key that is not of the dialect, two keys of the same part, or no key at all.
    """
    found: dict[Module, dict[str, str]] = {}
    for key in keys:
        if (parsed := parse(key)) is None:
            reason = unmatched if isinstance(unmatched, str) else unmatched(key)
            raise SourceError(f"{where}: unmatched key {key!r}: {reason}")
        module, part = parsed
        if (other := found.setdefault(module, {}).setdefault(part, key)) != key:
            raise SourceError(f"{where}: {other!r} and {key!r} are the same part of one LoRA")
    if not found:
        raise SourceError(f"{where}: it holds no tensors")
    return found


def by_pattern(pattern: re.Pattern[str]) -> Callable[[str], tuple[str, str] | None]:
    """A parser for :func:`group_keys` from a pattern with the groups ``module`` and ``part``."""

    def parse(key: str) -> tuple[str, str] | None:
        match = pattern.fullmatch(key)
        return None if match is None else (match["module"], match["part"])

    return parse
