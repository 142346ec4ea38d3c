"""How many of the largest entries to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

AMOUNTS = ("density", "top_k", "energy")


@dataclass(frozen=True)
class TopK:
    """How many of the largest entries to keep, of each tensor or of all.

    Attributes:
        density: share of the elements, in (0, 1]; rounded to the nearest count, at least 1.
        top_k: instead, a count: for each tensor, or in total under the global scope.
        scope: ``"tensor"``: each tensor keeps its own largest entries; ``"global"``: the largest of all tensors.
        energy: instead, a share in (0, 1]: the fewest entries that hold this share of the energy (the sum of squares).
        min_change: changes of a smaller magnitude are never kept.
    """

    density: float | None = 0.01
    top_k: int | None = None
    scope: str = "tensor"
    energy: float | None = None
    min_change: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for invalid values."""
        if sum(getattr(self, amount) is not None for amount in AMOUNTS) != 1:
            raise ValueError("give one of density, top-k and energy")
        for share in ("density", "energy"):
            if (value := getattr(self, share)) is not None and not 0 < value <= 1:
                raise ValueError(f"{share} {value} is not in (0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k {self.top_k} is not a positive count")
        if self.scope not in ("tensor", "global"):
            raise ValueError(f"scope {self.scope!r} is neither 'tensor' nor 'global'")
        if not 0 <= self.min_change < float("inf"):
            raise ValueError(f"min-change {self.min_change} is not a magnitude")

    def count(self, elements: int) -> int:
        """The number of entries to keep at most, of ``elements``."""
        if self.top_k is not None:
            return min(self.top_k, elements)
        if self.density is None:
            return elements
        return min(max(1, int(self.density * elements + 0.5)), elements)

    def lowest(self, dtype: np.dtype[Any]) -> Any:
        """The smallest magnitude of ``dtype`` that may be kept; always above 0."""
        with np.errstate(over="ignore"):
            least = dtype.type(self.min_change)
        if float(least) < self.min_change:
            least = np.nextafter(least, dtype.type(np.inf))
        return max(least, np.finfo(dtype).smallest_subnormal)
