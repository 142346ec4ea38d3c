"""check_merge of a checkpoint whose tensors have other names than the base's: experts, and a model of diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest

from shira_analysis.merging.check import MergeVerdict, check_merge
from shira_format.convert import full_to_shira
from shira_format.export.full import shira_to_full
from tests.shira_format.test_experts import JOINED, forms, in_memory, on_disk, tuned
from tests.shira_format.test_moved import diffusion, fine_tune, saved, state
from tests.shira_format.test_names_models import CASES


def as_same_form(verdict: MergeVerdict, base: Path, folder: Path) -> None:
    """The verdicts are those on the base patched in its own form."""
    shira_to_full(folder / "x.st", base, folder / "same")
    same = check_merge(folder / "same", base, adapter=folder / "x.st")
    assert [(one.name, one.verdict, one.equal) for one in verdict.layers] == [
        (one.name, one.verdict, one.equal) for one in same.layers
    ]
    assert verdict.answer == same.answer
    assert sum(one.verdict == "verified" for one in verdict.layers) > len(verdict.layers) / 2


@pytest.mark.parametrize("form", ["disk", "memory"])
def test_experts(form: str, tmp_path: Path) -> None:
    disk, memory = forms(JOINED["qwen3_moe"], tmp_path)
    base, other = (disk, memory) if form == "disk" else (memory, disk)
    save = on_disk if form == "disk" else in_memory
    full_to_shira(save(tuned(JOINED["qwen3_moe"]), tmp_path / "tune"), base, tmp_path / "x.st", density=0.2)
    shira_to_full(tmp_path / "x.st", other, tmp_path / "merged")
    verdict = check_merge(tmp_path / "merged", base, adapter=tmp_path / "x.st")
    as_same_form(verdict, base, tmp_path)
    assert all(layer.verdict == "verified" for layer in verdict.layers if ".experts." in layer.name)
    assert any("in others of the merged checkpoint" in notice for notice in verdict.notices)
    assert check_merge(other, base, adapter=tmp_path / "x.st").answer == "no"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_authors_file(prefix: str, tmp_path: Path) -> None:
    ours, theirs = diffusion(CASES["Wan, image to video"])
    base = saved(tmp_path / "ours", ours)
    single = saved(tmp_path / "theirs", {prefix + n: t for n, t in theirs.items()})
    full_to_shira(saved(tmp_path / "tune", fine_tune(ours)), base, tmp_path / "x.st", density=0.3)
    shira_to_full(tmp_path / "x.st", single, tmp_path / "merged")
    as_same_form(check_merge(tmp_path / "merged", base, adapter=tmp_path / "x.st"), base, tmp_path)
    assert check_merge(single, base, adapter=tmp_path / "x.st").answer == "no"
    weights = state(tmp_path / "merged")
    weights[next(iter(weights))] += 1
    broken = saved(tmp_path / "broken", weights)
    assert check_merge(broken, base, adapter=tmp_path / "x.st").answer == "no"
