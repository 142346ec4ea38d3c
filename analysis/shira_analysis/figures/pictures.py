"""Whole pictures: one or several Axes with a title, and the records of what is in them."""

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

_WIDE = 14.2  # inches: more panels go into a further row
_SIDE_BY_SIDE = 16  # blocks up to which density and energy have room beside each other
_MOST_PANELS = 24
_MOST_LINES = 32
_MOST_IN_MATRIX = 60
_INSIDE = 6  # lines up to which a legend has room within the axes


@dataclass(frozen=True, eq=False)
class Picture:
    """What is written: the bytes of an image, and its numbers, one record after another."""

    image: bytes
    records: list[Record]


def mask_picture(
    files: Sequence[DeltaFile], tensor: str | None = None, *, side: int = masks.SIDE, form: str = "png"
) -> Picture:
    """The mask of one tensor in each adapter, side by side, on one scale.

    Args:
        files: the adapters; no base is needed.
        tensor: its name; by default the one that has most entries in the first adapter.
        side: cells along the longer side.
        form: ``"png"`` or ``"svg"``.

    Raises:
        SourceError: an adapter has no such tensor, or none at all; too many adapters.
        FormatError: the tensor is damaged.
    """
    _check_count(files)
    name = tensor if tensor is not None else largest_tensor(files[0])
    found = [masks.mask_grid(_present(file, name).file.sparse(name), side) for file in files]
    height, width = (max(sizes) for sizes in zip(*map(masks.drawn_size, found), strict=True))
    # Side by side if there is room; else in rows, and smaller.
    longest = 5.5
    if len(found) * _panel(width, longest / max(height, width)) > _WIDE:
        longest = 3.2
    inches = longest / max(height, width)
    panel = _panel(width, inches)
    columns = min(len(found), max(1, int(_WIDE / panel)))
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
        drawn.supxlabel("bars: density of whole rows and columns; dotted: of the tensor", fontsize=7.5)
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
        SourceError: no tensor, a delta that is not finite; too many adapters.
        FormatError, BaseRequired, BaseMismatch: see :meth:`DeltaFile.tensor`.
    """
    _check_count(files)
    grids = []
    for file in files:
        if not file.names:
            raise SourceError(f"{file.path}: has no sparse tensor to draw")
        grids.append(layers.layer_grid(measure_file(file, progress=progress).tensors))
    # Masks have no energy.
    measured: list[layers.What] = (
        ["density", "energy"] if any(grid.energy is not None for grid in grids) else ["density"]
    )
    # One scale for all adapters, so that they can be compared.
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
    """The singular values of one tensor in each adapter and each LoRA.

    Args:
        files: the adapters.
        loras: what they are called, and what :func:`shira_format.lora.open_lora` gave.
        tensor: its name; by default the one that has most entries in the first adapter.
        form: ``"png"`` or ``"svg"``.

    Raises:
        SourceError: one of them has no such tensor, it is too large, a delta is not finite, all are 0; too many; a package is
            missing.
        FormatError, BaseRequired, BaseMismatch: see :meth:`DeltaFile.tensor`.
    """
    if len(files) + len(loras) > _MOST_LINES:
        raise SourceError(f"{len(files) + len(loras)} spectra: {_MOST_LINES} can be told apart in a picture")
    name = tensor if tensor is not None else largest_tensor(files[0])
    curves = [
        spectra.curve_of(_present(file, name), name, label)
        for file, label in zip(files, matrices.labels(files), strict=True)
    ]
    curves += [spectra.curve_of_lora(lora, name, label) for label, lora in loras]
    if not any(curve.values.size for curve in curves):
        raise SourceError(f"{files[0].path}: tensor {name!r}: the change is 0, and has no singular value to draw")
    inside = len(curves) <= _INSIDE
    with our_style():
        drawn = figure(6.4, 4.2 if inside else 4.4 + 0.17 * len(curves))
        axes = drawn.subplots()
        spectra.draw_spectra(axes, curves, f"singular values of the change of {short_label(name)}", legend=inside)
        if not inside:
            drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower left")
        image = render(drawn, form)
    return Picture(image, [{"tensor": name, **record} for record in spectra.records(curves)])


def overlap_picture(files: Sequence[DeltaFile], *, form: str = "png") -> Picture:
    """How much the masks of all pairs overlap; no base is needed.

    Raises:
        SourceError: fewer than two adapters, shapes that differ.
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
    """AWOR and AWOM of all pairs, and what they do to each other on the layers' inputs if moments are given.

    Args:
        files: the adapters.
        moments: of the layers' inputs.
        transposed: of ``A1 A2^T`` in place of ``A1^T A2``.
        form: ``"png"`` or ``"svg"``.
        progress: called with the name of each weight that is done.

    Raises:
        SourceError: fewer than two adapters, shapes that differ, a delta that is not finite; a package is missing.
        FormatError, BaseRequired, BaseMismatch: see :meth:`DeltaFile.tensor`.
    """
    _check_count(files, _MOST_IN_MATRIX)
    found, records = matrices.orthogonality_matrices(files, progress, moments=moments, transposed=transposed)
    return Picture(_matrices(found, form), records)


def dimension_picture(records: list[Record], *, form: str = "png") -> Picture:
    """AWOM and AWOR against the dimension; see :mod:`shira_analysis.figures.dimensions`."""
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
            f"Pairs of random adapters that train {100 * trained:.2g} % of the entries (dense: all); means of {pairs} pairs"
        )
        image = render(drawn, form)
    return Picture(image, records)


def largest_tensor(file: DeltaFile) -> str:
    """The name of the tensor with most entries.

    Raises:
        SourceError: there is none.
    """
    if not file.names:
        raise SourceError(f"{file.path}: has no sparse tensor to draw")
    return max(file.names, key=lambda name: file.file.manifest.tensors[name].nnz)


def _present(file: DeltaFile, name: str) -> DeltaFile:
    if name not in file.names:
        raise SourceError(f"{file.path}: has no sparse tensor {name!r}")
    return file


def _panel(width: float, inches: float) -> float:
    """The width of a mask's panel: what is above it stays within, for nothing else keeps two of them apart."""
    return max(2.3, width * inches + 1.3)


def _check_count(files: Sequence[DeltaFile], most: int = _MOST_PANELS) -> None:
    if len(files) > most:
        raise SourceError(f"{len(files)} adapters: {most} can be drawn in one picture")


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
                "empty cells: nothing to measure, as of two adapters that change no weight in common", fontsize=7.5
            )
        return render(drawn, form)
