"""The five lemmas of the paper (*Sparse High Rank Adapters*, section 4), checked by numbers.

For each lemma: the statement as printed, the one that is true, laws tried on random adapters of many shapes and masks and on
given files, and the smallest counterexample where the printed one fails. What can be decided in integers is; the rest is float64, each
case with a bound on what rounding may do.
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

_NOTHING = f"no matrix in it has entries, or all have a side above {LONGEST}, so that there is nothing to check"


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
        adapters: adapter files to check them on as well; lemmas about two adapters take all pairs, or a single one with itself.
        base: the checkpoint of all of them, for those that do not hold base values.
        quick: fewer and smaller cases.
        seed: of all random numbers, not negative.
        lemmas: their numbers, of :data:`LEMMAS`.
        progress: called with 1 after each lemma.

    Raises:
        SourceError: none of the files has something to check, or an update is not finite.
        BaseRequired: targets without base values, and no ``base``.
        FormatError: a file is no adapter, or is damaged.
        BaseMismatch: ``base`` is another one.
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
            raise SourceError(f"{files[0].file.path}: {_NOTHING}" + (" (nor in the others)" if files[1:] else ""))
        # So that the last digits do not depend on how many threads there are.
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
