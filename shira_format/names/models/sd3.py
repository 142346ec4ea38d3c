"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from shira_format.names.models.tables import Block, Marks, Model, Modules, Parts, stacked, swapped


def _is_last(rows: int, columns: int) -> bool:
    """The context's last modulation has only a shift and a scale, in another order than diffusers'."""
    return rows == 2 * columns


_BLOCK: Modules = {
    "x_block.attn.qkv": stacked("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.qkv": stacked("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.qkv": stacked("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.adaLN_modulation.1": Parts(("norm1_context.linear",), swapped=_is_last),
}
_ENDS: Modules = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
}

sd3 = Model(
    (
        Block("joint_blocks.{}.", "transformer_blocks.{}.", _BLOCK),
        Block("", "", _ENDS, {"pos_embed": "pos_embed.pos_embed"}, same=("context_embedder",)),
    ),
    Marks(("joint_blocks.0.x_block.attn.qkv.weight", "joint_blocks.0.context_block.attn.qkv.weight")),
    Marks(
        ("transformer_blocks.0.attn.add_q_proj.weight",),
        # FLUX, HunyuanVideo and Qwen-Image.
        (
            "x_embedder.weight", "x_embedder.proj.weight", "single_transformer_blocks.0.attn.to_q.weight",
            "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight", "transformer_blocks.0.img_mod.1.weight",
            "transformer_blocks.0.ff.linear_in.weight",
        ),
    ),
)  # fmt: skip
