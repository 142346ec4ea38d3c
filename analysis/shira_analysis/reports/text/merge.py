"""Report of a merge: what was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_analysis.reports.text.parts import path_or_none, written
from shira_format._core.text import count, percent, printable, table
from shira_format.tensors import density

if TYPE_CHECKING:
    from shira_format.merging import MergeReport


def as_json(
    report: MergeReport, output: Path | None, *, weights: Sequence[float] | None = None, page: Path | None = None
) -> dict[str, Any]:
    """The report as plain JSON values; ``page`` is where the report on the merge was written."""
    return {
        "output": path_or_none(output),
        "report": path_or_none(page),
        "method": report.method,
        "inputs": report.labels,
        "weights": weights,
        "totals": {
            "tensors": len(report.tensors),
            "inputs": _inputs(report),
            "shared": report.shared,
            "nnz": report.nnz,
            "numel": report.numel,
            "density": report.density,
            "energy_kept": report.energy_kept,
            "whole_tensors": len(report.whole),
            "file_bytes": report.file_bytes,
        },
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "inputs": list(tensor.inputs),
                "shared": tensor.shared,
                "nnz": tensor.nnz,
                "numel": tensor.numel,
                "density": density(tensor.nnz, tensor.numel),
                "energy_kept": _kept(tensor.energy, tensor.energy_kept),
            }
            for tensor in report.tensors
        ],
        "whole": report.whole,
        "notices": report.notices,
    }


def _inputs(report: MergeReport) -> list[int]:
    return [sum(tensor.inputs[at] for tensor in report.tensors) for at in range(len(report.labels))]


def _kept(energy: float | None, kept: float | None) -> float | None:
    """Share of the sum of squares that was kept; of a change of 0, all."""
    if energy is None or kept is None:
        return None
    return kept / energy if energy else 1.0


def as_text(report: MergeReport, output: Path | None) -> str:
    """The report as a table."""
    names = [Path(label).name for label in report.labels]
    names = names if len(set(names)) == len(names) else report.labels
    head: tuple[str, ...] = ("tensor", *map(printable, names), "shared", "result", "density")
    totals = ("all", *map(count, [*_inputs(report), report.shared, report.nnz]), percent(report.density))  # fmt: skip
    rows: list[tuple[str, ...]] = [
        (
            tensor.name, *map(count, [*tensor.inputs, tensor.shared, tensor.nnz]),
            percent(density(tensor.nnz, tensor.numel)),
        )
        for tensor in report.tensors
    ]  # fmt: skip
    rows.append(totals)
    kept = [_kept(tensor.energy, tensor.energy_kept) for tensor in report.tensors]
    if any(share is not None for share in kept):
        head += ("energy lost",)
        shares = [*kept, report.energy_kept]
        rows = [(*row, "" if share is None else percent(1 - share)) for row, share in zip(rows, shares, strict=True)]  # fmt: skip
    lines = [table(head, rows)] if report.tensors else []
    if report.whole:
        lines.append(f"stored whole: {', '.join(map(printable, report.whole))}")
    return "\n".join([*lines, written(output, report.file_bytes)])
