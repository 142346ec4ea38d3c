"""Merging dense tensors (biases, norms, heads), which adapters replace as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shira_format._core.dtypes import is_float
from shira_format.entries.aligned import AlignedEntries, Contribution
from shira_format.entries.mixing import mix
from shira_format.errors import SourceError
from shira_format.merging.inputs import Input
from shira_format.merging.methods import Method
from shira_format.tensors import DenseTensor, SparseTensor, same_bits


def merge_dense(
    name: str,
    inputs: Sequence[Input],
    strengths: Sequence[float],
    method: Method,
    options: Mapping[str, Any],
    *,
    self_contained: bool,
) -> DenseTensor | None:
    """One dense tensor of the result, or None if no adapter with a strength other than 0 has it.

    A tensor that one adapter alone replaces, or several by the same bits, is replaced at any strength, as on live models.
    Else the method merges all elements, or ``overwrite`` picks one of the tensors.

    Raises:
        SourceError: several adapters have different ones that cannot be merged: the base's is not known, or no floats.
        FormatError, BaseMismatch: see :meth:`Input.dense`.
    """
    found = [
        (one, one.dense(name))
        for one, strength in zip(inputs, strengths, strict=True)
        if strength and name in one.adapter.dense
    ]
    if not found:
        return None
    _, first = found[0]
    if all(same_bits(first.values, whole.values) for _, whole in found[1:]):
        known = next((whole for _, whole in found if whole.base is not None), first)
        return _keep_base(known, self_contained=self_contained)
    if method.copies and method.name == "overwrite":
        return _keep_base(found[0 if options["priority"] == "first" else -1][1], self_contained=self_contained)
    labels = ", ".join(one.label for one, _ in found)
    for one, whole in found:
        if method.copies:
            why = f"the method {method.name!r} merges no dense tensors"
        elif whole.base is None:
            why = "the base's is not known (it is new, or the base was not given)"
        elif not is_float(whole.values.dtype):
            why = f"{whole.values.dtype} is no float dtype"
        else:
            continue
        raise SourceError(
            f"{one.label}: tensor {name!r} is replaced as a whole by several adapters ({labels}), and {why}: leave it out "
            "(--exclude), or use the method 'overwrite'"
        )
    aligned = AlignedEntries.of(
        [_part(name, first, one, strength) for one, strength in zip(inputs, strengths, strict=True)]
    )
    result = mix(aligned, method.factors(aligned, options), self_contained=True)
    assert first.base is not None
    values = np.array(first.base).reshape(-1)
    if result is not None:
        values[result.indices] = result.values
    return _keep_base(
        DenseTensor(name, values.reshape(first.values.shape), base=first.base), self_contained=self_contained
    )


def _part(name: str, first: DenseTensor, one: Input, strength: float) -> Contribution:
    """All elements as entries; none if the adapter does not replace the tensor."""
    shape, dtype = first.values.shape, first.values.dtype
    if name not in one.adapter.dense:
        nothing = np.empty(0, dtype)
        return Contribution(
            SparseTensor(name, shape, np.empty(0, np.int64), nothing, base=nothing), strength, one.label
        )
    whole = one.dense(name)
    if whole.values.shape != shape:
        raise SourceError(
            f"{one.label}: tensor {name!r} has shape {list(whole.values.shape)}, and {list(shape)} in another adapter"
        )
    assert whole.base is not None
    indices = np.arange(whole.values.size, dtype=np.int64)
    tensor = SparseTensor(name, shape, indices, whole.values.reshape(-1), base=whole.base.reshape(-1))
    return Contribution(tensor, strength, one.label)


def _keep_base(tensor: DenseTensor, *, self_contained: bool) -> DenseTensor:
    if tensor.base is None or self_contained:
        return tensor
    return DenseTensor(tensor.name, tensor.values, base_digest=tensor.base_digest)
