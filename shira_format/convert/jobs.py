"""What a conversion is about, in a form that can travel: another process opens the same inputs by the same job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shira_format.checkpoints import Checkpoint
from shira_format.entries.changes import Change
from shira_format.tensors import DenseTensor, SparseTensor


@dataclass(frozen=True)
class DenseCopy:
    """A tensor of ``tuned`` that is stored whole, read in parts.

    Attributes:
        name: in the result.
        tuned: where it is.
        tuned_name: its name there.
        base: the checkpoint that has a tensor of this name, dtype and shape to be replaced; None if it has none.
    """

    name: str
    tuned: Checkpoint
    tuned_name: str
    base: Checkpoint | None


@dataclass
class ConversionInputs:
    """Open inputs.

    Attributes:
        base: the base.
        changes: of which sparse tensors are made, in the file's order.
        wholes: makes the tensors that are stored whole.
        copy: makes a whole copy of a change that turns out to take fewer bytes whole; None where that cannot be.
        frame: more arguments of the sparse tensor of a change.
        removed: names of base tensors that the result lacks.
        copies: tensors without entries, which say what of the base the result has under another name.
        structure: what changes beyond entries, by name.
        unchanged: tensors that were compared already, and are equal.
        base_model, source: provenance.
        files: every file that is read.
        blamed: the file that an unusable change is put down to.
        notices: what a user should know.
    """

    base: Checkpoint
    changes: Sequence[Change]
    wholes: Callable[[bool], Iterator[DenseTensor | DenseCopy]]
    copy: Callable[[Change], DenseCopy] | None = None
    frame: Callable[[Change], dict[str, Any]] = lambda _: {}
    removed: list[str] = field(default_factory=list)
    copies: Sequence[SparseTensor] = ()
    structure: dict[str, str] = field(default_factory=dict)
    unchanged: int = 0
    base_model: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    blamed: list[Path] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Elements of all changes."""
        return sum(change.size for change in self.changes)


class Job(Protocol):
    """A frozen dataclass of plain values."""

    @property
    def include(self) -> tuple[str, ...]: ...
    @property
    def exclude(self) -> tuple[str, ...]: ...

    def open(self) -> ConversionInputs:
        """Open the inputs and say what is to be done.

        Raises:
            SourceError: they cannot be converted.
            FormatError: a safetensors file is damaged.
        """


def identified(location: str) -> dict[str, str]:
    """``id`` and ``revision`` of a model on the hub; nothing for other locations."""
    if not location.startswith("hf://"):
        return {}
    from shira_format.storage.hub import hub_identity as on_the_hub

    return on_the_hub(location)
