"""GGUF's names and forms of tensors, by architecture, with the names of Hugging Face checkpoints.

The converter of llama.cpp renames tensors, and changes some of them. Both must be known to restore a tensor: an
architecture that is not in :data:`ARCHITECTURES` is refused, since a wrong guess could go unnoticed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class Form(Enum):
    """What the conversion to GGUF did to a tensor, which reading undoes."""

    SAME = "nothing"
    ROTARY = "the rows of every head are paired (0, n/2, 1, n/2 + 1, ...) for Meta's rotary embedding"
    TRANSPOSED = "it is transposed, since a Conv1D of Hugging Face holds [in, out]"
    SHIFTED = "1 is added"


@dataclass(frozen=True)
class Architecture:
    """The names of an architecture, from GGUF's stem to Hugging Face's module, and the forms of its tensors.

    Attributes:
        model: names outside of the layers.
        layer: names within each layer.
        layers: the module that holds the layers.
        rotary: whether the rows of ``attn_q`` and ``attn_k`` are reordered.
        transposed: stems of weights that are transposed.
        shifted: whether the weights of norms have 1 added.
    """

    model: dict[str, str]
    layer: dict[str, str]
    layers: str = "model.layers"
    rotary: bool = False
    transposed: tuple[str, ...] = ()
    shifted: bool = False

    def find(self, name: str) -> tuple[str, Form] | None:
        """The Hugging Face name of the tensor ``name`` of a GGUF file, and its form; None if there is none."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        number, stem, ending = match.groups()
        module = (self.model if number is None else self.layer).get(stem)
        if module is None:
            return None
        form = Form.SAME
        if self.rotary and stem in HEADS:
            form = Form.ROTARY
        elif stem in self.transposed and ending == "weight":
            form = Form.TRANSPOSED
        elif self.shifted and stem.endswith("norm") and ending == "weight":
            form = Form.SHIFTED
        return f"{module if number is None else f'{self.layers}.{number}.{module}'}.{ending}", form


# No leading zeros: a tensor must have only one name.
_NAME = re.compile(r"(?:blk\.(0|[1-9][0-9]{0,8})\.)?([a-z0-9_]+)\.(weight|bias)")

# The metadata key with the number of heads of a tensor.
HEADS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}

# Computed by llama.cpp from the config; not in Hugging Face checkpoints.
COMPUTED = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight|blk\.[0-9]+\.(attn_rot_embd|rope_freqs)\.weight")  # fmt: skip

_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_NORMS_OF_HEADS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GATED = {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = {**_ATTENTION, **_GATED}
_GEMMA_LAYER = {
    **_LAYER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LLAMA = Architecture(_MODEL, _LAYER, rotary=True)

ARCHITECTURES: dict[str, Architecture] = {
    "gemma": Architecture(_MODEL, _LAYER, shifted=True),
    "gemma2": Architecture(_MODEL, _GEMMA_LAYER, shifted=True),
    "gemma3": Architecture(_MODEL, {**_GEMMA_LAYER, **_NORMS_OF_HEADS}, shifted=True),
    "gpt2": Architecture(
        {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f", "output": "lm_head"},
        {
            "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
        },
        layers="transformer.h", transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
    "granite": _LLAMA,
    "llama": _LLAMA,  # also Mistral and others
    "nemotron": Architecture(
        _MODEL,
        {**_ATTENTION, "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
        shifted=True,
    ),
    "phi3": Architecture(
        _MODEL,
        {
            "attn_norm": "input_layernorm", "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj",
        },
    ),
    "qwen2": Architecture(_MODEL, _LAYER),
    "qwen3": Architecture(_MODEL, {**_LAYER, **_NORMS_OF_HEADS}),
    "smollm3": _LLAMA,
    "starcoder2": Architecture(
        _MODEL,
        {**_ATTENTION, "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    ),
}  # fmt: skip

# LoRAs of these are supported as well, but not whole models. Names are without the prefix of a model with a head.
ADAPTED: dict[str, Architecture] = {
    **ARCHITECTURES,
    "bert": Architecture(
        {"token_embd": "embeddings.word_embeddings"},
        {
            "attn_q": "attention.self.query", "attn_k": "attention.self.key", "attn_v": "attention.self.value",
            "attn_output": "attention.output.dense", "ffn_up": "intermediate.dense", "ffn_down": "output.dense",
        },
        layers="encoder.layer",
    ),
}  # fmt: skip
