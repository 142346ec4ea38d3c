"""FLUX.3."""

from __future__ import annotations

from shira_format.names.models.tables import Block, Marks, Model, Modules, swapped

_BLOCK = {
    "q_proj": "attn.to_q",
    "k_proj": "attn.to_k",
    "v_proj": "attn.to_v",
    "attn_out": "attn.to_out.0",
    "mlp_in": "ff.linear_in",
    "mlp_out": "ff.linear_out",
}
_NORMS = {"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"}
_ENDS: Modules = {
    "time_in.in_layer": "timestep_embedder.linear_1",
    "time_in.out_layer": "timestep_embedder.linear_2",
    "ref_time_in.in_layer": "target_timestep_embedder.linear_1",
    "ref_time_in.out_layer": "target_timestep_embedder.linear_2",
    "txt_in": "context_embedder",
    "final_layer.image.linear": "proj_out",
    "final_layer.image.adaLN_modulation.1": swapped("norm_out.linear"),
}
_MARK = "early_stream_modulations.image."

flux3 = Model(
    (
        Block("content_mode_blocks.{}.{}.", "mode_blocks.{}.{}.", _BLOCK, _NORMS),
        Block("txt_mode_blocks.{}.", "txt_mode_blocks.{}.", _BLOCK, _NORMS),
        Block("single_blocks.{}.", "single_transformer_blocks.{}.", _BLOCK, _NORMS),
        *(
            Block(f"{stage}_stream_modulations.{{}}.", f"{stage}_stream_modulations.{{}}.", {"lin": "linear"})
            for stage in ("early", "single")
        ),
        Block("emb_in.{}.", "x_embedders.{}.", tensors={"weight": "weight"}),
        Block("", "", _ENDS),
    ),
    Marks((f"{_MARK}lin.weight", "single_blocks.0.q_proj.weight")),
    Marks((f"{_MARK}linear.weight", "mode_blocks.image.0.attn.to_q.weight")),
)
