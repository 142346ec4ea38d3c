"""What a training run was, and how good its result is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Quality:
    """On held-out texts.

    Attributes:
        texts: how many.
        loss: mean cross-entropy of a text's label, or of a token.
        accuracy: share of labels that are right; None of a causal model.
    """

    texts: int
    loss: float
    accuracy: float | None

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(min(self.loss, 700.0))


@dataclass
class Run:
    """One training.

    Attributes:
        method: ``"shira"`` or ``"lora"``.
        parameters: trained ones, without a new head.
        learning_rate: the highest of its schedule.
        tried: if it was searched for: the validation loss after a short run, for each learning rate.
        steps: of the optimizer, done.
        best_step: the one that was kept.
        seconds: of the training, validation included.
        losses: the training loss at each step.
        validation: step and quality, each time that it was measured.
        quality: of what was kept, on the validation texts.
        test: on the texts of the test file, if there is one.
    """

    method: str
    parameters: int
    learning_rate: float = 0.0
    tried: dict[float, float] = field(default_factory=dict)
    steps: int = 0
    best_step: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, Quality]] = field(default_factory=list)
    quality: Quality | None = None
    test: Quality | None = None


@dataclass
class TrainingReport:
    """What was trained, on what, and what came of it.

    Attributes:
        task: ``"classify"`` or ``"causal"``.
        labels: of a classifier.
        train: number of texts to train on.
        held_out: number of validation texts.
        test: number of texts of the test file.
        mask: what the mask is, as in its manifest.
        weights: number of masked weights.
        nnz: entries of the mask.
        numel: elements of the masked weights.
        new: elements that are trained whole because the base lacks them: a new head.
        runs: the trainings: the sparse one first.
        base: quality of the base's weights, under the trained head if that is new.
        base_test: the same, on the test file.
        file_bytes: size of the adapter; None for a dry run.
        notices: what a user should know.
    """

    task: str
    labels: tuple[str, ...] = ()
    train: int = 0
    held_out: int = 0
    test: int = 0
    mask: dict[str, object] = field(default_factory=dict)
    weights: int = 0
    nnz: int = 0
    numel: int = 0
    new: int = 0
    runs: list[Run] = field(default_factory=list)
    base: Quality | None = None
    base_test: Quality | None = None
    file_bytes: int | None = None
    notices: list[str] = field(default_factory=list)

    @property
    def density(self) -> float:
        """``nnz / numel``."""
        return self.nnz / self.numel if self.numel else 0.0
