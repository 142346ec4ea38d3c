"""LyCORIS' GLoRA (arXiv 2306.07967): ``delta W = s * (W @ a1 @ a2 + b1 @ b2)`` with ``s = alpha / rank``.

The rules are those of ``lycoris/modules/glora.py``. ``a1`` is ``[in, R]``, ``a2`` ``[R, in]``, ``b1`` ``[out, R]``, ``b2``
``[R, in, *kernel]``; of a convolution the ``a`` act on its inputs. rs_lora (``alpha / sqrt(rank)``) is not in the file, and
LyCORIS reads it back as ``alpha / rank``, too.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.base import Update
from shira_format.lora.from_base import RowChange, joint_dtype
from shira_format.lora.products import common_dtype, low_rank
from shira_format.tensors import numel

A1, A2, B1, B2 = "a1.weight", "a2.weight", "b1.weight", "b2.weight"
GLORA_PARTS = frozenset((A1, A2, B1, B2, "alpha"))


def glora(parts: Mapping[str, Array], name: str, shape: tuple[int, ...], base: Checkpoint, where: str) -> Update:
    """GLoRA of one module.

    Args:
        parts: those of :data:`GLORA_PARTS`; ``alpha`` is the rank if it is 0 or missing.
        name: of the weight in the base.
        shape: of the weight, ``[out, in, *kernel]``.
        base: the checkpoint that has it.
        where: file and module, for messages.

    Raises:
        SourceError: a part is missing or unknown, or the parts fit neither each other nor the weight.
    """
    if strange := parts.keys() - GLORA_PARTS:
        raise SourceError(f"{where}: unmatched key {min(strange)!r}: GLoRA has no such part")
    if missing := GLORA_PARTS - parts.keys() - {"alpha"}:
        raise SourceError(f"{where}: GLoRA without {min(missing)!r}")
    if len(shape) < 2:
        raise SourceError(f"{where}: GLoRA of the base's {name!r}, whose shape is {list(shape)}")
    a1, a2, b2 = parts[A1], parts[A2], parts[B2]
    rank = a2.shape[0] if a2.ndim > 1 else 0
    if (
        not rank
        or a1.ndim < 2
        or b2.ndim < 2
        or b2.shape[0] != rank
        or (a1.size, a1.shape[:2], a2.size, a2.shape[:2])
        != (shape[1] * rank, (shape[1], rank), shape[1] * rank, (rank, shape[1]))
    ):
        raise SourceError(
            f"{where}: a1 of shape {list(a1.shape)}, a2 of {list(a2.shape)} and b2 of {list(b2.shape)} do not fit each other and "
            f"the base's {name!r} of shape {list(shape)}"
        )
    alpha = parts.get("alpha")
    if alpha is not None and alpha.size != 1:
        raise SourceError(f"{where}: alpha has shape {list(alpha.shape)}, not one number")
    scale = (0.0 if alpha is None else float(alpha.reshape(()).astype(np.float64))) or float(rank)
    scale /= rank
    added = low_rank(name, shape, parts[B1], b2, scale, where)
    dtype = joint_dtype(base, name, np.result_type(added.dtype, common_dtype(a1, a2)))
    first = a1.reshape(shape[1], rank).astype(dtype)
    second = (a2.reshape(rank, shape[1]).astype(np.float64) * scale).astype(dtype)
    kernel = numel(shape[2:])

    def change(rows: Array, start: int, out: Array) -> None:
        np.matmul(added.up[start : start + len(rows)], added.down, out=out)
        # Positions of the kernel before inputs, over which the products run.
        inputs = rows.reshape(len(rows), shape[1], kernel).swapaxes(1, 2)
        out += ((inputs @ first) @ second).swapaxes(1, 2).reshape(out.shape)

    return RowChange(name, shape, base, numel(shape[1:]), dtype, change)
