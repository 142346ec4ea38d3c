"""Which strengths of an update explain a merged weight: the interval of strengths that fit every entry.

Merging an update ``u`` at strength ``s`` into a weight ``b`` stores ``m``, the rounded ``b + s u``. So every entry bounds the
strength:

    |m - (b + s u)| <= h + s t

``h`` is half an ulp of ``m``, in the dtype in which it was rounded. ``t`` is the error of the update itself, which others may
sum in another order or dtype: ``share * (|u| + row * column)``, where ``column`` is the root mean square of ``u`` over its
column, within the tile, and ``row`` that over its row, relative to ``column``. (The error of a dot product depends on the
norms of its factors, not on its result.) The strengths that fit all entries form an exact interval: nothing is averaged, and
no distribution is assumed. It is narrow if the update is far above the rounding; if rounding hides the update, it includes
0, and a merge cannot be distinguished from none.

The tolerances are tried in the order of :data:`LEVELS`, from the strictest:

* the update in float32, rounded once: ``share`` is 2^-19, which is 32 half ulps of float32;
* the update in bfloat16 or float16, as in a merge of a 16-bit model: ``share`` is 2^-6, four roundings to bfloat16 (factors,
  products, scale). Strengths closer than this are not distinguished. Since rounding errors have both signs, the remainders
  beyond ``h`` of all entries together must stay below 2^-7 of the update's norm: four roundings leave 0.3 %, and a small
  addition to every entry leaves more;
* rounded twice, as in a weight that was merged, rounded and changed again: ``2 h``.

Each of them is tried with the base as it is, and, where the merged dtype cannot hold it, with the base rounded first, as by
loading a float32 model in bfloat16. A weight-decomposed update (DoRA) multiplies the weight itself by a rounded number: its
tolerance is larger by 2^-19 of the weight, and four half ulps in 16-bit arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_analysis.merging.check.scan import COARSE, Level, MergedWeight, Strengths, scan
from shira_analysis.merging.check.stored import held_dtype, holds_all_of
from shira_format._core.dtypes import is_float
from shira_format._core.threads import Progress, Workers
from shira_format.errors import SourceError

LEVELS = (
    Level(),
    Level(rounded=True, words="base rounded first"),
    Level(COARSE, words="update in 16 bits"),
    Level(COARSE, rounded=True, words="base rounded first, update in 16 bits"),
    Level(COARSE, 2, words="rounded twice"),
    Level(COARSE, 2, rounded=True, words="base rounded first, then twice more"),
)


@dataclass(frozen=True)
class Fit:
    """The first tolerance that explains a merged weight.

    Attributes:
        level: the tolerance; None if none explains it, and then ``strengths`` are those of the strictest.
        strengths: what the pass at this level found.
        sign: -1 if the update was subtracted.
    """

    level: Level | None
    strengths: Strengths
    sign: int = 1


def fit_strength(
    weight: MergedWeight, strength: float, workers: Workers, progress: Progress = lambda _: None
) -> Fit:
    """Find the strengths of the update that explain the merged weight.

    Of the levels that allow one rounding only, the first that explains ``strength`` counts; if none does, the first that
    explains any. (In a bias of few entries, some other strength may fit by chance.)

    Args:
        weight: the weight.
        strength: the expected one, not zero.
        workers: threads.
        progress: called with the number of entries that were compared since the last call.

    Raises:
        SourceError: the update holds NaN or Inf, or the base's or the merged weight has no float dtype.
    """
    for checkpoint, name in ((weight.base, weight.base_name), (weight.merged, weight.merged_name)):
        if not is_float(checkpoint.dtype(name)):
            raise SourceError(
                f"{checkpoint.path}: tensor {name!r} is of dtype {checkpoint.dtype(name)}, not a float"
            )
    held = held_dtype(weight.merged, weight.merged_name)
    sign, strength = (1, strength) if strength > 0 else (-1, -strength)
    first = scan(weight, LEVELS[0], held, sign, strength, workers, progress)
    if first.off_grid:
        held = weight.merged.dtype(weight.merged_name)
        first = scan(weight, LEVELS[0], held, sign, strength, workers)
    if not np.isfinite(first.energy):
        raise SourceError(f"the update of tensor {weight.update.name!r} holds NaN or Inf")
    if first.not_finite:
        return Fit(None, first)
    fit = _first_level(weight, first, held, sign, strength, workers)
    if fit.level is None and first.along < 0:
        other = scan(weight, LEVELS[0], held, -sign, strength, workers)
        fit = _first_level(weight, other, held, -sign, strength, workers)
    # What is reported about the expected strength is about the update with its own sign.
    return fit if fit.level is not None else Fit(None, first)


def _first_level(
    weight: MergedWeight, first: Strengths, held: np.dtype[Any], sign: int, strength: float, workers: Workers
) -> Fit:
    keeps = holds_all_of(held, weight.base.dtype(weight.base_name))
    other: Fit | None = None
    for level in LEVELS:
        if level.rounded and keeps:
            continue
        # A weight without a changed bit was not rounded twice: it was not merged.
        if level.halves > 1 and (other is not None or not first.changed):
            break
        found = first
        if level is not LEVELS[0]:
            # If another strength fits already, only the expected one matters.
            over = _ruled_out(strength if other is not None else None)
            found = scan(weight, level, held, sign, strength, workers, over=over)
        if found.holds(strength):
            return Fit(level, found, sign)
        if found.fits and other is None and not found.includes(strength):
            other = Fit(level, found, sign)
    return other or Fit(None, first, sign)


def _ruled_out(strength: float | None) -> Callable[[Strengths], bool]:
    """Whether no strength is left, or not the one in question."""
    return lambda found: not (found.fits if strength is None else found.includes(strength))
