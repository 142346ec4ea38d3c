"""LoRAs of parameters: experts of real mixtures, fused in memory, on disk as transformers saves them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.errors import SourceError
from shira_format.export.full import shira_to_full
from shira_format.format import load
from shira_format.lora import open_lora
from tests import models
from tests.merges import Adapted, check_merge, results
from tests.updates import dense

SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def _made(model: type[nn.Module], config: type[Any], **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model(config(**SMALL | options)).eval()

    return make


MIXTURES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": _made(MixtralForCausalLM, MixtralConfig, num_local_experts=3, num_experts_per_tok=2),
    "qwen3": _made(
        Qwen3MoeForCausalLM, Qwen3MoeConfig, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12
    ),
    "gpt_oss": _made(GptOssForCausalLM, GptOssConfig, num_local_experts=3, num_experts_per_tok=2, rope_parameters=None),
    "llama4": _made(
        Llama4ForCausalLM, Llama4TextConfig, num_local_experts=3, num_experts_per_tok=1, intermediate_size_mlp=20,
        interleave_moe_layer_step=1,
    ),
}  # fmt: skip
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def tokens() -> torch.Tensor:
    return torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    return MIXTURES[request.param]


@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate_up", "down"])
def test_experts_in_one_tensor(mixture: Callable[[], nn.Module], targets: list[str], tmp_path: Path) -> None:
    """The base as it is in memory: a 3-D tensor for each parameter, ``[experts, in, out]`` or ``[experts, out, in]``."""
    adapted = Adapted(
        tmp_path, mixture, r=2, lora_alpha=5, target_modules=["q_proj"], target_parameters=targets,
        rank_pattern={r"layers\.1\..*gate_up_proj": 3}, alpha_pattern={r".*\.down_proj": 1.5},
    )  # fmt: skip
    check_merge(adapted, changed=2 + 2 * len(targets))
    with torch.no_grad():
        live, ours = adapted.peft()(tokens()).logits, adapted.applied()(tokens()).logits
        before = adapted.make()(tokens()).logits
    torch.testing.assert_close(ours, live, rtol=1e-4, atol=1e-4)
    assert (before - live).abs().max() > 1e-2


def test_experts_as_transformers_saves_them(mixture: Callable[[], nn.Module], tmp_path: Path) -> None:
    """One by one for Mixtral and Qwen, with other names: what PEFT merges and transformers saves is what we restore."""
    adapted = Adapted(
        tmp_path, mixture, r=2, lora_alpha=5, use_rslora=True, target_modules=["v_proj"], target_parameters=BOTH
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.make().save_pretrained(tmp_path / "disk")
        adapted.peft().merge_and_unload().save_pretrained(tmp_path / "merged")
    lora_to_shira(adapted.lora, tmp_path / "disk", tmp_path / "all.st", density=1.0)
    shira_to_full(tmp_path / "all.st", tmp_path / "disk", tmp_path / "ours")
    expected, actual = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "ours"))
    before = load_file(tmp_path / "disk" / "model.safetensors")
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    changed = {name for name in expected if not torch.equal(expected[name], before[name])}
    assert set(load(tmp_path / "all.st")) == changed
    assert len(changed) in (2 + 2 * 2, 2 + 2 * 3 * 3)


def test_a_bf16_mixture(tmp_path: Path) -> None:
    adapted = Adapted(
        tmp_path, MIXTURES["qwen3"], dtype=torch.bfloat16, r=2, target_modules=[], target_parameters=BOTH
    )
    expected = adapted.merged()
    for name, found in results(adapted).items():
        np.testing.assert_allclose(found, expected[name].double().numpy(), rtol=0, atol=1e-6)


def test_target_modules_of_an_older_transformers(tmp_path: Path) -> None:
    """PEFT turns them into target_parameters of twice the rank."""
    adapted = Adapted(
        tmp_path, MIXTURES["mixtral"], r=2, lora_alpha=3, target_modules=["w1", "w2", "w3", "q_proj"]
    )
    check_merge(adapted, changed=6)


def test_a_router(tmp_path: Path) -> None:
    """A 2-D parameter of a module that is no linear layer; and one that is."""
    adapted = Adapted(
        tmp_path, MIXTURES["mixtral"], r=2, target_modules=[], target_parameters=["gate.weight", "q_proj.weight"],
        rank_pattern={"gate.weight": 3},
    )  # fmt: skip
    check_merge(adapted, changed=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.make().save_pretrained(tmp_path / "disk")
    names = {update.name for update in open_lora(adapted.lora, open_checkpoint(tmp_path / "disk")).updates}
    assert "model.layers.0.block_sparse_moe.gate.weight" in names


class Ungated(nn.Module):
    """Experts of two matrices that are each other's shape, turned round."""

    def __init__(self, inner: int = 6) -> None:
        super().__init__()
        self.mix = nn.Module()
        self.mix.experts = Bank(inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, 4]`` to the same."""
        return self.mix.experts(x)


class Bank(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, inner, 4))
        self.down_proj = nn.Parameter(torch.randn(3, 4, inner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, 4]`` to the same."""
        return torch.einsum("eoi,ni->no", self.down_proj @ self.up_proj, x)


def ungated(inner: int = 6) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(2)
        return Ungated(inner)

    return make


UP_DOWN = ["experts.up_proj", "experts.down_proj"]


def test_what_fits_two_ways_is_not_guessed(tmp_path: Path) -> None:
    adapted = Adapted(tmp_path, ungated(), r=2, target_modules=[], target_parameters=UP_DOWN)
    with pytest.raises(SourceError) as caught:
        adapted.read()
    assert str(caught.value) == (
        f"{adapted.lora / 'adapter_model.safetensors'}: which parameter each LoRA of 'mix.experts' adapts, and whether it "
        "is transposed, is ambiguous: by their shapes they fit 'mix.experts.down_proj' [3, 4, 6] of rank 2, 'mix.experts.up_proj' "
        "[3, 6, 4] of rank 2 in several ways; merge the LoRA with PEFT and convert the full checkpoint (full_to_shira)"
    )


def test_experts_on_disk_tell_which_way_round(tmp_path: Path) -> None:
    """transformers joins linear layers, ``[out, in]``, and PEFT since 0.19 knows."""
    config = {
        "moe_intermediate_size": 12, "n_routed_experts": 3, "num_experts_per_tok": 2, "n_groups": 1, "n_group": 1,
        "topk_group": 1, "hybrid_override_pattern": "E*", "moe_shared_expert_intermediate_size": 10,
    }  # fmt: skip
    make = _made(NemotronHForCausalLM, NemotronHConfig, **config)
    adapted = Adapted(tmp_path, make, r=2, target_modules=[], target_parameters=UP_DOWN)
    with pytest.raises(SourceError, match="which parameter each LoRA of .* is ambiguous"):
        adapted.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.make().save_pretrained(tmp_path / "disk")
        adapted.peft().merge_and_unload().save_pretrained(tmp_path / "merged")
    lora_to_shira(adapted.lora, tmp_path / "disk", tmp_path / "all.st", density=1.0)
    shira_to_full(tmp_path / "all.st", tmp_path / "disk", tmp_path / "ours")
    expected, actual = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "ours"))
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    assert len(load(tmp_path / "all.st")) == 6


def test_another_parameter_tells_which_way_round(tmp_path: Path) -> None:
    """GPT-OSS has a square ``down_proj`` beside a ``gate_up_proj`` that is not."""
    make = _made(
        GptOssForCausalLM, GptOssConfig, num_local_experts=3, num_experts_per_tok=2, rope_parameters=None,
        intermediate_size=16,
    )  # fmt: skip
    check_merge(Adapted(tmp_path / "both", make, r=2, target_modules=[], target_parameters=BOTH), changed=4)
    alone = Adapted(tmp_path / "alone", make, r=2, target_modules=[], target_parameters=BOTH[1:])
    with pytest.raises(SourceError, match="and whether it is transposed, is ambiguous"):
        alone.read()


def test_peft_before_0_19_took_all_for_in_out(tmp_path: Path) -> None:
    """Then A goes with the first dimension of each expert, whatever the module is; the version tells where shapes cannot."""
    adapted = Adapted(tmp_path, ungated(), r=2, target_modules=[], target_parameters=UP_DOWN)
    state = load_file(adapted.lora / "adapter_model.safetensors")
    models.edit_config(adapted.lora, peft_version="0.18.1")
    prefix = "base_model.model.mix.experts."
    lora = {update.name: update for update in adapted.read().updates}
    assert set(lora) == {"mix.experts.up_proj", "mix.experts.down_proj"}
    # Wrapped first, and so inside, is the parameter that was made first; read as [experts, in, out] it is the other one.
    for name, inner in (("mix.experts.down_proj", "base_layer."), ("mix.experts.up_proj", "")):
        a, b = (state[f"{prefix}{inner}lora_{x}.weight"].double() for x in "AB")
        factors = a.reshape(3, 2, -1), b.reshape(b.shape[0], 2, 3)
        expected = torch.einsum("ore,eri->eio", factors[1], factors[0]) * 4
        np.testing.assert_allclose(dense(lora[name]), expected.numpy(), rtol=0, atol=1e-5)


def test_one_expert(tmp_path: Path) -> None:
    """PEFT then adds ``B @ A`` as it is, whatever the module says of itself."""

    def single() -> nn.Module:
        torch.manual_seed(2)
        model = Ungated()
        experts = model.mix.experts
        experts.up_proj = nn.Parameter(experts.up_proj[:1].clone())
        experts.down_proj = nn.Parameter(experts.down_proj[:1].clone())
        return model

    check_merge(Adapted(tmp_path, single, r=2, target_modules=[], target_parameters=UP_DOWN), changed=2)


@pytest.fixture
def qwen(tmp_path: Path) -> Adapted:
    return Adapted(tmp_path, MIXTURES["qwen3"], r=2, target_modules=[], target_parameters=BOTH)


def test_unsloths_marks(qwen: Adapted) -> None:
    """Unsloth read the columns of lora_B expert by expert, and now says which way it is."""
    plain = results(qwen)
    models.edit_config(qwen.lora, auto_mapping={"unsloth_fixed": True})
    with pytest.raises(
        SourceError, match=r"adapter_config.json: written by Unsloth, which before .*add lora_B_layout"
    ):
        qwen.read()
    models.edit_config(qwen.lora, lora_B_layout="rank_major")
    assert all(np.array_equal(plain[name], found) for name, found in results(qwen).items())

    def grouped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: tensor.reshape(-1, 2, 3).mT.reshape(-1, 6).contiguous() if "lora_B" in name else tensor
            for name, tensor in state.items()
        }

    models.edit_weights(qwen.lora, grouped)
    assert not all(np.allclose(plain[name], found) for name, found in results(qwen).items())
    models.edit_config(qwen.lora, lora_B_layout="grouped_by_expert")
    assert all(np.array_equal(plain[name], found) for name, found in results(qwen).items())
    models.edit_config(qwen.lora, lora_B_layout="other")
    with pytest.raises(SourceError, match=r"adapter_config.json: lora_B_layout is 'other', which is unknown"):
        qwen.read()


Edit = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
KEY = "base_model.model.model.layers.0.mlp.experts."
NONE = (
    "which fits none of 'model.layers.0.mlp.experts.down_proj' [3, 16, 12] of rank 2, "
    "'model.layers.0.mlp.experts.gate_up_proj' [3, 24, 16] of rank 2"
)
BAD: dict[str, tuple[Edit, str]] = {
    "no_outer": (
        lambda s: {n: t for n, t in s.items() if not n.startswith(f"{KEY}lora")},
        "'model.layers.0.mlp.experts' is wrapped several times, and a key of a wrapper is missing",
    ),
    "no_b": (
        lambda s: {n: t for n, t in s.items() if n != f"{KEY}lora_B.weight"},
        "'model.layers.0.mlp.experts' has lora_A only",
    ),
    "magnitude": (
        lambda s: s | {f"{KEY}lora_magnitude_vector": torch.ones(3)},
        "'model.layers.0.mlp.experts' is a parameter, and has lora_magnitude_vector",
    ),
    "shape": (
        lambda s: s | {f"{KEY}lora_A.weight": torch.ones(6, 13)},
        f"'model.layers.0.mlp.experts' has lora_A of shape [6, 13] and lora_B of shape [16, 6], {NONE}",
    ),
    "rank": (
        lambda s: s | {f"{KEY}lora_A.weight": torch.ones(9, 12), f"{KEY}lora_B.weight": torch.ones(16, 9)},
        f"'model.layers.0.mlp.experts' has lora_A of shape [9, 12] and lora_B of shape [16, 9], {NONE}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_weights(qwen: Adapted, case: str) -> None:
    edit, reason = BAD[case]
    models.edit_config(qwen.lora, use_dora=case == "magnitude")
    models.edit_weights(qwen.lora, edit)
    with pytest.raises(SourceError) as caught:
        qwen.read()
    assert f"{qwen.lora / 'adapter_model.safetensors'}: {reason}" == str(caught.value)


def test_a_base_that_lacks_an_expert(qwen: Adapted, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qwen.make().save_pretrained(tmp_path / "disk")
    name = "model.layers.1.mlp.experts.1.up_proj.weight"
    path = tmp_path / "disk" / "model.safetensors"
    state = load_file(path)
    for edited, reason in (
        ({n: t for n, t in state.items() if n != name}, "experts are missing: not all 3 have what"),
        (state | {name: torch.ones(11, 16)}, "and others of its kind differ in shape"),
        (
            state | {n: torch.ones(12, 15) for n in state if ".experts." in n and "up_proj" in n},
            "cannot be stacked",
        ),
    ):
        save_file(edited, path)
        with pytest.raises(SourceError, match=reason):
            open_lora(qwen.lora, open_checkpoint(tmp_path / "disk"))


def test_experts_that_no_lora_touches_may_be_anything(tmp_path: Path) -> None:
    adapted = Adapted(tmp_path, MIXTURES["qwen3"], r=2, target_modules=["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.make().save_pretrained(tmp_path / "disk")
    path = tmp_path / "disk" / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "experts.1.up_proj" not in n}, path)
    assert len(open_lora(adapted.lora, open_checkpoint(tmp_path / "disk")).updates) == 2
