"""AuraFlow."""

from __future__ import annotations

from shira_format.names.models.tables import Block, Marks, Model, Modules, swapped

_MLP = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
_DOUBLE = {
    **{f"mlpX.{theirs}": f"ff.{ours}" for theirs, ours in _MLP.items()},
    **{f"mlpC.{theirs}": f"ff_context.{ours}" for theirs, ours in _MLP.items()},
    "modX.1": "norm1.linear",
    "modC.1": "norm1_context.linear",
    "attn.w2q": "attn.to_q",
    "attn.w2k": "attn.to_k",
    "attn.w2v": "attn.to_v",
    "attn.w2o": "attn.to_out.0",
    "attn.w1q": "attn.add_q_proj",
    "attn.w1k": "attn.add_k_proj",
    "attn.w1v": "attn.add_v_proj",
    "attn.w1o": "attn.to_add_out",
}
_SINGLE = {
    **{f"mlp.{theirs}": f"ff.{ours}" for theirs, ours in _MLP.items()},
    "modCX.1": "norm1.linear",
    "attn.w1q": "attn.to_q",
    "attn.w1k": "attn.to_k",
    "attn.w1v": "attn.to_v",
    "attn.w1o": "attn.to_out.0",
}
_ENDS: Modules = {
    "t_embedder.mlp.0": "time_step_proj.linear_1",
    "t_embedder.mlp.2": "time_step_proj.linear_2",
    "cond_seq_linear": "context_embedder",
    "init_x_linear": "pos_embed.proj",
    "final_linear": "proj_out",
    "modF.1": swapped("norm_out.linear"),
}

aura_flow = Model(
    (
        Block("double_layers.{}.", "joint_transformer_blocks.{}.", _DOUBLE),
        Block("single_layers.{}.", "single_transformer_blocks.{}.", _SINGLE),
        Block(
            "",
            "",
            _ENDS,
            {"positional_encoding": "pos_embed.pos_embed", "register_tokens": "register_tokens"},
        ),
    ),
    Marks(("double_layers.0.attn.w2q.weight",)),
    Marks(("joint_transformer_blocks.0.attn.add_q_proj.weight",)),
)
