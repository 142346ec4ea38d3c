"""Kinds of layers by the names of real model classes."""

from __future__ import annotations

import pytest

from shira_analysis.measures.layer_kinds import KINDS, layer_kind
from tests.models import MODELS

CASES = {
    "query": "encoder.layer.3.attention.self.query.bias model.layers.0.self_attn.q_proj.weight attn2.to_q.weight "
    "encoder.block.0.layer.0.SelfAttention.q.weight transformer.layer.0.attention.q_lin.weight layers.0.attention.wq.weight",
    "key": "model.layers.0.self_attn.k_proj.weight decoder.block.0.layer.1.EncDecAttention.k.weight transformer_blocks.0.attn.add_k_proj.weight",
    "value": "encoder.layer.3.attention.self.value.weight blk.0.attn_v.weight",
    "qkv": "transformer.h.0.attn.c_attn.weight gpt_neox.layers.0.attention.query_key_value.weight model.layers.0.self_attn.qkv_proj.weight "
    "encoder.layers.0.self_attn.in_proj_weight",
    "attention output": "encoder.layer.3.attention.output.dense.weight transformer.h.0.attn.c_proj.weight attn1.to_out.0.weight "
    "transformer.h.0.self_attention.dense.weight layers.0.attention.wo.weight model.layers.0.self_attn.o_proj.weight",
    "mlp up": "encoder.layer.3.intermediate.dense.weight model.layers.0.mlp.up_proj.weight transformer.h.0.mlp.c_fc.weight "
    "transformer_blocks.0.ff.net.0.proj.weight single_transformer_blocks.0.proj_mlp.weight layers.0.feed_forward.w3.weight",
    "mlp gate": "model.layers.0.mlp.gate_proj.weight encoder.block.0.layer.1.DenseReluDense.wi_0.weight layers.0.feed_forward.w1.weight",
    "mlp gate and up": "model.layers.0.mlp.gate_up_proj.weight model.layers.0.mlp.experts.gate_up_proj",
    "mlp down": "encoder.layer.3.output.dense.weight model.layers.0.mlp.down_proj.weight transformer.h.0.mlp.c_proj.weight "
    "encoder.block.0.layer.1.DenseReluDense.wo.weight transformer_blocks.0.ff.net.2.weight",
    "router": "model.layers.0.mlp.gate.weight model.layers.0.block_sparse_moe.gate.weight model.layers.0.mlp.shared_expert_gate.weight",
    "embedding": "embeddings.word_embeddings.weight transformer.wte.weight model.embed_tokens.weight shared.weight token_embd.weight "
    "time_embedding.linear_1.weight context_embedder.weight",
    "norm": "encoder.layer.3.output.LayerNorm.weight transformer.ln_f.bias model.norm.weight vision_model.pre_layrnorm.weight",
    "conv": "conv_in.weight down_blocks.0.resnets.1.conv1.weight mid_block.resnets.0.conv_shortcut.weight",
    "modulation": "transformer_blocks.0.norm1.linear.weight down_blocks.0.resnets.0.time_emb_proj.weight",
    "head": "lm_head.weight classifier.weight pooler.dense.weight score.weight proj_out.weight",
    "other": "w backbone.layers.0.mixer.in_proj.weight single_transformer_blocks.0.proj_out.weight",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    assert dict.fromkeys(CASES[kind].split(), kind) == {name: layer_kind(name) for name in CASES[kind].split()}


def test_shapes_tell_convolutions() -> None:
    assert "conv" == layer_kind("down_blocks.0.attentions.0.proj_in.weight", (4, 4, 1, 1))
    assert "other" == layer_kind("down_blocks.0.attentions.0.proj_in.weight", (4, 4))


@pytest.mark.parametrize("model", ["bert", "llama", "gpt2"])
def test_every_weight_of_a_model_has_a_kind(model: str) -> None:
    assert [] == [name for name, _ in MODELS[model]().named_parameters() if layer_kind(name) == "other"]
