"""Report of the measures of adapters, each by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from shira_analysis.reports.text.ranks import RANK_HEAD, rank_row, spectra
from shira_format._core.text import count, counted, percent, printable, table

if TYPE_CHECKING:
    from shira_analysis.measures.adapter import AdapterMeasures, Ranks
    from shira_analysis.measures.rank import RankReport
    from shira_analysis.measures.size import Mask, Norms
    from shira_analysis.measures.uniform import Compared

HEAD = ("", "entries", "density", "norm", "energy", "mean", "largest", "rows", "columns", "row disp.", "column disp.", "gap disp.", "neighbours")  # fmt: skip
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


def as_text(
    found: Sequence[AdapterMeasures], *, tensors: bool, histogram: bool, ranks: bool, spectrum: bool
) -> str:
    """Tables for each adapter, then what the columns are."""
    explained = [EXPLAINED, *([RANK_EXPLAINED] if ranks else []), *([SPECTRUM_EXPLAINED] if spectrum else [])]
    texts = [_text(one, tensors=tensors, histogram=histogram, spectrum=spectrum) for one in found]
    return "\n\n".join([*texts, "\n".join(explained)])


def _text(found: AdapterMeasures, *, tensors: bool, histogram: bool, spectrum: bool) -> str:
    mask = found.total.mask
    entries = f"{count(mask.nnz)} entries of {count(mask.numel)} in {counted(found.total.tensors, 'tensor')}"
    whole = f"{counted(len(found.whole), 'tensor')} {'is' if len(found.whole) == 1 else 'are'} replaced as a whole, and not measured"
    rows = list(_rows(found, tensors=tensors))
    energy = 0.0 if found.total.norms is None else found.total.norms.frobenius
    lines = [
        f"{printable(str(found.path))}: {entries}; {whole}",
        table(HEAD, [_row(name, of_mask, norms, energy) for name, of_mask, norms, _ in rows]),
    ]
    if histogram and found.total.norms is not None:
        lines.append(_histogram(found.total.norms))
    ranks = [(name, rank) for name, _, _, rank in rows if rank is not None]
    if ranks:
        lines.append(table(RANK_HEAD, [rank_row(name, rank) for name, rank in ranks]))
    if spectrum:
        lines.append(spectra((tensor.name, tensor.rank) for tensor in found.tensors if tensor.rank is not None))
    return "\n".join(lines)


def _histogram(norms: Norms) -> str:
    """How many magnitudes lie between each two powers of two, all tensors together, the smallest first."""
    most = max(norms.histogram.values(), default=0)
    total = norms.zeros + sum(norms.histogram.values())
    bins = [(f"2^{e} = {2.0**e:.2g}", size) for e, size in norms.histogram.items()]
    rows = [(name, count(size), percent(size / total), "#" * -(-size * BAR // most)) for name, size in bins]  # fmt: skip
    if norms.zeros:
        rows.insert(0, ("0", count(norms.zeros), percent(norms.zeros / total), ""))
    lines = table(("|delta| from", "entries", "share"), [row[:3] for row in rows]).splitlines()
    return "\n".join(
        [lines[0], *(f"{line}  {row[3]}".rstrip() for line, row in zip(lines[1:], rows, strict=True))]
    )


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
    row = [name, count(mask.nnz), percent(mask.density)]
    if norms is None:
        row += ["-"] * 4
    else:
        # The root's share, squared: energies may be beyond float64 where norms are not.
        share = percent((norms.frobenius / whole) ** 2) if 0 < whole < math.inf else "-"
        row += [f"{norms.frobenius:.4g}", share, _mean(norms, mask), f"{norms.largest:.3g}"]
    row += [_share(mask.rows, mask.all_rows), _share(mask.columns, mask.all_columns)]
    names = ("row_dispersion", "column_dispersion", "gap_dispersion", "neighbours")
    return row + [_compared(mask.spread.get(figure)) for figure in names]


def _mean(norms: Norms, mask: Mask) -> str:
    return f"{norms.mean(mask.nnz):.3g}" if mask.nnz else "-"


def _share(part: int, whole: int) -> str:
    return percent(part / whole) if whole else "-"


def _compared(figure: Compared | None) -> str:
    if figure is None or not figure.expected:
        return "-"
    return f"{figure.found / figure.expected:.3g}" + ("" if figure.z is None else f" ({round(figure.z):+d})")
