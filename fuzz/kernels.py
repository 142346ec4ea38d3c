"""Compiled loops and their fallbacks: the same work with each of the two.

What compiled loops get from the modules that call them ends at a page without access.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np

from fuzz.guard import Guards
from fuzz.oracle import Violation
from shira_format._core import compiled
from shira_format._core.arrays import Array
from shira_format.errors import FormatError

compiled.load()
_COMPILED = compiled.loaded()
_CALLERS = ("shira_format._core.compiled", "shira_format.format.codecs.", "shira_format.format.compact.")
_LARGE = 1 << 22  # bytes


@contextmanager
def loops(*, machine_code: bool) -> Iterator[None]:
    """Use numba's functions, or those that run where it is not installed."""
    with (
        mock.patch.object(compiled, "_kernels", _COMPILED if machine_code else None),
        mock.patch.object(compiled, "load", return_value=machine_code),
        _guarded() if machine_code else nullcontext(),
    ):
        yield


class _Guarding:
    """numpy, for the modules that call compiled loops; new arrays are guarded."""

    def __init__(self) -> None:
        self.guards = Guards()

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, shape: Any, dtype: Any = np.float64) -> Array:
        """A new array, guarded if that is cheap."""
        if np.prod(shape, dtype=np.float64) * np.dtype(dtype).itemsize > _LARGE:
            return np.empty(shape, dtype)
        return self.guards.array(shape, dtype, at_end=True)

    def zeros(self, shape: Any, dtype: Any = np.float64) -> Array:
        """The same, of zeros."""
        found = self.empty(shape, dtype)
        found[...] = 0
        return found


@contextmanager
def _guarded() -> Iterator[None]:
    """Guard the arrays that modules make for compiled loops.

    Raises:
        Violation: memory beside one was written.
    """
    modules = [
        module for name, module in sys.modules.items() if name.startswith(_CALLERS) and hasattr(module, "np")
    ]
    ours: Any = _Guarding()
    for module in modules:
        module.np = ours  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in modules:
            module.np = np  # type: ignore[attr-defined]
    if not ours.guards.are_whole():
        raise Violation("memory beside a new array was written")


def both(work: Callable[[], Any]) -> Any:
    """The result of both ways, bit for bit the same; raises the FormatError that both raise for the same rule.

    Raises:
        Violation: they differ.
    """
    outcomes = [_outcome(work, machine_code=machine_code) for machine_code in (True, False)]
    (one, result), (other, _) = outcomes
    if one != other:
        raise Violation(f"machine code: {str(one)[:300]}; numpy: {str(other)[:300]}")
    if isinstance(result, FormatError):
        raise result
    return result


def _outcome(work: Callable[[], Any], *, machine_code: bool) -> tuple[Any, Any]:
    try:
        with loops(machine_code=machine_code):
            result = work()
    except FormatError as error:
        return f"refused: {error.rule}", error
    return _bits(result), result


def _bits(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape, value.tobytes()
    if isinstance(value, (list, tuple)):
        return [_bits(one) for one in value]
    return value
