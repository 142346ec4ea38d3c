"""FLUX.1 has two sets of names: those of its authors (``double_blocks.0.img_attn.qkv``), which kohya, XLabs and ComfyUI
use, and those of diffusers (``transformer_blocks.0.attn.to_q``), whose modules are rows of the authors' ones.

    pieces = diffusers_pieces(names, height)["single_blocks.0.linear1"]
    # attn.to_q, attn.to_k, attn.to_v, proj_mlp, each with the rows of linear1 that it is

The mapping holds for weights and biases, and for the factor ``up`` of a LoRA; ``down`` is the same for all pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from shira_format._core.arrays import Array

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
# The authors' last layer computes shift, then scale; diffusers' one scale, then shift.
_SWAPPED = "norm_out.linear"

_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.")


@dataclass(frozen=True)
class Piece:
    """A module of diffusers that is rows of a module of the authors.

    Attributes:
        module: its name in diffusers' transformer.
        rows: the ranges ``(start, stop)`` of the authors' rows, in the order in which it has them: one, or two that
            change places.
    """

    module: str
    rows: tuple[tuple[int, int], ...]

    def of(self, array: Array) -> Array:
        """These rows of ``array``, ``[rows of the authors' module, ...]``; a view where they are one range."""
        if len(self.rows) == 1:
            return array[slice(*self.rows[0])]
        return np.concatenate([array[start:stop] for start, stop in self.rows])


def is_diffusers_flux(names: Iterable[str]) -> bool:
    """Whether the tensors ``names`` (without a component before them) are those of diffusers' FluxTransformer2DModel.

    Other transformers of diffusers have blocks of the same names, but not the same rest.
    """
    known = set(names)
    return {"x_embedder.weight", "context_embedder.weight", "norm_out.linear.weight"} <= known and any(
        f"{block}.0.{module}.weight" in known
        for block, module in (
            ("single_transformer_blocks", "proj_mlp"), ("transformer_blocks", "ff_context.net.0.proj"),
        )
    )  # fmt: skip


def diffusers_pieces(names: Iterable[str], height: Callable[[str], int]) -> dict[str, tuple[Piece, ...]]:
    """The authors' modules that a transformer of diffusers has, each as its pieces, top to bottom.

    Args:
        names: the tensors of the transformer, without a component before them (``x_embedder.weight``).
        height: the number of rows of one of these tensors.
    """
    known = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    tables: list[tuple[str, str, Mapping[str, tuple[str, ...]]]] = [("", "", _OTHERS)]
    for single, number in sorted({(m[1], m[2]) for m in map(_BLOCK.match, known) if m}, key=str):
        theirs, ours = ("single_", _SINGLE) if single else ("", _DOUBLE)
        tables.append((f"{'single' if single else 'double'}_blocks.{number}.", f"{theirs}transformer_blocks.{number}.", ours))  # fmt: skip
    return {
        f"{original}{module}": _pieces([theirs + piece for piece in pieces], height)
        for original, theirs, table in tables
        for module, pieces in table.items()
        if all(theirs + piece in known for piece in pieces)
    }


def _pieces(modules: list[str], height: Callable[[str], int]) -> tuple[Piece, ...]:
    found, start = [], 0
    for module in modules:
        stop = start + height(f"{module}.weight")
        middle = (start + stop) // 2
        found.append(Piece(module, ((middle, stop), (start, middle)) if module == _SWAPPED else ((start, stop),)))
        start = stop
    return tuple(found)
