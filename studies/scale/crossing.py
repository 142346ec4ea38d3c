"""Which density reaches a wanted share, from a few densities that were tried."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from studies.statistics import Floats

WANTED = (0.5, 0.95)


def crossing(densities: Sequence[float], shares: Floats, wanted: float) -> float:
    """The least density with the wanted share, by straight lines over the logarithm; infinite if none has it, the first if it has it already."""
    logs = np.log(densities)
    for at, share in enumerate(shares):
        if share >= wanted:
            if not at:
                return densities[0]
            before = shares[at - 1]
            part = (wanted - before) / (share - before)
            return float(np.exp(logs[at - 1] + part * (logs[at] - logs[at - 1])))
    return float("inf")


def shown(value: float, low: float, high: float, densities: Sequence[float]) -> str:
    """What :func:`crossing` found, with its interval, as a cell; where all lie beyond what was tried, it is said once."""
    first, last = densities[0], densities[-1]

    def one(density: float) -> str:
        if density > last:
            return f">{100 * last:g} %"
        return f"≤{100 * first:g} %" if density <= first else f"{100 * density:.2g} %"

    middle, least, most = one(value), one(low), one(high)
    return middle if middle == least == most else f"{middle} ({least} to {most})"
