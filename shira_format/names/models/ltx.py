"""LTX-Video and LTX-2, whose blocks differ in the names of the norms."""

from __future__ import annotations

from shira_format.names.models.tables import Block, Marks, Model

_LAYERS = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
_ATTENTIONS = ("attn1", "attn2")
_AUDIO_ATTENTIONS = ("audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
_TABLES = {"scale_shift_table": "scale_shift_table"}


def _norms(attentions: tuple[str, ...]) -> dict[str, str]:
    return {f"{attention}.{which}_norm": f"{attention}.norm_{which}" for attention in attentions for which in "qk"}


def _linears(attentions: tuple[str, ...]) -> tuple[str, ...]:
    kinds = ("to_q", "to_k", "to_v", "to_out.0", "to_gate_logits")
    return tuple(f"{attention}.{kind}" for attention in attentions for kind in kinds)


def _modulations(names: dict[str, str]) -> dict[str, str]:
    return {f"{theirs}.{layer}": f"{ours}.{layer}" for theirs, ours in names.items() for layer in _LAYERS}


_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_PROJECTIONS = ("caption_projection.linear_1", "caption_projection.linear_2", "proj_out")
_LTX2_MARK = "av_ca_a2v_gate_adaln_single.emb.timestep_embedder.linear_1.weight"

ltx = Model(
    (
        Block(
            "transformer_blocks.{}.",
            "transformer_blocks.{}.",
            _norms(_ATTENTIONS),
            _TABLES,
            same=(*_linears(_ATTENTIONS), *_FEED_FORWARD),
        ),
        Block(
            "",
            "",
            {"patchify_proj": "proj_in", **_modulations({"adaln_single": "time_embed"})},
            _TABLES,
            same=_PROJECTIONS,
        ),
    ),
    Marks(("patchify_proj.weight", "transformer_blocks.0.attn1.q_norm.weight"), (_LTX2_MARK,)),
    Marks(
        ("transformer_blocks.0.attn1.norm_q.weight",),
        ("audio_proj_in.weight", "transformer_blocks.0.norm1.linear_1.weight", "transformer_blocks.0.norm1.linear.weight", "transformer_blocks.0.ff.conv_inverted.weight"),
    ),
)  # fmt: skip

ltx2 = Model(
    (
        Block(
            "transformer_blocks.{}.",
            "transformer_blocks.{}.",
            _norms((*_ATTENTIONS, *_AUDIO_ATTENTIONS)),
            {
                **_TABLES,
                "audio_scale_shift_table": "audio_scale_shift_table",
                "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
                "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
            },
            same=(*_linears((*_ATTENTIONS, *_AUDIO_ATTENTIONS)), *_FEED_FORWARD, *(f"audio_{x}" for x in _FEED_FORWARD)),
        ),
        Block(
            "",
            "",
            {
                "patchify_proj": "proj_in",
                "audio_patchify_proj": "audio_proj_in",
                **_modulations(
                    {
                        "adaln_single": "time_embed",
                        "audio_adaln_single": "audio_time_embed",
                        "prompt_adaln_single": "prompt_adaln",
                        "audio_prompt_adaln_single": "audio_prompt_adaln",
                        "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
                        "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
                        "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
                        "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
                    }
                ),
            },
            _TABLES | {"audio_scale_shift_table": "audio_scale_shift_table"},
            same=(*_PROJECTIONS, *(f"audio_{name}" for name in _PROJECTIONS)),
        ),
    ),
    Marks((_LTX2_MARK, "audio_patchify_proj.weight")),
    Marks(("transformer_blocks.0.audio_attn1.to_q.weight",)),
)  # fmt: skip
