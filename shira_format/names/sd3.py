"""Stable Diffusion 3 has two sets of names: those of its authors (``joint_blocks.0.x_block.attn.qkv``), which kohya
uses, and those of diffusers (``transformer_blocks.0.attn.to_q``), whose modules are rows of the authors'.

As :mod:`shira_format.names.flux`, for another model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from shira_format.names.row_blocks import FusedPart, FusedTable, fused_parts

_BLOCK = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
_OTHERS = {
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_NUMBER = re.compile(r"transformer_blocks\.(\d+)\.")
_MODULATIONS = ("norm1.linear", "norm1_context.linear", "norm_out.linear")


def is_diffusers_sd3(names: Iterable[str]) -> bool:
    """Whether the tensors ``names`` (without a component's prefix) are those of diffusers' SD3Transformer2DModel."""
    needed = {"pos_embed.proj.weight", "context_embedder.weight", "transformer_blocks.0.attn.add_q_proj.weight"}
    return needed <= set(names)


def sd3_parts(names: Iterable[str], height: Callable[[str], int], width: int) -> dict[str, tuple[FusedPart, ...]]:
    """The authors' modules that an SD3 transformer of diffusers has, each as its parts, top to bottom.

    Args:
        names: the tensors of the transformer, without a component's prefix.
        height: the number of rows of one of these tensors.
        width: of its hidden states.
    """
    known = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    numbers = sorted({match[1] for match in map(_NUMBER.match, known) if match})
    tables: list[FusedTable] = [("", "", _OTHERS)]
    tables += [(f"joint_blocks.{number}.", f"transformer_blocks.{number}.", _BLOCK) for number in numbers]
    # Modulations of only a shift and a scale are those of last layers.
    return fused_parts(
        tables, known, height, lambda module, rows: module.endswith(_MODULATIONS) and rows == 2 * width
    )
