"""Singular values of the delta of one weight, for adapters and LoRAs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shira_analysis.figures.records import Record
from shira_analysis.figures.style import distinct_labels, line_style
from shira_analysis.measures.deltas import DeltaFile
from shira_analysis.measures.rank import rank_of, rank_of_update
from shira_analysis.measures.spectrum import LARGEST, Spectrum
from shira_format.errors import SourceError
from shira_format.lora.base import Lora


@dataclass(frozen=True, eq=False)
class Curve:
    """The singular values of one delta.

    Attributes:
        label: the adapter's or LoRA's name.
        spectrum: the delta's spectrum.
    """

    label: str
    spectrum: Spectrum

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """The singular values above rounding error; float64, in decreasing order."""
        return self.spectrum.values[: self.spectrum.numerical_rank]


def curve_of(file: DeltaFile, name: str, label: str | None = None) -> Curve:
    """The curve of one tensor of an adapter.

    Raises:
        SourceError: the adapter does not have the tensor; it is a mask or too large; a delta is not finite; scipy is missing.
        BaseRequired, BaseMismatch: see :meth:`DeltaFile.tensor`.
    """
    if name not in file.names:
        raise SourceError(f"{file.path}: has no tensor {name!r}")
    tensor = file.tensor(name)
    try:
        found = rank_of(tensor, exact=False).spectrum
    except SourceError as error:
        raise SourceError(f"{file.path}: {error}") from None
    return Curve(label or file.path.name, _not_too_large(found, f"{file.path}: tensor {name!r}"))


def curve_of_lora(lora: Lora, name: str, label: str) -> Curve:
    """The curve of a LoRA's update of one weight.

    Raises:
        SourceError: the LoRA does not change the weight; it is too large; a value is not finite.
    """
    for update in lora.updates:
        if update.name == name:
            return Curve(
                label, _not_too_large(rank_of_update(update, exact=False).spectrum, f"{label}: tensor {name!r}")
            )
    raise SourceError(f"{label}: the LoRA does not change {name!r}")


def _not_too_large(found: Spectrum | None, where: str) -> Spectrum:
    if found is None:
        raise SourceError(f"{where} has a shorter side above {LARGEST}: too large to compute its singular values")
    return found


def records(curves: Sequence[Curve]) -> list[Record]:
    """One record per singular value."""
    return [
        {"change": curve.label, "number": number, "singular_value": float(value)}
        for curve in curves
        for number, value in enumerate(curve.values, 1)
    ]


def draw_spectra(axes: Any, curves: Sequence[Curve], title: str | None = None, *, legend: bool = True) -> Any:
    """Draw singular values by index, on log-log axes; the legend shows the ranks.

    Args:
        axes: a matplotlib Axes.
        curves: at least one with a non-zero singular value; the others appear only in the legend.
        title: the title of the axes.
        legend: draw the legend in the lower left corner; the lines are labelled in any case.

    Returns:
        ``axes``.

    Raises:
        SourceError: no curve has a singular value above 0.
    """
    if not any(curve.values.size for curve in curves):
        raise SourceError("no delta has a singular value above 0: there is nothing to draw")
    for at, (curve, label) in enumerate(
        zip(curves, distinct_labels([curve.label for curve in curves], 40), strict=True)
    ):
        values = curve.values
        spectrum = curve.spectrum
        axes.plot(
            np.arange(1, values.size + 1), values,
            **line_style(at), markevery=_marked(values.size), mec="white", mew=0.4,
            label=f"{label}: rank {values.size}, stable rank {spectrum.stable_rank:.1f}",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("index of the singular value")
    axes.set_ylabel("singular value")
    from matplotlib.ticker import FuncFormatter

    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(visible=True)
    if title:
        axes.set_title(title)
    if legend:
        axes.legend(loc="lower left")
    return axes


def _marked(count: int) -> list[int]:
    """The values with a marker: about evenly spaced on a logarithmic axis."""
    return sorted({round(at) - 1 for at in np.geomspace(1, max(1, count), 16)})
