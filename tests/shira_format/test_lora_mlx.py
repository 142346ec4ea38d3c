"""mlx-lm's LoRAs against its layers' forward passes, written again for torch from its sources.

mlx does not run everywhere, so that mlx-lm cannot be the peer itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from shira_format.checkpoints import open_checkpoint
from shira_format.errors import SourceError
from shira_format.lora import DIALECTS, Lora, open_lora
from tests import models
from tests.updates import close, dense, merge

RANK, SCALE = 4, 1.75
LINEAR_OF_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Adapted(nn.Module):
    """``LoRALinear``, ``DoRALinear``, ``LoRAEmbedding`` and ``DoRAEmbedding`` of mlx-lm: their ``__call__``."""

    def __init__(self, inner: nn.Module, dora: bool) -> None:
        super().__init__()
        self.inner = inner
        rows, columns = inner.weight.shape
        if isinstance(inner, Conv1D):
            rows, columns = columns, rows
        ins, outs = (rows, columns) if isinstance(inner, nn.Embedding) else (columns, rows)
        self.lora_a, self.lora_b = 0.2 * torch.randn(ins, RANK), 0.2 * torch.randn(RANK, outs)
        self.m = self.held().norm(dim=1) * (1 + 0.2 * torch.randn(rows)) if dora else None

    @property
    def weight(self) -> torch.Tensor:
        return self.inner.weight

    def held(self) -> torch.Tensor:
        """As mlx holds it: ``[out, in]`` of a linear layer, also of GPT-2's."""
        weight = self.inner.weight.detach()
        return weight.T if isinstance(self.inner, Conv1D) else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.inner, nn.Embedding):
            y, z = self.held()[x], SCALE * self.lora_a[x] @ self.lora_b
            out = y + z
            return out if self.m is None else (self.m[x] / out.norm(dim=-1))[..., None] * out
        out = x @ self.held().T + SCALE * ((x @ self.lora_a) @ self.lora_b)
        if self.m is not None:
            adapted = self.held() + (SCALE * self.lora_b.T) @ self.lora_a.T
            out = (self.m / adapted.norm(dim=1)) * out
        bias = getattr(self.inner, "bias", None)
        return out if bias is None else out + bias

    def state(self) -> dict[str, torch.Tensor]:
        found = {"lora_a": self.lora_a, "lora_b": self.lora_b}
        return found if self.m is None else found | {"m": self.m}


def adapt(model: nn.Module, leaves: tuple[str, ...], dora: bool = False) -> dict[str, torch.Tensor]:
    """Put layers of mlx-lm into ``model``; returns what it would save."""
    torch.manual_seed(21)
    state = {}
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in leaves:
            parent = model.get_submodule(name.rpartition(".")[0])
            layer = Adapted(module, dora)
            setattr(parent, name.rpartition(".")[2], layer)
            state |= {f"{name}.{key}": tensor for key, tensor in layer.state().items()}
    return state


def save(folder: Path, state: Mapping[str, torch.Tensor], **options: Any) -> Path:
    """The two files, with the keys that today's mlx-lm writes."""
    folder.mkdir(exist_ok=True)
    parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.0} | options.pop("parameters", {})
    config = {"fine_tune_type": "lora", "lora_parameters": parameters, "model": "some/base", "num_layers": 16}
    config |= options
    (folder / "adapter_config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    state = {key: tensor.contiguous() for key, tensor in state.items()}
    save_file(state, folder / "adapters.safetensors", {"format": "mlx"})
    return folder


class Saved:
    """A base and a LoRA of it on disk, and the model as mlx-lm would run it."""

    def __init__(self, folder: Path, model: str, leaves: tuple[str, ...], dora: bool = False) -> None:
        self.make = models.MODELS[model]
        self.base = models.save_base(self.make(), folder / "base")
        self.running = self.make()
        self.lora = save(
            folder / "lora", adapt(self.running, leaves, dora), fine_tune_type="dora" if dora else "lora"
        )

    def edit(self, change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]) -> None:
        path = self.lora / "adapters.safetensors"
        save_file(dict(change({key: tensor.clone() for key, tensor in load_file(path).items()})), path)

    def configure(self, **changes: Any) -> None:
        path = self.lora / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def read(self) -> Lora:
        return open_lora(self.lora, open_checkpoint(self.base))


@pytest.fixture
def llama(tmp_path: Path) -> Saved:
    return Saved(tmp_path, "llama", ("q_proj", "down_proj"))


def refused(saved: Saved, reason: str, file: str = "adapters.safetensors") -> None:
    with pytest.raises(SourceError) as caught:
        saved.read()
    assert f"{saved.lora / file}: {reason}" == str(caught.value)


CASES: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "llama": ("llama", LINEAR_OF_LLAMA, False),
    "llama_head": ("llama", ("v_proj", "lm_head"), False),
    "llama_embedding": ("llama", ("embed_tokens", "q_proj"), False),
    "llama_dora": ("llama", LINEAR_OF_LLAMA, True),
    "llama_embedding_dora": ("llama", ("embed_tokens", "o_proj"), True),
    "net_dora": ("net", ("wide", "square", "head"), True),  # with biases
    "bert": ("bert", ("query", "value", "dense"), False),
    "gpt2": ("gpt2", ("c_attn", "c_fc", "wte"), False),
    "gpt2_dora": ("gpt2", ("c_attn", "c_fc"), True),
}


@pytest.mark.parametrize("case", CASES)
def test_the_model_says_what_it_says_under_mlx_lm(case: str, tmp_path: Path) -> None:
    saved = Saved(tmp_path, *CASES[case])
    ours = merge(saved.lora, saved.base, saved.make(), tmp_path)
    if case == "gpt2":  # its head is tied to wte, whose update mlx-lm applies there, too: as_linear
        head, wte = saved.running.lm_head, saved.running.transformer.wte
        head.weight = nn.Parameter(wte.held() + SCALE * wte.lora_a @ wte.lora_b)
        ours.tie_weights()
    expected = models.outputs(saved.running)
    assert not torch.allclose(models.outputs(saved.make()), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(models.outputs(ours), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_updates_are_what_mlx_lm_would_fuse(case: str, tmp_path: Path) -> None:
    """``fuse``, in float64."""
    saved = Saved(tmp_path, *CASES[case])
    layers = {name: layer for name, layer in saved.running.named_modules() if isinstance(layer, Adapted)}
    updates = saved.read().updates
    assert {f"{name}.weight" for name in layers} == {update.name for update in updates}
    for update in updates:
        layer = layers[update.name.removesuffix(".weight")]
        a, b, weight = layer.lora_a.double(), layer.lora_b.double(), layer.held().double()
        fused = weight + (SCALE * a @ b if isinstance(layer.inner, nn.Embedding) else SCALE * b.T @ a.T)
        if layer.m is not None:
            fused = (layer.m.double() / fused.norm(dim=1))[:, None] * fused
        expected = fused - weight
        close((expected.T if isinstance(layer.inner, Conv1D) else expected).numpy(), dense(update))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(llama: Saved, dtype: torch.dtype) -> None:
    llama.edit(lambda state: {key: tensor.to(dtype) for key, tensor in state.items()})
    state = load_file(llama.lora / "adapters.safetensors")
    for update in llama.read().updates:
        module = update.name.removesuffix(".weight")
        a, b = (state[f"{module}.lora_{x}"].double() for x in "ab")
        close((SCALE * b.T @ a.T).numpy(), dense(update))
        assert update.dtype == (np.float64 if dtype == torch.float64 else np.float32)


# Experts


def switched(experts: int, ins: int, outs: int) -> dict[str, torch.Tensor]:
    """The parameters of ``LoRASwitchLinear``."""
    return {"lora_a": torch.randn(experts, RANK, ins), "lora_b": torch.randn(experts, outs, RANK)}


def run_switched(parts: Mapping[str, torch.Tensor], x: torch.Tensor, expert: int) -> torch.Tensor:
    """What ``LoRASwitchLinear`` adds for rows ``x`` that all go to one expert: two ``gather_mm``."""
    z = x @ parts["lora_a"].swapaxes(-1, -2)[expert]
    return SCALE * (z @ parts["lora_b"].swapaxes(-1, -2)[expert])


NAMINGS: dict[str, tuple[str, str, str]] = {
    "qwen2_moe": ("mlp.switch_mlp", "mlp.experts.{e}", "gate_proj up_proj down_proj"),
    "dots1": ("mlp.experts", "mlp.experts.{e}", "gate_proj up_proj down_proj"),
    "mixtral": ("block_sparse_moe.switch_mlp", "block_sparse_moe.experts.{e}", "w1 w3 w2"),
}


@pytest.mark.parametrize("layout", ["today", "until October 2025"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_experts(naming: str, layout: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    switch, separate, leaves = NAMINGS[naming]
    base, lora = {"model.layers.0.self_attn.q_proj.weight": torch.randn(12, 12)}, {}
    parts: dict[str, tuple[dict[str, torch.Tensor], int]] = {}
    for theirs, leaf in zip(("gate_proj", "up_proj", "down_proj"), leaves.split(), strict=True):
        made = switched(3, 8, 6) if leaf not in ("down_proj", "w2") else switched(3, 6, 8)
        for e in range(3):
            name = f"model.layers.0.{separate.format(e=e)}.{leaf}.weight"
            base[name] = torch.randn(made["lora_b"].shape[1], made["lora_a"].shape[2])
            parts[name] = made, e
        lora |= {f"model.layers.0.{switch}.{theirs}.{key}": tensor for key, tensor in made.items()}
    if layout != "today":
        lora = {key: tensor.flatten(0, 1) if key.endswith("lora_a") else tensor for key, tensor in lora.items()}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    found = open_lora(save(tmp_path / "lora", lora), open_checkpoint(tmp_path / "base"))
    assert {update.name for update in found.updates} == set(parts)
    for update in found.updates:
        made, e = parts[update.name]
        x = torch.randn(5, update.shape[1])
        close(run_switched(made, x, e).numpy(), x.numpy() @ dense(update).T)


def test_experts_as_mlx_stacks_them(tmp_path: Path) -> None:
    torch.manual_seed(4)
    name = "model.layers.0.mlp.switch_mlp.up_proj"
    made = switched(3, 8, 6)
    (tmp_path / "base").mkdir()
    save_file({f"{name}.weight": torch.randn(3, 6, 8)}, tmp_path / "base" / "model.safetensors")
    lora = save(tmp_path / "lora", {f"{name}.{key}": tensor for key, tensor in made.items()})
    (update,) = open_lora(lora, open_checkpoint(tmp_path / "base")).updates
    assert update.shape == (3, 6, 8)
    x = torch.randn(5, 8)
    for e in range(3):
        close(run_switched(made, x, e).numpy(), x.numpy() @ dense(update)[e].T)


def test_experts_of_a_whole_mixtral(tmp_path: Path) -> None:
    """As transformers saves one: the names on disk are those that mlx-lm reads."""
    torch.manual_seed(5)
    config = MixtralConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    made = switched(3, 16, 24)
    name = "model.layers.0.block_sparse_moe.switch_mlp.up_proj"
    lora = save(tmp_path / "lora", {f"{name}.{key}": tensor for key, tensor in made.items()})
    found = open_lora(lora, open_checkpoint(tmp_path / "base"))
    assert [update.name for update in found.updates] == [
        f"model.layers.0.block_sparse_moe.experts.{e}.w3.weight" for e in range(3)
    ]
    for e, update in enumerate(found.updates):
        close(SCALE * (made["lora_b"][e] @ made["lora_a"][e]).numpy(), dense(update))


@pytest.mark.parametrize(
    ("shapes", "base", "reason"),
    [
        (((3, 4, 8), (3, 6, 4)), {"experts.{e}.up_proj": (4, (6, 8))}, "3 experts, the base has more of them ('{base}')"),
        (((2, 4, 8), (3, 6, 4)), {"experts.{e}.up_proj": (3, (6, 8))}, "lora_a has shape [2, 4, 8], lora_b [3, 6, 4]: not factors of equally many experts"),
        (((10, 8), (3, 6, 4)), {"experts.{e}.up_proj": (3, (6, 8))}, "lora_a has shape [10, 8], lora_b [3, 6, 4]: not factors of equally many experts"),
        (((3, 5, 8), (3, 6, 5)), {"experts.{e}.up_proj": (3, (6, 8))}, "should have rank 4 by adapter_config.json, lora_a has 5 and lora_b 5"),
        (((3, 4, 8), (3, 6, 4)), {"switch_mlp.up_proj": (1, (2, 6, 8))}, "3 experts, the base's 'l.0.switch_mlp.up_proj.weight' has shape [2, 6, 8]"),
        (((3, 4, 8), (3, 6, 4)), {"experts.{e}.up_proj": (3, (6, 9))}, "updates a weight of shape [6, 8], the base's 'l.0.experts.0.up_proj.weight' has [6, 9]"),
    ],
)  # fmt: skip
def test_experts_that_do_not_fit(shapes: Any, base: Any, reason: str, tmp_path: Path) -> None:
    (pattern, (count, shape)) = next(iter(base.items()))
    state = {f"l.0.{pattern.format(e=e)}.weight": torch.zeros(shape) for e in range(count)}
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base" / "model.safetensors")
    a, b = map(torch.ones, shapes)
    lora = save(tmp_path / "lora", {"l.0.switch_mlp.up_proj.lora_a": a, "l.0.switch_mlp.up_proj.lora_b": b})
    with pytest.raises(SourceError) as caught:
        open_lora(lora, open_checkpoint(tmp_path / "base"))
    where = f"{lora / 'adapters.safetensors'}: 'l.0.switch_mlp.up_proj'"
    assert f"{where}: {reason.format(base='l.0.experts.3.up_proj.weight')}" == str(caught.value)


def test_fused_experts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file({"l.0.mlp.experts.gate_up_proj": torch.zeros(3, 8, 12)}, tmp_path / "base" / "model.safetensors")
    made = switched(3, 8, 6)
    lora = save(tmp_path / "lora", {f"l.0.mlp.switch_mlp.up_proj.{key}": tensor for key, tensor in made.items()})
    with pytest.raises(SourceError) as caught:
        open_lora(lora, open_checkpoint(tmp_path / "base"))
    assert str(caught.value) == (
        f"{lora / 'adapters.safetensors'}: the base has neither one weight per expert of 'l.0.mlp.switch_mlp.up_proj' "
        "nor one for all of them, as mlx-lm has: and it has them in no 3-D tensors of which they are rows"
    )


# Names and files


def test_a_prefix_of_the_lora_is_left_out(llama: Saved, tmp_path: Path) -> None:
    """As of GPT-2, which mlx-lm puts below ``model``."""
    llama.edit(lambda state: {f"top.{key}": tensor for key, tensor in state.items()})
    read = llama.read()
    assert read.notices == ["names of the LoRA are not those of the base: the prefix 'top.' is left out"]
    assert len(read.updates) == 4


def test_what_the_lora_says_of_itself(llama: Saved) -> None:
    read = llama.read()
    assert read.source == {
        "kind": "lora", "dialect": "mlx", "r": RANK, "scale": SCALE, "fine_tune_type": "lora",
    }  # fmt: skip
    assert read.base_model == {"id": "some/base"}
    assert [path.name for path in read.files] == ["adapters.safetensors", "adapter_config.json"]
    assert read.notices == []
    assert not read.whole
    assert not read.additions


def test_states_of_a_training_are_read_by_name(llama: Saved) -> None:
    state = llama.lora / "0000100_adapters.safetensors"
    (llama.lora / "adapters.safetensors").rename(state)
    base = open_checkpoint(llama.base)
    assert len(open_lora(state, base).updates) == 4
    assert not DIALECTS["mlx"].recognises(llama.lora)
    for path in (llama.lora, llama.base):
        with pytest.raises(SourceError) as caught:
            open_lora(path, base, dialect="mlx")
        assert (
            str(caught.value) == f"{path}: no LoRA of mlx-lm: need adapter_config.json beside adapters.safetensors"
        )


def test_a_file_or_its_folder(llama: Saved) -> None:
    base = open_checkpoint(llama.base)
    file, folder = (open_lora(path, base) for path in (llama.lora / "adapters.safetensors", llama.lora))
    assert file.files == folder.files
    assert file.source["dialect"] == "mlx"


# Configurations, over the years


def test_alpha_has_no_meaning_since_june_2024(llama: Saved) -> None:
    """It was in the defaults, and so in files, until April 2025; ``num_layers`` is from October 2024."""
    expected = {update.name: dense(update) for update in llama.read().updates}
    llama.configure(lora_parameters={"rank": RANK, "alpha": 16, "scale": SCALE})
    assert all(np.array_equal(expected[update.name], dense(update)) for update in llama.read().updates)


def test_alpha_of_2024_is_not_guessed_at(tmp_path: Path) -> None:
    saved = Saved(tmp_path, "llama", ("q_proj",))
    state = load_file(saved.lora / "adapters.safetensors")
    old = {"fine_tune_type": None, "num_layers": None, "use_dora": False, "lora_layers": 16}
    save(saved.lora, state, parameters={"alpha": 16}, **old)
    refused(
        saved,
        "lora_parameters has alpha 16, which mlx-lm multiplied into the scale (scale * alpha / rank) until June 2024 and has "
        "ignored since; the file may be from before or after. If it is from after, remove alpha from lora_parameters; if "
        "it is from before, also multiply scale by alpha / rank",
        "adapter_config.json",
    )
    for parameters in ({}, {"alpha": RANK}):  # then both times mean the same
        save(saved.lora, state, parameters=parameters, **old)
        assert len(saved.read().updates) == 2


def test_dora_of_2024(tmp_path: Path) -> None:
    saved = Saved(tmp_path, "llama", ("q_proj",), dora=True)
    expected = {update.name: dense(update) for update in saved.read().updates}
    state = load_file(saved.lora / "adapters.safetensors")
    save(saved.lora, state, fine_tune_type=None, num_layers=None, use_dora=True, lora_layers=16)
    read = saved.read()
    assert read.source["fine_tune_type"] == "dora"
    assert all(np.array_equal(expected[update.name], dense(update)) for update in read.updates)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora_parameters": None}, "lora_parameters must have a rank, a positive integer, and a scale, a number"),
        ({"lora_parameters": {"rank": 4}}, "lora_parameters must have a rank, a positive integer, and a scale, a number"),
        ({"lora_parameters": {"rank": 0, "scale": 1}}, "lora_parameters must have a rank, a positive integer, and a scale, a number"),
        ({"lora_parameters": {"rank": 4, "scale": float("inf")}}, "lora_parameters must have a rank, a positive integer, and a scale, a number"),
        ({"fine_tune_type": "full"}, "fine_tune_type is 'full': these are whole weights, not a LoRA; fuse them into the model with mlx_lm.fuse and convert that as a full fine-tune (full_to_shira)"),
        ({"fine_tune_type": "ia3"}, "fine_tune_type is 'ia3', not 'lora' or 'dora'"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(llama: Saved, changes: dict[str, Any], reason: str) -> None:
    llama.configure(**changes)
    refused(llama, reason, "adapter_config.json")


# What does not fit

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({f"{Q}.lora_c": torch.ones(2)}, f"unmatched key '{Q}.lora_c': it ends neither in lora_a nor lora_b nor m"),
        ({"model.norm.weight": torch.ones(32)}, "unmatched key 'model.norm.weight': it ends neither in lora_a nor lora_b nor m"),
        ({f"{Q}.m": torch.ones(32)}, f"'{Q}' has lora_a, lora_b, m; lora needs lora_a, lora_b"),
        ({"model.layers.7.mlp.up_proj.lora_a": torch.ones(32, 4)}, "'model.layers.7.mlp.up_proj' has lora_a; lora needs lora_a, lora_b"),
        ({"no.such.lora_a": torch.ones(32, 4), "no.such.lora_b": torch.ones(4, 32)}, "1 of 5 adapted weights are not in the base, for example 'no.such.weight'; the base has names like 'lm_head.weight'"),
        ({f"{Q}.lora_a": torch.ones(32, 5), f"{Q}.lora_b": torch.ones(5, 32)}, f"'{Q}': should have rank 4 by adapter_config.json, lora_a has 5 and lora_b 5"),
        ({f"{Q}.lora_a": torch.ones(32, 5)}, f"'{Q}': should have rank 4 by adapter_config.json, lora_a has 5 and lora_b 4"),
        ({f"{Q}.lora_a": torch.ones(31, 4)}, f"'{Q}': updates a weight of shape [32, 31], the base's '{Q}.weight' has [32, 32]"),
        ({f"{Q}.lora_b": torch.ones(4)}, f"'{Q}': lora_a has shape [32, 4], lora_b [4]: not two matrices"),
        ({f"{Q}.lora_b": torch.ones(4, 32, dtype=torch.int32)}, f"'{Q}.lora_b' is of dtype int32, not a float"),
        ({f"{Q}.lora_b": torch.full((4, 32), torch.nan)}, f"'{Q}.lora_b' holds NaN or Inf"),
        ({f"{Q}.lora_b": torch.ones(1000, 0, 4)}, f"'{Q}.lora_b' of shape [1000, 0, 4] has no elements"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(llama: Saved, change: dict[str, torch.Tensor], reason: str) -> None:
    llama.edit(lambda state: state | change)
    refused(llama, reason)


def test_no_tensors(llama: Saved) -> None:
    llama.edit(lambda state: {})
    refused(llama, "it holds no tensors")


def test_magnitudes_that_are_missing_or_do_not_fit(tmp_path: Path) -> None:
    saved = Saved(tmp_path, "llama", ("q_proj",), dora=True)
    saved.edit(lambda state: {key: tensor for key, tensor in state.items() if key != f"{Q}.m"})
    refused(saved, f"'{Q}' has lora_a, lora_b; dora needs lora_a, lora_b, m")
    saved.edit(lambda state: state | {f"{Q}.m": torch.ones(5)})
    refused(saved, f"'{Q}': m has shape [5], the weight [32, 32]")


def test_a_base_that_mlx_quantised(llama: Saved) -> None:
    path = llama.base / "model.safetensors"
    state = load_file(path)
    packed = {f"{Q}.weight": torch.zeros(32, 4, dtype=torch.int32), f"{Q}.scales": torch.ones(32, 1)}
    save_file(state | packed, path)
    with pytest.raises(SourceError) as caught:
        llama.read()
    assert str(caught.value) == (
        f"{path}: '{Q}.weight' is quantised by MLX: the base must be the float model that it was quantised from"
    )


def test_a_square_weight_of_gpt2_is_not_guessed_at(tmp_path: Path) -> None:
    saved = Saved(tmp_path, "gpt2", ("c_attn",))
    name = "transformer.h.0.attn.c_proj"
    square = {f"{name}.lora_a": torch.ones(32, 4), f"{name}.lora_b": torch.ones(4, 32)}
    saved.edit(lambda state: state | square)
    refused(
        saved,
        f"'{name}': the base's '{name}.weight' is square, and may be an embedding or stored as [in, out] (Conv1D): "
        "whether to transpose its update cannot be determined",
    )


@pytest.mark.parametrize("config", [{"norm_head": True}, {"model_type": "baichuan_m1"}])
def test_a_head_that_mlx_lm_normalises(config: dict[str, Any], tmp_path: Path) -> None:
    saved = Saved(tmp_path, "llama", ("lm_head",))
    assert len(saved.read().updates) == 1
    (saved.base / "config.json").write_text(json.dumps(config))
    refused(
        saved,
        "mlx-lm normalises 'lm_head.weight' of this model on loading, so the update is not one of the base's "
        "weight",
    )
