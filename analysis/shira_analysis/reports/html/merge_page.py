"""A merge report as an HTML page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from shira_analysis.measures.pairs import Measures
from shira_analysis.merging.accounts import Account
from shira_analysis.merging.lemmas import TensorLemmas
from shira_analysis.merging.report import LIMITS, MEASURE, MergeAnalysis, MergedPair, conflict_share
from shira_analysis.merging.sentences import kept_words, lemma_words
from shira_analysis.reports.html import charts, page, words
from shira_analysis.reports.html.page import facts, name, paragraph, table
from shira_format._core.text import counted, percent
from shira_format.merging.methods import shown
from shira_format.version import __version__

# Whole formulas, since the sentences contain names of files and tensors.
_SIGNS = (
    ("||A1^T A2||", "‖A₁ᵀA₂‖"),
    ("||A1|| ||A2||", "‖A₁‖ ‖A₂‖"),
    ("A1^T A2 =", "A₁ᵀA₂ ="),
    ("product A1^T A2", "product A₁ᵀA₂"),
    ("AWOR <= density", "AWOR ≤ density"),
)
_BEFORE = ("shared", "by chance", "conflicts", "of the shared", "cosine", "AWOR", "by chance", "AWOM", "by chance")


def merge_page(report: MergeAnalysis) -> str:
    """The whole page, as HTML text.

    Args:
        report: from :func:`shira_analysis.merging.analysis.analyse_merge`.
    """
    title = f"Merge report: {' and '.join(report.names)}"
    parts = [
        f"<h1>{page.text(title)}</h1>",
        page.warnings(map(_signs, report.warnings())),
        facts(_facts(report)),
        *_before(report),
        *_after(report),
        *_methods(report),
        f'<footer class="soft"><p>Made by shira-format {page.text(__version__)}.</p></footer>',
    ]
    return page.page(title, parts)


def _facts(report: MergeAnalysis) -> list[tuple[str, str]]:
    settings = report.settings
    found = [
        ("method", str(settings["method"])),
        ("options", _options(settings["options"]) or "none"),
    ]
    for layer in settings.get("layers", []):
        some = {key: value for key, value in layer.items() if key != "pattern"}
        found.append((f"in layers with {layer['pattern']}", _options(some)))
    for label, weight, alpha in zip(report.names, report.weights, report.alphas, strict=True):
        found.append((label, f"weight {weight:g}" + (f", times its alpha {alpha:g}" if alpha != 1 else "")))
    if report.density is not None:
        lost = report.chosen.lost_to_cut
        found.append(
            (
                "density limit",
                f"{_share(report.density)} of each weight's elements, the largest changes"
                + ("" if lost is None else f"; {_share(lost)} of the energy of the result is lost"),
            )
        )
    return [*found, *(("not measured", note) for note in report.notes)]


def _options(given: dict[str, object]) -> str:
    return ", ".join(f"{key} = {shown(value)}" for key, value in given.items())


def _before(report: MergeAnalysis) -> Iterator[str]:
    yield '<section id="before"><h2>Before: do they interfere with each other?</h2>'
    if not report.pairs:
        yield paragraph(["One adapter alone: there is no pair to compare."])
    for pair in report.pairs:
        yield from _pair(report, pair)
    if report.pairs:
        yield (
            '<p class="soft">Shared: entries in both adapters, with the number expected by chance. Conflicts: shared entries with opposite '
            "signs, each multiplied by the sign of its adapter’s weight. AWOR is the share of zeros in A₁ᵀA₂, and AWOM its Frobenius norm, over the "
            "matrices that both change (weights [out, in]), with the values for random signs and columns."
            + (
                " From the second moments of the layers’ inputs: the cosine of the two adapters’ outputs (layers of opposite signs cancel). Disturbed: "
                "the energy of the other adapter’s output projected onto an adapter’s own output, over all inputs at once, relative to the energy of "
                "its own (layers do not cancel); in brackets: projected at each input separately, if the moments come with inputs."
                if report.fed
                else ""
            )
            + "</p>"
        )
    yield "</section>"


def _pair(report: MergeAnalysis, pair: MergedPair) -> Iterator[str]:
    first, second = (report.names[at] for at in pair.numbers)
    if len(report.pairs) > 1:
        yield f"<h3>{page.text(first)} and {page.text(second)}</h3>"
    yield paragraph(words.pair_words(first, second, pair.pair))
    yield paragraph(map(_signs, lemma_words(pair)))
    kinds = [*pair.pair.kinds.items(), ("all", pair.pair.whole)]
    yield table(("kind of layer", *_BEFORE), [(page.text(kind), *_cells(found)) for kind, found in kinds])
    fed: tuple[str, ...] = ()
    if report.fed:
        fed = ("cosine on inputs", f"{first} disturbed", f"{second} disturbed")
        yield table(("kind of layer", *fed), [(page.text(kind), *_fed_cells(found)) for kind, found in kinds])
    lemmas = {one.name: one for one in pair.lemmas.tensors}
    each = [
        (
            name(one.name), *_cells(one.measures), *(_fed_cells(one.measures) if report.fed else ()),
            *_lemma_cells(lemmas.get(one.name)),
        )
        for one in pair.pair.tensors
    ]  # fmt: skip
    yield f"<details><summary>{page.text(counted(len(each), 'tensor'))} of {page.text(first)} and {page.text(second)}</summary>"
    head = ("tensor", *_BEFORE, *fed, "lemma 4.4", "its margin", "lemma 4.5", "its margin")
    yield table(head, each) + "</details>"


def _cells(measures: Measures) -> list[str]:
    common, product = measures.overlap, measures.product
    cells = [
        f"{common.shared:,}", f"{common.expected:,.0f}", "–" if common.opposite_sign is None else f"{common.opposite_sign:,}",
        _share(conflict_share(measures)), _number(common.cosine, "+.3f"),
    ]  # fmt: skip
    return cells + (["–"] * 4 if product is None else [
        _number(product.awor, ".4f"), _number(product.awor_if_independent, ".4f"), f"{product.awom:.3g}", f"{product.awom_if_independent:.3g}",
    ])  # fmt: skip


def _fed_cells(measures: Measures) -> list[str]:
    met = measures.interference
    if met is None:
        return ["–"] * 3
    shares = zip(met.disturbed, met.disturbed_each, strict=True)
    shown_shares = [_share(share) + ("" if each is None else f" ({_share(each)})") for share, each in shares]
    return [_number(met.cosine, "+.3f"), *shown_shares]


def _lemma_cells(found: TensorLemmas | None) -> list[str]:
    if found is None:
        return ["–"] * 4
    zero = {True: "applies", False: "no", None: "unknown"}[found.zero]
    struct = {"yes": "applies", "no": "no", "shared rows": "rows in both"}[found.struct]
    return [zero, _number(found.margin, ".3g"), struct, _number(found.bound_margin, ".3g")]


def _after(report: MergeAnalysis) -> Iterator[str]:
    yield '<section id="after"><h2>After: what is left of each adapter?</h2>'
    if report.chosen.refused is not None:
        yield paragraph([f"The merge is refused: {report.chosen.refused}."]) + "</section>"
        return
    rows = [
        (
            name(label), strength, f"{one.entries:,}", f"{one.dropped:,}", _share(one.energy_dropped), _share(one.disturbed),
        )
        for label, strength, one in zip(report.names, report.strength_words, report.chosen.accounts, strict=True)
    ]  # fmt: skip
    head = ("adapter", "weight w", "entries", "dropped", "energy dropped", "disturbed")
    yield table(head, rows, stacked=True)
    yield (
        '<p class="soft">Dropped: entries that the method or the density limit leaves out, and their share of the adapter’s energy (the sum of squares). '
        "Disturbed: ‖r − w d‖² / ‖w d‖² at the adapter’s own entries, dropped ones included; d are its deltas, r those of the result.</p>"
    )
    if report.kinds:
        yield "<h3>Disturbed, by kind of layer</h3>"
        kinds = [(page.text(kind), *map(_disturbed, accounts)) for kind, accounts in report.kinds.items()]
        yield table(("kind of layer", *report.names), kinds)
        tensors = [
            (name(one.name), f"{one.nnz:,}", *map(_disturbed, one.accounts))
            for one in sorted(report.after, key=lambda one: -one.disturbed)
        ]
        yield f"<details><summary>{counted(len(tensors), 'tensor')} of the result, the most disturbed first</summary>"
        yield table(("tensor", "entries", *report.names), tensors) + "</details>"
    yield "</section>"


def _disturbed(account: Account) -> str:
    return _share(account.disturbed)


def _methods(report: MergeAnalysis) -> Iterator[str]:
    yield '<section id="methods"><h2>Would another method keep more?</h2>'
    yield paragraph(map(_signs, kept_words(report)))
    rows: list[tuple[Sequence[str], float]] = []
    for trial in report.ranked:
        worst = trial.worst
        of_worst = "–" if worst is None else _share(worst[1])
        rows.append(
            (
                (f"{trial.method}{' (chosen)' if trial.chosen else ''}", _share(trial.kept), of_worst),
                max(0.0, trial.kept or 0.0),
            )
        )
    if rows:
        yield charts.bars(("method", "kept", "worst", "as bars"), rows)
    if report.refused:
        yield f"<details><summary>Refused by {counted(len(report.refused), 'method')}</summary>"
        yield facts((trial.method, str(trial.refused)) for trial in report.refused) + "</details>"
    legend = f"{MEASURE}. {LIMITS}. Worst: how much is kept of the adapter that loses most."
    for plain, sign in (("w_i", "wᵢ"), ("d_i", "dᵢ"), ("||", "‖"), ("^2", "²"), (" - ", " − ")):
        legend = legend.replace(plain, sign)
    yield f'<p class="soft">{page.text(legend)}</p></section>'


def _signs(sentence: str) -> str:
    """Formulas with mathematical characters."""
    for plain, sign in _SIGNS:
        sentence = sentence.replace(plain, sign)
    return re.sub(r"(?<=\d) %", "\u00a0%", sentence)


def _share(value: float | None) -> str:
    return "–" if value is None else percent(value).replace(" ", "\u00a0")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
