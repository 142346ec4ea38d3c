"""What holds of the methods whatever the peers do: order, seeds, ties, limits, memory. See test_peers for their results."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shira_format.entries.aligned import AlignedEntries, Contribution
from shira_format.entries.mixing import mix
from shira_format.errors import SourceError
from shira_format.merging.methods import METHODS, della
from shira_format.merging.methods.randomness import uniform
from shira_format.tensors import SparseTensor
from tests.shira_format.merging.cases import adapters, dense, joined, part

# Every method that computes, and options with which it leaves some entries out.
SOME: list[tuple[str, dict[str, Any]]] = [
    ("task_arithmetic", {"normalize": True, "lambda": 0.7}),
    ("magnitude_prune", {"density": 0.3}),
    ("magnitude_prune", {"density": 0.3, "of": "entries"}),
    ("ties", {"density": 0.4}),
    ("ties", {"density": 0.4, "majority_sign": "frequency", "of": "entries"}),
    ("ties", {"density": 0.4, "semantics": "mergekit", "rescale": True}),
    ("dare_linear", {"density": 0.4}),
    ("dare_linear", {"density": 0.4, "semantics": "mergekit", "normalize": True}),
    ("dare_ties", {"density": 0.4}),
    ("dare_ties", {"density": 0.4, "semantics": "mergekit", "normalize": "true"}),
    ("breadcrumbs", {"density": 0.3, "gamma": 0.1}),
    ("breadcrumbs", {"density": 0.3, "gamma": 0.1, "of": "entries", "rescale": True}),
    ("breadcrumbs_ties", {"density": 0.3, "gamma": 0.1, "of": "entries", "normalize": True}),
    ("della", {"density": 0.4}),
    ("della", {"density": 0.4, "of": "entries"}),
    ("della_linear", {"density": 0.4}),
    ("sce", {}),
    ("sce", {"select_topk": 0.5}),
    ("ram", {"epsilon": 0.2}),
    ("ramplus_tl", {"epsilon": 0.2}),
]
RANDOM = [(name, options) for name, options in SOME if "seed" in METHODS[name].options]
some = pytest.mark.parametrize(("method", "options"), SOME, ids=str)


def test_all_are_tried() -> None:
    tried = {name for name, _ in SOME} | {"linear", "mean", "overwrite", "refuse", "disjoint", "intersect"}
    tried.add("cabs")  # test_cabs: the order of its adapters matters
    assert METHODS.keys() == tried


@some
@given(parts=adapters(), data=st.data())
def test_the_order_of_adapters_does_not_matter(
    method: str, options: dict[str, Any], parts: list[Contribution], data: st.DataObject
) -> None:
    weights = data.draw(
        st.lists(st.sampled_from([0.1, 0.2, -0.3, 0.7, 1.0]), min_size=len(parts), max_size=len(parts))
    )
    parts = [Contribution(one.tensor, weight, one.label) for one, weight in zip(parts, weights, strict=True)]
    order = data.draw(st.permutations(parts))
    assert np.array_equal(joined(method, parts, **options), joined(method, order, **options))


@some
def test_huge(method: str, options: dict[str, Any]) -> None:
    """Nothing as large as the weight is made."""
    rng = np.random.default_rng(0)
    shape = (2**20, 2**20)
    parts = []
    for _ in range(3):
        indices = np.unique(rng.integers(0, 2**40, 100))
        values = rng.standard_normal(indices.size)
        parts.append(Contribution(SparseTensor("w", shape, indices, values, value_kind="delta")))
    together, chosen = AlignedEntries.of(parts), METHODS[method]
    factors = chosen.factors(together, chosen.settings(options))
    result = mix(together, factors, self_contained=False)
    if method == "sce":
        assert result is not None
        assert result.nnz == (150 if "select_topk" in options else 300)
    elif method.startswith("breadcrumbs") and "of" not in options:
        assert result is None  # a tenth of the weight's elements is more than all entries
    elif options.get("of") != "entries" and not method.startswith(("ram", "d")):
        assert result is not None
        assert result.nnz == 300  # so few entries are far below the density
    else:
        assert result is not None
        assert 20 < result.nnz < 300


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.copies])
@given(data=st.data())
def test_one_adapter_alone_stays_as_it_is(method: str, data: st.DataObject) -> None:
    """By default, at strength 1: its targets, bit for bit."""
    values = np.float16(data.draw(st.lists(st.floats(1, 1000, width=16), min_size=5, max_size=5)))
    tensor = SparseTensor("w", (4, 6), [1, 4, 7, 9, 20], values, base=np.float16([0.1, -2, 0.3, 0.7, -900]))
    nothing = SparseTensor("w", (4, 6), np.empty(0, int), np.float16([]), base=np.float16([]))
    together = AlignedEntries.of([Contribution(nothing, 0.0), Contribution(tensor, 1.0)])
    result = mix(together, METHODS[method].factors(together, METHODS[method].settings({})), self_contained=True)
    assert result == tensor


@pytest.mark.parametrize(("method", "options"), RANDOM, ids=str)
def test_seeds(method: str, options: dict[str, Any]) -> None:
    parts = [part(np.random.default_rng(number).standard_normal((8, 9)), 0.5) for number in range(2)]
    found = [joined(method, parts, **options, seed=seed) for seed in (0, 0, 1)]
    assert np.array_equal(found[0], found[1])
    assert ((found[0] == 0) != (found[2] == 0)).any()
    assert np.array_equal(found[0], joined(method, parts, **options))


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_random_ones_on_average(method: str) -> None:
    """DARE gives the weighted sum; DELLA keeps each entry as often as its rank says."""
    value = np.zeros((3, 10))
    value[1, [2, 5, 7]] = [3.0, -1.0, 2.0]
    value[2] = np.arange(10) + 1.0
    seeds = 2000
    options = {"rescale": "density"} if method == "dare_linear" else {"rescale": False}
    found = sum(joined(method, [part(value, 0.5)], density=0.4, seed=seed, **options) for seed in range(seeds))
    if method == "dare_linear":
        chance, scale = np.full(value.shape, 0.4), value * 0.5 / 0.4
    else:
        chance, scale = np.zeros(value.shape), value * 0.5
        chance[1, [2, 5, 7]] = 0.25 + 0.3 * np.array([9, 7, 8]) / 9
        chance[2] = 0.25 + 0.3 * np.arange(10) / 9
    off = 5 * np.sqrt(chance * (1 - chance) / seeds)  # five standard deviations
    assert (np.abs(found / seeds - chance * scale) <= off * np.abs(scale)).all()


def test_chances_of_della() -> None:
    value = np.zeros((2, 5))
    value[0, [1, 3, 4]] = [1, 5, -2]
    value[1, 2] = 7
    settings = {"density": 0.5, "epsilon": 0.2}
    np.testing.assert_allclose(della.chances(part(value), {**settings, "of": "elements"}), [0.5, 0.7, 0.6, 0.7])
    np.testing.assert_allclose(della.chances(part(value), {**settings, "of": "entries"}), [0.3, 0.7, 0.5, 0.5])
    column = part(np.ones((4, 1)))  # no rank in a row of one element
    np.testing.assert_allclose(della.chances(column, {**settings, "of": "elements"}), [0.5] * 4)
    scalar = Contribution(SparseTensor("w", (), [0], np.float64([2]), value_kind="delta"))
    np.testing.assert_allclose(della.chances(scalar, {**settings, "of": "elements"}), [0.5])


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.15, 0.15), (0.9, 0.15), (0.85, 0.15)])
def test_della_refuses_chances_that_are_none(density: float, epsilon: float) -> None:
    with pytest.raises(SourceError, match="not both between 0 and 1"):
        joined("della", [part(np.ones((2, 3)))], density=density, epsilon=epsilon)


@pytest.mark.parametrize("method", ["magnitude_prune", "ties", "breadcrumbs", "breadcrumbs_ties"])
@given(parts=adapters(), density=st.floats(0, 1))
def test_a_share_of_the_entries(method: str, parts: list[Contribution], density: float) -> None:
    """An adapter's entries are pruned as if they were the whole tensor."""
    one = parts[0]
    if not one.tensor.nnz:
        return
    alone = joined(method, [one], density=density, of="entries")
    as_whole = joined(method, [part(one.delta, one.weight)], density=density)
    assert np.array_equal(alone.reshape(-1)[one.tensor.indices], as_whole)


def test_equal_magnitudes() -> None:
    """The lower flat index counts as the larger."""
    value = np.array([[0.0, 1.0, -1.0], [1.0, -1.0, 0.0]])
    assert [1, 2] == np.flatnonzero(joined("magnitude_prune", [part(value)], density=1 / 3)).tolist()
    assert [2, 3] == np.flatnonzero(joined("breadcrumbs", [part(value)], density=1 / 3, gamma=1 / 6)).tolist()
    found = della.chances(part(value), {"density": 0.5, "epsilon": 0.2, "of": "elements"})
    assert found[0] > found[1]
    assert found[2] > found[3]


def test_where_the_peers_differ() -> None:
    """Votes and divisors of PEFT and mergekit, by hand."""
    values, weights = [[3.0, 1.0], [-1.0, 1.0], [0.0, 5.0]], [0.5, 4.0, 0.0]
    parts = [part(np.array(value), weight) for value, weight in zip(values, weights, strict=True)]
    # PEFT: 3 - 1 elects plus, and the adapter of weight 0 counts where it agrees.
    assert [1.5, 4.5 / 3] == joined("ties", parts).tolist()
    # mergekit: 1.5 - 4 elects minus, and the weights of those that agree are the divisor.
    assert [-1.0, 1.0] == joined("ties", parts, semantics="mergekit").tolist()
    assert [1.5, 4.5] == joined("ties", parts, normalize=False).tolist()
    assert [-4.0, 4.5] == joined("ties", parts, semantics="mergekit", normalize=False).tolist()
    # So small a density takes all in PEFT; mergekit leaves each adapter one, of equal ones the first.
    assert not joined("ties", parts, density=0.01).any()
    assert [-1.0, 0.0] == joined("ties", parts, density=0.01, semantics="mergekit").tolist()


def test_weights_that_cancel() -> None:
    """0.1 + 0.2 - 0.3 is 5.6e-17 in one order and 2.8e-17 in another one; it is no divisor."""
    values = [np.array([1.0]), np.array([1.0]), np.array([-1.0])]
    parts = [part(value, weight) for value, weight in zip(values, [0.1, 0.2, -0.3], strict=True)]
    found = joined("ties", parts, semantics="mergekit")
    np.testing.assert_allclose(found, [0.6])
    assert np.array_equal(found, joined("ties", parts[::-1], semantics="mergekit"))


BAD = [-0.1, 1.1, math.nan, math.inf, "x", None]


@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("name", ["density", "gamma", "epsilon", "select_topk", "r", "rho_max", "lambda", "seed"])
def test_values_that_cannot_be(name: str, value: object) -> None:
    knowing = [method for method in METHODS.values() if name in method.options]
    assert knowing
    for method in knowing:
        unlimited = name in ("r", "rho_max", "lambda") or (name == "epsilon" and method.name.startswith("ram"))
        if (value == 1.1 and unlimited) or (value == -0.1 and name == "lambda"):
            assert method.settings({name: value})[name] == value
            continue
        with pytest.raises(SourceError, match=f"^{name}="):
            method.settings({name: value})


@pytest.mark.parametrize("name", ["of", "semantics", "majority_sign"])
def test_words_that_cannot_be(name: str) -> None:
    for method in METHODS.values():
        if name in method.options:
            with pytest.raises(SourceError, match="not one of"):
                method.settings({name: "nonsense"})


def philox(key: int, count: int) -> list[int]:
    """The outputs of Philox 4x64-10 as its paper has it (Salmon and others, 2011), counters from 1."""
    word = 2**64 - 1
    found: list[int] = []
    for counter in range(1, count // 4 + 2):
        c, k = [counter, 0, 0, 0], [key & word, key >> 64]
        for number in range(10):
            if number:
                k = [(k[0] + 0x9E3779B97F4A7C15) & word, (k[1] + 0xBB67AE8584CAA73B) & word]
            a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [b >> 64 ^ c[1] ^ k[0], b & word, a >> 64 ^ c[3] ^ k[1], a & word]
        found += c
    return found[:count]


def test_uniform_is_the_same_everywhere() -> None:
    """The key and the stream, made without numpy's generator."""
    import hashlib

    indices, values = np.array([2, 5, 6, 11, 30]), np.float32([1, -2, 3, 0.5, 7])
    tensor = SparseTensor("layer.0", (4, 8), indices, values, value_kind="delta")
    digests = [hashlib.sha256(array.tobytes()).hexdigest() for array in (indices, values)]
    key = hashlib.sha256("\n".join(["17", "0", *digests, "layer.0"]).encode()).digest()
    expected = [raw // 2**11 / 2**53 for raw in philox(int.from_bytes(key[:16], "little"), 5)]
    assert expected == uniform(AlignedEntries.of([Contribution(tensor)]), 0, 17).tolist()


def test_uniform_belongs_to_the_content() -> None:
    rng = np.random.default_rng(0)
    one, other = part(rng.standard_normal((30, 40)), 0.5), part(rng.standard_normal((30, 40)), 0.5)
    alone = uniform(AlignedEntries.of([one]), 0, 0)
    assert np.array_equal(alone, uniform(AlignedEntries.of([other, one]), 1, 0))
    heavier = Contribution(one.tensor, 0.7)
    for parts in ([one, heavier], [heavier, one]):
        together = AlignedEntries.of(parts)
        numbers = {one.weight: uniform(together, at, 0) for at, one in enumerate(parts)}
        assert np.array_equal(numbers[0.5], alone)  # of equal ones that of the smaller weight is the first
        assert not np.isclose(numbers[0.7], alone).any()
    elsewhere = SparseTensor("v", one.tensor.shape, one.tensor.indices, one.tensor.values, value_kind="delta")
    for found in (
        uniform(AlignedEntries.of([one]), 0, 1),
        uniform(AlignedEntries.of([Contribution(elsewhere)]), 0, 0),
    ):
        assert not np.isclose(found, alone).any()
    assert 0 <= alone.min() < 0.01
    assert 0.99 < alone.max() < 1
    assert abs(alone.mean() - 0.5) < 5 / math.sqrt(12 * alone.size)


@given(parts=adapters())
def test_dense_there_and_back(parts: list[Contribution]) -> None:
    """What these tests stand on."""
    for one in parts:
        assert np.array_equal(dense(part(dense(one))), dense(one))
