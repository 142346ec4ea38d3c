"""Exact top-k by magnitude over changes that are computed tile by tile and never held whole.

Ties are broken by position: the lower index is taken first, and under the global scope the earlier tensor.
"""

from __future__ import annotations

from shira_format.selection.stages import Engine, LocalEngine, Pending, passes, select
from shira_format.selection.topk import AMOUNTS, TopK

__all__ = [
    "AMOUNTS",
    "Engine",
    "LocalEngine",
    "Pending",
    "TopK",
    "passes",
    "select",
]
