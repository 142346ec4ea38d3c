"""What is no LoRA that can be converted is refused by its name and with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.errors import FormatError, SourceError
from shira_format.format import load
from shira_format.lora import DIALECTS, open_lora, refusals
from shira_format.lora.peft.tuners import REFUSED, TUNERS
from shira_format.lora.refusals import KINDS, kind_of

State = dict[str, torch.Tensor]


def zeros(*shapes: tuple[str, tuple[int, ...]]) -> State:
    return {key: torch.zeros(shape) for key, shape in shapes}


def ab(stem: str, rows: int = 4, columns: int = 4) -> State:
    return {f"{stem}.lora_A.weight": torch.ones(2, columns), f"{stem}.lora_B.weight": torch.ones(rows, 2)}


# What it is, the keys, and what the message says.
FILES: dict[str, tuple[State, str]] = {
    "FLUX's Canny and Depth": (
        ab("img_in", 4, 8) | ab("double_blocks.0.img_attn.qkv", 12) | {"img_in.lora_B.bias": torch.ones(4), "double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(2)},
        r"control LoRA of FLUX's authors.*more columns.*full_to_shira",
    ),
    "Stability's Control-LoRA": (zeros(("lora_controlnet", (0,)), ("input_blocks.1.1.proj_in.up", (4, 2)), ("input_hint_block.0.weight", (4, 4))), "a Control-LoRA"),
    "ControlNet": (zeros(("control_model.input_hint_block.0.weight", (4, 4)), ("control_model.zero_convs.0.0.weight", (4, 4))), "a ControlNet: a network of its own"),
    "ControlNet of diffusers": (zeros(("controlnet_cond_embedding.conv_in.weight", (4, 4)), ("controlnet_down_blocks.0.weight", (4, 4))), "a ControlNet"),
    "ControlNet of FLUX": (zeros(("controlnet_blocks.0.weight", (4, 4)), ("transformer_blocks.0.attn.to_q.weight", (4, 4))), "a ControlNet"),
    "ControlNet-LLLite": (zeros(("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight", (4, 4))), "a ControlNet-LLLite"),
    "IP-Adapter": (zeros(("image_proj.proj.weight", (4, 4)), ("ip_adapter.1.to_k_ip.weight", (4, 4))), "an IP-Adapter"),
    "IP-Adapter for faces": (zeros(("image_proj.proj.0.weight", (4, 4)), ("ip_adapter.0.to_q_lora.down.weight", (2, 4)), ("ip_adapter.0.to_q_lora.up.weight", (4, 2)), ("ip_adapter.1.to_k_ip.weight", (4, 4))), "an IP-Adapter"),
    "IP-Adapter of XLabs": (zeros(("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight", (4, 4)), ("ip_adapter_proj_model.proj.weight", (4, 4))), "an IP-Adapter"),
    "T2I-Adapter": (zeros(("adapter.body.0.resnets.0.block1.weight", (4, 4))), "a T2I-Adapter"),
    "embedding of SD": (zeros(("emb_params", (2, 4))), "a textual-inversion embedding"),
    "embedding of SDXL": (zeros(("clip_l", (2, 4)), ("clip_g", (2, 4))), "a textual-inversion embedding"),
    "embedding of FLUX": (zeros(("clip_l", (2, 4)), ("t5", (2, 4)), ("t5_out", (2, 4))), "a textual-inversion embedding"),
    "embedding of diffusers": (zeros(("<cat-toy>", (4,))), "a textual-inversion embedding"),
    "prompt tuning": (zeros(("prompt_embeddings", (8, 4))), "a tuned prompt of PEFT"),
    "AdaLoRA": ({"base_model.model.l.lora_A": torch.ones(2, 4), "base_model.model.l.lora_B": torch.ones(4, 2), "base_model.model.l.lora_E": torch.ones(2, 1)}, "an adapter of AdaLoRA"),
    "VeRA": (zeros(("base_model.model.l.vera_lambda_b", (4,)), ("base_model.model.l.vera_lambda_d", (2,))), "an adapter of VeRA"),
    "FourierFT": (zeros(("base_model.model.l.fourierft_spectrum", (4,))), "an adapter of FourierFT"),
    "SHiRA": (zeros(("base_model.model.l.shira_weight", (4,)), ("base_model.model.l.shira_indices", (2, 4))), "peft_to_shira"),
    "PEFT's LoRA without its configuration": (ab("base_model.model.l"), "adapter_config.json.*is missing"),
    "PEFT's LoHa without its configuration": (zeros(*((f"base_model.model.l.hada_w{n}_{x}", (4, 4)) for n in "12" for x in "ab")), "adapter_config.json.*is missing"),
    "Nunchaku": (zeros(("transformer_blocks.0.qkv_proj.lora_down", (4, 2)), ("transformer_blocks.0.qkv_proj.lora_up", (4, 2))), "Nunchaku"),
    "a full checkpoint": (zeros(("l.weight", (4, 4)), ("l.bias", (4,))), "whole weights of a model.*full_to_shira"),
    "LLM.int8": ({"l.weight": torch.zeros(4, 4, dtype=torch.int8), "l.SCB": torch.ones(4)}, "'l.weight' holds codes of bitsandbytes 8-bit"),
    "GPTQ": ({"l.qweight": torch.zeros(4, 4, dtype=torch.int32), "l.qzeros": torch.zeros(1, 4, dtype=torch.int32), "l.scales": torch.ones(1, 4)}, "'l.qweight' holds codes of GPTQ or AWQ"),
    "a LoRA beside quantised weights": ({"lora_unet_l.lora_down.weight": torch.ones(2, 4), "lora_unet_l.lora_up.weight": torch.ones(4, 2), "l.qweight": torch.zeros(4, 4, dtype=torch.int32), "l.qzeros": torch.zeros(1, 4, dtype=torch.int32)}, "unmatched key 'l.qweight'.*GPTQ"),
    "T-LoRA": ({"lora_unet_l.q_layer.weight": torch.ones(2, 4), "lora_unet_l.p_layer.weight": torch.ones(4, 2), "lora_unet_l.lambda_layer": torch.ones(1, 2), "lora_unet_m.lora_down.weight": torch.ones(2, 4), "lora_unet_m.lora_up.weight": torch.ones(4, 2)}, "T-LoRA depends on the sampling step"),
    "a bundle": (ab("diffusion_model.l") | {"bundle_emb.cat.clip_l": torch.ones(2, 4)}, "bundled with an embedding"),
    "a control LoRA in diffusers' names": (ab("transformer.x_embedder", 4, 8), r"'transformer.x_embedder.lora_A.weight' has shape \[2, 8\].*\[4, 4\]: a control LoRA"),
    "ComfyUI's control LoRA": (ab("diffusion_model.l") | {"diffusion_model.l.reshape_weight": torch.tensor([4.0, 8.0])}, "shape of the base's weight.*control LoRAs"),
    "nothing": ({}, "it holds no tensors"),
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Any:
    state = {
        "l.weight": torch.ones(4, 4),
        "l.bias": torch.ones(4),
        "m.weight": torch.ones(4, 4),
        "x_embedder.weight": torch.ones(4, 4),
    }
    save_file(state, tmp_path / "base.safetensors")
    return open_checkpoint(tmp_path / "base.safetensors")


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_files(name: str, in_folder: bool, base: Any, tmp_path: Path) -> None:
    state, reason = FILES[name]
    (tmp_path / "folder").mkdir()
    save_file(state, tmp_path / "folder" / "some.safetensors")
    with pytest.raises(SourceError, match=reason) as caught:
        open_lora(tmp_path / "folder" / ("" if in_folder else "some.safetensors"), base)
    assert "known dialect" not in str(caught.value)
    assert "some.safetensors" in str(caught.value)


PICKLES: dict[str, tuple[Any, str]] = {
    "embedding": ({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 4)}, "name": "x"}, "a textual-inversion embedding"),
    "hypernetwork": ({768: ({"linear.0.weight": torch.ones(2, 2)}, {"linear.0.weight": torch.ones(2, 2)}), "step": 3}, "a hypernetwork"),
    "optimizer": ({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}, "a state of an optimizer"),
    "IP-Adapter": ({"image_proj": {"proj.weight": torch.ones(2, 2)}, "ip_adapter": {"1.to_k_ip.weight": torch.ones(2, 2)}}, "an IP-Adapter"),
    "PhotoMaker": ({"id_encoder": {"a.weight": torch.ones(2, 2)}, "lora_weights": {"b.weight": torch.ones(2, 2)}}, "a PhotoMaker"),
    "token": ({"<cat>": torch.ones(4)}, "a textual-inversion embedding"),
    "a list": ([torch.ones(2)], "contains a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_pickles(name: str, base: Any, tmp_path: Path) -> None:
    value, reason = PICKLES[name]
    torch.save(value, tmp_path / "some.pt")
    with pytest.raises(SourceError, match=reason) as caught:
        open_lora(tmp_path / "some.pt", base)
    assert "some.pt" in str(caught.value)


def gguf_model(path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "adapters.npz": (lambda path: np.savez(path, a=np.ones(2)), "a NumPy archive.*safetensors"),
    "lora.txt": (lambda path: path.write_text("x"), "does not end in .safetensors"),
    "model.gguf": (gguf_model, "general.type.*not a LoRA of llama.cpp"),
    "damaged.safetensors": (lambda path: path.write_bytes(b"x" * 20), "damaged.safetensors"),
    "damaged.pt": (lambda path: path.write_bytes(b"x" * 20), "damaged.pt"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files(name: str, base: Any, tmp_path: Path) -> None:
    write, reason = OTHERS[name]
    write(tmp_path / name)
    with pytest.raises((SourceError, FormatError), match=reason) as caught:
        open_lora(tmp_path / name, base)
    assert name in str(caught.value)


def test_folders(base: Any, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text("x")
    with pytest.raises(SourceError, match=r"folder: .* has no file that ends in \.safetensors"):
        open_lora(tmp_path / "folder", base)


def test_the_dialect_of_the_user_does_not_hide_what_it_is(base: Any, tmp_path: Path) -> None:
    save_file(FILES["IP-Adapter for faces"][0], tmp_path / "x.safetensors")
    for dialect in ("kohya", "lycoris", "diffusers"):
        with pytest.raises(SourceError, match="an IP-Adapter"):
            open_lora(tmp_path / "x.safetensors", base, dialect=dialect)


def test_peft_type_of_a_configuration(base: Any, tmp_path: Path) -> None:
    save_file(FILES["prompt tuning"][0], tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    with pytest.raises(SourceError, match="PROMPT_TUNING"):
        open_lora(tmp_path / "adapter_model.safetensors", base)


def test_keys_that_contradict_each_other_are_reported(base: Any, tmp_path: Path) -> None:
    state = {
        "lora_unet__orig_mod_l.lora_down.weight": torch.ones(2, 4),
        "lora_unet_l.lora_down.weight": torch.ones(2, 4),
    }
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match="are one name"):
        open_lora(tmp_path / "x.safetensors", base)


def test_a_lora_is_none_of_these() -> None:
    from tests.lora_grid import combinations, layouts, make

    places = layouts()
    for number, combination in enumerate(combinations()):
        if number % 97 == 0 and not combination.defect:
            assert kind_of(make(combination, places[combination.layout]).keys) is None
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert kind_of(["transformer.x_embedder.lora_A.weight"]) is None
    assert set(DIALECTS) >= {"kohya", "lycoris", "diffusers", "xlabs"}


@pytest.mark.parametrize("how", ["beside", "header", "none"])
def test_weights_stored_as_in_by_out(how: str, tmp_path: Path) -> None:
    """PEFT's keys of a GPT-2 without PEFT's prefix begin as those of a pipeline's transformer."""
    base = {
        "transformer.h.0.attn.c_attn.weight": torch.ones(4, 12),
        "transformer.h.0.attn.c_proj.weight": torch.ones(4, 4),
    }
    if how != "none":  # seen from the options alone
        del base["transformer.h.0.attn.c_attn.weight"]
    save_file(base, tmp_path / "base.safetensors")
    options = {"r": 2, "lora_alpha": 4, "fan_in_fan_out": True}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in options.items()})}
    (tmp_path / "lora").mkdir()
    save_file(
        ab("transformer.h.0.attn.c_proj"), tmp_path / "lora" / "x.safetensors", header if how == "header" else None
    )
    if how == "beside":
        (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **options}))
    with pytest.raises(SourceError, match=r"fan_in_fan_out is set|stored as \[in, out\]"):
        open_lora(tmp_path / "lora" / "x.safetensors", open_checkpoint(tmp_path / "base.safetensors"))


@pytest.mark.parametrize("keys", [{"diffusion_model.l.diff_b": torch.ones(4)}, {"lora_unet_l.lora_down.weight": torch.ones(2, 4), "lora_unet_l.lora_up.weight": torch.ones(4, 2), "lora_unet_l.alpha": torch.tensor(0.0)}])  # fmt: skip
def test_what_is_no_reason(keys: State, base: Any, tmp_path: Path) -> None:
    """Biases alone are a change, and a kohya alpha of 0 means the rank."""
    save_file(keys, tmp_path / "x.safetensors")
    lora_to_shira(tmp_path / "x.safetensors", base, tmp_path / "x.st", density=1.0)
    adapter = load(tmp_path / "x.st")
    assert len(adapter) + len(adapter.dense) == 1


def test_an_alpha_of_0_for_diffusers_has_two_readings(base: Any, tmp_path: Path) -> None:
    save_file(ab("diffusion_model.l") | {"diffusion_model.l.alpha": torch.tensor(0.0)}, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match="'diffusion_model.l.alpha' is 0.*--dialect kohya"):
        open_lora(tmp_path / "x.safetensors", base)
    assert open_lora(tmp_path / "x.safetensors", base, dialect="kohya").updates


def test_a_method_of_peft_without_its_configuration_says_what_is_missing_or_why_it_is_never_read() -> None:
    """Each method that has parts of its own is read with its configuration or refused by its type."""
    for word, (name, kind) in refusals._METHODS.items():
        told = refusals.kind_of([f"base_model.model.layer.{word}x"])
        assert told is not None
        assert told.startswith(f"an adapter of {name}: ")
        assert ("adapter_config.json" in told) == (kind in TUNERS)
        assert (kind in TUNERS) != (kind in REFUSED)
