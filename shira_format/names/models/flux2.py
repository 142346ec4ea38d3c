"""FLUX.2: modulations that all blocks share, and single blocks that are fused on both sides."""

from __future__ import annotations

from shira_format.names.models.flux import FLUX_NORMS
from shira_format.names.models.tables import Block, Marks, Model, Modules, stacked, swapped

_DOUBLE: Modules = {
    "img_attn.qkv": stacked("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_attn.qkv": stacked("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_SINGLE = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
_ENDS: Modules = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
}

flux2 = Model(
    (
        Block(
            "double_blocks.{}.",
            "transformer_blocks.{}.",
            _DOUBLE,
            {
                "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
                "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
                "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
                "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
            },
        ),
        Block(
            "single_blocks.{}.",
            "single_transformer_blocks.{}.",
            _SINGLE,
            {"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"},
        ),
        Block("", "", _ENDS),
    ),
    Marks(("single_stream_modulation.lin.weight", "double_stream_modulation_img.lin.weight")),
    Marks(("single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight", "transformer_blocks.0.ff.linear_in.weight")),
    spellings=(
        *FLUX_NORMS,
        # Some exports of diffusers' names have lost the first letters.
        Block(
            "sformer_blocks.{}.",
            "transformer_blocks.{}.",
            same=(
                "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
                "attn.add_v_proj", "attn.to_add_out", "ff.linear_in", "ff.linear_out", "ff_context.linear_in",
                "ff_context.linear_out",
            ),
        ),
    ),
)  # fmt: skip
