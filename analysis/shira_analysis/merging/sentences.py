"""What a report on a merge says in sentences. Plain text."""

from __future__ import annotations

from collections.abc import Iterator

from shira_analysis.merging.report import MergeAnalysis, MergedPair, conflict_share
from shira_format._core.text import percent

MET = 0.01  # shared entries, as a share of the smaller adapter's, from which their signs matter
CLASH = 0.1  # share of the shared entries that are changed in opposite directions
ALIKE = 0.3  # a cosine from which two changes add up or cancel to an amount that shows
LOST = 0.1  # of an adapter's energy
BETTER = 0.01  # by how much more another method must keep to be named


def lemma_words(pair: MergedPair) -> list[str]:
    """What lemmas 4.4 and 4.5 say of two adapters."""
    lemmas, whole = pair.lemmas, pair.pair.whole
    total = len(lemmas.tensors)
    if not total:
        none = "No weight" if not whole.both else "No matrix"
        return [
            f"{none} is changed by both: there is no product A1^T A2 of which lemmas 4.4 and 4.5 could say anything."
        ]
    of = f"{total:,} {'matrix' if total == 1 else 'matrices'} that both change"
    return [*_zero(pair, of), *_struct(pair, of), *_neither(pair)]


def _zero(pair: MergedPair, of: str) -> Iterator[str]:
    lemmas = pair.lemmas
    text = f"Lemma 4.4 (A1^T A2 = 0, exactly) applies to {lemmas.zero:,} of the {of}"
    worst = lemmas.worst
    if worst is not None:
        text += f"; ||A1^T A2|| is at most {worst.margin or 0.0:.3g} of ||A1|| ||A2||, in {worst.name}"
    yield text + "."
    if lemmas.unclear:
        yield f"Of {lemmas.unclear:,} more the product is 0 but for rounding; whether it is 0 exactly was not computed."
    if lemmas.apart:
        yield (
            f"In {lemmas.apart:,} no row is changed by both: where rows are outputs (weights [out, in]), each acts on the layer as if it "
            "were alone, after any non-linearity too."
        )
    if more := lemmas.zero - lemmas.apart:
        yield (
            f"In {more:,} rows are changed by both: what the two add to the outputs is orthogonal, but after a non-linearity they may meet "
            "all the same."
        )


def _struct(pair: MergedPair, of: str) -> Iterator[str]:
    lemmas = pair.lemmas
    yield (
        f"Lemma 4.5 (both masks are the diagonal and whole rows, none in both) applies to {lemmas.struct:,} of the {of}"
        + (
            ""
            if lemmas.tightest is None
            else f": 1 - AWOR <= density(I) + density(S1) + density(S2) leaves {lemmas.tightest.room or 0.0:.3g} at least, in {lemmas.tightest.name}"
        )
        + "."
    )
    if lemmas.shared_rows:
        yield f"In {lemmas.shared_rows:,} the masks are such, but have rows in common, and the lemma promises nothing."


def _neither(pair: MergedPair) -> Iterator[str]:
    if not pair.lemmas.zero and not pair.lemmas.struct:
        yield "Neither lemma applies to any of them: nothing but the measured figures speaks for these two together."


def kept_words(report: MergeAnalysis) -> list[str]:
    """Which method would keep most."""
    chosen, ranked = report.chosen, report.ranked
    if chosen.refused is not None:
        first = [f"The method {chosen.method} refuses this merge."]
    elif chosen.kept is None:
        return ["There is nothing to keep, or the result is not finite: the methods are not compared."]
    else:
        first = [f"By this measure the method {chosen.method} keeps {percent(chosen.kept)}."]
    if not ranked:
        return first
    best = ranked[0]
    if best.chosen:
        others = "no other method that was tried keeps more" if len(ranked) > 1 else "no other one was tried"
        return [*first, f"Of the methods below {others}."]
    worst = best.worst
    told = (
        ""
        if worst is None
        else f", and of the adapter that loses most, {report.names[worst[0]]}, {percent(worst[1])}"
    )
    return [*first, f"{best.method} would keep {percent(best.kept)}{told}."]


def warnings(report: MergeAnalysis) -> list[str]:
    """What someone should know before using the result."""
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
            f"{first} and {second} pull {percent(clash)} of their shared entries in opposite directions (without any relation: "
            f"half){_most(pair, clash)}."
        )
    for cosine, where in (
        (common.cosine, "as changes of the weights"),
        (None if whole.interference is None else whole.interference.cosine, "on the layers' inputs"),
    ):
        if cosine is not None and abs(cosine) >= ALIKE:
            yield (
                f"{first} and {second} have a cosine of {cosine:+.2f} {where}: together they "
                f"{'do more than either is meant to do' if cosine > 0 else 'cancel each other in part'}."
            )


def _most(pair: MergedPair, clash: float) -> str:
    """The kind of layer with most conflicts, if it stands out."""
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
                f"{name}: at its own entries the result is off by {percent(account.disturbed)} of the energy that it was to have there."
            )
    lost = report.chosen.lost_to_cut
    if lost is not None and lost >= LOST:
        yield f"The cut to the density takes {percent(lost)} of the energy of the result."
    best, kept = next(iter(report.ranked), None), report.chosen.kept
    if best is not None and kept is not None and (best.kept or 0.0) - kept >= BETTER:
        yield (
            f"The method {best.method} would keep more of the adapters' changes: {percent(best.kept)}, and {report.chosen.method} keeps "
            f"{percent(kept)} (a measure of weights, not of tasks)."
        )
