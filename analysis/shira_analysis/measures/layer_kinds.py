"""The kind of layer that a weight belongs to, detected from its name in common model libraries."""

from __future__ import annotations

import re

KINDS = (
    "query", "key", "value", "qkv", "attention output",
    "mlp up", "mlp gate", "mlp gate and up", "mlp down", "router",
    "embedding", "norm", "conv", "modulation", "head", "other",
)  # fmt: skip
"""All kinds, in display order. ``qkv`` is a fused projection of at least two of query, key and value."""

_END = re.compile(r"\.(weight|bias|gamma|beta)$")
_ATTENTION = r"(?:attn\w*|attention|self_attn|self_?attention|encdecattention|crossattention|self|attns?)"

# The first match wins; names are in lower case, without a final ".weight" or ".bias". Ambiguous names (dense, c_proj, wo,
# output) are matched together with the component before them.
_RULES: tuple[tuple[str, str], ...] = (
    (r"(^|\.)mixer\.(in_proj|out_proj|x_proj|dt_proj)$", "other"),  # Mamba has no attention
    (r"(norm\w*|layrnorm|ln_?\w*|layernorm\w*|layer_norm\w*)$", "norm"),
    (r"norm\w*\.(linear\w*)$|(adaln\w*|ada_ln\w*|modulation|mod|time_emb_proj)(\.\w+)*$", "modulation"),
    (r"(word|position|token_type|patch|tok|token|pos)?_?embed(ding)?s?(_\w+)?(\.\w+)*$|embeddings\.\w+(\.projection)?$", "embedding"),
    (r"(^|\.)(wte|wpe|token_embd|shared|embed_\w+|\w+_embeddings?|time_emb\w*\.\w+|\w*_embedder(\.[\w.]+)?|relative_attention_bias)$", "embedding"),
    (r"(^|\.)(query_key_value|qkv|qkv_proj|to_qkv|c_attn|wqkv|in_proj|attn_qkv|to_kv|kv_proj|kv_[ab]_proj\w*|key_value)$", "qkv"),
    (r"(^|\.)(query|q_proj|to_q|q_lin|wq|attn_q|linear_q|query_proj|add_q_proj|q_[ab]_proj|attention\.q|attn\.q)$", "query"),
    (r"(^|\.)(key|k_proj|to_k|k_lin|wk|attn_k|linear_k|key_proj|add_k_proj)$", "key"),
    (r"(^|\.)(value|v_proj|to_v|v_lin|wv|attn_v|linear_v|value_proj|add_v_proj)$", "value"),
    (rf"(^|\.){_ATTENTION}\.q$", "query"),
    (rf"(^|\.){_ATTENTION}\.k$", "key"),
    (rf"(^|\.){_ATTENTION}\.v$", "value"),
    (rf"(^|\.){_ATTENTION}\.(o|wo|output|c_proj|dense|out|proj|out_proj)(\.\w+)?$", "attention output"),
    (r"(^|\.)(o_proj|out_proj|to_out(\.0)?|to_add_out|out_lin|attn_output|attn_out|linear_out|attention_output|output_proj)$", "attention output"),
    (r"(^|\.)(gate_up_proj|wi_fused|fc1_gate|w12|gate_and_up_proj)$", "mlp gate and up"),
    (r"(^|\.)(router(\.\w+)*|block_sparse_moe\.gate|mlp\.gate|moe\.gate|feed_forward\.gate|gate_inp|shared_expert_gate)$", "router"),
    (r"(^|\.)(gate_proj|wi_0|w1|ffn_gate|gate)$", "mlp gate"),
    (r"(^|\.)(up_proj|wi_1|w3|ffn_up|c_fc|fc1|lin1|dense_h_to_4h|intermediate\.dense|wi|linear1|fc_in|proj_mlp|ff(n|_context)?\.net\.0(\.proj)?)$", "mlp up"),
    (r"(^|\.)(down_proj|wo|w2|ffn_down|fc2|lin2|dense_4h_to_h|mlp\.c_proj|output\.dense|linear2|fc_out|mlp\.proj|ff(n|_context)?\.net\.2)$", "mlp down"),
    (r"(^|\.)\w*conv\w*(\.\w+)*$|(^|\.)(down|up)samplers?\.\d+\.\w+$", "conv"),
    (r"(^|\.)(lm_head|head|classifier|score|embed_out|output|cls\.[\w.]+|qa_outputs|pooler\.dense|pre_classifier|visual_projection|text_projection)(\.\w+)?$|^proj_out$", "head"),
)  # fmt: skip
_COMPILED = tuple((re.compile(pattern), kind) for pattern, kind in _RULES)


def layer_kind(name: str, shape: tuple[int, ...] | None = None) -> str:
    """The kind of the layer that a weight belongs to, one of :data:`KINDS`; a bias has the kind of its weight.

    Args:
        name: the weight's name in its checkpoint.
        shape: if given, a weight with four or five dimensions and an unknown name is a convolution.
    """
    if name.endswith(("in_proj_weight", "in_proj_bias")):  # torch.nn.MultiheadAttention
        return "qkv"
    stem = _END.sub("", name).lower()
    for pattern, kind in _COMPILED:
        if pattern.search(stem):
            return kind
    return "conv" if shape is not None and len(shape) in (4, 5) else "other"
