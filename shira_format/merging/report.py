"""The report of a merge, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass, field

from shira_format.tensors import Totals


@dataclass(frozen=True)
class MergedTensor:
    """One weight of the result.

    Attributes:
        name: of the weight.
        shape: of the weight.
        nnz: entries of the result.
        numel: elements of the weight.
        inputs: entries of each adapter.
        shared: entries that several adapters have.
        energy: energy (the sum of squares) of the result's deltas before its density was limited; None: it was not.
        energy_kept: that of the deltas that were kept; None likewise.
        not_finite: entries of the result that are NaN or infinite.
    """

    name: str
    shape: tuple[int, ...]
    nnz: int
    numel: int
    inputs: tuple[int, ...]
    shared: int
    energy: float | None = None
    energy_kept: float | None = None
    not_finite: int = 0


@dataclass
class MergeReport(Totals):
    """The report of a merge.

    Attributes:
        labels: of the adapters.
        method: the method's name.
        tensors: the sparse tensors, also those of which no entries were left.
        whole: names of the result's dense tensors.
        notices: what a user should know.
        file_bytes: of the written file; None if there is none.
    """

    labels: list[str]
    method: str
    tensors: list[MergedTensor] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    file_bytes: int | None = None

    @property
    def shared(self) -> int:
        """Entries that several adapters have."""
        return sum(tensor.shared for tensor in self.tensors)

    @property
    def energy_kept(self) -> float | None:
        """Share of the energy that was kept when the density was limited; None if it was not."""
        cut = [tensor for tensor in self.tensors if tensor.energy is not None]
        whole = sum(tensor.energy or 0.0 for tensor in cut)
        return sum(tensor.energy_kept or 0.0 for tensor in cut) / whole if whole else None
