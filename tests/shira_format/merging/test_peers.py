"""Our methods on sparse deltas give what PEFT and mergekit give on the same deltas made dense."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from peft.utils import merge_utils

from shira_format.entries.aligned import AlignedEntries, Contribution, Floats
from shira_format.entries.mixing import mix
from shira_format.merging.methods import METHODS
from shira_format.merging.methods.randomness import uniform
from tests.shira_format.merging.cases import DENSITIES, SHAPES, adapters, dense, joined, part

SEED = 5
densities = st.sampled_from(DENSITIES) | st.floats(0, 1)
majorities = st.sampled_from(["total", "frequency"])
switches = st.booleans()
lambdas = st.sampled_from([1.0, 0.5, -2.0])


@pytest.fixture(scope="module")
def mergekit() -> Any:
    """Its methods, if it is installed; with --no-deps and pydantic that is quick."""
    return pytest.importorskip("mergekit.merge_methods", reason="mergekit is not installed")


def tensors(parts: list[Contribution]) -> list[torch.Tensor]:
    return [torch.from_numpy(dense(part)) for part in parts]


def weights(parts: list[Contribution]) -> list[float]:
    return [part.weight for part in parts]


def masks(parts: list[Contribution], densities: Any = ()) -> Callable[[torch.Tensor], torch.Tensor]:
    """A stand-in for torch.bernoulli that draws what we draw for one adapter after the other.

    Of ``densities`` of their own, those of 0 and 1 need no numbers.
    """
    together = AlignedEntries.of(parts)

    def drawn() -> Iterator[torch.Tensor]:
        for number, one in enumerate(parts):
            if densities and not 0 < densities[number] < 1:
                continue
            numbers = np.full(one.tensor.numel, 0.5)
            numbers[one.tensor.indices] = uniform(together, number, SEED)
            yield torch.from_numpy(numbers)

    order = drawn()
    return lambda chance: (next(order).reshape(chance.shape) < chance).to(chance.dtype)


def peft(name: str, parts: list[Contribution], *options: Any) -> Floats:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(torch, "bernoulli", masks(parts))
        warnings.filterwarnings("ignore", message="The density 1")
        found = getattr(merge_utils, name)(
            tensors(parts), torch.tensor(weights(parts), dtype=torch.float64), *options
        )
    return found.numpy()


def kit(mergekit: Any, name: str, parts: list[Contribution], **parameters: Any) -> Floats:
    """What mergekit makes of a base of zeros and models that are the deltas."""
    method = mergekit.get(name)
    if parameters.pop("majority_sign", "total") == "frequency":  # it has the code, and no method that uses it
        method = dataclasses.replace(method, consensus_method="count")
    models = [torch.zeros(parts[0].tensor.shape, dtype=torch.float64), *tensors(parts)]
    with pytest.MonkeyPatch.context() as patch:
        density = parameters.get("density")
        patch.setattr(torch, "bernoulli", masks(parts, density if isinstance(density, list) else ()))
        return mergekit.merge_tensors(models, method, base_index=0, parameters=parameters).numpy()


def close(method: str, parts: list[Contribution], theirs: Floats, **options: Any) -> None:
    """Ours is theirs to the rounding of float32, in which mergekit computes what it drops at random."""
    together, chosen = AlignedEntries.of(parts), METHODS[method]
    factors = chosen.factors(together, chosen.settings(options))
    result = mix(together, factors, self_contained=False)
    ours = np.zeros(together.shape) if result is None else dense(Contribution(result))
    added = np.zeros(together.numel)
    added[together.indices] = together.sum(
        [np.abs(factor * delta) for factor, delta in zip(factors, together.deltas, strict=True)]
    )
    # Relative to what was added up, as sums may cancel.
    np.testing.assert_array_less(np.abs(ours - theirs), 1e-6 * added.reshape(together.shape) + 1e-30)


@given(parts=adapters(), density=densities)
def test_peft_magnitude_prune(parts: list[Contribution], density: float) -> None:
    close("magnitude_prune", parts, peft("magnitude_prune", parts, density), density=density)


@given(parts=adapters(), density=densities, majority=majorities)
def test_peft_ties(parts: list[Contribution], density: float, majority: str) -> None:
    close("ties", parts, peft("ties", parts, density, majority), density=density, majority_sign=majority)


@given(parts=adapters(), density=densities, majority=majorities)
def test_peft_dare(parts: list[Contribution], density: float, majority: str) -> None:
    own = {"density": density, "seed": SEED}
    if density == 0:  # PEFT divides 0 by 0, and everything is NaN
        assert np.isnan(peft("dare_linear", parts, density)).all()
        assert not joined("dare_linear", parts, **own).any()
        assert not joined("dare_ties", parts, **own).any()
        return
    close("dare_linear", parts, peft("dare_linear", parts, density), **own)
    close("dare_ties", parts, peft("dare_ties", parts, density, majority), **own, majority_sign=majority)


@given(parts=adapters())
def test_peft_task_arithmetic(parts: list[Contribution]) -> None:
    close("linear", parts, peft("task_arithmetic", parts))
    close("task_arithmetic", parts, peft("task_arithmetic", parts))


@given(parts=adapters(), density=densities)
def test_mergekit_defaults(mergekit: Any, parts: list[Contribution], density: float) -> None:
    """What mergekit does if it is told weights and a density alone."""
    told = {"weight": weights(parts), "density": density}
    own = {"density": density}
    close("task_arithmetic", parts, kit(mergekit, "task_arithmetic", parts, weight=weights(parts)))
    close("ties", parts, kit(mergekit, "ties", parts, **told), **own, semantics="mergekit")
    for name in ("dare_linear", "dare_ties"):
        close(name, parts, kit(mergekit, name, parts, **told), **own, seed=SEED, semantics="mergekit")
    for name in ("breadcrumbs", "breadcrumbs_ties"):
        close(name, parts, kit(mergekit, name, parts, **told), **own)


@given(
    parts=adapters(), density=densities, normalize=switches, rescale=switches, factor=lambdas, majority=majorities
)
def test_mergekit_options(
    mergekit: Any,
    parts: list[Contribution],
    density: float,
    normalize: bool,
    rescale: bool,
    factor: float,
    majority: str,
) -> None:
    common = {"density": density, "lambda": factor}
    told = {"weight": weights(parts), "normalize": normalize, "rescale": rescale, **common}
    close(
        "task_arithmetic",
        parts,
        kit(mergekit, "task_arithmetic", parts, **told),
        normalize=normalize,
        **{"lambda": factor},
    )
    close(
        "ties",
        parts,
        kit(mergekit, "ties", parts, **told, majority_sign=majority),
        semantics="mergekit",
        normalize=normalize,
        rescale=rescale,
        majority_sign=majority,
        **common,
    )
    own = {"semantics": "mergekit", "seed": SEED, "rescale": "norm" if rescale else "none", **common}
    close("dare_linear", parts, kit(mergekit, "dare_linear", parts, **told), normalize=normalize, **own)
    close(
        "dare_ties",
        parts,
        kit(mergekit, "dare_ties", parts, **told, majority_sign=majority),
        normalize=str(normalize).lower(),
        majority_sign=majority,
        **own,
    )


@given(
    parts=adapters(), density=densities, gamma=st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.8, 1.0]), normalize=switches,
    rescale=switches, factor=lambdas, majority=majorities,
)  # fmt: skip
def test_mergekit_breadcrumbs(
    mergekit: Any, parts: list[Contribution], density: float, gamma: float, normalize: bool, rescale: bool, factor: float, majority: str
) -> None:  # fmt: skip
    own = {"density": density, "gamma": gamma, "normalize": normalize, "rescale": rescale, "lambda": factor}
    told = {**own, "weight": weights(parts)}
    close("breadcrumbs", parts, kit(mergekit, "breadcrumbs", parts, **told), **own)
    close(
        "breadcrumbs_ties",
        parts,
        kit(mergekit, "breadcrumbs_ties", parts, **told, majority_sign=majority),
        majority_sign=majority,
        **own,
    )


@given(parts=adapters(), data=st.data())
def test_mergekit_with_a_density_for_each(mergekit: Any, parts: list[Contribution], data: st.DataObject) -> None:
    def each(values: list[float]) -> list[float]:
        return data.draw(st.lists(st.sampled_from(values), min_size=len(parts), max_size=len(parts)))

    own = {"density": each([0.1, 0.25, 0.5, 0.9, 1.0])}
    told = {"weight": weights(parts), **own}
    close("ties", parts, kit(mergekit, "ties", parts, **told), **own, semantics="mergekit")
    for name in ("dare_linear", "dare_ties"):
        close(name, parts, kit(mergekit, name, parts, **told), **own, seed=SEED, semantics="mergekit")
    gamma = {"gamma": each([0.0, 0.01, 0.1, 0.3])}
    for name in ("breadcrumbs", "breadcrumbs_ties"):
        close(name, parts, kit(mergekit, name, parts, **told, **gamma), **own, **gamma)
    # PEFT's have one density, and do the same if it is given for each.
    for name in ("magnitude_prune", "ties"):
        close(name, parts, joined(name, parts, density=0.25), density=[0.25] * len(parts))


# Of a row of one element mergekit makes NaN.
RANKED = [shape for shape in SHAPES if (shape if len(shape) == 1 else shape[1:])[0] > 1]


@given(parts=adapters(RANKED), density=st.sampled_from([0.0, 0.2, 0.3, 0.5, 0.84, 1.0]))
def test_mergekit_della_defaults(mergekit: Any, parts: list[Contribution], density: float) -> None:
    for name in ("della", "della_linear"):
        close(
            name,
            parts,
            kit(mergekit, name, parts, weight=weights(parts), density=density),
            density=density,
            seed=SEED,
        )


@given(
    parts=adapters(RANKED), density=st.sampled_from([0.3, 0.5, 0.7]), epsilon=st.sampled_from([0.0, 0.1, 0.29]),
    normalize=switches, rescale=switches, factor=lambdas, majority=majorities,
)  # fmt: skip
def test_mergekit_della(
    mergekit: Any, parts: list[Contribution], density: float, epsilon: float, normalize: bool, rescale: bool, factor: float,
    majority: str,
) -> None:  # fmt: skip
    told = {"density": density, "epsilon": epsilon, "normalize": normalize, "rescale": rescale, "lambda": factor}
    own = {**told, "seed": SEED}
    told["weight"] = weights(parts)
    close("della_linear", parts, kit(mergekit, "della_linear", parts, **told), **own)
    close(
        "della",
        parts,
        kit(mergekit, "della", parts, **told, majority_sign=majority),
        majority_sign=majority,
        **own,
    )


@given(parts=adapters(RANKED), data=st.data())
def test_mergekit_della_with_options_for_each(
    mergekit: Any, parts: list[Contribution], data: st.DataObject
) -> None:
    size = len(parts)
    own = {
        "density": data.draw(st.lists(st.sampled_from([0.3, 0.5, 0.7, 1.0]), min_size=size, max_size=size)),
        "epsilon": data.draw(st.lists(st.sampled_from([0.0, 0.1, 0.29]), min_size=size, max_size=size)),
    }
    for name in ("della", "della_linear"):
        close(name, parts, kit(mergekit, name, parts, weight=weights(parts), **own), **own, seed=SEED)


def weighted(parts: list[Contribution]) -> list[Contribution]:
    """Adapters whose deltas have their weights in them, as mergekit knows none in these methods; at least one."""
    assume(any(part.weight for part in parts))
    return [
        Contribution(
            type(part.tensor)(
                "w", part.tensor.shape, part.tensor.indices, part.delta * part.weight, value_kind="delta"
            )
        )
        for part in parts
        if part.weight
    ]


@given(parts=adapters(), share=densities)
def test_mergekit_sce(mergekit: Any, parts: list[Contribution], share: float) -> None:
    close("sce", parts, kit(mergekit, "sce", weighted(parts), select_topk=share), select_topk=share)


@given(
    parts=adapters(), epsilon=st.sampled_from([1e-5, 0.3, 1.0]), r=st.sampled_from([0.0, 0.1, 3.0]),
    most=st.sampled_from([0.0, 0.2, 5.0, 1e9]),
)  # fmt: skip
def test_mergekit_ram(mergekit: Any, parts: list[Contribution], epsilon: float, r: float, most: float) -> None:
    models = weighted(parts)
    close("ram", parts, kit(mergekit, "ram", models, epsilon=epsilon), epsilon=epsilon)
    close(
        "ramplus_tl",
        parts,
        kit(mergekit, "ramplus_tl", models, epsilon=epsilon, r=r, alpha=most),
        epsilon=epsilon,
        r=r,
        rho_max=most,
    )
    close("ramplus_tl", parts, kit(mergekit, "ramplus_tl", models))


def test_mergekit_limits(mergekit: Any) -> None:
    """Sums that are too small for mergekit to divide by them, and a count that it rounds."""
    value = np.random.default_rng(0).standard_normal(100)
    tiny = [part(value * 1e-10), part(value[::-1] * 1e-10, 0.5)]
    own = {"density": 0.5, "rescale": True}
    close("ties", tiny, kit(mergekit, "ties", tiny, weight=weights(tiny), **own), semantics="mergekit", **own)
    opposite = [part(value), part(value[::-1], -1 + 5e-9)]
    theirs = kit(mergekit, "task_arithmetic", opposite, weight=weights(opposite), normalize=True)
    close("task_arithmetic", opposite, theirs, normalize=True)
    half = np.arange(100) < 50
    uneven = [part(value * half), part(value * ~half * 1e-4)]
    for share in (1.0, 0.5, 0.29, 0.28):  # 100 * 0.29 is 28.999..., but 29 in float32
        close("sce", uneven, kit(mergekit, "sce", uneven, select_topk=share), select_topk=share)
        if share == 0.29:
            assert np.count_nonzero(joined("sce", uneven, select_topk=share)) == 29
