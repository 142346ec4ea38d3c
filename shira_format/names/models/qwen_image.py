"""Qwen-Image 2.1, in which ComfyUI fuses the gate of the MLP.

Qwen-Image itself has the same names everywhere.
"""

from __future__ import annotations

from shira_format.names.models.tables import Block, Marks, Model, stacked

_MARK = "transformer_blocks.0.img_mlp."

qwen_image_2 = Model(
    (
        Block(
            "transformer_blocks.{}.",
            "transformer_blocks.{}.",
            {"img_mlp.gate_up": stacked("img_mlp.gate_layer", "img_mlp.proj")},
        ),
    ),
    Marks((f"{_MARK}gate_up.weight",)),
    Marks((f"{_MARK}gate_layer.weight",)),
)
