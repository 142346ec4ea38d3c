"""Text of a file that was written again in another profile."""

from __future__ import annotations

from typing import Any

from shira_format._core.text import count, file_size
from shira_format.convert.repack import RepackReport


def as_json(report: RepackReport) -> dict[str, Any]:
    """The report as plain JSON values."""
    return {
        "output": str(report.path),
        "bytes_before": report.before,
        "bytes": report.after,
        "nnz": report.nnz,
        "bits_per_entry": report.bits_per_entry,
        "features": list(report.features),
        "needs_base": report.needs_base,
    }


def as_text(report: RepackReport) -> str:
    """The report for a terminal."""
    bits = "" if report.bits_per_entry is None else f", {report.bits_per_entry:.2f} bits an entry"
    needed = "; it is read with its base" if report.needs_base else ""
    return f"{report.path}: {count(report.nnz)} entries, {file_size(report.before)} -> {file_size(report.after)}{bits}{needed}"
