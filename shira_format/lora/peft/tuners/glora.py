"""PEFT's GLoRA (arXiv 2306.07967): ``W' = W + W * A + B``, elementwise, and ``b' = b + b * D + E + W C``.

The rules are those of ``peft.tuners.glora``, which differ from LyCORIS': each of ``A`` to ``E`` is a product ``Xd @ Xu``, a vector, one
number, or nothing; ``C`` to ``E`` only matter if the layer has a bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.lora.from_base import RowChange, joint_dtype, read_rows
from shira_format.lora.peft.tuners.common import Effect, Tuner, TunerLayer
from shira_format.lora.products import common_dtype

_PATHS = ("glora_A", "glora_B", "glora_C", "glora_D", "glora_E")
_KINDS = ("Xd", "Xu", "X", "zeros")
_ROWS = 256  # of the base at a time


@dataclass(frozen=True)
class _Path:
    """A matrix ``[rows, columns]`` as ``up @ down``, in float64; a vector or a number has a row of ones as ``down``."""

    up: Array
    down: Array

    def rows(self, start: int, stop: int) -> Array:
        return np.asarray(self.up[start:stop] @ self.down)


def _effect(layer: TunerLayer) -> Effect:
    if len(layer.shape) != 2:
        raise layer.misfit("a linear layer")
    outputs, inputs = layer.shape
    a, b = (_path(layer, name, outputs, inputs) for name in _PATHS[:2])
    dtype = joint_dtype(layer.base, layer.name, common_dtype(*layer.parts.values()))
    factors = [array.astype(dtype) for path in (a, b) for array in (path.up, path.down)]

    def change(rows: Array, start: int, out: Array) -> None:
        stop = start + len(rows)
        np.matmul(factors[0][start:stop], factors[1], out=out)
        out *= rows
        out += factors[2][start:stop] @ factors[3]

    return Effect(RowChange(layer.name, layer.shape, layer.base, inputs, dtype, change), bias=_bias(layer))


def _path(layer: TunerLayer, name: str, rows: int, columns: int) -> _Path:
    found = {kind: layer.parts[f"{name}.{kind}"] for kind in _KINDS if f"{name}.{kind}" in layer.parts}
    if found.keys() <= {"zeros"}:
        if any(array.any() for array in found.values()):
            raise SourceError(f"{layer.where}: {name}.zeros is not 0")
        return _Path(np.zeros((rows, 0)), np.zeros((0, columns)))
    if found.keys() == {"Xd", "Xu"}:
        up, down = found["Xd"], found["Xu"]
        if up.ndim == down.ndim == 2 and (up.shape[0], up.shape[1], down.shape[1]) == (
            rows,
            down.shape[0],
            columns,
        ):
            return _Path(up.astype(np.float64), down.astype(np.float64))
    elif found.keys() == {"X"} and found["X"].size in (1, rows):
        up = np.broadcast_to(found["X"].astype(np.float64).reshape(-1, 1), (rows, 1))
        return _Path(up, np.ones((1, columns)))
    shapes = ", ".join(f"{kind} {list(array.shape)}" for kind, array in found.items())
    raise SourceError(f"{layer.where}: {name} ({shapes}) does not fit {rows} x {columns} numbers")


def _bias(layer: TunerLayer) -> Array | None:
    if layer.bias not in layer.base:
        return None
    outputs, inputs = layer.shape
    bias = layer.base[layer.bias].astype(np.float64)
    if bias.shape != (outputs,):
        raise SourceError(
            f"{layer.where}: the base's {layer.bias!r} has shape {list(bias.shape)}, not {[outputs]}"
        )
    c, d, e = (_path(layer, name, rows, 1).rows(0, rows)[:, 0] for name, rows in zip(_PATHS[2:], (inputs, outputs, outputs), strict=True))  # fmt: skip
    found = bias * d + e
    if c.any():
        for start in range(0, outputs, _ROWS):
            stop = min(start + _ROWS, outputs)
            found[start:stop] += read_rows(layer.base, layer.name, inputs, start, stop, np.dtype(np.float64)) @ c
    return np.asarray(found)


TUNER = Tuner(
    parts=tuple(f"{path}.{kind}" for path in _PATHS for kind in _KINDS),
    effect=_effect,
    harmless=frozenset(("init_weights", "r", "config_A_B", "config_C", "config_D_E")),
)
