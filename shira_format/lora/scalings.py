"""(IA)^3 (arXiv 2205.05638): each output or each input of a weight is multiplied by a number.

The rules are those of ``lycoris/modules/ia3.py``: ``W' = W * (1 + w)``, by output or, with ``on_input``, by input. Where
LyCORIS contradicts itself, the trained model counts: ``make_module_from_state_dict`` (4.1) forgets ``on_input``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.base import Update
from shira_format.lora.from_base import RowChange, joint_dtype
from shira_format.lora.products import common_dtype
from shira_format.tensors import numel

IA3_PARTS = frozenset(("weight", "on_input"))


def ia3(parts: Mapping[str, Array], name: str, shape: tuple[int, ...], base: Checkpoint, where: str) -> Update:
    """LyCORIS' (IA)^3 of one module.

    Args:
        parts: ``weight``, ``[n]`` or ``[1, n, 1, ...]``, and ``on_input``, one number: 1 if the inputs are scaled, 0 if not.
        name: of the weight in the base.
        shape: of the weight, ``[out, in, *kernel]``.
        base: the checkpoint that has it.
        where: file and module, for messages.

    Raises:
        SourceError: a part is missing or unknown, or does not fit the weight.
    """
    if parts.keys() != IA3_PARTS:
        raise SourceError(
            f"{where}: (IA)^3 needs the parts 'weight' and 'on_input', it has {', '.join(map(repr, sorted(parts)))}"
        )
    flag = parts["on_input"]
    if flag.size != 1 or float(flag.reshape(())) not in (0, 1):
        raise SourceError(f"{where}: on_input must be 0 or 1, whether inputs are scaled")
    weight, by_input = parts["weight"], bool(flag.reshape(()))
    return scaled(weight.reshape(-1).astype(common_dtype(weight)), name, shape, base, where, by_input=by_input)


def scaled(
    change: Array, name: str, shape: tuple[int, ...], base: Checkpoint, where: str, *, by_input: bool
) -> Update:
    """``W * change``, where ``change``, ``[n]`` in float32 or float64, is one number for each output or each input.

    Args:
        change: the factors less 1.
        name: of the weight in the base.
        shape: of the weight: outputs first, then inputs, then a kernel.
        base: the checkpoint that has it.
        where: file and module, for messages.
        by_input: whether the numbers belong to the second dimension, not to the first.

    Raises:
        SourceError: it has another number of elements.
    """
    if len(shape) < 2:
        raise SourceError(f"{where}: scales the base's {name!r}, whose shape is {list(shape)}")
    if change.size != shape[by_input]:
        raise SourceError(
            f"{where}: scales {change.size} {'inputs' if by_input else 'outputs'}, the base's {name!r} of shape "
            f"{list(shape)} has {shape[by_input]}"
        )
    dtype = joint_dtype(base, name, change.dtype)
    factors = change.astype(dtype)
    if by_input:
        repeated = np.repeat(factors, numel(shape[2:]))

    def by_columns(rows: Array, _: int, out: Array) -> None:
        np.multiply(rows, repeated, out=out)

    def by_rows(rows: Array, start: int, out: Array) -> None:
        np.multiply(rows, factors[start : start + len(rows), None], out=out)

    return RowChange(name, shape, base, numel(shape[1:]), dtype, by_columns if by_input else by_rows)
