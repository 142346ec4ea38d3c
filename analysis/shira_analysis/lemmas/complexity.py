"""Lemma 4.1: how many values an adapter has, and in how many directions training can move it.

A linear layer ``y = W x`` with squared loss has the gradient ``G = E X^T`` for inputs ``X [in, examples]`` and errors
``E = W X - Y``. A step of SGD on the entries of a mask M is ``-lr * (M o G)``. Row i of it is ``e_i X^T`` restricted to
``C_i``, the columns of the mask in that row, so that over all errors it spans a space of dimension ``rank X[C_i, :]``, and all rows
together span

    freedom(M, X) = sum over rows i of rank X[C_i, :]  <=  nnz(M),

which is also the rank of the Jacobian of the outputs with respect to the trained entries. This, not nnz, is the number of degrees of
freedom that the data allow.

The errors are not always arbitrary. If a noiseless linear teacher T gives the targets, ``G = D X X^T`` with ``D = W - T``, and the steps
from one W span the image of ``C -> sym(D^T C)`` over all C on the mask, which is smaller where ``D^T C`` can be antisymmetric.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shira_analysis.lemmas.exact import rank
from shira_analysis.lemmas.report import Check, Counterexample, LemmaReport, Reading, rows_of
from shira_analysis.lemmas.samples import KINDS, Integers, Mask, Setting, case_name, integers, mask

DATA = ("generic", "dead inputs", "repeated inputs", "few examples")


def freedom(made: Mask, inputs: Integers) -> int:
    """The sum over rows of the rank of ``inputs [in, examples]`` at the row's trained columns; exact."""
    return sum(rank(inputs[row]) for row in made if row.any())


def steps_span(made: Mask, inputs: Integers, random: np.random.Generator, batch: int) -> int:
    """The dimension of the span of SGD steps: many batches from ``inputs``, noisy targets, one W.

    Each batch is repeated with new targets, often enough that the errors of the rows are independent.

    Args:
        made: the mask ``[out, in]``.
        inputs: ``[in, examples]``.
        random: for W and the targets.
        batch: examples in a batch; all of ``inputs`` if there are fewer.
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
    """Exact dimensions: of the span of steps from one W towards a noiseless linear teacher, and of the image of sym(D^T C)."""
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
    """The updates ``[count, nnz]`` of Adam (betas 0.9 and 0.999, eps 1e-8, lr 1e-2, no weight decay), four examples per batch."""
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
    """Inputs ``[in, examples]`` of a kind of :data:`DATA`; more examples than any row of the mask has entries, except for "few examples"."""
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
        "The number of values is the nnz of the mask (the indices take another log2 C(mn, nnz) bits). The degrees of freedom of training are "
        "freedom(M, X) = sum over rows i of rank X[C_i, :], with C_i the trained columns of row i and X all inputs seen. This is at most "
        "nnz, with equality if and only if the inputs trained in each row are linearly independent over the data; that needs at least as many "
        "examples as the fullest row has entries. One batch of b examples gives at most the sum of min(|C_i|, b).",
        "an upper bound; equality only for data in general position",
    )
    spans = Check(
        "SGD, many batches, noisy targets: dimension of the span of steps = freedom(M, X)", "=", exact=True
    )
    generic = Check("data in general position: freedom(M, X) = nnz", "=", exact=True)
    never = Check("any data: freedom(M, X) <= nnz", "<=", exact=True)
    single = Check("one batch of b in general position, all targets: span = sum of min(|C_i|, b)", "=", exact=True)
    teacher = Check("noiseless linear teacher, one W: span = rank of C -> sym(D^T C)", "=", exact=True)
    dense = Check("  all entries of n x n trained: span = n(n+1)/2", "=", exact=True)
    moved = Check("Adam moves exactly the trained entries whose input is not always 0", "=", exact=True)
    adam = Check(
        "Adam, data in general position: the nnz-th singular value of its steps is not 0", "<=", exact=False
    )
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
                    # Not 0: above the rounding error of a 0.
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
            "by counting; the indices take more space, in the file and in memory",
        ),
        _repeated(),
        Reading("at most nnz directions", "holds", "a masked step is 0 outside the mask, for SGD and for Adam"),
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
    count = Check("files: changed entries <= stored values", "<=", exact=True)
    full = Check(
        "files: rank of the trained inputs = entries, the four fullest rows with at most 256 entries",
        "=",
        exact=True,
    )
    for update in setting.updates(2 if setting.quick else 8):
        changed = update.indices.size if update.values is None else int(np.count_nonzero(update.values))
        count.add(changed, update.indices.size, update.where)
        counts = np.bincount(update.row, minlength=update.shape[0])
        for size in np.sort(counts[counts <= 256])[-4:]:
            if size:
                full.add(rank(integers((int(size), int(size)), random, 999)), int(size), update.where)
        few = [f"{int(np.minimum(counts, batch).sum()):,} with {batch}" for batch in (1, 32, 1024)]
        report.of_files.append((update.where, f"{update.indices.size:,} entries; degrees of freedom of one batch in general position: {', '.join(few)} tokens; all of them from {int(counts.max())} tokens on"))  # fmt: skip
    report.checks.append(count)
    if full.cases:
        report.checks.append(full)


def _repeated() -> Reading:
    """The smallest layer without dead inputs in which training has fewer directions than entries, by exhaustive search."""
    for tried, width in enumerate(range(1, 4), 1):
        made, inputs = np.ones((1, width), bool), np.ones((width, 1), np.int64)
        if (free := freedom(made, inputs)) < width:
            return Reading(
                "training has nnz degrees of freedom, whatever the data",
                "fails",
                "linearly dependent inputs, dead inputs, or fewer examples than a row has entries reduce them",
                Counterexample(
                    f"layers with one output, all entries trained, every input 1, by size; number {tried}",
                    {"M": rows_of(made.astype(int)), "X": rows_of(inputs)},
                    (
                        "the two inputs are always equal, so the gradient is e X^T = (e, e) for every error e",
                        f"nnz = {width}, but all steps are multiples of (1, 1): freedom = rank X = {free}",
                        "(a 1 x 1 layer with an input that is always 0 has freedom 0 of 1)",
                    ),
                ),
            )
    raise AssertionError


def _symmetric() -> Reading:
    """Steps towards a noiseless teacher: the first 2 x 2 mask that fails, fewest entries first."""
    difference = np.eye(2, dtype=np.int64)
    masks = sorted((np.array([(bits >> k) & 1 for k in range(4)], bool).reshape(2, 2) for bits in range(1, 16)), key=lambda m: int(m.sum()))  # fmt: skip
    for tried, made in enumerate(masks, 1):
        found, _ = teacher_span(made, difference, np.random.default_rng(0))
        if found < made.sum():
            return Reading(
                "the steps from one W span nnz directions if the data are in general position",
                "fails",
                "with noiseless targets T x, G = (W - T) X X^T, and X X^T is symmetric; with noisy targets it holds",
                Counterexample(
                    f"all 15 masks of 2 x 2, fewest entries first, W - T = I; number {tried}",
                    {"M": rows_of(made.astype(int)), "W - T": rows_of(difference)},
                    (
                        "the gradient for one input x is (W - T) x x^T = x x^T, which is symmetric",
                        "both trained entries move by the same multiple of x1 x2 in every step:",
                        f"nnz = {int(made.sum())}, but all steps are multiples of one matrix: span {found}",
                    ),
                ),
            )
    raise AssertionError
