"""What both ways of training share: parameters that are trained whole, and the adapter that comes of it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from shira_format._core.arrays import Array, Indices, array_digest, as_array
from shira_format.adapter import Adapter
from shira_format.errors import BaseMismatch, SourceError
from shira_format.format import save
from shira_format.names.filters import name_filter
from shira_format.tensors import DenseTensor, SparseTensor

_ATTRIBUTE = "_shira_training"


@dataclass(frozen=True)
class WholeParameter:
    """A parameter of which all elements are trained, such as a bias, a norm or a head.

    Attributes:
        name: in the file that will be saved.
        path: in the model.
        base_digest: of what it was; None if the base has no such tensor.
    """

    name: str
    path: str
    base_digest: str | None


@dataclass(frozen=True)
class TrainedEntries:
    """The entries of one weight as they are.

    Attributes:
        name: in the file.
        shape: of the weight.
        indices: ``[K]``, flat.
        values: ``[K]``, in the weight's dtype.
        base: ``[K]``, what they were.
    """

    name: str
    shape: tuple[int, ...]
    indices: Indices
    values: Array
    base: Array


class Written(Protocol):
    """A weight that holds the base's entries or the trained ones."""

    def write_base(self) -> None:
        """Put the base's values into the weight."""

    def write(self) -> None:
        """Put the trained values into the weight."""


class Training(ABC):
    """A model under training, entry by entry.

    Attributes:
        model: the model.
        whole: its parameters that are trained whole.
        mask: provenance of the mask: the manifest of its file, or {}.
    """

    def __init__(self, model: nn.Module, whole: Sequence[WholeParameter], mask: Mapping[str, Any]) -> None:
        if training_of(model) is not None:
            raise SourceError("the model is under training already: call detach() on what attached it first")
        self.model, self.whole, self.mask = model, tuple(whole), dict(mask)
        model.__dict__[_ATTRIBUTE] = self

    @abstractmethod
    def entries(self) -> Iterator[TrainedEntries]:
        """The entries of each weight."""

    @abstractmethod
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters for the optimizer."""

    def show_base(self) -> None:
        """Put the base's values into the weights."""
        for weight in self._written():
            weight.write_base()

    def show_trained(self) -> None:
        """Put the trained values into the weights."""
        for weight in self._written():
            weight.write()

    @abstractmethod
    def _written(self) -> Iterable[Written]:
        """The weights with entries of the base and of the training."""

    @abstractmethod
    def _holders(self) -> Iterator[tuple[str, nn.Module]]:
        """The path of each of these weights, and the module that holds it."""

    def parameters(self) -> list[nn.Parameter]:
        """Parameters for the optimizer."""
        return [parameter for _, parameter in self.named_parameters()]

    def whole_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Paths and parameters of those that are trained whole."""
        for one in self.whole:
            yield one.path, self.model.get_parameter(one.path)

    @property
    def nnz(self) -> int:
        """Trained entries of masked weights."""
        return sum(one.indices.size for one in self.entries())

    @contextmanager
    def base(self) -> Iterator[None]:
        """The masked weights are the base's in this block, to measure what training has changed."""
        self.show_base()
        try:
            yield
        finally:
            self.show_trained()

    def adapter(self, manifest: Mapping[str, Any] | None = None, *, self_contained: bool = False) -> Adapter:
        """The adapter as it is now.

        Args:
            manifest: more provenance, such as ``base_model``, or ``source`` with the data.
            self_contained: keep the base's values.

        Raises:
            BaseMismatch: a weight was resized, or its module is not the model's any more.
        """
        modules = {id(module) for module in self.model.modules()}
        for path, module in self._holders():
            if id(module) not in modules:
                raise BaseMismatch(
                    f"tensor {path!r}: the module under training was replaced in the model by another one"
                )
        tensors = [_sparse(one, self_contained=self_contained) for one in self.entries()]
        dense = []
        for one in self.whole:
            values = as_array(self.model.get_parameter(one.path)).copy()
            dense.append(DenseTensor(one.name, values, base_digest=one.base_digest))
        return Adapter(tensors, dense=dense, manifest=self._provenance(manifest or {}))

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        manifest: Mapping[str, Any] | None = None,
        self_contained: bool = False,
        masks: str | os.PathLike[str] | None = None,
        compact: bool = False,
        base: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the adapter file, at any step; see :meth:`adapter`, and ``save`` of the format for ``masks``, ``compact`` and ``base``."""
        adapter = self.adapter(manifest, self_contained=self_contained)
        save(adapter, path, masks=masks, compact=compact, base=base)

    def _provenance(self, more: Mapping[str, Any]) -> dict[str, Any]:
        found = {key: self.mask[key] for key in ("base_model", "mask", "selection") if key in self.mask}
        return found | {"source": {"kind": "training"}} | dict(more)

    def _forget(self) -> None:
        self.model.__dict__.pop(_ATTRIBUTE, None)


def training_of(model: nn.Module) -> Training | None:
    """What trains a model, or the model that a wrapper is around (DDP, ``torch.compile``); None if nothing does."""
    for _ in range(4):
        found = model.__dict__.get(_ATTRIBUTE)
        if found is not None:
            assert isinstance(found, Training)
            return found
        inner = [m for name in ("module", "_orig_mod") if (m := model._modules.get(name)) is not None]  # noqa: SLF001
        if len(inner) != 1:
            return None
        model = inner[0]
    return None


def whole_parameters(
    model: nn.Module, masked: Mapping[str, str], whole: Sequence[str], new: Sequence[str]
) -> list[WholeParameter]:
    """The parameters that are trained whole.

    Args:
        model: the model.
        masked: for each masked weight its path in the model, and its name in the mask.
        whole: regexes of parameters that the base has.
        new: regexes of parameters that the base lacks, such as a head.

    Raises:
        SourceError: a regex matches nothing or a masked weight.
    """
    found: dict[str, WholeParameter] = {}
    rename = _common_renaming(masked)
    for patterns, is_new in ((whole, False), (new, True)):
        for pattern in patterns:
            chosen = name_filter([pattern], [])
            paths = [path for path, _ in model.named_parameters() if chosen(path)]
            if not paths:
                raise SourceError(f"no parameter of the model has a name in which {pattern!r} is found")
            for path in paths:
                if path in masked:
                    raise SourceError(f"{path} is masked, and cannot be trained whole too")
                digest = None if is_new else array_digest(as_array(model.get_parameter(path)))
                found[path] = WholeParameter(path if is_new else rename(path), path, digest)
    # In the model's order, however they were asked for: optimizers know parameters by their number.
    return [found[path] for path, _ in model.named_parameters() if path in found]


def _common_renaming(masked: Mapping[str, str]) -> Any:
    """From paths in the model to names in the file, as the masked weights have them: one prefix goes or comes."""
    changes = set()
    for path, name in masked.items():
        tail = ""  # what both end with, in whole words
        for one, other in zip(reversed(path.split(".")), reversed(name.split(".")), strict=False):
            if one != other:
                break
            tail = f"{one}.{tail}" if tail else one
        changes.add((path.removesuffix(tail), name.removesuffix(tail)))
    if len(changes) != 1:
        return str
    ((old, new),) = changes
    return lambda path: new + path.removeprefix(old) if path.startswith(old) else path


def _sparse(one: TrainedEntries, *, self_contained: bool) -> SparseTensor:
    if self_contained:
        return SparseTensor(one.name, one.shape, one.indices, one.values, base=one.base)
    return SparseTensor(one.name, one.shape, one.indices, one.values, base_digest=array_digest(one.base))


def freeze_others(model: nn.Module, trained: Sequence[Tensor]) -> None:
    """No gradient for any parameter but those that are trained."""
    kept = {id(parameter) for parameter in trained}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
