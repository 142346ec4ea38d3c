"""C3A (arXiv 2407.19342): ``delta W`` in circulant blocks, ``delta W[m b + t, n b + s] = kernel[m, n, (s - t) mod b] / in``.

The rules are those of ``peft.tuners.c3a``: forward pass and merge both divide by the number of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format.lora.peft.tuners.common import Effect, Tuner, TunerLayer
from shira_format.lora.products import common_dtype


@dataclass(frozen=True)
class Circulant:
    """A matrix of circulant blocks.

    Attributes:
        name, shape: of the weight, ``[rows, columns]``.
        kernels: ``[rows / b, columns / b, b]``: the first row of each block.
    """

    name: str
    shape: tuple[int, ...]
    kernels: Array

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.kernels.dtype

    @property
    def columns(self) -> int:
        return int(self.shape[1])

    def tile(self, start: int, stop: int, out: Array) -> None:
        size = self.kernels.shape[2]
        for row in range(start, stop):
            block, shift = divmod(row, size)
            view = out[row - start].reshape(-1, size)
            view[:, shift:] = self.kernels[block, :, : size - shift]
            view[:, :shift] = self.kernels[block, :, size - shift :]


def _effect(layer: TunerLayer) -> Effect:
    kernel = layer.part("c3a_kernel", 3)
    made = (kernel.shape[0] * kernel.shape[2], kernel.shape[1] * kernel.shape[2])
    if made != layer.shape:
        raise layer.misfit(f"a weight of shape {list(made)}")
    values = (kernel.astype(np.float64) / layer.shape[1]).astype(common_dtype(kernel))
    return Effect(Circulant(layer.name, layer.shape, values))


TUNER = Tuner(
    parts=("c3a_kernel",), effect=_effect, harmless=frozenset(("init_weights", "block_size", "block_size_pattern"))
)
