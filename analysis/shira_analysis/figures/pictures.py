"""Whole pictures: one or several Axes with a title, and the records of their numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from shira_analysis.figures import dimensions, layers, masks, matrices, spectra
from shira_analysis.figures.records import Record
from shira_analysis.figures.style import distinct_labels, figure, our_style, render, short_label
from shira_analysis.measures.adapter import measure_file
from shira_analysis.measures.deltas import DeltaFile
from shira_format.calibration.moments import Moments
from shira_format.errors import SourceError
from shira_format.lora.base import Lora

_MAX_WIDTH = 14.2  # inches: further panels go into a new row
_SIDE_BY_SIDE = 16  # the most blocks for which density and energy are side by side
_MOST_PANELS = 24
_MOST_LINES = 32
_MOST_IN_MATRIX = 60
_MOST_IN_LEGEND = 6  # the most lines for which the legend is inside the axes


@dataclass(frozen=True, eq=False)
class Picture:
    """The bytes of an image, and the records of its numbers."""

    image: bytes
    records: list[Record]


def mask_picture(
    files: Sequence[DeltaFile], tensor: str | None = None, *, side: int = masks.SIDE, form: str = "png"
) -> Picture:
    """The mask of one tensor in each adapter, side by side, on one colour scale.

    Args:
        files: the adapters; no base is needed.
        tensor: its name; by default the tensor with most entries in the first adapter.
        side: cells along the longer side.
        form: ``"png"`` or ``"svg"``.

    Raises:
        SourceError: an adapter does not have the tensor, or has none; too many adapters.
        FormatError: the tensor is damaged.
    """
    _check_count(files)
    name = tensor if tensor is not None else largest_tensor(files[0])
    found = [masks.mask_grid(_require_tensor(file, name).file.sparse(name), side) for file in files]
    height, width = (max(sizes) for sizes in zip(*map(masks.drawn_size, found), strict=True))
    # Side by side if there is room; else smaller, in rows.
    longest = 5.5
    if len(found) * _panel_width(width, longest / max(height, width)) > _MAX_WIDTH:
        longest = 3.2
    inches = longest / max(height, width)
    panel = _panel_width(width, inches)
    columns = min(len(found), max(1, int(_MAX_WIDTH / panel)))
    rows = -(-len(found) // columns)
    end = masks.scale_end(*found) / 100
    with our_style():
        drawn = figure(max(4.6, panel * columns + 0.8), rows * (height * inches + 1.4) + 0.8)
        axes = drawn.subplots(rows, columns, squeeze=False).ravel()
        names = distinct_labels(matrices.labels(files), int(8 * panel))
        for at, (one, grid, label) in enumerate(zip(axes, found, names, strict=False)):
            last = at % columns == columns - 1 or at == len(found) - 1
            masks.draw_mask(one, grid, most=end, title=label, bar=last, named=False)
        for one in axes[len(found) :]:
            one.set_axis_off()
        drawn.suptitle(f"mask of {short_label(name, 52)}")
        drawn.supxlabel("bars: density of rows and columns; dotted line: density of the tensor", fontsize=7.5)
        image = render(drawn, form)
    return Picture(
        image,
        [
            {"adapter": label, **r}
            for label, g in zip(matrices.labels(files), found, strict=True)
            for r in g.records()
        ],
    )


def layers_picture(
    files: Sequence[DeltaFile], *, form: str = "png", progress: Callable[[int], object] = lambda _: None
) -> Picture:
    """Density and energy of each adapter by kind of layer and block.

    Raises:
        SourceError: an adapter has no tensor, or a delta is not finite; too many adapters.
        FormatError, BaseRequired, BaseMismatch: see :meth:`DeltaFile.tensor`.
    """
    _check_count(files)
    grids = []
    for file in files:
        if not file.names:
            raise SourceError(f"{file.path}: has no sparse tensor to draw")
        grids.append(layers.layer_grid(measure_file(file, progress=progress).tensors))
    # Masks have no values, so no energy.
    measured: list[layers.What] = (
        ["density", "energy"] if any(grid.energy is not None for grid in grids) else ["density"]
    )
    # One colour scale for all adapters, so that they can be compared.
    most = {what: max(layers.largest_value(grid.values(what)) for grid in grids) for what in measured}
    heights = [0.3 * len(grid.kinds) + (1.5 if len(set(grid.stems)) > 2 else 1.0) for grid in grids]
    beside = len(grids) > 1 and max(len(grid.blocks) for grid in grids) <= _SIDE_BY_SIDE
    rows, columns = (len(grids), len(measured)) if beside else (len(grids) * len(measured), 1)
    with our_style():
        ratios = heights if beside else [height for height in heights for _ in measured]
        drawn = figure(7.5 * columns, sum(ratios) + 0.3)
        axes = iter(drawn.subplots(rows, columns, squeeze=False, height_ratios=ratios).ravel())
        for grid, label in zip(grids, distinct_labels(matrices.labels(files), 60), strict=True):
            for what in measured:
                one = next(axes)
                if what == "energy" and grid.energy is None:
                    one.set_axis_off()
                else:
                    layers.draw_layers(one, grid, what, title=label, most=most[what])
        image = render(drawn, form)
    return Picture(
        image,
        [
            {"adapter": label, **r}
            for label, g in zip(matrices.labels(files), grids, strict=True)
            for r in g.records()
        ],
    )


def spectrum_picture(
    files: Sequence[DeltaFile],
    loras: Sequence[tuple[str, Lora]] = (),
    tensor: str | None = None,
    *,
    form: str = "png",
) -> Picture:
    """The singular values of one tensor's delta in each adapter and each LoRA.

    Args:
        files: the adapters.
        loras: names and LoRAs, from :func:`shira_format.lora.open_lora`.
        tensor: its name; by default the tensor with most entries in the first adapter.
        form: ``"png"`` or ``"svg"``.

    Raises:
        SourceError: one of them does not have the tensor; it is too large; a delta is not finite; all are 0; too many
            spectra; a package is missing.
        FormatError, BaseRequired, BaseMismatch: see :meth:`DeltaFile.tensor`.
    """
    if len(files) + len(loras) > _MOST_LINES:
        raise SourceError(
            f"{len(files) + len(loras)} spectra: at most {_MOST_LINES} can be distinguished in one picture"
        )
    name = tensor if tensor is not None else largest_tensor(files[0])
    curves = [
        spectra.curve_of(_require_tensor(file, name), name, label)
        for file, label in zip(files, matrices.labels(files), strict=True)
    ]
    curves += [spectra.curve_of_lora(lora, name, label) for label, lora in loras]
    if not any(curve.values.size for curve in curves):
        raise SourceError(f"{files[0].path}: tensor {name!r}: the delta is 0: it has no singular values to draw")
    inside = len(curves) <= _MOST_IN_LEGEND
    with our_style():
        drawn = figure(6.4, 4.2 if inside else 4.4 + 0.17 * len(curves))
        axes = drawn.subplots()
        spectra.draw_spectra(axes, curves, f"singular values of the delta of {short_label(name)}", legend=inside)
        if not inside:
            drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower left")
        image = render(drawn, form)
    return Picture(image, [{"tensor": name, **record} for record in spectra.records(curves)])


def overlap_picture(files: Sequence[DeltaFile], *, form: str = "png") -> Picture:
    """The mask overlap of all pairs; no base is needed.

    Raises:
        SourceError: fewer than two adapters, or different shapes.
        FormatError: a tensor is damaged.
    """
    _check_count(files, _MOST_IN_MATRIX)
    found, records = matrices.overlap_matrices(files)
    return Picture(_matrices(found, form), records)


def orthogonality_picture(
    files: Sequence[DeltaFile],
    *,
    moments: Moments | None = None,
    transposed: bool = False,
    form: str = "png",
    progress: Callable[[str], object] = lambda _: None,
) -> Picture:
    """AWOR and AWOM of all pairs; with moments also the cosine of their effects on the layers' inputs.

    Args:
        files: the adapters.
        moments: of the layers' inputs.
        transposed: measure ``A1 A2^T`` instead of ``A1^T A2``.
        form: ``"png"`` or ``"svg"``.
        progress: called with the name of each finished weight.

    Raises:
        SourceError: fewer than two adapters; different shapes; a delta is not finite; a package is missing.
        FormatError, BaseRequired, BaseMismatch: see :meth:`DeltaFile.tensor`.
    """
    _check_count(files, _MOST_IN_MATRIX)
    found, records = matrices.orthogonality_matrices(files, progress, moments=moments, transposed=transposed)
    return Picture(_matrices(found, form), records)


def dimension_picture(records: list[Record], *, form: str = "png") -> Picture:
    """AWOM and AWOR against the dimension of the weight; see :mod:`shira_analysis.figures.dimensions`."""
    with our_style():
        drawn = figure(8.4, 4.6)
        left, right = drawn.subplots(1, 2)
        dimensions.draw_dimension(left, records, "awom")
        dimensions.draw_dimension(right, records, "awor")
        handles, texts = left.get_legend_handles_labels()
        texts[-1] = "uniform masks by formula: p·m√m and (1 − p²)ᵐ"
        drawn.legend(handles, texts, loc="outside lower center", ncols=3)
        pairs = max((record["pairs"] for record in records), default=0)
        trained = max((r["trained"] for r in records if r["adapter"] == "SHiRA-Rand"), default=dimensions.DENSITY)
        drawn.suptitle(
            f"Random adapters that train {100 * trained:.2g} % of the entries (dense: all); means over {pairs} pairs"
        )
        image = render(drawn, form)
    return Picture(image, records)


def largest_tensor(file: DeltaFile) -> str:
    """The name of the tensor with most entries.

    Raises:
        SourceError: the adapter has no tensor.
    """
    if not file.names:
        raise SourceError(f"{file.path}: has no sparse tensor to draw")
    return max(file.names, key=lambda name: file.file.manifest.tensors[name].nnz)


def _require_tensor(file: DeltaFile, name: str) -> DeltaFile:
    if name not in file.names:
        raise SourceError(f"{file.path}: has no sparse tensor {name!r}")
    return file


def _panel_width(width: float, inches: float) -> float:
    """The width of a mask's panel, wide enough that the titles of neighbours do not overlap."""
    return max(2.3, width * inches + 1.3)


def _check_count(files: Sequence[DeltaFile], most: int = _MOST_PANELS) -> None:
    if len(files) > most:
        raise SourceError(f"{len(files)} adapters: at most {most} can be drawn in one picture")


def _matrices(found: Sequence[matrices.Matrix], form: str) -> bytes:
    names = len(found[0].names)
    size = 0.55 * names if names <= matrices.WRITTEN else 0.3 * names + 2.5  # cells without numbers are smaller
    empty = any(np.isnan(matrix.values).sum() > names for matrix in found)
    with our_style():
        drawn = figure(1.6 + (1.7 + size) * len(found), 2.7 + size)
        panels = drawn.subplots(1, len(found))
        for axes, matrix in zip(panels, found, strict=True):
            matrices.draw_matrix(axes, matrix)
            if axes is not panels[0]:
                axes.tick_params(labelleft=False)
        if empty:
            drawn.supxlabel(
                "empty cells: nothing to measure, such as two adapters without a common weight", fontsize=7.5
            )
        return render(drawn, form)
