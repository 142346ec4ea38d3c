"""How many threads there is work for."""

from __future__ import annotations

import os

MOST_THREADS = 16  # beyond so many, they wait for each other


def usable_cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
