"""Top-k over tiles against a plain stable sort of the whole update."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shira_format._core.arrays import Array
from shira_format._core.threads import Workers
from shira_format.entries.changes import Change, Entries, Tile, tile_size
from shira_format.errors import SourceError
from shira_format.selection import LocalEngine, TopK, passes
from shira_format.selection import select as select_by

LARGE = (513, 1024)  # beyond the limit under which no sample is taken, and three tiles


class Base:
    """What the tests' changes have in common: the base is zero, so that target and change are the same."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    grain = 1

    @property
    def weight_dtype(self) -> np.dtype[Any]:
        return self.dtype

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def fill(self, start: int, stop: int, out: Array) -> None:
        raise NotImplementedError

    def tile(self, start: int, stop: int, out: Array) -> Tile:
        self.fill(start, stop, out)
        return Tile(out)

    def completed(self, indices: Array, values: Array) -> tuple[Array, Array]:
        return np.zeros(indices.size, self.dtype), values


@dataclass
class Dense(Base):
    """A change that is held whole."""

    name: str
    values: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    def fill(self, start: int, stop: int, out: Array) -> None:
        out[...] = self.values.reshape(-1)[start:stop]


@dataclass
class LowRank(Base):
    """A product, in whole rows."""

    name: str
    shape: tuple[int, int]
    up: Array
    down: Array

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.up.dtype

    @property
    def grain(self) -> int:
        return self.shape[1]

    def fill(self, start: int, stop: int, out: Array) -> None:
        rows = slice(start // self.grain, stop // self.grain)
        np.matmul(self.up[rows], self.down, out=out.reshape(-1, self.grain))


def select(
    changes: Sequence[Change], rule: TopK, *, threads: int | None = None, progress: Any = lambda _: None
) -> Iterator[tuple[Change, Entries]]:
    with Workers(threads) as workers:
        selected = select_by(changes, rule, LocalEngine(workers, progress), workers)
        yield from zip(changes, workers.ahead(selected), strict=True)


def low_rank(
    name: str, shape: tuple[int, int], rank: int, seed: int, dtype: Any = np.float32, kind: str = "normal"
) -> LowRank:
    rng = np.random.default_rng(seed)
    if kind == "normal":
        up, down = rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, shape[1]))
    elif kind == "ties":  # sums of products of small integers are exact in any order
        up, down = rng.integers(-2, 3, (shape[0], rank)), rng.integers(-2, 3, (rank, shape[1]))
    else:
        up, down = np.zeros((shape[0], rank)), np.ones((rank, shape[1]))
    return LowRank(name, shape, up.astype(dtype), down.astype(dtype))


def whole(change: Change) -> Array:
    """The change as one array, computed in the tiles that the selection uses: other tiles may round otherwise."""
    out = np.empty(change.size, change.dtype)
    step = tile_size(change)
    for start in range(0, change.size, step):
        change.tile(start, min(change.size, start + step), out[start : start + step])
    return out


def oracle(values: Array, k: int) -> Array:
    """Positions of the k largest magnitudes, lower positions first among equals, without zeros."""
    first = np.argsort(-np.abs(values), kind="stable")[:k]
    return np.sort(first[values[first] != 0])


def check(updates: Sequence[Change], rule: TopK, threads: int | None = None) -> list[Entries]:
    """Compare a selection with the oracle, bit for bit, and hand it back."""
    done: list[int] = []
    found = list(select(updates, rule, threads=threads, progress=done.append))
    assert list(updates) == [update for update, _ in found]
    dense = [whole(update) for update in updates]
    if rule.scope == "global":
        everything = np.concatenate([np.empty(0), *dense])
        chosen = oracle(everything, rule.count(everything.size))
        starts = np.cumsum([0, *(values.size for values in dense)])
        expected = [chosen[(chosen >= a) & (chosen < b)] - a for a, b in zip(starts, starts[1:], strict=False)]
    else:
        expected = [oracle(values, rule.count(values.size)) for values in dense]
    for (update, actual), indices, values in zip(found, expected, dense, strict=True):
        assert np.dtype(np.int64) == actual.indices.dtype
        assert update.dtype == actual.values.dtype
        assert np.array_equal(indices, actual.indices), update.name
        assert values[indices].tobytes() == actual.values.tobytes() == actual.target.tobytes(), update.name
        assert not actual.base.any()
        np.testing.assert_allclose(actual.energy, np.sum(values.astype(np.float64) ** 2), rtol=1e-5)
    # The pass may be made again where a sample misled.
    assert sum(done) >= passes(rule) * sum(values.size for values in dense)
    return [selected for _, selected in found]


rules = st.one_of(
    st.floats(1e-3, 1.0).map(lambda density: TopK(density)),
    st.just(TopK(1.0)),
    st.integers(1, 2000).map(lambda k: TopK(None, k)),
)
updates_of = st.builds(
    low_rank,
    name=st.just("w"),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    rank=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([np.float32, np.float64]),
    kind=st.sampled_from(["normal", "ties", "ties", "zero"]),
)


@given(updates_of, rules)
@settings(max_examples=150, deadline=None)
def test_the_largest_of_each_tensor(update: LowRank, rule: TopK) -> None:
    check([update], rule, threads=2)


@given(st.lists(updates_of, min_size=1, max_size=4), rules)
@settings(max_examples=150, deadline=None)
def test_the_largest_of_all_tensors(updates: list[LowRank], rule: TopK) -> None:
    check(updates, TopK(rule.density, rule.top_k, "global"), threads=2)


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("kind", ["normal", "ties", "zero"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_tensors(scope: str, kind: str, dtype: Any) -> None:
    updates = [low_rank("a", LARGE, 4, 1, dtype, kind), low_rank("b", (300, 700), 2, 2, dtype, kind)]
    for density in (1e-5, 0.01, 0.3, 1.0):
        check(updates, TopK(density, None, scope), threads=2)
    check(updates, TopK(None, 1, scope), threads=2)


def test_neighbouring_float64_values_are_told_apart() -> None:
    """Magnitudes that are equal in float32, and differ in the last bit of float64."""
    values = np.full(LARGE, 0.1)
    values.ravel()[[400_000, 70_000, 5]] = np.nextafter(0.1, 1)
    for scope in ("tensor", "global"):
        (found,) = check([Dense("w", values)], TopK(None, 5, scope))
        assert found.indices.tolist() == [0, 1, 5, 70_000, 400_000]


def test_mixed_dtypes_under_the_global_scope() -> None:
    updates = [low_rank("a", (50, 60), 2, 1, np.float32), low_rank("b", (70, 20), 2, 2, np.float64)]
    check([*updates, low_rank("c", (30, 30), 3, 5, np.float32, "ties")], TopK(0.1, None, "global"))


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_threads_change_no_bit(scope: str, kind: str) -> None:
    updates = [low_rank("a", (1100, 1024), 8, 1, kind=kind), low_rank("b", (700, 900), 8, 2, kind=kind)]
    runs = [
        [
            (s.indices.tobytes(), s.values.tobytes(), s.energy)
            for _, s in select(updates, TopK(0.02, None, scope), threads=n)
        ]
        for n in (1, 2, 3, None, 1)
    ]
    assert all(runs[0] == run for run in runs)


def test_odd_shapes() -> None:
    rng = np.random.default_rng(0)
    updates = [
        Dense("empty", np.empty((0, 5), np.float32)),
        Dense("no columns", np.empty((5, 0), np.float32)),
        Dense("vector", rng.standard_normal(300_000).astype(np.float32)),
        Dense("row", rng.standard_normal((1, 600_000)).astype(np.float32)),  # wider than a tile
        Dense("four axes", rng.standard_normal((6, 5, 3, 3)).astype(np.float32)),
    ]
    for scope in ("tensor", "global"):
        check(updates, TopK(0.01, None, scope))
    assert list(select([], TopK(0.5))) == []
    assert list(select([], TopK(0.5, None, "global"))) == []


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_sample_that_misleads(scope: str) -> None:
    """The sample looks at eight pieces; what lies between them may be far larger, or far smaller, or nothing."""
    rng = np.random.default_rng(3)
    shape = (2048, 512)
    seen = np.zeros(shape[0], bool)
    for start in np.linspace(0, shape[0] - 32, 8, dtype=np.int64):
        seen[start : start + 32] = True
    noise = rng.standard_normal(shape).astype(np.float32)
    for inside, outside in ((1.0, 1e6), (1e6, 1.0), (1e6, 0.0), (0.0, 1.0), (1.0, 1.0 + 1e-6)):
        values = noise * np.where(seen, inside, outside)[:, None].astype(np.float32)
        for density in (1e-4, 0.01, 0.2, 0.5):
            check([Dense("w", values)], TopK(density, None, scope), threads=2)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_many_equal_magnitudes_take_no_memory(scope: str) -> None:
    """All entries tie: the first ones are kept, and the others are not piled up on the way."""

    @dataclass
    class Ones(Base):
        name: str = "ones"
        shape: tuple[int, int] = (32_768, 1024)
        dtype: Any = np.dtype(np.float32)

        def fill(self, start: int, stop: int, out: Array) -> None:
            out[...] = 1

    rule, updates = TopK(None, 1000, scope), [Ones()]
    list(select([Ones(shape=(512, 1024))], rule, threads=2))  # what is allocated once
    tracemalloc.start()
    ((_, found),) = select(updates, rule, threads=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert list(range(1000)) == found.indices.tolist()
    assert peak < 200 * 2**20, f"{peak / 2**20:.0f} MiB, where all entries would take 640 MiB"


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 300_123, -1])
def test_what_is_not_finite_is_named(scope: str, bad: float, at: int) -> None:
    values = np.ones(LARGE, np.float32)
    values.flat[at] = bad
    updates = [Dense("fine", np.ones((3, 3), np.float32)), Dense("layer.bad", values)]
    with pytest.raises(SourceError) as caught:
        list(select(updates, TopK(0.01, None, scope)))
    assert str(caught.value) == "the update of tensor 'layer.bad' holds NaN or Inf, or overflows"


def test_factors_whose_product_overflows_are_named() -> None:
    update = LowRank("w", (4, 4), np.full((4, 1), 1e30, np.float32), np.full((1, 4), 1e30, np.float32))
    with pytest.raises(SourceError, match="the update of tensor 'w' holds NaN or Inf, or overflows"):
        list(select([update], TopK(0.5)))


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-22, 1e22, 1e37])
def test_energies_of_tiny_and_huge_updates(scope: str, scale: float) -> None:
    """Their squares do not fit in float32."""
    values = (np.arange(1, 100_001, dtype=np.float64) % 13 * scale).astype(np.float32)
    check([Dense("w", values)], TopK(0.01, None, scope))


def test_subnormal_magnitudes_count() -> None:
    values = np.zeros(200_000, np.float32)
    values[[5, 150_000]] = 1e-45, -1e-45
    for scope in ("tensor", "global"):
        (found,) = check([Dense("w", values)], TopK(0.5, None, scope))
        assert found.indices.tolist() == [5, 150_000]


def test_an_error_in_a_tile_comes_out() -> None:
    class Broken(Dense):
        def fill(self, start: int, stop: int, out: Array) -> None:
            raise OSError("the file went away")

    with pytest.raises(OSError, match="went away"):
        list(select([Broken("w", np.ones(LARGE, np.float32))], TopK(0.5), threads=2))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"density": 0}, r"density 0 is not in \(0, 1\]"),
        ({"density": -1}, r"density -1 is not in \(0, 1\]"),
        ({"density": 1.5}, r"density 1.5 is not in \(0, 1\]"),
        ({"density": float("nan")}, r"density nan is not in \(0, 1\]"),
        ({"density": None}, "give one of density, top-k and energy"),
        ({"density": 0.1, "top_k": 3}, "give one of density, top-k and energy"),
        ({"density": None, "top_k": 0}, "top-k 0 is not a positive count"),
        ({"density": None, "top_k": -3}, "top-k -3 is not a positive count"),
        ({"energy": 0.5}, "give one of density, top-k and energy"),
        ({"density": None, "energy": 0.0}, r"energy 0.0 is not in \(0, 1\]"),
        ({"density": None, "energy": 1.1}, r"energy 1.1 is not in \(0, 1\]"),
        ({"min_change": -1.0}, "min-change -1.0 is not a magnitude"),
        ({"min_change": float("nan")}, "min-change nan is not a magnitude"),
        ({"scope": "layer"}, "scope 'layer' is neither 'tensor' nor 'global'"),
    ],
)
def test_rules_that_cannot_be_meant(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}$"):
        TopK(**arguments)


def test_counts() -> None:
    assert [TopK(0.2).count(n) for n in (1, 5, 8, 12, 50)] == [1, 1, 2, 2, 10]  # 1.6 and 2.4 are rounded
    assert [TopK(None, 7).count(n) for n in (0, 3, 7, 100)] == [0, 3, 7, 7]
    assert [TopK(1.0).count(n) for n in (0, 3, 7)] == [0, 3, 7]


@given(
    st.lists(updates_of, min_size=1, max_size=3),
    st.floats(1e-3, 1.0),
    st.sampled_from(["tensor", "global"]),
    st.sampled_from([0.0, 0.0, 0.3, 2.0]),
)
@settings(max_examples=150, deadline=None)
def test_the_fewest_entries_that_hold_a_share_of_the_energy(
    updates: list[LowRank], share: float, scope: str, least: float
) -> None:
    rule = TopK(None, None, scope, share, least)
    found = [entries for _, entries in select(updates, rule, threads=2)]
    dense = [whole(update) for update in updates]
    groups = [(found, dense)] if scope == "global" else [([f], [d]) for f, d in zip(found, dense, strict=True)]
    for entries, arrays in groups:
        values = np.concatenate(arrays).astype(np.float64)
        starts = np.cumsum([0, *(array.size for array in arrays)])
        chosen = np.concatenate([e.indices + start for e, start in zip(entries, starts, strict=False)])
        assert np.array_equal(chosen, oracle(values, chosen.size))  # they are the largest, whatever their number
        assert (np.abs(values[chosen]) >= least).all()
        squares = values**2
        wanted, kept = share * squares.sum(), squares[chosen].sum()
        left = np.delete(np.where(np.abs(values) >= least, squares, 0), chosen)
        slack = 1e-5 * squares.sum()
        assert kept >= wanted - slack or not left.any()
        if chosen.size:
            assert kept - squares[chosen].min() <= wanted + slack  # one fewer would not do


@given(updates_of, rules, st.floats(0, 4), st.sampled_from(["tensor", "global"]))
@settings(max_examples=100, deadline=None)
def test_small_changes_are_left_out(update: LowRank, rule: TopK, least: float, scope: str) -> None:
    ((_, found),) = select([update], TopK(rule.density, rule.top_k, scope, min_change=least), threads=2)
    values = whole(update)
    expected = oracle(values, rule.count(values.size))
    assert np.array_equal(found.indices, expected[np.abs(values[expected]).astype(np.float64) >= least])


def test_a_share_of_the_energy_of_large_tensors() -> None:
    updates = [low_rank("a", LARGE, 4, 1), Dense("b", np.arange(600_000, dtype=np.float32).reshape(2, -1))]
    for scope in ("tensor", "global"):
        found = [entries for _, entries in select(updates, TopK(None, None, scope, 0.9), threads=2)]
        kept = [float(np.sum(e.values.astype(np.float64) ** 2)) for e in found]
        energies = [entries.energy for entries in found]
        if scope == "global":
            kept, energies = [sum(kept)], [sum(energies)]
        for part, energy in zip(kept, energies, strict=True):
            assert 0.9 <= part / energy < 0.90001
