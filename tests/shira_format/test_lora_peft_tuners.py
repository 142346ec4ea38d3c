"""PEFT's adapters that are no LoRA, as PEFT writes, runs and merges them, on a layer of each kind that they support."""

from __future__ import annotations

import dataclasses
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
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.boft.layer import BOFTLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.errors import SourceError
from shira_format.format import load
from shira_format.live import apply
from shira_format.lora import open_lora
from shira_format.lora.peft.config import HARMLESS
from shira_format.lora.peft.tuners import REFUSED, TUNERS, tuner
from shira_format.lora.peft.tuners.reader import COMMON
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
        for layer in (self.up, self.square, self.down):
            nn.init.normal_(layer.weight, std=0.5)
            nn.init.normal_(layer.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[n, 8]`` tokens to ``[n, 8]``."""
        return self.down(torch.tanh(self.square(torch.tanh(self.up(tokens.to(self.up.weight.dtype) / 12)))))  # type: ignore[no-any-return]


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
                assert torch.equal(before[name], ours[name]) or (before[name] - tensor).abs().max() > 1e-4, name
        if runs:
            with torch.no_grad():
                live, here, without = self.peft()(TOKENS), self.converted()(TOKENS), self.make()(TOKENS)
            torch.testing.assert_close(here, live, rtol=1000 * tolerance, atol=1000 * tolerance)
            assert (without - live).abs().max() > 1e-4


LINEAR = ["linear", "square", "wide"]
# The configuration, the number of changed tensors, and whether PEFT computes in float64 where its parameters are (the bound of coft is in float32).
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
    "oft_coft": (lambda: peft.OFTConfig(target_modules=LINEAR, r=2, oft_block_size=0, coft=True, eps=0.2, use_cayley_neumann=False), 3, False),
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
        lambda: peft.LoKrConfig(target_modules=["line", "plane", "dot"], r=2, alpha=3, use_effective_conv2d=True, decompose_factor=1), 3, True,
    ),
    "hira": (
        lambda: peft.HiraConfig(target_modules=["embed", "line", *LINEAR, "plane", "dot"], r=3, rank_pattern={"dot": 2}), 7, True,
    ),
    "delora": (lambda: peft.DeloraConfig(target_modules=LINEAR, r=3, delora_lambda=1, rank_pattern={"wide": 2}), 3, True),
    "glora": (lambda: peft.GloraConfig(target_modules=LINEAR, r=2), 5, True),
    "glora_vectors": (
        lambda: peft.GloraConfig(target_modules=LINEAR, config_A_B="vector", config_C="vector", config_D_E="vector"), 5, True,
    ),
    "glora_numbers": (
        lambda: peft.GloraConfig(target_modules=LINEAR, config_A_B="constant", config_C="none", config_D_E="constant"), 5, True,
    ),
    "gralora": (lambda: peft.GraloraConfig(target_modules=LINEAR, r=4, alpha=3, gralora_k=2), 3, True),
    "gralora_hybrid": (lambda: peft.GraloraConfig(target_modules=LINEAR, r=4, alpha=3, gralora_k=4, hybrid_r=2), 3, True),
    "vera": (lambda: peft.VeraConfig(target_modules=LINEAR, r=3), 3, True),
    "randlora": (lambda: peft.RandLoraConfig(target_modules=LINEAR, r=3, randlora_alpha=30), 3, True),
    "randlora_sparse": (lambda: peft.RandLoraConfig(target_modules=LINEAR, r=2, randlora_alpha=20, sparse=True), 3, True),
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
    if case == "vblora_small" and dtype == torch.float64:
        pytest.skip("PEFT cannot load it")
    adapted = Case(tmp_path, Everything, config(), dtype)
    adapted.check(changed=changed, tolerance=1e-12 if dtype == torch.float64 and is_wide else 2e-6)


TURNED: dict[str, tuple[Any, int, bool]] = {
    "ia3": (lambda: peft.IA3Config(target_modules=["up", "square", "down"], feedforward_modules=["square", "down"]), 4, True),
    "adalora": (lambda: peft.AdaLoraConfig(target_modules=["up", "square", "down"], init_r=3, lora_alpha=5, total_step=10), 3, True),
    "hira": (lambda: peft.HiraConfig(target_modules=["up", "square", "down"], r=3, fan_in_fan_out=True), 3, True),
    "gralora": (lambda: peft.GraloraConfig(target_modules=["up", "square", "down"], r=4, alpha=3, hybrid_r=1), 3, True),
    "vera": (lambda: peft.VeraConfig(target_modules=["up", "square", "down"], r=3), 3, True),
    "randlora": (lambda: peft.RandLoraConfig(target_modules=["up", "square", "down"], r=3, randlora_alpha=30), 3, True),
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


@pytest.mark.parametrize("kind", TUNERS)
def test_every_option_of_peft_is_known(kind: str) -> None:
    """A new one in a later version is looked at before it is called harmless."""
    fields = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind]])}
    found = tuner(kind)
    named = found.options | found.harmless | found.refused.keys()
    assert fields - named <= COMMON | (HARMLESS if kind == "ADALORA" else set())
    assert (found.options | found.harmless) <= fields


def boft_matrix(free: torch.Tensor) -> torch.Tensor:
    """The product of factors, dense, from PEFT's own permutations and rotations.

    ``peft`` makes several factors only with its CUDA extension, which builds ``block_diag`` and nothing else.
    """
    steps, count, size, _ = free.shape
    columns = count * size
    product = torch.eye(columns, dtype=free.dtype)
    for step in range(steps):
        order = BOFTLayer.block_butterfly_perm(None, columns, count // 2**step, size // 2, steps - 1)
        turn = BOFTLayer.perm2mat(None, order).to(free.dtype)
        block = torch.block_diag(*BOFTLayer.cayley_batch(None, free[step].float())).to(free.dtype)
        product = turn @ block @ turn.T @ product
    return product


@pytest.mark.parametrize(("count", "size", "steps"), [(4, 2, 3), (4, 4, 2), (6, 2, 2), (8, 2, 4), (2, 8, 1)])
def test_boft_of_several_factors(count: int, size: int, steps: int, tmp_path: Path) -> None:
    torch.manual_seed(5)
    columns = count * size
    weight, free, scale = torch.randn(5, columns), torch.randn(steps, count, size, size), torch.rand(5, 1) + 0.5
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(
        {"base_model.model.x.boft_R": free, "base_model.model.x.boft_s": scale},
        folder / "adapter_model.safetensors",
    )
    options = {"peft_type": "BOFT", "boft_block_size": size, "boft_n_butterfly_factor": steps}
    (folder / "adapter_config.json").write_text(json.dumps(options))
    save_file({"x.weight": weight}, tmp_path / "base.safetensors")
    lora = open_lora(folder, open_checkpoint(tmp_path / "base.safetensors"))
    wanted = (boft_matrix(free.double()) @ weight.double().T).T * scale
    np.testing.assert_allclose(weight.numpy() + dense(lora.updates[0], 2), wanted.numpy(), atol=5e-6)
    if steps > 1:
        assert (boft_matrix(free.double()) - boft_matrix(free[:1].double())).abs().max() > 0.1


class Written:
    """An adapter of one layer ``x``, written by hand, beside a base that has it."""

    def __init__(
        self, folder: Path, kind: str, parts: dict[str, Any], shape: tuple[int, ...] = (8, 12), **options: Any
    ) -> None:
        self.base = folder / "base.safetensors"
        torch.manual_seed(6)
        save_file({"x.weight": torch.randn(shape), "x.bias": torch.randn(shape[0])}, self.base)
        self.adapter = folder / "adapter"
        self.adapter.mkdir()
        (self.adapter / "adapter_config.json").write_text(json.dumps({"peft_type": kind} | options))
        made = {key: torch.as_tensor(value).contiguous() for key, value in parts.items()}
        keys = {
            key if key.startswith("base_model.") else f"base_model.model.x.{key}": value
            for key, value in made.items()
        }
        save_file(keys, self.adapter / "adapter_model.safetensors")

    def open(self) -> Any:
        return open_lora(self.adapter, open_checkpoint(self.base))


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


OFT = {"oft_block_size": 4, "use_cayley_neumann": False, "peft_version": "0.21.0"}
REFUSALS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "old OFT": ("OFT", {"oft_R.weight": zeros(3, 6)}, {"r": 3}, "PEFT before 0.14"),
    "old series": ("OFT", {"oft_R.weight": zeros(3, 6)}, OFT | {"use_cayley_neumann": True, "peft_version": None}, "before 0.18"),
    "which series": ("OFT", {"oft_R.weight": zeros(3, 6)}, {"oft_block_size": 4}, "use_cayley_neumann is not set"),
    "no triangles": ("OFT", {"oft_R.weight": zeros(3, 5)}, OFT, "no triangles"),
    "oft inputs": ("OFT", {"oft_R.weight": zeros(2, 6)}, OFT, "2 blocks of 4 inputs"),
    "shared": ("OFT", {"oft_R.weight": zeros(3, 6)}, OFT | {"block_share": True}, "3 shared blocks"),
    "not a flag": ("OFT", {"oft_R.weight": zeros(3, 6)}, OFT | {"block_share": 1}, "block_share must be true or false"),
    "no eps": ("OFT", {"oft_R.weight": zeros(3, 6)}, OFT | {"coft": True}, "eps must be a number"),
    "no terms": ("OFT", {"oft_R.weight": zeros(3, 6)}, OFT | {"use_cayley_neumann": True}, "num_cayley_neumann_terms must be"),
    "unknown option": ("OFT", {"oft_R.weight": zeros(3, 6)}, OFT | {"oft_new": 5}, "the option 'oft_new' is set, which is unknown"),
    "bias": ("OFT", {"oft_R.weight": zeros(3, 6)}, OFT | {"bias": "some"}, "bias must be 'none', 'all' or"),
    "saved": ("OFT", {"oft_R.weight": zeros(3, 6)}, OFT | {"modules_to_save": "x"}, "modules_to_save must be a list"),
    "unknown part": ("OFT", {"oft_R.weight": zeros(3, 6), "oft_S": zeros(2)}, OFT, "unmatched key 'x.oft_S'"),
    "no layer": ("OFT", {"bias": zeros(8)}, OFT, "no layer is adapted by OFT"),
    "other prefix": ("OFT", {"base_model.x.oft_R.weight": zeros(3, 6)}, OFT, "does not start with"),
    "twice wrapped": ("OFT", {"base_model.model.x.base_layer.oft_R.weight": zeros(3, 6)}, OFT, "wrapped several times"),
    "NaN": ("OFT", {"oft_R.weight": zeros(3, 6) * float("nan")}, OFT, "NaN"),
    "boft parts": ("BOFT", {"boft_R": zeros(1, 3, 4, 4)}, {}, "without boft_s"),
    "boft inputs": ("BOFT", {"boft_R": zeros(1, 2, 4, 4), "boft_s": zeros(8, 1)}, {}, "2 blocks of shape"),
    "boft outputs": ("BOFT", {"boft_R": zeros(1, 3, 4, 4), "boft_s": zeros(7, 1)}, {}, "each of 8 outputs"),
    "boft factors": ("BOFT", {"boft_R": zeros(2, 3, 4, 4), "boft_s": zeros(8, 1)}, {}, "2 butterfly factors"),
    "hra inputs": ("HRA", {"hra_u": zeros(8, 2)}, {}, "8 inputs"),
    "hra direction": ("HRA", {"hra_u": zeros(12, 2)}, {}, "norm 0"),
    "road groups": ("ROAD", {"road_theta": zeros(4), "road_alpha": zeros(4)}, {"variant": "road_1", "group_size": 6}, "groups of 6"),
    "road variant": ("ROAD", {"road_theta": zeros(4), "road_alpha": zeros(4)}, {"variant": "road_3", "group_size": 4}, "'road_3'"),
    "road size": ("ROAD", {"road_theta": zeros(5), "road_alpha": zeros(5)}, {"variant": "road_1", "group_size": 4}, "has 4"),
    "ia3 unknown": ("IA3", {"ia3_l": zeros(1, 1)}, {}, "feedforward_modules is not set"),
    "ia3 shape": ("IA3", {"ia3_l": zeros(8)}, {}, "ia3_l has shape [8]"),
    "ia3 inputs": ("IA3", {"ia3_l": zeros(1, 9)}, {}, "9 inputs"),
    "ia3 says": ("IA3", {"ia3_l": zeros(1, 12)}, {"feedforward_modules": ["y"]}, "contradicts feedforward_modules"),
    "ia3 names": ("IA3", {"ia3_l": zeros(1, 12)}, {"feedforward_modules": [5]}, "a regex or a list"),
    "ia3 regex": ("IA3", {"ia3_l": zeros(1, 12)}, {"feedforward_modules": "("}, "feedforward_modules '('"),
    "beft": ("BEFT", {"beft_bias": zeros(1, 9)}, {}, "a bias of 9 numbers"),
    "norms": ("LN_TUNING", {"ln_tuning_layers.bias": zeros(9)}, {}, "does not fit the base"),
    "tokens": ("TRAINABLE_TOKENS", {"trainable_tokens_delta": zeros(2, 12)}, {"token_indices": [1, 1]}, "names a row twice"),
    "no tokens": ("TRAINABLE_TOKENS", {"trainable_tokens_delta": zeros(2, 12)}, {}, "must be a list of rows"),
    "few tokens": ("TRAINABLE_TOKENS", {"trainable_tokens_delta": zeros(2, 12)}, {"token_indices": [1]}, "1 rows of"),
    "adalora rank": (
        "ADALORA", {"lora_A": zeros(2, 12), "lora_B": zeros(8, 2), "lora_E": zeros(2, 1)}, {"init_r": 3, "lora_alpha": 1},
        "should have rank 3",
    ),
    "adalora alpha": (
        "ADALORA", {"lora_A": zeros(2, 12), "lora_B": zeros(8, 2), "lora_E": zeros(2, 1)}, {"init_r": 2, "lora_alpha": 0},
        "lora_alpha must be positive",
    ),
    "adalora pattern": (
        "ADALORA", {"lora_A": zeros(2, 12), "lora_B": zeros(8, 2), "lora_E": zeros(2, 1)},
        {"init_r": 3, "lora_alpha": 1, "rank_pattern": {"x.lora_E": [1, 0, 1]}}, "true and false",
    ),
    "adalora dora": (
        "ADALORA", {"lora_A": zeros(2, 12), "lora_B": zeros(8, 2), "lora_E": zeros(2, 1)},
        {"init_r": 2, "lora_alpha": 1, "use_dora": True}, "use_dora is set",
    ),
    "loha rank": (
        "LOHA", {f"hada_w{i}_{h}": zeros(*s) for i in (1, 2) for h, s in (("a", (8, 2)), ("b", (2, 12)))}, {"r": 3, "alpha": 1},
        "should have rank 3",
    ),
    "loha pattern": (
        "LOHA", {f"hada_w{i}_{h}": zeros(*s) for i in (1, 2) for h, s in (("a", (8, 2)), ("b", (2, 12)))},
        {"r": 2, "alpha": 1, "rank_pattern": {"x": 0}}, "must be a positive integer, not 0 by rank_pattern",
    ),
    "lokr rank": (
        "LOKR", {"lokr_w1": zeros(2, 2), "lokr_w2": zeros(4, 6)}, {"r": 2, "alpha": 1, "rank_pattern": {"x": 2.4}},
        "must be a positive integer, not 2.4 by rank_pattern",
    ),
    "delora rank": (
        "DELORA", {"delora_A": zeros(0, 12), "delora_B": zeros(8, 0), "delora_lambda": zeros(1), "delora_w_norm": zeros(12)},
        {"r": 2, "rank_pattern": {"x": 0}}, "must be a positive integer",
    ),
    "fourier pattern": (
        "FOURIERFT", {"fourierft_spectrum": zeros(5)},
        {"n_frequency": 5, "scaling": 1, "random_loc_seed": 1, "n_frequency_pattern": {"x": -5}}, "to positive integers",
    ),
    "loha shape": (
        "LOHA", {f"hada_w{i}_{h}": zeros(*s) for i in (1, 2) for h, s in (("a", (8, 2)), ("b", (2, 11)))}, {"r": 2, "alpha": 1},
        "8 rows and 11 columns",
    ),
    "loha core": (
        "LOHA",
        {f"hada_w{i}_{h}": zeros(*s) for i in (1, 2) for h, s in (("a", (2, 8)), ("b", (2, 12)))} | {"hada_t1": zeros(2, 2, 1, 1)},
        {"r": 2, "alpha": 1}, "one of hada_t1 and hada_t2",
    ),
    "lokr shape": ("LOKR", {"lokr_w1": zeros(2, 2), "lokr_w2": zeros(4, 5)}, {"r": 2, "alpha": 1}, "8 rows and 10 columns"),
    "lokr half": ("LOKR", {"lokr_w1": zeros(2, 2), "lokr_w2_a": zeros(4, 5)}, {"r": 2, "alpha": 1}, "without lokr_w2_b"),
    "lokr large": (
        "LOKR", {"lokr_w1": zeros(2, 2), "lokr_w2_a": zeros(9000, 1), "lokr_w2_b": zeros(1, 9000)}, {"r": 2, "alpha": 1}, "more than",
    ),
    "lokr pattern": (
        "LOKR", {"lokr_w1": zeros(2, 2), "lokr_w2": zeros(4, 6)}, {"r": 2, "alpha": 1, "alpha_pattern": {"(": 2}}, "alpha_pattern '('",
    ),
    "hira shape": ("HIRA", {"hira_A": zeros(2, 11), "hira_B": zeros(8, 2)}, {"r": 2}, "[8, 11]"),
    "delora": (
        "DELORA", {"delora_A": zeros(2, 12), "delora_B": zeros(8, 2), "delora_lambda": zeros(1), "delora_w_norm": zeros(9)}, {"r": 2},
        "delora_w_norm [9]",
    ),
    "glora": ("GLORA", {"glora_A.Xd": zeros(8, 2), "glora_A.Xu": zeros(2, 11)}, {}, "does not fit 8 x 12"),
    "glora zeros": ("GLORA", {"glora_A.X": zeros(1), "glora_B.zeros": torch.ones(8, 12)}, {}, "glora_B.zeros is not 0"),
    "gralora": ("GRALORA", {"gralora_A": zeros(2, 6, 4), "gralora_B": zeros(2, 4, 4)}, {"r": 4, "alpha": 1, "gralora_k": 4}, "gralora_k"),
    "gralora hybrid": (
        "GRALORA", {"gralora_A": zeros(2, 6, 4), "gralora_B": zeros(2, 4, 4)},
        {"r": 4, "alpha": 1, "gralora_k": 2, "hybrid_r": 1}, "without gralora_A_general",
    ),
    "vera projections": ("VERA", {"vera_lambda_b": zeros(8), "vera_lambda_d": zeros(2)}, {"r": 2}, "save_projection"),
    "randlora bases": (
        "RANDLORA", {"randlora_lambda": zeros(3, 3), "randlora_gamma": zeros(3, 8)}, {"r": 3, "randlora_alpha": 1}, "save_projection",
    ),
    "randlora differs": (
        "RANDLORA",
        {
            "randlora_lambda": zeros(3, 3), "randlora_gamma": zeros(3, 8), "base_model.randlora_A": zeros(3, 1, 8),
            "randlora_A": torch.ones(3, 1, 8),
        },
        {"r": 3, "randlora_alpha": 1}, "which all should share",
    ),
    "randlora size": (
        "RANDLORA",
        {
            "randlora_lambda": zeros(3, 3), "randlora_gamma": zeros(3, 8), "base_model.randlora_A": zeros(3, 1, 8),
            "base_model.randlora_B": zeros(11, 3, 3),
        },
        {"r": 3, "randlora_alpha": 1}, "do not fit a weight of shape [8, 12]",
    ),
    "vera outputs": (
        "VERA",
        {"vera_lambda_b": zeros(9), "vera_lambda_d": zeros(2), "base_model.vera_A": zeros(2, 12), "base_model.vera_B": zeros(9, 2)},
        {"r": 2}, "9 outputs",
    ),
    "vera inputs": (
        "VERA",
        {"vera_lambda_b": zeros(8), "vera_lambda_d": zeros(2), "base_model.vera_A": zeros(2, 11), "base_model.vera_B": zeros(9, 2)},
        {"r": 2}, "at most 9 outputs and 11 inputs",
    ),
    "vblora ties": (
        "VBLORA",
        {"vblora_logits_A": zeros(2, 3, 5), "vblora_logits_B": zeros(2, 2, 5), "base_model.vblora_vector_bank": zeros(5, 4)},
        {"r": 2, "topk": 2}, "equal logits",
    ),
    "vblora bank": (
        "VBLORA", {"vblora_logits_A": zeros(2, 3, 5), "vblora_logits_B": zeros(2, 2, 5)}, {"r": 2, "topk": 2}, "are not in the file",
    ),
    "vblora indices": (
        "VBLORA",
        {
            "vblora_logits_A_topk_indices": torch.full((2, 3, 2), 7, dtype=torch.uint8), "vblora_logits_A_topk_weights": zeros(2, 3, 1),
            "vblora_logits_B_topk_indices": torch.zeros((2, 2, 2), dtype=torch.uint8), "vblora_logits_B_topk_weights": zeros(2, 2, 1),
            "base_model.vblora_vector_bank": zeros(5, 4),
        },
        {"r": 2, "topk": 2, "save_only_topk_weights": True}, "the bank of 5 does not have",
    ),
    "miss": ("MISS", {"miss_block": zeros(4, 9)}, {"r": 4}, "9 outputs in blocks of 4"),
    "miss rank": ("MISS", {"miss_block": zeros(4, 8)}, {"r": 2}, "(r 2)"),
    "miss start": ("MISS", {"miss_block": zeros(4, 8)}, {"r": 4, "init_weights": "other"}, "init_weights='other'"),
    "miss bat": ("MISS", {"miss_block": zeros(2, 3, 3)}, {"r": 3, "init_weights": "bat"}, "blocks of 3 x 3"),
    "miss mini": ("MISS", {"miss_block": zeros(4, 3)}, {"r": 4, "init_weights": "mini", "mini_r": 3}, "groups of 3"),
    "c3a": ("C3A", {"c3a_kernel": zeros(2, 2, 4)}, {}, "[8, 8]"),
    "fourier count": ("FOURIERFT", {"fourierft_spectrum": zeros(5)}, {"n_frequency": 6, "scaling": 1, "random_loc_seed": 1}, "should have 6"),
    "fourier seed": ("FOURIERFT", {"fourierft_spectrum": zeros(5)}, {"n_frequency": 5, "scaling": 1}, "random_loc_seed must be"),
    "fourier turned": (
        "FOURIERFT", {"fourierft_spectrum": zeros(5)}, {"n_frequency": 5, "scaling": 1, "random_loc_seed": 1, "fan_in_fan_out": True},
        "contradict",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str, tmp_path: Path) -> None:
    kind, parts, options, message = REFUSALS[case]
    written = Written(tmp_path, kind, parts, **options)
    with pytest.raises(SourceError) as error:
        written.open()
    assert message in str(error.value)
    assert str(written.adapter) in str(error.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_other_tuners_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    written = Written(tmp_path, kind, {"base_model.prompt_embeddings": zeros(2, 12)})
    with pytest.raises(SourceError) as error:
        written.open()
    assert f"peft_type is {kind!r}" in str(error.value)
    assert any(
        way in str(error.value)
        for way in ("full_to_shira", "peft_to_shira", "no weight", "no change", "no single", "which no")
    )


def test_prompts_change_no_weight(tmp_path: Path) -> None:
    """As PEFT writes them: the keys are not ``base_model.model.``"""
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(models.llama(), config).save_pretrained(tmp_path / "adapter")
    base = models.save_base(models.llama(), tmp_path / "base")
    with pytest.raises(SourceError, match="PROMPT_TUNING.*changes no weight of the base"):
        open_lora(tmp_path / "adapter", open_checkpoint(base))


def test_oft_of_a_convolution_with_a_kernel_changes_no_weight(tmp_path: Path) -> None:
    """PEFT's model is not the base even where nothing is rotated, and its merge is another model."""
    adapted = Case(tmp_path, Everything, peft.OFTConfig(target_modules=["plane"], oft_block_size=4), torch.float32)
    with torch.no_grad():
        wrapped = adapted.peft()
        for parameter in wrapped.parameters():
            if parameter.shape == (9, 6):
                parameter.zero_()
        assert (wrapped(TOKENS) - adapted.make()(TOKENS)).abs().max() > 1e-3
    with pytest.raises(SourceError, match="'plane' is a convolution with a kernel"):
        open_lora(adapted.adapter, open_checkpoint(adapted.base))


def test_ranks_that_adalora_gave_up(tmp_path: Path) -> None:
    """They do not change the scale, and a layer of rank 0 does nothing."""
    config = peft.AdaLoraConfig(target_modules=LINEAR, init_r=3, lora_alpha=5, total_step=10)
    adapted = Case(tmp_path, Everything, config, torch.float64)
    kept = {"linear.lora_E": [True, False, True], "square.lora_E": [False] * 3, "wide.lora_E": [True] * 3}
    path = adapted.adapter / "adapter_model.safetensors"
    state = load_file(path)
    for name, mask in kept.items():
        module = f"base_model.model.{name.removesuffix('.lora_E')}"
        for part in ("lora_A", "lora_E"):
            state[f"{module}.{part}"] = state[f"{module}.{part}"][mask].contiguous()
        state[f"{module}.lora_B"] = state[f"{module}.lora_B"][:, mask].contiguous()
    save_file(state, path)
    models.edit_config(adapted.adapter, rank_pattern=kept)
    adapted.check(changed=2, tolerance=1e-12)


NAMED = [
    "oft",
    "boft",
    "ia3",
    "adalora",
    "lokr",
    "norms",
    "gralora_hybrid",
    "vblora",
    "vera",
    "hira",
    "beft",
    "road_1",
    "miss",
    "tokens",
]


@pytest.mark.parametrize("case", NAMED)
def test_keys_with_the_name_of_the_adapter(case: str, tmp_path: Path) -> None:
    """As ``state_dict`` of PEFT's model has them."""
    config, _, _ = CASES[case]
    adapted = Case(tmp_path, Everything, config(), torch.float32)
    first = adapted.converted().state_dict()
    path = adapted.adapter / "adapter_model.safetensors"
    plain = load_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = adapted.peft().state_dict()
    named = {key: tensor.clone() for key, tensor in state.items() if ".default" in key and "ranknum" not in key}
    named = {
        key: tensor
        for key, tensor in named.items()
        if not (
            "vera_A" in key
            or "vera_B" in key
            or "randlora_A" in key
            or "randlora_B" in key
            or "vector_bank" in key
        )
        or key.count(".") == 2
    }
    assert len(named) == len(plain)
    assert named.keys() != plain.keys()
    save_file(named, path)
    second = adapted.converted().state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_other_prefixes_are_matched_as_for_loras(tmp_path: Path) -> None:
    """One tower of two that look alike is refused, and chosen by the prefix."""
    parts = {f"base_model.model.encoder.{i}.ia3_l": torch.full((8, 1), 2.0 + i) for i in range(2)}
    written = Written(tmp_path, "IA3", parts)
    towers = {f"{tower}.encoder.{i}.weight": torch.ones(8, 12) for tower in ("text", "vision") for i in range(2)}
    save_file(towers, written.base)
    with pytest.raises(SourceError, match="text.*vision"):
        written.open()
    lora = open_lora(written.adapter, open_checkpoint(written.base), prefix="vision.")
    found = {update.name: dense(update) for update in lora.updates}
    assert found.keys() == {"vision.encoder.0.weight", "vision.encoder.1.weight"}
    np.testing.assert_array_equal(found["vision.encoder.1.weight"], np.full((8, 12), 2.0))
    assert any("vision." in notice for notice in lora.notices)
    save_file(towers | {f"text.encoder.{i}.weight": torch.ones(4, 12) for i in range(2)}, written.base)
    assert {update.name for update in written.open().updates} == found.keys()  # the other has other shapes


def test_a_bf16_base_and_adapter(tmp_path: Path) -> None:
    """Computed in float32 and rounded once."""
    adapted = Case(tmp_path, Everything, peft.OFTConfig(target_modules=LINEAR, oft_block_size=4, use_cayley_neumann=False), torch.bfloat16)  # fmt: skip
    state = {name: tensor.double() for name, tensor in adapted.make().state_dict().items()}
    upper = load_file(adapted.adapter / "adapter_model.safetensors")
    ours = adapted.converted().state_dict()
    for name in LINEAR:
        vectors = upper[f"base_model.model.{name}.oft_R.weight"].double()
        skew = torch.zeros(len(vectors), 4, 4, dtype=torch.float64)
        skew[:, *torch.triu_indices(4, 4, 1)] = vectors
        skew = skew - skew.mT
        eye = torch.eye(4, dtype=torch.float64)
        rotation = torch.block_diag(*((eye - skew) @ torch.linalg.inv(eye + skew)))
        wanted = state[f"{name}.weight"] @ rotation.T
        slack = 2e-6 * wanted.abs().max()
        low, high = ((wanted + side * slack).bfloat16() for side in (-1, 1))
        assert ((low <= ours[f"{name}.weight"]) & (ours[f"{name}.weight"] <= high)).all()


def test_the_provenance_says_which_tuner(tmp_path: Path) -> None:
    lora = Written(tmp_path, "OFT", {"oft_R.weight": zeros(3, 6)}, base_model_name_or_path="me/base", **OFT).open()
    assert lora.source == {"kind": "lora", "dialect": "peft", "peft_type": "OFT", "peft_version": "0.21.0"}
    assert lora.base_model == {"id": "me/base"}
