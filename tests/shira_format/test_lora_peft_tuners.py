"""PEFT's adapters that are no LoRA, as PEFT writes, runs and merges them, on a layer of each kind that they support."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.errors import SourceError
from shira_format.format import load
from shira_format.live import apply
from shira_format.lora import open_lora
from shira_format.lora.peft.tuners import REFUSED, TUNERS, tuner
from tests import models
from tests.updates import dense


class Everything(nn.Module):
    """A layer of each kind, and one input for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.line = nn.Conv1d(8, 12, 3, padding=1)
        self.linear = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.square = nn.Linear(8, 8)
        self.wide = nn.Linear(8, 16, bias=False)
        self.plane = nn.Conv2d(4, 8, 3, padding=1)
        self.dot = nn.Conv2d(8, 4, 1)
        self.space = nn.Conv3d(1, 2, (2, 1, 3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[n, 8]`` tokens to ``[n, m]``."""
        x = torch.tanh(self.line(self.embed(tokens).mT)).mT  # [n, 8, 12]
        x = self.square(self.norm(self.linear(x)))
        z = torch.tanh(self.wide(x)).reshape(len(x), 4, 4, 8)
        return self.space(self.dot(torch.tanh(self.plane(z)))[:, None]).flatten(1)


class Turned(nn.Module):
    """GPT-2's layers, whose weights are ``[in, out]``."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Conv1D(12, 8)
        self.square = Conv1D(12, 12)
        self.down = Conv1D(8, 12)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[n, 8]`` tokens to ``[n, 8]``."""
        return self.down(torch.tanh(self.square(torch.tanh(self.up(tokens / 12)))))  # type: ignore[no-any-return]


TOKENS = torch.arange(24).reshape(3, 8) % 12


class Case:
    """An adapter of a model, with random values in everything that is trained, and its base on disk."""

    def __init__(
        self, folder: Path, make: Callable[[], nn.Module], config: Any, dtype: torch.dtype, seed: int = 3
    ) -> None:
        def build() -> nn.Module:
            torch.manual_seed(7)
            return make().to(dtype).eval()

        self.folder, self.make = folder, build
        self.base = models.save_base(build(), folder / "base", dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(build(), config).to(dtype)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in wrapped.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
            wrapped.save_pretrained(folder / "adapter")
        self.adapter = folder / "adapter"

    def peft(self) -> Any:
        """PEFT's model, with the adapter from its files."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.PeftModel.from_pretrained(self.make(), self.adapter).to(self.dtype).eval()

    @property
    def dtype(self) -> torch.dtype:
        return next(self.make().parameters()).dtype

    def converted(self) -> nn.Module:
        """The model after our conversion of every entry."""
        lora_to_shira(self.adapter, self.base, self.folder / "all.st", density=1.0)
        model = self.make()
        apply(load(self.folder / "all.st"), model.state_dict())
        return model

    def check(self, *, changed: int, tolerance: float, merges: bool = True, runs: bool = True) -> None:
        """That we change ``changed`` tensors to what PEFT merges, and that the result runs as PEFT's model does."""
        before, ours = self.make().state_dict(), self.converted().state_dict()
        assert sum(not torch.equal(tensor, ours[name]) for name, tensor in before.items()) == changed
        if merges:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                merged = self.peft().merge_and_unload().state_dict()
            assert merged.keys() == ours.keys()
            for name, tensor in merged.items():
                torch.testing.assert_close(ours[name], tensor, rtol=tolerance, atol=tolerance, msg=name)
                assert torch.equal(before[name], ours[name]) or (before[name] - tensor).abs().max() > 1e-3, name
        if runs:
            with torch.no_grad():
                live, here, without = self.peft()(TOKENS), self.converted()(TOKENS), self.make()(TOKENS)
            torch.testing.assert_close(here, live, rtol=1000 * tolerance, atol=1000 * tolerance)
            assert (without - live).abs().max() > 1e-3


LINEAR = ["linear", "square", "wide"]
# The configuration, the number of changed tensors, and whether PEFT computes in float64 where its parameters are.
CASES: dict[str, tuple[Any, int, bool]] = {
    "oft": (lambda: peft.OFTConfig(target_modules=["embed", *LINEAR, "dot"], oft_block_size=4, use_cayley_neumann=False), 5, True),
    "oft_neumann": (lambda: peft.OFTConfig(target_modules=LINEAR, oft_block_size=4), 3, True),
    "oft_neumann_3": (lambda: peft.OFTConfig(target_modules=LINEAR, oft_block_size=4, num_cayley_neumann_terms=3), 3, True),
    "oft_neumann_1": (lambda: peft.OFTConfig(target_modules=LINEAR, oft_block_size=4, num_cayley_neumann_terms=2), 3, True),
    "oft_neumann_8": (lambda: peft.OFTConfig(target_modules=LINEAR, oft_block_size=4, num_cayley_neumann_terms=8), 3, True),
    "oft_shared": (
        lambda: peft.OFTConfig(target_modules=["embed", *LINEAR], oft_block_size=4, block_share=True, use_cayley_neumann=False),
        4, True,
    ),
    "oft_coft": (lambda: peft.OFTConfig(target_modules=LINEAR, r=2, oft_block_size=0, coft=True, eps=0.2, use_cayley_neumann=False), 3, True),
    "oft_bias": (lambda: peft.OFTConfig(target_modules=LINEAR, oft_block_size=4, bias="oft_only"), 5, True),
    "oft_all_biases": (lambda: peft.OFTConfig(target_modules=LINEAR, oft_block_size=4, bias="all"), 10, True),
    "oft_saved": (lambda: peft.OFTConfig(target_modules=["square"], oft_block_size=4, modules_to_save=["linear"]), 3, True),
    "boft": (lambda: peft.BOFTConfig(target_modules=[*LINEAR, "plane", "dot"], boft_block_size=4), 5, False),
    "hra": (lambda: peft.HRAConfig(target_modules=[*LINEAR, "plane", "dot"], r=4), 5, True),
    "hra_gs": (lambda: peft.HRAConfig(target_modules=[*LINEAR, "plane"], r=4, apply_GS=True), 4, True),
    "road_1": (lambda: peft.RoadConfig(target_modules=LINEAR, group_size=4), 5, True),
    "road_2": (lambda: peft.RoadConfig(target_modules=LINEAR, group_size=4, variant="road_2"), 5, True),
    "road_4": (lambda: peft.RoadConfig(target_modules=LINEAR, group_size=8, variant="road_4"), 5, True),
    "ia3": (
        lambda: peft.IA3Config(target_modules=[*LINEAR, "plane", "dot", "space"], feedforward_modules=["wide", "plane"]), 10, True,
    ),
    "ia3_regex": (lambda: peft.IA3Config(target_modules=r"(linear|wide|space)", feedforward_modules=r"(linear|space)"), 3, True),
    "beft": (lambda: peft.BeftConfig(target_modules=["linear", "square"]), 2, True),
    "norms": (lambda: peft.LNTuningConfig(target_modules=["norm"]), 2, True),
    "tokens": (lambda: peft.TrainableTokensConfig(target_modules=["embed"], token_indices=[7, 2]), 1, True),
    "adalora": (
        lambda: peft.AdaLoraConfig(target_modules=[*LINEAR, "plane", "dot"], init_r=3, lora_alpha=5, total_step=10), 5, True,
    ),
    "loha": (lambda: peft.LoHaConfig(target_modules=[*LINEAR, "line", "plane", "dot"], r=2, alpha=3, rank_pattern={"wide": 3}), 6, True),
    "loha_cores": (
        lambda: peft.LoHaConfig(target_modules=["line", "plane", "dot"], r=2, alpha=3, use_effective_conv2d=True, alpha_pattern={"dot": 1}),
        3, True,
    ),
    "lokr": (
        lambda: peft.LoKrConfig(target_modules=[*LINEAR, "line", "plane", "dot"], r=1, alpha=3, decompose_both=True, rank_pattern={"wide": 2}),
        6, True,
    ),
    "lokr_whole": (lambda: peft.LoKrConfig(target_modules=[*LINEAR, "line", "plane", "dot"], r=64, alpha=99, decompose_factor=2), 6, True),
    "lokr_cores": (
        lambda: peft.LoKrConfig(target_modules=["line", "plane", "dot"], r=1, alpha=3, use_effective_conv2d=True), 3, True,
    ),
    "hira": (
        lambda: peft.HiraConfig(target_modules=["embed", "line", *LINEAR, "plane", "dot"], r=3, rank_pattern={"dot": 2}), 7, True,
    ),
    "delora": (lambda: peft.DeloraConfig(target_modules=LINEAR, r=3, delora_lambda=1, rank_pattern={"wide": 2}), 3, True),
    "gralora": (lambda: peft.GraloraConfig(target_modules=LINEAR, r=4, alpha=3, gralora_k=2), 3, True),
    "gralora_hybrid": (lambda: peft.GraloraConfig(target_modules=LINEAR, r=4, alpha=3, gralora_k=4, hybrid_r=2), 3, True),
    "vera": (lambda: peft.VeraConfig(target_modules=LINEAR, r=3), 3, True),
    "vblora": (lambda: peft.VBLoRAConfig(target_modules=LINEAR, r=2, num_vectors=6, vector_length=4, topk=2), 3, True),
    "vblora_small": (
        lambda: peft.VBLoRAConfig(
            target_modules=LINEAR, r=2, num_vectors=6, vector_length=4, topk=3, save_only_topk_weights=True
        ),
        3, True,
    ),
    "miss": (lambda: peft.MissConfig(target_modules=LINEAR, r=4), 3, True),
    "miss_rest": (lambda: peft.MissConfig(target_modules=LINEAR, r=5), 3, True),
    "miss_bat": (lambda: peft.MissConfig(target_modules=LINEAR, r=4, init_weights="bat"), 3, True),
    "miss_mini": (lambda: peft.MissConfig(target_modules=LINEAR, r=4, init_weights="mini", mini_r=2), 3, True),
    "c3a": (lambda: peft.C3AConfig(target_modules=LINEAR, block_size=4, block_size_pattern={"wide": 8}), 3, False),
    "fourierft": (
        lambda: peft.FourierFTConfig(target_modules=LINEAR, n_frequency=30, n_frequency_pattern={"wide": 9}, scaling=20.0), 3, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_what_peft_merges_and_runs(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In float64 to 1e-12, where PEFT computes in float64, else to the rounding of float32."""
    config, changed, is_wide = CASES[case]
    adapted = Case(tmp_path, Everything, config(), dtype)
    adapted.check(changed=changed, tolerance=1e-12 if dtype == torch.float64 and is_wide else 2e-6)


TURNED: dict[str, tuple[Any, int, bool]] = {
    "ia3": (lambda: peft.IA3Config(target_modules=["up", "square", "down"], feedforward_modules=["square", "down"]), 4, True),
    "adalora": (lambda: peft.AdaLoraConfig(target_modules=["up", "square", "down"], init_r=3, lora_alpha=5, total_step=10), 3, True),
    "hira": (lambda: peft.HiraConfig(target_modules=["up", "square", "down"], r=3), 3, True),
    "gralora": (lambda: peft.GraloraConfig(target_modules=["up", "square", "down"], r=4, alpha=3, hybrid_r=1), 3, True),
    "vera": (lambda: peft.VeraConfig(target_modules=["up", "square", "down"], r=3), 3, True),
    "vblora": (lambda: peft.VBLoRAConfig(target_modules=["up", "square", "down"], r=2, num_vectors=6, vector_length=4), 3, True),
    "fourierft": (lambda: peft.FourierFTConfig(target_modules=["up", "square", "down"], n_frequency=30, scaling=20.0), 3, False),
}  # fmt: skip


@pytest.mark.parametrize("case", TURNED)
def test_weights_stored_as_inputs_by_outputs(case: str, tmp_path: Path) -> None:
    config, changed, is_wide = TURNED[case]
    adapted = Case(tmp_path, Turned, config(), torch.float64)
    adapted.check(changed=changed, tolerance=1e-12 if is_wide else 2e-6)


def test_every_tuner_of_peft_is_read_or_refused_by_name() -> None:
    known = {kind.value for kind in peft.PeftType} - {"LORA"}
    assert known <= TUNERS.keys() | REFUSED.keys()
    assert not TUNERS.keys() & REFUSED.keys()
    assert {kind for kind in TUNERS if kind not in known} == set()
    assert all(tuner(kind).parts for kind in TUNERS)
