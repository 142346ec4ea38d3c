"""What a method of merging is: a function from several adapters' parts of a weight to a factor for each of their entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shira_format.entries.aligned import AlignedEntries, Factor
from shira_format.errors import SourceError

Options = Mapping[str, Any]
# For each part what its deltas are multiplied by, weight included: one factor, or one for each of its entries; 0 leaves it out.
Factors = Callable[[AlignedEntries, Options], Sequence[Factor]]


@dataclass(frozen=True)
class Option:
    """A setting of a method, and what it can be.

    Attributes:
        default: its value if none is given; its type is the option's.
        about: what it does, for people.
        choices: what it can be; empty: any value of its type within the limits.
        low: of numbers, the least.
        high: of numbers, the greatest.
        each: whether adapters may have different ones, as a sequence, or with commas between.
    """

    default: float | int | bool | str
    about: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    each: bool = False

    def parsed(self, name: str, value: Any) -> Any:
        """``value``, from Python or as text, in the option's type; a tuple of these if it is one for each adapter.

        Raises:
            SourceError: it cannot be this option's.
        """
        if self.each and isinstance(value, str) and "," in value:
            value = value.split(",")
        if self.each and isinstance(value, (list, tuple)):
            return tuple(self._one(name, one) for one in value)
        return self._one(name, value)

    def _one(self, name: str, value: Any) -> Any:
        kind = type(self.default)
        try:
            if kind is bool:
                found: Any = {"true": True, "false": False, "yes": True, "no": False}[str(value).lower()]
            else:
                found = str(value).lower() if isinstance(value, bool) else kind(value)
                if kind is int and found != float(value):
                    raise ValueError
        except (KeyError, ValueError, TypeError, OverflowError):
            raise SourceError(f"{name}={value!r}: not {_KINDS[kind]}") from None
        if self.choices and found not in self.choices:
            raise SourceError(f"{name}={value!r}: not one of {', '.join(self.choices)}")
        if kind in (int, float) and not (self.low <= found <= self.high and math.isfinite(found)):
            raise SourceError(f"{name}={value!r}: not from {self.low:g} to {self.high:g}")
        return found


def of_adapter(options: Options, number: int) -> Options:
    """The options with, of those that have one for each adapter, that of one of them."""
    return {key: value[number] if isinstance(value, tuple) else value for key, value in options.items()}


def shown(value: Any) -> str:
    """An option's value as text that would be parsed as it."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(shown, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


_KINDS: dict[type, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}


@dataclass(frozen=True)
class Method:
    """One way to join adapters.

    Attributes:
        name: as PEFT or mergekit call it, if they know it.
        factors: computes it.
        about: what it does, in a line.
        options: its settings by name.
        copies: whether every entry of the result is copied from one adapter: then weights are 1 or 0.
    """

    name: str
    factors: Factors
    about: str
    options: Mapping[str, Option] = field(default_factory=dict)
    copies: bool = False

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options, with what was given.

        Raises:
            SourceError: one that the method does not know, or a value that it cannot have.
        """
        for name in given:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise SourceError(f"the method {self.name!r} has no option {name!r}; it has {known}")
        return {
            name: option.parsed(name, given[name]) if name in given else option.default
            for name, option in self.options.items()
        }
