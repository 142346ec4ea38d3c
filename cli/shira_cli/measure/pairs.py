"""``shira-measure`` of several adapters: whether adapters of one base will disturb each other."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_format._core import text

if TYPE_CHECKING:
    from shira_analysis.measures.deltas import DeltaFile
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


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that only this measure has."""
    add = parser.add_argument
    add(
        "--moments",
        type=Path,
        metavar="FILE",
        help="second moments of the layers' inputs, from shira-moments",
    )
    add(
        "--transposed",
        action="store_true",
        help="A1 A2^T as well: layers whose weight is [in, out] write along rows",
    )
    add("--spectral", action="store_true", help="AWOM in the spectral norm as well")
    add("--tensors", action="store_true", help="a line for each tensor, not only for each kind of layer")


def run(options: argparse.Namespace, files: Sequence[DeltaFile]) -> tuple[str, list[dict[str, Any]]]:
    """Measure all pairs of ``files``; the table for people, and the same and more as JSON values."""
    from tqdm import tqdm

    from shira_analysis.measures.pairs import measure_pairs
    from shira_format.calibration.moments import Moments

    hidden = options.quiet or not sys.stderr.isatty()
    names = {name for file in files for name in file.names}
    with tqdm(total=len(names), unit="tensors", disable=hidden, leave=False) as bar:
        pairs = measure_pairs(
            files,
            None if options.moments is None else Moments.read(options.moments),
            transposed=options.transposed,
            spectral=options.spectral,
            progress=lambda _: bar.update(1),
        )
    explained = [EXPLAINED] if options.moments is None else [EXPLAINED, INPUTS_EXPLAINED]
    if any(_at_each(pair.whole.interference) for pair in pairs):
        explained.append(EACH_EXPLAINED)
    texts = [_text(pair, options) for pair in pairs]
    return "\n\n".join([*texts, "\n".join(explained)]), [pair.as_json() for pair in pairs]


def _text(pair: Pair, options: argparse.Namespace) -> str:
    whole = pair.whole
    lines = [
        f"{text.printable(pair.first)} and {text.printable(pair.second)}: {whole.both} of {text.counted(whole.tensors, 'tensor')} in both"
    ]
    if not whole.both:
        lines.append("they change no weight in common, and cannot meet within a layer")
    if pair.replaced:
        names = ", ".join(text.printable(name) for name in pair.replaced[:3])
        more = len(pair.replaced) - 3
        lines.append(f"not both at once, for one replaces them as a whole: {names}" + (f" and {more} more" if more > 0 else ""))  # fmt: skip
    fed = [
        (tensor.measures.interference.cosine or 0.0, tensor.name)
        for tensor in pair.tensors
        if tensor.measures.interference
    ]
    if fed:  # layers of opposite signs hide each other in a sum
        most, name = max(fed, key=lambda found: abs(found[0]))
        lines.append(f"largest cosine on inputs {most:+.3f}, in {text.printable(name)}")
    rows = list(_rows(pair, tensors=options.tensors))
    lines.append(text.table(OVERLAP_HEAD, [_overlap_row(name, measures.overlap) for name, measures in rows]))
    lines.append(_products("A1^T A2", [(name, measures.product, measures.interference) for name, measures in rows], options, fed=bool(fed)))  # fmt: skip
    if options.transposed:
        lines.append(_products("A1 A2^T", [(name, measures.transposed, None) for name, measures in rows], options, fed=False))  # fmt: skip
    return "\n".join(line for line in lines if line)


def _rows(pair: Pair, *, tensors: bool) -> Iterator[tuple[str, Measures]]:
    if tensors:
        yield from ((tensor.name, tensor.measures) for tensor in pair.tensors)
    yield from pair.kinds.items()
    yield "all", pair.whole


def _overlap_row(name: str, found: Overlap) -> list[str]:
    distances = ["-"] * 3 if found.distances is None else [f"{distance:.4g}" for distance in found.distances]
    return [
        name, text.count(found.shared), f"{found.expected:,.0f} ± {found.deviation:.0f}", _number(found.jaccard, ".3f"),
        _share(found.sign_agreement), _number(found.cosine, "+.3f"), *distances,
    ]  # fmt: skip


def _products(
    title: str,
    rows: Sequence[tuple[str, Orthogonality | None, Interference | None]],
    options: argparse.Namespace,
    *,
    fed: bool,
) -> str:
    """A table of AWOM and AWOR; nothing if no weight has a product, as of masks."""
    head = [title, "AWOM", "by chance", "spectral", "AWOR", "structural", "uniform", "by counts", "on inputs", "disturbed 1, 2", "at each 1, 2"]  # fmt: skip
    shown = {3: options.spectral, 8: fed, 9: fed, 10: any(_at_each(inputs) for _, _, inputs in rows)}
    kept = [column for column in range(len(head)) if shown.get(column, True)]
    cells = [
        [
            name, f"{product.awom:.3g}", f"{product.awom_if_independent:.3g}", _number(product.spectral, ".3g"),
            *map(_zeros, (product.awor, product.awor_structural, product.awor_if_uniform, product.awor_if_independent)),
            *_on_inputs(inputs),
        ]
        for name, product, inputs in rows
        if product is not None
    ]  # fmt: skip
    return text.table([head[i] for i in kept], [[row[i] for i in kept] for row in cells]) if cells else ""


def _on_inputs(inputs: Interference | None) -> list[str]:
    if inputs is None:
        return ["-"] * 3
    shares = (", ".join(map(_share, both)) for both in (inputs.disturbed, inputs.disturbed_each))
    return [_number(inputs.cosine, "+.3f"), *shares]


def _at_each(inputs: Interference | None) -> bool:
    return inputs is not None and inputs.projected_first is not None


def _zeros(share: float | None) -> str:
    """A share of zeros; what is not quite 1 does not look like it."""
    if share is not None and 0.99995 <= share < 1:
        return f"1 - {1 - share:.1g}"
    return _number(share, ".4f")


def _share(value: float | None) -> str:
    return "-" if value is None else text.percent(value)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
