"""Every kind of layer that PEFT's LoRA adapts, with DoRA and without, against PEFT's own model and merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.errors import SourceError
from shira_format.format import load
from shira_format.lora import open_lora
from tests import models
from tests.merges import Adapted, check, check_merge, results


class Everything(nn.Module):
    """A layer of each kind, and one input for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.line = nn.Conv1d(8, 10, 3, stride=2, padding=1)
        self.point = nn.Conv1d(10, 9, 1)
        self.plane = nn.Conv2d(3, 5, (3, 2), padding=1)
        self.dot = nn.Conv2d(5, 4, 1)
        self.space = nn.Conv3d(1, 2, (2, 1, 3))
        self.linear = nn.Linear(9, 7)
        self.turned = Conv1D(6, 7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[n, 9]`` tokens to ``[n, m]``."""
        x = self.point(torch.tanh(self.line(self.embed(tokens).mT)))  # [n, 9, 5]
        y = torch.tanh(self.turned(torch.tanh(self.linear(x.mT))))  # [n, 5, 6]
        z = self.dot(torch.tanh(self.plane(y[:, :3, None, :].expand(-1, -1, 4, -1))))
        return self.space(z[:, None]).flatten(1)


def everything() -> Everything:
    torch.manual_seed(11)
    return Everything()


class Attention(nn.Module):
    """PyTorch's attention, whose projections PEFT wraps in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out_proj = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, m, 8]`` to the same."""
        return self.out_proj(self.attn(x, x, x)[0])


def attention() -> Attention:
    torch.manual_seed(12)
    return Attention()


ALL = ["embed", "line", "point", "plane", "dot", "space", "linear", "turned"]
NO_EMBEDDING = ALL[1:]
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({"r": 2, "lora_alpha": 3, "target_modules": ALL}, 8),
    "rslora": ({"r": 3, "lora_alpha": 3, "use_rslora": True, "target_modules": ALL}, 8),
    "patterns": (
        {
            "r": 2,
            "lora_alpha": 3,
            "rank_pattern": {"embed": 4, "(line|dot)": 3},
            "alpha_pattern": {"plane": 5, "embed": 0.5},
            "target_modules": ALL,
        },
        8,
    ),
    "lora_bias": ({"r": 2, "lora_alpha": 3, "lora_bias": True, "target_modules": NO_EMBEDDING}, 14),
    "bias_all": ({"r": 2, "bias": "all", "target_modules": ALL}, 15),
    "bias_lora_only": ({"r": 2, "bias": "lora_only", "target_modules": ["plane", "linear", "embed"]}, 5),
    "both_biases": ({"r": 2, "lora_alpha": 5, "lora_bias": True, "bias": "all", "target_modules": NO_EMBEDDING}, 14),
    "dora": ({"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": ALL}, 8),
    "dora_rslora": (
        {"r": 3, "lora_alpha": 2, "use_dora": True, "use_rslora": True, "rank_pattern": {"plane": 2}, "target_modules": ALL},
        8,
    ),
    "dora_bias": ({"r": 2, "use_dora": True, "bias": "all", "target_modules": ["linear", "line"]}, 9),
    "mica": ({"r": 2, "init_lora_weights": "mica", "target_modules": ["linear", "embed"]}, 2),
    "orthogonal": ({"r": 2, "init_lora_weights": "orthogonal", "target_modules": ["linear"]}, 1),
    "saved": ({"r": 2, "target_modules": ["linear"], "modules_to_save": ["embed", "plane", "turned"]}, 6),
}  # fmt: skip
TOKENS = torch.arange(27).reshape(3, 9) % 12


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_layer_is_what_peft_merges_and_runs(case: str, tmp_path: Path) -> None:
    options, changed = CASES[case]
    adapted = Adapted(tmp_path, everything, **options)
    check_merge(adapted, changed=changed)
    with torch.no_grad():
        live, ours, before = adapted.peft()(TOKENS), adapted.applied()(TOKENS), adapted.make()(TOKENS)
    torch.testing.assert_close(ours, live, rtol=1e-4, atol=1e-5)
    assert (before - live).abs().max() > 1e-3


@pytest.mark.parametrize("case", ["plain", "dora", "lora_bias", "saved"])
def test_a_bf16_base(case: str, tmp_path: Path) -> None:
    """The update of bf16 values is computed in float32; the targets are rounded once."""
    options, changed = CASES[case]
    adapted = Adapted(tmp_path, everything, dtype=torch.bfloat16, **options)
    expected = adapted.merged()
    check(adapted, expected, changed=changed)
    lora_to_shira(adapted.lora, adapted.base, tmp_path / "all.st", density=1.0)
    for name, tensor in load(tmp_path / "all.st").items():
        before = load_file(adapted.base / "model.safetensors")[name].double().flatten().numpy().copy()
        before[tensor.indices] = tensor.values.astype(np.float64)
        wanted = expected[name].double().flatten()
        slack = 2e-6 * wanted.abs().max()
        low, high = ((wanted + side * slack).bfloat16().double().numpy() for side in (-1, 1))
        assert ((low <= before) & (before <= high)).all(), name


def test_multihead_attention_as_peft_runs_it(tmp_path: Path) -> None:
    """PEFT merges the output projection's LoRA twice, in the forward pass as well; the twin outside counts once."""
    options = {"r": 2, "lora_alpha": 3, "rank_pattern": {"attn": 3}, "target_modules": ["attn", "^out_proj"]}
    adapted = Adapted(tmp_path, attention, **options | {"target_modules": r"(attn|out_proj)"})
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        live, before = adapted.peft()(x), adapted.make()(x)
    check_merge(adapted, changed=3)
    with torch.no_grad():
        ours = adapted.applied()(x)
    torch.testing.assert_close(ours, live, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, live, atol=1e-2)


def test_a_bias_that_peft_leaves_out_is_refused(tmp_path: Path) -> None:
    """The forward pass of its MultiheadAttention does not look at the bias of the input projection's LoRA."""
    adapted = Adapted(tmp_path, attention, r=2, lora_bias=True, target_modules=["attn"])
    with pytest.raises(SourceError, match="'attn' has a lora_bias, which PEFT does not support for such a layer"):
        adapted.read()
    linear = Adapted(tmp_path / "linear", everything, r=2, use_dora=True, target_modules=["linear"])
    models.edit_config(linear.lora, lora_bias=True)
    models.edit_weights(linear.lora, lambda s: s | {f"{LINEAR}lora_B.bias": torch.ones(7)})
    with pytest.raises(
        SourceError, match="'linear' has a lora_bias, which PEFT does not support for such a layer"
    ):
        linear.read()


def test_velora_is_plain_when_it_runs(tmp_path: Path) -> None:
    from peft.tuners.lora.config import VeloraConfig

    adapted = Adapted(tmp_path, models.net, r=2, target_modules=["wide", "square"], velora_config=VeloraConfig())
    assert any("velora" in key for key in load_file(adapted.lora / "adapter_model.safetensors"))
    check_merge(adapted, changed=2)


@pytest.mark.parametrize("make", [models.gpt2, models.llama])
def test_dora_of_language_models(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """GPT-2 stores ``[in, out]``, and PEFT saves an adapted ``lm_head`` itself beside the LoRA."""
    targets = ["c_attn", "c_fc"] if make is models.gpt2 else ["q_proj", "down_proj", "lm_head", "embed_tokens"]
    adapted = Adapted(tmp_path, make, r=3, lora_alpha=4, use_dora=True, target_modules=targets)
    check_merge(adapted, changed=4 if make is models.gpt2 else 6)
    torch.testing.assert_close(
        models.outputs(adapted.applied()), models.outputs(adapted.peft()), rtol=1e-4, atol=1e-4
    )


def test_groups_of_a_convolution_mix(tmp_path: Path) -> None:
    """PEFT's forward pass lets each group see the inputs of all, which no weight of the base can; it refuses to merge."""

    def grouped() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))

    adapted = Adapted(tmp_path, grouped, r=2, target_modules=["0"])
    with pytest.raises(NotImplementedError, match="groups"):
        adapted.merged()
    with pytest.raises(SourceError, match=r"'0' is a convolution in 2 groups, and its LoRA reads inputs of other"):
        adapted.read()


# PiSSA and its like, turned into LoRAs of the untouched base


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4", "use_rslora": True},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "pissa", "rank_pattern": {"wide": 2}, "alpha_pattern": {"square": 7}},
    ],
    ids=["pissa", "rslora", "olora", "patterns"],
)
def test_what_peft_converts_is_a_plain_lora(options: dict[str, Any], tmp_path: Path) -> None:
    options = {"r": 3, "lora_alpha": 4, "target_modules": ["wide", "square"]} | options
    base = models.save_base(models.net(), tmp_path / "base")
    torch.manual_seed(5)
    start = models.random_lora(models.net(), scale=0, **options)
    start.peft_config["default"].init_lora_weights = True
    models.save_lora(start, tmp_path / "start")
    torch.manual_seed(5)
    trained = models.random_lora(models.net(), **options)
    unconverted = models.save_lora(trained, tmp_path / "unconverted")
    with pytest.raises(SourceError, match=r"init_lora_weights='\w+' changed the base's weights in training"):
        open_lora(unconverted, open_checkpoint(base))
    lora = models.save_lora(
        trained, tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    before = load_file(base / "model.safetensors")
    updates = open_lora(lora, open_checkpoint(base)).updates
    assert len(updates) == 2
    merged = trained.merge_and_unload().state_dict()
    for update in updates:
        out = np.empty(update.shape, update.dtype)
        update.tile(0, update.shape[0], out)
        np.testing.assert_allclose(
            before[update.name].numpy() + out, merged[update.name].numpy(), rtol=0, atol=1e-5
        )


# What does not fit


Edit = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
EMBED, LINEAR = "base_model.model.embed.", "base_model.model.linear."
VECTOR = "lora_magnitude_vector"


def rows(state: dict[str, torch.Tensor], key: str, count: int) -> dict[str, torch.Tensor]:
    return state | {key: state[key][:count].contiguous()}


BAD: dict[str, tuple[bool, Edit, str]] = {
    "no_b": (False, lambda s: without(s, f"{EMBED}lora_embedding_B"), "'embed' has lora_embedding_A only"),
    "no_a": (False, lambda s: without(s, f"{EMBED}lora_embedding_A"), "'embed' has lora_embedding_B only"),
    "mixed": (
        False,
        lambda s: s | {f"{EMBED}lora_A.weight": torch.ones(2, 8)},
        "'embed' has lora_A, lora_embedding_A, lora_embedding_B only",
    ),
    "rows": (
        False,
        lambda s: s | {f"{EMBED}lora_embedding_A": torch.ones(2, 13)},
        "'embed' updates a weight of shape [13, 8], the base's 'embed.weight' has [12, 8]",
    ),
    "rank": (
        False,
        lambda s: s | {f"{EMBED}lora_embedding_A": torch.ones(3, 12)},
        "'embed' should have rank 2 by adapter_config.json, lora_A has shape [3, 12] and lora_B [8, 2]",
    ),
    "kernel": (
        False,
        lambda s: s | {"base_model.model.plane.lora_A.weight": torch.ones(2, 3, 3, 3)},
        "'plane': updates a weight of shape [5, 3, 3, 3], the base's 'plane.weight' has [5, 3, 3, 2]",
    ),
    "no_kernel": (
        False,
        lambda s: s | {"base_model.model.plane.lora_A.weight": torch.ones(2, 3)},
        "'plane' is of no known layer type (lora_A has shape [2, 3] and lora_B [5, 2, 1, 1])",
    ),
    "nested": (
        False,
        lambda s: {k.replace("linear.", "linear.base_layer."): v.clone() for k, v in s.items()},
        "'linear' is wrapped several times, and is no parameter",
    ),
    "no_magnitude": (True, lambda s: without(s, f"{LINEAR}{VECTOR}"), f"'linear' has no {VECTOR}, and use_dora is set"),
    "short_magnitude": (
        True,
        lambda s: rows(s, f"{LINEAR}{VECTOR}", 6),
        f"linear.{VECTOR} has shape [6], not one number for each of 7",
    ),
    "folded_magnitude": (
        True,
        lambda s: s | {f"{EMBED}{VECTOR}": torch.ones(2, 4)},
        f"embed.{VECTOR} has shape [2, 4], not one number for each of 8",
    ),
    "two_magnitudes": (
        True,
        lambda s: s | {f"{LINEAR}{VECTOR}.weight": torch.ones(7)},
        f"'{LINEAR}{VECTOR}.weight' is there twice, with and without '.weight'",
    ),
    "twice": (
        False,
        lambda s: s | {f"{LINEAR}bias": torch.ones(7), f"{LINEAR}base_layer.bias": torch.ones(7)},
        f"'{LINEAR}bias' means the same tensor as another key",
    ),
}  # fmt: skip


def without(state: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name != key}


@pytest.mark.parametrize("case", BAD)
def test_bad_weights(case: str, tmp_path: Path) -> None:
    dora, edit, reason = BAD[case]
    adapted = Adapted(tmp_path, everything, r=2, use_dora=dora, target_modules=["embed", "plane", "linear"])
    models.edit_weights(adapted.lora, edit)
    with pytest.raises(SourceError) as caught:
        adapted.read()
    assert f"{adapted.lora / 'adapter_model.safetensors'}: {reason}" == str(caught.value)


def test_the_magnitude_may_be_called_weight(tmp_path: Path) -> None:
    """As it is in memory; PEFT loads it, too."""
    adapted = Adapted(tmp_path, everything, r=2, use_dora=True, target_modules=["linear", "plane"])
    expected = results(adapted)
    models.edit_weights(
        adapted.lora, lambda s: {k + ".weight" * k.endswith("vector"): v.clone() for k, v in s.items()}
    )
    actual = results(adapted)
    assert actual.keys() == expected.keys()
    assert all(np.array_equal(actual[name], expected[name]) for name in expected)
