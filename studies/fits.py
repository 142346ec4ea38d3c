"""What a sparse adapter keeps of its source: cuts, fits, supports, and other small forms of the same source at equal bytes.

The sources are the two LoRAs that ship with the commands, for classifiers on all-MiniLM-L6-v2, and a full fine-tune of the same model
for embeddings. Fits see texts without labels; what is kept is measured on the held-out texts that ship.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from studies.runs import Run, Store

LORAS = ("spam", "genre")
TUNED = "sre"
SOURCES = (*LORAS, TUNED)
DENSITIES = (0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
MAIN = (0.0005, 0.002, 0.01)  # with all seeds, and for the fine-tune
SUPPORTED = 0.002  # the density at which supports and rivals are compared
SEEDS = (0, 1, 2)
STEPS = 150
TOKENS, BATCH = 64, 16
# Of how many texts to fit on; None: all.
COUNTS = (16, 64, 128, 256, None)


@dataclass(frozen=True)
class Method:
    """A way to make something small of a source.

    Attributes:
        label: in tables.
        kind: ``"cut"``, ``"moments"``, ``"distill"``, or what :mod:`studies.fit_rivals` has.
        support: by which entries are chosen.
        run: entries in a row.
        drawn: it depends on the seed.
        densities: at which it is made.
        sources: of which.
    """

    label: str
    kind: str
    support: str = ""
    run: int = 1
    drawn: bool = False
    densities: tuple[float, ...] = (SUPPORTED,)
    sources: tuple[str, ...] = LORAS


METHODS = {
    "cut": Method("plain cut, per tensor", "cut", "tensor", densities=DENSITIES, sources=SOURCES),
    "cut-global": Method("plain cut, all tensors together", "cut", "global", densities=DENSITIES, sources=SOURCES),
    "moments": Method("moments", "moments", densities=MAIN, sources=SOURCES),
    "distill": Method("distill", "distill", "product", drawn=True, densities=DENSITIES, sources=SOURCES),
    "magnitude": Method("distill, largest updates", "distill", "magnitude"),
    "gradient": Method("distill, largest gradients", "distill", "gradient"),
    "fisher": Method("distill, Fisher information", "distill", "fisher"),
    "wm": Method("distill, largest weights", "distill", "wm"),
    "random": Method("distill, random entries", "distill", "random"),
    "runs": Method("distill, runs of 16", "distill", "product", run=16, densities=(0.002, 0.01)),
    "low-rank": Method("LoRA of lower rank, distilled", "low-rank", densities=(0.002, 0.01)),
    "dare": Method("DARE", "dare", densities=(0.002, 0.01, 0.05)),
    "darex": Method("DAREx-q", "darex", densities=(0.002, 0.01, 0.05)),
    "learned": Method("learned mask (Localize-and-Stitch)", "learned", densities=(0.002, 0.01)),
}


@dataclass(frozen=True)
class FitRun(Run):
    """One adapter, or what stands in its place.

    Attributes:
        source: of :data:`SOURCES`.
        method: of :data:`METHODS`.
        density: share of the weights that the source changes; of a LoRA of lower rank: of the adapter whose bytes it may have.
        seed: of all that is drawn.
        steps: of a distillation; 0 for others.
        texts: to fit on, as many; 0: all.
    """

    source: str
    method: str
    density: float
    seed: int
    steps: int
    texts: int = 0


@dataclass(frozen=True)
class Plan:
    """What the study consists of.

    Attributes:
        steps: of the distillations.
        seeds: of what is drawn, at the densities of :data:`MAIN`; elsewhere the first alone.
        only: those of whose "SOURCE METHOD DENSITY" it finds a part.
    """

    steps: int = STEPS
    seeds: Sequence[int] = SEEDS
    only: str = ""

    def runs(self) -> Iterator[FitRun]:
        """All runs: first one seed of all, then the others, then fewer texts."""
        for number, seed in enumerate(self.seeds):
            for name, method in METHODS.items():
                steps = self.steps if method.kind in ("distill", "low-rank", "learned") else 0
                for source in method.sources:
                    for density in method.densities:
                        main = density in MAIN and source != TUNED
                        if (source == TUNED and method.drawn and density not in MAIN) or (
                            number and not (method.drawn and main)
                        ):
                            continue
                        yield FitRun(source, name, density, seed, steps)
        for count in COUNTS[:-1]:
            yield from (
                FitRun(source, "distill", SUPPORTED, self.seeds[0], self.steps, count or 0) for source in LORAS
            )

    def following(self, store: Store) -> list[FitRun]:
        """The runs that are left."""
        return [
            run
            for run in self.runs()
            if run not in store and re.search(self.only, f"{run.source} {run.method} {run.density:g}")
        ]
