"""The sentences of a merge report, as plain text."""

from __future__ import annotations

from collections.abc import Iterator

from shira_analysis.merging.report import MergeAnalysis, MergedPair, conflict_share
from shira_format._core.text import percent

MET = 0.01  # share of the smaller adapter's entries that must be shared for a warning about signs
CLASH = 0.1  # share of sign conflicts among the shared entries
ALIKE = 0.3  # cosine from which two adapters noticeably amplify or cancel each other
# What the study of interference found, in docs/studies/interference.md.
NO_PROMISE = (
    "That the weights are orthogonal is no promise: of trained adapters it did not foretell what a pair lost, and large changes disturbed each other "
    "even so. Try the result on some texts of each task."
)
LOST = 0.1  # of an adapter's energy
BETTER = 0.01  # how much more another method must keep to be recommended


def lemma_words(pair: MergedPair) -> list[str]:
    """Whether lemmas 4.4 and 4.5 apply to two adapters."""
    lemmas, whole = pair.lemmas, pair.pair.whole
    total = len(lemmas.tensors)
    if not total:
        none = "No weight" if not whole.both else "No matrix"
        return [f"{none} is changed by both: there is no product A1^T A2, and lemmas 4.4 and 4.5 do not apply."]
    of = f"{total:,} {'matrix' if total == 1 else 'matrices'} that both change"
    found = [*_zero(pair, of), *_struct(pair, of), *_neither(pair)]
    return [*found, NO_PROMISE] if lemmas.zero or lemmas.struct else found


def _zero(pair: MergedPair, of: str) -> Iterator[str]:
    lemmas = pair.lemmas
    text = f"Lemma 4.4 (A1^T A2 = 0, exactly) applies to {lemmas.zero:,} of the {of}"
    worst = lemmas.worst
    if worst is not None:
        text += f"; ||A1^T A2|| is at most {worst.margin or 0.0:.3g} of ||A1|| ||A2||, in {worst.name}"
    yield text + "."
    if lemmas.unclear:
        yield f"For {lemmas.unclear:,} more the product is 0 up to rounding; whether it is exactly 0 was not computed."
    if lemmas.apart:
        yield (
            f"In {lemmas.apart:,}, no row is changed by both: if rows are outputs (weights [out, in]), the two do not interfere in "
            "the layer, even after a non-linearity."
        )
    if more := lemmas.zero - lemmas.apart:
        yield (
            f"In {more:,}, both change some of the same rows: their outputs are orthogonal, but may interfere after a "
            "non-linearity."
        )


def _struct(pair: MergedPair, of: str) -> Iterator[str]:
    lemmas = pair.lemmas
    yield (
        f"Lemma 4.5 (each mask is the diagonal and whole rows, and no row is in both) applies to {lemmas.struct:,} of the {of}"
        + (
            ""
            if lemmas.tightest is None
            else f": 1 - AWOR <= density(I) + density(S1) + density(S2) holds with a margin of at least {lemmas.tightest.bound_margin or 0.0:.3g}, in {lemmas.tightest.name}"
        )
        + "."
    )
    if lemmas.shared_rows:
        yield f"In {lemmas.shared_rows:,}, the masks have this form but share rows, and the lemma does not apply."


def _neither(pair: MergedPair) -> Iterator[str]:
    if not pair.lemmas.zero and not pair.lemmas.struct:
        yield "Neither lemma applies to any of them: how the two interfere is known from the measured values only."


def kept_words(report: MergeAnalysis) -> list[str]:
    """How much the chosen method keeps, and whether another one would keep more."""
    chosen, ranked = report.chosen, report.ranked
    if chosen.refused is not None:
        first = [f"The method {chosen.method} refuses this merge."]
    elif chosen.kept is None:
        return ["The adapters change nothing, or the result is not finite: the methods are not compared."]
    else:
        first = [
            f"The method {chosen.method} keeps {percent(chosen.kept)} of the adapters' changes, by the measure below."
        ]
    if not ranked:
        return first
    best = ranked[0]
    if best.chosen:
        return [*first, "No other method keeps more." if len(ranked) > 1 else "No other method was compared."]
    worst = best.worst
    of_worst = (
        ""
        if worst is None
        else f", and {percent(worst[1])} of the adapter that loses most, {report.names[worst[0]]}"
    )
    return [*first, f"{best.method} would keep {percent(best.kept)}{of_worst}."]


def warnings(report: MergeAnalysis) -> list[str]:
    """What to know before using the result."""
    found = []
    if report.chosen.refused is not None:
        found.append(f"The merge is refused: {report.chosen.refused}.")
    for pair in report.pairs:
        found += _of_pair(report, pair)
    if report.chosen.refused is None:
        found += _after(report)
    return found


def _of_pair(report: MergeAnalysis, pair: MergedPair) -> Iterator[str]:
    first, second = (report.names[number] for number in pair.numbers)
    whole = pair.pair.whole
    common = whole.overlap
    clash = conflict_share(whole)
    if clash is not None and common.shared >= MET * min(common.first, common.second) and clash >= CLASH:
        yield (
            f"{first} and {second} have sign conflicts at {percent(clash)} of their shared entries (unrelated adapters: "
            f"half){_most(pair, clash)}."
        )
    for cosine, what in (
        (common.cosine, f"deltas of {first} and {second}"),
        (
            None if whole.interference is None else whole.interference.cosine,
            f"outputs of {first} and {second} on the layers' inputs",
        ),
    ):
        if cosine is not None and abs(cosine) >= ALIKE:
            yield (
                f"The {what} have a cosine of {cosine:+.2f}: merged, they "
                f"{'amplify' if cosine > 0 else 'partly cancel'} each other."
            )


def _most(pair: MergedPair, clash: float) -> str:
    """The kind of layer with the most conflicts, if it has many more than the others."""
    kinds = [(conflict_share(found) or 0.0, kind) for kind, found in pair.pair.kinds.items()]
    share, kind = max(kinds)
    return f"; most in the kind “{kind}”, {percent(share)}" if share >= clash + CLASH else ""


def _after(report: MergeAnalysis) -> Iterator[str]:
    for name, account in zip(report.names, report.chosen.accounts, strict=True):
        if account.energy_dropped is not None and account.energy_dropped >= LOST:
            yield (
                f"{name} loses {percent(account.energy_dropped)} of its energy: {account.dropped:,} of its {account.entries:,} entries are "
                "dropped."
            )
        if account.energy and account.disturbed is None:
            yield f"{name}: the result is NaN or infinite at entries of this adapter."
        rest = None if account.disturbed is None else account.disturbed - (account.energy_dropped or 0.0)
        if account.disturbed is not None and rest is not None and rest >= LOST:
            yield (
                f"{name}: at its own entries, the result differs from it by {percent(account.disturbed)} of its energy."
            )
    lost = report.chosen.lost_to_cut
    if lost is not None and lost >= LOST:
        yield f"The density limit drops {percent(lost)} of the energy of the result."
    best, kept = next(iter(report.ranked), None), report.chosen.kept
    if best is not None and kept is not None and (best.kept or 0.0) - kept >= BETTER:
        yield (
            f"The method {best.method} would keep more of the adapters' changes: {percent(best.kept)}, where {report.chosen.method} keeps "
            f"{percent(kept)} (measured on weights, not on tasks)."
        )
