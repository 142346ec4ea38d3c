"""A merge method: a function from the aligned entries of a weight to a factor for each entry of each adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shira_format.entries.aligned import AlignedEntries, Factor
from shira_format.errors import SourceError

Options = Mapping[str, Any]
# For each part the factor of its deltas, weight included: one for all, or one for each entry; 0 drops the entry.
Factors = Callable[[AlignedEntries, Options], Sequence[Factor]]


@dataclass(frozen=True)
class Option:
    """An option of a method.

    Attributes:
        default: its default; values are of the same type.
        about: what it does, for the help.
        choices: the values that it can have; empty: any of its type within the limits.
        low: the least number.
        high: the greatest number.
        each: whether adapters may have different values, as a sequence, or as text separated by commas.
    """

    default: float | int | bool | str
    about: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    each: bool = False

    def parsed(self, name: str, value: Any) -> Any:
        """``value``, from Python or as text, in the option's type; a tuple if there is one for each adapter.

        Raises:
            SourceError: the value is invalid.
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
    """The options of one adapter."""
    return {key: value[number] if isinstance(value, tuple) else value for key, value in options.items()}


def shown(value: Any) -> str:
    """An option's value as text that parses to the same value."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(shown, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


_KINDS: dict[type, str] = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


@dataclass(frozen=True)
class Method:
    """A merge method.

    Attributes:
        name: that of PEFT or mergekit, if they have it.
        factors: computes the factors.
        about: what it does, in a line.
        options: its options by name.
        copies: whether every entry of the result is copied from one adapter: then weights are 1 or 0.
    """

    name: str
    factors: Factors
    about: str
    options: Mapping[str, Option] = field(default_factory=dict)
    copies: bool = False

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options: the given ones, and the defaults of the others.

        Raises:
            SourceError: an unknown option, or an invalid value.
        """
        for name in given:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise SourceError(f"the method {self.name!r} has no option {name!r}; it has {known}")
        return {
            name: option.parsed(name, given[name]) if name in given else option.default
            for name, option in self.options.items()
        }
