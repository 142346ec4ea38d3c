"""A picture of a fit: the effect kept against the density, and the error of each layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from shira_analysis.figures.style import BLUE, GREY, RED, figure, our_style, render, short_label
from shira_format._core.text import file_size

if TYPE_CHECKING:
    from shira_format.convert.fit.report import FitReport
    from shira_format.convert.fit.search import Trial

_MOST_NAMED = 40  # layers whose names have room
_APART = 2.0  # factor between densities whose ticks do not overlap
_FLOOR = -0.25  # of the axis of R²: what is worse is drawn there
_CUT: dict[str, Any] = {"color": GREY, "ls": ":", "marker": "s", "label": "plain cut"}


def fit_picture(report: FitReport, form: str = "png") -> bytes:
    """The bytes of a PNG or SVG.

    Args:
        report: of a fit; a search has several fits at different densities.
        form: ``"png"`` or ``"svg"``.
    """
    layers = [name for name, error in report.written.layers.items() if math.isfinite(error)]
    with our_style():
        drawn = figure(9.6 if layers else 5.2, max(3.6, 1.4 + 0.16 * min(len(layers), _MOST_NAMED)))
        axes = drawn.subplots(1, 2 if layers else 1, squeeze=False).ravel()
        _draw_trials(axes[0], report)
        if layers:
            _draw_layers(axes[1], report, layers)
        return render(drawn, form)


def _draw_trials(axes: Any, report: FitReport) -> None:
    trials = sorted(report.trials, key=lambda trial: trial.budget)
    densities = [100 * trial.density for trial in trials]
    fitted = [_shown(trial.fit.r2) for trial in trials]
    below = [max(0.0, r2 - _shown(trial.fit.low)) for r2, trial in zip(fitted, trials, strict=True)]
    above = [max(0.0, _shown(trial.fit.high) - r2) for r2, trial in zip(fitted, trials, strict=True)]
    axes.plot(densities, [_shown(trial.plain.r2) for trial in trials], **_CUT)
    axes.errorbar(
        densities, fitted, [below, above], color=BLUE, marker="o", capsize=2.5, label="fitted, 95 % interval"
    )
    if (keep := report.goal.get("keep")) is not None:
        axes.axhline(keep, color=RED, lw=0.8, ls="--", label=f"asked for: {keep:g}")
    written = [trial for trial in trials if trial.budget == report.budget]
    places = [100 * trial.density for trial in written]
    axes.plot(
        places, [_shown(trial.r2) for trial in written], color=BLUE, marker="*", ms=13, ls="none", label="written"
    )
    axes.set_xscale("log")
    axes.set_xlim(min(densities) / 1.6, max(densities) * 1.6)
    _density_ticks(axes, [*written, *trials])
    lowest = min(_shown(effect.r2) for trial in trials for effect in (trial.fit, trial.plain))
    axes.set_ylim(min(0.0, lowest) - 0.04, 1.04)
    axes.grid(visible=True, axis="y")
    axes.set_xlabel("density, % (below: size of the file)")
    axes.set_ylabel("effect kept, R²")
    axes.set_title("1: does what the source does; 0: is as far from it as the base", loc="left", fontsize=8)
    axes.legend(loc="best")


def _shown(value: float) -> float:
    return max(_FLOOR, value) if math.isfinite(value) else _FLOOR


def _density_ticks(axes: Any, trials: list[Trial]) -> None:
    """A tick for each fit, with the size of its file; where they would overlap, for the first."""
    ticks: dict[float, str] = {}
    for trial in trials:
        place = 100 * trial.density
        if all(max(place, other) / min(place, other) > _APART for other in ticks):
            size = f"\n{file_size(trial.file_bytes)}" if trial.file_bytes else ""
            ticks[place] = f"{place:.2g}{size}"
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()


def _draw_layers(axes: Any, report: FitReport, names: list[str]) -> None:
    rows = range(len(names))
    axes.plot([report.plain.layers.get(name, math.nan) for name in names], rows, **_CUT)
    axes.plot(
        [report.fit.layers.get(name, math.nan) for name in names], rows, color=BLUE, marker="o", label="fitted"
    )
    axes.invert_yaxis()
    step = -(-len(names) // _MOST_NAMED)
    axes.set_yticks(rows[::step], [short_label(name, 34) for name in names[::step]])
    axes.set_xlim(0, 1.06 * axes.get_xlim()[1])
    axes.grid(visible=True, axis="x")
    axes.set_xlabel("squared error of the layer's output, as a share of the base's")
    axes.set_title("by layer, on the inputs held out to measure on", loc="left", fontsize=8)
    axes.legend(loc="best")
