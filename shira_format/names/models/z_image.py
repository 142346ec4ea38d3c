"""Z-Image, and Lumina 2, from which it takes the names of its blocks."""

from __future__ import annotations

from shira_format.names.models.tables import Block, Marks, Model, Modules, queries_first, stacked

_BLOCKS = ("layers.{}.", "noise_refiner.{}.", "context_refiner.{}.")

_ATTENTION: Modules = {
    "attention.qkv": stacked("attention.to_q", "attention.to_k", "attention.to_v", heights=queries_first),
    "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
}
_SAME = (
    "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "attention_norm1", "attention_norm2", "ffn_norm1",
    "ffn_norm2", "adaLN_modulation.0",
)  # fmt: skip
_ENDS = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}

# diffusers has none of the authors' unused ``norm_final``.
z_image = Model(
    (
        *(Block(block, block, _ATTENTION, same=_SAME) for block in _BLOCKS),
        Block(
            "",
            "",
            _ENDS,
            {"x_pad_token": "x_pad_token", "cap_pad_token": "cap_pad_token"},
            same=("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1"),
        ),
    ),
    Marks(
        ("layers.0.attention.qkv.weight",), ("layers.0.adaLN_modulation.1.weight", "layers.0.attention.o.weight")
    ),
    Marks(
        ("layers.0.attention.to_q.weight",),
        ("layers.0.adaln_modulation.weight", "perceiver.latent_queries"),  # Ideogram 4, FIBO 2
    ),
    # Anime-Z's trainer.
    spellings=tuple(
        Block(block, block, {f"attention.to.{name}": f"attention.to_{name}" for name in "qkv"})
        for block in _BLOCKS
    ),
)

_LUMINA_BLOCK: Modules = {
    "attention.qkv": stacked("attn.to_q", "attn.to_k", "attn.to_v", heights=queries_first),
    "attention.out": "attn.to_out.0",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
    "attention_norm2": "norm2",
}
_LUMINA_MODULATED: Modules = {
    **_LUMINA_BLOCK,
    "attention_norm1": "norm1.norm",
    "adaLN_modulation.1": "norm1.linear",
}
_LUMINA_SAME = ("ffn_norm1", "ffn_norm2")

lumina2 = Model(
    (
        Block("layers.{}.", "layers.{}.", _LUMINA_MODULATED, same=_LUMINA_SAME),
        Block("noise_refiner.{}.", "noise_refiner.{}.", _LUMINA_MODULATED, same=_LUMINA_SAME),
        Block("context_refiner.{}.", "context_refiner.{}.", _LUMINA_BLOCK | {"attention_norm1": "norm1"}, same=_LUMINA_SAME),
        Block(
            "",
            "",
            {
                "cap_embedder.0": "time_caption_embed.caption_embedder.0",
                "cap_embedder.1": "time_caption_embed.caption_embedder.1",
                "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
                "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
                "final_layer.adaLN_modulation.1": "norm_out.linear_1",
                "final_layer.linear": "norm_out.linear_2",
            },
            same=("x_embedder",),
        ),
    ),
    Marks(("layers.0.attention.qkv.weight",), ("layers.0.adaLN_modulation.0.weight", "layers.0.attention.o.weight")),
    Marks(("layers.0.attn.to_q.weight",)),
)  # fmt: skip
