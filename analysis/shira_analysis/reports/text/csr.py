"""Reports of shira_to_csr and csr_to_shira."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_analysis.reports.text.parts import about_names, path_or_none, shape, written
from shira_format._core.text import count, table

if TYPE_CHECKING:
    from shira_format.convert.csr import FromCsrReport
    from shira_format.export.csr import CsrReport


def as_json(report: CsrReport | FromCsrReport, output: Path | None) -> dict[str, Any]:
    """Either report as plain JSON values."""
    return {"output": path_or_none(output)} | asdict(report)


def matrices_text(report: CsrReport, output: Path | None) -> str:
    """The matrices that were written."""
    rows = [(t.name, shape(t.shape), count(t.nnz), t.values, t.file) for t in report.tensors]
    lines = [*about_names(report), table(("tensor", "shape", "entries", "data", "file"), rows)]
    return "\n".join([*lines, *_whole(report.whole), written(output, report.folder_bytes)])


def adapter_text(report: FromCsrReport, output: Path | None) -> str:
    """The tensors of the adapter that was made."""
    rows = [
        (t.name, shape(t.shape), count(t.nnz), t.values, "changed" if t.changed else "unchanged")
        for t in report.tensors
    ]
    lines = [table(("tensor", "shape", "entries", "values", "matrix"), rows)]
    return "\n".join([*lines, *_whole(report.whole), written(output, report.file_bytes)])


def _whole(names: Sequence[str]) -> list[str]:
    return [f"stored whole: {len(names)} tensors"] if names else []
