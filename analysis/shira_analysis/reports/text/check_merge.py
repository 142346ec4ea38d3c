"""Report of a check whether a merged checkpoint holds a LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shira_analysis.reports.text.parts import some
from shira_format._core.text import printable, table

if TYPE_CHECKING:
    from shira_analysis.merging.check.report import LayerVerdict, MergeVerdict

HEAD = ("tensor", "verdict", "strength", "fits from", "to", "bits equal", "off by", "residual")


def as_text(report: MergeVerdict) -> str:
    """The report as a table, with the answer at the end."""
    lines = [table(HEAD, map(_row, report.layers))]
    reasons: dict[tuple[str, str], list[str]] = {}
    for layer in report.layers:
        if layer.reason:
            reasons.setdefault((layer.verdict, layer.reason), []).append(layer.name)
    lines += [f"{verdict}: {printable(reason)}: {some(names)}" for (verdict, reason), names in reasons.items()]
    if report.others is not None:
        lines.append(
            f"tensors that it leaves alone: {report.others.compared} compared, {len(report.others.changed)} changed"
        )
        for words, names in (
            ("changed", report.others.changed), ("changed with the adapted one that they are tied to", report.others.tied),
            ("not in the merged checkpoint", report.others.missing), ("new in the merged checkpoint", report.others.new),
            ("quantised, and not compared", report.others.unclear),
        ):  # fmt: skip
            if names:
                lines.append(f"  {words}: {some(names)}")
    lines.append(f"{report.answer}: {printable(report.sentence)}")
    return "\n".join(lines)


def _row(layer: LayerVerdict) -> tuple[str, ...]:
    return (
        layer.name, layer.verdict, _cell(layer.strength, ".4f"), _cell(layer.low, ".5g"), _cell(layer.high, ".5g"),
        "" if layer.equal is None else f"{100 * layer.equal:.4g} %", "" if layer.off is None else f"{layer.off:.3g} ulp",
        _cell(layer.residual, ".2g"),
    )  # fmt: skip


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
