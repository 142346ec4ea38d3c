"""Measures on adapters and on what they do; reads adapters, never writes them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shira_analysis.effect import Effect, accuracy, effect

if TYPE_CHECKING:
    from shira_analysis.measures import measure
    from shira_analysis.moments import collect_moments
    from shira_analysis.orthogonality import awom, awor
    from shira_analysis.pairs import measure_pairs

__all__ = ["Effect", "accuracy", "awom", "awor", "collect_moments", "effect", "measure", "measure_pairs"]

# Imported when they are asked for: they would double the time that shira-inspect takes to start.
_WHERE = {
    "awom": "orthogonality",
    "awor": "orthogonality",
    "collect_moments": "moments",
    "measure": "measures",
    "measure_pairs": "pairs",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
