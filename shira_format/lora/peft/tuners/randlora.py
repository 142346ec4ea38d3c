"""RandLoRA (arXiv 2502.00987): ``delta W`` of full rank, from random bases that all layers share, scaled anew in each.

The rules are those of ``peft.tuners.randlora``. With ``m`` the smaller and ``M`` the larger dimension of the weight and
``n = ceil(m / r)``: ``P = B' @ A'``, where ``A'`` is ``lambda[i, k] * A[i, 0] * gamma[k]`` as ``[r n, m]``, and ``B'`` the first ``M``
rows and ``n`` bases of ``B``, ``[M, n, r]``, as ``[M, n r]``. ``delta W`` is ``alpha / r * P``, or its transpose for a wide weight. The
bases must be in the file (``save_projection``, the default).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.lora.peft.tuners.common import Effect, Tuner, TunerLayer
from shira_format.lora.products import common_dtype

_TILE = 1 << 20  # elements of a factor at a time


@dataclass(frozen=True)
class RandomBases:
    """``P``, or its transpose, in tiles: neither ``A'`` nor ``B'`` is held in memory.

    Attributes:
        name, shape: of the weight, ``[rows, columns]``.
        a: ``[r, m]``.
        b: ``[M, n, r]``: a view of what all layers share.
        by_rank: ``[r, n]``, scaled.
        by_base: ``[n, m]``.
        turned: whether it is the transpose.
        dtype: float32 or float64.
    """

    name: str
    shape: tuple[int, ...]
    a: Array
    b: Array
    by_rank: Array
    by_base: Array
    turned: bool
    dtype: np.dtype[Any]

    @property
    def columns(self) -> int:
        return int(self.shape[1])

    def tile(self, start: int, stop: int, out: Array) -> None:
        if self.turned:
            self._transposed(start, stop, out)
            return
        flat = self._flat(start, stop)
        count = len(self.by_base)
        out[...] = 0
        for i, row in enumerate(self.a):
            scaled = (self.by_rank[i, :, None] * row * self.by_base).astype(self.dtype)
            out += flat[:, i * count : (i + 1) * count] @ scaled

    def _transposed(self, start: int, stop: int, out: Array) -> None:
        scaled = self.by_rank[:, :, None] * self.a[:, None, start:stop] * self.by_base[None, :, start:stop]
        left = np.ascontiguousarray(scaled.reshape(-1, stop - start).T.astype(self.dtype))
        step = max(1, _TILE // left.shape[1])
        for first in range(0, self.columns, step):
            last = min(first + step, self.columns)
            out[:, first:last] = left @ self._flat(first, last).T

    def _flat(self, start: int, stop: int) -> Array:
        """Rows of ``B'``."""
        return self.b[start:stop].reshape(stop - start, -1).astype(self.dtype)


def _effect(layer: TunerLayer) -> Effect:
    if not {"randlora_A", "randlora_B"} <= layer.shared.keys():
        raise SourceError(
            f"{layer.where}: the random bases randlora_A and randlora_B are not in the file (save_projection is false): load it with "
            "PEFT where it was trained, set save_projection, and save it again"
        )
    a, b = layer.shared["randlora_A"], layer.shared["randlora_B"]
    by_rank, by_base = layer.part("randlora_lambda", 2), layer.part("randlora_gamma", 2)
    if len(layer.shape) != 2:
        raise layer.misfit("a linear layer")
    small, large = sorted(layer.shape)
    rank = layer.options.size("r")
    count = -(-small // rank)
    if (by_rank.shape, by_base.shape) != ((rank, count), (count, small)):
        raise layer.misfit(f"{list(by_rank.shape)} and {list(by_base.shape)} bases of rank {rank}")
    if (
        a.ndim != 3 or b.ndim != 3 or a.shape[:2] != (rank, 1) or a.shape[2] < small
        or b.shape[0] < large or b.shape[1] < count or b.shape[2] != rank
    ):  # fmt: skip
        raise SourceError(f"{layer.where}: randlora_A of shape {list(a.shape)} and randlora_B of {list(b.shape)} do not fit a weight of shape {list(layer.shape)}")  # fmt: skip
    rows, columns = layer.shape
    # Only of a square weight does the file not show whether it is stored as [in, out].
    turned = columns > rows if rows != columns else layer.is_transposed(rows, columns)
    scale = layer.options.number("randlora_alpha") / rank
    return Effect(
        RandomBases(
            layer.name, layer.shape, a[:, 0, :small].astype(np.float64), b[:large, :count],
            by_rank.astype(np.float64) * scale, by_base.astype(np.float64), turned, common_dtype(a, b, by_rank, by_base),
        )
    )  # fmt: skip


TUNER = Tuner(
    parts=("randlora_lambda", "randlora_gamma"),
    effect=_effect,
    options=frozenset(("r", "randlora_alpha", "projection_prng_key", "save_projection")),
    harmless=frozenset(("init_weights", "randlora_dropout", "sparse", "very_sparse")),
    shared=("randlora_A", "randlora_B"),
)
