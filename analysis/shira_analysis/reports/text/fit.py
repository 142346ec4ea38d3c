"""Text on a fit: how much of the source's effect on the model is kept, from the account of it in a report or a manifest."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from shira_format._core.text import count, counted, file_size, number, percent, printable, table

if TYPE_CHECKING:
    from shira_format.convert.fit.report import FitReport

# What the manifest calls a way of fitting, and what people call it.
METHODS = {"distill": "distillation", "moments": "moments of the layers' inputs"}


def facts(fit: Any) -> list[tuple[str, str]]:
    """Keys and lines for a description of a file: how it was fitted, and what is kept; the account may be a stranger's."""
    if not isinstance(fit, dict):
        return []
    found = [("fit", _how(fit))]
    if line := kept(fit.get("effect"), fit.get("plain")):
        found.append(("effect kept", line))
    if line := choices(fit.get("effect")):
        found.append(("outputs", line))
    if line := _layers_line(layers(fit.get("effect"))):
        found.append(("error by layer", line))
    return found


def _how(fit: dict[str, Any]) -> str:
    method, options, inputs = (fit.get(key) for key in ("method", "options", "inputs"))
    parts = [METHODS.get(method, method) if isinstance(method, str) else "?"]
    if fit.get("kept") == "plain":
        parts = [f"the plain cut, as {parts[0]} was no better"]
    elif isinstance(options, dict) and isinstance(steps := options.get("steps"), int):
        parts.append(counted(steps, "step"))
    if isinstance(inputs, dict) and isinstance(fitted := inputs.get("fitted"), int):
        parts.append(f"on {counted(fitted, 'input')} ({inputs.get('name', '?')})")
    return ", ".join(parts)


def kept(effect: Any, plain: Any = None) -> str:
    """R² with its interval, and what the plain cut keeps; empty if that is not known."""
    r2 = _number(effect, "r2")
    if r2 is None:
        return ""
    text = f"R² {r2:.3f}"
    low, high = _number(effect, "low"), _number(effect, "high")
    if low is not None and high is not None:
        text += f" (95 % interval {low:.3f} to {high:.3f})"
    inputs = _number(effect, "inputs")
    if inputs is not None:
        text += f" on {counted(int(inputs), 'input')} held out"
    cut = _number(plain, "r2")
    return text if cut is None else f"{text}; the plain cut keeps {cut:.3f}"


def effect_kept(fit: Any) -> float | None:
    """The R² that an account of a fit states; None if it states none."""
    return _number(fit.get("effect") if isinstance(fit, dict) else None, "r2")


def choices(effect: Any) -> str:
    """KL divergence and first choices of logits, or the cosine of embeddings."""
    kl, agreement, cosine = (_number(effect, key) for key in ("kl", "agreement", "cosine"))
    parts = []
    if agreement is not None:
        parts.append(f"same first choice as the source's for {percent(agreement)}")
    if kl is not None:
        parts.append(f"KL divergence {kl:.3g} nats")
    if cosine is not None:
        parts.append(f"mean cosine to the source's {cosine:.4f}")
    return ", ".join(parts)


def layers(effect: Any) -> dict[str, float]:
    """The error of each layer that the source changes: 0 is the source, 1 no nearer than the base."""
    found = effect.get("layers") if isinstance(effect, dict) else None
    if not isinstance(found, dict):
        return {}
    return {str(name): float(value) for name, value in found.items() if _is_number(value)}


def _layers_line(found: dict[str, float]) -> str:
    if not found:
        return ""
    worst = max(found, key=lambda name: found[name])
    return f"{min(found.values()):.3g} to {found[worst]:.3g} of the base's; the largest in {worst}"


def layer_table(effect: Any, plain: Any = None) -> str:
    """The error of each layer beside the plain cut's; empty if there is none."""
    found, cut = layers(effect), layers(plain)
    if not found:
        return ""
    rows = [
        (name, f"{error:.3f}", *([number(cut.get(name), ".3f")] if cut else [])) for name, error in found.items()
    ]
    return table(("layer", "error", *(["plain cut"] if cut else [])), rows)


def as_json(report: FitReport) -> dict[str, Any]:
    """The report as plain JSON values, without that on the file."""
    found = report.as_dict()
    del found["conversion"], found["warnings"]
    return found


def as_text(report: FitReport) -> str:
    """The report for the summary of a conversion."""
    fit = report.provenance()
    lines = []
    if found := layer_table(fit.get("effect"), fit.get("plain")):
        lines += ["", "error of each layer's output, as a share of the base's:", found]
    if report.goal:
        by = counted(report.inputs["choosing"], "input")
        lines += ["", f"effect kept (R²) by each fit, on the {by} that the density is chosen by:", _trials(report)]
    named = [(key, line) for key, line in facts(fit) if key != "error by layer"]
    width = max(len(key) for key, _ in named)
    return "\n".join([*lines, "", *(f"{key.ljust(width)}  {printable(line)}" for key, line in named)])


def _trials(report: FitReport) -> str:
    """The fits of a search, the densest first."""
    rows = [
        (
            percent(one.density), count(one.budget), f"{one.fit.r2:.3f}", f"{one.plain.r2:.3f}", file_size(one.file_bytes),
            "written" if one.budget == report.budget else "",
        )
        for one in sorted(report.trials, key=lambda one: -one.budget)
    ]  # fmt: skip
    return table(("density", "entries", "fitted", "plain cut", "file", ""), rows)


def _number(of: Any, key: str) -> float | None:
    value = of.get(key) if isinstance(of, dict) else None
    return value if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
