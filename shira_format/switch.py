"""Applying an adapter to weights in memory, and taking it off again bit for bit (spec, sections 4.1 and 4.2)."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_format.adapter import Adapter
from shira_format.arrays import Array, as_array
from shira_format.errors import BaseMismatch
from shira_format.tensors import SparseTensor, WholeTensor


@dataclass
class Applied:
    """An adapter that lies on weights; :meth:`revert` restores what was there."""

    _undo: list[Callable[[], object]]

    def revert(self) -> None:
        """Restore the bits that were there before; a second call does nothing."""
        while self._undo:
            self._undo.pop()()


def apply(
    adapter: Adapter,
    weights: MutableMapping[str, Any],
    alpha: float | None = None,
    *,
    rename: Callable[[str], str] = lambda name: name,
) -> Applied:
    """Apply ``adapter`` in place to weights held as a dictionary, after everything has been checked.

    Args:
        adapter: the adapter.
        weights: numpy arrays, or torch tensors on the CPU, by name; ``model.state_dict()`` for example. Tensors that
            are new to the base are added.
        alpha: strength; the adapter's own by default.
        rename: from a name in the adapter to one in ``weights``.

    Returns:
        A handle whose ``revert`` takes the adapter off again.

    Raises:
        BaseMismatch: ``weights`` are not the base of this adapter; none was changed.
        FormatError: the adapter's file is damaged; none was changed.

    Example:
        >>> applied = apply(load("adapter.st"), model.state_dict())
        >>> applied.revert()
    """
    alpha = adapter.alpha if alpha is None else alpha
    if not np.isfinite(alpha):
        raise ValueError(f"alpha {alpha} is not a finite number")
    if adapter.removed:
        raise BaseMismatch(f"the adapter removes tensors, {adapter.removed[0]!r} for example: {_PATCH}")
    steps: list[_Step] = []
    for name in adapter:
        array = _weight(weights, rename(name), name)
        steps.append(_sparse_step(adapter[name], array, alpha))
    for name, whole in adapter.whole.items():
        if alpha != 0:
            steps.append(_whole_step(whole, weights, rename(name)))
    applied = Applied([])
    for do, undo in steps:
        do()
        applied._undo.append(undo)  # noqa: SLF001 - its own kind
    return applied


_PATCH = (
    "a patch of whole checkpoints, which live weights cannot take (shira_to_full writes the patched checkpoint)"
)
_Step = tuple[Callable[[], object], Callable[[], object]]


def _weight(weights: MutableMapping[str, Any], key: str, name: str) -> Array:
    if key not in weights:
        raise BaseMismatch(f"tensor {name!r}: the weights have no {key!r}")
    weight = weights[key]
    if getattr(getattr(weight, "device", None), "type", "cpu") != "cpu":
        raise BaseMismatch(f"tensor {name!r}: the weight is on {weight.device}, not on the CPU")
    array = as_array(weight)
    if not array.flags.writeable:
        raise BaseMismatch(f"tensor {name!r}: the weight is read-only")
    return array


def _sparse_step(tensor: SparseTensor, array: Array, alpha: float) -> _Step:
    if tensor.meaning == "none":
        raise BaseMismatch(f"tensor {tensor.name!r} is a mask: there is nothing to apply")
    if tensor.is_patch:
        raise BaseMismatch(f"tensor {tensor.name!r}: the adapter renames or resizes it: {_PATCH}")
    before = tensor.checked_base(array)
    after = tensor.applied(before, alpha)
    indices = tensor.indices

    def put(values: Array) -> None:
        array.flat[indices] = values  # .flat reaches the memory of views that are not contiguous, too

    return (lambda: put(after)), (lambda: put(before))


def _whole_step(whole: WholeTensor, weights: MutableMapping[str, Any], key: str) -> _Step:
    if key not in weights and whole.base_digest is None:
        return (lambda: weights.__setitem__(key, whole.values.copy())), (lambda: weights.pop(key))
    array = _weight(weights, key, whole.name)
    if array.shape != whole.values.shape:
        raise BaseMismatch(
            f"tensor {whole.name!r}: the adapter's has shape {list(whole.values.shape)}, the weight {list(array.shape)}"
        )
    whole.check_base(array)
    before, after = array.copy(), whole.values.astype(array.dtype)

    def put(values: Array) -> None:
        array[...] = values

    return (lambda: put(after)), (lambda: put(before))
