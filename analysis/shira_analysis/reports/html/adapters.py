"""The page on adapters: a section for each, and one for their pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from shira_analysis.figures.layers import LayerGrid, What, layer_grid
from shira_analysis.figures.style import digits
from shira_analysis.reports.html import charts, page, pairs, words
from shira_analysis.reports.html.adapter_facts import AdapterFacts, labels
from shira_analysis.reports.html.page import facts, name, paragraph, share, table
from shira_analysis.reports.html.pairs import QUESTION
from shira_analysis.reports.text import fit as fit_text
from shira_format._core.text import counted
from shira_format.calibration.moments import Moments
from shira_format.version import __version__

_T = TypeVar("_T")
# Rows of a table of tensors: a browser takes seconds for many more, and nobody reads them.
MOST_ROWS = 5000
_UNITS = ("B", "kB", "MB", "GB")


def adapters_page(
    adapters: Sequence[AdapterFacts],
    moments: Moments | None = None,
    *,
    progress: Callable[[str], object] = lambda _: None,
) -> str:
    """The whole page, as HTML text.

    Args:
        adapters: at least one, from :func:`shira_analysis.reports.html.adapter_facts.read_facts`.
        moments: of the layers' inputs, to measure the interference of each pair on them.
        progress: called with the name of each weight whose pairs are measured.

    Raises:
        FormatError: a file was changed, or is damaged.
        SourceError: the moments are of none of the adapted weights.
    """
    called = labels(adapters)
    title = f"Adapter report: {called[0]}" if len(adapters) == 1 else f"Adapter report: {len(adapters)} adapters"
    parts = [f"<h1>{page.text(title)}</h1>", _sampled(adapters)]
    if len(adapters) > 1:
        parts.append(_contents(called, adapters))
    for number, (label, one) in enumerate(zip(called, adapters, strict=True), 1):
        parts += _section(number, label, one)
    if len(adapters) > 1:
        parts += pairs.section(called, adapters, moments, progress)
    parts.append(
        f'<footer class="soft"><p>Made by shira-format {page.text(__version__)}. Names, the base model, the source, the licence and the '
        "description are the file’s own statements, and so is what a fit keeps. Densities and energies are measured.</p></footer>"
    )
    return page.page(title, parts)


def _sampled(adapters: Sequence[AdapterFacts]) -> str:
    """That not all tensors were measured, if so."""
    measured = sum(len(one.tensors) for one in adapters)
    every = sum(len(one.info["tensors"]) for one in adapters)
    if measured == every:
        return ""
    what = f"{measured:,} of {every:,} tensors were measured: a sample of all sizes, with the largest."
    rest = "Numbers of entries and sizes of files are of all; energies, densities by kind and block, and pairs are of the sample."
    return paragraph([what, rest, "With --include others are chosen."])


def _contents(called: Sequence[str], adapters: Sequence[AdapterFacts]) -> str:
    """A table of all adapters, with links to their sections."""
    rows = []
    for number, (label, adapter) in enumerate(zip(called, adapters, strict=True), 1):
        totals, warned = adapter.info["totals"], len(words.warnings(adapter))
        kept = (adapter.info["selection"] or {}).get("energy_kept")
        rows.append(
            (
                f'<a href="#adapter-{number}">{name(label)}</a>', f"{totals['nnz']:,}", share(totals["density"]),
                "–" if kept is None else share(kept), f"{warned}",
            )
        )  # fmt: skip
    head = ("adapter", "entries", "density", "energy kept", "warnings")
    return f'{table(head, rows, stacked=True)}<p><a href="#pairs">{QUESTION}</a></p>'


def _section(number: int, label: str, adapter: AdapterFacts) -> Iterator[str]:
    info, grid = adapter.info, layer_grid(adapter.tensors)
    yield f'<section id="adapter-{number}"><h2>{page.text(label)}</h2>'
    yield page.warnings(words.warnings(adapter))
    yield from (paragraph(sentences) for sentences in words.summary(adapter, grid) if sentences)
    yield facts(_facts(adapter))
    yield from _effect(info["fit"])
    yield from _charts(adapter, grid)
    if adapter.tensors:
        yield f"<details><summary>{counted(len(adapter.tensors), 'tensor')}</summary>{_tensors(adapter, grid)}</details>"
    if info["whole"]:
        shown = _largest(info["whole"], lambda one: one["bytes"])
        rows = [(name(w["name"]), w["dtype"], _shape(w["shape"]), _size(w["bytes"])) for w in shown]
        yield f"<details><summary>{counted(len(info['whole']), 'tensor')} replaced as a whole</summary>"
        yield _left_out(len(info["whole"]), "of the most bytes")
        yield table(("tensor", "dtype", "shape", "size"), rows) + "</details>"
    yield "</section>"


def _facts(adapter: AdapterFacts) -> list[tuple[str, str]]:
    info, totals = adapter.info, adapter.info["totals"]
    found = [
        ("file", f"{info['file']}, {_size(totals['file_bytes'])}"),
        ("format", f"{info['format_version']}, written by {info['writer'] or 'an unnamed program'}"),
        ("default strength", f"{info['alpha']:g}"),
    ]
    if totals["bits_per_entry"] is not None:
        found.append(
            (
                "bits per entry",
                f"{totals['bits_per_entry']:.2f}, of which the index takes {totals['index_bits_per_entry']:.2f}",
            )
        )
    for prefix, part in (info["components"] or {}).items():
        model = part.get("base_model") or {}
        found.append((f"component {prefix}", f"for {model.get('id') or 'an unnamed base model'}"))
    checked = "all digests and rules" if info.get("verified") else "what this page shows (all: --verify)"
    found.append(("checked", checked))
    found += [(key, str(info[key])) for key in ("license", "description") if info[key]]
    return found


def _effect(fit: Any) -> Iterator[str]:
    """How near to its source a fitted adapter is, layer by layer, as the file states it."""
    effect, plain = (fit.get(key) if isinstance(fit, dict) else None for key in ("effect", "plain"))
    found, cut = fit_text.layers(effect), fit_text.layers(plain)
    if not found:
        return
    most = max(1.0, *found.values())
    rows = [
        ((label, f"{error:.3f}", f"{cut[label]:.3f}" if label in cut else "–"), error / most)
        for label, error in found.items()
    ]
    yield "<h3>How near each layer is to the source’s</h3>"
    about = (
        "Squared error of the layer’s output on inputs that were held out, as a share of the base’s: 0 is the source, 1 is as far from it as "
        "the base. Beside it is the error of the plain cut to as many entries. According to the file."
    )
    yield paragraph([about])
    yield charts.bars(("layer", "error", "plain cut", f"bars end at {most:.3g}"), rows)


def _charts(adapter: AdapterFacts, grid: LayerGrid) -> Iterator[str]:
    if not adapter.tensors:
        return
    shares: dict[str, list[float]] = {kind: [0.0, 0.0, 0.0] for kind in grid.kinds}
    for (kind, _), cell in grid.cells.items():
        sums = shares[grid.kinds[kind]]
        sums[0] += cell.entries
        sums[1] += cell.elements
        sums[2] += (cell.energy or 0.0) / grid.energy if grid.energy else 0.0
    density = {kind: entries / elements if elements else 0.0 for kind, (entries, elements, _) in shares.items()}
    yield "<h3>Where it changes the model</h3>"
    if grid.energy is not None:
        rows = [((kind, share(density[kind]), share(sums[2])), sums[2]) for kind, sums in shares.items()]
        yield charts.bars(("kind of layer", "density", "energy", "share of all energy"), rows)
    else:
        most = max(density.values()) or 1.0
        bars = [((kind, share(value)), value / most) for kind, value in density.items()]
        yield charts.bars(("kind of layer", "density", f"bars end at {share(most)}"), bars)
    if len(grid.blocks) > 1:
        what: What = "energy" if grid.energy is not None else "density"
        measure = "share of the change’s energy" if grid.energy is not None else "share of the elements changed"
        stems = [f"{stem}N" for stem in dict.fromkeys(grid.stems) if stem]
        columns = f"blocks {', '.join(stems[:4])}{', ...' if len(stems) > 4 else ''} by their number N"
        outside = "; –: outside of blocks" if "" in grid.blocks else ""
        yield charts.heat(grid, what, f"By kind of layer and block: {measure}, in %. Columns: {columns}{outside}.")
    if adapter.mask is not None:
        caption = (
            f"Positions of the {int(adapter.mask.counts.sum()):,} entries of {adapter.mask.name}, "
            f"{_shape(list(adapter.mask.shape))}, the tensor with the most: rows downwards, columns to the right."
        )
        yield charts.mask_image(adapter.mask, caption)


def _largest(items: Sequence[_T], size: Callable[[_T], int]) -> list[_T]:
    """The items that a table shows, in their order: all, or the largest."""
    if len(items) <= MOST_ROWS:
        return list(items)
    kept = sorted(range(len(items)), key=lambda number: -size(items[number]))[:MOST_ROWS]
    return [items[number] for number in sorted(kept)]


def _left_out(count: int, which: str) -> str:
    if count <= MOST_ROWS:
        return ""
    return paragraph([f"The {MOST_ROWS:,} {which} are shown; shira-inspect --json lists all {count:,}."])


def _tensors(adapter: AdapterFacts, grid: LayerGrid) -> str:
    rows_by_name = {row["name"]: row for row in adapter.info["tensors"]}
    rows = []
    for tensor in _largest(adapter.tensors, lambda one: one.mask.nnz):
        row, norms = rows_by_name[tensor.name], tensor.norms
        energy = (
            ""
            if norms is None or not grid.energy
            else f"{digits(100 * (norms.frobenius / grid.scale) ** 2 / grid.energy, 2)} %"
        )
        rows.append(
            (
                name(tensor.name), tensor.kind, row["dtype"], _shape(row["shape"]), f"{row['nnz']:,}",
                f"{100 * row['density']:.3g} %", energy,
                "" if row["energy_kept"] is None else f"{100 * row['energy_kept']:.1f} %",
                "" if norms is None else f"{norms.largest:.3g}", _size(row["bytes"]),
            )
        )  # fmt: skip
    head = (
        "tensor",
        "kind",
        "dtype",
        "shape",
        "entries",
        "density",
        "energy",
        "energy kept",
        "largest change",
        "size",
    )
    return _left_out(len(adapter.tensors), "with the most entries") + table(head, rows)


def _shape(shape: Sequence[int]) -> str:
    return "×".join(f"{size:,}" for size in shape) or "scalar"


def _size(number: float) -> str:
    for unit in _UNITS:
        if number < 1000 or unit == _UNITS[-1]:
            return f"{number:.0f}\u00a0B" if unit == "B" else f"{number:.2f}\u00a0{unit}"
        number /= 1000
    raise AssertionError
