"""The report of a conversion: what it keeps, per tensor and in all."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from shira_format._core.notices import NamesNotice
from shira_format.convert.effect import Effect, lost, words
from shira_format.tensors import Totals, density, numel

LOW_ENERGY = 0.5  # below this share of the update's energy, much of the source's effect is lost


@dataclass(frozen=True)
class TensorReport:
    """What is kept of one weight; energies are sums of squares of the update.

    Attributes:
        name: the weight.
        shape: its shape.
        dtype: its dtype.
        nnz: number of stored entries.
        energy: of the whole update.
        energy_stored: of the update at the stored entries.
        error: of the update without what is stored.
        energy_selected: of the update at the selected entries, stored or not.
        energy_moved: of the differences between the stored values and the base's.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nnz: int
    energy: float
    energy_stored: float
    error: float
    energy_selected: float = 0.0
    energy_moved: float = 0.0

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return numel(self.shape)

    @property
    def density(self) -> float:
        """``nnz / numel``; 0 for a weight without elements."""
        return density(self.nnz, self.numel)

    @property
    def energy_kept(self) -> float:
        """Share of the update's energy at the stored entries, in [0, 1]; 1 for an update of zeros."""
        return self.energy_stored / self.energy if self.energy else 1.0

    @property
    def relative_error(self) -> float:
        """``||update - stored|| / ||update||`` in the Frobenius norm, rounding to the base's dtype included.

        The part that is left out is a difference of sums in float32: below about 1e-4 the figure is an upper bound.
        """
        return math.sqrt(self.error / self.energy) if self.energy else 0.0

    @property
    def effect(self) -> Effect:
        """What was selected, and what the stored entries change."""
        return Effect(self.name, self.energy_selected, self.energy_moved)

    @property
    def notes(self) -> dict[str, float]:
        """Keys for the tensor's item in the manifest."""
        return {
            "energy_kept": six_digits(self.energy_kept),
            "relative_error": six_digits(self.relative_error),
        }


def six_digits(number: float) -> float:
    """``number`` rounded: sums of floats may differ beyond that between machines, and the bytes of files must not."""
    return float(f"{number:.6g}")


@dataclass
class ConversionReport(Totals):
    """The report of one conversion.

    Attributes:
        tensors: the sparse tensors.
        whole: names of the tensors that are replaced as a whole.
        structure: what changes beyond entries, by name: ``"new"``, ``"removed"``, ``"rows 100 -> 104"``, ...
        unchanged: number of compared tensors that do not change.
        left_out: names of the source that need no place in the adapter or that the user left out, by the reason.
        exact: whether every difference is stored.
        fitted: whether values were fitted to what the source does to a model: they may be far from its update.
        sums: the effects of additions to tensors that are stored whole.
        notices: what a user should know.
        file_bytes: the size of the file; None if none was written.
    """

    tensors: list[TensorReport] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    structure: dict[str, str] = field(default_factory=dict)
    unchanged: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)
    exact: bool = False
    fitted: bool = False
    sums: list[Effect] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    file_bytes: int | None = None

    def _total(self) -> TensorReport:
        return TensorReport(
            "", (self.numel,), "", self.nnz,
            *(sum(getattr(t, key) for t in self.tensors) for key in ("energy", "energy_stored", "error")),
        )  # fmt: skip

    @property
    def energy_kept(self) -> float:
        """Share of the energy of all updates together."""
        return self._total().energy_kept

    @property
    def relative_error(self) -> float:
        """Relative error of all updates together."""
        return self._total().relative_error

    @property
    def names(self) -> list[str]:
        """The notices of what was done with names."""
        return [notice for notice in self.notices if isinstance(notice, NamesNotice)]

    @property
    def effects(self) -> list[Effect]:
        """What was selected of each tensor's update, and what the stored values change."""
        return [*(tensor.effect for tensor in self.tensors), *self.sums]

    def warnings(self) -> list[str]:
        """Warnings about what is lost; empty if little is."""
        if self.exact:
            return []
        found = []
        if self.energy_kept < LOW_ENERGY and not self.fitted:
            found.append(
                f"only {self.energy_kept:.1%} of the update's energy is kept (relative error {self.relative_error:.2f}): "
                "the adapter will do much less than its source. A higher density keeps more; so does training a "
                "sparse adapter, instead of cutting a dense one down."
            )
        if rounded := lost(self.effects):
            found.append(
                f"rounding to the base's dtype takes away the updates of {len(rounded)} of {len(self.effects)} tensors: norms of "
                f"what is stored, and of what was selected: {words(rounded)}"
            )
        gone = {effect.name for effect in rounded}
        if not self.fitted and (unchanged := [t.name for t in self.tensors if t.nnz == 0 and t.name not in gone]):
            found.append(
                f"{len(unchanged)} of {len(self.tensors)} tensors keep no entry at all, for example {unchanged[0]!r}: "
                "their updates are zero, or none of their entries was selected"
            )
        return found
