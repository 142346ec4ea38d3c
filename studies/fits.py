"""What a sparse adapter keeps of its source: cuts, fits, supports, and other small forms of the same source at equal bytes.

The sources are the two LoRAs that ship with the commands, for classifiers on all-MiniLM-L6-v2, a full fine-tune of the same model for
embeddings, and a LoRA of SmolLM2 that is trained here on one genre's passages. Fits see texts without labels; what is kept is measured on the held-out texts that ship.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from studies.runs import Run, Store

LORAS = ("spam", "genre")
TUNED = "sre"
LANGUAGE = "smollm2"
SOURCES = (*LORAS, TUNED, LANGUAGE)
DENSITIES = (0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
MAIN = (0.0005, 0.002, 0.01)  # with all seeds, and for the fine-tune
LANGUAGE_DENSITIES = (0.0, 0.005, 1.0)
SUPPORTED = 0.002  # the density at which supports and rivals are compared
SEEDS = (0, 1)
STEPS, LANGUAGE_STEPS = 300, 60
TOKENS, BATCH = 64, 8
# Of how many texts to fit on; None: all.
COUNTS = (16, 64, 128, None)


@dataclass(frozen=True)
class Method:
    """A way to make something small of a source.

    Attributes:
        label: in tables.
        kind: ``"base"`` or ``"source"`` alone, ``"cut"``, ``"moments"``, ``"distill"``, or what :mod:`studies.fit_rivals` has.
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
    "base": Method("base", "base", densities=(0.0,), sources=SOURCES),
    "source": Method("source", "source", densities=(1.0,), sources=SOURCES),
    "cut": Method("plain cut, per tensor", "cut", "tensor", densities=DENSITIES, sources=SOURCES),
    "cut-global": Method("plain cut, all tensors together", "cut", "global", densities=DENSITIES, sources=SOURCES),
    "moments": Method("moments", "moments", densities=DENSITIES, sources=SOURCES),
    "distill": Method("distill", "distill", "product", drawn=True, densities=DENSITIES, sources=SOURCES),
    "magnitude": Method("distill, largest updates", "distill", "magnitude", sources=("spam",)),
    "gradient": Method("distill, largest gradients", "distill", "gradient", sources=("spam",)),
    "fisher": Method("distill, Fisher information", "distill", "fisher", sources=("spam",)),
    "wm": Method("distill, largest weights", "distill", "wm", sources=("spam",)),
    "random": Method("distill, random entries", "distill", "random", sources=("spam",)),
    "runs": Method(
        "distill, runs of 16", "distill", "product", run=16, densities=(0.002, 0.01), sources=("spam",)
    ),
    "low-rank": Method("LoRA of lower rank, distilled", "low-rank", densities=(0.0005, 0.002, 0.01)),
    "dare": Method("DARE", "dare", densities=(0.002, 0.01, 0.05), sources=("spam",)),
    "darex": Method("DAREx-q", "darex", densities=(0.002, 0.01, 0.05), sources=("spam",)),
    "learned": Method("learned mask (Localize-and-Stitch)", "learned", densities=(0.002, 0.01), sources=("spam",)),
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


def _fits(source: str, method: Method, density: float) -> bool:
    """Whether this density of a source is in the study: all of the LoRAs, some of those that take longer."""
    if source == LANGUAGE:
        return density in LANGUAGE_DENSITIES
    return source in LORAS or method.kind not in ("distill", "moments") or density in MAIN


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
                for source in method.sources:
                    for density in method.densities:
                        again = method.drawn and density in MAIN and source in LORAS
                        if _fits(source, method, density) and (again or not number):
                            yield FitRun(source, name, density, seed, self._steps(source, method))
        for count in COUNTS[:-1]:
            yield from (
                FitRun(source, "distill", SUPPORTED, self.seeds[0], self.steps, count or 0) for source in LORAS
            )

    def _steps(self, source: str, method: Method) -> int:
        if method.kind not in ("distill", "low-rank", "learned"):
            return 0
        return min(self.steps, LANGUAGE_STEPS) if source == LANGUAGE else self.steps

    def following(self, store: Store) -> list[FitRun]:
        """The runs that are left."""
        return [
            run
            for run in self.runs()
            if run not in store and re.search(self.only, f"{run.source} {run.method} {run.density:g}")
        ]
