"""XLabs' LoRAs of FLUX.1, against diffusers, which converts and loads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from shira_format._core.arrays import Array
from shira_format.checkpoints import open_checkpoint
from shira_format.errors import SourceError
from shira_format.format import load
from shira_format.lora import DIALECTS, open_lora
from tests import pipelines
from tests.diffusion import in_other_names
from tests.pipelines import base_weights, check, fused

WIDTH = 16
PREFIX = "transformer/"
# Rows and columns of each layer.
LAYERS = {
    "double_blocks.0.processor.qkv_lora1": (3 * WIDTH, WIDTH),
    "double_blocks.0.processor.proj_lora1": (WIDTH, WIDTH),
    "double_blocks.0.processor.qkv_lora2": (3 * WIDTH, WIDTH),
    "double_blocks.0.processor.proj_lora2": (WIDTH, WIDTH),
    "double_blocks.1.processor.qkv_lora1": (3 * WIDTH, WIDTH),
    "single_blocks.1.processor.qkv_lora": (3 * WIDTH, WIDTH),
    "single_blocks.1.processor.proj_lora": (WIDTH, 5 * WIDTH),
}


def state_of(rank: int = 3, prefix: str = "") -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    state = {}
    for layer, (rows, columns) in LAYERS.items():
        state[f"{prefix}{layer}.down.weight"] = torch.randn(rank, columns) / 3
        state[f"{prefix}{layer}.up.weight"] = torch.randn(rows, rank) / 3
    return state


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    return pipelines.flux()


@pytest.fixture(scope="module")
def base(pipe: FluxPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    pipe.save_pretrained(folder)
    return folder


def original(weights: dict[str, Array], prefix: str) -> dict[str, Array]:
    """The transformer's matrices under the names of FLUX's authors."""
    inner = {name.removeprefix(PREFIX): array for name, array in weights.items() if name.startswith(PREFIX)}
    found = in_other_names({name: torch.from_numpy(array) for name, array in inner.items()})
    return {f"{prefix}{name}": tensor.numpy() for name, tensor in found.items() if tensor.ndim == 2}


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_on_a_pipeline(pipe: FluxPipeline, base: Path, prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(state_of(prefix=prefix), path)
    after = fused(pipe, lambda pipe: pipe.load_lora_weights(path))
    check(path, base, tmp_path / "out.st", base_weights(pipe), after)
    adapter = load(tmp_path / "out.st")
    assert len(adapter) == 3 * 3 + 2 + 3 + 1
    assert adapter.manifest["source"]["dialect"] == "xlabs"
    assert adapter.manifest["source"]["ranks"] == [3]
    alone = open_lora(path, open_checkpoint(base / "transformer"))
    assert {update.name for update in alone.updates} == {name.removeprefix(PREFIX) for name in adapter}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_on_the_checkpoint_of_the_authors(pipe: FluxPipeline, prefix: str, tmp_path: Path) -> None:
    """linear1 is changed in its first rows alone: q, k and v."""
    path = tmp_path / "lora.safetensors"
    save_file(state_of(), path)
    before = original(base_weights(pipe), prefix)
    after = original(fused(pipe, lambda pipe: pipe.load_lora_weights(path)), prefix)
    save_arrays({name: array.astype(np.float32) for name, array in before.items()}, tmp_path / "flux.safetensors")
    check(path, tmp_path / "flux.safetensors", tmp_path / "out.st", before, after)
    linear1 = f"{prefix}single_blocks.1.linear1.weight"
    assert linear1 in load(tmp_path / "out.st")
    assert (after[linear1][3 * WIDTH :] == before[linear1][3 * WIDTH :]).all()
    notices = open_lora(path, open_checkpoint(tmp_path / "flux.safetensors")).notices
    assert notices == []


def test_recognition(tmp_path: Path) -> None:
    def recognised(state: dict[str, torch.Tensor]) -> list[str]:
        save_file(state, tmp_path / "lora.safetensors")
        found = [
            [d.name for d in DIALECTS.values() if d.recognises(p)]
            for p in (tmp_path, tmp_path / "lora.safetensors")
        ]
        assert found[0] == found[1]
        return found[0]

    assert recognised(state_of()) == ["xlabs"]
    assert recognised({"double_blocks.0.processor.qkv_lora.down.weight": torch.ones(1)}) == []
    assert recognised({"blocks.0.processor.qkv_lora1.down.weight": torch.ones(1)}) == []
    save_file(state_of(), tmp_path / "second.safetensors")
    assert not DIALECTS["xlabs"].recognises(tmp_path)
    with pytest.raises(SourceError, match="several files"):
        open_lora(tmp_path, open_checkpoint(tmp_path / "second.safetensors"), dialect="xlabs")
    (tmp_path / "bad.bin").write_bytes(b"no pickle")
    assert not DIALECTS["xlabs"].recognises(tmp_path / "bad.bin")


QKV, SINGLE = "double_blocks.0.processor.qkv_lora1", "single_blocks.1.processor.qkv_lora"
Change = Callable[[dict[str, torch.Tensor]], None]
REFUSED: dict[str, tuple[Change, str]] = {
    "unmatched": (lambda s: s.update({"double_blocks.0.processor.qkv_lora3.up.weight": torch.ones(1)}), r"unmatched key 'double_blocks\.0\.processor\.qkv_lora3"),
    "no partner": (lambda s: s.pop(f"{QKV}.up.weight"), r"qkv_lora1\.down\.weight' has no partner"),
    "twice": (lambda s: s.update({f"diffusion_model.{QKV}.up.weight": torch.ones(1)}), "are the same part of one LoRA"),
    "rank": (lambda s: s.update({f"{QKV}.up.weight": torch.ones(48, 4)}), r"qkv_lora1\.up\.weight' of shape \[48, 4\] have no rank in common"),
    "rows": (lambda s: s.update({f"{QKV}.up.weight": torch.ones(47, 3)}), r"qkv_lora1\.up\.weight': updates a weight of shape \[47, 16\], .* has \[48, 16\]"),
    "rows of a single block": (lambda s: s.update({f"{SINGLE}.up.weight": torch.ones(49, 3)}), r"qkv_lora\.up\.weight': updates a weight of shape \[49, 16\], .* has \[48, 16\]"),
    "columns": (lambda s: s.update({f"{QKV}.down.weight": torch.ones(3, 15)}), r"qkv_lora1\.up\.weight': updates a weight of shape \[48, 15\]"),
    "no such block": (lambda s: s.update({k.replace("s.0.", "s.7."): s.pop(k) for k in list(s) if k.startswith(QKV)}), r"3 of 15 adapted weights are not in the base, for example 'transformer_blocks\.7\.attn\.to_q"),
    "NaN": (lambda s: s.update({f"{QKV}.up.weight": torch.full((48, 3), torch.nan)}), r"qkv_lora1\.up\.weight' holds NaN"),
    "nothing": (lambda s: s.clear(), "it holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(base: Path, case: str, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    path = tmp_path / "lora.safetensors"
    state = state_of()
    change(state)
    save_file(state, path)
    with pytest.raises(SourceError, match=message) as error:
        open_lora(path, open_checkpoint(base), dialect="xlabs")
    assert str(error.value).startswith(str(path))


def test_bases_that_do_not_fit(pipe: FluxPipeline, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(state_of(), path)
    weights = {name: array.astype(np.float32) for name, array in original(base_weights(pipe), "").items()}

    def refused(change: dict[str, Array | None], message: str) -> None:
        found = {name: array for name, array in (weights | change).items() if array is not None}
        save_arrays(found, tmp_path / "flux.safetensors")
        with pytest.raises(SourceError, match=message):
            open_lora(path, open_checkpoint(tmp_path / "flux.safetensors"))

    linear1 = "single_blocks.1.linear1.weight"
    refused(
        {"double_blocks.0.img_attn.qkv.weight": None},
        r"3 of 15 adapted weights are not in the base, for example 'transformer_blocks\.0\.attn\.to_q",
    )
    refused(
        {linear1: weights[linear1][: 3 * WIDTH]},
        r"3 of 15 adapted weights are not in the base, for example 'single_transformer_blocks\.1\.attn\.to_q",
    )
    refused(
        {"single_blocks.1.linear2.weight": np.ones((5, 5 * WIDTH), np.float32)},
        r"updates a weight of shape \[16, 80\].*\[5, 80\]",
    )
