"""BOFT (arXiv 2311.06243): the inputs of a layer are rotated by butterfly factors, and its outputs scaled: ``W' = s * (W B^T)``.

The rules are those of ``peft.tuners.boft``: ``boft_R`` is ``[m, blocks, b, b]``; ``B`` is the product of ``m`` factors
``P D P^T``, the last one leftmost, where ``D`` has the rotations ``(I - Q) (I + Q)^-1`` of ``Q = (R - R^T) / 2`` as blocks and ``P``
permutes inputs. Of a convolution, inputs and kernel together are rotated. ``boft_s`` has a number for each output; the bias is not
scaled.
"""

from __future__ import annotations

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.lora.cayley import cayley
from shira_format.lora.from_base import RowChange, joint_dtype
from shira_format.lora.peft.tuners.common import Effect, Tuner, TunerLayer
from shira_format.lora.products import common_dtype
from shira_format.tensors import numel


def _effect(layer: TunerLayer) -> Effect:
    free, scale = layer.part("boft_R", 4), layer.part("boft_s", 2)
    steps, count, size, other = free.shape
    columns = numel(layer.shape[1:])
    if size != other or not free.size or len(layer.shape) < 2 or count * size != columns:
        raise layer.misfit(f"{count} blocks of shape {[size, other]} of inputs")
    if scale.size != layer.shape[0] or max(scale.shape) != scale.size:
        raise SourceError(f"{layer.where}: boft_s has shape {list(scale.shape)}, not one number for each of {layer.shape[0]} outputs")  # fmt: skip
    if steps > 1 and (size % 2 or count % (1 << (steps - 1))):
        raise SourceError(
            f"{layer.where}: {steps} butterfly factors need blocks of an even size, and 2^{steps - 1} of them or a multiple; "
            f"there are {count} of {size}"
        )
    wide = free.astype(np.float64)
    dtype = joint_dtype(layer.base, layer.name, common_dtype(free, scale))
    rotated = cayley((wide.swapaxes(-1, -2) - wide) / 2).swapaxes(-1, -2).astype(dtype)  # D^T - I
    orders = [_order(columns, size, step) for step in range(steps)]
    backs = [np.argsort(order) for order in orders]
    factors = scale.reshape(-1).astype(dtype)

    def change(rows: Array, start: int, out: Array) -> None:
        out[...] = 0
        for blocks, order, back in zip(rotated, orders, backs, strict=True):
            mixed = (rows + out)[:, back].reshape(len(rows), count, size).transpose(1, 0, 2) @ blocks
            out += mixed.transpose(1, 0, 2).reshape(out.shape)[:, order]
        scaling = factors[start : start + len(rows), None]
        out *= scaling
        out += rows * (scaling - 1)

    return Effect(RowChange(layer.name, layer.shape, layer.base, columns, dtype, change))


def _order(columns: int, size: int, step: int) -> Array:
    """The permutation of ``block_butterfly_perm``: in groups of ``2^step`` blocks, even half blocks first, then odd ones."""
    if not step:
        return np.arange(columns)
    halves = np.arange(columns).reshape(-1, 1 << step, 2, size // 2)
    return np.asarray(halves.swapaxes(1, 2).reshape(-1))


TUNER = Tuner(
    parts=("boft_R", "boft_s"),
    effect=_effect,
    harmless=frozenset(
        ("init_weights", "boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout")
    ),
)
