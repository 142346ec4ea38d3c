"""A merge report as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from shira_analysis.measures.pairs import Measures
from shira_analysis.merging.report import LIMITS, MEASURE, MergeAnalysis, MergedPair, conflict_share
from shira_analysis.merging.sentences import kept_words, lemma_words
from shira_format._core.text import number, percent, printable, table
from shira_format.merging.methods import shown

_WIDTH = 120
_MOST = 10  # tensors that are listed; all are in the JSON and on the page

_BEFORE = ("", "shared", "expected", "conflicts", "share", "cosine", "AWOM", "by chance", "AWOR", "by chance", "on inputs", "disturbed 1, 2", "at each 1, 2")  # fmt: skip

_LEGEND_BEFORE = """shared: entries in both adapters, with the number expected by chance; conflicts: shared entries where the signs of w d are \
opposite, and their share. AWOM, AWOR: Frobenius norm of A1^T A2 and its share of zeros (weights [out, in]), with the values for random signs \
and columns. on inputs: the cosine of the two adapters' outputs, from the moments (layers of opposite signs cancel); disturbed: the energy of \
the other adapter's output projected onto an adapter's own output, over all inputs at once, relative to the energy of its own (layers do not cancel); \
at each: the same, projected at each input separately, if the moments come with inputs."""
_LEGEND_AFTER = """dropped: entries that the method or the density limit leaves out, and their share of the adapter's energy (the sum of squares). disturbed: \
||r - w d||^2 / ||w d||^2 at the adapter's entries, dropped ones included. w: its weight times its alpha, d: its deltas, r: the deltas of the result."""


def text(report: MergeAnalysis) -> str:
    """The whole report."""
    lines = [_title(report)]
    if found := report.warnings():
        lines += ["", "warnings:", *(_wrapped(one, "  * ") for one in found)]
    lines += ["", "BEFORE"] + [line for pair in report.pairs for line in _pair(report, pair)]
    lines += [_wrapped(_LEGEND_BEFORE)] if report.pairs else ["one adapter alone: there is no pair to compare"]
    lines += ["", "AFTER", *_after(report), "", "OTHER METHODS", *_methods(report)]
    return "\n".join(lines + [_wrapped(note, "note: ") for note in report.notes])


def _wrapped(sentence: str, head: str = "") -> str:
    return textwrap.fill(
        printable(sentence), _WIDTH, initial_indent=head, subsequent_indent=" " * len(head),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def title(report: MergeAnalysis) -> str:
    """What is merged, and how."""
    options = ", ".join(f"{key}={shown(value)}" for key, value in report.settings["options"].items())
    how = f"{report.settings['method']}{f' ({options})' if options else ''}"
    if report.density is not None:
        how += f", limited to a density of {percent(report.density)}"
    return f"{' and '.join(report.names)}, merged with {how}"


def _title(report: MergeAnalysis) -> str:
    lines = [printable(title(report))]
    for layer in report.settings.get("layers", []):
        some = ", ".join(f"{key}={shown(value)}" for key, value in layer.items() if key != "pattern")
        lines.append(printable(f"  in layers with {layer['pattern']!r}: {some}"))
    return "\n".join(lines)


def _pair(report: MergeAnalysis, pair: MergedPair) -> Iterator[str]:
    first, second = (report.names[number] for number in pair.numbers)
    whole = pair.pair.whole
    yield printable(f"{first} and {second}: {whole.both} of {whole.tensors} tensors in both")
    rows = [*pair.pair.kinds.items(), ("all", whole)]
    columns = len(_BEFORE) - (0 if report.fed else 3)
    yield table(_BEFORE[:columns], [_measures(*row)[:columns] for row in rows])
    yield from map(_wrapped, lemma_words(pair))
    yield ""


def _measures(name: str, measures: Measures) -> list[str]:
    common, product, met = measures.overlap, measures.product, measures.interference
    row = [
        name, f"{common.shared:,}", f"{common.expected:,.0f} ± {common.deviation:.0f}",
        "-" if common.opposite_sign is None else f"{common.opposite_sign:,}", percent(conflict_share(measures)),
        number(common.cosine, "+.3f"),
    ]  # fmt: skip
    if product is None:
        row += [""] * 4
    else:
        row += [
            f"{product.awom:.3g}", f"{product.awom_if_independent:.3g}", number(product.awor, ".4f"),
            number(product.awor_if_independent, ".4f"),
        ]  # fmt: skip
    if met is None:
        return [*row, "", "", ""]
    shares = (", ".join(map(percent, both)) for both in (met.disturbed, met.disturbed_each))
    return [*row, number(met.cosine, "+.3f"), *shares]


def _after(report: MergeAnalysis) -> Iterator[str]:
    if report.chosen.refused is not None:
        yield _wrapped(f"the merge is refused: {report.chosen.refused}")
        return
    names: Sequence[str] = report.names
    rows = [
        (
            name, strength, f"{one.entries:,}", f"{one.dropped:,}", percent(one.energy_dropped),
            percent(one.disturbed),
        )
        for name, strength, one in zip(names, report.strength_words, report.chosen.accounts, strict=True)
    ]  # fmt: skip
    yield table(("", "w", "entries", "dropped", "energy", "disturbed"), rows)
    if report.chosen.lost_to_cut is not None:
        yield f"density limit: {percent(report.chosen.lost_to_cut)} of the energy of the result is lost"
    tensors = sorted(report.after, key=lambda one: -one.disturbed)[:_MOST]
    if tensors:
        more = (
            f"; {len(report.after) - _MOST:,} more are in the JSON and on the page"
            if len(report.after) > _MOST
            else ""
        )
        yield f"tensors, the most disturbed first{more}:"
        yield table(
            ("", "entries", *names),
            [(one.name, f"{one.nnz:,}", *(percent(of.disturbed) for of in one.accounts)) for one in tensors],
        )
    yield _wrapped(_LEGEND_AFTER)


def _methods(report: MergeAnalysis) -> Iterator[str]:
    yield _wrapped(" ".join(kept_words(report)))
    rows = []
    for trial in report.ranked:
        worst = trial.worst
        rows.append(
            (
                f"{trial.method}{' (chosen)' if trial.chosen else ''}", percent(trial.kept),
                percent(None if worst is None else worst[1]), "" if worst is None else report.names[worst[0]],
            )
        )  # fmt: skip
    if rows:
        yield table(("", "kept", "worst adapter", "which"), rows)
    for trial in report.refused:
        yield _wrapped(f"{trial.method}: {trial.refused}")
    yield _wrapped(f"{MEASURE}. {LIMITS}.")
