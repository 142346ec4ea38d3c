"""One live weight (a numpy array, or a torch tensor on any device), read and written at flat indices.

torch is not imported here: a caller with torch tensors has imported it.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

import numpy as np

from shira_format._core.arrays import Array, Indices, as_array, read_only
from shira_format._core.compiled import check_count, check_within, exchange, put, take
from shira_format._core.dtypes import DTYPES
from shira_format.errors import BaseMismatch
from shira_format.live.models import UnusedOriginal

# The safetensors names of torch's dtypes.
_TORCH = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
    "torch.bool": "BOOL",
}  # fmt: skip


class LiveWeight(Protocol):
    """One live weight.

    Attributes:
        shape: its shape.
        dtype: its dtype, as a numpy dtype.
        in_one_pass: whether :meth:`exchange` can be called.
    """

    @property
    def in_one_pass(self) -> bool: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...

    def get(self, indices: Indices) -> Array:
        """The elements at flat indices within the weight, ``[n]``, as a copy."""

    def part(self, start: int, stop: int) -> Array:
        """The elements from flat index ``start`` to ``stop``, ``[stop - start]``, read-only: the weight's memory if possible."""

    def put(self, indices: Indices, values: Array) -> None:
        """Set these elements to values of :attr:`dtype`."""

    def exchange(self, old: Indices, old_base: Array, new: Indices, new_values: Array) -> Array:
        """Write ``old_base`` at ``old``, then ``new_values`` at ``new``; returns the values at ``new`` in between.

        Only if :attr:`in_one_pass`; it cannot fail half-way.
        """

    def whole(self) -> Array:
        """All elements, ``[*shape]``, as a copy."""

    def fill(self, values: Array) -> None:
        """Set all elements to ``[*shape]`` values of :attr:`dtype`; another shape is a BaseMismatch."""


def live_weight(name: str, weight: Any) -> LiveWeight:
    """A numpy array or a torch tensor as a live weight.

    Raises:
        BaseMismatch: it is read-only, quantised, without data or distributed; the message names it.
    """
    if isinstance(weight, np.ndarray):
        if not weight.flags.writeable:
            raise BaseMismatch(f"tensor {name!r}: the weight is read-only")
        return ArrayWeight(np.asarray(weight))  # a matrix or a masked array has other rules of indexing
    if isinstance(weight, UnusedOriginal):
        raise BaseMismatch(
            f"tensor {name!r}: PEFT uses a trained copy of this module (modules_to_save) instead of the base's: merge and "
            "unload that adapter first"
        )
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(weight, torch.Tensor):
        raise BaseMismatch(f"tensor {name!r}: the weight is a {type(weight).__name__}, not an array or a tensor")
    if type(weight) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise BaseMismatch(
            f"tensor {name!r}: the weight is a {type(weight).__name__}: quantised and distributed weights cannot take "
            "exact values; apply the adapter before the model is quantised or sharded"
        )
    if weight.device.type == "meta":
        raise BaseMismatch(
            f"tensor {name!r}: the weight is on the meta device, without data: load the model first"
        )
    if weight.layout != torch.strided or str(weight.dtype) not in _TORCH:
        raise BaseMismatch(f"tensor {name!r}: the weight is {weight.layout} of {weight.dtype}")
    if weight.is_neg():
        raise BaseMismatch(f"tensor {name!r}: the weight is a negated view of other memory: make a copy of it")
    check_memory(name, weight)
    return ArrayWeight(as_array(weight), weight) if weight.device.type == "cpu" else DeviceWeight(weight)


def check_memory(name: str, tensor: Any) -> None:
    """Check that the storage of a torch tensor has all elements: ``resize_`` of a storage does not tell its tensors.

    Raises:
        BaseMismatch: it has not.
    """
    steps = ((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + sum(steps) + 1) * tensor.element_size()
    if tensor.numel() and tensor.untyped_storage().nbytes() < end:
        raise BaseMismatch(
            f"tensor {name!r}: the memory of the weight was released, as sharding and offloading do: load the weight first"
        )


class ArrayWeight:
    """A weight in CPU memory."""

    def __init__(self, array: Array, tensor: Any = None) -> None:
        """Args: ``tensor``: the torch tensor whose memory ``array`` is."""
        self._array = array
        self._tensor = tensor
        self._flat = array.reshape(-1) if array.flags.c_contiguous else None

    @property
    def in_one_pass(self) -> bool:
        return self._flat is not None

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._array.dtype

    def get(self, indices: Indices) -> Array:
        if self._flat is not None:
            return take(self._flat, indices)
        check_within(indices, self._array.size)
        return np.asarray(self._array[np.unravel_index(indices, self.shape)])

    def part(self, start: int, stop: int) -> Array:
        return read_only(self._array.flat[start:stop] if self._flat is None else self._flat[start:stop])

    def put(self, indices: Indices, values: Array) -> None:
        if self._flat is not None:
            put(self._flat, indices, values)
        else:
            check_within(indices, self._array.size)
            check_count(indices.size, values)
            self._array[np.unravel_index(indices, self.shape)] = values
        self._written()

    def exchange(self, old: Indices, old_base: Array, new: Indices, new_values: Array) -> Array:
        assert self._flat is not None
        base = exchange(self._flat, old, old_base, new, new_values)
        self._written()
        return base

    def whole(self) -> Array:
        return self._array.copy()

    def fill(self, values: Array) -> None:
        _check_fills(values, self.shape)
        self._array[...] = values
        self._written()

    def _written(self) -> None:
        """Tell autograd, so that a backward pass through the old values raises instead of giving wrong gradients."""
        if self._tensor is not None and not self._tensor.is_inference():
            sys.modules["torch"].autograd.graph.increment_version(self._tensor)


def _check_fills(values: Array, shape: tuple[int, ...]) -> None:
    if values.shape != shape:  # assignment would repeat them
        raise BaseMismatch(f"values of shape {list(values.shape)} for a weight of {list(shape)}")


class DeviceWeight:
    """A torch tensor on an accelerator; only indices and values are transferred."""

    in_one_pass = False

    def __init__(self, tensor: Any) -> None:
        self._torch = sys.modules["torch"]
        self._tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._tensor.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return DTYPES[_TORCH[str(self._tensor.dtype)]]

    def get(self, indices: Indices) -> Array:
        check_within(indices, self._tensor.numel())
        bits, at = self._bits(), self._to_device(indices)
        if bits.is_contiguous():
            found = self._torch.index_select(bits.view(-1), 0, at)
        else:
            found = bits[self._torch.unravel_index(at, bits.shape)]
        return np.asarray(found.cpu().numpy().view(self.dtype))

    def part(self, start: int, stop: int) -> Array:
        return read_only(self._bits().reshape(-1)[start:stop].cpu().numpy().view(self.dtype))

    def put(self, indices: Indices, values: Array) -> None:
        check_within(indices, self._tensor.numel())
        check_count(indices.size, values)
        bits, at = self._bits(), self._to_device(indices)
        sent = self._to_device(np.ascontiguousarray(values).view(self._carrier))
        if bits.is_contiguous():
            bits.view(-1).index_copy_(0, at, sent)
        else:
            bits[self._torch.unravel_index(at, bits.shape)] = sent

    def exchange(self, old: Indices, old_base: Array, new: Indices, new_values: Array) -> Array:
        raise AssertionError  # not in one pass

    def whole(self) -> Array:
        return np.asarray(self._bits().cpu().numpy().view(self.dtype))

    def fill(self, values: Array) -> None:
        _check_fills(values, self.shape)
        self._bits().copy_(self._to_device(np.ascontiguousarray(values).view(self._carrier)))

    @property
    def _carrier(self) -> str:
        """An integer dtype of the same size, which every device can copy, and which keeps the bits of NaN."""
        return {1: "u1", 2: "i2", 4: "i4", 8: "i8"}[self.dtype.itemsize]

    def _bits(self) -> Any:
        carrier = {"u1": "uint8", "i2": "int16", "i4": "int32", "i8": "int64"}[self._carrier]
        return self._tensor.detach().view(getattr(self._torch, carrier))

    def _to_device(self, array: Array) -> Any:
        return self._torch.from_numpy(np.require(array, requirements="W")).to(self._tensor.device)
