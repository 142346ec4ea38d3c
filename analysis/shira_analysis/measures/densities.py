"""What adapters of several densities keep of a classifier's LoRA: held-out accuracy and effect on the logits."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shira_analysis.measures.classifier import LabelledTexts, logits
from shira_analysis.measures.effect import accuracy, effect
from shira_format.format import load
from shira_format.live import apply


def compare_densities(
    lora: Path,
    held_out: LabelledTexts,
    base: Path,
    densities: Sequence[float],
    folder: Path,
    *,
    scope: str = "tensor",
) -> dict[str, Any]:
    """Convert a LoRA at each density and compare base, LoRA and adapters on held-out texts.

    Args:
        lora: a PEFT folder with the LoRA, its classification head and ``metrics.json``.
        held_out: labelled texts.
        base: the base model's folder.
        densities: the densities to convert at.
        folder: output folder; adapters are written as ``NAME-DENSITY.st``.
        scope: ``"tensor"`` or ``"global"``.

    Returns:
        Plain JSON values; ``"adapters"`` has one row per density.

    Raises:
        ShiraError: the LoRA cannot be converted.
    """
    from shira_format.convert.lora import lora_to_shira

    classifier = _Classifier(base, lora, held_out.texts)
    of_base, of_lora = classifier.base_logits(), classifier.lora_logits()
    rows = []
    for density in densities:
        path = adapter_path(folder, lora.name, density)
        report = lora_to_shira(lora, base, path, density=density, scope=scope)
        applied = apply(load(path), classifier.weights(), rename=classifier.rename)
        of_adapter = classifier.logits()
        applied.revert()
        found = effect(of_base, of_lora, of_adapter)
        rows.append({
            "density": density,
            "nnz": report.nnz,
            "file_bytes": report.file_bytes,
            "energy_kept": report.energy_kept,
            "accuracy": accuracy(of_adapter, held_out.labels),
            "effect_kept": found.kept,
            "effect_cosine": found.cosine,
        })  # fmt: skip
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


def adapter_path(folder: Path, name: str, density: float) -> Path:
    """The path of the adapter at ``density``."""
    return folder / f"{name}-{density:g}.st"


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

    @staticmethod
    def rename(name: str) -> str:
        """Map a checkpoint name to its name in the model with a head."""
        return name if name.startswith("classifier.") else f"bert.{name}"

    def weights(self) -> dict[str, Any]:
        """The model's live weights by name."""
        return dict(self._model.state_dict())

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
