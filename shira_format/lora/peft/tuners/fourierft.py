"""FourierFT (arXiv 2405.03003): ``delta W`` is the real part of the inverse Fourier transform of a few coefficients.

The rules are those of ``peft.tuners.fourierft``. Where the coefficients are is not in the file: it follows from
``random_loc_seed`` through ``torch.randperm`` on the CPU, which is why this tuner needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.optional import optional_import
from shira_format.errors import SourceError
from shira_format.lora.files import is_rank
from shira_format.lora.peft.tuners.common import Effect, Tuner, TunerLayer
from shira_format.lora.products import common_dtype


@dataclass(frozen=True)
class Spectrum:
    """``Re ifft2(S)`` of a matrix ``S`` that has few elements other than 0.

    Attributes:
        name, shape: of the weight, ``[rows, columns]``.
        rows, columns_of: int64 ``[n]``: where the elements are, in the order of columns.
        values: ``[n]`` in float64, scaled.
        dtype: float32 or float64.
    """

    name: str
    shape: tuple[int, ...]
    rows: Array
    columns_of: Array
    values: Array
    dtype: np.dtype[Any]

    @property
    def columns(self) -> int:
        return int(self.shape[1])

    def tile(self, start: int, stop: int, out: Array) -> None:
        height, width = self.shape
        starts = np.flatnonzero(np.diff(self.columns_of, prepend=-1))
        for row in range(start, stop):
            # The sum over rows of S, at this row of the result; exponents are exact integers modulo the height.
            phases = self.rows * row % height
            terms = self.values * np.exp(2j * np.pi / height * phases) / height
            line = np.zeros(width, np.complex128)
            line[self.columns_of[starts]] = np.add.reduceat(terms, starts)
            out[row - start] = np.fft.ifft(line).real


def _effect(layer: TunerLayer) -> Effect:
    spectrum = layer.part("fourierft_spectrum", 1)
    if len(layer.shape) != 2:
        raise layer.misfit("a linear layer")
    count = _count(layer)
    if spectrum.size != count or not 0 < count <= layer.shape[0] * layer.shape[1]:
        raise SourceError(f"{layer.where} should have {count} coefficients by {layer.options.path.name}, and has {spectrum.size}")  # fmt: skip
    rows, columns = layer.shape
    # The layer's kind is not in the file: a weight that is not square could be stored either way.
    turned = layer.options.flag("fan_in_fan_out")
    if turned != layer.turned:
        raise SourceError(
            f"{layer.where}: fan_in_fan_out is {turned}, and the base's weights contradict that (Conv1D or Linear): how this one is "
            "stored is unknown"
        )
    outputs, inputs = (columns, rows) if turned else (rows, columns)
    at = _places(outputs * inputs, count, layer)
    first, second = np.divmod(at, inputs)
    if turned:  # the transform of the transposed matrix is the transposed transform
        first, second = second, first
    order = np.argsort(second, kind="stable")
    values = spectrum.astype(np.float64) * layer.options.number("scaling")
    return Effect(
        Spectrum(layer.name, layer.shape, first[order], second[order], values[order], common_dtype(spectrum))
    )


def _count(layer: TunerLayer) -> int:
    """As PEFT decides: here a pattern matches only after a dot."""
    patterns = layer.options["n_frequency_pattern"] or {}
    if not isinstance(patterns, dict) or not all(map(is_rank, patterns.values())):
        raise SourceError(f"{layer.options.path}: n_frequency_pattern must map module names to positive integers")
    found = layer.options.by_pattern("n_frequency_pattern", layer.module, -1, after_dot=True)
    return layer.options.size("n_frequency") if found < 0 else round(found)


def _places(size: int, count: int, layer: TunerLayer) -> Array:
    seed = layer.options["random_loc_seed"]
    if type(seed) is not int or not -(1 << 63) <= seed < 1 << 64:
        raise SourceError(f"{layer.options.path}: random_loc_seed must be an integer of 64 bits, not {seed!r}")
    with optional_import("reading FourierFT needs torch", "torch"):
        import torch
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(torch.randperm(size, generator=generator)[:count].numpy())


TUNER = Tuner(
    parts=("fourierft_spectrum",),
    effect=_effect,
    options=frozenset(("n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed")),
)
