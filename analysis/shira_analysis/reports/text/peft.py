"""Report of shira_to_peft."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_analysis.reports.text.parts import about_names, path_or_none, shape, written
from shira_format._core.text import count, printable, table

if TYPE_CHECKING:
    from shira_format.export.peft_shira import PeftReport


def as_json(report: PeftReport, output: Path | None) -> dict[str, Any]:
    """The report as plain JSON values."""
    return {"output": path_or_none(output)} | asdict(report)


def as_text(report: PeftReport, output: Path | None) -> str:
    """The report as a table."""
    rows = [
        (t.module, shape(t.shape), count(t.nnz), count(t.zeros), "unknown" if t.inexact is None else count(t.inexact))
        for t in report.tensors
    ]  # fmt: skip
    lines = [
        *about_names(report),
        table(("module", "shape", "entries", "of them zeros", "inexact"), rows),
        f"r = {report.rank}",
    ]
    if report.modules_to_save:
        lines.append(f"saved whole: {', '.join(map(printable, report.modules_to_save))}")
    return "\n".join([*lines, written(output, report.folder_bytes)])
