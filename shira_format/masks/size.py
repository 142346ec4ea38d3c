"""How many entries a mask has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shira_format.errors import SourceError
from shira_format.masks.weights import Weight
from shira_format.selection import TopK

SCOPES = ("tensor", "global", "row")
DENSITY = 0.01


@dataclass(frozen=True)
class Size:
    """The size of a mask: one of the first three, or a density of 1 %.

    Attributes:
        density: share of the elements, in (0, 1]; rounded to the nearest count, at least 1.
        top_k: a count: for each weight, or in all under the global scope.
        rank: as many as a LoRA of this rank has parameters, ``rank (m + n)`` for a matrix of ``m`` rows and ``n`` columns.
        scope: ``"tensor"``: each weight has its own share; ``"global"``: the best of all weights together; ``"row"``: each row
            of a matrix (each output) has the same number.
    """

    density: float | None = None
    top_k: int | None = None
    rank: int | None = None
    scope: str = "tensor"

    def __post_init__(self) -> None:
        """Raise ValueError for values that cannot be meant."""
        given = [name for name in ("density", "top_k", "rank") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: give one")
        if self.scope not in SCOPES:
            raise ValueError(f"scope {self.scope!r} is none of {', '.join(SCOPES)}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank {self.rank} is not a positive number")
        if self.rank is None:
            self._rule()  # which checks the other two

    def _rule(self) -> TopK:
        if self.top_k is not None:
            return TopK(None, self.top_k)
        return TopK(DENSITY if self.density is None else self.density)

    def of(self, weight: Weight) -> int:
        """The entries of one weight.

        Raises:
            SourceError: a LoRA of that rank has more parameters than the weight has elements.
        """
        if self.rank is None:
            return self._rule().count(weight.size)
        count = weight.lora_size(self.rank)
        if count > weight.size:
            raise SourceError(
                f"tensor {weight.name!r}: a LoRA of rank {self.rank} has {count} parameters, more than the {weight.size} elements: "
                "leave the tensor out or take a lower rank"
            )
        return count

    def of_all(self, weights: Sequence[Weight]) -> int:
        """The entries of all weights under the global scope."""
        if self.rank is not None:
            return sum(self.of(weight) for weight in weights)
        return self._rule().count(sum(weight.size for weight in weights))

    def of_row(self, weight: Weight) -> int:
        """The entries of each row: the weight's own over its rows, rounded to the nearest count, at least 1."""
        count, rows, columns = weight.matrices
        if weight.inputs_first:
            rows, columns = columns, rows
        if not weight.size:
            return 0
        return min(max(1, int(self.of(weight) / (count * rows) + 0.5)), columns)

    @property
    def notes(self) -> dict[str, Any]:
        """For the manifest's ``selection``."""
        notes: dict[str, Any] = {"scope": self.scope}
        if self.rank is not None:
            return notes | {"lora_rank": self.rank}
        if self.top_k is not None:
            return notes | {"top_k": self.top_k}
        return notes | {"density": DENSITY if self.density is None else self.density}
