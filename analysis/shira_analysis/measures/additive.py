"""Dataclasses that add field by field, to combine the measures of several weights, and their JSON values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self


@dataclass(frozen=True)
class Additive:
    """A dataclass whose ``+`` adds each field; a field that is None (unknown) on either side is None in the sum."""

    def __add__(self, other: Self) -> Self:
        return type(self)(
            *(self._add(one.name, getattr(self, one.name), getattr(other, one.name)) for one in fields(self))
        )

    def _add(self, _field: str, a: Any, b: Any) -> Any:
        """The sum of one field; subclasses may override it."""
        return None if a is None or b is None else a + b


def attributes(measure: object, *names: str) -> dict[str, Any]:
    """Attributes by name, in this order; ``"key=name"`` stores the attribute ``name`` under ``key``."""
    pairs = (name.rpartition("=") for name in names)
    return {key or name: getattr(measure, name) for key, _, name in pairs}
