"""The report itself: a section for each adapter, and one for their pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from shira_analysis.deltas import DeltaFile
from shira_analysis.figures.layers import LayerGrid, What, layer_grid
from shira_analysis.figures.style import digits
from shira_analysis.html import charts, page, words
from shira_analysis.html.look import Look, labels
from shira_analysis.html.page import facts, name, paragraph, table
from shira_analysis.interference import Interference
from shira_analysis.moments import Moments
from shira_analysis.pairs import Measures, Pair, TensorPair, check_fed, measure_pairs, replaced
from shira_format import SourceError, __version__
from shira_format.tensors import matrix_view

_WIDEST = 1 << 24  # rows or columns of a weight whose products are measured; beyond, only positions are compared
_QUESTION = "Do they disturb each other?"
_UNITS = ("B", "kB", "MB", "GB")
_SHARED = ("pair", "shared", "by chance", "Jaccard", "signs agree", "cosine")
_SHARED_TOLD = (
    "Shared: entries of both, beside the number that two uniform masks of these sizes share by chance; Jaccard: their share of the entries of "
    "either. Cosine: of the changes of all weights."
)
_PRODUCTS = ("pair", "AWOR", "structural", "uniform", "by counts", "AWOM", "by chance")
_PRODUCTS_TOLD = (
    "AWOR: the share of zeros in A₁ᵀA₂, over the weights that both change; structural: of cells that no two entries reach. Uniform: what "
    "independent uniform masks of these densities would give, (1 − p₁p₂)ᵐ of a weight with m rows; by counts: masks with as many entries in "
    "each row as these. AWOM: the Frobenius norm of A₁ᵀA₂; by chance: with random signs."
)
_FED = ("pair", "cosine on inputs", "least of a layer", "largest of a layer", "1st disturbed", "2nd disturbed")
_FED_TOLD = (
    "On inputs: the cosine of what the two add to the layers’ outputs, by the second moments of the layers’ inputs; layers of opposite "
    "signs cancel in it, so that the least and the largest of a single layer stand beside it. Disturbed: the energy of the projection of the "
    "other’s output onto an adapter’s own, on all inputs at once, as a share of its energy; from layer to layer nothing cancels. At "
    "each input: the projection is made there by itself, so that nothing cancels at all (for moments with inputs beside them)."
)
_WEIGHTS_ALONE = (
    "These are measures of the weights: what two adapters do to each other’s outputs depends on the inputs as well (shira-moments, "
    "and --moments here)."
)


def report(
    looks: Sequence[Look], moments: Moments | None = None, *, progress: Callable[[str], object] = lambda _: None
) -> str:
    """The whole page on some adapters, as text.

    Args:
        looks: at least one, from :func:`shira_analysis.html.look`.
        moments: of the layers' inputs, for what each two do to each other on them.
        progress: called with the name of each weight whose pairs are measured.

    Raises:
        FormatError: a file was changed, or is damaged.
        SourceError: the moments are of none of the weights.
    """
    called = labels(looks)
    title = f"Adapter report: {called[0]}" if len(looks) == 1 else f"Adapter report: {len(looks)} adapters"
    parts = [f"<h1>{page.text(title)}</h1>"]
    if len(looks) > 1:
        parts.append(_contents(called, looks))
    for number, (label, one) in enumerate(zip(called, looks, strict=True), 1):
        parts += _section(number, label, one)
    if len(looks) > 1:
        parts += _pairs(called, looks, moments, progress)
    parts.append(
        f'<footer class="soft"><p>Made by shira-format {page.text(__version__)}. Names, the base model, the source, the licence and the '
        "description are what the file says of itself. Densities and energies are measured.</p></footer>"
    )
    return page.page(title, parts)


def _contents(called: Sequence[str], looks: Sequence[Look]) -> str:
    """All adapters at a glance, and the way to what is said of each."""
    rows = []
    for number, (label, look) in enumerate(zip(called, looks, strict=True), 1):
        totals, warned = look.info["totals"], len(words.warnings(look))
        kept = (look.info["selection"] or {}).get("energy_kept")
        rows.append(
            (
                f'<a href="#adapter-{number}">{name(label)}</a>', f"{totals['nnz']:,}", _share(totals["density"]),
                "–" if kept is None else _share(kept), f"{warned}",
            )
        )  # fmt: skip
    head = ("adapter", "entries", "density", "energy kept", "warnings")
    return f'{table(head, rows, stacked=True)}<p><a href="#pairs">{_QUESTION}</a></p>'


def _section(number: int, label: str, look: Look) -> Iterator[str]:
    info, grid = look.info, layer_grid(look.tensors)
    yield f'<section id="adapter-{number}"><h2>{page.text(label)}</h2>'
    yield page.warnings(words.warnings(look))
    yield from (paragraph(sentences) for sentences in words.summary(look, grid) if sentences)
    yield facts(_facts(look))
    yield from _charts(look, grid)
    if look.tensors:
        yield f"<details><summary>{_count(len(look.tensors), 'tensor')}</summary>{_tensors(look)}</details>"
    if info["whole"]:
        rows = [(name(w["name"]), w["dtype"], _shape(w["shape"]), _size(w["bytes"])) for w in info["whole"]]
        yield f"<details><summary>{_count(len(rows), 'tensor')} replaced as a whole</summary>"
        yield table(("tensor", "dtype", "shape", "size"), rows) + "</details>"
    yield "</section>"


def _facts(look: Look) -> list[tuple[str, str]]:
    info, totals = look.info, look.info["totals"]
    found = [
        ("file", f"{info['file']}, {_size(totals['file_bytes'])}"),
        ("format", f"{info['format_version']}, written by {info['writer'] or 'a program that it does not name'}"),
        ("strength", f"{info['alpha']:g} by default"),
    ]
    if totals["bits_per_entry"] is not None:
        found.append(
            (
                "an entry takes",
                f"{totals['bits_per_entry']:.2f} bits, of which its place {totals['index_bits_per_entry']:.2f}",
            )
        )
    for prefix, part in (info["components"] or {}).items():
        model = part.get("base_model") or {}
        found.append((f"part {prefix}", f"for {model.get('id') or 'a base model that is not named'}"))
    checked = "all digests and rules" if info.get("verified") else "what this page shows (all: --verify)"
    found.append(("checked", checked))
    found += [(key, str(info[key])) for key in ("license", "description") if info[key]]
    return found


def _charts(look: Look, grid: LayerGrid) -> Iterator[str]:
    if not look.tensors:
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
        rows = [((kind, _share(density[kind]), _share(sums[2])), sums[2]) for kind, sums in shares.items()]
        yield charts.bars(("kind of layer", "density", "energy", "share of all energy"), rows)
    else:
        most = max(density.values()) or 1.0
        bars = [((kind, _share(value)), value / most) for kind, value in density.items()]
        yield charts.bars(("kind of layer", "density", f"bars end at {_share(most)}"), bars)
    if len(grid.blocks) > 1:
        what: What = "energy" if grid.energy is not None else "density"
        told = (
            "share of the change’s energy" if grid.energy is not None else "share of the elements that are changed"
        )
        stems = [f"{stem}N" for stem in dict.fromkeys(grid.stems) if stem]
        columns = f"blocks {', '.join(stems[:4])}{', ...' if len(stems) > 4 else ''} by their number N"
        outside = "; –: outside of blocks" if "" in grid.blocks else ""
        yield charts.heat(grid, what, f"By kind of layer and block: {told}, in %. Columns: {columns}{outside}.")
    if look.mask is not None:
        caption = (
            f"Where the {int(look.mask.counts.sum()):,} entries of {look.mask.name} lie, "
            f"{_shape(list(look.mask.shape))}, the tensor with most of them: rows downwards, columns to the right."
        )
        yield charts.mask_image(look.mask, caption)


def _tensors(look: Look) -> str:
    told = {row["name"]: row for row in look.info["tensors"]}
    grid = layer_grid(look.tensors)
    rows = []
    for tensor in look.tensors:
        row, norms = told[tensor.name], tensor.norms
        share = (
            ""
            if norms is None or not grid.energy
            else f"{digits(100 * (norms.frobenius / grid.scale) ** 2 / grid.energy, 2)} %"
        )
        rows.append(
            (
                name(tensor.name), tensor.kind, row["dtype"], _shape(row["shape"]), f"{row['nnz']:,}",
                f"{100 * row['density']:.3g} %", share,
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
        "kept of the source",
        "largest change",
        "size",
    )
    return table(head, rows)


def _pairs(
    called: Sequence[str], looks: Sequence[Look], moments: Moments | None, progress: Callable[[str], object]
) -> Iterator[str]:
    yield f'<section id="pairs"><h2>{_QUESTION}</h2>'
    reason = _why_not(looks)
    if moments is not None:
        check_fed(moments, (one.file for one in looks))
    if reason is not None:
        more = ", and the moments are not used" if moments is not None else ""
        yield paragraph([f"{reason}: only the places of the entries are compared{more}."])
    shared, products, fed = [], [], []
    found = _measured([one.file for one in looks], moments, progress, positions=reason is not None)
    for (i, j), pair in zip(combinations(range(len(looks)), 2), found, strict=True):
        both = f"{name(called[i])} and {name(called[j])}"
        if isinstance(pair, SourceError):
            yield page.warnings([f"{called[i]} and {called[j]} cannot be compared: {pair}."])
            continue
        yield paragraph(words.pair_words(called[i], called[j], pair))
        common, product, met = pair.whole.overlap, pair.whole.product, pair.whole.interference
        shared.append(
            (
                both, f"{common.shared:,}", f"{common.expected:,.0f}", _or_none(common.jaccard, "{:.4f}"),
                "–" if common.sign_agreement is None else _share(common.sign_agreement), _or_none(common.cosine, "{:+.3f}"),
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
            fed.append(
                (both, *(_or_none(one, "{:+.3f}") for one in (met.cosine, *_extremes(pair))), *_disturbed(met))
            )
    for head, rows, told in (
        (_SHARED, shared, _SHARED_TOLD),
        (_PRODUCTS, products, _PRODUCTS_TOLD),
        (_FED, fed, _FED_TOLD),
    ):
        if rows:
            yield table(head, rows, stacked=True) + f'<p class="soft">{page.text(told)}</p>'
    if products and not fed:
        yield f'<p class="soft">{page.text(_WEIGHTS_ALONE)}</p>'
    yield "</section>"


def _measured(
    files: Sequence[DeltaFile], moments: Moments | None, progress: Callable[[str], object], *, positions: bool
) -> list[Pair | SourceError]:
    """Each pair, or why it cannot be compared: adapters of another base spoil no pair but their own."""

    def some(chosen: Sequence[DeltaFile]) -> Sequence[Pair]:
        return _positions(chosen) if positions else measure_pairs(chosen, moments, strict=False, progress=progress)

    try:
        return [*some(files)]
    except SourceError:
        found: list[Pair | SourceError] = []
        for two in combinations(files, 2):
            try:
                found += some(two)
            except SourceError as error:
                found.append(error)
        return found


def _extremes(pair: Pair) -> tuple[float | None, float | None]:
    """The least and the largest cosine on inputs of a weight."""
    met = [one.measures.interference for one in pair.tensors]
    cosines = [one.cosine for one in met if one is not None and one.cosine is not None]
    return (min(cosines), max(cosines)) if cosines else (None, None)


def _disturbed(met: Interference) -> tuple[str, str]:
    return (
        _share_at_each(met.disturbed_first, met.disturbed_first_each),
        _share_at_each(met.disturbed_second, met.disturbed_second_each),
    )


def _share_at_each(share: float | None, each: float | None) -> str:
    if share is None:
        return "–"
    return _share(share) + ("" if each is None else f" (at each input {_share(each)})")


def _why_not(looks: Sequence[Look]) -> str | None:
    """Why the changes themselves cannot be compared; None if they can."""
    if not all(look.known for look in looks):
        return "Not all changes are known (see above)"
    if any(max(matrix_view(tensor.shape)) > _WIDEST for look in looks for tensor in look.tensors):
        return "A weight has too many rows or columns for products"
    try:
        import scipy.sparse  # noqa: F401 - only whether it is there
    except ImportError:
        return "scipy is not installed (pip install 'shira-format[analysis]')"
    return None


def _positions(files: Sequence[DeltaFile]) -> list[Pair]:
    """Pairs of which the places of entries alone are known."""
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
            replaced(files[i], files[j]),
        )
        for (i, j), common in overlaps(files).items()
    ]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


def _or_none(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _shape(shape: Sequence[int]) -> str:
    return "×".join(f"{size:,}" for size in shape) or "scalar"


def _size(number: float) -> str:
    for unit in _UNITS:
        if number < 1000 or unit == _UNITS[-1]:
            return f"{number:.0f}\u00a0B" if unit == "B" else f"{number:.2f}\u00a0{unit}"
        number /= 1000
    raise AssertionError
