"""Report of shira_to_lora."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_analysis.reports.text.parts import about_names, path_or_none, shape, written
from shira_format._core.text import count, file_size, printable, table

if TYPE_CHECKING:
    from shira_format.export.lora import LayerReport, LoraReport

HEAD = ("tensor", "shape", "entries", "rank", "numbers", "kept", "error", "bound", "spectral", "sigma next")


def as_json(report: LoraReport, output: Path | None) -> dict[str, Any]:
    """The report as plain JSON values."""
    return {
        "output": path_or_none(output),
        "totals": {
            "layers": len(report.layers),
            "nnz": report.nnz,
            "parameters": report.parameters,
            "norm": report.norm,
            "error": report.error,
            "relative_error": report.relative_error,
            "frobenius_bound": report.bound,
            "energy_kept": report.energy_kept,
            "adapter_bytes": report.adapter_bytes,
            "folder_bytes": report.folder_bytes,
        },
        "layers": [_layer(layer) for layer in report.layers],
        "modules_to_save": report.saved,
        "left_out": report.left_out,
        "notices": report.notices,
        "warnings": report.warnings(),
    }


def _layer(layer: LayerReport) -> dict[str, Any]:
    values = asdict(layer) | {"parameters": layer.parameters, "relative_error": layer.relative_error}
    return {key if key != "bound" else "frobenius_bound": value for key, value in values.items()}


def as_text(report: LoraReport, output: Path | None) -> str:
    """The report as a table."""
    rows = [
        (
            layer.name, shape(layer.shape), count(layer.nnz), str(layer.rank),
            count(layer.parameters), f"{layer.energy_kept:.1%}", f"{layer.relative_error:.4g}",
            f"{_share(layer.bound, layer.norm):.4g}", f"{layer.spectral_error:.4g}", f"{layer.spectral_bound:.4g}",
        )
        for layer in report.layers
    ]  # fmt: skip
    rows.append(
        (
            "all", "", count(report.nnz), "", count(report.parameters), f"{report.energy_kept:.1%}",
            f"{report.relative_error:.4g}", f"{_share(report.bound, report.norm):.4g}", "", "",
        )
    )  # fmt: skip
    lines = [*about_names(report), table(HEAD, rows)]
    if report.saved:
        lines.append(f"replaced with their modules: {', '.join(map(printable, report.saved))}")
    size = "" if output is None else f"; the adapter: {file_size(report.adapter_bytes)}"
    return "\n".join([*lines, written(output, report.folder_bytes) + size])


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
