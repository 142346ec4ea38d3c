"""Masks against plain numpy: exact counts, ties, bands, runs, rows, patterns, all kinds of layers, and the algebra of masks."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import shira_format as shira
from shira_format._core.arrays import Array
from shira_format._core.threads import Workers
from shira_format.errors import SourceError
from shira_format.masks import (
    RULES,
    WM,
    Given,
    Lift,
    NeuroAda,
    Rand,
    Size,
    Struct,
    Weight,
    difference,
    intersection,
    make_mask,
    union,
    weights_of,
)
from shira_format.masks.lift import low_rank
from shira_format.masks.plan import MaskPlan
from shira_format.tensors import SparseTensor, matrix_shape
from spec import reader
from tests import models


def checkpoint(folder: Path, **arrays: Array) -> Path:
    """A checkpoint with the arrays under the names ``KEY.weight``."""
    return models.save_arrays(
        folder / "model.safetensors", {f"{key}.weight": value for key, value in arrays.items()}
    )


def ranked(scores: Array) -> Array:
    """Flat positions from the best score to the worst; of equal ones the first comes first."""
    return np.argsort(-scores.reshape(-1).astype(np.float64), kind="stable")


def some(seed: int, *shape: int, dtype: Any = np.float32, levels: int = 0) -> Array:
    """Random numbers; with ``levels`` few distinct ones, zeros among them, so that many tie."""
    rng = np.random.default_rng(seed)
    found = rng.standard_normal(shape) if not levels else rng.integers(-levels, levels + 1, shape) / levels
    return found.astype(dtype)


def one(mask: Mapping[str, SparseTensor]) -> list[int]:
    (tensor,) = mask.values()
    assert "none" == tensor.value_kind
    return tensor.indices.tolist()


# --- sizes, ties, bands ---


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 99), st.integers(1, 200), st.sampled_from([0, 1, 3]))
def test_wm_is_a_stable_sort(tmp_path_factory: Any, m: int, n: int, seed: int, k: int, levels: int) -> None:
    weight = some(seed, m, n, levels=levels)
    mask = make_mask(checkpoint(tmp_path_factory.mktemp("wm"), a=weight), "wm", top_k=k)
    assert sorted(ranked(np.abs(weight))[:k].tolist()) == one(mask)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=4), st.integers(0, 99),
    st.integers(1, 300), st.sampled_from([0, 1, 2]),
)  # fmt: skip
def test_the_global_scope_ranks_all_weights(
    tmp_path_factory: Any, shapes: list[tuple[int, int]], seed: int, k: int, levels: int
) -> None:
    weights = {f"w{i}": some(seed + i, *shape, levels=levels) for i, shape in enumerate(shapes)}
    mask = make_mask(checkpoint(tmp_path_factory.mktemp("g"), **weights), "wm", top_k=k, scope="global")
    every = np.concatenate([np.abs(weight).reshape(-1) for weight in weights.values()])
    chosen = np.sort(ranked(every)[:k])
    start = 0
    for key, weight in weights.items():
        here = chosen[(chosen >= start) & (chosen < start + weight.size)] - start
        name = f"{key}.weight"
        assert here.tolist() == (mask[name].indices.tolist() if name in mask else [])
        start += weight.size


@pytest.mark.parametrize("scope", ["tensor", "global", "row"])
@pytest.mark.parametrize("rule", ["wm", "rand"])
def test_bands_tile_the_ranking(tmp_path: Path, scope: str, rule: str) -> None:
    path = checkpoint(tmp_path, a=some(1, 20, 40, levels=2), b=some(2, 10, 40, levels=2))
    bands = [make_mask(path, rule, density=0.25, scope=scope, band=band) for band in range(4)]
    assert [300] * 4 == [sum(tensor.nnz for tensor in band.values()) for band in bands]
    for name, shape in (("a.weight", (20, 40)), ("b.weight", (10, 40))):
        every = np.concatenate([band[name].indices for band in bands if name in band])
        assert list(range(np.prod(shape))) == sorted(every.tolist())
    # The first two bands are the first half of the ranking.
    half = make_mask(path, rule, density=0.5, scope=scope)
    assert half == union(bands[0], bands[1])
    with pytest.raises(SourceError, match="band 4 of"):
        make_mask(path, rule, density=0.25, scope=scope, band=4)


def test_sizes(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, a=some(1, 24, 40), conv=some(2, 8, 4, 3, 3))
    for size, counts in (
        ({}, [10, 3]),
        ({"density": 0.1}, [96, 29]),
        ({"top_k": 7}, [7, 7]),
        ({"rank": 2}, [128, 88]),
    ):
        assert counts == [tensor.nnz for tensor in make_mask(path, **size).values()]
    assert 128 + 88 == sum(tensor.nnz for tensor in make_mask(path, rank=2, scope="global").values())
    assert 12 == sum(tensor.nnz for tensor in make_mask(path, scope="global").values())
    with pytest.raises(SourceError, match=r"'a.weight': a LoRA of rank 16 has 1024 parameters"):
        make_mask(path, rank=16)
    for bad in (
        {"density": 0}, {"density": 0.1, "top_k": 5}, {"rank": 0}, {"scope": "all"}, {"runs": 3}, {"band": -1}, {"top_k": 0},
        {"rule": "none"}, {"seed": 1}, {"rule": "struct", "runs": 8}, {"rule": "struct", "scope": "global"}, {"rule": "grad"},
        {"at_once": 1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="."):
            make_mask(path, **bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["wm", "rand", "lift"])
@pytest.mark.parametrize("settings", [{}, {"scope": "global"}, {"runs": 16}, {"scope": "row"}])
def test_threads_change_nothing(tmp_path: Path, rule: str, settings: dict[str, Any]) -> None:
    path = checkpoint(tmp_path, a=some(1, 1024, 1040, levels=50), b=some(2, 400, 1040))
    masks = [make_mask(path, rule, density=0.02, threads=threads, **settings) for threads in (1, 3)]
    assert masks[0] == masks[1]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_dtypes(tmp_path: Path, dtype: Any) -> None:
    weight = some(3, 50, 70, dtype=dtype)
    mask = make_mask(checkpoint(tmp_path, a=weight), top_k=100)
    assert sorted(ranked(np.abs(weight.astype(np.float64)))[:100].tolist()) == one(mask)
    assert dtype == mask["a.weight"].dtype


def test_weights_of_zeros_and_empty_weights(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, a=np.zeros((5, 6), np.float32), none=np.zeros((0, 4), np.float32))
    assert [0, 1, 2, 3] == one(make_mask(path, top_k=4))
    assert [0, 1, 2, 3] == one(make_mask(path, top_k=4, scope="global"))
    assert 4 == len(one(make_mask(path, "rand", top_k=4, scope="global")))
    assert 10 == len(one(make_mask(path, scope="row", top_k=10)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_must_be_numbers(tmp_path: Path, bad: float) -> None:
    weight = some(1, 5, 6)
    weight[2, 3] = bad
    for more in ({}, {"scope": "global"}, {"scope": "row"}, {"runs": 2}):
        with pytest.raises(SourceError, match=r"tensor 'a.weight': a score is negative, infinite or not a number"):
            make_mask(checkpoint(tmp_path, a=weight), top_k=4, **more)  # type: ignore[arg-type]


# --- rules ---


def test_rand_differs_by_name_and_seed_and_is_stable(tmp_path: Path) -> None:
    shape = (300, 300)
    path = checkpoint(tmp_path, a=np.zeros(shape, np.float32), b=np.zeros(shape, np.float32))
    mask, other = make_mask(path, "rand", top_k=900), make_mask(path, "rand", top_k=900, seed=1)
    supports = [set(m[name].indices.tolist()) for m in (mask, other) for name in ("a.weight", "b.weight")]
    assert [900] * 4 == list(map(len, supports))
    for i in range(4):
        for j in range(i):
            assert len(supports[i] & supports[j]) < 40  # 9 are expected
    rows = np.bincount(mask["a.weight"].indices // 300, minlength=300)
    assert rows.max() < 15
    assert [302, 507, 548, 573] == mask["a.weight"].indices[:4].tolist()  # the very entries: others rest on them
    only = make_mask(path, "rand", top_k=900, include=["^a"])
    assert only["a.weight"] == mask["a.weight"]


def test_rand_is_what_it_says(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, a=np.zeros((40, 50), np.float32))
    order = [reader.permuted("5 a.weight", 2000, number) for number in range(2000)]
    assert sorted(order) == list(range(2000))
    for band in (0, 1, 3):
        mask = make_mask(path, "rand", top_k=30, seed=5, band=band)
        assert sorted(order[30 * band : 30 * band + 30]) == one(mask)
        for scope in ("tensor", "global"):  # drawn at once, and ranked by scores
            assert one(make_mask(path, "rand", top_k=30, seed=5, band=band, scope=scope)) == one(mask)
    runs = [reader.permuted("5 a.weight", 250, number) for number in range(3)]
    expected = sorted(8 * run + place for run in runs for place in range(8))
    assert expected == one(make_mask(path, "rand", top_k=24, seed=5, runs=8))


def test_rand_reads_far_tiles_alike() -> None:
    weight = Weight("w", (3000, 1000), np.dtype(np.float32), lambda a, b: np.zeros(b - a, np.float32))
    scores = Rand(3).scores(weight, None)
    whole, part = np.empty(3_000_000), np.empty(1000)
    scores.fill(0, 3_000_000, whole)
    scores.fill(2_500_000, 2_501_000, part)
    assert whole[2_500_000:2_501_000].tolist() == part.tolist()


def struct(shape: tuple[int, ...], lines: str, step: int, offset: int, diagonal: int | None) -> list[int]:
    rows, columns = matrix_shape(shape)
    mask = np.zeros((rows, columns), bool)
    (mask if lines == "rows" else mask.T)[offset::step] = True
    if diagonal is not None:
        for r in range(rows):
            if 0 <= r + diagonal < columns:
                mask[r, r + diagonal] = True
    return np.flatnonzero(mask).tolist()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_struct_is_a_plain_mask(data: st.DataObject) -> None:
    m, n = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    lines = data.draw(st.sampled_from(["rows", "columns"]))
    along = m if lines == "rows" else n
    step = data.draw(st.integers(1, along + 3))
    offset = data.draw(st.integers(0, min(step, along) - 1))
    diagonal = data.draw(st.none() | st.integers(1 - m, n - 1))
    weight = Weight("w", (m, n), np.dtype(np.float32), lambda a, b: np.zeros(b - a, np.float32))
    expected = struct((m, n), lines, step, offset, diagonal)
    assert expected == Struct(lines, step, offset, diagonal).indices(weight, 0).tolist()
    # By size: the largest mask that is not above it, and with ``exact`` all of it.
    count = data.draw(st.integers(0, m * n))
    sizes = [
        len(struct((m, n), lines, f, offset, diagonal)) for f in range(offset + 1, max(along, offset + 1) + 1)
    ]
    fitting = [size for size in sizes if size <= count]
    if not fitting:
        with pytest.raises(SourceError, match="entries are fewer than one of its"):
            Struct(lines, None, offset, diagonal).indices(weight, count)
        return
    found = Struct(lines, None, offset, diagonal).indices(weight, count).tolist()
    assert max(fitting) == len(found)
    exact = Struct(lines, None, offset, diagonal, exact=True).indices(weight, count).tolist()
    assert count == len(exact) == len(set(exact))
    assert set(found) <= set(exact)
    assert sorted(exact) == exact


def test_struct_is_stored_as_a_pattern(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, a=some(1, 128, 96), b=some(2, 96, 96))
    mask = make_mask(path, Struct("rows", offset=1), density=0.05)
    shira.save(mask, tmp_path / "m.st")
    again = shira.load(tmp_path / "m.st")
    assert mask == again
    items = again.manifest["tensors"]
    assert ["structured", "structured"] == [item["indices"]["codec"] for item in items]
    assert {"kind": "rows", "step": 26, "offset": 1} in items[0]["indices"]["pattern"]
    assert {"rule": "struct", "lines": "rows", "offset": 1, "diagonal": 0} == again.manifest["mask"]
    zero = make_mask(path, Struct("rows", step=31, diagonal=None))
    ones = make_mask(path, Struct("rows", step=31, offset=1, diagonal=None))
    assert 0 == sum(tensor.nnz for tensor in intersection(zero, ones).values())
    for bad in ({"lines": "diagonals"}, {"step": 0}, {"step": 3, "offset": 3}, {"offset": -1}):
        with pytest.raises(ValueError, match="."):
            Struct(**bad)  # type: ignore[arg-type]
    for rule, why in ((Struct(offset=200), "none at the offset"), (Struct(diagonal=300), "has no diagonal 300")):
        with pytest.raises(SourceError, match=why):
            make_mask(path, rule, density=0.5)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30), (8, 4, 3, 3)])
@pytest.mark.parametrize("rank", [1, 5, 100])
def test_lift_is_the_largest_of_the_singular_value_decomposition(
    tmp_path: Path, shape: tuple[int, ...], rank: int
) -> None:
    weight = some(7, *shape)
    mask = make_mask(checkpoint(tmp_path, a=weight), Lift(rank), top_k=60)
    matrix = torch.from_numpy(weight.reshape(shape[0], -1)).double()
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    low = ((u[:, :rank] * s[:rank]) @ v[:rank]).numpy()
    assert sorted(ranked(np.abs(low))[:60].tolist()) == one(mask)
    file = Weight("a", shape, weight.dtype, lambda a, b: weight.reshape(-1)[a:b])
    left, right = low_rank(file, 0, *matrix_shape(shape), rank)
    assert np.abs(left @ right - low).max() < 1e-12


def test_lift_of_several_weights_and_over_all(tmp_path: Path) -> None:
    weights = {"a": some(1, 40, 24), "b": some(2, 24, 40)}
    mask = make_mask(checkpoint(tmp_path, **weights), Lift(2), top_k=50, scope="global")
    lows = []
    for weight in weights.values():
        u, s, v = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
        lows.append(np.abs((u[:, :2] * s[:2]) @ v[:2]).reshape(-1))
    chosen = np.sort(ranked(np.concatenate(lows))[:50])
    assert chosen[chosen < 960].tolist() == mask["a.weight"].indices.tolist()
    assert (chosen[chosen >= 960] - 960).tolist() == mask["b.weight"].indices.tolist()
    with pytest.raises(SourceError, match="NaN or Inf"):
        make_mask(checkpoint(tmp_path, a=np.full((3, 4), np.nan, np.float32)), "lift")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 99), st.integers(1, 40), st.sampled_from([0, 1, 3]))
def test_neuroada_has_the_same_number_in_each_row(m: int, n: int, seed: int, k: int, levels: int) -> None:
    layer = nn.Linear(n, m)
    layer.weight.data = torch.from_numpy(some(seed, m, n, levels=levels))
    count = min(max(1, int(min(k, m * n) / m + 0.5)), n)
    mask = make_mask(layer, "neuroada", top_k=k)
    scores = np.abs(layer.weight.detach().numpy())
    expected = [r * n + c for r in range(m) for c in sorted(ranked(scores[r])[:count].tolist())]
    assert expected == one(mask)
    assert mask == make_mask(layer, "wm", top_k=k, scope="row")


def test_rows_of_inputs_first_layers_are_outputs() -> None:
    model = models.gpt2()
    mask = make_mask(model, NeuroAda(), density=0.1, include=["c_fc"])
    for name, tensor in mask.items():
        weight = model.get_parameter(name).detach().numpy()
        rows, columns = np.divmod(tensor.indices, weight.shape[1])
        assert [3] * weight.shape[1] == np.bincount(columns).tolist()
        for column in range(weight.shape[1]):
            best = ranked(np.abs(weight[:, column]))[:3]
            assert sorted(best.tolist()) == rows[columns == column].tolist()


def test_given_scores(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, a=some(1, 6, 8), b=some(2, 8, 4))
    scores = {"a.weight": np.abs(some(3, 6, 8)), "b.weight": torch.from_numpy(np.abs(some(4, 8, 4)))}
    calls: list[str] = []

    def computed(name: str) -> Any:
        calls.append(name)
        return scores.get(name)

    for tensors in (scores, computed):
        mask = make_mask(path, Given(tensors, "mine"), top_k=20, scope="global")
        every = np.concatenate([scores["a.weight"].reshape(-1), scores["b.weight"].numpy().reshape(-1)])
        chosen = np.sort(ranked(every)[:20])
        assert chosen[chosen < 48].tolist() == mask["a.weight"].indices.tolist()
        assert {"rule": "mine"} == mask.manifest["mask"]
    assert {"a.weight", "b.weight"} == set(calls)
    calls.clear()
    make_mask(path, Given(computed), top_k=20)
    assert ["a.weight", "b.weight"] == calls  # once for each, one after the other
    for bad, why in (
        ({"a.weight": scores["a.weight"]}, "no score is given for it"),
        (scores | {"b.weight": np.ones((4, 8))}, r"has the shape \[8, 4\], the score \[4, 8\]"),
        (scores | {"b.weight": -np.ones((8, 4))}, "a score is negative"),
    ):
        with pytest.raises(SourceError, match=why):
            make_mask(path, Given(bad), top_k=3)


# --- runs ---


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 60), st.integers(0, 99), st.integers(1, 400), st.sampled_from([2, 8, 16, 32]),
    st.sampled_from([0, 1]),
)  # fmt: skip
def test_runs_are_the_best_sums(m: int, n: int, seed: int, k: int, length: int, levels: int) -> None:
    scores = np.abs(some(seed, m, n, dtype=np.float64, levels=levels))
    layer = nn.Linear(n, m)
    padded = np.pad(scores.reshape(-1), (0, -scores.size % length)).reshape(-1, length)
    sums = np.zeros(len(padded))
    for column in padded.T:
        sums = sums + column
    count = max(1, int(min(k, scores.size) / length + 0.5))
    chosen = np.sort(ranked(sums)[:count])
    expected = (chosen[:, None] * length + np.arange(length)).reshape(-1)
    mask = make_mask(layer, Given({"weight": scores}), top_k=k, runs=length)
    assert expected[expected < scores.size].tolist() == one(mask)
    assert mask == make_mask(layer, Given({"weight": scores}), top_k=k, runs=length, scope="global")


def test_runs_and_their_codec(tmp_path: Path) -> None:
    weight = some(5, 512, 1024)
    path = checkpoint(tmp_path, a=weight)
    sizes = {}
    for length in (1, 8, 16, 32):
        mask = make_mask(path, density=0.01, runs=length)
        shira.save(mask, tmp_path / "m.st")
        assert mask == shira.load(tmp_path / "m.st")
        (item,) = shira.inspect(tmp_path / "m.st")["tensors"]
        assert ("gap8" if length == 1 else "runs") == item["index_codec"]
        assert abs(mask["a.weight"].nnz - 5243) <= length / 2
        sizes[length] = 8 * item["index_bytes"] / item["nnz"]
    assert sizes[16] < 0.52 < 1 < sizes[8] < 1.03 < 8 < sizes[1]
    assert sizes[32] < 0.27


def test_runs_within_rows(tmp_path: Path) -> None:
    weight = some(6, 12, 64)
    mask = make_mask(checkpoint(tmp_path, a=weight), density=0.25, runs=8, scope="row")
    for row in range(12):
        sums = np.zeros(8, np.float32)
        for column in np.abs(weight[row]).reshape(8, 8).T:
            sums = sums + column
        best = np.sort(ranked(sums)[:2])
        here = mask["a.weight"].indices[mask["a.weight"].indices // 64 == row] - 64 * row
        assert (best[:, None] * 8 + np.arange(8)).reshape(-1).tolist() == here.tolist()
    with pytest.raises(SourceError, match="runs of 8 do not divide the rows of 20"):
        make_mask(checkpoint(tmp_path, a=some(1, 4, 20)), density=0.5, runs=8, scope="row")


# --- weights of files and of live models ---


class Layers(nn.Module):
    """All kinds of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.embedding, self.norm = nn.Linear(6, 8), nn.Embedding(10, 6), nn.LayerNorm(6)
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(3, 4, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Conv3d(1, 2, 2)
        self.experts = Experts()
        self.tied = nn.Linear(6, 10, bias=False)
        self.tied.weight = self.embedding.weight
        self.register_buffer("mask.bias".replace(".", "_"), torch.ones(4, 4))


class Experts(nn.Module):
    """As transformers has them: no layers, but parameters with a matrix for each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 10, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 5))


def test_live_models_and_their_files_have_the_same_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Layers()
    models.save_base(model, tmp_path)
    live, file = weights_of(model), weights_of(tmp_path)
    names = {
        "linear.weight", "embedding.weight", "conv1.weight", "conv2.weight", "conv3.weight", "experts.gate_up_proj",
        "experts.down_proj",
    }  # fmt: skip
    assert names == {weight.name for weight in live} == {weight.name for weight in file}
    assert {weight.name: weight.matrices for weight in live} == {weight.name: weight.matrices for weight in file}
    by_name = {weight.name: weight for weight in live}
    assert (3, 10, 6) == by_name["experts.gate_up_proj"].matrices
    assert (1, 6, 18) == by_name["conv2.weight"].matrices
    assert 3 * 2 * (10 + 6) == by_name["experts.gate_up_proj"].lora_size(2)
    for rule in ("wm", "rand", "lift", "neuroada", Struct()):
        for size in ({"density": 0.4}, {"rank": 1}):
            kept = {"exclude": ["conv3"]} if "rank" in size else {}
            try:
                assert make_mask(model, rule, **size, **kept) == make_mask(tmp_path, rule, **size, **kept)  # type: ignore[arg-type]
            except SourceError as error:
                assert isinstance(rule, Struct), error
    with pytest.raises(SourceError, match="no weight of two dimensions or more is left"):
        make_mask(model, include=["nowhere"])


def test_stacked_experts_are_matrices_of_their_own() -> None:
    torch.manual_seed(0)
    model = Layers()
    weight = model.experts.gate_up_proj.detach().numpy().astype(np.float64)
    only = {"include": ["gate_up_proj"]}
    found = make_mask(model, Struct("rows", step=4, offset=1), **only)["experts.gate_up_proj"].indices
    assert [e * 60 + i for e in range(3) for i in struct((10, 6), "rows", 4, 1, 0)] == found.tolist()
    found = make_mask(model, Lift(2), top_k=20, **only)["experts.gate_up_proj"].indices
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    low = np.einsum("emr,er,ern->emn", u[:, :, :2], s[:, :2], v[:, :2])
    assert sorted(ranked(np.abs(low))[:20].tolist()) == found.tolist()
    found = make_mask(model, "neuroada", density=0.5, **only)["experts.gate_up_proj"].indices
    assert [3] * 30 == np.bincount(found // 6).tolist()


def test_a_buffer_is_no_weight(tmp_path: Path) -> None:
    arrays = {
        "h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32), "h.0.attn.weight": np.ones((4, 4), np.float32),
        "ids": np.ones((4, 4), np.int64), "norm.weight": np.ones(4, np.float32), "int.weight": np.ones((4, 4), np.int8),
    }  # fmt: skip
    models.save_arrays(tmp_path / "model.safetensors", arrays)
    assert ["h.0.attn.weight"] == [weight.name for weight in weights_of(tmp_path)]


def test_a_bf16_model() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(30, 20).bfloat16()
    mask = make_mask(layer, top_k=50)
    scores = layer.weight.detach().float().abs().numpy()
    assert sorted(ranked(scores)[:50].tolist()) == one(mask)


# --- files and algebra ---


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sets(st.integers(0, 29)), min_size=2, max_size=4))
def test_algebra(supports: list[set[int]]) -> None:
    masks = [
        {"w": SparseTensor("w", (5, 6), np.array(sorted(support), np.int64), value_kind="none")}
        for support in supports
    ]
    assert sorted(set.union(*supports)) == one(union(*masks))
    assert sorted(set.intersection(*supports)) == one(intersection(*masks))
    assert sorted(supports[0].difference(*supports[1:])) == one(difference(*masks))
    rest = difference(masks[0], masks[1])
    assert union(rest, intersection(masks[0], masks[1])) == union(masks[0])
    assert 0 == len(one(intersection(rest, masks[1])))


def test_algebra_of_files_and_adapters(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, a=some(1, 20, 30), b=some(2, 10, 30))
    shira.save(make_mask(path, top_k=40), tmp_path / "wm.st")
    shira.save(make_mask(path, "rand", top_k=40, include=["a"]), tmp_path / "rand.st")
    wm, rand = shira.load(tmp_path / "wm.st"), shira.load(tmp_path / "rand.st")
    shira.save(union(wm, rand), tmp_path / "both.st")
    both = shira.load(tmp_path / "both.st")
    assert ["a.weight", "b.weight"] == list(both)
    assert both["b.weight"] == wm["b.weight"]
    assert ["a.weight"] == list(intersection(wm, rand))
    adapter = {"a.weight": SparseTensor("a.weight", (20, 30), [0, 5], np.ones(2, np.float32), value_kind="delta")}
    assert {0, 5} <= set(union(wm, adapter)["a.weight"].indices.tolist())
    with pytest.raises(SourceError, match="has the shape"):
        union(wm, {"a.weight": SparseTensor("a.weight", (30, 20), [0], value_kind="none")})["a.weight"]
    with pytest.raises(ValueError, match="no mask"):
        union()


def test_adapters_share_a_mask_file(tmp_path: Path) -> None:
    weight = some(1, 200, 300)
    path = checkpoint(tmp_path, a=weight)
    shira.save(make_mask(path, density=0.02, runs=16), tmp_path / "mask.st")
    mask = shira.load(tmp_path / "mask.st")
    indices = mask["a.weight"].indices
    base = weight.reshape(-1)[indices]
    for name, step in (("one", 0.5), ("two", -0.25)):
        tensor = SparseTensor("a.weight", weight.shape, indices, base + np.float32(step), base=base)
        shira.save(shira.Adapter([tensor]), tmp_path / f"{name}.st", masks=tmp_path / "mask.st")
        again = shira.load(tmp_path / f"{name}.st")
        assert again["a.weight"] == tensor
        assert {"codec": "shared", "tensor": "a.weight", "file": "mask.st"} == again.manifest["tensors"][0][
            "indices"
        ]
        assert ["mask-file"] == again.manifest["features"]
    found = shira.inspect(tmp_path / "mask.st")
    assert "none" == found["tensors"][0]["values"]


def test_the_manifest_says_how_the_mask_was_made(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, a=some(1, 64, 64))
    mask = make_mask(path, Rand(7), rank=2, scope="global", runs=8, band=1, exclude=["b"])
    assert {"rule": "rand", "seed": 7, "runs": 8, "band": 1} == mask.manifest["mask"]
    assert {"rule": "mask", "scope": "global", "lora_rank": 2, "exclude": ["b"]} == mask.manifest["selection"]
    shira.save(mask, tmp_path / "m.st")
    assert mask.manifest.items() <= shira.load(tmp_path / "m.st").manifest.items()


def test_rules_by_name() -> None:
    assert {"struct", "rand", "wm", "grad", "snip", "lift", "gallop", "talos", "neuroada"} == set(RULES)
    for name, rule in RULES.items():
        assert name == rule.name
        assert rule.__doc__


def test_outputs_of_a_file_are_known_by_its_biases(tmp_path: Path) -> None:
    model = models.gpt2()
    models.save_base(model.transformer, tmp_path / "gpt2")
    assert make_mask(model.transformer, "neuroada", density=0.1) == make_mask(
        tmp_path / "gpt2", "neuroada", density=0.1
    )
    bert = models.bert()
    models.save_base(bert, tmp_path / "bert")
    assert make_mask(bert, "neuroada", density=0.1) == make_mask(tmp_path / "bert", "neuroada", density=0.1)
    arrays = {
        "a.weight": some(1, 4, 6), "a.bias": some(2, 6), "b.weight": some(3, 4, 6), "b.bias": some(4, 4),
        "c.weight": some(5, 4, 4), "c.bias": some(6, 4),
    }  # fmt: skip
    both = models.save_arrays(tmp_path / "both" / "model.safetensors", arrays)
    assert ["a.weight", "b.weight"] == list(make_mask(both, "neuroada", exclude=["c"]))
    with pytest.raises(SourceError, match=r"tensor 'c.weight': is square, and the checkpoint has layers"):
        make_mask(both, "neuroada")
    assert 3 == len(make_mask(both, "wm"))


@pytest.mark.parametrize("settings", [{}, {"scope": "global"}, {"scope": "row"}, {"runs": 16}, {"rule": Rand()}])
def test_a_weight_is_never_whole_in_memory(settings: dict[str, Any]) -> None:
    size = 1 << 23  # 32 MiB

    def part(start: int, stop: int) -> Array:
        mixed = np.arange(start, stop, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return (mixed >> np.uint64(40)).astype(np.float32)

    weight = Weight("w", (1 << 11, 1 << 12), np.dtype(np.float32), part)
    rule = settings.get("rule", WM())
    plan = MaskPlan(rule, Size(scope=settings.get("scope", "tensor")), settings.get("runs", 1))
    with Workers(1) as workers:
        ((_, found),) = plan.masks([weight], None, workers)  # what buffers are kept
        tracemalloc.start()
        ((_, again),) = plan.masks([weight], None, workers)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert found.tolist() == again.tolist()
    assert peak < 4 * size * 0.75
    if rule == WM() and plan.scope == "tensor" and plan.runs == 1:
        assert sorted(ranked(part(0, size))[: len(found)].tolist()) == found.tolist()
