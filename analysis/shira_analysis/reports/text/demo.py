"""Report of what adapters of several densities keep of a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shira_analysis.reports.summary import describe
from shira_analysis.reports.text import inspect
from shira_format._core.text import count, file_size, table
from shira_format.format import AdapterFile


def as_text(result: dict[str, Any], example: Path) -> str:
    """One task's result; ``example``: the file of one of the adapters, which is described first."""
    summary = inspect.as_text(describe(AdapterFile(example)) | {"tensors": [], "whole": []})
    ends = [
        ("base, LoRA's head", "", "", "", f"{result['accuracy_base']:.3f}", "0.00", ""),
        ("LoRA (PEFT)", "", file_size(result["lora_bytes"]), "100.0%", f"{result['accuracy_lora']:.3f}", "1.00", "1.00"),
    ]  # fmt: skip
    rows = [
        (f"SHiRA {100 * row['density']:g} %", count(row["nnz"]), file_size(row["file_bytes"]),
         f"{row['energy_kept']:.1%}", f"{row['accuracy']:.3f}", f"{row['effect_kept']:.2f}", f"{row['effect_cosine']:.2f}")
        for row in result["adapters"]
    ]  # fmt: skip
    head = ("", "entries", "file", "energy kept", "accuracy", "effect kept", "cosine")
    lines = [
        f"\n=== {result['task']} ===",
        f"{summary}\n",
        table(head, [ends[0], *rows, ends[1]]),
        f"Without any adapter, a new head on the base alone reaches {result['accuracy_head_only']:.3f}.",
    ]
    gain = result["accuracy_lora"] - result["accuracy_base"]
    for row in result["adapters"]:
        share = (row["accuracy"] - result["accuracy_base"]) / gain if gain else float("nan")
        lines.append(
            f"{100 * row['density']:g} % keeps {share:.0%} of the accuracy that the LoRA gained on {result['texts']} texts."
        )
    return "\n".join(lines)
