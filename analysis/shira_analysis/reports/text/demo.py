"""Report of what sparse adapters keep of a LoRA, and of one that was trained in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shira_analysis.reports.text import inspect
from shira_format._core.text import count, file_size, table
from shira_format.entries.inspection import describe
from shira_format.format import AdapterFile

_WAYS = {"cut": "LoRA cut to", "fitted": "LoRA fitted at", "trained": "trained sparse at"}


def as_text(result: dict[str, Any], example: Path) -> str:
    """One task's result; ``example``: the file of one of the adapters, which is described first."""
    summary = inspect.as_text(describe(AdapterFile(example)) | {"tensors": [], "whole": []})
    rows = [
        ("base, LoRA's head", "", "", "", f"{result['accuracy_base']:.3f}", "0.000"),
        ("base, new head", "", "", "", f"{result['accuracy_head_only']:.3f}", ""),
        *map(_row, result["adapters"]),
        ("LoRA (PEFT)", "", file_size(result["lora_bytes"]), "", f"{result['accuracy_lora']:.3f}", "1.000"),
    ]  # fmt: skip
    legend = (
        f"Accuracy: on {result['texts']} held-out texts. R²: of the logits there, 1 where they are the LoRA's and 0 where they are no\n"
        "closer than the base's; none for an adapter with a head of its own."
    )
    head = ("", "entries", "file", "made in", "accuracy", "R²")
    return "\n".join((f"\n=== {result['task']} ===", f"{summary}\n", table(head, rows), legend))


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    kept = row["effect_kept"]
    return (
        f"{_WAYS[row['way']]} {100 * row['density']:.3g} %", count(row["nnz"]), file_size(row["file_bytes"]),
        f"{row['seconds']:.1f} s", f"{row['accuracy']:.3f}", "" if kept is None else f"{kept:.3f}",
    )  # fmt: skip
