"""HRA (arXiv 2405.17484): the inputs of a layer pass Householder reflections, ``W' = W (I - 2 u_1 u_1^T) (I - 2 u_2 u_2^T) ...``.

The rules are those of ``peft.tuners.hra``: ``hra_u`` is ``[in, r]``, whose columns are brought to norm 1; under ``apply_GS`` they are
made orthogonal first. Of a convolution, inputs and kernel together are reflected.
"""

from __future__ import annotations

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.lora.from_base import RowChange, joint_dtype
from shira_format.lora.peft.tuners.common import Effect, Tuner, TunerLayer
from shira_format.lora.products import common_dtype
from shira_format.tensors import numel


def _effect(layer: TunerLayer) -> Effect:
    raw = layer.part("hra_u", 2)
    columns = numel(layer.shape[1:])
    if len(layer.shape) < 2 or raw.shape[0] != columns:
        raise layer.misfit(f"{raw.shape[0]} inputs")
    directions = _directions(raw, layer)
    dtype = joint_dtype(layer.base, layer.name, common_dtype(raw))
    first, second = directions.astype(dtype), (_inner(directions) @ directions.T).astype(dtype)

    def change(rows: Array, _: int, out: Array) -> None:
        np.matmul(rows @ first, second, out=out)

    return Effect(RowChange(layer.name, layer.shape, layer.base, columns, dtype, change))


def _inner(directions: Array) -> Array:
    """``-T``, ``[r, r]``, for which the product of the reflections is ``I - U T U^T`` (compact WY, SIAM J. Sci. Stat. Comput. 10:1)."""
    rank = directions.shape[1]
    found = np.zeros((rank, rank))
    for i in range(rank):
        found[i, i] = -2
        found[:i, i] = -2 * found[:i, :i] @ (directions[:, :i].T @ directions[:, i])
    return found


def _directions(raw: Array, layer: TunerLayer) -> Array:
    """Columns of norm 1, in float64."""
    found = raw.astype(np.float64)
    orthogonal = layer.options.flag("apply_GS")
    for i in range(found.shape[1]):
        if orthogonal:
            for j in range(i):
                found[:, i] -= (found[:, j] @ found[:, i]) * found[:, j]
        norm = np.linalg.norm(found[:, i])
        if not norm > 0:
            raise SourceError(f"{layer.where}: column {i} of hra_u has the norm 0, and is no direction")
        found[:, i] /= norm
    return found


TUNER = Tuner(
    parts=("hra_u",), effect=_effect, options=frozenset(("apply_GS",)), harmless=frozenset(("init_weights", "r"))
)
