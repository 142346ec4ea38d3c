"""Whether an adapter's tensors fit a base checkpoint, and the base's values at their entries.

The properties that must agree, and the messages, are in :mod:`shira_format._core.fits`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from shira_format._core import fits
from shira_format._core.arrays import Array, array_digest
from shira_format.tensors import DenseTensor, SparseTensor

if TYPE_CHECKING:
    from shira_format.checkpoints import Checkpoint  # imports all layouts, which self-contained files do not need


def check_frame(
    what: str, base_name: str, shape: tuple[int, ...], dtype: np.dtype[Any], base: Checkpoint, *, any_float: bool
) -> None:
    """Check that ``base`` has a weight of this name, shape and dtype, without reading it.

    Args:
        what: how messages start: the adapter's tensor.
        base_name: the weight's name in the base.
        shape: the weight's shape, as the adapter says.
        dtype: its dtype, as the adapter says.
        base: the checkpoint.
        any_float: see :func:`shira_format._core.fits.check_dtype`.

    Raises:
        BaseMismatch: it has not.
    """
    where = f"the base {base.path}"
    if base_name not in base:
        raise fits.missing(what, base_name, where)
    fits.check_shape(what, shape, base.shape(base_name), where)
    fits.check_dtype(what, dtype, base.dtype(base_name), any_float=any_float, base=where)


def base_values(tensor: SparseTensor, base: Checkpoint | None) -> Array:
    """The base's values at the entries, ``[nnz]``: from ``base``, checked, or those that the adapter holds.

    Raises:
        BaseMismatch: ``base`` lacks the weight, or it has another shape, dtype or other values at the entries.
        BaseRequired: no base is given, and the adapter holds no base values.
    """
    what = f"tensor {tensor.name!r}"
    if base is None:
        if tensor.base is None:
            raise fits.base_required(what)
        return tensor.base
    any_float = tensor.value_kind != "target" and tensor.base_digest is None
    check_frame(what, tensor.base_name, tensor.shape, tensor.dtype, base, any_float=any_float)
    found = base.at(tensor.base_name, tensor.indices)
    fits.check_values(what, tensor.base_digest, array_digest(found), f"the base {base.path}")
    return found


def with_base(tensor: SparseTensor, base: Checkpoint) -> SparseTensor:
    """``tensor``, checked against ``base``; targets get the base's values at their entries. A mask is not checked.

    Raises:
        BaseMismatch: see :func:`base_values`.
    """
    if tensor.value_kind == "none":
        return tensor
    if tensor.value_kind == "delta" and tensor.base_digest is None:
        check_frame(f"tensor {tensor.name!r}", tensor.base_name, tensor.shape, tensor.dtype, base, any_float=True)
        return tensor
    found = base_values(tensor, base)
    if tensor.value_kind == "delta" or tensor.base is not None:
        return tensor
    return SparseTensor(
        tensor.name, tensor.shape, tensor.indices, tensor.values, dtype=tensor.dtype, base=found,
        base_name=tensor.base_name, rows=tensor.rows, new_rows=tensor.new_rows, result_digest=tensor.result_digest,
    )  # fmt: skip


def weight_of(base: Checkpoint, name: str, base_name: str | None = None) -> Array:
    """The base's tensor ``base_name`` (by default ``name``), for the adapter's tensor ``name``.

    Raises:
        BaseMismatch: the base has none.
    """
    base_name = name if base_name is None else base_name
    if base_name not in base:
        raise fits.missing(f"tensor {name!r}", base_name, f"the base {base.path}")
    return base[base_name]


def check_dense(tensor: DenseTensor, base: Checkpoint) -> Array | None:
    """Check that ``base`` holds the tensor that ``tensor`` replaces.

    Returns:
        The base's tensor; None if the adapter does not say what it replaces.

    Raises:
        BaseMismatch: the base lacks it, or holds another one.
    """
    if tensor.base_digest is None:
        return None
    found = weight_of(base, tensor.name)
    tensor.check_base(found, f"the base {base.path}")
    return found


def dense_with_base(tensor: DenseTensor, base: Checkpoint) -> DenseTensor:
    """``tensor``, checked against ``base``, with the base's tensor if the adapter says that it replaces one.

    Raises:
        BaseMismatch: see :func:`check_dense`.
    """
    if tensor.base is not None or (found := check_dense(tensor, base)) is None:
        return tensor
    return DenseTensor(tensor.name, tensor.values, base=found)
