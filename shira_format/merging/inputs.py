"""The adapters to be merged, checked to be of one base before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from shira_format.adapter import Adapter
from shira_format.entries.base_check import dense_with_base, with_base
from shira_format.errors import BaseMismatch, SourceError
from shira_format.format import AdapterFile
from shira_format.tensors import DenseTensor, SparseTensor, ValueKind

if TYPE_CHECKING:
    from shira_format.checkpoints import Checkpoint

Source = Adapter | str | os.PathLike[str]
Base: TypeAlias = "Checkpoint | str | os.PathLike[str] | None"
_T = TypeVar("_T", SparseTensor, DenseTensor)

NO_TENSOR = "no tensor is left by the choice of names"


class Header(NamedTuple):
    """What is known of a sparse tensor without reading it."""

    shape: tuple[int, ...]
    value_kind: ValueKind
    is_patch: bool


@dataclass(frozen=True)
class Input:
    """One adapter, read tensor by tensor.

    Attributes:
        label: its name in messages and in the result's manifest.
        adapter: its tensors.
        file: its file; None for one in memory.
        base: its base, if given: then every tensor is checked against it.
    """

    label: str
    adapter: Adapter
    file: AdapterFile | None
    base: Checkpoint | None

    def sparse(self, name: str) -> SparseTensor:
        """One sparse tensor, with the base's values if the file or :attr:`base` has them.

        Raises:
            FormatError: it is damaged.
            BaseMismatch: :attr:`base` is another one; names file and tensor.
        """
        tensor = self.adapter[name]
        return tensor if self.base is None else self.named(with_base, tensor, self.base)

    def delta_with_base(self, tensor: SparseTensor) -> SparseTensor:
        """Deltas with the base's values, if :attr:`base` is given: needed where they are added to targets."""
        if tensor.value_kind != "delta" or tensor.base is not None or self.base is None:
            return tensor
        base = self.base.at(tensor.name, tensor.indices)  # checked when the tensor was read
        return SparseTensor(
            tensor.name, tensor.shape, tensor.indices, tensor.values, value_kind="delta", dtype=base.dtype, base=base
        )  # fmt: skip

    def dense(self, name: str) -> DenseTensor:
        """One dense tensor, likewise."""
        tensor = self.adapter.dense[name]
        return tensor if self.base is None else self.named(dense_with_base, tensor, self.base)

    def named(self, check: Callable[[_T, Any], _T], tensor: _T, base: Any) -> _T:
        """``check(tensor, base)``; a BaseMismatch names the adapter."""
        try:
            return check(tensor, base)
        except BaseMismatch as error:
            raise BaseMismatch(f"{self.label}: {error}") from None

    @cached_property
    def headers(self) -> dict[str, Header]:
        """The sparse tensors by name, without reading them."""
        if self.file is None:
            return {name: Header(one.shape, one.value_kind, one.is_patch) for name, one in self.adapter.items()}
        return {
            name: Header(one.shape, one.values, one.base_name != name or one.rows is not None)
            for name, one in self.file.manifest.tensors.items()
        }

    @cached_property
    def self_contained(self) -> bool:
        """Whether it keeps the base's values of all its targets, and all tensors of the base that it replaces."""
        if self.file is None:
            replaced = [one for one in self.adapter.dense.values() if one.base_digest is not None]
            targets = [one for one in self.adapter.values() if one.value_kind == "target"]
            return all(one.base is not None for one in replaced) and all(one.base is not None for one in targets)
        manifest = self.file.manifest
        return all(one.base_values for one in manifest.whole.values() if "base" in one.digests) and all(
            one.base_values for one in manifest.tensors.values() if one.values == "target"
        )

    def nnz(self, name: str) -> int:
        """Entries of one tensor; 0 if the adapter has none of this name."""
        if self.file is not None:
            entry = self.file.manifest.tensors.get(name)
            return 0 if entry is None else entry.nnz
        return self.adapter[name].nnz if name in self.adapter else 0

    def to_manifest(self) -> dict[str, Any]:
        """How the result's manifest names it."""
        if self.file is None:
            return {"name": self.label}
        return {"name": self.file.path.name, "digest": self.file.streams.digest()}


def open_base(base: Base) -> Checkpoint | None:
    """The checkpoint, opened if it is given as a path.

    Raises:
        SourceError, FormatError: see :func:`shira_format.checkpoints.open_checkpoint`.
    """
    if isinstance(base, (str, os.PathLike)):
        from shira_format.checkpoints import open_checkpoint

        return open_checkpoint(base)
    return base


def read_files(inputs: Sequence[Input]) -> list[Path]:
    """All files that are read: of the adapters, and of their base."""
    bases = {id(one.base): one.base for one in inputs if one.base is not None}
    adapters = [one.file.path for one in inputs if one.file is not None]
    return [*adapters, *(path for base in bases.values() for path in (base.path, *base.files))]


def open_inputs(sources: Sequence[Source], base: Checkpoint | None) -> list[Input]:
    """Open adapters, and check what can be checked without reading their tensors.

    Raises:
        SourceError: none were given.
        FormatError: a file is no adapter, or is damaged.
        BaseMismatch: a mask or a patch, which cannot be merged, or adapters of different bases.
        OSError: a file cannot be read.
    """
    if not sources:
        raise SourceError("no adapters were given")
    inputs = [open_input(source, base, number) for number, source in enumerate(sources, 1)]
    if base is None:  # with a base every value is checked
        check_one_base(inputs)
    return inputs


def open_input(source: Source, base: Checkpoint | None, number: int = 1) -> Input:
    """Open one adapter, the ``number``-th; see :func:`open_inputs` for what is raised."""
    if isinstance(source, Adapter):
        one = Input(f"adapter {number}", source, None, base)
    else:
        file = AdapterFile(source, base=base)
        one = Input(str(file.path), file.adapter(), file, base)
    if one.adapter.removed:
        raise BaseMismatch(f"{one.label}: removes tensors: {_PATCH}")
    for name, header in one.headers.items():
        if header.value_kind == "none":
            raise BaseMismatch(f"{one.label}: tensor {name!r} is a mask, without values to merge")
        if header.is_patch:
            raise BaseMismatch(f"{one.label}: tensor {name!r} is renamed or resized: {_PATCH}")
    return one


_PATCH = "a patch of a full checkpoint, which cannot be merged with other adapters"


def check_one_base(inputs: Sequence[Input]) -> None:
    """Compare the bases that adapters name, and the shapes of their tensors.

    Where two adapters share entries, the base's values are compared as well, when the tensors are read.

    Raises:
        BaseMismatch: they are of different bases.
    """
    for key in ("id", "revision"):
        bases = {str(found): one.label for one in inputs if (found := _base_model(one).get(key)) is not None}
        if len(bases) > 1:
            (a, first), (b, second) = list(bases.items())[:2]
            raise BaseMismatch(
                f"{second}: made for the base {b}, and {first} for {a}: pass the base (--base) if these are the same"
            )
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for one in inputs:
        for name, header in one.headers.items():
            shape, label = shapes.setdefault(name, (header.shape, one.label))
            if shape != header.shape:
                raise BaseMismatch(
                    f"{one.label}: tensor {name!r} has shape {list(header.shape)}, and {list(shape)} in {label}: these are "
                    "not adapters of one base"
                )


def _base_model(one: Input) -> dict[str, Any]:
    found = one.adapter.manifest.get("base_model")
    return found if isinstance(found, dict) else {}
