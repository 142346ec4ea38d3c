"""Measures on adapters and on what they do; reads adapters, never writes them."""

from __future__ import annotations

from shira_analysis.effect import Effect, accuracy, effect

__all__ = ["Effect", "accuracy", "effect"]
