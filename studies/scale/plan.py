"""Small language models, their fine-tunes, and sparse adapters at several densities."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from studies.runs import Run, Store

MODELS = ((64, 2), (64, 4), (128, 2), (128, 4), (256, 2))
"""Hidden size and layers."""
DENSITIES = (0.001, 0.005, 0.02, 0.1)
METHODS = {"trained": "SHiRA-WM, trained", "fitted": "fitted to the fine-tune"}
PRETRAINING, TUNING = 600, 150  # steps
LENGTH, BATCH = 128, 8  # bytes of a passage, passages of a step
HELD = 160  # passages
CORPUS = ("genre", "editorial", "hobbies", "learned", "lore")  # of which the texts are pretrained on
TARGET = "spam"  # mails, to which the model is tuned


@dataclass(frozen=True)
class ScaleRun(Run):
    """One model, tuned in one way.

    Attributes:
        hidden: size.
        layers: blocks.
        method: ``"base"``: pretrained, ``"full"``: all matrices of the blocks are tuned, or of :data:`METHODS`.
        density: of the entries in these matrices; 0 of the base, 1 of the full fine-tune.
        seed: of everything that is drawn.
        steps: of the pretraining; a tuning takes a quarter.
    """

    hidden: int
    layers: int
    method: str
    density: float
    seed: int
    steps: int

    @property
    def base(self) -> ScaleRun:
        """The pretraining of its model."""
        return ScaleRun(self.hidden, self.layers, "base", 0.0, self.seed, self.steps)

    @property
    def full(self) -> ScaleRun:
        """The fine-tune of its model."""
        return ScaleRun(self.hidden, self.layers, "full", 1.0, self.seed, self.steps)


@dataclass(frozen=True)
class Plan:
    """What the study consists of.

    Attributes:
        models: hidden sizes and layers.
        densities: of the adapters.
        seeds: how many.
        steps: of a pretraining.
        only: those of whose "HIDDEN LAYERS METHOD DENSITY" it finds a part.
    """

    models: Sequence[tuple[int, int]] = MODELS
    densities: Sequence[float] = DENSITIES
    seeds: int = 1
    steps: int = PRETRAINING
    only: str = ""

    def runs(self) -> Iterator[ScaleRun]:
        """All of them, model by model."""
        for seed in range(1, self.seeds + 1):
            for hidden, layers in self.models:
                base = ScaleRun(hidden, layers, "base", 0.0, seed, self.steps)
                yield from (base, base.full)
                for density in self.densities:
                    yield from (ScaleRun(hidden, layers, method, density, seed, self.steps) for method in METHODS)

    def following(self, store: Store) -> list[ScaleRun]:
        """The runs that can be done now: the base comes first, and its fine-tune before what is fitted to it."""
        found = []
        for run in self.runs():
            if run in store or not re.search(self.only, f"{run.hidden} {run.layers} {run.method} {run.density:g}"):
                continue
            needed = {"base": [], "full": [run.base], "trained": [run.base], "fitted": [run.base, run.full]}
            if all(one in store for one in needed[run.method]):
                found.append(run)
        return found
