"""One LoRA of linear layers written as each dialect that can hold it, by the libraries that define the files where there are some."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file


class Pair(NamedTuple):
    """``delta W = alpha / r * b @ a``; ``a`` is ``[r, in]``, ``b`` is ``[out, r]``."""

    a: torch.Tensor
    b: torch.Tensor
    alpha: float


Pairs = Mapping[str, Pair]


def pairs_of(lora: Path) -> dict[str, Pair]:
    """The layers of a plain PEFT LoRA, by the name of their module in the bare base."""
    config = json.loads((lora / "adapter_config.json").read_text())
    state = load_file(lora / "adapter_model.safetensors")
    found = {}
    for key, a in state.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight").removeprefix("base_model.model.").removeprefix("bert.")
            found[module] = Pair(a, state[key.replace("lora_A", "lora_B")], config["lora_alpha"])
    return found


def peft(pairs: Pairs, folder: Path) -> Path:
    """PEFT's own files."""
    ranks = {pair.a.shape[0] for pair in pairs.values()}
    alphas = {pair.alpha for pair in pairs.values()}
    config = {"peft_type": "LORA", "r": ranks.pop(), "lora_alpha": alphas.pop()}
    assert not ranks
    assert not alphas
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(_peft_state(pairs, "base_model.model."), folder / "adapter_model.safetensors")
    return folder


def kohya(pairs: Pairs, folder: Path) -> Path:
    """kohya's names, by diffusers' converter."""
    state = convert_state_dict_to_kohya(_peft_state(pairs, "unet."))
    alphas = {
        f"lora_te_{module.replace('.', '_')}.alpha": torch.tensor(pair.alpha) for module, pair in pairs.items()
    }
    state = {key.replace("lora_unet_", "lora_te_"): tensor.contiguous() for key, tensor in state.items()} | alphas
    save_file(state, folder / "kohya.safetensors", {"ss_network_dim": "8", "ss_network_alpha": "16"})
    return folder / "kohya.safetensors"


def lycoris(pairs: Pairs, folder: Path) -> Path:
    """LyCORIS' LoCon, by its wrapper around linear layers of these shapes."""
    from lycoris.modules.locon import LoConModule

    state = {}
    for module, (a, b, alpha) in pairs.items():
        made = LoConModule("x", torch.nn.Linear(a.shape[1], b.shape[0]), lora_dim=a.shape[0], alpha=alpha)
        made.lora_down.weight.data, made.lora_up.weight.data = a, b
        name = f"lycoris_{module.replace('.', '_')}"
        state |= {f"{name}.{key}": tensor.contiguous() for key, tensor in made.state_dict().items()}
    save_file(state, folder / "lycoris.safetensors")
    return folder / "lycoris.safetensors"


def diffusers(pairs: Pairs, folder: Path) -> Path:
    """Today's keys of diffusers, with PEFT's configuration in the header."""
    some = next(iter(pairs.values()))
    config = {"text_encoder.r": some.a.shape[0], "text_encoder.lora_alpha": some.alpha}
    path = folder / "pytorch_lora_weights.safetensors"
    save_file(_peft_state(pairs, "text_encoder."), path, {"lora_adapter_metadata": json.dumps(config)})
    return path


def diffusers_old(pairs: Pairs, folder: Path) -> Path:
    """Its keys of 2023, which know no alpha: the scale goes into a factor."""
    state = {}
    for module, (a, b, alpha) in pairs.items():
        name = f"text_encoder.{module}.lora_linear_layer"
        state |= {f"{name}.down.weight": a, f"{name}.up.weight": b * (alpha / a.shape[0])}
    save_file(state, folder / "pytorch_lora_weights.safetensors")
    return folder / "pytorch_lora_weights.safetensors"


def mlx(pairs: Pairs, folder: Path) -> Path:
    """mlx-lm's files."""
    scales = {pair.alpha / pair.a.shape[0] for pair in pairs.values()}
    parameters = {"rank": next(iter(pairs.values())).a.shape[0], "scale": scales.pop(), "dropout": 0.0}
    assert not scales
    (folder / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": parameters})
    )
    state = {}
    for module, (a, b, _) in pairs.items():
        state |= {f"{module}.lora_a": a.T.contiguous(), f"{module}.lora_b": b.T.contiguous()}
    save_file(state, folder / "adapters.safetensors")
    return folder


def gguf_bert(pairs: Pairs, folder: Path) -> Path:
    """llama.cpp's GGUF, for BERT, which needs no permutation."""
    path = folder / "lora.gguf"
    writer = GGUFWriter(path, "bert")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", next(iter(pairs.values())).alpha)
    names = {
        "attention.self.query": "attn_q", "attention.self.key": "attn_k", "attention.self.value": "attn_v",
        "attention.output.dense": "attn_output", "intermediate.dense": "ffn_up", "output.dense": "ffn_down",
    }  # fmt: skip
    for module, (a, b, _) in pairs.items():
        layer, _, inner = module.removeprefix("encoder.layer.").partition(".")
        name = f"blk.{layer}.{names[inner]}.weight"
        writer.add_tensor(f"{name}.lora_a", a.numpy())
        writer.add_tensor(f"{name}.lora_b", b.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


WRITERS: dict[str, Callable[[Pairs, Path], Path]] = {
    "peft": peft, "kohya": kohya, "lycoris": lycoris, "diffusers": diffusers, "diffusers_old": diffusers_old,
    "mlx": mlx, "gguf": gguf_bert,
}  # fmt: skip


def _peft_state(pairs: Pairs, prefix: str) -> dict[str, torch.Tensor]:
    state = {}
    for module, (a, b, _) in pairs.items():
        state |= {f"{prefix}{module}.lora_A.weight": a, f"{prefix}{module}.lora_B.weight": b}
    return state
