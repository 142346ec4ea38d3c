"""``layer_replication``: the model that PEFT builds and runs is the one that our patch makes of the base."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.errors import SourceError
from shira_format.export.full import shira_to_full
from shira_format.format import AdapterFile
from shira_format.selection import TopK
from tests import models
from tests.merges import Adapted

EVERYTHING = TopK(1.0)


def _merged(adapted: Adapted) -> nn.Module:
    """PEFT's merge, layer by layer.

    Its layers share the base's weights, and ``merge_and_unload`` adds all their updates to the one weight that they
    share, which its forward pass does not. So each layer gets a copy of its own first.
    """
    peft = adapted.peft()
    for module in peft.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().clone())
    live = models.outputs(adapted.peft())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft.merge_and_unload()
    torch.testing.assert_close(models.outputs(merged), live, rtol=1e-4, atol=1e-4)
    return merged  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("self_contained", [False, True])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (models.llama, {"layer_replication": [[0, 2], [0, 2]], "target_modules": ["q_proj", "down_proj"]}),
        (models.llama, {"layer_replication": [[1, 2], [0, 1], [1, 2]], "target_modules": ["v_proj"]}),
        (models.llama, {"layer_replication": [[1, 2]], "target_modules": ["v_proj"], "bias": "all"}),
        (
            models.llama,
            {
                "layer_replication": [[0, 2], [1, 2]],
                "target_modules": ["q_proj", "embed_tokens"],
                "use_dora": True,
                "modules_to_save": ["norm"],
                "rank_pattern": {r"layers\.2\..*": 3},
            },
        ),
        (models.llama, {"layer_replication": [[0, 2], [1, 2]], "target_modules": r".*\.2\..*q_proj"}),
        (models.bert, {"layer_replication": [[1, 2], [0, 2]], "target_modules": ["query"], "bias": "all"}),
    ],
    ids=["twice", "turned", "fewer", "more", "one", "bert"],
)
def test_a_patch_is_the_model_that_peft_runs(
    make: Callable[[], nn.Module],
    options: dict[str, Any],
    self_contained: bool,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    adapted = Adapted(tmp_path, make, dtype=dtype, r=2, lora_alpha=3, **options)
    expected = _merged(adapted).state_dict()
    report = lora_to_shira(
        adapted.lora, adapted.base, tmp_path / "all.st", density=1.0, self_contained=self_contained
    )
    count = sum(end - first for first, end in options["layer_replication"])
    (notice,) = [notice for notice in report.notices if "layer_replication" in notice]
    assert f"has {count} layers" in notice
    assert "patch" in AdapterFile(tmp_path / "all.st").manifest.raw["features"]
    shira_to_full(tmp_path / "all.st", adapted.base, tmp_path / "ours")
    actual = load_file(tmp_path / "ours" / "model.safetensors")
    # models.save_base leaves tied names out.
    assert actual.keys() == {
        name for name in expected if name in actual or name not in adapted.make().state_dict()
    }
    assert len(actual) == len(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == (dtype if tensor.is_floating_point() else tensor.dtype)
        bound = 2**-8 if dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(actual[name].float(), tensor.float(), rtol=bound, atol=1e-6, msg=name)


def test_outputs_are_those_of_peft(tmp_path: Path) -> None:
    options = {"layer_replication": [[0, 2], [0, 1]], "target_modules": ["q_proj", "up_proj"]}
    adapted = Adapted(tmp_path, models.llama, r=2, **options)
    live = models.outputs(adapted.peft())
    lora_to_shira(adapted.lora, adapted.base, tmp_path / "all.st", density=1.0)
    shira_to_full(tmp_path / "all.st", adapted.base, tmp_path / "ours")
    ours = _merged(adapted)  # a model of three layers, as config.json must say
    assert ours.config.num_hidden_layers == 3
    for tensor in ours.state_dict().values():
        tensor.zero_()
    ours.load_state_dict(load_file(tmp_path / "ours" / "model.safetensors"))
    torch.testing.assert_close(models.outputs(ours), live, rtol=1e-4, atol=1e-4)


def test_copies_stay_when_updates_are_left_out(tmp_path: Path) -> None:
    """``--include`` chooses among updates; the layers are there all the same."""
    options = {"layer_replication": [[0, 2], [0, 2]], "target_modules": ["q_proj"]}
    adapted = Adapted(tmp_path, models.llama, r=2, **options)
    report = lora_to_shira(adapted.lora, adapted.base, tmp_path / "all.st", include=[r"layers\.3\."])
    assert [tensor.name for tensor in report.tensors] == ["model.layers.3.self_attn.q_proj.weight"]
    assert report.structure["model.layers.2.mlp.up_proj.weight"] == "from model.layers.0.mlp.up_proj.weight"
    shira_to_full(tmp_path / "all.st", adapted.base, tmp_path / "ours")
    actual, before = (load_file(path / "model.safetensors") for path in (tmp_path / "ours", adapted.base))
    assert torch.equal(
        actual["model.layers.2.self_attn.q_proj.weight"], before["model.layers.0.self_attn.q_proj.weight"]
    )


def test_integers_in_a_layer_are_copied_whole(tmp_path: Path) -> None:
    adapted = Adapted(tmp_path, models.llama, r=2, layer_replication=[[0, 2], [0, 1]], target_modules=["q_proj"])
    state = load_file(adapted.base / "model.safetensors")
    steps = {f"model.layers.{n}.steps": torch.tensor([n + 5, 1]) for n in (0, 1)}
    save_file(state | steps, adapted.base / "model.safetensors")
    lora_to_shira(adapted.lora, adapted.base, tmp_path / "all.st")
    shira_to_full(tmp_path / "all.st", adapted.base, tmp_path / "ours")
    actual = load_file(tmp_path / "ours" / "model.safetensors")
    assert [actual[f"model.layers.{n}.steps"].tolist() for n in range(3)] == [[5, 1], [6, 1], [5, 1]]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([[0, 3]], "layer_replication names layers up to 2, the base has 2"),
        ([[1, 1]], "layer_replication names layers up to 0, the base has 2"),
        ([[0, 10**9]], "layer_replication makes more than 10000 layers"),
        ([[0, 2]] * 6000, "layer_replication makes more than 10000 layers"),
        ([[-1, 1]], "layer_replication must be a list of pairs of layers, [first, end]"),
        ([[0, 1, 2]], "layer_replication must be a list of pairs of layers, [first, end]"),
        ([0, 1], "layer_replication must be a list of pairs of layers, [first, end]"),
        ({"0": 1}, "layer_replication must be a list of pairs of layers, [first, end]"),
    ],
)
def test_bad_maps(value: Any, reason: str, tmp_path: Path) -> None:
    adapted = Adapted(tmp_path, models.llama, r=2, layer_replication=[[0, 2], [0, 1]], target_modules=["q_proj"])
    models.edit_config(adapted.lora, layer_replication=value)
    with pytest.raises(SourceError) as caught:
        adapted.read()
    assert str(caught.value) == f"{adapted.lora / 'adapter_config.json'}: {reason}"


def test_bases_without_the_layers(tmp_path: Path) -> None:
    net = Adapted(tmp_path / "net", models.net, r=2, target_modules=["wide"])
    models.edit_config(net.lora, layer_replication=[[0, 1]])
    with pytest.raises(SourceError, match="the base has no list of layers where PEFT looks for one"):
        net.read()
    llama = Adapted(tmp_path, models.llama, r=2, layer_replication=[[0, 2], [0, 1]], target_modules=["q_proj"])
    path = llama.base / "model.safetensors"
    state = load_file(path)
    save_file(state | {"h.0.weight": torch.ones(2)}, path)
    with pytest.raises(SourceError, match="the base has several lists of layers"):
        llama.read()
    save_file({name: tensor for name, tensor in state.items() if "layers.1." not in name}, path)
    with pytest.raises(SourceError, match="names layers up to 1, the base has 1"):
        llama.read()
    assert "model.layers.0.mlp.up_proj.weight" in open_checkpoint(llama.base)
