"""The content of a merge report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shira_analysis.measures.layer_kinds import KINDS
from shira_analysis.measures.pairs import Measures, Pair
from shira_analysis.merging.accounts import Account, Trial, summed
from shira_analysis.merging.lemmas import PairLemmas

MEASURE = (
    "kept = 1 - sum of ||r - w_i d_i||^2 / sum of ||w_i d_i||^2, over all adapters i with a weight other than 0, each at its own entries: d_i "
    "are its deltas, w_i is its weight times its alpha, and r are the deltas of the result. 1: every adapter's change is kept exactly; "
    "below 0: worse than dropping all of them"
)
LIMITS = (
    "It compares weights, not results on tasks. Every difference from w_i d_i counts as a loss, also an intended one, such as a mean where "
    "adapters agree, or rescaling after entries were dropped. The other methods run with the chosen method's options where they have the same "
    "ones, else with their defaults, at which most pruning methods drop nothing; random methods use the seed in their options. Tensors that "
    "are replaced as a whole are not included"
)


@dataclass(frozen=True)
class MergedPair:
    """Two of the adapters.

    Attributes:
        numbers: which two, from 0.
        pair: their measures, at strength 1, or -1 where an adapter's weight is negative.
        lemmas: whether lemmas 4.4 and 4.5 apply.
    """

    numbers: tuple[int, int]
    pair: Pair
    lemmas: PairLemmas

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        found = self.pair.as_json()
        found["whole"] |= conflicts(self.pair.whole)
        for kind, measures in self.pair.kinds.items():
            found["kinds"][kind] |= conflicts(measures)
        lemmas = {one.name: one.as_json() for one in self.lemmas.tensors}
        for row, one in zip(found["tensors"], self.pair.tensors, strict=True):
            of_lemmas = lemmas.get(one.name)
            row.update(conflicts(one.measures))
            row.update({key: None if of_lemmas is None else of_lemmas[key] for key in ("lemma_4_4", "lemma_4_5")})
        return {"numbers": list(self.numbers)} | found | {"lemmas": self.lemmas.as_json()}


def conflicts(measures: Measures) -> dict[str, Any]:
    """Sign conflicts: the number of shared entries with opposite signs, and their share."""
    return {"sign_conflicts": measures.overlap.opposite_sign, "sign_conflict_share": conflict_share(measures)}


def conflict_share(measures: Measures) -> float | None:
    """Sign conflicts as a share of the shared entries; None if no entry is shared."""
    common = measures.overlap
    return None if common.opposite_sign is None or not common.shared else common.opposite_sign / common.shared


@dataclass(frozen=True)
class TensorAfter:
    """One weight of the result.

    Attributes:
        name: of the weight.
        shape: of the weight.
        kind: of its layer.
        nnz: entries of the result.
        accounts: of the adapters.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    nnz: int
    accounts: list[Account]

    @property
    def disturbed(self) -> float:
        """The largest value of any adapter; 0 if none is known."""
        return max((one.disturbed or 0.0 for one in self.accounts), default=0.0)


@dataclass
class MergeAnalysis:
    """A merge: how the adapters interfere, what is left of each, and what other methods would keep.

    Attributes:
        labels: of the adapters.
        weights: of each, for layers without weights of their own; not multiplied by alpha.
        alphas: of each.
        strengths: of each, the factors of its deltas, increasing: several if layers have weights of their own.
        settings: method, options and settings for some layers, as JSON values.
        density: the largest allowed density of a tensor of the result; None: no limit.
        pairs: how each two adapters interfere.
        after: the weights of the result; empty if the merge is refused.
        trials: the chosen method, then the others.
        whole: names of tensors that are replaced as a whole, which are not measured.
        fed: whether there are moments of the layers' inputs.
        notes: what is not measured and why.
    """

    labels: list[str]
    weights: list[float]
    alphas: list[float]
    strengths: list[list[float]]
    settings: dict[str, Any]
    density: float | None
    pairs: list[MergedPair] = field(default_factory=list)
    after: list[TensorAfter] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    fed: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The adapters' names: file names if they differ, else labels, else with a number."""
        short = [Path(label).name for label in self.labels]
        for names in (short, self.labels):
            if len(set(names)) == len(names):
                return names
        return [f"{name} ({at})" for at, name in enumerate(short, 1)]

    @property
    def strength_words(self) -> list[str]:
        """The strength of each adapter in the merge."""
        return [
            f"{all_[0]:g}" if len(all_) == 1 else f"{all_[0]:g} to {all_[-1]:g}, by layer"
            for all_ in self.strengths
        ]

    @property
    def chosen(self) -> Trial:
        """The chosen method."""
        return self.trials[0]

    @property
    def kinds(self) -> dict[str, list[Account]]:
        """The adapters' accounts for each kind of layer, in the order of ``KINDS``."""
        found = {kind: [one.accounts for one in self.after if one.kind == kind] for kind in KINDS}
        return {kind: summed(accounts, len(self.labels)) for kind, accounts in found.items() if accounts}

    @property
    def ranked(self) -> list[Trial]:
        """The methods with a result, best first; among equals the chosen one first."""
        known = [trial for trial in self.trials if trial.kept is not None]
        # Rounded, since methods may compute the same result in different ways.
        return sorted(known, key=lambda trial: (-round(trial.kept or 0.0, 9), not trial.chosen))

    @property
    def refused(self) -> list[Trial]:
        """The methods without a result."""
        return [trial for trial in self.trials if trial.refused is not None]

    def warnings(self) -> list[str]:
        """What to know before using the result, in sentences."""
        from shira_analysis.merging.sentences import warnings

        return warnings(self)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; what is undefined or was not measured is null."""
        return {
            "inputs": [
                {"label": label, "weight": weight, "alpha": alpha, "strengths": strengths}
                for label, weight, alpha, strengths in zip(
                    self.labels, self.weights, self.alphas, self.strengths, strict=True
                )
            ],
            **self.settings,
            "density": self.density,
            "before": {"pairs": [pair.as_json() for pair in self.pairs]},
            "after": {
                "refused": self.chosen.refused,
                "energy_lost_to_density": self.chosen.lost_to_cut,
                "inputs": None if self.chosen.refused is not None else self._accounts(self.chosen.accounts),
                "kinds": {kind: self._accounts(accounts) for kind, accounts in self.kinds.items()},
                "tensors": [
                    {
                        "name": one.name,
                        "shape": list(one.shape),
                        "kind": one.kind,
                        "nnz": one.nnz,
                        "inputs": self._accounts(one.accounts),
                    }
                    for one in self.after
                ],
            },
            "methods": {
                "measure": MEASURE,
                "limits": LIMITS,
                "ranked": [trial.as_json(self.labels) for trial in self.ranked],
                "not_ranked": [
                    trial.as_json(self.labels)
                    | {"refused": trial.refused or "nothing to keep, or the result is not finite"}
                    for trial in self.trials
                    if trial.kept is None
                ],
            },
            "whole": self.whole,
            "warnings": self.warnings(),
            "notes": self.notes,
        }

    def _accounts(self, accounts: Sequence[Account]) -> list[dict[str, Any]]:
        return [{"label": label} | one.as_json() for label, one in zip(self.labels, accounts, strict=True)]

    def text(self) -> str:
        """The report for people, as text with tables."""
        from shira_analysis.merging.text import text

        return text(self)
