"""Lemma 4.2: LoRA as the best approximation of rank r, and its error.

By Eckart and Young, over all B of rank r: ``min ||S - B||_2 = sigma_{r+1}`` and ``min ||S - B||_F^2 = sum of sigma_i^2 over i > r``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from shira_analysis.lemmas.exact import rank as exact_rank
from shira_analysis.lemmas.files import FileDelta
from shira_analysis.lemmas.report import Check, Counterexample, LemmaReport, Reading, rows_of
from shira_analysis.lemmas.samples import KINDS, Integers, Setting, case_name, integers, mask
from shira_format.errors import SourceError
from shira_format.export.lora import Factors, best_factors

Floats = npt.NDArray[np.floating[Any]]

_EPSILON = float(np.finfo(np.float64).eps)
_FULL_SVD = 1 << 18  # elements up to which the factors are compared with LAPACK's full SVD


def rounding(sigma: Floats, rank: int, side: int) -> float:
    """A bound on how much float32 rounding of the factors changes their error, in either norm.

    Each value of the factors has a relative error of at most 2^-24. The squares of each factor sum to ``sum sigma_i``, so that the
    product is off by ``2 * 2^-24 * sum sigma_i`` (in the Frobenius norm, hence in the spectral norm) plus terms of higher order.
    LAPACK's error in singular values and vectors is added: a small multiple of eps times ``side * sigma_1``.
    """
    return 1.01 * 2.0**-23 * float(sigma[:rank].sum()) + 16 * _EPSILON * side * float(sigma[0])


def other_fits(dense: Floats, rank: int, random: np.random.Generator) -> list[tuple[str, Floats]]:
    """Other matrices of rank ``rank``: alternating least squares from two starts, the largest rows, and projections."""
    found: list[tuple[str, Floats]] = []
    for start in range(2):
        down: Floats = random.standard_normal((rank, dense.shape[1]))
        up: Floats = np.zeros((dense.shape[0], rank))
        for _ in range(12):
            up = np.linalg.lstsq(down.T, dense.T, rcond=None)[0].T
            down = np.linalg.lstsq(up, dense, rcond=None)[0]
        found.append((f"least squares, start {start}", up @ down))
    rows = np.argsort(np.linalg.norm(dense, axis=1))[::-1][:rank]
    kept = np.zeros_like(dense)
    kept[rows] = dense[rows]
    found.append(("largest rows", kept))
    basis = np.linalg.qr(dense @ random.standard_normal((dense.shape[1], rank)))[0]
    found.append(("random projection", basis @ (basis.T @ dense)))
    return found


class _Laws:
    """The laws, checked for one matrix and rank at a time."""

    def __init__(self) -> None:
        self.spectral = Check("||S - BA||_2 = sigma_{r+1}, best factors in float32", "=", exact=False)
        self.frobenius = Check("||S - BA||_F = sqrt(sum of sigma_i^2, i > r)", "=", exact=False)
        self.zero = Check(
            "the error is 0 up to rounding if and only if rank(S) <= r (exact rank)", "=", exact=True
        )
        self.better = Check(
            "other matrices of rank r are no closer: sigma_{r+1} <= ||S - B||_2", "<=", exact=False
        )
        self.better_squares = Check("  the same in the Frobenius norm", "<=", exact=False)
        self.known = Check("one integer in each row and column (known sigma): ||S - BA||_2 = sigma_{r+1}", "=", exact=False)  # fmt: skip
        self.every = Check(
            "all 2x2 S and B with entries -2..2, det B = 0: ||S - B||_F^2 >= sigma_2^2", "=", exact=True
        )
        self.tried = self.printed_fails = self.squares_fail = 0
        self.factor, self.example = 0.0, ""

    def all(self) -> list[Check]:
        checks = [
            self.spectral,
            self.frobenius,
            self.zero,
            self.better,
            self.better_squares,
            self.known,
            self.every,
        ]
        return [check for check in checks if check.cases]

    def factors(self, found: Factors, dense: Floats, rank: int, where: str) -> float:
        """Compare the factors with LAPACK's singular values; return the allowance for rounding."""
        sigma = np.linalg.svd(dense, compute_uv=False)
        allowed = rounding(sigma, rank, max(dense.shape))
        rest = dense - found.up.astype(np.float64) @ found.down.astype(np.float64)
        following = float(sigma[rank]) if rank < sigma.size else 0.0
        tail = float(np.linalg.norm(sigma[rank:]))
        self.spectral.add(float(np.linalg.norm(rest, 2)), following, where, allowed)
        # The errors differ at most by the norm of the factors' rounding error.
        self.frobenius.add(float(np.linalg.norm(rest)), tail, where, allowed)
        self.count(following, tail, allowed, where)
        return allowed

    def count(self, following: float, tail: float, allowed: float, where: str) -> None:
        """Count whether the printed bound holds, in either norm."""
        if following <= allowed:
            return
        self.tried += 1
        self.squares_fail += tail**2 > following**2 * (1 + 1e-9)
        if following > following**2:
            self.printed_fails += 1
            if 1 / following > self.factor:
                self.factor, self.example = 1 / following, where

    def others(self, dense: Floats, rank: int, where: str, random: np.random.Generator) -> None:
        sigma = np.linalg.svd(dense, compute_uv=False)
        following = float(sigma[rank]) if rank < sigma.size else 0.0
        noise = 64 * _EPSILON * max(dense.shape) * float(sigma[0])
        for what, other in other_fits(dense, rank, random):
            rest = dense - other
            self.better.add(following, float(np.linalg.norm(rest, 2)), f"{where}, {what}", noise)
            self.better_squares.add(float(np.linalg.norm(sigma[rank:])), float(np.linalg.norm(rest)), f"{where}, {what}", noise)  # fmt: skip


def check(setting: Setting) -> LemmaReport:
    """Check lemma 4.2."""
    random, laws = setting.random(2), _Laws()
    report = LemmaReport(
        "4.2",
        "LoRA of rank r approximates SHiRA",
        "LoRA of rank r is the rank-r approximation of a SHiRA adapter S; the error is at most sigma^2_{r+1}, and 0 if rank(S) = r.",
        "The error of the best matrix of rank r is exactly sigma_{r+1} in the spectral norm (sigma^2_{r+1} in that norm squared), and "
        "exactly the sum of sigma_i^2 over i > r in the squared Frobenius norm. No other matrix of rank r does better. The error is 0 if and "
        "only if rank(S) <= r. A trained LoRA has at least this error; nothing makes it the best approximation.",
        "true only for the best factors and the squared spectral norm",
    )
    shapes = (
        [(24, 24), (20, 40), (48, 32)]
        if setting.quick
        else [(24, 24), (20, 40), (48, 32), (128, 128), (96, 256), (320, 192)]
    )
    for kind in KINDS:
        for shape in shapes:
            for density in (0.02, 0.1) if setting.quick else (0.01, 0.05, 0.2):
                made = mask(kind, shape, density, random)
                whole = np.where(made, integers(shape, random), 0)
                scale = float(2.0 ** random.integers(-8, 3))  # a power of two: products with it are exact
                _check_matrix(laws, whole, scale, case_name(kind, shape, made), random)
    _known_sigma(laws, setting, random)
    _all_2x2(laws)
    _files(laws, setting, report, random)
    report.checks += laws.all()
    found = (
        f"of {laws.tried} cases with a non-zero error, ||S - BA||_2 > sigma^2_{{r+1}} holds in {laws.printed_fails} (up to {laws.factor:.3g} "
        f"times the bound: {laws.example}), and ||S - BA||_F^2 > sigma^2_{{r+1}} holds in {laws.squares_fail}"
    )
    report.measured.append(("printed bound against the true error", found))
    report.readings += [
        _below_one(),
        _frobenius(),
        Reading("||S - BA||_2^2 <= sigma^2_{r+1}, best factors", "holds", "with equality"),
        Reading("the error is 0 if rank(S) = r", "holds", "also if rank(S) < r, but not if rank(S) > r"),
    ]
    return report


def _check_matrix(laws: _Laws, whole: Integers, scale: float, where: str, random: np.random.Generator) -> None:
    flat = np.flatnonzero(whole)
    dense = whole * scale
    true = exact_rank(whole)
    for rank in sorted({1, max(1, true // 2), true, true + 1} if true > 1 else {1, 2}):
        found = best_factors(dense.shape, flat, dense.reshape(-1)[flat], rank=rank)
        name = f"{where}, r = {rank}"
        kept = min(rank, *dense.shape)
        allowed = laws.factors(found, dense, kept, name)
        laws.zero.add(int(found.error <= 2 * allowed), int(true <= rank), name)
        if rank < true:
            laws.others(dense, rank, name, random)


def _known_sigma(laws: _Laws, setting: Setting, random: np.random.Generator) -> None:
    """Matrices with one integer in each row and column: their absolute values are the singular values."""
    for side in (2, 5, 16) if setting.quick else (2, 5, 16, 64, 200):
        values = integers((side,), random, 50)
        whole = np.zeros((side, side), np.int64)
        whole[np.arange(side), random.permutation(side)] = values
        sigma = np.sort(np.abs(values))[::-1].astype(np.float64)
        flat = np.flatnonzero(whole)
        for rank in sorted({1, side // 2, side - 1} - {0}):
            found = best_factors((side, side), flat, whole.reshape(-1)[flat].astype(np.float64), rank=rank)
            rest = whole - found.up.astype(np.float64) @ found.down.astype(np.float64)
            laws.known.add(float(np.linalg.norm(rest, 2)), float(sigma[rank]), f"{side}x{side}, r = {rank}", rounding(sigma, rank, side))  # fmt: skip


def _all_2x2(laws: _Laws) -> None:
    """Every 2 x 2 S against every B of rank 1 or 0, in integers.

    sigma_2^2 is the smaller root of p(x) = x^2 - ||S||_F^2 x + det(S)^2, so e >= sigma_2^2 says p(e) <= 0 or 2 e >= ||S||_F^2.
    """
    entries = np.arange(-2, 3)
    grid = np.stack(np.meshgrid(*[entries] * 4, indexing="ij"), -1).reshape(-1, 4)
    singular = grid[grid[:, 0] * grid[:, 3] == grid[:, 1] * grid[:, 2]]
    for s in grid:
        t, d = int((s**2).sum()), int(s[0] * s[3] - s[1] * s[2])
        errors = ((s - singular) ** 2).sum(axis=1)
        far = (errors**2 - t * errors + d**2 <= 0) | (2 * errors >= t)
        laws.every.add(int(far.sum()), len(singular), f"S = {s.reshape(2, 2).tolist()}")


def _files(laws: _Laws, setting: Setting, report: LemmaReport, random: np.random.Generator) -> None:
    """Deltas of files: all singular values where that is cheap, else Lanczos."""
    within = Check("files: error of the factors <= bound + rounding, Frobenius norm", "<=", exact=False)
    spectral = Check("files: the same in the spectral norm", "<=", exact=False)
    for update in setting.updates(2 if setting.quick else 6):
        if update.values is None or not update.values.any():
            report.notes.append(f"{update.where}: no non-zero values")
            continue
        ranks = [rank for rank in (1, 8, 32) if rank < min(update.shape)]
        if not ranks:
            report.notes.append(f"{update.where}: a single row or column has rank 1")
        reported_rank = max((rank for rank in ranks if rank <= 8), default=0)
        for rank in ranks:
            try:
                found = best_factors(update.shape, update.indices, update.values, rank=rank)
            except SourceError as error:
                raise SourceError(f"{update.where}: {error}") from None
            where = f"{update.where}, r = {found.rank}"
            # The sum of the kept sigma is at most sqrt(r) times the norm.
            noise = 1.01 * 2.0**-23 * math.sqrt(found.rank) * found.norm + 1e-12 * found.norm
            # ``bound`` comes from a difference of squares, see Factors.
            within.add(found.error, found.bound, where, noise + 3e-8 * found.norm)
            spectral.add(found.spectral_error, found.spectral_bound, where, noise)
            if update.shape[0] * update.shape[1] <= _FULL_SVD:
                dense = _dense(update)
                laws.factors(found, dense, found.rank, where)
                if rank == reported_rank:
                    laws.others(dense, found.rank, where, random)
            else:
                laws.count(found.spectral_bound, found.bound, noise, where)
            if rank == reported_rank:
                report.of_files.append((where, f"rank at most {found.full_rank}; keeps {found.energy_kept:.1%} of the energy (the sum of squares); error {found.spectral_error:.3g} (spectral; printed bound {found.spectral_bound**2:.3g}), {found.error:.3g} (Frobenius)"))  # fmt: skip
    report.checks += [check for check in (within, spectral) if check.cases]


def _dense(update: FileDelta) -> Floats:
    assert update.values is not None
    dense = np.zeros(update.shape)
    dense.reshape(-1)[update.indices] = update.values
    return dense


def _below_one() -> Reading:
    """The smallest integer matrix with 0 < sigma_2 < 1 < sigma_1: a search of all 2 x 2 with entries 0 and 1, fewest ones first."""
    grid = sorted(np.ndindex(2, 2, 2, 2), key=lambda s: (sum(s), s[::-1]))
    for tried, (a, b, c, d) in enumerate(grid, 1):
        squares, det = a + b + c + d, a * d - b * c
        # p(1) < 0 for the polynomial of _all_2x2: 1 is between the two sigma^2, and neither is 0.
        if det and 1 - squares + det**2 < 0:
            return Reading(
                "||S - BA||_2 <= sigma^2_{r+1}",
                "fails",
                "the error is sigma_{r+1}, which exceeds its square whenever it is below 1, as in real adapters",
                Counterexample(
                    f"all 16 binary 2 x 2 matrices, fewest ones first; number {tried}; r = 1",
                    {"S": rows_of([[a, b], [c, d]])},
                    (
                        f"the sigma^2 are the roots of x^2 - ||S||_F^2 x + det(S)^2 = x^2 - {squares} x + {det**2}: (3 +- sqrt 5) / 2",
                        "sigma_2^2 = 0.382, sigma_2 = 0.618: no matrix of rank 1 is closer than 0.618 > 0.382",
                        "(simpler with fractions: S = diag(1, 1/2), best BA = diag(1, 0), error 1/2 > 1/4)",
                    ),
                ),
            )
    raise AssertionError


def _frobenius() -> Reading:
    """The Frobenius norm needs two singular values beyond r, so rank 3: the smallest is I."""
    return Reading(
        "||S - BA||_F^2 <= sigma^2_{r+1}",
        "fails",
        "all sigma_i^2 beyond r count, not only the first",
        Counterexample(
            "by reasoning: two non-zero sigma beyond r >= 1 need rank 3, so 3 x 3 and three entries at least; r = 1",
            {"S": rows_of(np.eye(3, dtype=int)), "BA": rows_of(np.diag([1, 0, 0]))},
            (
                "sigma = 1, 1, 1, so ||S - BA||_F^2 >= 1 + 1 for every BA of rank 1",
                "2 > sigma^2_2 = 1",
            ),
        ),
    )
