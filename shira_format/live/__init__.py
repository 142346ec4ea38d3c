"""Adapters on live weights: load, switch, combine, and restore the base bit for bit (spec, section 4)."""

from __future__ import annotations

from shira_format.entries.loaded import LoadedAdapter
from shira_format.entries.placed import place_adapter
from shira_format.live.apply import Applied, apply
from shira_format.live.pool import AdapterPool, PoolStatistics
from shira_format.live.switcher import Report, Switcher

__all__ = [
    "AdapterPool",
    "Applied",
    "LoadedAdapter",
    "PoolStatistics",
    "Report",
    "Switcher",
    "apply",
    "place_adapter",
]
