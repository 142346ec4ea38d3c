"""Compiled loops and their fallbacks: the same work with each of the two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from fuzz.oracle import Violation
from shira_format._core import compiled
from shira_format.errors import FormatError

compiled.load()
_COMPILED = compiled.loaded()


@contextmanager
def loops(*, machine_code: bool) -> Iterator[None]:
    """Use numba's functions, or those that run where it is not installed."""
    with (
        mock.patch.object(compiled, "_kernels", _COMPILED if machine_code else None),
        mock.patch.object(compiled, "load", return_value=machine_code),
    ):
        yield


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
