"""The adapters that are to be joined, checked to be of one base before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from shira_format._core.arrays import file_digest
from shira_format.adapter import Adapter
from shira_format.entries.base_check import dense_with_base, with_base
from shira_format.errors import BaseMismatch, SourceError
from shira_format.format import AdapterFile
from shira_format.tensors import DenseTensor, SparseTensor

if TYPE_CHECKING:
    from shira_format.checkpoints import Checkpoint

Source = Adapter | str | os.PathLike[str]


@dataclass(frozen=True)
class Input:
    """One adapter, read tensor by tensor.

    Attributes:
        label: how messages and the result call it.
        adapter: its tensors.
        file: that it is in; None for one in memory.
        base: its base, if that was given: then every tensor is checked against it.
    """

    label: str
    adapter: Adapter
    file: AdapterFile | None
    base: Checkpoint | None

    def sparse(self, name: str) -> SparseTensor:
        """One sparse tensor, with the base's values if those are known from anywhere.

        Raises:
            FormatError: it is damaged.
            BaseMismatch: :attr:`base` is another one; names file and tensor.
        """
        tensor = self.adapter[name]
        return tensor if self.base is None else self._named(with_base, tensor)

    def bound(self, tensor: SparseTensor) -> SparseTensor:
        """Deltas of this adapter with the base's values, which they need where they meet targets, if those are known."""
        if tensor.value_kind != "delta" or tensor.base is not None or self.base is None:
            return tensor
        base = self.base.at(tensor.name, tensor.indices)  # checked when the tensor was read
        return SparseTensor(
            tensor.name,
            tensor.shape,
            tensor.indices,
            tensor.values,
            value_kind="delta",
            dtype=base.dtype,
            base=base,
        )

    def dense(self, name: str) -> DenseTensor:
        """One whole tensor, likewise."""
        tensor = self.adapter.dense[name]
        return tensor if self.base is None else self._named(dense_with_base, tensor)

    def _named(self, check: Callable[[Any, Any], Any], tensor: Any) -> Any:
        try:
            return check(tensor, self.base)
        except BaseMismatch as error:
            raise BaseMismatch(f"{self.label}: {error}") from None

    @cached_property
    def frames(self) -> dict[str, tuple[tuple[int, ...], str, bool]]:
        """Of each sparse tensor its shape, the meaning of its values, and whether it is a patch."""
        if self.file is None:
            return {name: (one.shape, one.value_kind, one.is_patch) for name, one in self.adapter.items()}
        return {
            name: (one.shape, one.values, one.base_name != name or one.rows is not None)
            for name, one in self.file.manifest.tensors.items()
        }

    @cached_property
    def self_contained(self) -> bool:
        """Whether it keeps the base's values of all its targets, and of all whole tensors that the base has."""
        if self.file is None:
            old = [one for one in self.adapter.dense.values() if one.base_digest is not None]
            targets = [one for one in self.adapter.values() if one.value_kind == "target"]
            return all(one.base is not None for one in old) and all(one.base is not None for one in targets)
        told = self.file.manifest
        return all(one.base_values for one in told.whole.values() if "base" in one.digests) and all(
            one.base_values for one in told.tensors.values() if one.values == "target"
        )

    def nnz(self, name: str) -> int:
        """Entries of one tensor; 0 if it has none of that name."""
        if self.file is not None:
            entry = self.file.manifest.tensors.get(name)
            return 0 if entry is None else entry.nnz
        return self.adapter[name].nnz if name in self.adapter else 0

    def told(self) -> dict[str, Any]:
        """What the result says of it."""
        if self.file is None:
            return {"name": self.label}
        return {"name": self.file.path.name, "digest": file_digest(self.file.path)}


def open_inputs(sources: Sequence[Source], base: Checkpoint | None) -> list[Input]:
    """Open adapters, and check what can be checked without reading their tensors.

    Raises:
        SourceError: none were given.
        FormatError: a file is no adapter, or is damaged.
        BaseMismatch: a mask or a patch, which cannot be joined, or adapters of different bases.
        OSError: a file cannot be read.
    """
    if not sources:
        raise SourceError("no adapters were given")
    inputs = [open_input(source, base, number) for number, source in enumerate(sources, 1)]
    if base is None:  # which checks every value
        check_one_base(inputs)
    return inputs


def open_input(source: Source, base: Checkpoint | None, number: int = 1) -> Input:
    """Open one adapter, the ``number``-th; see :func:`open_inputs` for what is raised."""
    if isinstance(source, Adapter):
        one = Input(f"adapter {number}", source, None, base)
    else:
        file = AdapterFile(source, separate_maps=True)
        one = Input(str(file.path), file.adapter(), file, base)
    _check_plain(one)
    return one


def _check_plain(one: Input) -> None:
    if one.adapter.removed:
        raise BaseMismatch(f"{one.label}: removes tensors: {_PATCH}")
    for name, (_, value_kind, patch) in one.frames.items():
        if value_kind == "none":
            raise BaseMismatch(f"{one.label}: tensor {name!r} is a mask: there is nothing to join")
        if patch:
            raise BaseMismatch(f"{one.label}: tensor {name!r} is renamed or resized: {_PATCH}")


_PATCH = "a patch of whole checkpoints, which cannot be joined with others"


def check_one_base(inputs: Sequence[Input]) -> None:
    """Compare what adapters say of their bases, and the shapes of their tensors.

    Where entries of two adapters meet, the base's values are compared as well, when the tensors are read.

    Raises:
        BaseMismatch: they are of different bases.
    """
    for key in ("id", "revision"):
        told = {str(found): one.label for one in inputs if (found := _base_model(one).get(key)) is not None}
        if len(told) > 1:
            (a, first), (b, second) = list(told.items())[:2]
            raise BaseMismatch(
                f"{second}: made for the base {b}, and {first} for {a}: pass the base (--base) if these are the same"
            )
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for one in inputs:
        for name, (shape, _, _) in one.frames.items():
            known, label = shapes.setdefault(name, (shape, one.label))
            if known != shape:
                raise BaseMismatch(
                    f"{one.label}: tensor {name!r} has the shape {list(shape)}, and {list(known)} in {label}: these are "
                    "not adapters of one base"
                )


def _base_model(one: Input) -> dict[str, Any]:
    found = one.adapter.manifest.get("base_model")
    return found if isinstance(found, dict) else {}
