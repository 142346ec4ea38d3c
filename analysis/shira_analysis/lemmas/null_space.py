"""Lemma 4.4: adapters in each other's null space.

Two adapters on the same layer add the outputs ``a = S1 x`` and ``b = S2 x``; before the non-linearity there are no products of the two.
After it, the effect of one changes in the presence of the other by

    I = f(z + a + b) - f(z + a) - f(z + b) + f(z),   z = W x,

element by element, ``I_i = a_i b_i`` times an integral of f'' (if f has one), so it is 0 where a_i or b_i is. ``S1^T S2 = 0`` only says
that the *sum* over i of ``a_i b'_i`` is 0 for all inputs. In the power series it removes the second-order term if f'' and the weights
of the next layer are the same for all i, and no other term. I is 0 everywhere if no row is used by both adapters.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from shira_analysis.lemmas.orthogonality import pair_nnz
from shira_analysis.lemmas.report import Check, Counterexample, LemmaReport, Reading, rows_of
from shira_analysis.lemmas.samples import KINDS, Integers, Setting, integers, mask
from shira_format._core.arrays import distinct

Function = Callable[[Any], Any]

_EPSILON = float(np.finfo(np.float64).eps)


def relu(z: Any) -> Any:
    """The function max(z, 0)."""
    return np.maximum(z, 0)


def silu(z: Any) -> Any:
    """The function z / (1 + exp(-z)), without overflow."""
    return z * (0.5 + 0.5 * np.tanh(z / 2))


def softplus(z: Any) -> Any:
    """The function log(1 + exp(z)), without overflow."""
    return np.logaddexp(0.0, z)


# Smooth non-linearities, each with the maximum of |f''|.
SMOOTH: dict[str, tuple[Function, float]] = {
    "tanh": (np.tanh, 4 / 27**0.5),
    "silu": (silu, 0.5),
    "softplus": (softplus, 0.25),
}


def interaction(f: Function, z: Any, a: Any, b: Any) -> Any:
    """What is left of ``f(z + a + b)`` after both adapters' own effects: 0 if each acts as if alone.

    With the differences in this order it is exactly 0 where a or b is 0.
    """
    return (f(z + a + b) - f(z + a)) - (f(z + b) - f(z))


def orthogonal_pair(shape: tuple[int, int], random: np.random.Generator) -> tuple[Integers, Integers]:
    """Integers ``S1``, ``S2`` with ``S1^T S2 = 0`` that share rows: pairs of rows ``(u, u)`` and ``(v, -v)``."""
    half = (shape[0] + 1) // 2
    u, v = integers((half, shape[1]), random), integers((half, shape[1]), random)
    first, second = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for k in range(shape[0] // 2):
        first[2 * k : 2 * k + 2] = u[k], u[k]
        second[2 * k : 2 * k + 2] = v[k], -v[k]
    return first, second


def check(setting: Setting) -> LemmaReport:
    """Check lemma 4.4."""
    random = setting.random(4)
    report = LemmaReport(
        "4.4",
        "null spaces and interference",
        "If one adapter lies in the null space of the other, S1^T S2 = 0, the two do not interfere multiplicatively (by the power series "
        "of the non-linearity).",
        "S1^T S2 = 0 if and only if the outputs S1 x and S2 x' are orthogonal for all x and x' (for x = x' alone, S1^T S2 need only be "
        "antisymmetric). After a non-linearity the adapters act as if alone on every input if no row has entries of both; "
        "S1^T S2 = 0 with shared rows is not enough: it only removes the second-order term of a sum over rows with equal f'' and equal weights. "
        "In later layers the effects mix again. For adapters of consecutive layers the product is S2 S1, not S1^T S2.",
        "fails after a non-linearity; disjoint rows suffice for one layer",
    )
    inner = Check("S1^T S2 = 0: inner product of S1 x and S2 x' = 0", "=", exact=True)
    converse = Check("S1^T S2 != 0: unit vectors x, x' with inner product != 0 exist", "=", exact=True)
    same = Check("S1^T S2 antisymmetric: inner product of S1 x and S2 x (same x) = 0", "=", exact=True)
    rows = Check("no shared row: sum of |I| after ReLU and after z^2 = 0", "=", exact=True)
    smooth_rows = Check("  the same after tanh, SiLU, softplus: non-zero elements of I", "=", exact=True)
    least = Check("any pair, ReLU: largest |I_i| - min(|a_i|, |b_i|) <= 0", "<=", exact=True)
    curved = Check("any pair, smooth f: |I_i| <= max|f''| |a_i b_i|", "<=", exact=False)
    second = Check("f = z^2, equal weights: sum of I = 2 x^T S1^T S2 x", "=", exact=True)
    series = Check("consecutive linear layers: cross term = S2 S1 x: outputs that differ", "=", exact=True)
    shapes = [(6, 5), (16, 12)] if setting.quick else [(6, 5), (16, 12), (48, 64), (128, 96)]
    for kind in KINDS:
        for shape in shapes:
            where = f"{kind} {shape[0]}x{shape[1]}"
            made = [np.where(mask(kind, shape, 0.2, random), integers(shape, random), 0) for _ in range(2)]
            weight = integers(shape, random)
            for what, (s1, s2) in _pairs(made[0], made[1], shape, random):
                product = s1.T @ s2
                x, other = random.integers(-9, 10, (2, shape[1], 16))
                a, b, z = s1 @ x, s2 @ x, weight @ x
                name = f"{where}, {what}"
                if not product.any():
                    inner.add(int(np.abs((s1 @ x).T @ (s2 @ other)).sum()), 0, name)
                else:
                    at = np.argwhere(product)[0]
                    converse.add(int(bool((s1[:, at[0]] * s2[:, at[1]]).sum())), 1, name)
                least.add(
                    int((np.abs(interaction(relu, z, a, b)) - np.minimum(np.abs(a), np.abs(b))).max()), 0, name
                )
                second.add(int(interaction(np.square, z, a, b).sum()), 2 * int(((s1 @ x) * (s2 @ x)).sum()), name)
                for label, (f, most) in SMOOTH.items():
                    za, aa, ba = z / 16, a / 32, b / 32
                    found = np.abs(interaction(f, za, aa, ba))
                    limit = most * np.abs(aa * ba)
                    # Four values of f, each at most |z| + |a| + |b| + 1 and accurate to a few ulps.
                    allowed = 32 * _EPSILON * (np.abs(za) + np.abs(aa) + np.abs(ba) + 1)
                    worst = np.unravel_index(int((found - limit - allowed).argmax()), found.shape)
                    curved.add(float(found[worst]), float(limit[worst]), f"{name}, {label}", float(allowed[worst]))
                if not (s1.any(axis=1) & s2.any(axis=1)).any():
                    total = sum(int(np.abs(interaction(f, z, a, b)).sum()) for f in (relu, np.square))
                    rows.add(total, 0, name)
                    parts = [interaction(f, z / 16, a / 32, b / 32) for f, _ in SMOOTH.values()]
                    smooth_rows.add(sum(int(np.count_nonzero(part)) for part in parts), 0, name)
            side = shape[1]
            turned = np.triu(integers((side, side), random), 1)
            # S1 = P, a permutation with signs, and S2 = P (T - T^T), so that S1^T S2 is antisymmetric.
            permuted = np.eye(side, dtype=np.int64)[random.permutation(side)] * integers((side, 1), random, 1)
            x = random.integers(-9, 10, (side, 16))
            same.add(
                int(np.abs(((permuted @ x) * (permuted @ (turned - turned.T) @ x)).sum(axis=0)).sum()),
                0,
                f"{side}x{side}",
            )
            next_weight, s2 = (
                integers((4, shape[0]), random),
                np.where(mask("uniform", (4, shape[0]), 0.3, random), 5, 0),
            )
            whole = (next_weight + s2) @ (weight + made[0]) @ x - (next_weight + s2) @ weight @ x
            left = whole - next_weight @ (weight + made[0]) @ x + next_weight @ weight @ x
            series.add(int((left != s2 @ made[0] @ x).sum()), 0, where)
    report.checks += [inner, converse, same, rows, smooth_rows, least, curved, second, series]
    report.measured += _strengths(setting, random)
    _files(setting, report, random)
    report.readings += [
        Reading("the outputs of the two adapters are orthogonal", "holds", "for all pairs of inputs, if and only if S1^T S2 = 0"),
        _shared_rows(),
        Reading("no effect of one depends on the other, after one non-linearity, if they share no row", "holds", "exactly: each output is changed by at most one adapter; e.g. Struct without the diagonal, rows at different offsets"),
        _deeper_layers(),
        _consecutive_layers(),
    ]  # fmt: skip
    return report


def _pairs(s1: Integers, s2: Integers, shape: tuple[int, int], random: np.random.Generator) -> Iterator[tuple[str, tuple[Integers, Integers]]]:  # fmt: skip
    yield "random", (s1, s2)
    mine = random.random(shape[0]) < 0.5
    mine[:2] = True, False
    yield "disjoint rows", (s1 * mine[:, None], s2 * ~mine[:, None])
    yield "orthogonal, rows shared", orthogonal_pair(shape, random)


def _strengths(setting: Setting, random: np.random.Generator) -> list[tuple[str, str]]:
    """|I| relative to the smaller of the two adapters' own effects, for a layer with 256 outputs (64 if quick)."""
    side, examples = (64, 64) if setting.quick else (256, 256)
    found: dict[str, list[str]] = {}
    weight = random.standard_normal((side, side)) / side**0.5
    x = random.standard_normal((side, examples))
    wm = mask("WM", (side, side), 0.02, random)

    def values(made: npt.NDArray[np.bool_]) -> Any:
        return np.where(made, random.standard_normal((side, side)), 0) * 2 / side**0.5

    first, second = (np.zeros((side, side), bool) for _ in range(2))
    first[0::50], second[25::50] = True, True
    u, v = values(wm)[: side // 2], values(wm)[: side // 2]
    pairs = {
        "Struct rows, different offsets, no diagonal": (values(first), values(second)),
        "S1^T S2 = 0, rows shared": (np.concatenate([u, u]), np.concatenate([v, -v])),
        "uniform 2 %, independent": (values(mask("uniform", (side, side), 0.02, random)), values(mask("uniform", (side, side), 0.02, random))),
        "WM 2 %, same mask": (values(wm), values(wm)),
    }  # fmt: skip
    for name, (s1, s2) in pairs.items():
        z, a, b = weight @ x, s1 @ x, s2 @ x
        for label, f in (("ReLU", relu), ("SiLU", silu), ("tanh", np.tanh)):
            own = min(float(np.linalg.norm(f(z + a) - f(z))), float(np.linalg.norm(f(z + b) - f(z))))
            found.setdefault(name, []).append(
                f"{label} {float(np.linalg.norm(interaction(f, z, a, b))) / own:.3g}"
            )
    return [(f"|I| / smaller effect: {name}", ", ".join(parts)) for name, parts in found.items()] + _two_layers(
        pairs, weight, x, random
    )


def _two_layers(
    pairs: Mapping[str, tuple[Any, Any]],
    weight: Any,
    x: Any,
    random: np.random.Generator,
) -> list[tuple[str, str]]:
    """The same for the outputs of a network ``f(V f(W x))`` where the adapters change only the first layer."""
    side = len(weight)
    next_weight = random.standard_normal((side, side)) / side**0.5
    found = []
    for name, (s1, s2) in pairs.items():
        z, a, b = weight @ x, s1 @ x, s2 @ x
        parts = []
        for label, f in (("ReLU", relu), ("SiLU", silu), ("tanh", np.tanh)):

            def network(hidden: Any, f: Function = f) -> Any:
                return f(next_weight @ f(hidden))

            effects = [float(np.linalg.norm(network(z + one) - network(z))) for one in (a, b)]
            parts.append(f"{label} {float(np.linalg.norm(interaction(network, z, a, b))) / min(effects):.3g}")
        found.append((f"the same after a second layer and its non-linearity: {name}", ", ".join(parts)))
    return found


def _files(setting: Setting, report: LemmaReport, random: np.random.Generator) -> None:
    least = Check("files: |I_i| <= min(|a_i|, |b_i|), ReLU", "<=", exact=False)
    alone = Check("files: rows of only one adapter: outputs with I != 0", "=", exact=True)
    for first, second in setting.pairs(2 if setting.quick else 6):
        if first.values is None or second.values is None:
            report.notes.append(f"{first.where}: a mask has no values, so no effect")
            continue
        s1, s2 = first.matrix(), second.matrix()
        x = random.standard_normal((first.shape[1], 16))
        a, b, z = s1 @ x, s2 @ x, random.standard_normal((first.shape[0], 16))
        found = np.abs(interaction(relu, z, a, b))
        limit = np.minimum(np.abs(a), np.abs(b))
        allowed = 8 * _EPSILON * (np.abs(z) + np.abs(a) + np.abs(b))
        worst = np.unravel_index(int((found - limit - allowed).argmax()), found.shape)
        where = f"{first.where} with {second.source}"
        least.add(float(found[worst]), float(limit[worst]), where, float(allowed[worst]))
        shared = np.intersect1d(distinct(first.row), distinct(second.row), assume_unique=True)
        mine = np.setdiff1d(np.arange(first.shape[0]), shared, assume_unique=True)
        alone.add(int(np.count_nonzero(found[mine])), 0, where)
        product = pair_nnz(first, second)
        joint = (
            "is too large to count" if product is None else f"has {product:,} non-zeros of {first.shape[1] ** 2:,}"
        )
        own = min(float(np.linalg.norm(relu(z + a) - relu(z))), float(np.linalg.norm(relu(z + b) - relu(z))))
        relative = f"{float(np.linalg.norm(found)) / own:.3g}" if own else "no effect"
        report.of_files.append((where, f"{shared.size:,} of {first.shape[0]:,} rows shared; S1^T S2 {joint}; |I| / smaller effect, ReLU, z normal: {relative}"))  # fmt: skip
    report.checks += [check for check in (least, alone) if check.cases]


def _shared_rows() -> Reading:
    """A search of all layers of 1 x 1 and 2 x 1 with entries -1, 0, 1, fewest non-zeros first."""
    tried = 0
    for height in (1, 2):
        entries = sorted(itertools.product((0, 1, -1), repeat=3 * height), key=lambda e: sum(map(abs, e)))
        for values in entries:
            tried += 1
            weight, s1, s2 = np.array(values).reshape(3, height, 1)
            if (s1.T @ s2).any():
                continue
            found = interaction(relu, weight, s1, s2)[:, 0]
            if found.any():
                both = (relu(weight + s1 + s2), relu(weight + s1), relu(weight + s2), relu(weight))
                texts = [f"({', '.join(map(str, part[:, 0]))})" for part in both]
                return Reading(
                    "after a non-linearity one adapter's effect does not depend on the other if S1^T S2 = 0",
                    "fails",
                    "S1^T S2 sums over rows, but f acts on each row separately",
                    Counterexample(
                        f"all layers of 1 x 1 and 2 x 1 with entries -1, 0, 1, fewest non-zeros first; number {tried}; x = 1, ReLU",
                        {"W": rows_of(weight), "S1": rows_of(s1), "S2": rows_of(s2)},
                        (
                            f"S1^T S2 = {' + '.join(f'({p})({q})' for p, q in zip(s1[:, 0], s2[:, 0], strict=True))} = 0",
                            f"both: {texts[0]}; S1 alone: {texts[1]}; S2 alone: {texts[2]}; neither: {texts[3]}",
                            f"I = both - S1 alone - S2 alone + neither = ({', '.join(map(str, found))}), not 0",
                        ),
                    ),
                )
    raise AssertionError


def _deeper_layers() -> Reading:
    s1, s2, v = np.array([[1], [0]]), np.array([[0], [1]]), np.array([[1, 1]])
    zero = np.zeros((2, 1), np.int64)
    outputs = [int(relu(v @ relu(zero + change) - 1)[0, 0]) for change in (s1 + s2, s1, s2, zero)]
    found = outputs[0] - outputs[1] - outputs[2] + outputs[3]
    assert found
    return Reading(
        "adapters that share no row do not interact in deeper layers either",
        "fails",
        "the next layer adds rows of both, and its non-linearity acts on the sum",
        Counterexample(
            "by reasoning: two rows, one input, a second layer V with bias -1, ReLU after both; W = 0, x = 1",
            {"S1": rows_of(s1), "S2": rows_of(s2), "V": rows_of(v)},
            (
                f"outputs ReLU(V ReLU(S x) - 1): both {outputs[0]}, S1 alone {outputs[1]}, S2 alone {outputs[2]}, neither {outputs[3]}",
                f"I = {found}",
            ),
        ),
    )


def _consecutive_layers() -> Reading:
    """A search of all pairs of binary 2 x 2 matrices, fewest ones first."""
    grid = sorted(
        (np.array(bits).reshape(2, 2) for bits in itertools.product((0, 1), repeat=4)), key=lambda s: int(s.sum())
    )
    pairs = sorted(itertools.product(grid, repeat=2), key=lambda pair: int(pair[0].sum() + pair[1].sum()))
    for tried, (s1, s2) in enumerate(pairs, 1):
        if not (s1.T @ s2).any() and (s2 @ s1).any():
            return Reading(
                "S1^T S2 = 0 also keeps adapters of consecutive layers apart",
                "fails",
                "their product is S2 S1 (with a non-linearity between: S2 D S1, D its slopes)",
                Counterexample(
                    f"all pairs of binary 2 x 2 matrices, fewest ones first; number {tried}; S1 in the first layer, S2 in the second, no non-linearity",
                    {
                        "S1": rows_of(s1),
                        "S2": rows_of(s2),
                        "S1^T S2": rows_of(s1.T @ s2),
                        "S2 S1": rows_of(s2 @ s1),
                    },
                    ("(W2 + S2)(W1 + S1) x = W2 W1 x + W2 S1 x + S2 W1 x + S2 S1 x, and the last term is not 0",),
                ),
            )
    raise AssertionError
