"""The verdict on one layer of a merged checkpoint; see :mod:`shira_analysis.merging.check.check`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from shira_analysis.merging.check.fit import Fit
from shira_analysis.merging.check.report import LayerVerdict, Verdict
from shira_analysis.merging.check.scan import COARSE, MergedWeight, standard_error
from shira_format._core.threads import Workers

_SIGMAS = 6


def judge(
    weight: MergedWeight,
    kind: str,
    fit: Fit,
    expected: float,
    reason: str,
    quantised: bool,
    workers: Workers,
) -> LayerVerdict:
    """The verdict that ``fit`` gives.

    Args:
        weight: the weight.
        kind: see :class:`LayerVerdict`.
        fit: the strengths that explain it.
        expected: the expected strength.
        reason: what is known of the weight already, such as that it is tied.
        quantised: whether the weight is quantised in either checkpoint.
        workers: threads, if the weight has to be read again.
    """
    found, sign = fit.strengths, fit.sign
    size = max(1, weight.size)
    norm = abs(expected) * math.sqrt(found.energy)
    measured: dict[str, Any] = {
        "equal": found.equal / size,
        "off": found.off if math.isfinite(found.off) else None,
        "residual": math.sqrt(found.left) / norm if norm else None,
        "energy": found.energy,
    }

    def layer(verdict: Verdict, words: str = "", strength: float | None = None, **ends: float) -> LayerVerdict:
        if fit.level is not None and verdict != "different":
            ends = {"low": found.low, "high": found.high}
            if sign < 0:
                ends = {"low": -found.high, "high": -found.low}
        text = "; ".join(filter(None, [reason, words]))
        name = weight.update.name
        return LayerVerdict(name, weight.merged_name, kind, verdict, strength, reason=text, **ends, **measured)

    if found.not_finite:
        return layer("different", f"{found.not_finite} entries are Inf or NaN, or were in the base")
    if found.energy == 0:
        if found.fits:
            return layer("unclear", "the update is zero")
        return layer("different", "the update is zero, and the weight has changed")
    if fit.level is None:
        if quantised:
            return _by_statistics(weight, fit, expected, layer, workers)
        best = sign * found.estimate
        rest = math.sqrt(max(0.0, found.moved - found.along**2 / found.energy))
        return layer(
            "different", f"no strength fits: the nearest, {best:.3g}, leaves {rest / math.sqrt(found.moved):.1%} of the change unexplained"
        )  # fmt: skip
    how = fit.level.words
    is_expected = found.holds(abs(expected)) and sign * expected > 0
    if found.low <= 0:
        if is_expected:
            return layer("unclear", "rounding hides the update: the stored weight is the same with and without it")
        same = "bit for bit" if not found.changed else "up to rounding"
        return layer("absent", f"the base's weight, {same}", 0.0)
    if is_expected:
        strength = abs(expected) * found.along / found.replayed if found.replayed > 0 else found.estimate
        strength = sign * min(max(strength, found.low), found.high)
        if not found.tells:
            return layer("unclear", "too few entries have changed to tell", strength)
        if weight.exact is not None and found.equal < size:
            return layer("different", f"{size - found.equal} entries do not have the expected bits", strength)
        return layer("verified", how, strength)
    return layer("strength", how, sign * min(max(found.estimate, found.low), found.high))


def _by_statistics(
    weight: MergedWeight, fit: Fit, expected: float, layer: Callable[..., LayerVerdict], workers: Workers
) -> LayerVerdict:
    """Single entries of quantised weights cannot be compared, but all of them together give an estimate of the strength."""
    strength = fit.sign * fit.strengths.estimate
    error = standard_error(weight, strength, workers)
    words = f"quantised: estimated from all entries together, the strength is {strength:.3g} +- {error:.2g}"
    ends = {"low": strength - _SIGMAS * error, "high": strength + _SIGMAS * error}
    is_none = abs(strength) <= _SIGMAS * error
    is_other = abs(strength - expected) > max(_SIGMAS * error, COARSE * abs(expected))
    if is_none and is_other:
        return layer("absent", words, 0.0, **ends)
    if is_other:
        return layer("strength", words, strength, **ends)
    return layer("unclear", words, strength, **ends)
