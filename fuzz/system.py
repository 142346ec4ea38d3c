"""What differs between systems: child processes, limits, and how much memory this process has."""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_ADDRESSES = (
    4 << 30
)  # bytes of address space beyond what there is: an absurd allocation fails before it takes the machine


def children(*, anew: bool = False) -> Any:
    """How child processes start: forked, with all imports done, where that is safe; else, or ``anew``, spawned."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" and not anew else "spawn")


def seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def memory() -> int:
    """Bytes of this process that are in memory; 0 where the system does not say."""
    if sys.platform == "linux":
        return _kilobytes("VmRSS:") << 10
    return peak()  # only ever grows: what a case needs beyond all before it is seen


def peak() -> int:
    """The most that :func:`memory` was since :func:`forget_peak`; 0 where the system does not say."""
    if sys.platform == "linux":
        return _kilobytes("VmHWM:") << 10
    if resource is None:
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS


def forget_peak() -> None:
    """Let :func:`peak` begin anew, where the system can."""
    if sys.platform == "linux":
        _FORGET.write_text("5", "ascii")


def limit(seconds: int) -> None:
    """End this process after so many more CPU seconds, and refuse absurd allocations, where the system can."""
    if resource is None:
        return
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + seconds + 1, most))
    if sys.platform == "linux":
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, ((_kilobytes("VmSize:") << 10) + _ADDRESSES, most))


def machine() -> str:
    """The machine in words."""
    model = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {platform.system()}, Python {platform.python_version()}"


def _kilobytes(key: str) -> int:
    lines = _STATUS.read_text("ascii", "replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
