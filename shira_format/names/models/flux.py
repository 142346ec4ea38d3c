"""FLUX.1 (also Kontext, Fill and the like) and Chroma, which has FLUX's blocks without their modulations.

The authors hold queries, keys, values (and in a single block the first layer of the MLP) as one weight.
"""

from __future__ import annotations

from shira_format.names.models.tables import Block, Marks, Model, square_but_last, stacked, swapped

_NORMS = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
}
_DOUBLE = Block(
    "double_blocks.{}.",
    "transformer_blocks.{}.",
    {
        "img_attn.qkv": stacked("attn.to_q", "attn.to_k", "attn.to_v"),
        "img_attn.proj": "attn.to_out.0",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "img_mod.lin": "norm1.linear",
        "txt_attn.qkv": stacked("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "txt_attn.proj": "attn.to_add_out",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "txt_mod.lin": "norm1_context.linear",
    },
    _NORMS,
)
_SINGLE = Block(
    "single_blocks.{}.",
    "single_transformer_blocks.{}.",
    {
        "linear1": stacked("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", heights=square_but_last),
        "linear2": "proj_out",
        "modulation.lin": "norm.linear",
    },
    {"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"},
)
FLUX_BLOCKS = (_DOUBLE, _SINGLE)
# ComfyUI of today calls the scales of norms weights.
FLUX_NORMS = tuple(
    Block(
        block.theirs,
        block.ours,
        tensors={f"{theirs.removesuffix('scale')}weight": ours for theirs, ours in block.tensors.items()},
    )
    for block in FLUX_BLOCKS
)

_ENDS = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}

_FLUX_ENDS = Block(
    "",
    "",
    {
        **_ENDS,
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
    },
)
_CHROMA_ENDS = Block("", "", _ENDS, same=("distilled_guidance_layer.in_proj", "distilled_guidance_layer.out_proj"))
_CHROMA_GUIDANCE = Block(
    "distilled_guidance_layer.layers.{}.",
    "distilled_guidance_layer.layers.{}.",
    {"in_layer": "linear_1", "out_layer": "linear_2"},
)
_CHROMA_NORMS = Block(
    "distilled_guidance_layer.norms.{}.", "distilled_guidance_layer.norms.{}.", tensors={"scale": "weight"}
)

# Models that share names of blocks: Chroma, FLUX.2 and HunyuanVideo.
_CHROMA_MARK = "distilled_guidance_layer.in_proj.weight"
_THEIR_BLOCKS = ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight")
_NEITHER = (
    "single_stream_modulation.lin.weight", "double_stream_modulation_img.lin.weight",
    "double_blocks.0.img_attn_qkv.weight", "single_blocks.0.modulation.linear.weight",
    "txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight",
    "txt_in.individual_token_refiner.blocks.0.self_attn.qkv.weight",
)  # fmt: skip
_OUR_BLOCKS = (
    "single_transformer_blocks.0.proj_mlp.weight", "single_transformer_blocks.0.attn.to_q.weight",
    "transformer_blocks.0.attn.add_q_proj.weight",
)  # fmt: skip
# Other models of diffusers with blocks of these names.
_OUR_OTHERS = (
    "context_embedder.proj_in.weight",  # HunyuanVideo
    "pos_embed.proj.weight",  # SD 3 and AuraFlow
    "transformer_blocks.0.img_mod.1.weight",  # Qwen-Image
    "transformer_blocks.0.ff.linear_in.weight",  # FLUX.2
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight",
    "single_transformer_blocks.0.ff.linear_in.weight",  # FLUX.3
    "single_transformer_blocks.0.ff.linear_1.weight",  # AuraFlow
    "time_embed.timestep_embedder.linear_1.weight",  # Bria, LongCat
    "context_embedder_norm.weight",  # Ovis
)

flux = Model(
    (*FLUX_BLOCKS, _FLUX_ENDS),
    Marks(_THEIR_BLOCKS, (*_NEITHER, _CHROMA_MARK)),
    Marks(_OUR_BLOCKS, (*_OUR_OTHERS, _CHROMA_MARK)),
    FLUX_NORMS,
)
chroma = Model(
    (*FLUX_BLOCKS, _CHROMA_GUIDANCE, _CHROMA_NORMS, _CHROMA_ENDS),
    Marks(
        (_CHROMA_MARK,), ("transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.attn.to_q.weight")
    ),
    Marks((_CHROMA_MARK,), _THEIR_BLOCKS),
    FLUX_NORMS,
)
