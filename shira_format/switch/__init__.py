"""Adapters on live weights: on, off, changed, several at once; the base comes back bit for bit (spec, section 4)."""

from __future__ import annotations

from shira_format.switch.decoded import Decoded
from shira_format.switch.dicts import Applied, apply
from shira_format.switch.pool import AdapterPool, PoolStatistics
from shira_format.switch.switcher import Report, Switcher

__all__ = ["AdapterPool", "Applied", "Decoded", "PoolStatistics", "Report", "Switcher", "apply"]
