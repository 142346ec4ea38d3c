"""Whether a weight is the one that an adapter was made for: one rule for each property, and one set of messages.

The weight may be a tensor of a checkpoint, a live weight or an array: callers pass its shape, dtype or digest, and what
messages call it (``base``). ``what`` is how messages start: the adapter's file if there is one, and the tensor.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shira_format._core.dtypes import is_float, working_dtype
from shira_format.errors import BaseMismatch, BaseRequired

Shape = tuple[int, ...]


def missing(what: str, name: str, base: str = "the base") -> BaseMismatch:
    """The error for a base without the tensor ``name``."""
    return BaseMismatch(f"{what}: {base} has no {name!r}")


def base_required(what: str) -> BaseRequired:
    """The error for base values that neither the adapter nor a given base has."""
    return BaseRequired(
        f"{what}: the base's values at the adapter's entries are not known: pass the base (--base), or convert with "
        "--self-contained"
    )


def check_shape(what: str, expected: Shape, found: Shape, base: str = "the base") -> None:
    """Raise BaseMismatch if the weight has another shape than the adapter's."""
    if found != expected:
        raise BaseMismatch(f"{what}: the adapter is for shape {list(expected)}, {base} has {list(found)}")


def check_dtype(
    what: str, expected: np.dtype[Any], found: np.dtype[Any], *, any_float: bool, base: str = "the base"
) -> None:
    """Raise BaseMismatch if the weight has another dtype than the adapter's.

    Args:
        what: how the message starts.
        expected: the adapter's.
        found: the weight's.
        any_float: whether any float dtype fits, as for deltas without the digest of base values (spec, section 4).
        base: what the message calls the weight.
    """
    if found == expected or (any_float and is_float(found)):
        return
    hint = "" if is_float(found) else ": integer and quantised weights cannot take an adapter"
    raise BaseMismatch(f"{what}: the adapter is for {expected}, {base} has {found}{hint}")


def check_strength(what: str, alpha: float, dtype: np.dtype[Any]) -> None:
    """Raise ValueError if a strength is infinite in the dtype in which a weight of ``dtype`` is computed (spec, 4.1)."""
    work = working_dtype(dtype)
    if abs(alpha) > float(np.finfo(work).max):
        with np.errstate(over="ignore"):
            if not np.isfinite(work.type(alpha)):
                raise ValueError(f"{what}: the strength {alpha:g} is infinite in {work}, in which it is applied")


def check_values(what: str, expected: str | None, found: str, base: str = "the base") -> None:
    """Raise BaseMismatch if the digest of the weight's values at the entries differs; ``expected`` None: any fit."""
    if expected is not None and found != expected:
        raise BaseMismatch(f"{what}: {base} holds other values at the adapter's entries (digest differs)")


def check_dense(what: str, expected: str | None, found: str | None, base: str = "the base") -> None:
    """Raise BaseMismatch if the digest of the whole tensor differs; ``found`` None: it has another shape or dtype."""
    if expected is not None and found != expected:
        raise BaseMismatch(f"{what}: {base} holds another tensor (digest differs)")
