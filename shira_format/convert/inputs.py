"""What a conversion reads: opened here, and by the workers of a cluster from the same description."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shira_format.checkpoints import Checkpoint
from shira_format.convert.effect import Effect
from shira_format.entries.changes import Change
from shira_format.tensors import DenseTensor, SparseTensor


@dataclass(frozen=True)
class DenseCopy:
    """A tensor of ``tuned`` that is stored whole, read in parts.

    Attributes:
        name: its name in the adapter.
        tuned: the checkpoint that has it.
        tuned_name: its name there.
        base: the checkpoint whose tensor of this name, dtype and shape it replaces; None if it replaces none.
    """

    name: str
    tuned: Checkpoint
    tuned_name: str
    base: Checkpoint | None


@dataclass(frozen=True)
class DenseSum:
    """A tensor of the base with a small addition, stored whole, and what the addition changes."""

    tensor: DenseTensor
    effect: Effect


@dataclass
class ConversionInputs:
    """Open inputs of a conversion.

    Attributes:
        base: the base.
        changes: the changes that become sparse tensors, in the file's order.
        dense: makes the dense tensors; its argument says whether to keep the base's values.
        copy: makes a dense copy of a change that takes fewer bytes whole; None if there are no such changes.
        options: further arguments of the sparse tensor of a change: ``base_name``, ``rows``, ``new_rows``.
        removed: names of base tensors that the result lacks.
        renamed: sparse tensors without entries: tensors of the base that the result has under another name.
        structure: what changes beyond entries, by name.
        unchanged: number of tensors that were compared already, and are equal.
        left_out: names of the source that need no place in the adapter or that the user left out, by the reason.
        base_model, source: provenance.
        files: every file that is read.
        source_file: the file that errors in a change are attributed to.
        notices: what a user should know.
    """

    base: Checkpoint
    changes: Sequence[Change]
    dense: Callable[[bool], Iterator[DenseTensor | DenseCopy | DenseSum]]
    copy: Callable[[Change], DenseCopy] | None = None
    options: Callable[[Change], dict[str, Any]] = lambda _: {}
    removed: list[str] = field(default_factory=list)
    renamed: Sequence[SparseTensor] = ()
    structure: dict[str, str] = field(default_factory=dict)
    unchanged: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)
    base_model: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    source_file: Path | None = None
    notices: list[str] = field(default_factory=list)

    def states(self) -> tuple[tuple[str, int, int | None, int | None], ...]:
        """Name, size, time of change and inode of each file, by which inputs that were opened before are told from these.

        The time alone does not tell two files that were written in the same tick of the clock.
        """
        found = [(str(path), path.stat()) for path in self.files]
        return tuple(
            (name, state.st_size, getattr(state, "st_mtime_ns", None), getattr(state, "st_ino", None))
            for name, state in found
        )


class Conversion(Protocol):
    """Paths and options of a conversion: a frozen dataclass of plain values, which workers of a cluster are sent."""

    @property
    def include(self) -> tuple[str, ...]: ...
    @property
    def exclude(self) -> tuple[str, ...]: ...

    def open(self) -> ConversionInputs:
        """Open the inputs.

        Raises:
            SourceError: they cannot be converted.
            FormatError: a safetensors file is damaged.
        """
