"""Whole pictures: one or several Axes with a title, and the records of what is in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shira_analysis.deltas import DeltaFile
from shira_analysis.figures import dimensions, layers, masks, matrices, spectra
from shira_analysis.figures.records import Record
from shira_analysis.figures.style import figure, matplotlib, plain, rendered, styled
from shira_analysis.measures import measure_file
from shira_format import SourceError
from shira_format.lora.updates import Lora


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
        SourceError: an adapter has no such tensor, or none at all; matplotlib is missing.
        FormatError: the tensor is damaged.
    """
    matplotlib()
    name = tensor if tensor is not None else largest(files[0])
    found = [masks.mask_grid(_present(file, name).file.sparse(name), side) for file in files]
    height, width = found[0].counts.shape
    inches = 5.5 / max(height, width)
    end = masks.scale_end(*found) / 100
    with styled():
        # What is above a panel stays within its width: nothing else keeps two of them apart.
        panel = max(2.3, width * inches + 1.3)
        letters = int(8 * panel)
        drawn = figure(max(4.6, panel * len(found) + 0.8), height * inches + 2.2)
        axes = drawn.subplots(1, len(found), squeeze=False)[0]
        for one, grid, label in zip(axes, found, matrices.labels(files), strict=True):
            masks.draw_mask(one, grid, most=end, title=plain(label, letters), bar=one is axes[-1], named=False)
        drawn.suptitle(f"mask of {plain(name, 52)}")
        drawn.supxlabel("bars: density of whole rows and columns; dotted: of the tensor", fontsize=7.5)
        image = rendered(drawn, form)
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
        SourceError: no tensor, a mask, a delta that is not finite; matplotlib is missing.
        FormatError, BaseRequired, BaseMismatch: see :meth:`DeltaFile.tensor`.
    """
    matplotlib()
    grids = []
    for file in files:
        if not file.names:
            raise SourceError(f"{file.path}: has no sparse tensor to draw")
        grids.append(layers.layer_grid(measure_file(file, progress=progress).tensors))
    shown: list[tuple[str, layers.LayerGrid, layers.What]] = []
    for label, grid in zip(matrices.labels(files), grids, strict=True):
        shown.append((label, grid, "density"))
        if grid.energy is not None:  # masks have none
            shown.append((label, grid, "energy"))
    heights = [0.3 * len(grid.kinds) + (1.5 if len(set(grid.stems)) > 2 else 1.0) for _, grid, _ in shown]
    with styled():
        drawn = figure(7.5, sum(heights) + 0.3)
        axes = drawn.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
        for one, (label, grid, what) in zip(axes, shown, strict=True):
            layers.draw_layers(one, grid, what, title=plain(label))
        image = rendered(drawn, form)
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
        SourceError: one of them has no such tensor, it is too large, a delta is not finite; a package is missing.
        FormatError, BaseRequired, BaseMismatch: see :meth:`DeltaFile.tensor`.
    """
    matplotlib()
    name = tensor if tensor is not None else largest(files[0])
    curves = [
        spectra.curve_of(_present(file, name), name, label)
        for file, label in zip(files, matrices.labels(files), strict=True)
    ]
    curves += [spectra.curve_of_lora(lora, name, label) for label, lora in loras]
    with styled():
        drawn = figure(6.4, 4.2)
        spectra.draw_spectra(drawn.subplots(), curves, f"singular values of the change of {plain(name)}")
        image = rendered(drawn, form)
    return Picture(image, [{"tensor": name, **record} for record in spectra.records(curves)])


def overlap_picture(files: Sequence[DeltaFile], *, form: str = "png") -> Picture:
    """How much the masks of all pairs overlap; no base is needed.

    Raises:
        SourceError: fewer than two adapters, shapes that differ; matplotlib is missing.
        FormatError: a tensor is damaged.
    """
    matplotlib()
    found, records = matrices.overlap_matrices(files)
    return Picture(_matrices(found, form), records)


def orthogonality_picture(
    files: Sequence[DeltaFile], *, form: str = "png", progress: Callable[[str], object] = lambda _: None
) -> Picture:
    """AWOR and AWOM of all pairs.

    Raises:
        SourceError: fewer than two adapters, shapes that differ, a delta that is not finite; a package is missing.
        FormatError, BaseRequired, BaseMismatch: see :meth:`DeltaFile.tensor`.
    """
    matplotlib()
    found, records = matrices.orthogonality_matrices(files, progress)
    return Picture(_matrices(found, form), records)


def dimension_picture(records: list[Record], *, form: str = "png") -> Picture:
    """AWOM and AWOR against the dimension; see :mod:`shira_analysis.figures.dimensions`.

    Raises:
        SourceError: matplotlib is missing.
    """
    with styled():
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
        image = rendered(drawn, form)
    return Picture(image, records)


def largest(file: DeltaFile) -> str:
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


def _matrices(found: Sequence[matrices.Matrix], form: str) -> bytes:
    size = 0.5 * len(found[0].names)
    with styled():
        drawn = figure(5.2 + 2 * size, max(2.6, 1.7 + size))
        panels = drawn.subplots(1, len(found))
        for axes, matrix in zip(panels, found, strict=True):
            matrices.draw_matrix(axes, matrix)
            if axes is not panels[0]:
                axes.tick_params(labelleft=False)
        return rendered(drawn, form)
