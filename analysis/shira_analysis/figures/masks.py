"""The mask of one tensor: the density in each cell of a grid over its matrix view."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shira_analysis.figures.records import Record
from shira_analysis.figures.style import percent_digits, short_label
from shira_format._core.arrays import distinct
from shira_format.errors import SourceError
from shira_format.tensors import SparseTensor, matrix_shape

Int64s = npt.NDArray[np.int64]

SIDE = 96  # cells along the longer side, by default
MOST = 512
_LONGEST_RATIO = 4  # the longer side of a grid is at most this many times the shorter
_STEP = 1 << 20  # entries counted at a time


@dataclass(frozen=True, eq=False)
class MaskGrid:
    """Entries of a tensor, counted by cells of a grid over its matrix view.

    Attributes:
        name: the tensor's name.
        shape: the weight's shape.
        rows: the edges of the cells, int64 ``[height + 1]``, from 0 to the rows of the matrix view.
        columns: the same for columns, int64 ``[width + 1]``.
        counts: entries in each cell, int64 ``[height, width]``.
    """

    name: str
    shape: tuple[int, ...]
    rows: Int64s
    columns: Int64s
    counts: Int64s

    @property
    def density(self) -> npt.NDArray[np.float64]:
        """Entries over elements of each cell, float64 ``[height, width]``."""
        return self.counts / np.outer(np.diff(self.rows), np.diff(self.columns)).astype(np.float64)

    @property
    def of_rows(self) -> npt.NDArray[np.float64]:
        """The density of each row of cells, float64 ``[height]``."""
        return np.asarray(self.counts.sum(axis=1) / (np.diff(self.rows) * float(self.columns[-1])))

    @property
    def of_columns(self) -> npt.NDArray[np.float64]:
        """The density of each column of cells, float64 ``[width]``."""
        return np.asarray(self.counts.sum(axis=0) / (np.diff(self.columns) * float(self.rows[-1])))

    @property
    def total(self) -> float:
        """The density of the tensor."""
        return float(self.counts.sum()) / (float(self.rows[-1]) * float(self.columns[-1]))

    def records(self) -> list[Record]:
        """One record per cell: its rows and columns ``[from, to)``, entries and density."""
        density = self.density
        return [
            {
                "tensor": self.name,
                "row_from": int(self.rows[i]),
                "row_to": int(self.rows[i + 1]),
                "column_from": int(self.columns[j]),
                "column_to": int(self.columns[j + 1]),
                "entries": int(self.counts[i, j]),
                "density": float(density[i, j]),
            }
            for i in range(len(self.counts))
            for j in range(self.counts.shape[1])
        ]


def mask_grid(tensor: SparseTensor, side: int = SIDE) -> MaskGrid:
    """Count the entries of ``tensor`` in each cell, from the indices alone: the weight is never dense in memory.

    Args:
        tensor: with or without values.
        side: cells along the longer side; fewer if the weight has fewer rows or columns.

    Raises:
        SourceError: ``side`` is not from 1 to 512, or the weight has no elements.
    """
    if not 1 <= side <= MOST:
        raise SourceError(f"a grid of {side} cells: 1 to {MOST} can be drawn")
    rows, columns = matrix_shape(tensor.shape)
    if not rows * columns:
        raise SourceError(f"tensor {tensor.name!r} has no elements: there is no mask to draw")
    longer, least = max(rows, columns), math.ceil(side / _LONGEST_RATIO)
    height, width = (min(size, max(least, round(side * size / longer))) for size in (rows, columns))
    counts = np.zeros(height * width, np.int64)
    for start in range(0, tensor.nnz, _STEP):
        row, column = np.divmod(tensor.indices[start : start + _STEP], columns)
        # No overflow: indices are below 2^53, and there are at most 2^9 cells.
        cells = row * height // rows * width + column * width // columns
        counts += np.bincount(cells, minlength=counts.size)
    return MaskGrid(
        tensor.name, tensor.shape, _edges(rows, height), _edges(columns, width), counts.reshape(height, width)
    )


def _edges(size: int, cells: int) -> Int64s:
    """The first row of each cell, if row ``r`` is in cell ``r * cells // size``; and the end."""
    return -(-np.arange(cells + 1, dtype=np.int64) * size // cells)


def drawn_size(grid: MaskGrid) -> tuple[float, float]:
    """Height and width of the drawn grid, in cells of the longer side; the shorter is stretched to at least a quarter of the longer."""
    height, width = grid.counts.shape
    return max(height, width / _LONGEST_RATIO), max(width, height / _LONGEST_RATIO)


def draw_mask(
    axes: Any,
    grid: MaskGrid,
    *,
    most: float | None = None,
    margins: bool = True,
    title: str = "",
    bar: bool = True,
    named: bool = True,
) -> Any:
    """Draw the density of each cell, with bars for the density of rows and columns of cells.

    Args:
        axes: a matplotlib Axes.
        grid: from :func:`mask_grid`.
        most: the density at the top of the colour scale; by default the 99.5 % quantile of the cells.
        margins: draw the bars of rows and columns.
        title: put above the shape and the number of entries.
        bar: draw the colour bar.
        named: put the tensor's name into the title.

    Returns:
        ``axes``.
    """
    density = 100 * grid.density
    top = 100 * most if most is not None else scale_end(grid)
    height, width = density.shape
    high, wide = drawn_size(grid)
    image = axes.imshow(
        density,
        cmap="cividis",
        vmin=0,
        vmax=top,
        interpolation="nearest",
        aspect=(high / height) / (wide / width),
        extent=(0, width, height, 0),
    )
    for axis, edges, label in ((axes.xaxis, grid.columns, "column"), (axes.yaxis, grid.rows, "row")):
        at = distinct(np.linspace(0, len(edges) - 1, min(5, 2 + len(edges) // 16, len(edges))).astype(int))
        axis.set_ticks(at, [f"{edges[i]:,}" for i in at])
        axis.set_label_text(label)
    axes.spines[:].set_visible(False)
    shape = "×".join(f"{n:,}" for n in grid.shape)
    entries = f"{int(grid.counts.sum()):,} entries ({percent_digits(grid.total)} %)"
    axes.set_title(
        "\n".join(filter(None, (title, short_label(grid.name) if named else "", shape, entries))),
        y=1.03 + (_margin_size(grid)[0] if margins else 0),
    )
    if margins:
        _margins(axes, grid)
    if bar:
        over = "max" if density.max() > top else "neither"
        scale = axes.figure.colorbar(image, ax=axes, extend=over, aspect=30, pad=0.06, shrink=0.7)
        scale.set_label("density per cell, %")
        scale.outline.set_visible(False)
    return axes


def scale_end(*grids: MaskGrid) -> float:
    """The 99.5 % quantile of the cells' densities, in per cent; never 0."""
    every = np.concatenate([grid.density.ravel() for grid in grids])
    return 100 * float(np.quantile(every, 0.995) or every.max() or 1.0)


def _margin_size(grid: MaskGrid) -> tuple[float, float]:
    """The size of the margin bars above and beside a grid, in units of its height and its width; the same length in both."""
    sides = drawn_size(grid)
    up, aside = (min(0.4, 0.08 * max(sides) / side) for side in sides)
    return up, aside


def _margins(axes: Any, grid: MaskGrid) -> None:
    from shira_analysis.figures.style import BLUE

    height, width = grid.counts.shape
    high, wide = drawn_size(grid)
    up, aside = _margin_size(grid)
    above = axes.inset_axes((0, 1.01, 1, up), sharex=axes)
    beside = axes.inset_axes((1 + 0.01 * high / wide, 0, aside, 1), sharey=axes)
    above.stairs(100 * grid.of_columns, np.arange(width + 1), color=BLUE, fill=True)
    beside.stairs(100 * grid.of_rows, np.arange(height + 1), orientation="horizontal", color=BLUE, fill=True)
    for one, line in ((above, above.axhline), (beside, beside.axvline)):
        one.tick_params(labelbottom=False, labelleft=False, length=0)
        one.spines[:].set_visible(False)
        line(100 * grid.total, color="black", lw=0.7, ls=":")
    above.set_ylim(bottom=0)
    beside.set_xlim(left=0)
