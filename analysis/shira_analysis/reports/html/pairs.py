"""The section of a page on how each two adapters interfere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from shira_analysis.measures.deltas import DeltaFile
from shira_analysis.measures.interference import Interference
from shira_analysis.measures.pairs import (
    Measures,
    Pair,
    TensorPair,
    check_moments,
    measure_pairs,
    replaced_tensors,
)
from shira_analysis.reports.html import page, words
from shira_analysis.reports.html.adapter_facts import AdapterFacts
from shira_analysis.reports.html.page import name, paragraph, share, table
from shira_format._core.text import counted
from shira_format.calibration.moments import Moments
from shira_format.errors import BaseMismatch, SourceError
from shira_format.tensors import matrix_shape

QUESTION = "Do they interfere with each other?"
_WIDEST = (
    1 << 24
)  # the most rows or columns of a weight whose products are measured; beyond, only positions are compared
_FEW = 6  # up to so many pairs, the sentences of each are shown unfolded
_SHARED = ("pair", "shared", "by chance", "Jaccard", "signs agree", "cosine")
_SHARED_LEGEND = (
    "Shared: entries in both adapters, with the number expected by chance for two uniform masks of these sizes; Jaccard: their share of the "
    "entries in either. Cosine: of the deltas of all weights."
)
_PRODUCTS = ("pair", "AWOR", "structural", "uniform", "by counts", "AWOM", "by chance")
_PRODUCTS_LEGEND = (
    "AWOR: the share of zeros in A₁ᵀA₂, over the weights that both change; structural: the share of cells that no two entries reach. Uniform: the "
    "value for independent uniform masks of these densities, (1 − p₁p₂)ᵐ of a weight with m rows; by counts: for random masks with as many entries in "
    "each row as these. AWOM: the Frobenius norm of A₁ᵀA₂; by chance: with random signs."
)
_FED = ("pair", "cosine on inputs", "least of a layer", "largest of a layer", "1st disturbed", "2nd disturbed")
_FED_LEGEND = (
    "On inputs: the cosine of the two adapters’ outputs, from the second moments of the layers’ inputs; layers of opposite signs cancel, so "
    "the smallest and the largest value of a single layer are shown, too. Disturbed: the energy of the other adapter’s output projected onto an "
    "adapter’s own output, over all inputs at once, relative to the energy of its own; layers do not cancel. At each input: projected at each "
    "input separately, so that nothing cancels (if the moments come with inputs)."
)
_WEIGHTS_ALONE = (
    "These are measures of the weights. How two adapters interfere also depends on the inputs: collect their moments with shira-moments "
    "and pass them with --moments."
)

Found = dict[tuple[int, int], Pair | SourceError | BaseMismatch]


def section(
    called: Sequence[str],
    adapters: Sequence[AdapterFacts],
    moments: Moments | None,
    progress: Callable[[str], object],
) -> Iterator[str]:
    """The section, as pieces of HTML.

    Args:
        called: the adapters' names.
        adapters: two or more.
        moments: of the layers' inputs.
        progress: called with the name of each weight that is measured.

    Raises:
        FormatError: a file was changed, or is damaged.
        SourceError: the moments are of none of the adapted weights.
    """
    if moments is not None:
        check_moments(moments, (name for adapter in adapters for name in adapter.file.names))
    reasons = [_why_not(adapter) for adapter in adapters]
    found = _measured([adapter.file for adapter in adapters], reasons, moments, progress)
    pairs = {at: pair for at, pair in found.items() if isinstance(pair, Pair)}
    apart = [at for at, pair in pairs.items() if not pair.whole.both]
    many = len(found) > _FEW
    yield f'<section id="pairs"><h2>{QUESTION}</h2>'
    yield page.warnings(_refusals(called, found))
    yield from _positions_only(called, reasons)
    sentences = [paragraph(words.pair_words(called[i], called[j], pair)) for (i, j), pair in pairs.items()]
    if not many:
        yield from sentences
    elif apart:
        yield paragraph(
            [
                f"{counted(len(apart), 'pair')} of {len(found):,} change no weight in common, and are not in the tables."
            ]
        )
    yield from _tables(called, {at: pair for at, pair in pairs.items() if not (many and at in apart)})
    if many and sentences:
        yield f"<details><summary>{counted(len(sentences), 'pair')} in words</summary>{''.join(sentences)}</details>"
    yield "</section>"


def _refusals(called: Sequence[str], found: Found) -> list[str]:
    messages = [
        f"{called[i]} and {called[j]} cannot be compared: {error}."
        for (i, j), error in found.items()
        if not isinstance(error, Pair)
    ]
    more = len(messages) - _FEW
    return messages if more <= 0 else [*messages[:_FEW], f"{counted(more, 'further pair')} cannot be compared."]


def _positions_only(called: Sequence[str], reasons: Sequence[str | None]) -> Iterator[str]:
    """Why only the positions of the entries are compared for some adapters."""
    for reason in dict.fromkeys(reason for reason in reasons if reason is not None):
        names = [label for label, own in zip(called, reasons, strict=True) if own == reason]
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        yield paragraph([f"{reason.format(some)}: only the positions of the entries are compared."])


def _tables(called: Sequence[str], pairs: dict[tuple[int, int], Pair]) -> Iterator[str]:
    shared, products, fed = [], [], []
    for (i, j), pair in pairs.items():
        both = f"{name(called[i])} and {name(called[j])}"
        common, product, met = pair.whole.overlap, pair.whole.product, pair.whole.interference
        shared.append(
            (
                both, f"{common.shared:,}", f"{common.expected:,.0f}", _or_none(common.jaccard, "{:.4f}"),
                "–" if common.sign_agreement is None else share(common.sign_agreement), _or_none(common.cosine, "{:+.3f}"),
            )
        )  # fmt: skip
        if product is not None:
            zeros = (product.awor, product.awor_structural, product.awor_if_uniform, product.awor_if_independent)
            products.append(
                (
                    both, *(_or_none(one, "{:.4f}") for one in zeros), f"{product.awom:.3g}",
                    f"{product.awom_if_independent:.3g}",
                )
            )  # fmt: skip
        if met is not None:
            cosines = (met.cosine, *_extremes(pair))
            fed.append((both, *(_or_none(one, "{:+.3f}") for one in cosines), *_disturbed(met)))
    tables = ((_SHARED, shared, _SHARED_LEGEND), (_PRODUCTS, products, _PRODUCTS_LEGEND), (_FED, fed, _FED_LEGEND))
    for head, rows, legend in tables:
        if rows:
            yield table(head, rows, stacked=True) + f'<p class="soft">{page.text(legend)}</p>'
    if products and not fed:
        yield f'<p class="soft">{page.text(_WEIGHTS_ALONE)}</p>'


def _measured(
    files: Sequence[DeltaFile],
    reasons: Sequence[str | None],
    moments: Moments | None,
    progress: Callable[[str], object],
) -> Found:
    """All measures of each pair if both adapters' deltas are known, else positions only; or why it cannot be compared."""

    def all_measures(chosen: Sequence[DeltaFile]) -> Sequence[Pair]:
        return measure_pairs(chosen, moments, strict=False, progress=progress)

    everyone = range(len(files))
    known = [number for number in everyone if reasons[number] is None]
    found = _each(files, everyone, _positions) if len(known) < len(files) else {}
    found |= _each(files, known, all_measures)
    return dict(sorted(found.items()))


def _each(
    files: Sequence[DeltaFile], numbers: Sequence[int], compare: Callable[[Sequence[DeltaFile]], Sequence[Pair]]
) -> Found:
    """Compare all pairs, reading each file once; if that fails, pair by pair, so that the others are still compared."""
    pairs = list(combinations(numbers, 2))
    if not pairs:
        return {}
    try:
        return dict(zip(pairs, compare([files[number] for number in numbers]), strict=True))
    except (SourceError, BaseMismatch):
        found: Found = {}
        for i, j in pairs:
            try:
                (found[i, j],) = compare([files[i], files[j]])
            except (SourceError, BaseMismatch) as error:
                found[i, j] = error
        return found


def _extremes(pair: Pair) -> tuple[float | None, float | None]:
    """The smallest and the largest cosine on inputs of a single weight."""
    met = [one.measures.interference for one in pair.tensors]
    cosines = [one.cosine for one in met if one is not None and one.cosine is not None]
    return (min(cosines), max(cosines)) if cosines else (None, None)


def _disturbed(met: Interference) -> tuple[str, str]:
    first, second = map(_share_at_each, met.disturbed, met.disturbed_each)
    return first, second


def _share_at_each(disturbed: float | None, each: float | None) -> str:
    if disturbed is None:
        return "–"
    return share(disturbed) + ("" if each is None else f" (at each input {share(each)})")


def _why_not(adapter: AdapterFacts) -> str | None:
    """Why the deltas of an adapter cannot be compared, with ``{}`` for its name; None if they can."""
    if not adapter.known:
        return "Not all changes of {} are known (see above)"
    if any(max(matrix_shape(tensor.shape)) > _WIDEST for tensor in adapter.tensors):
        return "A weight of {} has too many rows or columns for products"
    return None


def _positions(files: Sequence[DeltaFile]) -> list[Pair]:
    """The pairs, compared by the positions of their entries only."""
    from shira_analysis.figures.matrices import overlaps

    return [
        Pair(
            str(files[i].path),
            str(files[j].path),
            [
                TensorPair(
                    "",
                    (),
                    "other",
                    Measures(
                        len({*files[i].names, *files[j].names}), len({*files[i].names} & {*files[j].names}), common
                    ),
                )
            ],
            replaced_tensors(files[i], files[j]),
        )
        for (i, j), common in overlaps(files).items()
    ]


def _or_none(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
