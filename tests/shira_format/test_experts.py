"""Experts one by one and in 3-D tensors, both ways: transformers' own saving and loading, PEFT's merge, float64."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AriaTextConfig,
    AriaTextForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Lfm2MoeConfig,
    Lfm2MoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from shira_format.checkpoints import open_checkpoint
from shira_format.convert import full_to_shira, lora_to_shira
from shira_format.errors import SourceError
from shira_format.export.full import shira_to_full
from shira_format.format import load
from shira_format.names.located import LocatedCheckpoint
from shira_format.names.models.experts import experts, why_not
from shira_format.names.row_blocks import Location
from tests import models
from tests.merges import Adapted
from tests.shira_format.test_lora_peft_experts import SMALL

State = dict[str, torch.Tensor]


def _made(model: type[nn.Module], config: type[Any], **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model(config(**SMALL | options)).eval()

    return make


THREE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
# Models whose experts transformers joins while loading, and separates while saving.
JOINED: dict[str, Callable[[], nn.Module]] = {
    "mixtral": _made(MixtralForCausalLM, MixtralConfig, num_local_experts=3, num_experts_per_tok=2),
    "qwen3_moe": _made(Qwen3MoeForCausalLM, Qwen3MoeConfig, **THREE),
    "olmoe": _made(OlmoeForCausalLM, OlmoeConfig, num_experts=3, num_experts_per_tok=2),
    "deepseek_v3": _made(
        DeepseekV3ForCausalLM, DeepseekV3Config, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=12, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8, head_dim=4, n_shared_experts=1,
    ),
    "phimoe": _made(PhimoeForCausalLM, PhimoeConfig, num_local_experts=3, num_experts_per_tok=2),
    "lfm2_moe": _made(Lfm2MoeForCausalLM, Lfm2MoeConfig, num_dense_layers=1, layer_types=["full_attention", "conv"], **THREE),
    "jamba": _made(
        JambaForCausalLM, JambaConfig, num_experts=3, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False, mamba_d_state=4,
    ),
    "nemotron_h": _made(
        NemotronHForCausalLM, NemotronHConfig, moe_intermediate_size=12, n_routed_experts=3, num_experts_per_tok=2, n_groups=1,
        n_group=1, topk_group=1, hybrid_override_pattern="E*", moe_shared_expert_intermediate_size=10,
    ),
}  # fmt: skip
# Models whose 3-D tensors are [experts, in, out], on disk as in memory.
TURNED: dict[str, Callable[[], nn.Module]] = {
    "gpt_oss": _made(GptOssForCausalLM, GptOssConfig, num_local_experts=3, num_experts_per_tok=2, rope_parameters=None),
    "llama4": _made(
        Llama4ForCausalLM, Llama4TextConfig, num_local_experts=3, num_experts_per_tok=1, intermediate_size_mlp=20,
        interleave_moe_layer_step=1,
    ),
}  # fmt: skip


def on_disk(model: nn.Module, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def in_memory(model: nn.Module, folder: Path) -> Path:
    """As the state dict has it."""
    folder.mkdir()
    tied = "lm_head.weight" if getattr(model.config, "tie_word_embeddings", False) else ""
    save_file(
        {n: t.contiguous().clone() for n, t in model.state_dict().items() if n != tied},
        folder / "model.safetensors",
    )
    return folder


def forms(make: Callable[[], nn.Module], folder: Path) -> tuple[Path, Path]:
    return on_disk(make(), folder / "disk"), in_memory(make(), folder / "memory")


def state(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def tuned(make: Callable[[], nn.Module]) -> nn.Module:
    model = make()
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 16)
    return model


def under(names: Iterable[str], values: State) -> State:
    """The values under the prefix that most of the names have (Nemotron-H's is ``backbone.`` on disk, ``model.`` in memory)."""
    ours = "backbone." if any(name.startswith("backbone.") for name in names) else "model."
    return {re.sub(r"^(backbone|model)\.", ours, name): tensor for name, tensor in values.items()}


@pytest.fixture(params=JOINED)
def make(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    return JOINED[request.param]


def test_a_table_of_what_transformers_saves_and_loads(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Each tensor of one form has the values that the other form's file has, bit for bit."""
    disk, memory = forms(make, tmp_path)
    for ours, theirs in ((disk, memory), (memory, disk)):
        base = open_checkpoint(ours)
        wanted = under(base, state(theirs))
        lacking = {name for name in wanted if name not in base}
        assert any("experts" in name for name in lacking)
        table = experts(base, base.shape)
        # transformers also renames what is beside the experts of some models: no part of these.
        assert {name for name in lacking if "experts." in name} <= table.keys()
        view = LocatedCheckpoint(base, table)
        for name in lacking & table.keys():
            assert view.shape(name) == tuple(wanted[name].shape)
            np.testing.assert_array_equal(view[name], wanted[name].numpy())
            flat = wanted[name].numpy().reshape(-1)
            for start, stop in ((0, 1), (flat.size - 5, flat.size), (flat.size // 3, 2 * flat.size // 3), (7, 7)):
                np.testing.assert_array_equal(view.part(name, start, stop), flat[start:stop])


@pytest.mark.parametrize("name", TURNED)
def test_experts_that_are_not_rows(name: str, tmp_path: Path) -> None:
    disk = open_checkpoint(on_disk(TURNED[name](), tmp_path / "disk"))
    assert not experts(disk, disk.shape)
    single = (
        next(n for n in disk if n.endswith("experts.down_proj")).replace("experts.down", "experts.1.down")
        + ".weight"
    )
    assert "they are [experts, in, out], so that an expert's gate and up are not rows of them" in str(
        why_not(single, disk, disk.shape)
    )


def single_lora(folder: Path, singles: dict[str, tuple[int, ...]], prefix: str = "", **config: Any) -> State:
    """A LoRA of single experts, and what it adds to each, in float64."""
    torch.manual_seed(11)
    (folder).mkdir()
    factors, added = {}, {}
    for name, (rows, columns) in singles.items():
        a, b = torch.randn(2, columns) / 4, torch.randn(rows, 2) / 4
        key = f"base_model.model.{prefix}{name.removesuffix('.weight')}"
        factors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        added[name] = 1.5 * b.double() @ a.double()
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3} | config)
    )
    return added


@pytest.mark.parametrize("form", ["disk", "memory"])
def test_a_lora_of_single_experts(make: Callable[[], nn.Module], form: str, tmp_path: Path) -> None:
    """On a base with 3-D tensors it changes the rows that transformers would join from changed single ones."""
    disk, memory = forms(make, tmp_path)
    before = state(disk)
    names = [n for n, t in before.items() if ".experts." in n and "shared" not in n and t.ndim == 2]
    wanted = {name: tuple(before[name].shape) for name in names if ".experts.0." not in name}
    added = single_lora(tmp_path / "lora", wanted)
    base = disk if form == "disk" else memory
    report = lora_to_shira(tmp_path / "lora", base, tmp_path / "x.st", density=1.0)
    shira_to_full(tmp_path / "x.st", base, tmp_path / "ours")
    found = state(tmp_path / "ours")
    if form == "memory":  # as single ones again
        view = open_checkpoint(tmp_path / "ours")
        located = LocatedCheckpoint(view, experts(view, view.shape))
        found = {name: torch.from_numpy(located[name].copy()) for name in located}
        assert len(report.tensors) < len(wanted)
    found = under(before, found)
    for name in names:
        exact = before[name].double() + added.get(name, torch.zeros(()))
        torch.testing.assert_close(found[name].double(), exact, rtol=0, atol=1e-6, msg=name)
        if name not in added:
            assert torch.equal(found[name], before[name])
    assert report.nnz <= sum(np.prod(shape) for shape in wanted.values())


@pytest.mark.parametrize("name", TURNED)
def test_a_lora_of_single_experts_that_are_not_rows_is_refused(name: str, tmp_path: Path) -> None:
    base = in_memory(TURNED[name](), tmp_path / "base")
    module = next(n for n in state(base) if n.endswith("experts.down_proj")).removesuffix(".down_proj")
    single_lora(tmp_path / "lora", {f"{module}.1.up_proj.weight": (12, 16)})
    with pytest.raises(SourceError, match=r"1 of 1 adapted weights are not in the base.*\[experts, in, out\]"):
        lora_to_shira(tmp_path / "lora", base, tmp_path / "x.st")
    assert not (tmp_path / "x.st").exists()


def test_dora_of_single_experts_on_a_3_d_tensor(tmp_path: Path) -> None:
    disk, memory = forms(JOINED["qwen3_moe"], tmp_path)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    single_lora(tmp_path / "lora", {name: (12, 16)}, use_dora=True)
    path = tmp_path / "lora" / "adapter_model.safetensors"
    factors, magnitude = load_file(path), torch.rand(12) + 0.5
    save_file(
        factors | {f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector": magnitude}, path
    )
    results = []
    for base in (disk, memory):
        lora_to_shira(tmp_path / "lora", base, tmp_path / "x.st", density=1.0)
        shira_to_full(tmp_path / "x.st", base, tmp_path / base.name / "ours")
        results.append(state(tmp_path / base.name / "ours"))
    single, joined = results[0][name], results[1]["model.layers.1.mlp.experts.gate_up_proj"][2, 12:]
    torch.testing.assert_close(joined, single, rtol=0, atol=1e-6)
    torch.testing.assert_close(single.norm(dim=1), magnitude, rtol=1e-5, atol=0)
    before = state(memory)["model.layers.1.mlp.experts.gate_up_proj"]
    after = results[1]["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(before[:2], after[:2])
    assert torch.equal(before[2, :12], after[2, :12])


def test_a_lora_of_a_whole_tensor_and_of_rows_of_it_is_refused(tmp_path: Path) -> None:
    memory = in_memory(JOINED["qwen3_moe"](), tmp_path / "memory")
    single_lora(tmp_path / "lora", {"model.layers.1.mlp.experts.2.up_proj.weight": (12, 16)}, target_parameters=["experts.gate_up_proj"])  # fmt: skip
    path = tmp_path / "lora" / "adapter_model.safetensors"
    key = "base_model.model.model.layers.1.mlp.experts"
    both = {f"{key}.lora_A.weight": torch.randn(6, 16), f"{key}.lora_B.weight": torch.randn(24, 6)}
    save_file(load_file(path) | both, path)
    with pytest.raises(SourceError, match="adapts 'model.layers.1.mlp.experts.gate_up_proj' and, under the name"):
        lora_to_shira(tmp_path / "lora", memory, None)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "lfm2_moe", "deepseek_v3"])
def test_a_step_of_training_parameters_is_what_peft_merges(name: str, tmp_path: Path) -> None:
    """``target_parameters`` after a step of training; the base on disk has single experts."""
    adapted = Adapted(tmp_path, JOINED[name], r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])  # fmt: skip
    peft = adapted.peft()
    for parameter_name, parameter in peft.named_parameters():
        parameter.requires_grad_("lora_" in parameter_name)
    tokens = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    peft(tokens, labels=tokens).loss.backward()
    torch.optim.SGD([p for p in peft.parameters() if p.grad is not None], lr=0.1).step()
    models.save_lora(peft, tmp_path / "trained")
    disk, memory = on_disk(adapted.make(), tmp_path / "disk"), in_memory(adapted.make(), tmp_path / "memory")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft.merge_and_unload()
    for base, wanted in ((disk, state(on_disk(merged, tmp_path / "m1"))), (memory, state(in_memory(merged, tmp_path / "m2")))):  # fmt: skip
        lora_to_shira(tmp_path / "trained", base, tmp_path / "x.st", density=1.0)
        shira_to_full(tmp_path / "x.st", base, tmp_path / f"{base.name}-ours")
        found = state(tmp_path / f"{base.name}-ours")
        assert found.keys() == wanted.keys()
        for tensor in wanted:
            torch.testing.assert_close(found[tensor], wanted[tensor], rtol=1e-6, atol=1e-6, msg=tensor)
        assert any(not torch.equal(found[t], state(base)[t]) for t in found)


FULL = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "lfm2_moe", "jamba", "nemotron_h"]


@pytest.mark.parametrize("base_form", ["disk", "memory"])
@pytest.mark.parametrize("name", FULL)
def test_a_full_fine_tune_in_the_other_form(name: str, base_form: str, tmp_path: Path) -> None:
    """Top-k of a fine-tune in the other form is that of the fine-tune in the base's form."""
    disk, memory = forms(JOINED[name], tmp_path)
    after_disk, after_memory = (
        on_disk(tuned(JOINED[name]), tmp_path / "td"),
        in_memory(tuned(JOINED[name]), tmp_path / "tm"),
    )
    base, same, other = (
        (disk, after_disk, after_memory) if base_form == "disk" else (memory, after_memory, after_disk)
    )
    full_to_shira(same, base, tmp_path / "same.st", density=0.1)
    report = full_to_shira(other, base, tmp_path / "other.st", density=0.1)
    assert any("tensors of the base are in others of the fine-tune" in notice for notice in report.notices)
    wanted, found = load(tmp_path / "same.st"), load(tmp_path / "other.st")
    assert set(wanted) == set(found)
    for tensor in wanted:
        np.testing.assert_array_equal(wanted[tensor].indices, found[tensor].indices)
        np.testing.assert_array_equal(wanted[tensor].values, found[tensor].values)
    full_to_shira(other, base, tmp_path / "all.st", density=1.0)
    shira_to_full(tmp_path / "all.st", base, tmp_path / "ours")
    assert all(torch.equal(tensor, state(tmp_path / "ours")[n]) for n, tensor in state(same).items())


@pytest.mark.parametrize("base_form", ["disk", "memory"])
def test_an_exact_patch_restores_the_other_form(base_form: str, tmp_path: Path) -> None:
    disk, memory = forms(JOINED["qwen3_moe"], tmp_path)
    make = JOINED["qwen3_moe"]
    base, other = (disk, in_memory(tuned(make), tmp_path / "t")) if base_form == "disk" else (memory, on_disk(tuned(make), tmp_path / "t"))  # fmt: skip
    report = full_to_shira(other, base, tmp_path / "x.st", exact=True)
    assert any("these are stored whole, as new tensors" in notice for notice in report.notices)
    shira_to_full(tmp_path / "x.st", base, tmp_path / "ours")
    wanted, found = state(other), state(tmp_path / "ours")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


RENAMED = {
    "granitemoe": _made(GraniteMoeForCausalLM, GraniteMoeConfig, num_local_experts=3, num_experts_per_tok=2),
    "aria_text": _made(
        AriaTextForCausalLM, AriaTextConfig, moe_num_experts=3, moe_topk=2, moe_num_shared_experts=1
    ),
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "intermediate_size": 20, "out_hidden_size": 16,
    "deepstack_visual_indexes": [0], "num_position_embeddings": 4,
}  # fmt: skip


def qwen3_vl() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    torch.manual_seed(3)
    config = Qwen3VLMoeConfig(text_config=SMALL | THREE | {"rope_parameters": rope}, vision_config=VISION)
    return Qwen3VLMoeForConditionalGeneration(config).eval()


@pytest.mark.parametrize("name", ["granitemoe", "aria_text", "qwen3_vl_moe"])
def test_3_d_tensors_that_disk_names_or_turns_otherwise(name: str, tmp_path: Path) -> None:
    """PEFT's LoRA of the tensors in memory, on the base as transformers saves it, is what PEFT merges and transformers saves."""
    make = qwen3_vl if name == "qwen3_vl_moe" else RENAMED[name]
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    adapted = Adapted(tmp_path, make, r=2, target_modules=[], target_parameters=targets)
    disk = on_disk(adapted.make(), tmp_path / "disk")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = state(on_disk(adapted.peft().merge_and_unload(), tmp_path / "merged"))
    lora_to_shira(adapted.lora, disk, tmp_path / "x.st", density=1.0)
    shira_to_full(tmp_path / "x.st", disk, tmp_path / "ours")
    found = state(tmp_path / "ours")
    assert found.keys() == wanted.keys()
    for tensor in wanted:
        torch.testing.assert_close(found[tensor], wanted[tensor], rtol=1e-6, atol=1e-6, msg=tensor)
    assert len(load(tmp_path / "x.st")) == 4


def test_a_fine_tune_with_another_number_of_experts(tmp_path: Path) -> None:
    disk = on_disk(JOINED["qwen3_moe"](), tmp_path / "disk")
    more = _made(Qwen3MoeForCausalLM, Qwen3MoeConfig, **THREE | {"num_experts": 4})
    folder = in_memory(more(), tmp_path / "tuned")
    with pytest.raises(SourceError, match="the base .* has another number of experts"):
        full_to_shira(folder, disk, None, exclude=["gate.weight"])


def test_experts_of_other_shapes_are_no_rows() -> None:
    """Each of these is refused, with the reason, and none is guessed."""
    one = {
        "m.experts.0.gate_proj.weight": (6, 4),
        "m.experts.0.up_proj.weight": (6, 4),
        "m.experts.0.down_proj.weight": (4, 6),
    }
    two = one | {n.replace(".0.", ".1."): shape for n, shape in one.items()}
    cases: list[tuple[dict[str, tuple[int, ...]], str, str]] = [
        ({n: s for n, s in two.items() if "1.up" not in n}, "m.experts.gate_up_proj", "experts are missing"),
        (two | {"m.experts.1.up_proj.weight": (5, 4)}, "m.experts.gate_up_proj", "differ in shape"),
        (two | {n: (6, 3) for n in two if "up" in n}, "m.experts.gate_up_proj", "differ in columns"),
        ({"m.experts.gate_up_proj": (2, 12, 4)}, "m.experts.0.up_proj.weight", "stands alone"),
        ({"m.experts.gate_up_proj": (2, 4, 12), "m.experts.down_proj": (2, 6, 4)}, "m.experts.0.up_proj.weight", "[experts, in, out]"),
        ({"m.experts.gate_up_proj": (2, 12, 4), "m.experts.down_proj": (3, 4, 6)}, "m.experts.0.up_proj.weight", "do not fit"),
        ({"m.experts.gate_up_proj": (12, 4), "m.experts.down_proj": (4, 6)}, "m.experts.0.up_proj.weight", "not 3-D"),
        ({"m.experts.up_proj": (2, 6, 6), "m.experts.down_proj": (2, 6, 6)}, "m.experts.0.up_proj.weight", "as well as"),
        ({"m.experts.999999999.up_proj.weight": (2, 2), "m.experts.0.down_proj.weight": (2, 2)}, "m.experts.up_proj", "experts are missing"),
    ]  # fmt: skip
    for shapes, name, reason in cases:
        table = experts(shapes, shapes.__getitem__)
        assert name not in table, shapes
        assert reason in str(why_not(name, shapes, shapes.__getitem__)), (shapes, name)
    table = experts(two, two.__getitem__)
    assert isinstance(table["m.experts.gate_up_proj"], Location)
    assert table["m.experts.gate_up_proj"].shape == (2, 12, 4)
    assert why_not("m.experts.gate_up_proj", two, two.__getitem__) is None
    assert why_not("m.layers.0.q.weight", two, two.__getitem__) is None
