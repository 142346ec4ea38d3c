"""``shira-measure``, of each adapter alone: size, shape and, if asked for, ranks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from shira_cli import console

if TYPE_CHECKING:
    from shira_analysis.deltas import DeltaFile
    from shira_analysis.measures import AdapterMeasures, Ranks
    from shira_analysis.rank import RankReport
    from shira_analysis.size import Mask, Norms
    from shira_analysis.uniform import Compared

HEAD = ("", "entries", "density", "norm", "mean", "largest", "rows", "columns", "row disp.", "column disp.", "gap disp.", "neighbours")  # fmt: skip
RANK_HEAD = ("", "full", "exact rank", "numerical", "stable", "effective")

EXPLAINED = """norm: Frobenius, of the deltas; mean and largest: of their magnitudes; rows, columns: share that has an entry.
disp.: index of dispersion of how many entries a row or column has, and of the gaps between entries, over what a uniform mask
gives (1: as uniform; more: clustered), and how many standard deviations apart; neighbours: entries right after another, likewise."""
RANK_EXPLAINED = """exact rank: of the exact difference, proven; an interval where the proofs do not meet; numerical: at float64's epsilon.
stable: squared Frobenius over squared spectral norm; effective: exp of the entropy of the singular values. Of several tensors:
sums of the first three, means of the others."""


def run(options: argparse.Namespace, files: Sequence[DeltaFile]) -> tuple[str, list[dict[str, Any]]]:
    """Measure each of ``files``; the tables for people, and the same and more as JSON values."""
    from tqdm import tqdm

    from shira_analysis.measures import measure_file

    hidden = options.quiet or not sys.stderr.isatty()
    with tqdm(total=sum(len(file.names) for file in files), unit="tensors", disable=hidden, leave=False) as bar:
        found = [measure_file(file, rank=options.rank, progress=bar.update) for file in files]
    texts = [_text(measures, tensors=options.tensors) for measures in found]
    explained = [EXPLAINED, RANK_EXPLAINED] if options.rank else [EXPLAINED]
    return "\n\n".join([*texts, "\n".join(explained)]), [measures.as_json() for measures in found]


def _text(found: AdapterMeasures, *, tensors: bool) -> str:
    mask = found.total.mask
    entries = f"{console.count(mask.nnz)} entries of {console.count(mask.numel)} in {found.total.tensors} tensors"
    whole = f"{len(found.whole)} tensors are replaced as a whole, and not measured"
    rows = list(_rows(found, tensors=tensors))
    lines = [
        f"{console.printable(str(found.path))}: {entries}; {whole}",
        console.table(HEAD, [_row(name, of_mask, norms) for name, of_mask, norms, _ in rows]),
    ]
    ranks = [(name, rank) for name, _, _, rank in rows if rank is not None]
    if ranks:
        lines.append(console.table(RANK_HEAD, [_rank_row(name, rank) for name, rank in ranks]))
    return "\n".join(lines)


def _rows(
    found: AdapterMeasures, *, tensors: bool
) -> Iterator[tuple[str, Mask, Norms | None, RankReport | Ranks | None]]:
    if tensors:
        for tensor in found.tensors:
            yield tensor.name, tensor.mask, tensor.norms, tensor.rank
    for kind, group in found.kinds.items():
        yield kind, group.mask, group.norms, group.ranks
    yield "all", found.total.mask, found.total.norms, found.total.ranks


def _row(name: str, mask: Mask, norms: Norms | None) -> list[str]:
    row = [name, console.count(mask.nnz), console.percent(mask.density)]
    row += ["-"] * 3 if norms is None else [f"{norms.frobenius:.4g}", _mean(norms, mask), f"{norms.largest:.3g}"]
    row += [_share(mask.rows, mask.all_rows), _share(mask.columns, mask.all_columns)]
    names = ("row_dispersion", "column_dispersion", "gap_dispersion", "neighbours")
    return row + [_compared(mask.spread.get(figure)) for figure in names]


def _mean(norms: Norms, mask: Mask) -> str:
    return f"{norms.mean(mask.nnz):.3g}" if mask.nnz else "-"


def _share(part: int, whole: int) -> str:
    return console.percent(part / whole) if whole else "-"


def _compared(figure: Compared | None) -> str:
    if figure is None or not figure.expected:
        return "-"
    return f"{figure.found / figure.expected:.3g}" + ("" if figure.z is None else f" ({figure.z:+.0f})")


def _rank_row(name: str, rank: RankReport | Ranks) -> list[str]:
    known = rank.as_json()
    return [
        name,
        console.count(known["full_rank"]),
        _interval(known.get("rank_at_least"), known.get("rank_at_most")),
        _count(known.get("numerical_rank")),
        _number(known.get("stable_rank", known.get("mean_stable_rank"))),
        _number(known.get("effective_rank", known.get("mean_effective_rank"))),
    ]


def _interval(low: int | None, high: int | None) -> str:
    return _count(low) if low == high else f"{_count(low)} to {_count(high)}"


def _count(number: int | None) -> str:
    return "-" if number is None else console.count(number)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
