"""An adapter's changes by block of the model and kind of layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from shira_analysis.figures.records import Record
from shira_analysis.figures.style import digits, short_label, text_colour
from shira_analysis.measures.adapter import TensorMeasures
from shira_analysis.measures.layer_kinds import KINDS
from shira_format.tensors import density

Float64s = npt.NDArray[np.float64]

What = Literal["density", "energy"]

OUTSIDE = "outside"  # not in a block: embeddings, heads
_BLOCK = re.compile(r"^(.*?\.?)(\d+)(?:\.|$)")
_WRITTEN = 16  # the most blocks for which the cells show their numbers


@dataclass(frozen=True)
class LayerCell:
    """The tensors of one kind in one block.

    Attributes:
        tensors: their number.
        entries: their total.
        elements: their total.
        energy: the sum of squares of the deltas, over the grid's ``scale`` squared; None if a delta is unknown.
    """

    tensors: int
    entries: int
    elements: int
    energy: float | None

    @property
    def density(self) -> float:
        """Entries over elements."""
        return density(self.entries, self.elements)


@dataclass(frozen=True, eq=False)
class LayerGrid:
    """An adapter by kinds of layer and blocks.

    Attributes:
        stems: for each block, the part of its name before the number, in the order of the adapter.
        blocks: the block numbers as text; "" for tensors outside all blocks.
        kinds: the kinds of layers in the adapter, in the order of :data:`shira_analysis.measures.layer_kinds.KINDS`.
        cells: by (index in ``kinds``, index in ``blocks``); only cells with tensors.
        energy: the sum of all cells' energy; None if a delta is unknown.
        scale: the largest Frobenius norm of a tensor; dividing by it keeps the squares within float64.
    """

    stems: tuple[str, ...]
    blocks: tuple[str, ...]
    kinds: tuple[str, ...]
    cells: dict[tuple[int, int], LayerCell]
    energy: float | None
    scale: float

    def values(self, what: What) -> Float64s:
        """In per cent, float64 ``[kinds, blocks]``; NaN where there is no tensor or the energy is unknown."""
        found = np.full((len(self.kinds), len(self.blocks)), np.nan)
        for at, cell in self.cells.items():
            if what == "density":
                found[at] = 100 * cell.density
            elif cell.energy is not None and self.energy is not None:
                found[at] = 100 * (cell.energy / self.energy if self.energy else 0.0)
        return found

    def block(self, at: int) -> str:
        """The name of a block: its stem and number."""
        return f"{self.stems[at]}{self.blocks[at]}" or OUTSIDE

    def records(self) -> list[Record]:
        """One record per cell that has a tensor."""
        shares = self.values("energy")
        return [
            {
                "block": self.block(block),
                "kind": self.kinds[kind],
                "tensors": cell.tensors,
                "entries": cell.entries,
                "elements": cell.elements,
                "density": cell.density,
                "energy_share": None if np.isnan(shares[kind, block]) else float(shares[kind, block]) / 100,
            }
            for (kind, block), cell in sorted(self.cells.items())
        ]


def block_of(name: str) -> tuple[str, int | None]:
    """The block of a weight: its name up to the first part that is a number, and the number.

    ``encoder.layer.3.output.dense.weight`` is in ``("encoder.layer.", 3)``; a weight without a number is in ``("", None)``.
    """
    found = _BLOCK.match(name)
    return ("", None) if found is None else (found[1], int(found[2][:18]))


def layer_grid(tensors: Iterable[TensorMeasures]) -> LayerGrid:
    """Group measured tensors by kind of layer and block.

    Args:
        tensors: for example ``measure(path).tensors``; without norms, the grid has densities only.
    """
    tensors = list(tensors)
    places = [block_of(tensor.name) for tensor in tensors]
    # Tensors outside all blocks first; then stem by stem in the adapter's order, each by number.
    stems = dict.fromkeys(stem for stem, number in places if number is not None)
    order = {stem: at for at, stem in enumerate(stems)}
    blocks = sorted(
        set(places),
        key=lambda place: (-1, 0) if place[1] is None else (order[place[0]], place[1]),
    )
    kinds = [kind for kind in KINDS if any(tensor.kind == kind for tensor in tensors)]
    rows, columns = ({value: at for at, value in enumerate(values)} for values in (kinds, blocks))
    known = all(tensor.norms is not None for tensor in tensors)
    scale = max((t.norms.frobenius for t in tensors if t.norms is not None), default=0.0) or 1.0
    cells: dict[tuple[int, int], LayerCell] = {}
    for tensor, place in zip(tensors, places, strict=True):
        at = rows[tensor.kind], columns[place]
        old = cells.get(at, LayerCell(0, 0, 0, 0.0))
        energy = None
        if tensor.norms is not None and old.energy is not None:
            energy = old.energy + (tensor.norms.frobenius / scale) ** 2
        cells[at] = LayerCell(
            old.tensors + 1, old.entries + tensor.mask.nnz, old.elements + tensor.mask.numel, energy
        )
    return LayerGrid(
        tuple(stem for stem, _ in blocks),
        tuple("" if number is None else str(number) for _, number in blocks),
        tuple(kinds),
        cells,
        sum(cell.energy or 0.0 for cell in cells.values()) if known else None,
        scale,
    )


def largest_value(values: Float64s) -> float:
    """The largest value that is not NaN; 0 if there is none."""
    return float(np.nanmax(values)) if np.isfinite(values).any() else 0.0


TITLES: dict[What, str] = {
    "density": "share of elements changed, %",
    "energy": "share of the delta's energy (sum of squares), %",
}


def draw_layers(
    axes: Any, grid: LayerGrid, what: What = "energy", title: str = "", *, most: float | None = None
) -> Any:
    """Draw a grid: a row for each kind of layer, a column for each block; numbers in the cells if there is room.

    Args:
        axes: a matplotlib Axes.
        grid: from :func:`layer_grid`.
        what: ``"density"`` or ``"energy"``.
        title: put before the measure, such as the adapter's name.
        most: the top of the colour scale, in per cent; by default the largest value.

    Returns:
        ``axes``.
    """
    values = grid.values(what)
    top = largest_value(values) if most is None else most
    image = axes.imshow(
        values, cmap="viridis" if what == "energy" else "cividis", vmin=0, vmax=top or 1, aspect="auto"
    )
    axes.set_facecolor("#f2f2f2")  # cells without a layer
    axes.set_yticks(range(len(grid.kinds)), grid.kinds)
    _block_ticks(axes, grid)
    if len(grid.blocks) <= _WRITTEN:
        for i, j in np.argwhere(np.isfinite(values)):
            axes.text(
                j,
                i,
                digits(values[i, j], 2),
                ha="center",
                va="center",
                fontsize=7,
                color=text_colour(image.cmap(image.norm(values[i, j]))),
            )
    axes.set_xticks(np.arange(len(grid.blocks) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(grid.kinds) + 1) - 0.5, minor=True)
    axes.grid(visible=True, which="minor", color="white", linewidth=1 if len(grid.blocks) <= 40 else 0.3)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(": ".join(part for part in (title, TITLES[what]) if part), loc="left")
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.04, pad=0.015)
    bar.set_label("%")
    bar.outline.set_visible(False)
    return axes


def _block_ticks(axes: Any, grid: LayerGrid) -> None:
    count = len(grid.blocks)
    step = max(1, -(-count // 24))
    shown = [at for at in range(count) if (int(grid.blocks[at]) % step == 0 if grid.blocks[at] else step == 1)]
    axes.set_xticks(shown, [grid.blocks[at] or "–" for at in shown])
    stems = list(dict.fromkeys(stem for stem in grid.stems if stem))
    label = f"{short_label(stems[0], 40)}N" if stems else ""
    if len(stems) > 1:  # each stem starts below its first block
        label = "block"
        axes.xaxis.labelpad = 30
        for stem in stems:
            axes.text(
                grid.stems.index(stem) - 0.4, len(grid.kinds) - 0.5, short_label(stem.rstrip("."), 24),
                fontsize=6.5, rotation=-20, ha="left", va="top", rotation_mode="anchor",
                transform=axes.transData + _below(axes),
            )  # fmt: skip
    outside = "–" if step == 1 else "first column"
    axes.set_xlabel(label + (f" ({outside}: outside the blocks)" if "" in grid.blocks else ""))


def _below(axes: Any) -> Any:
    from matplotlib.transforms import ScaledTranslation

    return ScaledTranslation(0, -20 / 72, axes.figure.dpi_scale_trans)
