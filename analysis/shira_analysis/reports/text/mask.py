"""Report of a mask."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_format._core.text import count, file_size, percent, printable, table

if TYPE_CHECKING:
    from shira_format.masks.make import MaskReport


def as_json(report: MaskReport, output: Path | None) -> dict[str, Any]:
    """The report as plain JSON values; ``output`` is None for a dry run."""
    return {
        "file": None if output is None else str(output),
        "mask": report.notes["mask"],
        "selection": report.notes["selection"],
        "totals": {
            "tensors": len(report.tensors),
            "nnz": report.nnz,
            "numel": report.numel,
            "density": report.density,
            "file_bytes": report.file_bytes,
        },
        "left_out": report.unreached,
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "nnz": tensor.nnz,
                "density": tensor.density,
            }
            for tensor in report.tensors
        ],
    }


def as_text(report: MaskReport, path: Path, *, dry_run: bool) -> str:
    """The report as a table."""
    rows = [
        (tensor.name, "x".join(map(str, tensor.shape)), count(tensor.nnz), percent(tensor.density))
        for tensor in report.tensors
    ]
    rows.append((f"all {len(report.tensors)}", "", count(report.nnz), percent(report.density)))
    size = "" if report.file_bytes is None else f", {file_size(report.file_bytes)}"
    what = "would be chosen" if dry_run else "chosen"
    summary = f"{printable(str(path))}: {count(report.nnz)} entries {what} by {report.notes['mask']['rule']}{size}"
    return "\n".join([table(("weight", "shape", "entries", "density"), rows), summary])
