"""The search for a density: the fewest entries that keep a share of the effect, the most that a file has room for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shira_format.convert.fit.quality import Effect
from shira_format.convert.fit.search import NEAR, ROOM, Search, Trial, fewest_entries, fullest_file, halved
from shira_format.convert.fit.task import Entries
from shira_format.errors import SourceError

NUMEL = 1_000_000


def search(*, half: float = 1000.0, numel: int = NUMEL, per_entry: float = 3.0, fixed: int = 500) -> Search:
    """Fits whose R² rises with the number of entries to 1, and whose files grow with it; entries tell what they started from."""

    def attempt(budget: int, start: Entries | None) -> Trial:
        began = 0 if start is None else int(start["w"][0][0])
        found = {"w": (torch.tensor([budget, began]), torch.zeros(2))}
        kept = Effect(budget / (budget + half), 0.0, 1.0, None, None, None)
        return Trial(budget, budget / numel, kept, kept, fixed + math.ceil(per_entry * budget), found)

    return Search(numel, attempt)


@given(st.floats(1, 1e5), st.floats(0.05, 0.95))
def test_the_fewest_entries_reach_the_share_and_hardly_fewer_do_not(half: float, keep: float) -> None:
    found = search(half=half)
    least = keep / (1 - keep) * half  # entries that reach it exactly
    if least > 0.19 * NUMEL:
        return
    trial = fewest_entries(found, keep)
    assert trial.r2 >= keep
    missed = [one.budget for one in found.trials if one.r2 < keep]
    assert trial.budget == min(one.budget for one in found.trials if one.r2 >= keep)
    assert trial.budget == 1 or trial.budget <= max(NEAR * max(missed), max(missed) + 1)
    assert len(found.trials) <= 14
    assert len({one.budget for one in found.trials}) == len(found.trials)


def test_each_fit_starts_from_the_next_denser_one() -> None:
    found = search(half=100)
    fewest_entries(found, 0.9)
    before: list[int] = []
    for trial in found.trials:
        denser = [budget for budget in before if budget > trial.budget]
        assert int(trial.entries["w"][0][1]) == min(denser, default=0)
        before.append(trial.budget)
    assert len(before) > 3


def test_a_share_that_is_not_reached_is_refused_with_the_best() -> None:
    found = search(half=1e6)
    with pytest.raises(
        SourceError, match=r"no density up to 20.00 % keeps 0.95 of the effect .* the best is 0.167 at 20.00 %"
    ):
        fewest_entries(found, 0.95)
    assert found.trials[-1].density == 0.2
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        fewest_entries(found, 1.0)


def test_a_single_entry_may_be_enough() -> None:
    assert fewest_entries(search(half=1e-9), 0.9).budget == 1


@given(st.integers(600, 500_000), st.floats(1.5, 6), st.floats(0.7, 1.4))
def test_the_fullest_file(max_bytes: int, per_entry: float, unlike: float) -> None:
    """Sizes of fitted files differ by a factor from those of unfitted ones."""
    found = search(per_entry=per_entry)
    trial = fullest_file(found, max_bytes, lambda budget: 500 + math.ceil(per_entry * unlike * budget))
    assert trial.file_bytes <= max_bytes
    assert trial.budget == 200_000 or trial.file_bytes >= min(ROOM * max_bytes, max_bytes - 2 * per_entry - 1)
    assert len(found.trials) <= 6


def test_a_file_without_room_is_refused() -> None:
    with pytest.raises(SourceError, match="a file with a single entry has 503 bytes, more than 400 bytes"):
        fullest_file(search(), 400, lambda budget: 500 + 3 * budget)
    with pytest.raises(SourceError, match="no fit has room in 600 bytes"):
        fullest_file(search(fixed=900), 600, lambda budget: 500 + 3 * budget)


def test_held_out_inputs_are_divided() -> None:
    batches = [{"x": torch.arange(5), "y": torch.arange(5)}, {"x": torch.tensor([5]), "y": torch.tensor([5])}]
    first, second = halved(batches)
    assert [one["x"].tolist() for one in first] == [[0, 2, 4]]
    assert [one["y"].tolist() for one in second] == [[1, 3], [5]]
    first, second = halved([torch.arange(4)])
    assert (first[0].tolist(), second[0].tolist()) == ([0, 2], [1, 3])
    assert halved([("a",), ("b",), ("c",)]) == ([("a",), ("c",)], [("b",)])
    with pytest.raises(SourceError, match="a single input is held out"):
        halved([torch.zeros(1, 3)])
