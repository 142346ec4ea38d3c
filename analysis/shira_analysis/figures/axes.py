"""Plots of adapters on a given matplotlib Axes, for notebooks and your own figures; each returns the Axes.

``adapter`` is a path or an open :class:`DeltaFile`; ``base`` is a checkpoint, as a path or open. Without it, plots of values
need a self-contained adapter. Raises the same errors as :func:`shira_analysis.measure`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from shira_analysis.figures import dimensions, layers, masks, matrices, spectra
from shira_analysis.measures.adapter import measure_file
from shira_analysis.measures.deltas import DeltaFile, open_deltas
from shira_format.checkpoints import Checkpoint

Source = str | os.PathLike[str] | DeltaFile
Base = str | os.PathLike[str] | Checkpoint | None


def plot_mask(adapter: Source, tensor: str, ax: Any, *, side: int = masks.SIDE) -> Any:
    """The density of one tensor's mask, on a grid with ``side`` cells along the longer side."""
    return masks.draw_mask(ax, masks.mask_grid(open_deltas(adapter).file.sparse(tensor), side))


def plot_layers(adapter: Source, ax: Any, *, what: layers.What = "energy", base: Base = None) -> Any:
    """The share of changed elements (``what="density"``) or of the delta's energy (the sum of squares), by kind of layer and block."""
    return layers.draw_layers(ax, layers.layer_grid(measure_file(open_deltas(adapter, base)).tensors), what)


def plot_spectrum(adapter: Source, tensor: str, ax: Any, *, base: Base = None) -> Any:
    """The singular values of one tensor's delta."""
    return spectra.draw_spectra(ax, [spectra.curve_of(open_deltas(adapter, base), tensor)], tensor)


def plot_overlap(adapters: Sequence[Source], ax: Any) -> Any:
    """The overlap of the masks of each pair of adapters: shared entries in per cent of the union."""
    return matrices.draw_matrix(ax, matrices.overlap_matrices([open_deltas(one) for one in adapters])[0][0])


def plot_orthogonality(
    adapters: Sequence[Source], ax: Any, *, measure: str = "awor", base: Base = None, transposed: bool = False
) -> Any:
    """AWOR (``measure="awor"``) or AWOM (``"awom"``) of each pair of adapters over all weights that both change."""
    files = [open_deltas(one, base) for one in adapters]
    found, _ = matrices.orthogonality_matrices(files, transposed=transposed)
    return matrices.draw_matrix(ax, found[("awor", "awom").index(measure)])


def plot_dimension(ax: Any, *, measure: str = "awor", dimensions_of: Sequence[int] | None = None) -> Any:
    """AWOR or AWOM of random adapters against the dimension of the weight (the paper's figures 4 and 9)."""
    records = dimensions.dimension_records(dimensions=dimensions_of or dimensions.DIMENSIONS)
    return dimensions.draw_dimension(ax, records, measure)
