"""Keys of diffusers' LoRA files, in all formats since 2023: component, module and part."""

from __future__ import annotations

import re
from typing import NamedTuple

PARTS = ("down", "up", "bias", "magnitude", "alpha")


class DiffusersKey(NamedTuple):
    """A parsed key.

    Attributes:
        component: of the pipeline (``unet``); "" if the key names none.
        module: its name in the component.
        part: one of :data:`PARTS`; ``down`` is ``lora_A``, ``up`` is ``lora_B``.
        only_diffusers: whether no other program writes such keys.
    """

    component: str
    module: str
    part: str
    only_diffusers: bool


_COMPONENT = re.compile(
    r"(?P<component>unet|transformer(?:_2|_3|_ref)?|text_encoder(?:_[2-9])?|prior|connectors|controlnet)\.(?P<rest>.+)"
)
# Prefixes in files that adapt one model only: that of ComfyUI, which other trainers adopted, and that of PEFT, which
# ai-toolkit's and fal's FLUX trainers leave in files without a configuration. Other files with PEFT's prefix are not
# diffusers': without their configuration the scale is unknown.
_ALONE = re.compile(r"(?:diffusion_model\.|base_model\.model\.(?=(?:double_blocks|single_blocks)\.))(?P<rest>.+)")
# LoRAs as attention processors (2023), named by the adapted projection.
_PROCESSOR = re.compile(
    r"(?P<module>.+\.(?:to_[qkv]|to_out|add_[kv]_proj))_lora\.(?:(?P<part>down|up)\.weight|(?P<alpha>alpha))"
)
# The later LoRAs as linear layers; and those of PEFT.
_LAYER = re.compile(r"(?P<module>.+)\.lora(?:_linear_layer)?\.(?:(?P<part>down|up)\.weight|(?P<alpha>alpha))")
_PEFT = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<part>A|B)\.weight|lora_B\.(?P<bias>bias)|lora_(?P<magnitude>magnitude)_vector(?:\.weight)?"
    r"|(?P<alpha>alpha))"
)
_PARTS: dict[str, str] = {"A": "down", "B": "up"}
# Attention processors' names of a text encoder's projections.
_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def parse(key: str) -> DiffusersKey | None:
    """The parsed key; None if it has none of these formats."""
    for pattern in (_PROCESSOR, _LAYER, _PEFT):
        if match := pattern.fullmatch(key):
            component, module, prefixed = _component(match["module"])
            module = module.replace(".processor.", ".")
            if pattern is _PROCESSOR:
                module = _projection(module, in_text=component.startswith("text_encoder"))
            part = next(value for name, value in match.groupdict().items() if name != "module" and value)
            return DiffusersKey(component, module, _PARTS.get(part, part), pattern is not _PEFT or prefixed)
    return None


def _projection(module: str, *, in_text: bool) -> str:
    head, _, last = module.rpartition(".")
    if in_text:
        return f"{head}.{_TEXT.get(last, last)}"
    return f"{module}.0" if last == "to_out" else module  # there, it is a list of a linear layer and a dropout


def _component(module: str) -> tuple[str, str, bool]:
    if match := _COMPONENT.fullmatch(module):
        return match["component"], match["rest"], True
    if match := _ALONE.fullmatch(module):
        return "", match["rest"], True
    return "", module, False
