"""The losses of a training as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shira_format._core.optional import optional_import
from shira_format.errors import SourceError
from shira_format.storage.atomic import atomic_file

if TYPE_CHECKING:
    from shira_format.training.report import Run, TrainingReport

_FORMATS = ("png", "svg", "pdf")
_NAMES = {"shira": "sparse adapter", "lora": "LoRA"}
_WINDOW = 20  # windows of the running mean in a training


def draw(report: TrainingReport, path: Path) -> None:
    """Draw the losses of each run: in training, faint, with their running mean, and in validation, with what was kept.

    Raises:
        SourceError: matplotlib is missing, or the file's name tells no format.
        OSError: it cannot be written.
    """
    form = path.suffix.lower().lstrip(".")
    if form not in _FORMATS:
        raise SourceError(f"{path}: pictures are written as {', '.join(_FORMATS)}")
    with optional_import("pictures need matplotlib", "figures"):
        import matplotlib as mpl  # noqa: F401
    from shira_analysis.figures.style import BLUE, GREY, ORANGE, figure, our_style, render

    with our_style():
        drawn = figure(7.2, 3.6)
        axes = drawn.add_subplot()
        for run in report.runs:
            _draw_run(axes, run, {"shira": BLUE, "lora": ORANGE}[run.method])
        if report.base is not None:
            axes.axhline(report.base.loss, color=GREY, ls=":", lw=1.2, label="base, validation")
        axes.plot([], [], color=GREY, marker="*", ms=10, ls="", label="kept")
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.set_ylabel("loss per token" if report.task == "causal" else "loss per text")
        axes.grid(axis="y")
        drawn.legend(loc="outside right upper")
        content = render(drawn, form)
    with atomic_file(path) as file:
        file.write(content)


def _draw_run(axes: Any, run: Run, colour: str) -> None:
    name = _NAMES[run.method]
    steps, losses = (np.array(column, float) for column in zip(*run.losses, strict=True))
    axes.plot(steps, losses, color=colour, alpha=0.25, lw=0.8)
    axes.plot(steps, running_mean(losses), color=colour, lw=1.2, alpha=0.7, label=f"{name}, training")
    if run.validation:
        at, found = zip(*((step, quality.loss) for step, quality in run.validation), strict=True)
        axes.plot(at, found, color=colour, ls="--", marker="o", ms=4, lw=1.4, label=f"{name}, validation")
    if run.quality is not None:
        axes.plot(
            [run.best_step], [run.quality.loss], color=colour, marker="*", ms=13, ls="", mec="white", zorder=5
        )


def running_mean(losses: Sequence[float] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The mean of each loss with its neighbours, of a twentieth of all to both sides together, fewer at the ends."""
    values = np.asarray(losses, float)
    side = len(values) // _WINDOW // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    low, high = np.maximum(place - side, 0), np.minimum(place + side + 1, len(values))
    found: np.ndarray[Any, Any] = (sums[high] - sums[low]) / (high - low)
    return found
