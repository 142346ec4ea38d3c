"""FLUX.1 has two sets of names: those of its authors (``double_blocks.0.img_attn.qkv``), which kohya, XLabs and ComfyUI
use, and those of diffusers (``transformer_blocks.0.attn.to_q``), whose modules are rows of the authors'.

    parts = flux_parts(names, height)["single_blocks.0.linear1"]
    # attn.to_q, attn.to_k, attn.to_v, proj_mlp, each with its rows of linear1

The mapping holds for weights and biases, and for a LoRA's factor ``up``; ``down`` is the same for all parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from shira_format.names.row_blocks import FusedPart, FusedTable, fused_parts

_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_OTHERS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_SWAPPED = "norm_out.linear"

_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.")


def is_diffusers_flux(names: Iterable[str]) -> bool:
    """Whether the tensors ``names`` (without a component's prefix) are those of diffusers' FluxTransformer2DModel.

    Other transformers of diffusers have blocks of the same names, but not the same other modules.
    """
    known = set(names)
    return {"x_embedder.weight", "context_embedder.weight", "norm_out.linear.weight"} <= known and any(
        f"{block}.0.{module}.weight" in known
        for block, module in (
            ("single_transformer_blocks", "proj_mlp"), ("transformer_blocks", "ff_context.net.0.proj"),
        )
    )  # fmt: skip


def flux_parts(names: Iterable[str], height: Callable[[str], int]) -> dict[str, tuple[FusedPart, ...]]:
    """The authors' modules that a FLUX transformer of diffusers has, each as its parts, top to bottom.

    Args:
        names: the tensors of the transformer, without a component's prefix (``x_embedder.weight``).
        height: the number of rows of one of these tensors.
    """
    known = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    tables: list[FusedTable] = [("", "", _OTHERS)]
    for single, number in sorted({(m[1], m[2]) for m in map(_BLOCK.match, known) if m}, key=str):
        theirs, ours, table = (
            ("single_blocks", "single_transformer_blocks", _SINGLE) if single
            else ("double_blocks", "transformer_blocks", _DOUBLE)
        )  # fmt: skip
        tables.append((f"{theirs}.{number}.", f"{ours}.{number}.", table))
    return fused_parts(tables, known, height, lambda module, _: module == _SWAPPED)
