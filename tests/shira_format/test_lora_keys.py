"""The grammar of keys: prefix, module and part are independent of each other."""

from __future__ import annotations

import itertools
import time

import pytest

from shira_format.lora.files import _is_of_scale, unwrapped_keys
from shira_format.lora.keys import Key, parse_key
from shira_format.lora.peft.base_names import _DEEP

DOTTED = ("", "unet", "transformer", "transformer_2", "text_encoder_3", "diffusion_model", "model.diffusion_model", "base_model.model", "clip_l", "text_encoders.t5xxl.transformer")  # fmt: skip
FLAT = ("lora_unet", "lora_transformer", "lora_prior_unet", "lora_te", "lora_te2", "lora_prior_te", "lycoris")
PARTS = {
    "lora_A.weight": ("lora_down", "peft"), "lora_B.weight": ("lora_up", "peft"), "lora_B.bias": ("lora_bias", "peft"),
    "lora_down.weight": ("lora_down", "kohya"), "lora_up.weight": ("lora_up", "kohya"), "lora_mid.weight": ("lora_mid", "lycoris"),
    "lora.down.weight": ("lora_down", "diffusers"), "lora_linear_layer.up.weight": ("lora_up", "diffusers"),
    "lora_magnitude_vector": ("lora_magnitude_vector", "peft"), "lora_magnitude_vector.weight": ("lora_magnitude_vector", "peft"),
    "alpha": ("alpha", ""), "dora_scale": ("dora_scale", "lycoris"), "diff": ("diff", "lycoris"), "diff_b": ("diff_b", "lycoris"),
    "hada_w1_a": ("hada_w1_a", "lycoris"), "lokr_w2": ("lokr_w2", "lycoris"), "oft_blocks": ("oft_blocks", "lycoris"),
    "weight": ("weight", ""), "set_weight": ("weight", "lycoris"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("prefix", "module", "part"),
    list(itertools.product(DOTTED, ("fc", "blocks.0.attn1.to_out.0", "model.layers.1.weight_norm"), PARTS)),
)
def test_names_with_dots(prefix: str, module: str, part: str) -> None:
    name, style = PARTS[part]
    assert parse_key(f"{prefix}{prefix and '.'}{module}.{part}") == Key(prefix, module, name, False, style)


@pytest.mark.parametrize(("prefix", "part"), list(itertools.product(FLAT, PARTS)))
def test_flat_names(prefix: str, part: str) -> None:
    name, style = PARTS[part]
    assert parse_key(f"{prefix}_blocks_0_to_q.{part}") == Key(prefix, "blocks_0_to_q", name, True, style)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("unet.a.attn1.processor.to_q_lora.down.weight", Key("unet", "a.attn1.to_q", "lora_down", False, "diffusers")),
        ("a.attn1.processor.to_out_lora.up.weight", Key("", "a.attn1.to_out.0", "lora_up", False, "diffusers")),
        ("unet.a.attn1.to_out_lora.alpha", Key("unet", "a.attn1.to_out.0", "alpha", False, "diffusers")),
        ("unet.a.attn.processor.add_k_proj_lora.up.weight", Key("unet", "a.attn.add_k_proj", "lora_up", False, "diffusers")),
        ("text_encoder_2.x.self_attn.to_out_lora.up.weight", Key("text_encoder_2", "x.self_attn.out_proj", "lora_up", False, "diffusers")),
        ("text_encoder.x.fc1.lora_linear_layer.alpha", Key("text_encoder", "x.fc1", "alpha", False, "diffusers")),
        ("diffusion_model.double_blocks.0.processor.qkv_lora1.down.weight", Key("diffusion_model", "double_blocks.0.processor.qkv_lora1", "lora_down", False, "xlabs")),
        ("a.norm.bias", Key("", "a.norm.bias", "weight", False, "")),
        ("a.query_norm.scale", Key("", "a.query_norm.scale", "weight", False, "")),
        ("a.query_norm.scale.diff", Key("", "a.query_norm.scale", "diff", False, "lycoris")),
    ],
)  # fmt: skip
def test_special_names(key: str, expected: Key) -> None:
    assert parse_key(key) == expected


@pytest.mark.parametrize(
    "key",
    ["", "weight", ".weight", "x", "unet.a.lora_A.bias", "unet.a.lora_A.default.weight", "a.lora_embedding_A", "lora_unet_a.b.alpha",
     "lora_unet_a.lora_mad.weight", "x.processor.proj_lora.up.weight", "double_blocks.0.processor.qkv_lora3.up.weight", "a.running_mean"],
)  # fmt: skip
def test_other_keys(key: str) -> None:
    assert parse_key(key) is None


@pytest.mark.parametrize("part", ["_", ".base_layer", ".modules_to_save.a", ".lora_A.default", "lora_", ".0"])
def test_long_keys_take_time_in_proportion_to_their_length(part: str) -> None:
    start = time.process_time()
    for tail in ("", "!", "\n!", ".weight"):
        key = part * (300_000 // len(part)) + tail
        assert not _is_of_scale(key)
        assert len(unwrapped_keys([key], "a LoRA", ["w"])) == 1
        _DEEP.sub("", key)
    assert time.process_time() - start < 10
