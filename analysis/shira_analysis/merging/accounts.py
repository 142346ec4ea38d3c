"""What is left of each adapter in the result of a merge, for any method.

Adapter i is compared with the result at its own entries: alone it adds ``w_i d_i``, its weight times its deltas; the result
adds ``r``, rounded to the weight's dtype as it will be written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shira_analysis.measures.additive import Additive, attributes
from shira_analysis.measures.overlap import finite
from shira_format.entries.aligned import AlignedEntries, Factor
from shira_format.entries.mixing import mix
from shira_format.merging import Method
from shira_format.merging.density import limit_density
from shira_format.tensors import SparseTensor


@dataclass(frozen=True)
class Account(Additive):
    """What is left of one adapter in some tensors, at a merge weight other than 0; ``+`` adds two up.

    Attributes:
        entries: the number of its entries.
        dropped: those that the method or the density limit leaves out.
        energy: ``||w d||^2`` (the sum of squares).
        dropped_energy: the energy of the dropped entries.
        off: ``||r - w d||^2`` at its entries, dropped ones included; infinite if the result is not finite.
    """

    entries: int = 0
    dropped: int = 0
    energy: float = 0.0
    dropped_energy: float = 0.0
    off: float = 0.0

    @property
    def dropped_share(self) -> float | None:
        """The share of its entries that are dropped; None if it has no entries."""
        return self.dropped / self.entries if self.entries else None

    @property
    def energy_dropped(self) -> float | None:
        """The share of its energy that is dropped; None without energy."""
        return _share(self.dropped_energy, self.energy)

    @property
    def disturbed(self) -> float | None:
        """``||r - w d||^2 / ||w d||^2``: 0 if its change is kept exactly; None without energy, or if not finite."""
        return _share(self.off, self.energy)

    @property
    def kept(self) -> float | None:
        """``1 - disturbed``."""
        return None if self.disturbed is None else 1 - self.disturbed

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; undefined ones are null."""
        return attributes(
            self, "entries", "dropped", "dropped_share", "energy", "energy_dropped", "disturbed", "kept"
        )


def _share(part: float, whole: float) -> float | None:
    found = part / whole if whole else math.inf
    return found if math.isfinite(found) else None


def summed(accounts: Iterable[Sequence[Account]], count: int) -> list[Account]:
    """The sum over all weights, for each of ``count`` adapters."""
    found = [Account()] * count
    for one in accounts:
        found = [a + b for a, b in zip(found, one, strict=True)]
    return found


@dataclass
class Trial:
    """The result of one method on all weights.

    Attributes:
        method: its name.
        options: of the method, for weights without options of their own.
        chosen: whether it is the chosen method, which may have other options for some layers.
        accounts: of the adapters.
        refused: why there is no comparable result; else None.
        energy: energy of the result's deltas before the density limit; 0 without a limit.
        energy_cut: the part of it that the density limit drops.
    """

    method: str
    options: dict[str, Any]
    chosen: bool
    accounts: list[Account] = field(default_factory=list)
    refused: str | None = None
    energy: float = 0.0
    energy_cut: float = 0.0

    @property
    def lost_to_cut(self) -> float | None:
        """The share of the result's energy that the density limit drops; None without a limit or a result."""
        return None if self.refused is not None else _share(self.energy_cut, self.energy)

    @property
    def kept(self) -> float | None:
        """``1 - sum of ||r - w_i d_i||^2 / sum of ||w_i d_i||^2``, over the adapters; None if it has no result."""
        return None if self.refused is not None else sum(self.accounts, Account()).kept

    @property
    def worst(self) -> tuple[int, float] | None:
        """The adapter that keeps the least, by its number, and how much; None if there is no result."""
        known = [(number, one.kept) for number, one in enumerate(self.accounts) if one.kept is not None]
        return None if self.kept is None else min(known, key=lambda found: found[1], default=None)

    def as_json(self, labels: Sequence[str]) -> dict[str, Any]:
        """Plain JSON values."""
        worst = self.worst
        return {
            "method": self.method,
            "options": self.options,
            "chosen": self.chosen,
            "kept": self.kept,
            "worst": None if worst is None else {"number": worst[0], "input": labels[worst[0]], "kept": worst[1]},
            "inputs": None if self.refused is not None else [one.kept for one in self.accounts],
            "refused": self.refused,
        }


@dataclass(frozen=True)
class Outcome:
    """The result of a method for one weight.

    Attributes:
        result: its entries; None if there are none.
        accounts: of the adapters.
        energy: see :class:`Trial`.
        energy_cut: see :class:`Trial`.
    """

    result: SparseTensor | None
    accounts: list[Account]
    energy: float
    energy_cut: float


def outcome(aligned: AlignedEntries, method: Method, options: Mapping[str, Any], density: float | None) -> Outcome:
    """Apply a method to one weight.

    Raises:
        SourceError: the method refuses it, or an energy is too large for float64.
        BaseRequired, BaseMismatch: see :func:`shira_format.entries.mixing.mix`.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # the accounts show a result that is not finite
        factors = method.factors(aligned, options)
        result = mix(aligned, factors, self_contained=True)
        energy = kept = 0.0
        if result is not None and density is not None:
            result, energy, kept = limit_density(result, density)
        return Outcome(result, _accounts(aligned, factors, result), energy, energy - kept)


def _accounts(aligned: AlignedEntries, factors: Sequence[Factor], result: SparseTensor | None) -> list[Account]:
    step, there = np.zeros(aligned.size), np.zeros(aligned.size, bool)
    if result is not None:
        at = np.searchsorted(aligned.indices, result.indices)
        there[at] = True
        values = result.values.astype(np.float64)
        if result.value_kind == "target":
            assert result.base is not None
            values -= result.base.astype(np.float64)
        step[at] = values
    found = []
    for part, at, factor in zip(aligned.parts, aligned.places, factors, strict=True):
        if not part.weight or not at.size:
            found.append(Account())
            continue
        due = part.weight * part.delta
        gone = (np.broadcast_to(np.asarray(factor), at.shape) == 0) | ~there[at]
        off = float(np.square(step[at] - due).sum())
        energy = finite(
            float(np.square(due).sum()), f"{part.label}: tensor {aligned.name!r}: the energy of the delta"
        )
        found.append(
            Account(
                int(at.size), int(np.count_nonzero(gone)), energy, float(np.square(due[gone]).sum()),
                off if math.isfinite(off) else math.inf,
            )
        )  # fmt: skip
    return found
