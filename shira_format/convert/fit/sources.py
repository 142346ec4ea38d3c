"""From a conversion's inputs to the weights of a live model: what the source makes of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shira_format._core.arrays import Array, array_digest, as_array
from shira_format._core.dtypes import round_to, upcast, working_dtype
from shira_format._core.threads import Workers
from shira_format.checkpoints import Checkpoint
from shira_format.convert.fit.weights import ComputedWeights
from shira_format.convert.inputs import ConversionInputs, DenseCopy, DenseSum
from shira_format.entries.changes import Change, Tile
from shira_format.errors import BaseMismatch, SourceError
from shira_format.names.prefixes import match_names
from shira_format.selection.topk import check_energy, tiles
from shira_format.tensors import DenseTensor, numel


@dataclass
class SourceWeights:
    """The source's weights for a live model, by the model's names.

    Attributes:
        inputs: of the conversion, whose changes are those that may become sparse; vectors that are to be whole are dense.
        sparse: the source's weights of tensors that may become sparse and that it changes.
        whole: the tensors that the adapter replaces.
        names: by the model's name of a sparse one its name in the adapter.
        dtypes: by the model's name the dtype that it is stored in.
    """

    inputs: ConversionInputs
    sparse: ComputedWeights = field(default_factory=ComputedWeights)
    whole: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)


def whole_tensors(inputs: ConversionInputs) -> dict[str, Array]:
    """The tensors that the adapter replaces whole, by their names in it."""
    found: dict[str, Array] = {}
    for made in inputs.dense(False):
        dense = made.tensor if isinstance(made, DenseSum) else made
        found[dense.name] = dense.tuned[dense.tuned_name] if isinstance(dense, DenseCopy) else dense.values
    return found


def source_weights(
    inputs: ConversionInputs,
    model: nn.Module,
    *,
    vectors: bool,
    prefix: str | None = None,
    threads: int | None = None,
) -> SourceWeights:
    """Compute what the source makes of each parameter of a live model, in float32 (float64 of a float64 weight).

    Args:
        inputs: of the conversion.
        model: the base, which is compared with the one of the inputs bit for bit at all weights that change.
        vectors: store biases, norms and other vectors that change whole; else they become sparse like matrices.
        prefix: what the model's names start with, if the base's fit in several ways.
        threads: at most this many; all cores by default.

    Raises:
        SourceError: the adapter renames or resizes tensors, which a live model cannot show, or there is nothing to fit.
        BaseMismatch: the model is not this base.
    """
    where = str(inputs.source_file or inputs.base.path)
    _refuse_patches(inputs, where)
    dense = whole_tensors(inputs)
    live = _live_tensors(model)
    rename = _renaming(inputs, dense, live, where, prefix)
    found = SourceWeights(inputs)
    kept: list[Change] = []
    made: list[DenseTensor] = []
    taken: dict[int, str] = {}
    with Workers(threads) as workers:
        for change in inputs.changes:
            name = rename(change.name)
            parameter = _fitting(change, name, live, where)
            if (other := taken.setdefault(id(parameter), change.name)) != change.name:
                raise SourceError(
                    f"{where}: {other!r} and {change.name!r} are one weight of the model, tied: leave one of them out"
                )
            update = _update(change, workers)
            if not update.any():
                kept.append(change)  # for its place in the report
                continue
            base = inputs.base[change.name]
            if not np.array_equal(_wide(base), _wide(as_array(parameter).reshape(base.shape))):
                raise BaseMismatch(f"{where}: tensor {change.name!r}: {name} of the model has other values than the base {inputs.base.path}")  # fmt: skip
            weight = _onto(base, update)
            if vectors and len(change.shape) < 2:
                values = round_to(weight, base.dtype)
                made.append(DenseTensor(change.name, values, base=base))
                found.whole[name] = tensor_of(values)
                continue
            kept.append(change)
            found.sparse.add(name, torch.from_numpy(weight), partial(_weight, change, inputs.base, threads))
            found.names[name] = change.name
            found.dtypes[name] = tensor_of(base[:0]).dtype
    for key, values in dense.items():
        name = rename(key)
        if name not in live:
            raise BaseMismatch(
                f"{where}: tensor {key!r} is stored whole, and the model has no such tensor: load one that has this layer"
            )
        if tuple(live[name].shape) != values.shape:
            raise BaseMismatch(f"{where}: tensor {key!r} has shape {list(values.shape)}, {name} of the model {list(live[name].shape)}")  # fmt: skip
        found.whole[name] = tensor_of(values)
    if not found.sparse:
        raise SourceError(f"{where}: no weight changes that could become sparse: there is nothing to fit")
    found.inputs = replace(inputs, changes=kept, dense=_with(inputs.dense, made))
    return found


def _refuse_patches(inputs: ConversionInputs, where: str) -> None:
    moved = [*inputs.removed, *(tensor.name for tensor in inputs.renamed)]
    for change in inputs.changes:
        options = inputs.options(change)
        if options.get("base_name") not in (None, change.name) or options.get("rows") is not None:
            moved.append(change.name)
    if moved:
        raise SourceError(
            f"{where}: tensor {moved[0]!r} is renamed, resized or removed: a fit runs the base's model, which cannot show that; convert "
            "without a fit, or leave it out"
        )


def _live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones under each of their names."""
    found = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def _renaming(
    inputs: ConversionInputs,
    dense: Mapping[str, Array],
    live: Mapping[str, Tensor],
    where: str,
    prefix: str | None,
) -> Callable[[str], str]:
    """From names in the adapter to those in the model; a tensor that is new to the base may keep its name."""
    shapes = {change.name: change.shape for change in inputs.changes}
    shapes |= {name: values.shape for name, values in dense.items() if name in inputs.base}
    component = _component(inputs.base, shapes, live, where)
    plain = {name.removeprefix(component): shape for name, shape in shapes.items()}
    try:
        rename = match_names(
            list(plain), live, where, prefix=prefix, option="prefix=",
            fits=lambda name, other: tuple(live[other].shape) == plain[name],
        )  # fmt: skip
    except SourceError as error:
        raise BaseMismatch(f"{error} (the model's names)") from None

    def renamed(name: str) -> str:
        plain = name.removeprefix(component)
        return plain if name not in shapes and rename(plain) not in live else rename(plain)

    return renamed


def _component(base: Checkpoint, shapes: Mapping[str, Any], live: Mapping[str, Tensor], where: str) -> str:
    """``"COMPONENT/"`` of a pipeline's part that all changes are in; empty if the model has the names as they are.

    Raises:
        SourceError: the changes are in several parts.
    """
    if not base.components or all(name in live for name in shapes):
        return ""
    parts = sorted({name.partition("/")[0] for name in shapes})
    if len(parts) > 1:
        raise SourceError(f"{where}: changes {' and '.join(parts)}: a fit runs one model: choose one by include")
    return f"{parts[0]}/"


def _fitting(change: Change, name: str, live: Mapping[str, Tensor], where: str) -> Tensor:
    parameter = live.get(name)
    if parameter is None or tuple(parameter.shape) != change.shape:
        has = "has no such tensor" if parameter is None else f"has {name} of shape {list(parameter.shape)}"
        raise BaseMismatch(f"{where}: tensor {change.name!r} of shape {list(change.shape)}: the model {has}")
    if not isinstance(parameter, nn.Parameter) or not parameter.is_floating_point():
        raise BaseMismatch(f"{where}: tensor {change.name!r}: {name} of the model is no float parameter")
    return parameter


def _update(change: Change, workers: Workers) -> Array:
    """``[numel]``: the whole change, in float32 or float64."""
    found = np.zeros(numel(change.shape), change.dtype)

    def work(start: int, tile: Tile, energy: float) -> float:
        if tile.where is None:
            found[start : start + tile.values.size] = tile.values
        else:
            found[start + tile.where] = tile.values
        return energy

    check_energy(change, sum(tiles(workers, change, work)))
    return found


def _weight(change: Change, base: Checkpoint, threads: int | None) -> Tensor:
    """What the source makes of a weight."""
    with Workers(threads) as workers:
        return torch.from_numpy(_onto(base[change.name], _update(change, workers)))


def _onto(base: Array, update: Array) -> Array:
    """Base plus update, which is used up, in the base's shape."""
    update += _wide(base).reshape(-1)
    return update.reshape(base.shape)


def _wide(array: Array) -> Array:
    return upcast(array, np.empty(array.shape, working_dtype(array.dtype)))


def tensor_of(array: Array) -> Tensor:
    """A copy as a torch tensor, bit for bit."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if array.dtype.name.startswith("float8"):
        return torch.from_numpy(array.view(np.uint8).copy()).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array.copy())


def _with(dense: Callable[[bool], Iterator[Any]], made: list[DenseTensor]) -> Callable[[bool], Iterator[Any]]:
    """The dense tensors, and more of them, with the base's values or their digests."""

    def tensors(self_contained: bool) -> Iterator[Any]:
        yield from dense(self_contained)
        for one in made:
            assert one.base is not None
            yield one if self_contained else DenseTensor(one.name, one.values, base_digest=array_digest(one.base))

    return tensors
