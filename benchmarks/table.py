"""One row for each comparison, as text and as JSON."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any


@dataclass(frozen=True)
class Row:
    """A comparison.

    Attributes:
        case: what is compared.
        ours: our figure.
        peer: the peer's, or the physical or theoretical limit.
        unit: of both.
        peer_is: who or what the peer is.
        ratio: peer / ours: above 1, ours is faster or smaller; None if ours is 0.
        required: what the project demands, in words; "" for nothing.
        met: whether that holds; None without a demand.
    """

    case: str
    ours: float
    peer: float
    unit: str
    peer_is: str
    required: str = ""
    met: bool | None = None

    @property
    def ratio(self) -> float | None:
        return self.peer / self.ours if self.ours else None


def as_text(rows: list[Row]) -> str:
    """The rows as a table."""
    head = ("case", "ours", "peer", "unit", "peer/ours", "peer is", "required")
    lines = [head] + [
        (
            row.case, f"{row.ours:.4g}", f"{row.peer:.4g}", row.unit,
            "" if row.ratio is None else f"{row.ratio:.2f}", row.peer_is,
            f"{row.required}: {'ok' if row.met else 'MISSED'}" if row.required else "",
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def machine() -> dict[str, Any]:
    """What the figures were measured on, without names of hosts or folders."""
    packages = ("numpy", "torch", "peft", "transformers", "safetensors", "shira-format")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": _memory(),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def machine_name() -> str:
    """The machine in a few words, for a figure."""
    of = machine()
    return f"{of['cores']} cores of {of['cpu'].replace('(R)', '').replace(' Processor', '')}"


def _memory() -> float | None:
    """GiB of memory; None where the system does not say (Windows)."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def seconds(work: Callable[[], object], *, repeat: int = 5) -> float:
    """The median time of ``work`` after one run to warm up."""
    work()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
