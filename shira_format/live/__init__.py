"""Adapters on live weights: on, off, changed, several at once; the base comes back bit for bit (spec, section 4)."""

from __future__ import annotations

from shira_format.live.dicts import Applied, apply
from shira_format.live.loaded import LoadedAdapter
from shira_format.live.pool import AdapterPool, PoolStatistics
from shira_format.live.switcher import Report, Switcher

__all__ = ["AdapterPool", "Applied", "LoadedAdapter", "PoolStatistics", "Report", "Switcher", "apply"]
