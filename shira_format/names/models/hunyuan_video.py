"""HunyuanVideo, in the names of its authors, of diffusers, and of ComfyUI, which names its blocks as those of FLUX."""

from __future__ import annotations

from shira_format.names.models.flux import FLUX_BLOCKS, FLUX_NORMS
from shira_format.names.models.tables import Block, Marks, Model, Modules, square_but_last, stacked, swapped

_QUERIES = ("attn.to_q", "attn.to_k", "attn.to_v")
_DOUBLE: Modules = {
    "img_attn_qkv": stacked(*_QUERIES),
    "img_attn_q_norm": "attn.norm_q",
    "img_attn_k_norm": "attn.norm_k",
    "img_attn_proj": "attn.to_out.0",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "img_mod.linear": "norm1.linear",
    "txt_attn_qkv": stacked("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_q_norm": "attn.norm_added_q",
    "txt_attn_k_norm": "attn.norm_added_k",
    "txt_attn_proj": "attn.to_add_out",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
    "txt_mod.linear": "norm1_context.linear",
}
_SINGLE: Modules = {
    "linear1": stacked(*_QUERIES, "proj_mlp", heights=square_but_last),
    "linear2": "proj_out",
    "q_norm": "attn.norm_q",
    "k_norm": "attn.norm_k",
    "modulation.linear": "norm.linear",
}
_REFINERS = "txt_in.individual_token_refiner.blocks.{}.", "context_embedder.token_refiner.refiner_blocks.{}."
_REFINER: Modules = {
    "self_attn_qkv": stacked(*_QUERIES),
    "self_attn_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    # Two gates: unlike the last layer's, their halves stay where they are.
    "adaLN_modulation.1": "norm_out.linear",
}
_COMFY_REFINER: Modules = {
    "self_attn.qkv": stacked(*_QUERIES),
    "self_attn.proj": "attn.to_out.0",
    "mlp.0": "ff.net.0.proj",
    "mlp.2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
}
_SHARED_ENDS: Modules = {
    "img_in.proj": "x_embedder.proj",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
}
# Modules of two layers: the prefixes, and what the layers are called.
_EMBEDDERS = {
    "time_in": "time_text_embed.timestep_embedder",
    "guidance_in": "time_text_embed.guidance_embedder",
    "txt_in.t_embedder": "context_embedder.time_text_embed.timestep_embedder",
    "txt_in.c_embedder": "context_embedder.time_text_embed.text_embedder",
}


def _embedders(first: str, second: str, *, context: tuple[str, str]) -> Modules:
    table: Modules = {}
    for theirs, ours in _EMBEDDERS.items():
        layers = context if theirs == "txt_in.c_embedder" else (first, second)
        table |= {f"{theirs}.{layer}": f"{ours}.linear_{number}" for number, layer in enumerate(layers, 1)}
    return table


_AUTHORS = (
    Block("double_blocks.{}.", "transformer_blocks.{}.", _DOUBLE),
    Block("single_blocks.{}.", "single_transformer_blocks.{}.", _SINGLE),
    Block(*_REFINERS, _REFINER, same=("norm1", "norm2")),
    Block("", "", _SHARED_ENDS | _embedders("mlp.0", "mlp.2", context=("linear_1", "linear_2"))),
)
_COMFY = (
    *FLUX_BLOCKS,
    Block(*_REFINERS, _COMFY_REFINER, same=("norm1", "norm2")),
    Block("", "", _SHARED_ENDS | _embedders("in_layer", "out_layer", context=("in_layer", "out_layer"))),
)
# HunyuanImage 2.1 and HunyuanVideo 1.5 have blocks of the same names.
_OTHERS = ("byt5_in.fc1.weight",)
_REFINER_MARK = "txt_in.individual_token_refiner.blocks.0."

hunyuan_video = Model(
    _AUTHORS,
    Marks(
        (
            f"{_REFINER_MARK}self_attn_qkv.weight",
            f"{_REFINER_MARK}self_attn.qkv.weight",
            "double_blocks.0.img_attn_qkv.weight",
        ),
        _OTHERS,
    ),
    Marks(
        ("context_embedder.token_refiner.refiner_blocks.0.attn.to_q.weight",),
        ("time_guidance_embed.timestep_embedder.linear_1.weight", "context_embedder_2.norm.weight"),
    ),
    spellings=(*_COMFY, *FLUX_NORMS),
)
