"""Pictures of the study of masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from shira_analysis.figures.style import BLUE, GREEN, GREY, ORANGE, RED, figure, our_style, render
from studies.masks import METHODS, TASKS

_OF_SIZE = {"large": (BLUE, "o", "82 944 entries, 0.78 %"), "small": (ORANGE, "s", "9 216 entries, 0.087 %")}
# Methods without a size that are lines; full fine-tuning at the rate of the pilot fails in some seeds.
LINES = ("full-customary", "head")
_OF_METHOD = {"lora": (GREEN, "^"), "wm": (BLUE, "o"), "grad": (RED, "s")}


def accuracies(cases: Sequence[tuple[float, str, str, list[Any]]], reference: Mapping[str, list[Any]]) -> bytes:
    """Mean accuracy and its deviation over the seeds, for each method in both sizes; one panel a task.

    Args:
        cases: mean over tasks, method, size, and the rows of :data:`TASKS`.
        reference: rows of methods without a size, which are lines.
    """
    order = sorted(
        dict.fromkeys(method for _, method, _, _ in cases), key=lambda one: max(c[0] for c in cases if c[1] == one)
    )
    with our_style():
        drawn = figure(7.2, 0.9 + 0.24 * len(order))
        axes = drawn.subplots(1, len(TASKS), sharey=True)
        for at, (axis, task) in enumerate(zip(axes, TASKS, strict=True)):
            for size, (colour, mark, label) in _OF_SIZE.items():
                rows = {method: both[at] for _, method, here, both in cases if here == size}
                shift = 0.14 if size == "large" else -0.14
                axis.errorbar(
                    [100 * row.accuracy for row in rows.values()],
                    [order.index(method) + shift for method in rows],
                    xerr=[100 * row.accuracy_sd for row in rows.values()],
                    fmt=mark, color=colour, ls="", ms=4, elinewidth=1, label=label,
                )  # fmt: skip
            for (method, both), dashes in zip(reference.items(), ("--", ":"), strict=False):
                axis.axvline(100 * both[at].accuracy, color=GREY, ls=dashes, lw=1, label=METHODS[method].label)
            axis.set_title(task)
            axis.set_xlabel("held-out accuracy, %")
            axis.set_yticks(range(len(order)), [METHODS[method].label for method in order])
            axis.grid(axis="both")
        handles, labels = axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=4)
        return render(drawn)


def strengths(found: Mapping[tuple[str, str], Mapping[float, Sequence[float]]]) -> bytes:
    """Accuracy by the strength of a trained adapter, as in figure 7 of the SHiRA paper; one panel a task."""
    with our_style():
        drawn = figure(7.2, 2.9)
        axes = drawn.subplots(1, len(TASKS), sharey=True)
        for axis, task in zip(axes, TASKS, strict=True):
            for (method, here), curve in found.items():
                if here != task:
                    continue
                colour, mark = _OF_METHOD[method]
                middle = [100 * mean(curve[alpha]) for alpha in curve]
                spread = [100 * stdev(curve[alpha]) for alpha in curve]
                low, high = ([m + sign * s for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
                axis.plot(list(curve), middle, marker=mark, color=colour, ms=3.5, label=METHODS[method].label)
                axis.fill_between(list(curve), low, high, color=colour, alpha=0.15, lw=0)
            axis.set_title(task)
            axis.set_xlabel("strength α")
            axis.grid()
        axes[0].set_ylabel("held-out accuracy, %")
        axes[0].legend(loc="lower right")
        return render(drawn)
