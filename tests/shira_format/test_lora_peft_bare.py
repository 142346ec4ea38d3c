"""PEFT's weights without ``adapter_config.json``: the file is named, and rank and alpha are taken by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shira_cli.convert import main
from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.errors import SourceError
from shira_format.format import load
from shira_format.lora import open_lora
from tests import models
from tests.dialects import WRITERS
from tests.merges import Adapted
from tests.shira_format.test_prefixes import MODULES, pairs, save, towers
from tests.updates import dense

MISSING = r"PEFT's weights, and adapter_config.json is missing beside them, which has the scale: add it, or give rank and alpha by hand \(--rank, --alpha\)"  # fmt: skip


def bare(tmp_path: Path, **options: Any) -> Adapted:
    adapted = Adapted(tmp_path, models.llama, r=4, lora_alpha=6, **options)
    (adapted.lora / "adapter_config.json").rename(tmp_path / "config.json")
    return adapted


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("named", [False, True], ids=["folder", "file"])
def test_rank_and_alpha_by_hand_give_what_the_configuration_gives(options: dict[str, Any], named: bool, tmp_path: Path) -> None:  # fmt: skip
    adapted = bare(tmp_path, target_modules=["q_proj", "up_proj"], **options)
    base, path = (
        open_checkpoint(adapted.base),
        adapted.lora / "adapter_model.safetensors" if named else adapted.lora,
    )
    found = open_lora(path, base, rank=4, alpha=6)
    assert found.notices[0].startswith(
        "no adapter_config.json: all layers have the scale 1.5 = alpha / rank as given; if the LoRA"
    )
    assert [file.name for file in found.files] == ["adapter_model.safetensors"]
    (tmp_path / "config.json").rename(adapted.lora / "adapter_config.json")
    wanted = {update.name: dense(update) for update in open_lora(adapted.lora, base).updates}
    assert {update.name for update in found.updates} == wanted.keys()
    for update in found.updates:
        np.testing.assert_array_equal(dense(update), wanted[update.name])
    merged = adapted.merged()
    for name, change in wanted.items():
        np.testing.assert_allclose(base[name] + change, merged[name].double().numpy(), rtol=0, atol=1e-5)


def test_without_them_it_is_refused_by_name(tmp_path: Path) -> None:
    adapted = bare(tmp_path, target_modules=["q_proj"])
    base = open_checkpoint(adapted.base)
    for path in (adapted.lora, adapted.lora / "adapter_model.safetensors"):
        for dialect in (None, "peft"):
            with pytest.raises(SourceError, match=rf"adapter_model.safetensors: {MISSING}"):
                open_lora(path, base, dialect=dialect)
    for given in ({"rank": 4}, {"alpha": 6.0}):
        with pytest.raises(SourceError, match="give both rank and alpha"):
            open_lora(adapted.lora, base, **given)  # type: ignore[arg-type]


BAD: dict[str, tuple[int, float, str]] = {
    "rank": (8, 6, r"should have rank 8 by the given rank, lora_A has shape \[4, 32\]"),
    "zero": (0, 6, "r and lora_alpha must be numbers, r a positive integer"),
    "nan": (4, float("nan"), "r and lora_alpha must be numbers, r a positive integer"),
    "infinite": (4, float("inf"), "r and lora_alpha must be numbers, r a positive integer"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_numbers_that_cannot_be(case: str, tmp_path: Path) -> None:
    rank, alpha, reason = BAD[case]
    adapted = bare(tmp_path, target_modules=["q_proj"])
    with pytest.raises(SourceError, match=reason):
        open_lora(adapted.lora, open_checkpoint(adapted.base), rank=rank, alpha=alpha)


@pytest.mark.parametrize("dialect", sorted(set(WRITERS)))
def test_others_state_their_own(dialect: str, tmp_path: Path) -> None:
    base = open_checkpoint(save(towers(MODULES, "", text_model=(16, 16)), tmp_path / "base"))
    lora = WRITERS[dialect](pairs(MODULES), tmp_path)
    with pytest.raises(SourceError, match="states its own"):
        open_lora(lora, base, rank=4, alpha=8)
    with pytest.raises(SourceError, match="states its own|these are none"):
        open_lora(lora, base, rank=4, alpha=8, dialect="peft")


def test_what_is_no_lora(tmp_path: Path) -> None:
    base = save(towers(MODULES, "", text_model=(16, 16)), tmp_path / "base")
    for path in (base, base / "model.safetensors"):
        with pytest.raises(SourceError, match="without their configuration; these are none"):
            open_lora(path, open_checkpoint(base), rank=4, alpha=8)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def cli() -> Callable[..., int]:
    return run


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapted = bare(tmp_path, target_modules=["q_proj"])
    out = tmp_path / "x.st"
    assert run("lora_to_shira", adapted.lora, "--base", adapted.base, "-o", out) == 1
    assert "--rank, --alpha" in capsys.readouterr().err
    assert (
        run(
            "lora_to_shira",
            adapted.lora,
            "--base",
            adapted.base,
            "-o",
            out,
            "--rank",
            4,
            "--alpha",
            6,
            "--density",
            1,
        )
        == 0
    )
    by_hand = load(out)
    (tmp_path / "config.json").rename(adapted.lora / "adapter_config.json")
    lora_to_shira(adapted.lora, adapted.base, tmp_path / "y.st", density=1.0)
    for name, tensor in load(tmp_path / "y.st").items():
        np.testing.assert_array_equal(by_hand[name].values, tensor.values)
    merged = models.save_base(_merged(adapted), tmp_path / "merged")
    (adapted.lora / "adapter_config.json").unlink()
    paths = ["check_merge", "--base", adapted.base, "--lora", adapted.lora, "--merged", merged]
    assert run(*paths) == 2
    assert run(*paths, "--rank", 4, "--alpha", 6) == 0
    assert run(*paths, "--rank", 4, "--alpha", 3) == 1
    assert run(*paths[:4], out, *paths[5:], "--rank", 4, "--alpha", 6) == 2  # an adapter has no rank


def _merged(adapted: Adapted) -> torch.nn.Module:
    model = adapted.make()
    model.load_state_dict(adapted.merged())
    return model


def test_keys_are_those_of_the_file(tmp_path: Path) -> None:
    adapted = bare(tmp_path, target_modules=["q_proj"], use_dora=True)
    assert any("lora_magnitude_vector" in key for key in load_file(adapted.lora / "adapter_model.safetensors"))
    lora = open_lora(adapted.lora, open_checkpoint(adapted.base), rank=4, alpha=6)
    assert lora.source["use_dora"] is True
    assert (lora.source["r"], lora.source["lora_alpha"]) == (4, 6)
