"""The weights that can be masked, of a checkpoint or of a live model, read piece by piece."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, as_array
from shira_format._core.dtypes import is_float
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.checkpoints.quantised import refuse_quantised
from shira_format.errors import SourceError
from shira_format.names.filters import name_filter
from shira_format.tensors import matrix_shape, numel

_WEIGHT = re.compile(r"(.*\.)?weight")
_EXPERTS = re.compile(r"(.*\.)?experts\.\w+")  # a parameter of the experts themselves, with one matrix for each

Source = str | os.PathLike[str] | Checkpoint


@dataclass(frozen=True)
class Weight:
    """One weight.

    Attributes:
        name: in the checkpoint or model.
        shape: its shape, of two dimensions or more.
        dtype: its dtype, a float.
        part: ``part(start, stop)``: elements ``start`` to ``stop`` of the flat tensor, ``[stop - start]`` in ``dtype``.
        stacked: whether it is a stack of matrices along dimension 0, as the experts of a mixture are.
        inputs_first: whether a row is an input and a column an output, as in transformers' ``Conv1D``; None: a checkpoint has
            layers of both kinds, and the weight is square.
        parameter: of a live model, else None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    part: Callable[[int, int], Array]
    stacked: bool = False
    inputs_first: bool | None = False
    parameter: Any = field(default=None, compare=False, repr=False)

    @property
    def size(self) -> int:
        """The number of elements."""
        return numel(self.shape)

    @property
    def matrices(self) -> tuple[int, int, int]:
        """How many matrices there are, and the rows and columns of each: all of a convolution's kernel is one row."""
        if self.stacked:
            return self.shape[0], self.shape[1], numel(self.shape[2:])
        return 1, *matrix_shape(self.shape)

    def lora_size(self, rank: int) -> int:
        """The parameters of a LoRA of this rank: ``rank (m + n)`` for each matrix of ``m`` rows and ``n`` columns."""
        count, rows, columns = self.matrices
        return count * rank * (rows + columns)


def weights_of(source: Any, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Weight]:
    """The weights of a model that can be masked and that the regexes choose.

    These are, of a live model, the weights of its ``Linear``, ``Conv*``, ``Embedding`` and transformers' ``Conv1D`` layers, and
    the 3-D parameters of experts; of a checkpoint, the float tensors of two dimensions or more that are named ``weight``, and
    those of experts. A tensor that two layers share is taken once.

    Args:
        source: a checkpoint (a path, or an open one) or a torch module.
        include: regexes; a weight is taken only if one of them is found in its name.
        exclude: regexes; a weight is left out if one of them is found in its name.

    Raises:
        SourceError: none is left, one is quantised, or not a regular expression.
        OSError: the checkpoint cannot be read.
    """
    wanted = name_filter(include, exclude)
    if hasattr(source, "named_modules"):
        found = [weight for weight in weights_of_model(source) if wanted(weight.name)]
        for weight in found:
            if not is_float(weight.dtype):
                raise SourceError(
                    f"tensor {weight.name!r}: is {weight.dtype}, a quantised weight, which cannot be masked"
                )
    else:
        checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
        found = [weight for weight in _of_checkpoint(checkpoint) if wanted(weight.name)]
        refuse_quantised(checkpoint, (weight.name for weight in found))
    if not found:
        raise SourceError("no weight of two dimensions or more is left by include and exclude")
    return found


def _of_checkpoint(checkpoint: Checkpoint) -> list[Weight]:
    found, kinds = [], _kinds(checkpoint)
    for name in checkpoint:
        shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
        stacked = len(shape) == 3 and _EXPERTS.fullmatch(name) is not None
        if not is_float(dtype) or len(shape) < 2 or not (stacked or _WEIGHT.fullmatch(name)):
            continue

        def part(start: int, stop: int, name: str = name) -> Array:
            return checkpoint.part(name, start, stop)

        found.append(Weight(name, shape, dtype, part, stacked, kinds.get(name, False)))
    return found


def _kinds(checkpoint: Checkpoint) -> dict[str, bool | None]:
    """Of each matrix with a bias, whether its inputs come first, by the size of the bias; a square one is like the others.

    A layer without a bias is never transformers' ``Conv1D``.
    """
    found: dict[str, bool | None] = {}
    square = []
    for name in checkpoint:
        bias = f"{name.removesuffix('weight')}bias"
        if not _WEIGHT.fullmatch(name) or bias not in checkpoint or len(shape := checkpoint.shape(name)) != 2:
            continue
        if shape[0] == shape[1]:
            square.append(name)
        else:
            found[name] = checkpoint.shape(bias) == shape[1:]
    seen = set(found.values())
    return found | dict.fromkeys(square, None if len(seen) == 2 else seen == {True})


def weights_of_model(model: Any) -> list[Weight]:
    """All weights of a torch module that can be masked; see :func:`weights_of`."""
    from shira_format.calibration.layers import can_watch

    found: dict[int, Weight] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            stacked = parameter.ndim == 3 and _EXPERTS.fullmatch(name) is not None
            if stacked or (can_watch(module) and parameter is module.weight):
                inputs_first = type(module).__name__ == "Conv1D"
                found.setdefault(
                    id(parameter), _of_parameter(name, parameter, stacked=stacked, inputs_first=inputs_first)
                )
    return list(found.values())


def weight_of_layer(name: str, layer: Any) -> Weight:
    """The weight of one torch layer, under a name."""
    return _of_parameter(name, layer.weight, inputs_first=type(layer).__name__ == "Conv1D")


def _of_parameter(name: str, parameter: Any, *, stacked: bool = False, inputs_first: bool = False) -> Weight:
    flat = parameter.detach().reshape(-1)

    def part(start: int, stop: int) -> Array:
        return as_array(flat[start:stop])

    return Weight(
        name, tuple(parameter.shape), as_array(flat[:0]).dtype, part,
        stacked=stacked, inputs_first=inputs_first, parameter=parameter,
    )  # fmt: skip
