"""Report of a conversion to an adapter file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_analysis.reports.text.parts import about_names, path_or_none, shape, some, written
from shira_format._core.text import count, percent, printable, table

if TYPE_CHECKING:
    from shira_format.convert.report import ConversionReport


def as_json(report: ConversionReport, output: Path | None) -> dict[str, Any]:
    """The report as plain JSON values."""
    return {
        "output": path_or_none(output),
        "exact": report.exact,
        "totals": {
            "tensors": len(report.tensors),
            "nnz": report.nnz,
            "numel": report.numel,
            "density": report.density,
            "energy_kept": report.energy_kept,
            "relative_error": report.relative_error,
            "whole_tensors": len(report.whole),
            "unchanged_tensors": report.unchanged,
            "file_bytes": report.file_bytes,
        },
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "nnz": tensor.nnz,
                "density": tensor.density,
                "energy_kept": tensor.energy_kept,
                "relative_error": tensor.relative_error,
            }
            for tensor in report.tensors
        ],
        "whole": report.whole,
        "structure": report.structure,
        "left_out": report.left_out,
        "notices": report.notices,
        "warnings": report.warnings(),
    }


def as_text(report: ConversionReport, output: Path | None, more: str = "") -> str:
    """The report as a table; ``more`` is said before what was written."""
    head: tuple[str, ...] = ("tensor", "shape", "entries", "density")
    rows: list[tuple[str, ...]] = [
        (t.name, shape(t.shape), count(t.nnz), percent(t.density)) for t in report.tensors
    ]
    rows.append(("all", "", count(report.nnz), percent(report.density)))
    if not (report.exact or report.fitted):  # fitted values are not to be near the update's
        head += ("energy kept", "rel. error")
        accounts = [(t.energy_kept, t.relative_error) for t in report.tensors]
        accounts.append((report.energy_kept, report.relative_error))
        rows = [(*row, f"{kept:.1%}", f"{error:.3f}") for row, (kept, error) in zip(rows, accounts, strict=True)]
    lines = [*about_names(report), table(head, rows)]
    if report.whole:
        lines.append(f"stored whole: {some(report.whole, noun=' tensors')}")
    by_kind: dict[str, list[str]] = {}
    for name, what in report.structure.items():
        by_kind.setdefault(what, []).append(name)
    lines += [f"{printable(what)}: {some(names, noun=' tensors')}" for what, names in by_kind.items()]
    if report.unchanged:
        lines.append(f"unchanged: {report.unchanged} tensors")
    if more:
        lines.append(more)
    lines.append(written(output, report.file_bytes))
    return "\n".join(lines)
