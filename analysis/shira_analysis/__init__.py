"""Measures on adapters and on what they do; reads adapters, never writes them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shira_analysis.measures.effect import Effect, accuracy, effect

if TYPE_CHECKING:
    from shira_analysis.measures.adapter import measure
    from shira_analysis.measures.orthogonality import awom, awor
    from shira_analysis.measures.pairs import measure_pairs
    from shira_format.calibration.moments import collect_moments

__all__ = ["Effect", "accuracy", "awom", "awor", "collect_moments", "effect", "measure", "measure_pairs"]

# Imported when they are asked for: they would double the time that shira-inspect takes to start.
_WHERE = {
    "awom": "shira_analysis.measures.orthogonality",
    "awor": "shira_analysis.measures.orthogonality",
    "collect_moments": "shira_format.calibration.moments",
    "measure": "shira_analysis.measures.adapter",
    "measure_pairs": "shira_analysis.measures.pairs",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
