"""Wan 2.1 and 2.2 (text to video, image to video, VACE, Animate), and SkyReels V2, which has its names."""

from __future__ import annotations

from shira_format.names.models.tables import Block, Marks, Model, Modules, stacked

_BLOCK = {
    **{
        f"{theirs}.{module}": f"{ours}.{other}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for module, other in {
            "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k",
        }.items()
    },
    # A second pair of keys and values, from an image.
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
}  # fmt: skip
_MODULATION = {"modulation": "scale_shift_table"}
_ENDS = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "fps_projection.0": "fps_projection.net.0.proj",
    "fps_projection.2": "fps_projection.net.2",
}
# Animate: the driving face. Biases of the motion encoder's convolutions have another rank in diffusers, and stay out.
_FACE = {
    "face_encoder.conv1_local.conv": "face_encoder.conv1_local",
    "face_encoder.conv2.conv": "face_encoder.conv2",
    "face_encoder.conv3.conv": "face_encoder.conv3",
}
_FACE_BLOCK: Modules = {
    "linear1_q": "to_q",
    "linear1_kv": stacked("to_k", "to_v"),
    "linear2": "to_out",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
_MOTION = {
    "motion_encoder.dec.direction.weight": "motion_encoder.motion_synthesis_weight",
    "motion_encoder.enc.net_app.convs.0.0.weight": "motion_encoder.conv_in.weight",
    "motion_encoder.enc.net_app.convs.8.weight": "motion_encoder.conv_out.weight",
    **{
        f"motion_encoder.enc.net_app.convs.{block + 1}.{theirs}.weight": f"motion_encoder.res_blocks.{block}.{ours}.weight"
        for block in range(7)
        for theirs, ours in {"conv1.0": "conv1", "conv2.1": "conv2", "skip.1": "conv_skip"}.items()
    },
}

wan = Model(
    (
        Block("blocks.{}.", "blocks.{}.", _BLOCK, _MODULATION),
        Block(
            "vace_blocks.{}.",
            "vace_blocks.{}.",
            {**_BLOCK, "before_proj": "proj_in", "after_proj": "proj_out"},
            _MODULATION,
        ),
        Block("face_adapter.fuser_blocks.{}.", "face_adapter.{}.", _FACE_BLOCK),
        Block("motion_encoder.enc.fc.{}.", "motion_encoder.motion_network.{}.", tensors={"weight": "weight", "bias": "bias"}),
        Block(
            "",
            "",
            _ENDS | _FACE,
            {
                "head.modulation": "scale_shift_table",
                "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
                "face_encoder.padding_tokens": "face_encoder.padding_tokens",
                **_MOTION,
            },
            same=(
                "patch_embedding", "vace_patch_embedding", "pose_patch_embedding", "face_encoder.out_proj",
                "fps_embedding",
            ),
        ),
    ),
    Marks(("blocks.0.self_attn.q.weight", "blocks.0.cross_attn.q.weight")),
    Marks(("blocks.0.attn1.to_q.weight", "blocks.0.attn2.to_q.weight")),
)  # fmt: skip

_ANIMATE2_BLOCK = {
    f"{attention}.{module}": f"{attention}.{other}"
    for attention in ("self_attn", "cross_attn")
    for module, other in {
        "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k",
        "k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k",
    }.items()
}  # fmt: skip

# Animate 2: diffusers has the authors' names but for those within the blocks.
wan_animate2 = Model(
    (
        Block(
            "blocks.{}.block.",
            "blocks.{}.",
            _ANIMATE2_BLOCK,
            {"modulation": "modulation"},
            same=("norm3", "ffn.0", "ffn.2"),
        ),
    ),
    Marks(("blocks.0.block.self_attn.q.weight",)),
    Marks(("blocks.0.self_attn.to_q.weight",)),
)
