"""Report of the moments of a model's layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_format._core.text import count, file_size, printable, table

if TYPE_CHECKING:
    from shira_format.calibration.collect import MomentsReport


def as_json(report: MomentsReport, output: Path | None) -> dict[str, Any]:
    """The report as plain JSON values; ``output`` is None for a dry run."""
    return {
        "file": None if output is None else str(output),
        "texts": report.texts,
        "nbytes": report.nbytes,
        "weights": [
            {
                "name": layer.name,
                "width": layer.width,
                "groups": layer.groups,
                "block": layer.block,
                "nbytes": layer.nbytes,
                "samples": layer.samples,
            }
            for layer in report.layers
        ],
    }


def as_text(report: MomentsReport, path: Path, *, dry_run: bool) -> str:
    """The report as a table."""
    rows = [
        (
            layer.name, count(layer.width), count(layer.block),
            "-" if layer.samples is None else count(layer.samples), file_size(layer.nbytes),
        )
        for layer in report.layers
    ]  # fmt: skip
    what = "would be collected" if dry_run else "collected"
    totals = f"{len(rows)} weights, {report.texts} texts, {file_size(report.nbytes)} {what}"
    return "\n".join(
        [table(("weight", "width", "block", "inputs", "size"), rows), f"{printable(str(path))}: {totals}"]
    )
