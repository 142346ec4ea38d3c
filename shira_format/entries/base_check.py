"""Tensors of adapters beside the base that they were made for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shira_format._core.arrays import array_digest
from shira_format._core.dtypes import is_float
from shira_format.errors import BaseMismatch
from shira_format.tensors import DenseTensor, SparseTensor

if TYPE_CHECKING:
    from shira_format.checkpoints import Checkpoint  # with all layouts, which self-contained files do not need


def with_base(tensor: SparseTensor, base: Checkpoint) -> SparseTensor:
    """``tensor``, checked against ``base``, and with its values at the entries if these are targets; a mask as it is.

    Raises:
        BaseMismatch: ``base`` lacks the weight, or has another shape, dtype or other values at the entries.
    """
    if tensor.value_kind == "none":
        return tensor
    where = f"tensor {tensor.name!r}"
    if tensor.base_name not in base:
        raise BaseMismatch(f"{where}: the base {base.path} has no {tensor.base_name!r}")
    if (shape := base.shape(tensor.base_name)) != tensor.shape:
        raise BaseMismatch(f"{where}: the adapter is for shape {list(tensor.shape)}, the weight has {list(shape)}")
    dtype = base.dtype(tensor.base_name)
    if tensor.value_kind == "delta" and tensor.base_digest is None:
        if not is_float(dtype):
            raise BaseMismatch(f"{where}: cannot add deltas to a weight of {dtype}")
        return tensor
    if dtype != tensor.dtype:
        raise BaseMismatch(f"{where}: the adapter is for {tensor.dtype}, the weight has {dtype}")
    found = base.at(tensor.base_name, tensor.indices)
    if tensor.base_digest is not None and array_digest(found) != tensor.base_digest:
        raise BaseMismatch(f"{where}: the base holds other values at the adapter's entries (digest differs)")
    if tensor.value_kind == "delta" or tensor.base is not None:
        return tensor
    return SparseTensor(
        tensor.name, tensor.shape, tensor.indices, tensor.values, dtype=tensor.dtype, base=found,
        base_name=tensor.base_name, rows=tensor.rows, new_rows=tensor.new_rows, result_digest=tensor.result_digest,
    )  # fmt: skip


def dense_with_base(tensor: DenseTensor, base: Checkpoint) -> DenseTensor:
    """``tensor``, checked against ``base``, and with the base's tensor if it says that there is one.

    Raises:
        BaseMismatch: ``base`` lacks it, or holds another tensor.
    """
    if tensor.base is not None or tensor.base_digest is None:
        return tensor
    if tensor.name not in base:
        raise BaseMismatch(f"tensor {tensor.name!r}: the base {base.path} has no such tensor")
    found = base[tensor.name]
    tensor.check_base(found)
    return DenseTensor(tensor.name, tensor.values, base=found)
