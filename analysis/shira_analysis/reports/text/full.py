"""Report of shira_to_full."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_analysis.reports.text.parts import about_names, path_or_none, written

if TYPE_CHECKING:
    from shira_format.export.full import RestoreReport


def as_json(report: RestoreReport, output: Path | None) -> dict[str, Any]:
    """The report as plain JSON values."""
    return {"output": path_or_none(output)} | asdict(report)


def as_text(report: RestoreReport, output: Path | None) -> str:
    """What was applied, and the files."""
    applied = f"{report.patched} tensors patched, {report.whole} stored whole, {report.removed} removed"
    lines = [*about_names(report), f"{applied}; {report.verified} compared with the digest of the whole result"]
    if output is None:
        lines.append(written(None, None))
    else:
        lines += [written(output / name, size) for name, size in report.files.items()]
    return "\n".join(lines)
