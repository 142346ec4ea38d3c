"""What became of each adapter in the result of a merge, by any method.

The account of adapter i is taken at its own entries: there it was to add ``w_i d_i``, its weight times its deltas, and the result
adds ``r``, rounded to the weight's dtype as it will be written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shira_analysis.measures.overlap import finite
from shira_format.entries.aligned import AlignedEntries, Factor
from shira_format.entries.mixing import mix
from shira_format.merging import Method
from shira_format.merging.density import limit_density
from shira_format.tensors import SparseTensor


@dataclass(frozen=True)
class Account:
    """One adapter on some weights, as far as its weight in the merge is not 0; ``+`` joins it.

    Attributes:
        entries: that it has.
        dropped: those of which the result has nothing: the method left them out, or the cut to a density did.
        energy: ``||w d||^2``.
        dropped_energy: the same at the dropped entries.
        off: ``||r - w d||^2`` at its entries, dropped ones too; infinite if the result is not finite.
    """

    entries: int = 0
    dropped: int = 0
    energy: float = 0.0
    dropped_energy: float = 0.0
    off: float = 0.0

    @property
    def dropped_share(self) -> float | None:
        """Share of its entries; None if it has none."""
        return self.dropped / self.entries if self.entries else None

    @property
    def energy_dropped(self) -> float | None:
        """Share of its energy that was dropped; None without energy."""
        return _share(self.dropped_energy, self.energy)

    @property
    def disturbed(self) -> float | None:
        """``||r - w d||^2 / ||w d||^2``: 0 if it does at its entries what it does alone; None without energy, or if not finite."""
        return _share(self.off, self.energy)

    @property
    def kept(self) -> float | None:
        """``1 - disturbed``."""
        return None if self.disturbed is None else 1 - self.disturbed

    def __add__(self, other: Account) -> Account:
        return Account(
            self.entries + other.entries, self.dropped + other.dropped, self.energy + other.energy,
            self.dropped_energy + other.dropped_energy, self.off + other.off,
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; what is undefined is null."""
        return {
            "entries": self.entries,
            "dropped": self.dropped,
            "dropped_share": self.dropped_share,
            "energy": self.energy,
            "energy_dropped": self.energy_dropped,
            "disturbed": self.disturbed,
            "kept": self.kept,
        }


def _share(part: float, whole: float) -> float | None:
    found = part / whole if whole else math.inf
    return found if math.isfinite(found) else None


def summed(accounts: Iterable[Sequence[Account]], count: int) -> list[Account]:
    """Of each of ``count`` adapters, over all weights."""
    found = [Account()] * count
    for one in accounts:
        found = [a + b for a, b in zip(found, one, strict=True)]
    return found


@dataclass
class Trial:
    """One method on all weights.

    Attributes:
        method: its name.
        options: of the method, as far as they are the same for all weights.
        chosen: whether it is the one that was asked for, with its own options for some layers, too.
        accounts: of the adapters.
        refused: why there is no result, or none that compares; else None.
        energy: sum of squares of the result's deltas before it was cut to a density; 0 if it was not cut.
        energy_cut: that of those which were cut off.
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
        """Share of the result's energy that was cut off to reach a density; None if it was not cut, or there is no result."""
        return None if self.refused is not None else _share(self.energy_cut, self.energy)

    @property
    def kept(self) -> float | None:
        """``1 - sum of ||r - w_i d_i||^2 / sum of ||w_i d_i||^2``, over the adapters; None if it has no result."""
        return None if self.refused is not None else sum(self.accounts, Account()).kept

    @property
    def worst(self) -> tuple[int, float] | None:
        """The number of the adapter that keeps least, and how much; None likewise."""
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
    """What a method makes of one weight.

    Attributes:
        result: its entries; None: nothing.
        accounts: of the adapters.
        energy: see :class:`Trial`.
        energy_cut: likewise.
    """

    result: SparseTensor | None
    accounts: list[Account]
    energy: float
    energy_cut: float


def outcome(joined: AlignedEntries, method: Method, options: Mapping[str, Any], density: float | None) -> Outcome:
    """What a method makes of one weight.

    Raises:
        SourceError: the method refuses it, or an energy is too large for float64.
        BaseRequired, BaseMismatch: see :func:`shira_format.entries.mixing.mix`.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # a result that is not finite is told in the accounts
        factors = method.factors(joined, options)
        result = mix(joined, factors, self_contained=True)
        energy = kept = 0.0
        if result is not None and density is not None:
            result, energy, kept = limit_density(result, density)
        return Outcome(result, _accounts(joined, factors, result), energy, energy - kept)


def _accounts(joined: AlignedEntries, factors: Sequence[Factor], result: SparseTensor | None) -> list[Account]:
    step, there = np.zeros(joined.size), np.zeros(joined.size, bool)
    if result is not None:
        at = np.searchsorted(joined.indices, result.indices)
        there[at] = True
        values = result.values.astype(np.float64)
        if result.value_kind == "target":
            assert result.base is not None
            values -= result.base.astype(np.float64)
        step[at] = values
    found = []
    for part, at, factor in zip(joined.parts, joined.places, factors, strict=True):
        if not part.weight or not at.size:
            found.append(Account())
            continue
        due = part.weight * part.delta
        gone = (np.broadcast_to(np.asarray(factor), at.shape) == 0) | ~there[at]
        off = float(np.square(step[at] - due).sum())
        energy = finite(
            float(np.square(due).sum()), f"{part.label}: tensor {joined.name!r}: the energy of the delta"
        )
        found.append(
            Account(
                int(at.size), int(np.count_nonzero(gone)), energy, float(np.square(due[gone]).sum()),
                off if math.isfinite(off) else math.inf,
            )
        )  # fmt: skip
    return found
