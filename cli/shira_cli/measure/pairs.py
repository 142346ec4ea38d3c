"""``shira-measure pairs``: whether adapters of one base will disturb each other."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_cli import console

if TYPE_CHECKING:
    from shira_analysis.deltas import DeltaFile
    from shira_analysis.pairs import Measures, Pair

HEAD = ("", "shared", "expected", "signs agree", "cosine", "AWOM", "by chance", "AWOR", "by chance", "on inputs", "disturbed 1, 2")  # fmt: skip

EXPLAINED = """shared: entries of both, beside what two masks of these sizes share by chance; signs agree: of the shared entries.
cosine: of the deltas; AWOM, AWOR: Frobenius norm of A1^T A2 and its share of zeros, beside what random signs and columns give.
on inputs: the cosine of what the two add to the outputs, on the inputs of the moments; disturbed: the energy that the other
adapter puts onto an adapter's own output, as a share of that."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that only this measure has."""
    add = parser.add_argument
    add(
        "--moments",
        type=Path,
        metavar="FILE",
        help="second moments of the layers' inputs (shira_analysis.moments)",
    )
    add(
        "--transposed",
        action="store_true",
        help="A1 A2^T as well: layers whose weight is [in, out] write along rows",
    )
    add("--spectral", action="store_true", help="AWOM in the spectral norm as well (only with --json)")
    add("--tensors", action="store_true", help="a line for each tensor, not only for each kind of layer")


def run(options: argparse.Namespace, files: Sequence[DeltaFile]) -> tuple[str, list[dict[str, Any]]]:
    """Measure all pairs of ``files``; the table for people, and the same and more as JSON values."""
    from shira_analysis.moments import Moments
    from shira_analysis.pairs import measure_pairs

    pairs = measure_pairs(
        files,
        None if options.moments is None else Moments.read(options.moments),
        transposed=options.transposed,
        spectral=options.spectral,
    )
    texts = [_text(pair, tensors=options.tensors, transposed=options.transposed) for pair in pairs]
    return "\n\n".join([*texts, EXPLAINED]), [pair.as_json() for pair in pairs]


def _text(pair: Pair, *, tensors: bool, transposed: bool) -> str:
    whole = pair.whole
    lines = [
        f"{console.printable(pair.first)} and {console.printable(pair.second)}: {whole.both} of {whole.tensors} tensors in both"
    ]
    if (distances := whole.overlap.distances) is not None:
        between, first, second = distances
        lines.append(f"L2 distance of the two {between:.4g}; to the base {first:.4g} and {second:.4g}")
    fed = [
        (tensor.measures.interference.cosine or 0.0, tensor.name)
        for tensor in pair.tensors
        if tensor.measures.interference
    ]
    if fed:  # layers of opposite signs hide each other in a sum
        most, name = max(fed, key=lambda found: abs(found[0]))
        lines.append(f"largest cosine on inputs {most:+.3f}, in {console.printable(name)}")
    rows = list(_rows(pair, tensors=tensors))
    lines.append(console.table(HEAD, [_row(name, measures, measures.product) for name, measures in rows]))
    if transposed:
        lines += [
            "A1 A2^T:",
            console.table(HEAD, [_row(name, measures, measures.transposed) for name, measures in rows]),
        ]
    return "\n".join(lines)


def _rows(pair: Pair, *, tensors: bool) -> Iterator[tuple[str, Measures]]:
    if tensors:
        yield from ((tensor.name, tensor.measures) for tensor in pair.tensors)
    yield from pair.kinds.items()
    yield "all", pair.whole


def _row(name: str, measures: Measures, product: Any) -> list[str]:
    common, fed = measures.overlap, measures.interference
    row = [
        name, console.count(common.shared), f"{common.expected:,.0f} ± {common.deviation:.0f}",
        _share(common.sign_agreement), _number(common.cosine, "+.3f"),
    ]  # fmt: skip
    if product is None:
        row += [""] * 4
    else:
        row += [f"{product.awom:.3g}", f"{product.awom_if_independent:.3g}", _number(product.awor, ".4f"), _number(product.awor_if_independent, ".4f")]  # fmt: skip
    if fed is None:
        return [*row, "", ""]
    return [*row, _number(fed.cosine, "+.3f"), f"{_share(fed.disturbed_first)}, {_share(fed.disturbed_second)}"]


def _share(value: float | None) -> str:
    return "-" if value is None else console.percent(value)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
