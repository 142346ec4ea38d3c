"""What a fit did: how near the adapter is to its source on inputs that were held out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shira_format.convert.fit.quality import Effect
from shira_format.convert.fit.search import Trial
from shira_format.convert.report import ConversionReport

LOW_R2 = 0.9  # below this, much of the source's effect is lost


@dataclass
class FitReport:
    """The report of one fit.

    Attributes:
        method: of the fit.
        conversion: what was written, tensor by tensor.
        fit: how near the fitted entries are to the source, rounded, written and read back.
        plain: the same of the largest changes alone, as many of them.
        base: the same of the base, with the tensors that are replaced whole.
        kept: which of the two was written: ``"fit"`` or ``"plain"``, the nearer one.
        budget: entries that could be kept.
        options: of the method, split and seed.
        inputs: where the inputs come from, how many were fitted on, held out to measure on, and held out to choose the density by.
        goal: what a density was searched for: ``keep`` or ``max_bytes``; empty if it was given.
        trials: the fits that were made, in order; what they keep is measured on the inputs to choose the density by, if it was
            searched for.
        seconds: by stage.
        notices: what a user should know, beyond those of the conversion.
    """

    method: str
    conversion: ConversionReport
    fit: Effect
    plain: Effect
    base: Effect
    kept: str
    budget: int
    options: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    goal: dict[str, Any] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    @property
    def written(self) -> Effect:
        """How near the adapter that was kept is to the source."""
        return self.fit if self.kept == "fit" else self.plain

    def provenance(self) -> dict[str, Any]:
        """What the manifest says: no times, so that the same input gives the same bytes on one machine."""
        return {
            "method": self.method,
            "kept": self.kept,
            "effect": self.written.as_dict(),
            "plain": self.plain.as_dict(),
            "options": self.options,
            "inputs": self.inputs,
        } | ({"goal": self.goal} if self.goal else {})

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(replace(self, conversion=ConversionReport(), trials=[]))
        found |= {key: getattr(self, key).as_dict() for key in ("fit", "plain", "base")}
        conversion = {
            "nnz": self.conversion.nnz,
            "density": self.conversion.density,
            "tensors": len(self.conversion.tensors),
            "whole": list(self.conversion.whole),
            "file_bytes": self.conversion.file_bytes,
            "notices": list(self.conversion.notices),
        }
        seconds = {stage: round(one, 2) for stage, one in self.seconds.items()}
        trials = [trial.as_dict() for trial in self.trials]
        return found | {
            "conversion": conversion,
            "trials": trials,
            "seconds": seconds,
            "warnings": self.warnings(),
        }

    def warnings(self) -> list[str]:
        """What is lost."""
        found = self.conversion.warnings()
        if self.written.r2 < LOW_R2:
            found.append(
                f"R^2 is {self.written.r2:.3f} on held-out inputs: the adapter does less than its source. More entries, more "
                "steps or more inputs bring it nearer."
            )
        keep = self.goal.get("keep")
        if keep is not None and self.written.r2 < keep:
            found.append(
                f"R^2 is {keep:g} or more on the inputs that the density was chosen by, but {self.written.r2:.3f} on the others: ask for more, "
                "or give more inputs"
            )
        return found
