"""The losses of a training as a picture."""

from __future__ import annotations

from pathlib import Path

from shira_format._core.optional import optional_import
from shira_format.errors import SourceError
from shira_format.storage.atomic import atomic_file
from shira_format.training.report import TrainingReport

_FORMATS = ("png", "svg", "pdf")
_COLOURS = {"shira": "tab:blue", "lora": "tab:orange"}
_NAMES = {"shira": "sparse adapter", "lora": "LoRA"}


def draw(report: TrainingReport, path: Path) -> None:
    """Draw the training losses, thin, and the validation losses, with points and the one that was kept.

    Raises:
        SourceError: matplotlib is missing, or the file's name tells no format.
        OSError: it cannot be written.
    """
    form = path.suffix.lower().lstrip(".")
    if form not in _FORMATS:
        raise SourceError(f"{path}: pictures are written as {', '.join(_FORMATS)}")
    with optional_import("pictures need matplotlib", "figures"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for run in report.runs:
        colour, name = _COLOURS[run.method], _NAMES[run.method]
        axes.plot(*zip(*run.losses, strict=True), color=colour, alpha=0.35, linewidth=1, label=f"{name}, training")
        if run.validation:
            steps, losses = zip(*((step, quality.loss) for step, quality in run.validation), strict=True)
            axes.plot(steps, losses, color=colour, marker="o", markersize=4, label=f"{name}, validation")
        if run.quality is not None:
            axes.plot(
                [run.best_step], [run.quality.loss], color=colour, marker="*", markersize=12, linestyle="none"
            )
    if report.base is not None:
        axes.axhline(report.base.loss, color="gray", linestyle=":", label="base, validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    with atomic_file(path) as file:
        figure.savefig(file, format=form, dpi=150)
