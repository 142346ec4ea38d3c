"""Report of how adapters of one base, two by two, will disturb each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from shira_analysis.reports.text.parts import and_more
from shira_format._core.text import count, counted, number, percent, printable, table

if TYPE_CHECKING:
    from shira_analysis.measures.interference import Interference
    from shira_analysis.measures.orthogonality import Orthogonality
    from shira_analysis.measures.overlap import Overlap
    from shira_analysis.measures.pairs import Measures, Pair

OVERLAP_HEAD = ("", "shared", "by chance", "Jaccard", "signs agree", "cosine", "apart", "1 to base", "2 to base")

EXPLAINED = """shared: entries of both, beside what two masks of these sizes share by chance; signs agree: of the shared entries; cosine: of
the deltas; apart, to base: L2 distances of the adapted weights from each other and from the base.
AWOM: Frobenius norm of the product, beside what random signs give. AWOR: its share of cells that are 0; structural: that no two
entries reach; uniform: expected of uniform masks of these densities; by counts: of masks with these numbers of entries in the
rows (of A1 A2^T: columns) over which the product sums."""
INPUTS_EXPLAINED = """on inputs: the cosine of what the two add to the outputs, on the inputs of the moments (layers of opposite signs cancel);
disturbed: the energy of the projection of the other adapter's output onto an adapter's own, on all inputs at once, as a share of
its energy: what it gains on some inputs and loses on others cancels, but not from layer to layer."""
EACH_EXPLAINED = "at each 1, 2: the same, projected at each input by itself, where nothing cancels; on the inputs that the moments come with."


def as_text(pairs: Sequence[Pair], *, tensors: bool, transposed: bool, spectral: bool, fed: bool) -> str:
    """Tables for each pair, then what the columns are; ``fed``: measured with moments."""
    explained = [EXPLAINED, *([INPUTS_EXPLAINED] if fed else [])]
    if any(_at_each(pair.whole.interference) for pair in pairs):
        explained.append(EACH_EXPLAINED)
    texts = [_text(pair, tensors=tensors, transposed=transposed, spectral=spectral) for pair in pairs]
    return "\n\n".join([*texts, "\n".join(explained)])


def _text(pair: Pair, *, tensors: bool, transposed: bool, spectral: bool) -> str:
    whole = pair.whole
    lines = [
        f"{printable(pair.first)} and {printable(pair.second)}: {whole.both} of {counted(whole.tensors, 'tensor')} in both"
    ]
    if not whole.both:
        lines.append("they change no weight in common, and cannot meet within a layer")
    if pair.replaced:
        lines.append(f"not both at once, since one replaces them whole: {and_more(pair.replaced)}")
    fed = [
        (tensor.measures.interference.cosine or 0.0, tensor.name)
        for tensor in pair.tensors
        if tensor.measures.interference
    ]
    if fed:  # layers of opposite signs hide each other in a sum
        most, name = max(fed, key=lambda found: abs(found[0]))
        lines.append(f"largest cosine on inputs {most:+.3f}, in {printable(name)}")
    rows = list(_rows(pair, tensors=tensors))
    lines.append(table(OVERLAP_HEAD, [_overlap_row(name, measures.overlap) for name, measures in rows]))
    lines.append(_products("A1^T A2", [(name, measures.product, measures.interference) for name, measures in rows], spectral=spectral, fed=bool(fed)))  # fmt: skip
    if transposed:
        lines.append(_products("A1 A2^T", [(name, measures.transposed, None) for name, measures in rows], spectral=spectral, fed=False))  # fmt: skip
    return "\n".join(line for line in lines if line)


def _rows(pair: Pair, *, tensors: bool) -> Iterator[tuple[str, Measures]]:
    if tensors:
        yield from ((tensor.name, tensor.measures) for tensor in pair.tensors)
    yield from pair.kinds.items()
    yield "all", pair.whole


def _overlap_row(name: str, found: Overlap) -> list[str]:
    distances = ["-"] * 3 if found.distances is None else [f"{distance:.4g}" for distance in found.distances]
    return [
        name, count(found.shared), f"{found.expected:,.0f} ± {found.deviation:.0f}", number(found.jaccard, ".3f"),
        percent(found.sign_agreement), number(found.cosine, "+.3f"), *distances,
    ]  # fmt: skip


def _products(
    title: str,
    rows: Sequence[tuple[str, Orthogonality | None, Interference | None]],
    *,
    spectral: bool,
    fed: bool,
) -> str:
    """A table of AWOM and AWOR; nothing if no weight has a product, as of masks."""
    head = [title, "AWOM", "by chance", "spectral", "AWOR", "structural", "uniform", "by counts", "on inputs", "disturbed 1, 2", "at each 1, 2"]  # fmt: skip
    shown = {3: spectral, 8: fed, 9: fed, 10: any(_at_each(inputs) for _, _, inputs in rows)}
    kept = [column for column in range(len(head)) if shown.get(column, True)]
    cells = [
        [
            name, f"{product.awom:.3g}", f"{product.awom_if_independent:.3g}", number(product.spectral, ".3g"),
            *map(_zeros, (product.awor, product.awor_structural, product.awor_if_uniform, product.awor_if_independent)),
            *_on_inputs(inputs),
        ]
        for name, product, inputs in rows
        if product is not None
    ]  # fmt: skip
    return table([head[i] for i in kept], [[row[i] for i in kept] for row in cells]) if cells else ""


def _on_inputs(inputs: Interference | None) -> list[str]:
    if inputs is None:
        return ["-"] * 3
    shares = (", ".join(map(percent, both)) for both in (inputs.disturbed, inputs.disturbed_each))
    return [number(inputs.cosine, "+.3f"), *shares]


def _at_each(inputs: Interference | None) -> bool:
    return inputs is not None and inputs.projected_first is not None


def _zeros(share: float | None) -> str:
    """A share of zeros; what is not quite 1 does not look like it."""
    if share is not None and 0.99995 <= share < 1:
        return f"1 - {1 - share:.1g}"
    return number(share, ".4f")
