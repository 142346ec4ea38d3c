"""Masks, however they are given, and the parameters of a model that they are about."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from shira_format._core.arrays import Indices, as_array
from shira_format.adapter import Adapter
from shira_format.errors import BaseMismatch, SourceError
from shira_format.format import load
from shira_format.live.weights import check_memory
from shira_format.names.prefixes import match_names
from shira_format.tensors import SparseTensor

# A mask file or adapter, or for each weight: flat indices, or booleans of the weight's shape.
Mask = Adapter | str | os.PathLike[str] | Mapping[str, Any]

TRAINED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class MaskedWeight:
    """One weight of a model, and the entries of it that are trained.

    Attributes:
        name: in the mask, and in the file that will be saved.
        path: of the parameter in the model.
        places: each module that holds it, and under which attribute; several if it is tied.
        shape: of the weight.
        indices: ``[K]``, flat, strictly increasing.
        tensor: of the adapter that the mask is; None for a mapping.
    """

    name: str
    path: str
    places: tuple[tuple[nn.Module, str], ...]
    shape: tuple[int, ...]
    indices: Indices
    tensor: SparseTensor | None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter, as it is now."""
        module, attribute = self.places[0]
        found = module._parameters[attribute]  # noqa: SLF001 - attributes may be properties
        assert found is not None
        return found


def check_stays(path: str, shape: tuple[int, ...], parameter: nn.Parameter) -> None:
    """Check that a parameter under training has the shape that its flat indices are for.

    Raises:
        BaseMismatch: it has another one.
    """
    if (now := tuple(parameter.shape)) != shape:
        raise BaseMismatch(
            f"tensor {path!r}: the weight of {list(shape)} became {list(now)} while it was under training: call detach() before "
            "it is resized"
        )


def read_mask(mask: Mask) -> Adapter | Mapping[str, Any]:
    """A mask as a mapping by name."""
    return load(mask) if isinstance(mask, str | os.PathLike) else mask


def label_of(mask: Mask) -> str:
    """How messages call it."""
    return os.fspath(mask) if isinstance(mask, str | os.PathLike) else "mask"


def masked_weights(model: nn.Module, mask: Mask, *, prefix: str | None = None) -> list[MaskedWeight]:
    """The parameters that a mask is about, in the mask's order.

    Names may differ in a prefix, as everywhere in this package. Weights without any entry are left out.

    Args:
        model: the model.
        mask: a mask file or adapter, or a mapping from name to flat indices or booleans.
        prefix: what the names in the model start with, if they fit in several ways.

    Raises:
        SourceError: the mask has no entries, or a weight is not in the model or fits in several ways.
        BaseMismatch: a weight has another shape or a dtype that cannot be trained.
        FormatError: indices that are unsorted, repeated or out of range.
    """
    found, where = read_mask(mask), label_of(mask)
    holders = _holders(model)
    rename = match_names(
        list(found), list(holders), where, prefix=prefix, option="prefix=",
        fits=lambda name, other: _fits(found, name, holders[other]),
    )  # fmt: skip
    weights: list[MaskedWeight] = []
    seen: dict[int, str] = {}
    for name in found:
        path = rename(name)
        parameter = holders[path][0][0]._parameters[holders[path][0][1]]  # noqa: SLF001
        assert parameter is not None
        _check_parameter(where, name, path, parameter)
        _check_holders(where, name, path, holders[path])
        tensor = _tensor(where, name, found[name], parameter)
        if not tensor.nnz:
            continue
        if (other := seen.setdefault(id(parameter), name)) != name:
            raise SourceError(
                f"{where}: {other!r} and {name!r} are one weight of the model, tied: leave one of them out"
            )
        kept = tensor if isinstance(found, Adapter) else None
        weights.append(MaskedWeight(name, path, tuple(holders[path]), tensor.shape, tensor.indices, kept))
    if not weights:
        raise SourceError(f"{where}: has no entries to train")
    return weights


def _holders(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Each parameter by its path, tied ones under each of theirs: all modules and attributes that hold it."""
    by_identity: dict[int, list[tuple[nn.Module, str]]] = {}
    paths: dict[str, int] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():  # noqa: SLF001 - by name, not by identity
            if parameter is not None:
                by_identity.setdefault(id(parameter), []).append((module, attribute))
                paths[f"{path}.{attribute}" if path else attribute] = id(parameter)
    return {path: by_identity[identity] for path, identity in paths.items()}


def _fits(found: Adapter | Mapping[str, Any], name: str, places: list[tuple[nn.Module, str]]) -> bool:
    """Whether a parameter can be the weight of that name, as far as the mask tells its shape."""
    module, attribute = places[0]
    shape = tuple(module._parameters[attribute].shape)  # type: ignore[union-attr]  # noqa: SLF001
    value = found[name]
    if isinstance(value, SparseTensor):
        return value.shape == shape
    array = as_array(value)
    return array.dtype != bool or array.shape == shape


def _check_parameter(where: str, name: str, path: str, parameter: nn.Parameter) -> None:
    if type(parameter) is not nn.Parameter:
        raise BaseMismatch(
            f"{where}: tensor {name!r}: {path} is a {type(parameter).__name__}: quantised and sharded weights cannot be trained "
            "entry by entry; attach before the model is wrapped or sharded"
        )
    if parameter.device.type == "meta":
        raise BaseMismatch(
            f"{where}: tensor {name!r}: {path} is on the meta device, without data: load the model first"
        )
    check_memory(path, parameter)
    if parameter.dtype not in TRAINED_DTYPES:
        raise BaseMismatch(f"{where}: tensor {name!r}: {path} is {parameter.dtype}; trained are float32, bfloat16, float16 and float64")  # fmt: skip


def _check_holders(where: str, name: str, path: str, places: list[tuple[nn.Module, str]]) -> None:
    if any(getattr(module, "max_norm", None) is not None for module, _ in places):
        raise SourceError(f"{where}: tensor {name!r}: {path} is of an embedding with max_norm, which changes its weight as it reads it")  # fmt: skip


def _tensor(where: str, name: str, value: Any, parameter: nn.Parameter) -> SparseTensor:
    """The entries, checked."""
    shape = tuple(parameter.shape)
    if isinstance(value, SparseTensor):
        if value.shape != shape:
            raise BaseMismatch(
                f"{where}: tensor {name!r}: shape {list(value.shape)} for a weight of {list(shape)}"
            )
        if value.is_patch:
            raise SourceError(
                f"{where}: tensor {name!r} is of a patch, which renames or resizes it, and is no mask"
            )
        return value
    array = as_array(value)
    if array.dtype == bool:
        if array.shape != shape:
            raise BaseMismatch(
                f"{where}: tensor {name!r}: a mask of {list(array.shape)} for a weight of {list(shape)}"
            )
        array = np.flatnonzero(array)
    return SparseTensor(name, shape, array, None, value_kind="none")
