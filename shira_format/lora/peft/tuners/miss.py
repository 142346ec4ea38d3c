"""MiSS (arXiv 2409.15371; once called Bone): blocks of a weight's inputs share one small matrix.

The rules are those of ``peft.tuners.miss``. ``miss_block`` is ``[r, out]`` and is added, transposed, to every ``r`` columns, to those
that are left over in part; with ``init_weights`` "mini" it is ``[r, mini_r]`` and repeats over the outputs; with "bat" it is
``[out / r, r, r]``, and each ``r x r`` block ``V`` of the weight changes by ``V M + M``.
"""

from __future__ import annotations

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.lora.from_base import RowChange, joint_dtype
from shira_format.lora.peft.tuners.common import Effect, Options, Tuner, TunerLayer
from shira_format.lora.products import LowRank, common_dtype


def _check(options: Options) -> None:
    if options["init_weights"] not in (None, True, False, "bat", "mini"):
        raise SourceError(f"{options.path}: init_weights={options['init_weights']!r} is unknown for MiSS")


def _effect(layer: TunerLayer) -> Effect:
    if len(layer.shape) != 2:
        raise layer.misfit("a linear layer")
    if layer.options["init_weights"] == "bat":
        return Effect(_bat(layer))
    outputs, inputs = layer.shape
    block = layer.part("miss_block", 2)
    dtype = common_dtype(block)
    if layer.options["init_weights"] == "mini":
        mini = layer.options.size("mini_r")
        if block.shape[1] != mini or outputs % mini:
            raise layer.misfit(f"outputs in groups of {block.shape[1]} (mini_r {mini})")
        block = np.tile(block, (1, outputs // mini))
    rank = block.shape[0]
    if block.shape[1] != outputs or not 0 < rank <= inputs or rank != layer.options.size("r"):
        raise layer.misfit(f"{block.shape[1]} outputs in blocks of {rank} inputs (r {layer.options['r']})")
    repeats = np.zeros((rank, inputs), dtype)
    repeats[np.arange(inputs) % rank, np.arange(inputs)] = 1
    return Effect(LowRank(layer.name, layer.shape, np.ascontiguousarray(block.T.astype(dtype)), repeats))


def _bat(layer: TunerLayer) -> RowChange:
    block = layer.part("miss_block", 3)
    outputs, inputs = layer.shape
    count, rank, other = block.shape
    if rank != other or not rank or count * rank != outputs or inputs % rank:
        raise layer.misfit(f"{count * rank} outputs in blocks of {rank} x {other}")
    dtype = joint_dtype(layer.base, layer.name, common_dtype(block))
    matrices = block.astype(dtype)

    def change(rows: Array, start: int, out: Array) -> None:
        stop = start + len(rows)
        for number in range(start // rank, -(-stop // rank)):
            low, high = max(start, number * rank), min(stop, (number + 1) * rank)
            part = slice(low - start, high - start)
            blocks = rows[part].reshape(high - low, -1, rank)
            added = matrices[number, low - number * rank : high - number * rank, None, :]
            out[part] = (blocks @ matrices[number] + added).reshape(high - low, -1)

    return RowChange(layer.name, layer.shape, layer.base, inputs, dtype, change)


TUNER = Tuner(
    parts=("miss_block",),
    effect=_effect,
    options=frozenset(("r", "mini_r", "init_weights")),
    harmless=frozenset(("miss_dropout",)),
    check=_check,
)
