"""Ways to a sparse adapter beside a classifier's LoRA: cut from it, fitted to it, or trained in its place; accuracy on held-out texts, and effect."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shira_analysis.measures.classifier import LabelledTexts, logits
from shira_analysis.measures.effect import accuracy, effect
from shira_format.format import load
from shira_format.live import apply

# Of the fits and of the training: enough to see what they reach, in a minute or two each on two cores.
TOKENS, STEPS, EPOCHS = 64, 150, 3.0


_STAGES = {"cut": "cutting the LoRA", "fitted": "fitting an adapter to the LoRA", "trained": "training an adapter"}


@dataclass(frozen=True)
class Adapters:
    """The adapters to make.

    Attributes:
        cut: densities at which the LoRA's largest changes are kept as they are.
        fitted: densities at which entries are chosen and trained to do what the LoRA does (distillation).
        trained: densities at which rows, columns and diagonals of the weights are trained instead, without the LoRA; at most that much.
        scope: of the cuts: ``"tensor"`` or ``"global"``.
    """

    cut: Sequence[float]
    fitted: Sequence[float] = ()
    trained: Sequence[float] = ()
    scope: str = "tensor"

    def all(self) -> Iterator[tuple[str, float]]:
        """Way and density of each."""
        for way in _STAGES:
            for density in getattr(self, way):
                yield way, density


def compare_ways(
    lora: Path,
    held_out: LabelledTexts,
    train: Path,
    base: Path,
    adapters: Adapters,
    folder: Path,
    on_stage: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Make sparse adapters of one task, and compare them with its LoRA and the base on held-out texts.

    Args:
        lora: a PEFT folder with the LoRA, its classification head and ``metrics.json``.
        held_out: labelled texts, which have no part in any training.
        train: the file of labelled texts to train on, and without its labels to fit on.
        base: the base model's folder.
        adapters: to be made.
        folder: output folder; adapters are written as ``NAME-WAY-DENSITY.st``.
        on_stage: called with a line on what comes next.

    Returns:
        Plain JSON values; ``"adapters"`` has one row per adapter.

    Raises:
        ShiraError: the LoRA cannot be converted, or nothing be trained.
    """
    classifier = _Classifier(base, lora, held_out.texts)
    on_stage(f"{lora.name}: {len(held_out.texts)} held-out texts through base and LoRA")
    of_base, of_lora = classifier.base_logits(), classifier.lora_logits()
    rows = []
    for way, density in adapters.all():
        on_stage(f"{lora.name}: {_STAGES[way]} at {100 * density:g} %")
        path, start = adapter_path(folder, lora.name, way, density), time.perf_counter()
        if way == "cut":
            row = _cut(lora, base, path, density, adapters.scope)
        elif way == "fitted":
            row = _fitted(lora, base, train, path, density)
        else:
            row = _trained(base, train, path, density)
        seconds = time.perf_counter() - start
        with classifier.adapted(path):
            of_adapter = classifier.logits()
        # An adapter trained from scratch has a head of its own: it does the same task, but not as the LoRA does it.
        found = effect(of_base, of_lora, of_adapter) if way != "trained" else None
        rows.append(
            {"way": way, "density": density, "seconds": seconds, "file_bytes": path.stat().st_size}
            | row
            | {
                "accuracy": accuracy(of_adapter, held_out.labels),
                "effect_kept": found and found.kept,
                "effect_cosine": found and found.cosine,
            }
        )
    return {
        "task": lora.name,
        "texts": len(held_out.texts),
        "accuracy_base": accuracy(of_base, held_out.labels),
        "accuracy_lora": accuracy(of_lora, held_out.labels),
        # A separate head, fitted to the base's encoder when the LoRA was trained: what the task reaches without an adapter.
        "accuracy_head_only": json.loads((lora / "metrics.json").read_text("utf-8"))["head_only"],
        "lora_bytes": (lora / "adapter_model.safetensors").stat().st_size,
        "adapters": rows,
    }


def adapter_path(folder: Path, name: str, way: str, density: float) -> Path:
    """The path of the adapter made this way at ``density``."""
    return folder / f"{name}-{way}-{density:g}.st"


def _cut(lora: Path, base: Path, path: Path, density: float, scope: str) -> dict[str, Any]:
    from shira_format.convert.lora import lora_to_shira

    report = lora_to_shira(lora, base, path, density=density, scope=scope)
    return {"nnz": report.nnz, "energy_kept": report.energy_kept}


def _fitted(lora: Path, base: Path, texts: Path, path: Path, density: float) -> dict[str, Any]:
    from shira_format.convert.fit.distill import Distillation
    from shira_format.convert.fit.run import FitOptions, fit_lora

    options = FitOptions(distillation=Distillation(steps=STEPS), length=TOKENS)
    report = fit_lora(lora, base, path, texts, density=density, options=options)
    return {"nnz": report.conversion.nnz, "energy_kept": None}


def _trained(base: Path, train: Path, path: Path, density: float) -> dict[str, Any]:
    from shira_format.masks.plan import MaskPlan
    from shira_format.masks.registry import rule_of
    from shira_format.masks.size import Size
    from shira_format.training.fit import Schedule
    from shira_format.training.run import Plan, train_adapter

    mask = MaskPlan(rule_of("struct"), Size(density=density))
    plan = Plan("classify", mask, schedule=Schedule(epochs=EPOCHS, evaluations=3), max_length=TOKENS)
    report = train_adapter(base, train, path, plan)
    return {"density": report.nnz / report.numel, "nnz": report.nnz, "energy_kept": None}


class _Classifier:
    """The classifier: with the base's weights, with the LoRA through PEFT, or with an adapter applied."""

    def __init__(self, base: Path, lora: Path, texts: Sequence[str]) -> None:
        # All files are local; contacting the hub would only cost time.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import AutoTokenizer

        self._base, self._lora, self._texts = base, lora, texts
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._model = self._load()

    def _load(self) -> Any:
        from transformers import AutoModelForSequenceClassification, logging

        logging.set_verbosity_error()
        # Silence the warning about a newly initialized head: the adapter brings its own.
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return AutoModelForSequenceClassification.from_pretrained(self._base, num_labels=2)

    @contextlib.contextmanager
    def adapted(self, path: Path) -> Iterator[None]:
        """In this block the model has the adapter."""
        applied = apply(load(path), dict(self._model.state_dict()), rename=self._rename)
        try:
            yield
        finally:
            applied.revert()

    @staticmethod
    def _rename(name: str) -> str:
        """Map a checkpoint name to its name in the model with a head."""
        return name if name.startswith("classifier.") else f"bert.{name}"

    def logits(self) -> Any:
        return logits(self._model, self._tokenizer, self._texts)

    def base_logits(self) -> Any:
        """Logits of the base's encoder with the head trained with the LoRA, without the LoRA itself."""
        from safetensors.torch import load_file

        head = load_file(self._lora / "adapter_model.safetensors")
        prefix = "base_model.model."
        self._model.load_state_dict(
            {key.removeprefix(prefix): value for key, value in head.items() if "lora_" not in key}, strict=False
        )
        return self.logits()

    def lora_logits(self) -> Any:
        """Logits with the LoRA, run by PEFT."""
        from peft import PeftModel

        return logits(PeftModel.from_pretrained(self._load(), str(self._lora)), self._tokenizer, self._texts)
