"""Lemma 4.5: how many zeros the product of two Struct adapters has.

In the product ``A1^T A2`` row i contributes the outer product of row i of A1 and row i of A2. So for all masks

    nnz(A1^T A2) <= sum over rows i of nnz(A1[i, :]) * nnz(A2[i, :]).

With ``A = D + S``, D a diagonal (at most one entry per row, any offset) and S the rest, and no row in both S1 and S2, this is at most
``nnz(D) + nnz(S1) + nnz(S2)``: the bound of the proof, on densities. All counts here are of sparsity patterns, in integers: the nnz of
the product if no sum cancels, hence an upper bound on its nnz.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from shira_analysis.lemmas.files import FileDelta
from shira_analysis.lemmas.report import Check, Counterexample, LemmaReport, Reading, rows_of
from shira_analysis.lemmas.samples import KINDS, Integers, Mask, Setting, mask
from shira_format._core.arrays import distinct

_MOST_PRODUCTS = 200_000_000  # multiplications for one pair of weights; pairs that need more are skipped
_PIECE = 4_000_000  # multiplications at a time, to bound the memory


def product_nnz(first: Any, second: Any) -> int:
    """Non-zeros of ``first^T second`` for CSR matrices of non-negative integers, computed in blocks of rows."""
    left = first.T.tocsr()
    work = np.zeros(left.shape[0] + 1, np.int64)
    counts = np.diff(second.indptr).astype(np.int64)
    np.add.at(work, np.repeat(np.arange(1, left.shape[0] + 1), np.diff(left.indptr)), counts[left.indices])
    total = np.cumsum(work)
    found = start = 0
    while start < left.shape[0]:
        stop = max(start + 1, int(np.searchsorted(total, total[start] + _PIECE, side="right")) - 1)
        found += int((left[start:stop] @ second).nnz)
        start = stop
    return found


def pair_nnz(first: FileDelta, second: FileDelta) -> int | None:
    """The same for the sparsity patterns of two deltas; None if that takes too many multiplications."""
    counts = [np.bincount(update.row, minlength=first.shape[0]).astype(np.int64) for update in (first, second)]
    if int((counts[0] * counts[1]).sum()) > _MOST_PRODUCTS:
        return None
    return product_nnz(_ones(first), _ones(second))


def pattern(made: Mask) -> Any:
    """A mask as a CSR matrix of ones."""
    from scipy.sparse import csr_matrix

    return csr_matrix(made.astype(np.int64))


def diagonal(shape: tuple[int, int], offset: int = 0) -> Mask:
    """The entries with column - row = offset."""
    return np.eye(*shape, k=offset, dtype=bool)


def lines(shape: tuple[int, int], kind: str, chosen: Any) -> Mask:
    """Whole rows or whole columns."""
    made = np.zeros(shape, bool)
    if kind == "rows":
        made[chosen] = True
    else:
        made[:, chosen] = True
    return made


def check(setting: Setting) -> LemmaReport:
    """Check lemma 4.5."""
    random = setting.random(5)
    report = LemmaReport(
        "4.5",
        "orthogonality of Struct adapters",
        "The AWOR of two non-overlapping Struct adapters A1 = I + S1, A2 = I + S2 is at most the sum of their sparsities.",
        "1 - AWOR <= density(I) + density(S1) + density(S2) if no row has entries of both S1 and S2. (In counts: nnz(A1^T A2) <= nnz(D) + "
        "nnz(S1) + nnz(S2), for weights of any shape, any diagonals.) For whole rows of a square weight the bound is tight up to k1 k2 "
        "entries, one for each pair of trained rows. With the same rows S1^T S2 is a dense product of rank k and AWOR is 0. For whole "
        "columns of a square weight with its main diagonal the bound holds at any offsets, even equal ones, as S1^T S2 is non-zero only "
        "at trained column x trained column; it also holds for rows against columns. For all masks: nnz <= sum over rows of the products of the counts.",
        "vacuous as printed; the bound of its proof, on densities, is true for disjoint rows",
    )
    general = Check("any masks: nnz(A1^T A2) <= sum over rows of the products of their counts", "<=", exact=True)
    apart = Check(
        "any shape, no common row apart from diagonals of any offset: nnz <= nnz(D) + nnz(S1) + nnz(S2)",
        "<=",
        exact=True,
    )
    whole = Check(
        "whole rows and I, square, different offsets: nnz = m + (k1 + k2)(m - 1) - k1 k2", "=", exact=True
    )
    equal = Check("whole rows and I, square, the same rows: nnz = m^2, so AWOR = 0", "=", exact=True)
    columns = Check("whole columns and I, square, any offsets: nnz <= m + nnz(S1) + nnz(S2)", "<=", exact=True)
    counted = Check("  and nnz = k1 m + k2 (m - k1) + m - |C1 u C2|", "=", exact=True)
    block = Check("  and S1^T S2 has k1 k2 entries", "=", exact=True)
    mixed = Check("rows against columns, each with I, square: nnz = k m + m - k, k = |R u C|", "=", exact=True)
    values = Check("integer values: nnz of the product <= nnz of its pattern", "<=", exact=True)
    literal = Check("as printed: AWOR <= sum of sparsities, in entries of m^2", "<=", exact=True)
    checks = [general, apart, whole, equal, columns, counted, block, mixed, values, literal]
    _any_masks(general, values, setting, random)
    _disjoint_rows(apart, setting, random)
    for side in (6, 13, 40) if setting.quick else (6, 13, 40, 100, 256):
        for step in sorted({2, 3, side // 3, side - 1}):
            _square_struct(checks, side, step)
    report.checks += checks
    _files(setting, report)
    report.measured.append(_example())
    report.readings += [
        Reading("AWOR <= sparsity(A1) + sparsity(A2), sparsity = share of zeros", "says nothing", "AWOR is at most 1, and the sum is at least 1 - 1/m for disjoint rows, 1.98 for 99 % sparse adapters"),
        Reading("1 - AWOR <= density(I) + density(S1) + density(S2), disjoint rows", "holds", "what the proof shows"),
        _wide_weight(),
        _search("AWOR <= density(S1) + density(S2), reading sparsity as density", "AWOR is near 1 where densities are small", _disjoint_in_rows, lambda m, n1, n2, p: m * m - p > n1 + n2, 3),
        _search("1 - AWOR <= density(S1) + density(S2), disjoint rows", "the product of the two diagonals, I, counts too", _disjoint_in_rows, lambda _, n1, n2, p: p > n1 + n2, 2),
        _search("1 - AWOR <= density(I) + density(S1) + density(S2) if no entry is in both", "non-overlapping must refer to rows: S1^T S2 multiplies entries of the same row", _disjoint_in_entries, lambda m, n1, n2, p: p > m + n1 + n2, 3),
    ]  # fmt: skip
    return report


def _any_masks(general: Check, values: Check, setting: Setting, random: np.random.Generator) -> None:
    shapes = [(8, 8), (20, 12), (12, 30)] if setting.quick else [(8, 8), (20, 12), (12, 30), (128, 96), (256, 256)]
    for kinds in itertools.product(KINDS, repeat=2):
        for shape in shapes:
            made = [mask(kind, shape, 0.03 if shape[0] > 64 else 0.1, random) for kind in kinds]
            one, two = (pattern(m) for m in made)
            where = f"{kinds[0]} with {kinds[1]}, {shape[0]}x{shape[1]}"
            found = product_nnz(one, two)
            general.add(found, int((made[0].sum(axis=1) * made[1].sum(axis=1)).sum()), where)
            # Small values, so that some sums cancel.
            a1, a2 = (np.where(m, random.choice(np.array([-1, 1, 2]), shape), 0) for m in made)
            values.add(int(np.count_nonzero(a1.T @ a2)), found, where)


def _disjoint_rows(apart: Check, setting: Setting, random: np.random.Generator) -> None:
    """Random entries in disjoint rows, plus diagonals of any offset; weights of any shape."""
    for number in range(40 if setting.quick else 200):
        shape = (int(random.integers(2, 40)), int(random.integers(2, 40)))
        owner = random.integers(0, 3, shape[0])  # 2: in neither
        filled = random.random(shape) < random.choice(np.array([0.2, 1.0]))
        offsets = [int(random.integers(-3, 4)) if number % 2 else 0 for _ in range(2)]
        diagonals = [diagonal(shape, offset) for offset in offsets]
        rest = [filled & (owner == k)[:, None] & ~diagonals[k] for k in range(2)]
        found = product_nnz(*(pattern(d | s) for d, s in zip(diagonals, rest, strict=True)))
        limit = min(int(d.sum()) for d in diagonals) + sum(int(s.sum()) for s in rest)
        apart.add(found, limit, f"{shape[0]}x{shape[1]}, diagonals at {offsets[0]} and {offsets[1]}")


def _square_struct(checks: list[Check], side: int, step: int) -> None:
    """Every step-th row or column of a square weight, and its diagonal, for all pairs of a few offsets."""
    _, _, whole, equal, columns, counted, block, mixed, _, literal = checks
    shape, eye = (side, side), diagonal((side, side))
    offsets = sorted({0, 1, step // 2, step - 1})
    for one, two in itertools.product(offsets, repeat=2):
        picked = [np.arange(offset, side, step) for offset in (one, two)]
        where = f"{side}x{side}, every {step}th, offsets {one} and {two}"
        sizes = [p.size for p in picked]
        k1, k2 = sizes
        both = int(distinct(np.concatenate(picked)).size)
        rows = [lines(shape, "rows", p) | eye for p in picked]
        found = product_nnz(*(pattern(made) for made in rows))
        if one == two:
            equal.add(found, side**2, where)
        else:
            whole.add(found, side + (k1 + k2) * (side - 1) - k1 * k2, where)
            literal.add(side**2 - found, 2 * side**2 - sum(int(made.sum()) for made in rows), where)
        upright = [lines(shape, "columns", p) for p in picked]
        found = product_nnz(*(pattern(made | eye) for made in upright))
        columns.add(found, side + (k1 + k2) * (side - 1), where)
        counted.add(found, k1 * side + k2 * (side - k1) + side - both, where)
        block.add(product_nnz(*(pattern(made) for made in upright)), k1 * k2, where)
        for label, left, right in (("rows, columns", rows[0], upright[1] | eye), ("columns, rows", upright[0] | eye, rows[1])):  # fmt: skip
            found = product_nnz(pattern(left), pattern(right))
            mixed.add(found, both * side + side - both, f"{where}: {label}")


def _files(setting: Setting, report: LemmaReport) -> None:
    general = Check(
        "files: nnz of the product's pattern <= sum over rows of the products of the counts", "<=", exact=True
    )
    apart = Check("files, no common row off the diagonal: nnz <= nnz(D) + nnz(S1) + nnz(S2)", "<=", exact=True)
    for first, second in setting.pairs(2 if setting.quick else 6):
        where = f"{first.where} with {second.source}"
        counts = [np.bincount(update.row, minlength=first.shape[0]).astype(np.int64) for update in (first, second)]
        work = int((counts[0] * counts[1]).sum())
        found = pair_nnz(first, second)
        if found is None:
            report.notes.append(
                f"{where}: skipped: it takes {work:,} multiplications, the limit is {_MOST_PRODUCTS:,}"
            )
            continue
        general.add(found, work, where)
        off = [update.row[update.row != update.column] for update in (first, second)]
        on = [update.row.size - rows.size for update, rows in zip((first, second), off, strict=True)]
        common = np.intersect1d(distinct(off[0]), distinct(off[1]), assume_unique=True).size
        if not common:
            apart.add(found, min(on) + off[0].size + off[1].size, where)
        report.of_files.append((where, f"AWOR {1 - found / first.shape[1] ** 2:.4f} (sparsity patterns); {common:,} common rows off the diagonal; {found:,} non-zeros, sum of the products of row counts {work:,}"))  # fmt: skip
    report.checks += [check for check in (general, apart) if check.cases]


def _ones(update: FileDelta) -> Any:
    ones = np.ones(update.indices.size, np.int64)
    from scipy.sparse import csr_matrix

    return csr_matrix((ones, (update.row, update.column)), shape=update.shape)


def _example() -> tuple[str, str]:
    """Struct at about 1 % of 1024 x 1024: its AWOR and the bounds."""
    side, step = 1024, 100
    eye = diagonal((side, side))
    picked = [np.arange(offset, side, step) for offset in (0, 50)]
    made = [lines((side, side), "rows", p) | eye for p in picked]
    found = product_nnz(*(pattern(m) for m in made))
    off = [int((m & ~eye).sum()) for m in made]
    sparsities = sum(1 - int(m.sum()) / side**2 for m in made)
    bound = (side + sum(off)) / side**2
    same = product_nnz(pattern(made[0]), pattern(made[0]))
    return (
        "Struct, rows, 1024 x 1024, every 100th, offsets 0 and 50",
        f"AWOR {1 - found / side**2:.4f}; the proof's bound: at least {1 - bound:.4f}; printed bound: at most {sparsities:.4f}. Same offset: AWOR {1 - same / side**2:.4f}",
    )


def _disjoint_in_rows(s1: Integers, s2: Integers) -> bool:
    return bool(s1.any() and s2.any() and not (s1.any(axis=1) & s2.any(axis=1)).any())


def _disjoint_in_entries(s1: Integers, s2: Integers) -> bool:
    return bool(s1.any() and s2.any() and not (s1 & s2).any())


def _wide_weight() -> Reading:
    """The smallest weight that is not square: one row, two columns."""
    a = np.array([[1, 1]])
    product = a.T @ a
    found = int(np.count_nonzero(product))
    assert found > 1 + 1 + 1
    return Reading(
        "whole columns at any offsets obey that bound in weights of any shape",
        "fails",
        "in a wide weight the diagonal does not reach all columns, so the bound does not count all of trained column x trained column",
        Counterexample(
            "the smallest weight that is not square; I is its diagonal (1, 0), and both adapters train its second column",
            {"A1": rows_of(a), "A2": rows_of(a), "A1^T A2": rows_of(product)},
            (f"nnz = {found} > nnz(I) + nnz(S1) + nnz(S2) = 1 + 1 + 1",),
        ),
    )


def _search(text: str, why: str, allowed: Callable[[Integers, Integers], bool], breaks: Callable[[int, int, int, int], bool], most: int) -> Reading:  # fmt: skip
    """The smallest pair of binary off-diagonal matrices that breaks a reading: by side, then by number of ones."""
    tried = 0
    for side in range(1, most + 1):
        eye = np.eye(side, dtype=np.int64)
        places = np.flatnonzero(eye.reshape(-1) == 0)
        masks = []
        for bits in itertools.product((0, 1), repeat=places.size):
            made = np.zeros(side * side, np.int64)
            made[places] = bits
            masks.append(made.reshape(side, side))
        for s1, s2 in sorted(itertools.product(masks, repeat=2), key=lambda p: int(p[0].sum() + p[1].sum())):
            if not allowed(s1, s2):
                continue
            tried += 1
            product = (eye + s1).T @ (eye + s2)
            n1, n2, found = int(s1.sum()), int(s2.sum()), int(np.count_nonzero(product))
            if breaks(side, n1, n2, found):
                return Reading(
                    text, "fails", why,
                    Counterexample(
                        f"all pairs of binary matrices that the reading allows, by size and number of ones; number {tried}",
                        {"S1": rows_of(s1), "S2": rows_of(s2), "A1^T A2": rows_of(product)},
                        (
                            f"A1 = I + S1, A2 = I + S2; the product has {found} non-zeros of {side * side}: AWOR = {side * side - found}/{side * side}",
                            f"densities: I {side}/{side * side}, S1 {n1}/{side * side}, S2 {n2}/{side * side}",
                        ),
                    ),
                )  # fmt: skip
    raise AssertionError(text)
