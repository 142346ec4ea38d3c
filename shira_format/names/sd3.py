"""Stable Diffusion 3 has two sets of names: those of its authors (``joint_blocks.0.x_block.attn.qkv``), by which kohya goes,
and those of diffusers (``transformer_blocks.0.attn.to_q``), whose modules are rows of the authors' ones.

As :mod:`shira_format.names.flux`, for another model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from shira_format.names.flux import Piece

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


def is_diffusers_sd3(names: Iterable[str]) -> bool:
    """Whether the tensors ``names`` (without a component before them) are those of diffusers' SD3Transformer2DModel."""
    needed = {"pos_embed.proj.weight", "context_embedder.weight", "transformer_blocks.0.attn.add_q_proj.weight"}
    return needed <= set(names)


def sd3_pieces(names: Iterable[str], height: Callable[[str], int], width: int) -> dict[str, tuple[Piece, ...]]:
    """The authors' modules that a transformer of diffusers has, each as its pieces, top to bottom.

    Args:
        names: the tensors of the transformer, without a component before them.
        height: the number of rows of one of these tensors.
        width: of its hidden states.
    """
    known = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    tables: list[tuple[str, str, Mapping[str, tuple[str, ...]]]] = [("", "", _OTHERS)]
    numbers = sorted({match[1] for match in map(_NUMBER.match, known) if match})
    tables += [(f"joint_blocks.{number}.", f"transformer_blocks.{number}.", _BLOCK) for number in numbers]
    found = {}
    for theirs, ours, table in tables:
        for module, parts in table.items():
            if not all(ours + part in known for part in parts):
                continue
            pieces, start = [], 0
            for part in parts:
                stop = start + height(f"{ours}{part}.weight")
                pieces.append(Piece(ours + part, _rows(module, start, stop, width)))
                start = stop
            found[theirs + module] = tuple(pieces)
    return found


def _rows(module: str, start: int, stop: int, width: int) -> tuple[tuple[int, int], ...]:
    """The authors' last layers compute shift, then scale; diffusers' scale, then shift."""
    if module.endswith("adaLN_modulation.1") and stop - start == 2 * width:
        return (start + width, stop), (start, start + width)
    return ((start, stop),)
