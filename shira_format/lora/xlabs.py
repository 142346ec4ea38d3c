"""XLabs' LoRAs of FLUX.1: attention processors, ``double_blocks.0.processor.qkv_lora1.down.weight``.

The rules are those of x-flux (XLabs-AI/x-flux, ``flux/modules/layers.py``): ``delta W = up @ down``. Its linear layers have
a ``network_alpha``, which it never sets or saves. ``lora1`` adapts the image's stream, ``lora2`` the text's. In a single
block, ``qkv_lora`` adapts the first rows of ``linear1``, whose others feed the MLP, and ``proj_lora`` adapts ``linear2``. The
weight that x-flux applies when it loads a LoRA (0.7 by default, on both factors) is the user's choice and not in the file:
it is 1 here, as in diffusers.
"""

from __future__ import annotations

from pathlib import Path

from shira_format.checkpoints import Checkpoint
from shira_format.lora.base import Lora
from shira_format.lora.keyed import dialect_of, read_keyed

# diffusers' names of what x-flux adapts in a block: they tell query, key and value apart wherever the base fuses them.
_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_LAYERS = {
    "qkv_lora1": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "proj_lora1": ("attn.to_out.0",),
    "qkv_lora2": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "proj_lora2": ("attn.to_add_out",),
    "qkv_lora": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "proj_lora": ("proj_out",),
}


class Xlabs:
    """Files that x-flux writes."""

    name = "xlabs"

    def recognises(self, path: Path) -> bool:
        return dialect_of(path) == self.name

    def read(self, path: Path, base: Checkpoint, prefix: str | None = None) -> Lora:
        return read_keyed(path, base, self.name, prefix, modules_of=_modules_of)


def _modules_of(module: str) -> list[str]:
    block, number, processor, layer = (*module.split("."), "", "", "")[:4]
    if block not in _BLOCKS or processor != "processor" or layer not in _LAYERS:
        return [module]
    return [f"{_BLOCKS[block]}.{number}.{part}" for part in _LAYERS[layer]]
