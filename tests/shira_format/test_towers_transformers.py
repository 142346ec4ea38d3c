"""Names of transformers' vision-language and audio models, on disk and in memory, found in each other; values are the oracle."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn
from transformers.models.mllama import MllamaTextConfig, MllamaVisionConfig

from shira_format.names.prefixes import match_names
from tests.shira_format.test_lora_peft_experts import SMALL

CLIP: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4, "intermediate_size": 20,
    "out_hidden_size": 16, "fullatt_block_indexes": [1],
}  # fmt: skip
QWEN_TEXT = SMALL | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
AUDIO: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 20, "num_mel_bins": 8, "max_source_positions": 16,
}  # fmt: skip
MLLAMA: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2, "image_size": 8,
    "patch_size": 4, "intermediate_layers_indices": [0], "vision_output_dim": 32, "supported_aspect_ratios": [[1, 1]],
}  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llava": lambda: hf.LlavaForConditionalGeneration(hf.LlavaConfig(text_config=hf.LlamaConfig(**SMALL), vision_config=hf.CLIPVisionConfig(**CLIP))),
    "llava_next": lambda: hf.LlavaNextForConditionalGeneration(hf.LlavaNextConfig(text_config=hf.LlamaConfig(**SMALL), vision_config=hf.CLIPVisionConfig(**CLIP), image_grid_pinpoints=[[8, 8]])),
    "qwen2_vl": lambda: hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=QWEN_TEXT, vision_config=QWEN)),
    "qwen2_5_vl": lambda: hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=QWEN)),
    "gemma3": lambda: hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(text_config=hf.Gemma3TextConfig(**SMALL), vision_config=hf.SiglipVisionConfig(**CLIP), mm_tokens_per_image=4)),
    "paligemma": lambda: hf.PaliGemmaForConditionalGeneration(hf.PaliGemmaConfig(text_config=hf.GemmaConfig(**SMALL), vision_config=hf.SiglipVisionConfig(**CLIP, projection_dim=16))),
    "mllama": lambda: hf.MllamaForConditionalGeneration(hf.MllamaConfig(text_config=MllamaTextConfig(**SMALL, cross_attention_layers=[1]), vision_config=MllamaVisionConfig(**MLLAMA))),
    "mistral3": lambda: hf.Mistral3ForConditionalGeneration(hf.Mistral3Config(text_config=hf.MistralConfig(**SMALL), vision_config=hf.PixtralVisionConfig(**CLIP))),
    "qwen2_audio": lambda: hf.Qwen2AudioForConditionalGeneration(hf.Qwen2AudioConfig(text_config=hf.Qwen2Config(**SMALL), audio_config=AUDIO)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_names_on_disk_and_in_memory(name: str, tmp_path: Path) -> None:
    """Of all matrices, of the attentions, and of the language model alone: each name finds the tensor of its values."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MODELS[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
        model.save_pretrained(tmp_path)  # type: ignore[operator]
    tied = "lm_head.weight" if getattr(model.config, "tie_word_embeddings", False) else ""
    disk, memory = (
        {n: t for n, t in state.items() if t.ndim == 2 and len(t) > 1 and n != tied}
        for state in (load_file(tmp_path / "model.safetensors"), model.state_dict())
    )
    assert disk.keys() != memory.keys()
    for ours, theirs in ((disk, memory), (memory, disk)):
        attention = [n for n in ours if "q_proj" in n or "qkv" in n]
        text = [n for n in ours if not any(word in n for word in ("vis", "audio", "projector"))]
        for names in (list(ours), attention, text):
            rename = match_names(names, theirs, "it", fits=lambda n, f: ours[n].shape == theirs[f].shape)  # noqa: B023
            for tensor in names:
                assert torch.equal(ours[tensor], theirs[rename(tensor)]), (tensor, rename(tensor))
