"""Krea 2.

The modulations of its blocks are vectors for the authors and matrices in diffusers, and have no place in the table.
"""

from __future__ import annotations

from shira_format.names.models.tables import Block, Marks, Model

_BLOCK = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
}
_NORMS = {
    "attn.qknorm.qnorm.scale": "attn.norm_q.weight",
    "attn.qknorm.knorm.scale": "attn.norm_k.weight",
    "prenorm.scale": "norm1.weight",
    "postnorm.scale": "norm2.weight",
}
_ENDS = {
    "first": "img_in",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
    "txtfusion.projector": "text_fusion.projector",
    "last.linear": "final_layer.linear",
}

krea2 = Model(
    (
        Block("blocks.{}.", "transformer_blocks.{}.", _BLOCK, _NORMS),
        Block("txtfusion.{}.{}.", "text_fusion.{}.{}.", _BLOCK, _NORMS),
        Block(
            "",
            "",
            _ENDS,
            {
                "txtmlp.0.scale": "txt_in.norm.weight",
                "last.norm.scale": "final_layer.norm.weight",
                "last.modulation.lin": "final_layer.scale_shift_table",
            },
        ),
    ),
    Marks(("txtfusion.projector.weight", "blocks.0.attn.wq.weight")),
    Marks(("text_fusion.projector.weight", "transformer_blocks.0.attn.to_gate.weight")),
)
