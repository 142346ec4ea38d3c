"""LoRA files of every prefix, part, alpha, wrapper word and layout of the base: equal to an oracle, or refused by name."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from tests.lora_grid import DEFECTS, FORMS, PREFIXES, Combination, Grid, combinations, delta, layouts

# Of all combinations, every so many, which no number of layouts, prefixes or forms is a multiple of; ``python -m tests.lora_grid`` runs all.
STEP, PARTS = 19, 8


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return Grid(tmp_path_factory.mktemp("grid"))


@pytest.mark.parametrize("part", range(PARTS))
def test_a_sample(part: int, grid: Grid) -> None:
    wrong = {
        combination: fault
        for combination in islice(combinations(), part * STEP, None, STEP * PARTS)
        if (fault := grid.run(combination)) is not None
    }
    assert not wrong


def test_the_sample_is_not_empty(grid: Grid) -> None:
    """Runs after the others; a part alone has an eighth of the counts."""
    sample = [*islice(combinations(), 0, None, STEP)]
    assert len(sample) > 1200
    assert {combination.layout for combination in sample} == layouts().keys()
    assert {combination.form for combination in sample} == FORMS.keys()
    assert {combination.defect for combination in sample} == {"", *DEFECTS}
    assert {prefix for combination in sample for prefix in combination.prefixes} == PREFIXES.keys()
    assert grid.counts.total() in (0, len(sample))
    if grid.counts:
        assert min(grid.counts["equal"], grid.counts["refused"]) > 400


def test_a_wrong_weight_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid can fail."""
    grid = Grid(tmp_path)
    combination = Combination("one model", ("lora_unet_",), "hada", "other")
    assert grid.run(combination) is None
    monkeypatch.setattr("tests.lora_grid.delta", lambda *arguments: 1.01 * _known(delta(*arguments)))
    assert "differs" in str(grid.run(combination))


def _known(change: torch.Tensor | None) -> torch.Tensor:
    return torch.zeros(()) if change is None else change
