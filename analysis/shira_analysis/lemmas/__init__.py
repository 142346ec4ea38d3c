"""The five lemmas of the paper (*Sparse High Rank Adapters*, section 4), checked numerically.

For each lemma: the statement as printed, the corrected statement, laws tested on random adapters of many shapes and masks and on
given files, and the smallest counterexample where the printed statement fails. Checks are exact, in integers, where possible; the
rest use float64, each case with a bound on the rounding error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from shira_analysis.lemmas import complexity, low_rank, null_space, orthogonality, scale
from shira_analysis.lemmas.files import LONGEST, FileDeltas
from shira_analysis.lemmas.report import LemmaReport, Verification, as_json
from shira_analysis.lemmas.samples import Setting
from shira_format.errors import SourceError

__all__ = ["LEMMAS", "LemmaReport", "Verification", "as_json", "verify_lemmas"]

LEMMAS: dict[str, Callable[[Setting], LemmaReport]] = {
    "4.1": complexity.check,
    "4.2": low_rank.check,
    "4.3": scale.check,
    "4.4": null_space.check,
    "4.5": orthogonality.check,
}

_NOTHING_TO_CHECK = f"no matrix in it has entries, or all have a side above {LONGEST}: there is nothing to check"


def verify_lemmas(
    adapters: Sequence[str | os.PathLike[str]] = (),
    *,
    base: str | os.PathLike[str] | None = None,
    quick: bool = False,
    seed: int = 0,
    lemmas: Sequence[str] = tuple(LEMMAS),
    progress: Callable[[int], object] = lambda _: None,
) -> Verification:
    """Check the lemmas; the same arguments give the same report.

    Args:
        adapters: files to check as well as random adapters; lemmas about two adapters use all pairs, or a single file with itself.
        base: their checkpoint; needed for adapters that store target values without base values.
        quick: fewer and smaller cases.
        seed: the random seed, not negative.
        lemmas: which to check; keys of :data:`LEMMAS`.
        progress: called with 1 after each lemma.

    Raises:
        SourceError: no file has anything to check, or an update is not finite.
        BaseRequired: an adapter has targets without base values, and ``base`` is None.
        FormatError: a file is not an adapter, or is damaged.
        BaseMismatch: ``base`` is not the checkpoint that an adapter was made for.
    """
    from shira_format._core.threads import single_threaded_blas

    checkpoint = None
    if base is not None:
        from shira_format.checkpoints import open_checkpoint

        checkpoint = open_checkpoint(base)
    files = [FileDeltas.open(path, checkpoint) for path in adapters]
    setting = Setting(seed, quick, [file for file in files if file.names])
    found = []
    try:
        if files and not setting.files:
            raise SourceError(
                f"{files[0].file.path}: {_NOTHING_TO_CHECK}"
                + (" (the same for the other files)" if files[1:] else "")
            )
        # The last digits must not depend on the number of threads.
        with single_threaded_blas():
            for number in lemmas:
                found.append(LEMMAS[number](setting))
                progress(1)
    finally:
        for file in files:
            file.file.streams.close()
    for lemma in found:
        lemma.notes[:0] = setting.strangers if lemma.number in ("4.4", "4.5") else ()
    if found:
        found[0].notes[:0] = [note for file in files for note in file.notes]
    return Verification(seed, quick, [str(file.file.path) for file in files], found)
