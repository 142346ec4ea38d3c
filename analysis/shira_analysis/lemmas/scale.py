"""Lemma 4.3: no scale that depends on the rank.

LoRA's update ``s B A`` starts with ``B = 0``, and its first step of SGD changes the outputs for an example x with error e by
``-lr s^2 e |A x|^2``: a sum of r terms, which is why s decreases with r. SHiRA's first step changes an entry by ``-lr e_i x_j``,
whatever else is trained, and the outputs by ``-lr e_i`` times the sum of ``x_j^2`` over the trained columns of row i: a sum over trained
entries. The number of trained entries in a row takes the place of r; the rank of the mask does not appear.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from shira_analysis.lemmas.exact import rank
from shira_analysis.lemmas.report import Check, Counterexample, LemmaReport, Reading, rows_of
from shira_analysis.lemmas.samples import KINDS, Mask, Setting, case_name, integers, mask

Floats = npt.NDArray[np.float64]

_EPSILON = float(np.finfo(np.float64).eps)


def first_steps(made: Mask, gradient: Floats) -> tuple[Floats, Floats]:
    """The first step of SGD (lr 1) and of Adam (lr 1, eps 1e-8) on the entries of a mask, as dense matrices ``[out, in]``."""
    sgd = np.where(made, -gradient, 0.0)
    first, second = 0.1 * gradient / (1 - 0.9), 0.001 * gradient**2 / (1 - 0.999)
    return sgd, np.where(made, -first / (np.sqrt(second) + 1e-8), 0.0)


def stable_step(made: Mask, inputs: Floats) -> float:
    """The largest stable learning rate of SGD on ``1/2 |W X - Y|^2``: 2 / max over rows of lambda_max(X_C X_C^T)."""
    return 2 / max(float(np.linalg.norm(inputs[row], 2)) ** 2 for row in made if row.any())


def check(setting: Setting) -> LemmaReport:
    """Check lemma 4.3."""
    random = setting.random(3)
    report = LemmaReport(
        "4.3",
        "the scale does not depend on rank",
        "SHiRA's scale does not depend on the rank, and can be 1.",
        "Per entry: the first step of SGD or Adam changes a trained entry by the same amount in every mask that has it, whatever the rank of "
        "the mask. But a layer's outputs sum over trained entries: on the training example the change "
        "is proportional to the sum of x_j^2 over a row's trained entries, and on other inputs (independent signs) its mean square is the "
        "sum of squares of the row's changes, so it grows with the square root of their number. What LoRA's scale does for r, the "
        "learning rate must do for the entries per row: the largest stable rate never increases as entries are added.",
        "true per entry; the learning rate takes the role of the scale",
    )
    entry = Check("an entry's first step, SGD and Adam, is bit-identical in every mask: entries that differ", "=", exact=True)  # fmt: skip
    output = Check("change of the outputs on the training example = -lr e_i * sum of x_j^2 over C_i: outputs that differ", "=", exact=True)  # fmt: skip
    ranks = Check(
        "masks with equal counts per row but different ranks, x = +-1: outputs that differ", "=", exact=True
    )
    spread = Check(
        "sum over all 2^n sign vectors of (S x)_i^2 = 2^n * sum of S_ij^2: rows that differ", "=", exact=True
    )
    stable = Check(
        "nested masks: largest stable learning rate of the larger mask <= that of the smaller", "<=", exact=False
    )
    lora = Check(
        "LoRA, one step, s = 1: change on the training example = -lr e_i |A x|^2, a sum over r", "=", exact=True
    )
    shapes = [(8, 10), (24, 16)] if setting.quick else [(8, 10), (24, 16), (64, 96), (128, 64)]
    for kind in KINDS:
        for shape in shapes:
            made = mask(kind, shape, 0.1, random)
            where = case_name(kind, shape, made)
            x, error = integers((shape[1],), random), integers((shape[0],), random)
            gradient = np.outer(error, x)
            larger = made | mask("uniform", shape, 0.3, random)
            small, big = first_steps(made, gradient.astype(float)), first_steps(larger, gradient.astype(float))
            entry.add(sum(int((a[made] != b[made]).sum()) for a, b in zip(small, big, strict=True)), 0, where)
            step = np.where(made, -gradient, 0)
            output.add(int((step @ x != -error * (made * x**2).sum(axis=1)).sum()), 0, where)
            inputs = random.standard_normal((shape[1], 12)) + random.standard_normal((shape[1], 1))
            stable.add(stable_step(larger, inputs), stable_step(made, inputs), where, 64 * _EPSILON * max(shape))
            narrow = mask(kind, (shape[0], 10), 0.2, random)
            signs = np.array(np.meshgrid(*[[-1, 1]] * 10)).reshape(10, -1)
            changed = np.where(narrow, integers(narrow.shape, random), 0)
            sums = ((changed @ signs) ** 2).sum(axis=1)
            spread.add(
                int((sums != 2**10 * (changed**2).sum(axis=1)).sum()), 0, case_name(kind, narrow.shape, narrow)
            )
    _different_ranks(ranks, setting, random)
    for count in (1, 2, 4, 16, 64):
        a, x, e = integers((count, 12), random), integers((12,), random), int(integers((1,), random)[0])
        # B = 0 gets the gradient e (A x)^T, so that B A x = -e (A x)^T A x.
        found = -e * (a @ x) @ (a @ x)
        lora.add(int(found), -e * sum(int(row @ x) ** 2 for row in a), f"r = {count}")
    report.checks += [entry, output, ranks, spread, stable, lora]
    _files(setting, report, random)
    report.measured += _growth(setting, random)
    report.readings += [
        Reading(
            "an entry's first step depends neither on the rank nor on the number of trained entries",
            "holds",
            "bit for bit; later steps depend on the other entries",
        ),
        Reading(
            "the scale does not depend on the rank",
            "holds",
            "masks with equal entries per row and ranks from 1 to n change the outputs alike",
        ),
        _diverges(),
    ]
    return report


def _different_ranks(ranks: Check, setting: Setting, random: np.random.Generator) -> None:
    """The same number of entries in each row: in the same columns (step of rank 1), or shifted by one column per row (full rank)."""
    for side in (5, 12) if setting.quick else (5, 12, 31, 64):
        for count in sorted({1, 2, side // 3}):
            same = np.zeros((side, side), bool)
            same[:, :count] = True
            shifted = np.array([np.roll(same[0], row) for row in range(side)])
            x, error = random.choice(np.array([-1, 1]), side), integers((side,), random)
            changes = [np.where(made, -np.outer(error, x), 0) for made in (same, shifted)]
            low, high = (rank(change) for change in changes)
            where = f"{side}x{side}, {count} per row, ranks {low} and {high}"
            ranks.add(int((changes[0] @ x != changes[1] @ x).sum()) + (low >= high), 0, where)


def _files(setting: Setting, report: LemmaReport, random: np.random.Generator) -> None:
    if not setting.files:
        return
    output = Check(
        "files: change of the outputs on the training example, as above: outputs that differ", "=", exact=True
    )
    for update in setting.updates(2 if setting.quick else 8):
        x = random.integers(-9, 10, update.shape[1])
        error = random.integers(-9, 10, update.shape[0])
        step = -error[update.row] * x[update.column]
        change = np.zeros(update.shape[0], np.int64)
        np.add.at(change, update.row, step * x[update.column])
        sums = np.zeros(update.shape[0], np.int64)
        np.add.at(sums, update.row, x[update.column] ** 2)
        output.add(int((change != -error * sums).sum()), 0, update.where)
        counts = np.bincount(update.row, minlength=update.shape[0])
        counts = counts[counts > 0]
        report.of_files.append((update.where, f"trained entries per row: mean {counts.mean():.1f}, maximum {counts.max():,}: for inputs of equal size, a step moves the output of the fullest row {counts.max() / counts.mean():.1f} times as far as the mean"))  # fmt: skip
    report.checks.append(output)


def _growth(setting: Setting, random: np.random.Generator) -> list[tuple[str, str]]:
    """The power of the number of trained entries, or of r, with which the first step grows: log-log slopes."""
    side, repeats = (128, 8) if setting.quick else (256, 32)
    counts = np.array([2, 4, 8, 16, 32, 64])
    made: dict[str, list[float]] = {}
    for count in counts:
        totals: dict[str, float] = {}
        for _ in range(repeats):
            x, other = random.standard_normal((2, side))
            error = random.standard_normal(side)
            trained = np.argpartition(random.random((side, side)), int(count), axis=1)[:, :count]
            chosen = np.zeros((side, side), bool)
            np.put_along_axis(chosen, trained, True, axis=1)
            sgd, adam = first_steps(chosen, np.outer(error, x))
            for name, step in (("SGD", sgd), ("Adam", adam)):
                _add(totals, f"{name}, entries", np.abs(step[chosen]).mean())
                _add(totals, f"{name}, outputs on the training example", np.abs(step @ x).mean())
                _add(totals, f"{name}, outputs on another input", np.abs(step @ other).mean())
            a = random.uniform(-1, 1, (int(count), side)) * math.sqrt(3 / side)
            gradient = np.outer(error, a @ x)
            scales: list[tuple[str, Callable[[float], float]]] = [("1", lambda _: 1.0), ("alpha/sqrt r", lambda r: 16 / math.sqrt(r)), ("alpha/r", lambda r: 16 / r)]  # fmt: skip
            for name, scale in scales:
                s = scale(float(count))
                _add(totals, f"LoRA, SGD, s = {name}", s * np.abs(s * gradient @ (a @ x)).mean())
                _add(totals, f"LoRA, Adam, s = {name}", s * np.abs(np.sign(gradient) @ (a @ x)).mean())
        for name, total in totals.items():
            made.setdefault(name, []).append(total / repeats)
    slope = {name: float(np.polyfit(np.log(counts), np.log(values), 1)[0]) for name, values in made.items()}
    headings = [f"SHiRA, first step: power of the entries per row (2 to 64 of {side}) with which it grows", "LoRA, first step: power of r (2 to 64) with which the outputs on the training example change"]  # fmt: skip
    return [
        (headings[0], "; ".join(f"{name}: {value + 0.0:.2f}" for name, value in slope.items() if "LoRA" not in name)),
        (headings[1], "; ".join(f"{name.removeprefix('LoRA, ')}: {value + 0.0:.2f}" for name, value in slope.items() if "LoRA" in name)),
    ]  # fmt: skip


def _add(totals: dict[str, float], name: str, value: float | np.floating[Any]) -> None:
    totals[name] = totals.get(name, 0.0) + float(value)


def _diverges() -> Reading:
    """The smallest layer with one output where lr 1 converges with one trained entry but not with all."""
    for width in range(2, 5):
        errors = {count: [(1 - count) ** step for step in range(4)] for count in (1, width)}
        if errors[1][-1] == 0 and abs(errors[width][-1]) >= abs(errors[width][0]):
            return Reading(
                "scale 1 at one learning rate works for any number of trained entries",
                "fails",
                "with k trained entries in a row and inputs 1, a step multiplies the error by 1 - lr k; the scale or the rate must decrease with k, not with the rank",
                Counterexample(
                    "layers with one output, by number of inputs, w = 0, target 1, lr 1, loss (w x - 1)^2 / 2",
                    {"one": rows_of([[1] + [0] * (width - 1)]), "all": rows_of([[1] * width]), "x": rows_of([[1]] * width)},
                    (
                        "gradient = (w x - 1) x^T on the trained entries; the masks 'one' and 'all' both have rank 1",
                        f"one: errors of steps 0, 1, 2, 3: {', '.join(map(str, errors[1]))}: converged after one step",
                        f"all: {', '.join(map(str, errors[width]))}: never converges; with three inputs 1, -2, 4, -8: diverges",
                    ),
                ),
            )  # fmt: skip
    raise AssertionError
