"""Ideogram 4: the layers that LoRAs adapt."""

from __future__ import annotations

from shira_format.names.models.tables import Block, Marks, Model, Modules, stacked

_LAYER: Modules = {
    "attention.qkv": stacked("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.o": "attention.to_out.0",
}
_SAME = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaln_modulation")
_MARK = "layers.0.adaln_modulation.weight"

ideogram4 = Model(
    (Block("layers.{}.", "layers.{}.", _LAYER, same=_SAME),),
    Marks(("layers.0.attention.o.weight",), ("layers.0.attention.to_q.weight",)),
    Marks((_MARK,), ("layers.0.attention.o.weight",)),
)
