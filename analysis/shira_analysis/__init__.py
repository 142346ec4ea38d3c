"""Measures of adapters and of what they do to a model; reads adapters, never writes them.

>>> import shira_analysis as an
>>> an.measure("adapter.st", "my-model").total.mask.density
0.01
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shira_analysis.figures.axes import plot_dimension as plot_dimension
    from shira_analysis.figures.axes import plot_layers as plot_layers
    from shira_analysis.figures.axes import plot_mask as plot_mask
    from shira_analysis.figures.axes import plot_orthogonality as plot_orthogonality
    from shira_analysis.figures.axes import plot_overlap as plot_overlap
    from shira_analysis.figures.axes import plot_spectrum as plot_spectrum
    from shira_analysis.lemmas import verify_lemmas as verify_lemmas
    from shira_analysis.measures.adapter import measure as measure
    from shira_analysis.measures.effect import accuracy as accuracy
    from shira_analysis.measures.effect import effect as effect
    from shira_analysis.measures.interference import interference as interference
    from shira_analysis.measures.lora import measure_lora as measure_lora
    from shira_analysis.measures.orthogonality import awom as awom
    from shira_analysis.measures.orthogonality import awor as awor
    from shira_analysis.measures.orthogonality import orthogonality as orthogonality
    from shira_analysis.measures.overlap import overlap as overlap
    from shira_analysis.measures.pairs import measure_pairs as measure_pairs
    from shira_analysis.measures.rank import rank_of as rank_of
    from shira_analysis.merging.analysis import analyse_merge as analyse_merge
    from shira_analysis.merging.check import check_merge as check_merge
    from shira_analysis.reports.html import report as report
    from shira_format.calibration.moments import collect_moments as collect_moments

# Where each public name lives ("module:name" if it has another name there); it is imported when it is first asked for, since scipy and matplotlib take long to load.
_HOMES = {
    "accuracy": "shira_analysis.measures.effect",
    "analyse_merge": "shira_analysis.merging.analysis",
    "awom": "shira_analysis.measures.orthogonality",
    "awor": "shira_analysis.measures.orthogonality",
    "check_merge": "shira_analysis.merging.check",
    "collect_moments": "shira_format.calibration.moments",
    "effect": "shira_analysis.measures.effect",
    "interference": "shira_analysis.measures.interference",
    "measure": "shira_analysis.measures.adapter",
    "measure_lora": "shira_analysis.measures.lora",
    "measure_pairs": "shira_analysis.measures.pairs",
    "orthogonality": "shira_analysis.measures.orthogonality",
    "overlap": "shira_analysis.measures.overlap",
    "plot_dimension": "shira_analysis.figures.axes",
    "plot_layers": "shira_analysis.figures.axes",
    "plot_mask": "shira_analysis.figures.axes",
    "plot_orthogonality": "shira_analysis.figures.axes",
    "plot_overlap": "shira_analysis.figures.axes",
    "plot_spectrum": "shira_analysis.figures.axes",
    "rank": "shira_analysis.measures.rank:rank_of",
    "report": "shira_analysis.reports.html",
    "verify_lemmas": "shira_analysis.lemmas",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605 - strings, from the table above


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = globals()[name] = getattr(import_module(module), attribute or name)
    return value


def __dir__() -> list[str]:
    return __all__
