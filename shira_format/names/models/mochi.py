"""Mochi 1."""

from __future__ import annotations

from shira_format.names.models.tables import Block, Marks, Model, Modules, Parts, stacked, swapped


def _is_last(rows: int, columns: int) -> bool:
    """The context's last modulation has only a scale, half as wide as the other stream."""
    return rows < columns


_BLOCK: Modules = {
    "mod_x": "norm1.linear",
    "attn.qkv_x": stacked("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.q_norm_x": "attn1.norm_q",
    "attn.k_norm_x": "attn1.norm_k",
    "attn.proj_x": "attn1.to_out.0",
    "attn.qkv_y": stacked("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj"),
    "attn.q_norm_y": "attn1.norm_added_q",
    "attn.k_norm_y": "attn1.norm_added_k",
    "attn.proj_y": "attn1.to_add_out",
    # diffusers has the gate of a SwiGLU last.
    "mlp_x.w1": swapped("ff.net.0.proj"),
    "mlp_x.w2": "ff.net.2",
    "mlp_y.w1": swapped("ff_context.net.0.proj"),
    "mlp_y.w2": "ff_context.net.2",
    "mod_y": Parts(("norm1_context.linear",), exists=lambda rows, columns: not _is_last(rows, columns)),
}
_LAST: Modules = {"mod_y": Parts(("norm1_context.linear_1",), exists=_is_last)}
_ENDS: Modules = {
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
    "t5_y_embedder.to_kv": "time_embed.pooler.to_kv",
    "t5_y_embedder.to_q": "time_embed.pooler.to_q",
    "t5_y_embedder.to_out": "time_embed.pooler.to_out",
    "t5_yproj": "time_embed.caption_proj",
    "final_layer.mod": swapped("norm_out.linear"),
    "final_layer.linear": "proj_out",
}

mochi = Model(
    (
        Block("blocks.{}.", "transformer_blocks.{}.", _BLOCK),
        Block("blocks.{}.", "transformer_blocks.{}.", _LAST),
        Block("", "", _ENDS, {"pos_frequencies": "pos_frequencies"}),
    ),
    Marks(("blocks.0.attn.qkv_x.weight",)),
    Marks(("time_embed.pooler.to_kv.weight",)),
)
