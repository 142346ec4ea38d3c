"""CLIP's text encoder as OpenCLIP names it, in single files of SDXL and SD 2, and as transformers does.

OpenCLIP holds queries, keys and values as one weight. Its ``text_projection`` is transformed by columns, where transformers'
is by rows, and has no place in the table.
"""

from __future__ import annotations

from shira_format.names.models.tables import Block, Marks, Model

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _model(prefix: str, *, theirs: Marks) -> Model:
    return Model(
        (
            Block(
                "transformer.resblocks.{}.",
                f"{prefix}encoder.layers.{{}}.",
                _LAYER,
                fused={
                    f"attn.in_proj_{kind}": tuple(f"{name}.{kind}" for name in _QKV) for kind in ("weight", "bias")
                },
            ),
            Block(
                "",
                prefix,
                {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm"},
                {"positional_embedding": "embeddings.position_embedding.weight"},
            ),
        ),
        theirs,
        Marks((f"{prefix}embeddings.token_embedding.weight",)),
    )


open_clip = _model("text_model.", theirs=Marks(("transformer.resblocks.0.attn.in_proj_weight",)))
# Without its wrapper, with which alone transformers names it today.
open_clip_inner = _model("", theirs=Marks(()))
