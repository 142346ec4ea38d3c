"""``shira-measure``, of each adapter alone: size, shape and, if asked for, histogram, ranks and spectrum."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from shira_format._core import text

if TYPE_CHECKING:
    from shira_analysis.measures.adapter import AdapterMeasures, Ranks
    from shira_analysis.measures.deltas import DeltaFile
    from shira_analysis.measures.rank import RankReport
    from shira_analysis.measures.size import Mask, Norms
    from shira_analysis.measures.uniform import Compared

HEAD = ("", "entries", "density", "norm", "energy", "mean", "largest", "rows", "columns", "row disp.", "column disp.", "gap disp.", "neighbours")  # fmt: skip
RANK_HEAD = ("", "full", "exact rank", "numerical", "stable", "effective")
SPECTRUM_HEAD = ("", "largest", "second", "median", "smallest", "50 %", "90 %", "99 %")
SHARES = (0.5, 0.9, 0.99)
BAR = 40

EXPLAINED = """norm: Frobenius, of the deltas; energy: share of the whole adapter's sum of squares; mean and largest: of the magnitudes;
rows, columns: share that has an entry.
disp.: index of dispersion of how many entries a row or column has, and of the gaps between entries, over what a uniform mask
gives (1: as uniform; more: clustered), and how many standard deviations apart; neighbours: entries right after another, likewise."""
RANK_EXPLAINED = """exact rank: of the exact difference, proven; an interval where the proofs do not meet; numerical: at float64's epsilon.
stable: squared Frobenius over squared spectral norm; effective: exp of the entropy of the singular values. Of several tensors:
sums of the first three, means of the others."""
SPECTRUM_EXPLAINED = """singular values: those that count for the numerical rank; 50 %, 90 %, 99 %: how many of the largest hold so much of the
energy. --json has them all."""


def run(options: argparse.Namespace, files: Sequence[DeltaFile]) -> tuple[str, list[dict[str, Any]]]:
    """Measure each of ``files``; the tables for people, and the same and more as JSON values."""
    from tqdm import tqdm

    from shira_analysis.measures.adapter import measure_file

    hidden = options.quiet or not sys.stderr.isatty()
    with tqdm(total=sum(len(file.names) for file in files), unit="tensors", disable=hidden, leave=False) as bar:
        found = [measure_file(file, rank=options.rank, progress=bar.update) for file in files]
    texts = [_text(measures, options) for measures in found]
    explained = [EXPLAINED]
    if options.rank:
        explained.append(RANK_EXPLAINED)
    if options.spectrum:
        explained.append(SPECTRUM_EXPLAINED)
    return "\n\n".join([*texts, "\n".join(explained)]), [one.as_json(values=options.spectrum) for one in found]


def _text(found: AdapterMeasures, options: argparse.Namespace) -> str:
    mask = found.total.mask
    entries = f"{text.count(mask.nnz)} entries of {text.count(mask.numel)} in {text.counted(found.total.tensors, 'tensor')}"
    whole = f"{text.counted(len(found.whole), 'tensor')} {'is' if len(found.whole) == 1 else 'are'} replaced as a whole, and not measured"
    rows = list(_rows(found, tensors=options.tensors))
    energy = 0.0 if found.total.norms is None else found.total.norms.frobenius
    lines = [
        f"{text.printable(str(found.path))}: {entries}; {whole}",
        text.table(HEAD, [_row(name, of_mask, norms, energy) for name, of_mask, norms, _ in rows]),
    ]
    if options.histogram and found.total.norms is not None:
        lines.append(_histogram(found.total.norms))
    ranks = [(name, rank) for name, _, _, rank in rows if rank is not None]
    if ranks:
        lines.append(text.table(RANK_HEAD, [rank_row(name, rank) for name, rank in ranks]))
    if options.spectrum:
        lines.append(spectra((tensor.name, tensor.rank) for tensor in found.tensors if tensor.rank is not None))
    return "\n".join(lines)


def _histogram(norms: Norms) -> str:
    """How many magnitudes lie between each two powers of two, all tensors together, the smallest first."""
    most = max(norms.histogram.values(), default=0)
    total = norms.zeros + sum(norms.histogram.values())
    bins = [(f"2^{e} = {2.0**e:.2g}", count) for e, count in norms.histogram.items()]
    rows = [(name, text.count(count), text.percent(count / total), "#" * -(-count * BAR // most)) for name, count in bins]  # fmt: skip
    if norms.zeros:
        rows.insert(0, ("0", text.count(norms.zeros), text.percent(norms.zeros / total), ""))
    table = text.table(("|delta| from", "entries", "share"), [row[:3] for row in rows]).splitlines()
    return "\n".join(
        [table[0], *(f"{line}  {row[3]}".rstrip() for line, row in zip(table[1:], rows, strict=True))]
    )


def spectra(reports: Iterable[tuple[str, RankReport]]) -> str:
    """A line of singular values for each tensor."""
    rows = []
    for name, report in reports:
        if (found := report.spectrum) is None:
            rows.append([name, "too large", *[""] * (len(SPECTRUM_HEAD) - 2)])
            continue
        values = found.values[: found.numerical_rank]  # what follows is rounding
        chosen = [
            values[i] if i < values.size else None for i in (0, 1, values.size // 2, max(0, values.size - 1))
        ]
        rows.append([
            name,
            *("-" if value is None else f"{value:.3g}" for value in chosen),
            *(text.count(found.holding(share)) for share in SHARES),
        ])  # fmt: skip
    return text.table(SPECTRUM_HEAD, rows)


def _rows(
    found: AdapterMeasures, *, tensors: bool
) -> Iterator[tuple[str, Mask, Norms | None, RankReport | Ranks | None]]:
    if tensors:
        for tensor in found.tensors:
            yield tensor.name, tensor.mask, tensor.norms, tensor.rank
    for kind, group in found.kinds.items():
        yield kind, group.mask, group.norms, group.ranks
    yield "all", found.total.mask, found.total.norms, found.total.ranks


def _row(name: str, mask: Mask, norms: Norms | None, whole: float) -> list[str]:
    row = [name, text.count(mask.nnz), text.percent(mask.density)]
    if norms is None:
        row += ["-"] * 4
    else:
        # The root's share, squared: energies may be beyond float64 where norms are not.
        share = text.percent((norms.frobenius / whole) ** 2) if 0 < whole < math.inf else "-"
        row += [f"{norms.frobenius:.4g}", share, _mean(norms, mask), f"{norms.largest:.3g}"]
    row += [_share(mask.rows, mask.all_rows), _share(mask.columns, mask.all_columns)]
    names = ("row_dispersion", "column_dispersion", "gap_dispersion", "neighbours")
    return row + [_compared(mask.spread.get(figure)) for figure in names]


def _mean(norms: Norms, mask: Mask) -> str:
    return f"{norms.mean(mask.nnz):.3g}" if mask.nnz else "-"


def _share(part: int, whole: int) -> str:
    return text.percent(part / whole) if whole else "-"


def _compared(figure: Compared | None) -> str:
    if figure is None or not figure.expected:
        return "-"
    return f"{figure.found / figure.expected:.3g}" + ("" if figure.z is None else f" ({round(figure.z):+d})")


def rank_row(name: str, rank: RankReport | Ranks) -> list[str]:
    """The cells below :data:`RANK_HEAD`."""
    known = rank.as_json()
    return [
        name,
        text.count(known["full_rank"]),
        _interval(known.get("rank_at_least"), known.get("rank_at_most")),
        _count(known.get("numerical_rank")),
        _number(known.get("stable_rank", known.get("mean_stable_rank"))),
        _number(known.get("effective_rank", known.get("mean_effective_rank"))),
    ]


def _interval(low: int | None, high: int | None) -> str:
    return _count(low) if low == high else f"{_count(low)} to {_count(high)}"


def _count(number: int | None) -> str:
    return "-" if number is None else text.count(number)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
