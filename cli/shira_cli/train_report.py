"""What ``shira-train`` prints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_format._core.text import count, counted, file_size, percent, printable, table

if TYPE_CHECKING:
    from shira_format.training.report import Quality, Run, TrainingReport

_NAMES = {"shira": "sparse adapter", "lora": "LoRA"}


def what_is_trained(report: TrainingReport) -> str:
    """A line for the start."""
    head = f" and a new head of {count(report.new)} elements" if report.new else ""
    return (
        f"{count(report.nnz)} of {count(report.numel)} entries ({percent(report.density)}) of {counted(report.weights, 'weight')}"
        f"{head} are trained on {counted(report.train, 'text')}; {count(report.held_out)} are held out"
    )


def as_json(report: TrainingReport, output: Path | None) -> dict[str, Any]:
    """The report as plain JSON values; ``output`` is None for a dry run."""
    return {
        "file": None if output is None else str(output),
        "file_bytes": report.file_bytes,
        "task": report.task,
        "labels": list(report.labels),
        "texts": {"train": report.train, "validation": report.held_out, "test": report.test},
        "mask": report.mask,
        "weights": report.weights,
        "nnz": report.nnz,
        "numel": report.numel,
        "density": report.density,
        "new_elements": report.new,
        "base": {"validation": _quality(report.base), "test": _quality(report.base_test)},
        "runs": [_run(run) for run in report.runs],
        "notices": report.notices,
    }


def _run(run: Run) -> dict[str, Any]:
    return {
        "method": run.method,
        "parameters": run.parameters,
        "learning_rate": run.learning_rate,
        "tried": [{"learning_rate": rate, "loss": _finite(loss)} for rate, loss in run.tried.items()],
        "steps": run.steps,
        "best_step": run.best_step,
        "seconds": round(run.seconds, 3),
        "losses": [{"step": step, "loss": _finite(loss)} for step, loss in run.losses],
        "validations": [
            {"step": step, "loss": _finite(quality.loss), "accuracy": quality.accuracy}
            for step, quality in run.validation
        ],
        "validation": _quality(run.quality),
        "test": _quality(run.test),
    }


def _quality(found: Quality | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "texts": found.texts, "loss": _finite(found.loss), "accuracy": found.accuracy,
        "perplexity": None if found.accuracy is not None else _finite(found.perplexity),
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def as_text(report: TrainingReport, output: Path, *, dry_run: bool) -> str:
    """The report as a table."""
    name = printable(str(output))
    if dry_run:
        return f"{name}: would be trained: {what_is_trained(report)}"
    causal = report.task == "causal"
    measure = "perplexity" if causal else "accuracy"
    head = ["held-out texts", "parameters", "rate", "steps", "best", "seconds", "loss", measure]
    tested = report.test > 0
    head += [f"{measure} on test"] if tested else []
    rows = [["base", "", "", "", "", "", *_measures(report.base, report.base_test, tested=tested)]]
    rows += [_row(run, tested=tested) for run in report.runs]
    lines = [table(head, rows)]
    if report.new:
        lines.append("The base is measured under the trained head.")
    assert report.file_bytes is not None
    lines.append(
        f"{name}: {count(report.nnz)} entries ({percent(report.density)}), {file_size(report.file_bytes)}"
    )
    return "\n".join(lines)


def _row(run: Run, *, tested: bool) -> list[str]:
    return [
        _NAMES[run.method], count(run.parameters), f"{run.learning_rate:g}", count(run.steps), count(run.best_step),
        f"{run.seconds:.1f}", *_measures(run.quality, run.test, tested=tested),
    ]  # fmt: skip


def _measures(validation: Quality | None, test: Quality | None, *, tested: bool) -> list[str]:
    if validation is None:
        return ["-"] * (3 if tested else 2)
    return [f"{validation.loss:.4f}", _measure(validation)] + ([_measure(test)] if tested else [])


def _measure(found: Quality | None) -> str:
    if found is None:
        return "-"
    return f"{found.perplexity:.3f}" if found.accuracy is None else percent(found.accuracy)
