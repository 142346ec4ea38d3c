"""Cosmos 1 and Cosmos Predict 2 (whose names Anima has too)."""

from __future__ import annotations

from shira_format.names.models.tables import Block, Marks, Model

_NORMS = {1: "self_attn", 2: "cross_attn", 3: "mlp"}
_TIME = {"t_embedder.1.linear_1": "time_embed.t_embedder.linear_1", "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2"}  # fmt: skip
_POSITIONS = ("pos_emb_t", "pos_emb_h", "pos_emb_w")


def _model(blocks: tuple[str, dict[str, str]], ends: dict[str, str], tensors: dict[str, str], mark: str) -> tuple[Model, ...]:  # fmt: skip
    """The table with and without the prefix that the authors' files have."""
    prefix, inner = blocks
    return tuple(
        Model(
            (
                Block(f"{net}{prefix}", "transformer_blocks.{}.", inner),
                Block(net, "", ends, tensors),
            ),
            Marks((net + mark,)),
            # One of the two answers for diffusers' names.
            Marks(() if net else ("transformer_blocks.0.norm1.linear_1.weight",), ("scale_shift_table",)),
        )
        for net in ("", "net.")
    )


_V1_BLOCK = {
    **{
        f"blocks.{number}.block.attn.{theirs}": f"attn{number + 1}.{ours}"
        for number in (0, 1)
        for theirs, ours in {
            "to_q.0": "to_q", "to_k.0": "to_k", "to_v.0": "to_v", "to_q.1": "norm_q", "to_k.1": "norm_k",
            "to_out.0": "to_out.0",
        }.items()
    },
    "blocks.2.block.layer1": "ff.net.0.proj",
    "blocks.2.block.layer2": "ff.net.2",
    **{
        f"blocks.{number}.adaLN_modulation.{layer}": f"norm{number + 1}.linear_{layer}"
        for number in (0, 1, 2)
        for layer in (1, 2)
    },
}  # fmt: skip
_V1_ENDS = {
    **_TIME,
    "affline_norm": "time_embed.norm",
    "x_embedder.proj.1": "patch_embed.proj",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.adaLN_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
}
_V2_BLOCK = {
    **{
        f"{theirs}.{layer}": f"{ours}.{other}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for layer, other in {
            "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0", "q_norm": "norm_q",
            "k_norm": "norm_k",
        }.items()
    },
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    **{
        f"adaln_modulation_{name}.{layer}": f"norm{number}.linear_{layer}"
        for number, name in _NORMS.items()
        for layer in (1, 2)
    },
}  # fmt: skip
_V2_ENDS = {
    **_TIME,
    "t_embedding_norm": "time_embed.norm",
    "x_embedder.proj.1": "patch_embed.proj",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
}

cosmos1 = _model(
    ("blocks.block{}.", _V1_BLOCK),
    _V1_ENDS,
    {f"extra_pos_embedder.{name}": f"learnable_pos_embed.{name}" for name in _POSITIONS},
    "blocks.block0.blocks.0.block.attn.to_q.0.weight",
)
cosmos2 = _model(("blocks.{}.", _V2_BLOCK), _V2_ENDS, {}, "blocks.0.self_attn.q_proj.weight")
