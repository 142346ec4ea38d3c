"""The two sets of names of CLIP's text encoder: OpenCLIP's, in single-file checkpoints of SDXL and SD 2, and transformers'.

OpenCLIP holds the projections of queries, keys and values as one weight, top to bottom (``in_proj_weight``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_LAYER = re.compile(r"transformer\.resblocks\.(?P<number>\d+)\.(?P<inner>.+)")
_INNER = {
    "ln_1.weight": ["layer_norm1"],
    "ln_2.weight": ["layer_norm2"],
    "attn.in_proj_weight": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.out_proj.weight": ["self_attn.out_proj"],
    "mlp.c_fc.weight": ["mlp.fc1"],
    "mlp.c_proj.weight": ["mlp.fc2"],
}
_OTHERS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding",
    "ln_final.weight": "text_model.final_layer_norm",
}


def open_clip_parts(tensors: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """The weights of OpenCLIP's text encoder that transformers knows, and their modules there.

    Several modules are equal parts of the weight's rows, top to bottom.
    """
    for tensor in tensors:
        if tensor in _OTHERS:
            yield tensor, [_OTHERS[tensor]]
        elif (match := _LAYER.fullmatch(tensor)) and match["inner"] in _INNER:
            yield (
                tensor,
                [f"text_model.encoder.layers.{match['number']}.{module}" for module in _INNER[match["inner"]]],
            )
