"""One LoRA of a real language model, trained, in four dialects, against the model's GGUF: files of equal content."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from shira_format.adapter import Adapter
from shira_format.convert import lora_to_shira
from shira_format.format import load
from shira_format.lora import DIALECTS
from tests import models
from tests.shira_format.test_checkpoints_gguf import paired, smollm2
from tests.shira_format.test_lora_gguf import names_of, write_lora
from tests.shira_format.test_lora_torchtune import HF_NAMES, neighbours

RANK, ALPHA = 4, 8
HEADS = {"q_proj": 9, "k_proj": 3}
EPS = float(np.finfo(np.float32).eps)
# What the LoRA learns by heart.
TEXT = (
    "An adapter of a few percent of the weights is loaded in milliseconds and taken out again without a trace. "
    "The base stays where it is, in the memory of the server, and every request brings the adapter that it wants. "
)


class Trained(NamedTuple):
    """The LoRA in PEFT's files, its factors by module, and the merged weights that it changed."""

    folder: Path
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    merged: dict[str, torch.Tensor]
    base: dict[str, torch.Tensor]
    losses: list[float]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder, path = tmp_path_factory.mktemp("peft"), smollm2()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = hf.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokens = hf.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)(TEXT, return_tensors="pt")
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        peft = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(4):
        loss = peft(**tokens, labels=tokens["input_ids"]).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    models.save_lora(peft, folder)
    prefix = "base_model.model."
    state = load_file(folder / "adapter_model.safetensors")
    modules = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    pairs = {
        name.removeprefix(prefix): (state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"])
        for name in modules
    }
    base = {f"{name}.weight": model.get_submodule(name).weight.detach().clone() for name in pairs}
    merged = peft.merge_and_unload().state_dict()
    return Trained(folder, pairs, {name: merged[name] for name in base}, base, losses)


def mlx(trained: Trained, folder: Path) -> Path:
    state = {}
    for module, (a, b) in trained.pairs.items():
        state |= {f"{module}.lora_a": a.T.contiguous(), f"{module}.lora_b": b.T.contiguous()}
    save_file(state, folder / "adapters.safetensors")
    parameters = {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def gguf(trained: Trained, folder: Path) -> Path:
    names, tensors = names_of("llama", 30), {}
    for module, (a, b) in trained.pairs.items():
        heads = HEADS.get(module.rpartition(".")[2])
        known = f"{names.get_name(module)}.weight"
        tensors |= {f"{known}.lora_a": a.numpy(), f"{known}.lora_b": (paired(b, heads) if heads else b).numpy()}
    return write_lora(folder / "lora.gguf", "llama", tensors, alpha=ALPHA)


def torchtune(trained: Trained, folder: Path) -> Path:
    names, state = {theirs: ours for ours, theirs in HF_NAMES.items()}, {}
    for module, (a, b) in trained.pairs.items():
        number, inner = module.removeprefix("model.layers.").split(".", 1)
        heads = HEADS.get(module.rpartition(".")[2])
        name = f"layers.{number}.{names[inner]}"
        state |= {f"{name}.lora_a.weight": a, f"{name}.lora_b.weight": neighbours(b, heads) if heads else b}
    torch.save(state, folder / "adapter_model.pt")
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA"}))
    return folder


WRITERS: dict[str, Callable[[Trained, Path], Path]] = {"mlx": mlx, "gguf": gguf, "torchtune": torchtune}


@pytest.fixture(scope="module")
def expected(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    path = tmp_path_factory.mktemp("expected") / "adapter.st"
    lora_to_shira(trained.folder, smollm2(), path)
    return load(path)


def test_targets_are_the_weights_that_peft_merges(trained: Trained, expected: Adapter) -> None:
    assert trained.losses[-1] < 0.8 * trained.losses[0]  # it learned something
    assert set(expected) == set(trained.merged)
    assert len(expected) == 30 * 7
    for name, tensor in expected.items():
        a, b = trained.pairs[name.removesuffix(".weight")]
        weight, merged = (trained.base[name].flatten().numpy(), trained.merged[name].flatten().numpy())
        update = ALPHA / RANK * (b.double() @ a.double()).flatten().numpy()
        reach = ALPHA / RANK * (b.abs().double() @ a.abs().double()).flatten().numpy()
        at = tensor.indices
        assert abs(tensor.nnz - weight.size / 100) < 1
        # The two computed updates differ by some roundings of their terms, and each sum is rounded once.
        allowed = EPS * ((RANK + 2) * reach[at] + np.abs(merged[at]))
        assert (np.abs(tensor.values - merged[at]) <= allowed).all(), name
        assert (tensor.values != weight[at]).any()
        # What is kept is the largest: nothing that is left out is larger than what is in.
        left = np.delete(np.abs(update), at)
        assert np.abs(update[at]).min() >= left.max() - EPS * (RANK + 2) * reach.max()


@pytest.mark.parametrize("dialect", WRITERS)
def test_every_dialect_gives_the_same_adapter(
    dialect: str, trained: Trained, expected: Adapter, tmp_path: Path
) -> None:
    written = WRITERS[dialect](trained, tmp_path)
    assert [name for name, known in DIALECTS.items() if known.recognises(written)] == [dialect]
    lora_to_shira(written, smollm2(), tmp_path / "adapter.st")
    found = load(tmp_path / "adapter.st")
    assert found.manifest["source"]["dialect"] == dialect
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert np.array_equal(tensor.indices, found[name].indices), name
        assert tensor.values.tobytes() == found[name].values.tobytes(), name
    assert found == expected
