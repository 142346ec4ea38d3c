"""The source's weights: kept as far as memory allows, and computed again each time beyond that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

KEPT = 1 << 29  # bytes


class ComputedWeights(Mapping[str, Tensor]):
    """Weights by name that can be computed at any time; the first that fit into :data:`KEPT` bytes are kept."""

    def __init__(self) -> None:
        """Without weights."""
        self._kept: dict[str, Tensor] = {}
        self._compute: dict[str, Callable[[], Tensor]] = {}
        self._left = KEPT

    def add(self, name: str, weight: Tensor, compute: Callable[[], Tensor]) -> None:
        """Add a weight, and how to compute it again."""
        self._compute[name] = compute
        if weight.nbytes <= self._left:
            self._left -= weight.nbytes
            self._kept[name] = weight

    @property
    def are_kept(self) -> bool:
        """Whether all are in memory."""
        return len(self._kept) == len(self._compute)

    def __getitem__(self, name: str) -> Tensor:
        """One weight."""
        return self._kept[name] if name in self._kept else self._compute[name]()

    def __contains__(self, name: object) -> bool:
        """Whether there is one of this name; computes nothing."""
        return name in self._compute

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return iter(self._compute)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._compute)
