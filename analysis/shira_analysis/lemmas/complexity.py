"""Lemma 4.1: how many numbers an adapter has, and in how many directions training can move it.

A linear layer ``y = W x`` with squared loss has the gradient ``G = E X^T`` for inputs ``X [in, examples]`` and errors
``E = W X - Y``. A step of SGD on the entries of a mask M is ``-lr * (M o G)``. Row i of it is ``e_i X^T`` on the columns ``C_i`` that
the mask has in that row, so that over all errors it fills a space of dimension ``rank X[C_i, :]``, and all rows together

    freedom(M, X) = sum over rows i of rank X[C_i, :]  <=  nnz(M),

which is also the rank of the Jacobian of the outputs by the trained entries. That, and not nnz, is what data let training learn.

Errors are not always free. If a linear teacher T without noise gives the targets, ``G = D X X^T`` with ``D = W - T``, and the steps from
one W fill the image of ``C -> sym(D^T C)`` over all C on the mask, which is smaller where ``D^T C`` can be antisymmetric.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shira_analysis.lemmas.exact import rank
from shira_analysis.lemmas.report import Check, Counterexample, LemmaReport, Reading, rows_of
from shira_analysis.lemmas.samples import KINDS, Integers, Mask, Setting, case_name, integers, mask

DATA = ("generic", "dead inputs", "repeated inputs", "few examples")


def freedom(made: Mask, inputs: Integers) -> int:
    """The sum over rows of the rank of ``inputs [in, examples]`` at the row's trained columns, exact."""
    return sum(rank(inputs[row]) for row in made if row.any())


def steps_span(made: Mask, inputs: Integers, random: np.random.Generator, batch: int) -> int:
    """The dimension of what steps of SGD span: many batches out of ``inputs``, noisy targets, one W.

    Each batch comes often enough, with other targets, that rows do not share their errors.

    Args:
        made: the mask ``[out, in]``.
        inputs: ``[in, examples]``.
        random: for W and the targets.
        batch: examples in a batch; all of ``inputs`` if it has no more.
    """
    weight = integers(made.shape, random)
    examples = inputs.shape[1]
    size = min(batch, examples)
    found = []
    for step in range(examples * (made.shape[0] + 1)):
        x = inputs[:, (step + np.arange(size)) % examples]
        errors = weight @ x - random.integers(-9999, 10000, (made.shape[0], size))
        found.append((errors @ x.T)[made])
    return rank(np.array(found))


def teacher_span(made: Mask, difference: Integers, random: np.random.Generator) -> tuple[int, int]:
    """Dimensions, exact: of the steps from one W towards a linear teacher without noise, and of the image of sym(D^T C)."""
    found = []
    for _ in range(int(made.sum()) + 4):
        x = random.integers(-9, 10, (made.shape[1], 2))
        found.append((difference @ x @ x.T)[made])
    upper = np.triu_indices(made.shape[1])
    image = []
    for row, column in np.argwhere(made):
        product = np.zeros((made.shape[1], made.shape[1]), np.int64)
        product[:, column] = difference[row]
        image.append((product + product.T)[upper])
    return rank(np.array(found)), rank(np.array(image))


def adam_steps(made: Mask, inputs: Integers, random: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
    """The updates ``[count, nnz]`` of Adam (betas 0.9 and 0.999, eps 1e-8, lr 1e-2, no weight decay), four examples a batch."""
    weight = random.standard_normal(made.shape)
    first, second = np.zeros(int(made.sum())), np.zeros(int(made.sum()))
    found = []
    for step in range(1, count + 1):
        x = inputs[:, random.permutation(inputs.shape[1])[:4]].astype(np.float64)
        errors = weight @ x - random.standard_normal((made.shape[0], x.shape[1]))
        gradient = (errors @ x.T)[made]
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        update = -1e-2 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        weight[made] += update
        found.append(update)
    return np.array(found)


def data(kind: str, made: Mask, random: np.random.Generator) -> Integers:
    """Inputs ``[in, examples]`` of a kind; more examples than a row of the mask has entries, unless there are to be few."""
    width = made.shape[1]
    fullest = int(made.sum(axis=1).max())
    inputs = integers((width, fullest + 2), random)
    if kind == "dead inputs":
        inputs[random.choice(width, max(1, width // 4), replace=False)] = 0
    elif kind == "repeated inputs":
        inputs[random.integers(width, size=width // 2)] = inputs[0]
    elif kind == "few examples":
        inputs = inputs[:, : max(1, fullest // 2)]
    return inputs


def check(setting: Setting) -> LemmaReport:
    """Check lemma 4.1."""
    random = setting.random(1)
    report = LemmaReport(
        "4.1",
        "parameter complexity and learning complexity",
        "Both complexities of a SHiRA adapter equal its number of non-zero entries.",
        "The number of values is nnz of the mask (their places come on top: log2 C(mn, nnz) bits). What training can learn is "
        "freedom(M, X) = sum over rows i of rank X[C_i, :], with C_i the trained columns of row i and X all inputs ever seen. It is at most "
        "nnz, and equals it exactly if in each row the trained inputs are linearly independent over the data; so at least as many "
        "examples are needed as the fullest row has entries. One batch of b gives at most sum of min(|C_i|, b).",
        "an upper bound; equality for data in general position alone",
    )
    spans = Check("span of SGD steps over many batches, noisy targets = freedom(M, X)", "=", exact=True)
    generic = Check("freedom(M, X) = nnz, data in general position", "=", exact=True)
    never = Check("freedom(M, X) <= nnz, any data", "<=", exact=True)
    single = Check(
        "one batch of b over all targets: span = sum of min(|C_i|, b), general position", "=", exact=True
    )
    teacher = Check("noiseless linear teacher, one W: span = rank of C -> sym(D^T C)", "=", exact=True)
    dense = Check("  the same, all entries of n x n trained: n(n+1)/2", "=", exact=True)
    moved = Check("Adam moves the entries with an input that is not always 0, and no others", "=", exact=True)
    adam = Check("Adam, data in general position: nnz-th singular value of its steps is not 0", "<=", exact=False)
    shapes = [(6, 6), (5, 9), (9, 5)] if setting.quick else [(6, 6), (5, 9), (9, 5), (16, 16), (12, 24), (24, 12)]
    densities = (0.1, 0.3) if setting.quick else (0.05, 0.1, 0.3)
    for kind in KINDS:
        for shape in shapes:
            for density in densities:
                made = mask(kind, shape, density, random)
                nnz, where = int(made.sum()), case_name(kind, shape, made)
                for what in DATA:
                    inputs = data(what, made, random)
                    free = freedom(made, inputs)
                    never.add(free, nnz, f"{where}, {what}")
                    # Batches of several examples, and also of one.
                    batch = int(random.integers(1, 4))
                    spans.add(steps_span(made, inputs, random, batch), free, f"{where}, {what}")
                    if what == "generic":
                        generic.add(free, nnz, where)
                    live = inputs.any(axis=1)
                    updates = adam_steps(made, inputs, random, 8)
                    if what in ("generic", "dead inputs"):
                        moved.add(
                            int(np.abs(updates).any(axis=0).sum()), int((made & live).sum()), f"{where}, {what}"
                        )
                size = int(random.integers(1, 4))
                one = integers((shape[1], size), random, 999)
                rows = made.sum(axis=1)
                single.add(
                    steps_span(made, one, random, size), int(np.minimum(rows, size).sum()), f"{where}, b = {size}"
                )
                found, due = teacher_span(made, integers(shape, random), random)
                teacher.add(found, due, where)
                if nnz <= 80:
                    values = np.linalg.svd(
                        adam_steps(made, data("generic", made, random), random, 3 * nnz + 8), compute_uv=False
                    )
                    noise = 64 * float(np.finfo(np.float64).eps) * max(nnz, 8) * float(values[0])
                    # Not 0 means: above what rounding can make of 0.
                    adam.add(noise, float(values[nnz - 1]), where, allowed=1e-300)
    for side in (2, 3, 4) if setting.quick else (2, 3, 4, 5, 6, 7):
        full = np.ones((side, side), bool)
        found, _ = teacher_span(full, _invertible(side, random), random)
        dense.add(found, side * (side + 1) // 2, f"{side}x{side}")
    report.checks += [spans, never, generic, single, teacher, dense, moved, adam]
    _files(setting, report, random)
    report.readings += [
        Reading(
            "the number of trained values is nnz",
            "holds",
            "a count; the places of the entries are further data, in the file and in memory",
        ),
        _repeated(),
        Reading("at most nnz directions", "holds", "a masked step is 0 outside the mask, with SGD as with Adam"),
        _symmetric(),
    ]
    return report


def _invertible(side: int, random: np.random.Generator) -> Integers:
    while True:
        found = integers((side, side), random)
        if rank(found) == side:
            return found


def _files(setting: Setting, report: LemmaReport, random: np.random.Generator) -> None:
    if not setting.files:
        return
    count = Check("files: entries that change <= values stored", "<=", exact=True)
    full = Check(
        "files: rank of the trained inputs = entries, the four fullest rows of at most 256", "=", exact=True
    )
    for update in setting.updates(2 if setting.quick else 8):
        changed = update.indices.size if update.values is None else int(np.count_nonzero(update.values))
        count.add(changed, update.indices.size, update.where)
        counts = np.bincount(update.row, minlength=update.shape[0])
        for size in np.sort(counts[counts <= 256])[-4:]:
            if size:
                full.add(rank(integers((int(size), int(size)), random, 999)), int(size), update.where)
        few = [f"{int(np.minimum(counts, batch).sum()):,} with {batch}" for batch in (1, 32, 1024)]
        report.of_files.append((update.where, f"{update.indices.size:,} entries; free directions in one batch in general position: {', '.join(few)} tokens; all from {int(counts.max())} tokens on"))  # fmt: skip
    report.checks.append(count)
    if full.cases:
        report.checks.append(full)


def _repeated() -> Reading:
    """The smallest layer with live inputs in which training has fewer directions than entries, by trying all."""
    for tried, width in enumerate(range(1, 4), 1):
        made, inputs = np.ones((1, width), bool), np.ones((width, 1), np.int64)
        if (free := freedom(made, inputs)) < width:
            return Reading(
                "training has nnz degrees of freedom, whatever the data",
                "fails",
                "inputs that depend on each other, dead inputs, or fewer examples than a row has entries take some away",
                Counterexample(
                    f"layers of one output, all entries trained, every input 1; number {tried} of them by size",
                    {"M": rows_of(made.astype(int)), "X": rows_of(inputs)},
                    (
                        "two inputs that are always equal: the gradient is e X^T = (e, e) for every error e",
                        f"nnz = {width}, but all steps are multiples of (1, 1): freedom = rank X = {free}",
                        "(with 1 x 1 and an input that is always 0, it is 0 of 1)",
                    ),
                ),
            )
    raise AssertionError


def _symmetric() -> Reading:
    """Steps towards a noiseless teacher: the smallest mask by number of entries, of those of 2 x 2, in dictionary order."""
    difference = np.eye(2, dtype=np.int64)
    masks = sorted((np.array([(bits >> k) & 1 for k in range(4)], bool).reshape(2, 2) for bits in range(1, 16)), key=lambda m: int(m.sum()))  # fmt: skip
    for tried, made in enumerate(masks, 1):
        found, _ = teacher_span(made, difference, np.random.default_rng(0))
        if found < made.sum():
            return Reading(
                "the steps from one W span nnz directions if the data are in general position",
                "fails",
                "for targets T x without noise: G = (W - T) X X^T, where X X^T is symmetric; with noise in the targets it holds",
                Counterexample(
                    f"all 15 masks of 2 x 2 by number of entries, W - T = I; number {tried}",
                    {"M": rows_of(made.astype(int)), "W - T": rows_of(difference)},
                    (
                        "the gradient for one input x is (W - T) x x^T = x x^T, which is symmetric",
                        "both trained entries get x1 x2 in every step:",
                        f"nnz = {int(made.sum())}, but all steps are multiples of one matrix: span {found}",
                    ),
                ),
            )
    raise AssertionError
