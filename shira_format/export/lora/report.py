"""The report of an export to a LoRA: what it keeps, per weight and in all."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from shira_format.convert.report import LOW_ENERGY
from shira_format.tensors import numel

ZERO = "since their updates are zero"  # a reason to leave out tensors


@dataclass(frozen=True)
class LayerReport:
    """What is kept of one weight; S is the adapter's delta as a matrix ``[shape[0], product of the others]``.

    Attributes:
        name: the adapter's tensor.
        module: the module of the live model that the LoRA adapts.
        kind: ``"linear"``, ``"conv1d"`` (transformers' layers with weights ``[in, out]``), ``"conv"`` or ``"embedding"``.
        shape: the weight's shape.
        nnz: entries of the adapter.
        rank: the rank used.
        full_rank: the smaller number of rows and columns with an entry.
        norm: Frobenius norm of S.
        error: Frobenius norm of S minus the factors as written.
        spectral_error: its spectral norm, to 1e-4.
        bound: what ``error`` would be without rounding, sqrt of the sum of sigma_i^2 over i > rank (lemma 4.2, put right; see
            :mod:`shira_format.export.lora.factors`); noise below about 3e-8 of ``norm``.
        spectral_bound: likewise of ``spectral_error``: sigma_{rank+1}.
        energy_kept: share of the sum of squares.
        method: how the singular triplets were computed.
    """

    name: str
    module: str
    kind: str
    shape: tuple[int, ...]
    nnz: int
    rank: int
    full_rank: int
    norm: float
    error: float
    spectral_error: float
    bound: float
    spectral_bound: float
    energy_kept: float
    method: str

    @property
    def parameters(self) -> int:
        """Numbers in both factors."""
        return self.rank * (self.shape[0] + numel(self.shape[1:]))

    @property
    def relative_error(self) -> float:
        """``error`` by ``norm``."""
        return self.error / self.norm if self.norm else 0.0


@dataclass
class LoraReport:
    """The report of one conversion.

    Attributes:
        layers: the weights that the LoRA adapts.
        saved: names of the tensors in ``modules_to_save``.
        left_out: names of the adapter's tensors that are not in the LoRA, by the reason.
        notices: what a user should know.
        adapter_bytes: size of the adapter's file.
        folder_bytes: size of the LoRA's files; None for a dry run.
    """

    layers: list[LayerReport] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    adapter_bytes: int = 0
    folder_bytes: int | None = None

    @property
    def nnz(self) -> int:
        """Entries of the adapted weights."""
        return sum(layer.nnz for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Numbers in all factors."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def norm(self) -> float:
        """Frobenius norm of all updates together."""
        return math.hypot(*(layer.norm for layer in self.layers))

    @property
    def error(self) -> float:
        """Frobenius norm of what all updates together lose."""
        return math.hypot(*(layer.error for layer in self.layers))

    @property
    def bound(self) -> float:
        """What ``error`` would be without rounding."""
        return math.hypot(*(layer.bound for layer in self.layers))

    @property
    def relative_error(self) -> float:
        """``error`` by ``norm``."""
        return self.error / self.norm if self.norm else 0.0

    @property
    def energy_kept(self) -> float:
        """Share of the sum of squares of all updates together."""
        if not self.norm:
            return 1.0
        return sum(layer.energy_kept * (layer.norm / self.norm) ** 2 for layer in self.layers)

    def warnings(self) -> list[str]:
        """Warnings about what is lost; empty if little is."""
        if self.energy_kept >= LOW_ENERGY:
            return []
        text = (
            f"only {self.energy_kept:.1%} of the update's energy is kept (relative error {self.relative_error:.2f}): the LoRA "
            "will do much less than the adapter, whose rank is high. A higher rank keeps more; the adapter itself keeps all."
        )
        return [text]
