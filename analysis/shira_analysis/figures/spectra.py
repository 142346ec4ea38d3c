"""Singular values: of an adapter's change of one weight beside a LoRA's."""

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
    """The singular values of one change.

    Attributes:
        label: whose change it is.
        spectrum: of it.
    """

    label: str
    spectrum: Spectrum

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """Those above what float64 can tell from 0 in their computation; float64, falling."""
        return self.spectrum.values[: self.spectrum.numerical_rank]


def curve_of(file: DeltaFile, name: str, label: str | None = None) -> Curve:
    """The curve of one tensor of an adapter.

    Raises:
        SourceError: the adapter has no such tensor or it is a mask, a delta that is not finite, too large, no scipy.
        BaseRequired, BaseMismatch: see :meth:`DeltaFile.tensor`.
    """
    if name not in file.names:
        raise SourceError(f"{file.path}: has no tensor {name!r}")
    tensor = file.tensor(name)
    try:
        found = rank_of(tensor, exact=False).spectrum
    except SourceError as error:
        raise SourceError(f"{file.path}: {error}") from None
    return Curve(label or file.path.name, _known(found, f"{file.path}: tensor {name!r}"))


def curve_of_lora(lora: Lora, name: str, label: str) -> Curve:
    """The curve of a LoRA's update of one weight.

    Raises:
        SourceError: the LoRA does not change it, a value is not finite, too large.
    """
    for update in lora.updates:
        if update.name == name:
            return Curve(label, _known(rank_of_update(update, exact=False).spectrum, f"{label}: tensor {name!r}"))
    raise SourceError(f"{label}: the LoRA does not change {name!r}")


def _known(found: Spectrum | None, where: str) -> Spectrum:
    if found is None:
        raise SourceError(f"{where} has a shorter side above {LARGEST}: too large for its singular values")
    return found


def records(curves: Sequence[Curve]) -> list[Record]:
    """One for each singular value."""
    return [
        {"change": curve.label, "number": number, "singular_value": float(value)}
        for curve in curves
        for number, value in enumerate(curve.values, 1)
    ]


def draw_spectra(axes: Any, curves: Sequence[Curve], title: str | None = None, *, legend: bool = True) -> Any:
    """Draw singular values by their number, both on logarithmic axes; the legend has the ranks.

    Args:
        axes: a matplotlib Axes.
        curves: at least one with a singular value; of the others there is a line in the legend alone.
        title: above the picture.
        legend: draw it, in the lower left corner; its lines have their labels in any case.

    Returns:
        ``axes``.

    Raises:
        SourceError: there is no singular value above 0.
    """
    if not any(curve.values.size for curve in curves):
        raise SourceError("no change has a singular value above 0: there is nothing to draw")
    for at, (curve, label) in enumerate(
        zip(curves, distinct_labels([curve.label for curve in curves], 40), strict=True)
    ):
        values = curve.values
        spectrum = curve.spectrum
        axes.plot(
            np.arange(1, values.size + 1), values,
            **line_style(at), markevery=_spread(values.size), mec="white", mew=0.4,
            label=f"{label}: rank {values.size}, stable rank {spectrum.stable_rank:.1f}",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("number of the singular value")
    axes.set_ylabel("singular value")
    from matplotlib.ticker import FuncFormatter

    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(visible=True)
    if title:
        axes.set_title(title)
    if legend:
        axes.legend(loc="lower left")
    return axes


def _spread(count: int) -> list[int]:
    """Which values get a mark: about evenly spread on a logarithmic axis."""
    return sorted({round(at) - 1 for at in np.geomspace(1, max(1, count), 16)})
