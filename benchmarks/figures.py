"""Figures of the groups that have one, drawn from records that are also written as CSV.

``python -m benchmarks.figures FOLDER`` draws those whose CSV is in the folder again.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.overwriting import DTYPES, PAPER

Record = dict[str, Any]

# Okabe and Ito's colours, which people tell apart whatever colours they see; and marks, for those who print in grey.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
_STYLE = {
    "figure.dpi": 200, "savefig.bbox": "tight", "savefig.pad_inches": 0.05,
    "font.family": "serif", "font.serif": ["STIXGeneral"], "mathtext.fontset": "stix", "font.size": 10,
    "axes.titlesize": 10, "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7,
    "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.5, "axes.axisbelow": True,
    "lines.linewidth": 1.4, "lines.markersize": 5, "legend.frameon": False,
}  # fmt: skip


def write(name: str, records: Sequence[Record], folder: Path) -> None:
    """Write ``name.csv`` and ``name.png`` to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        table.writeheader()
        table.writerows({key: _rounded(value) for key, value in record.items()} for record in records)
    draw(name, records, folder / f"{name}.png")


def draw(name: str, records: Sequence[Record], path: Path) -> None:
    """Draw one of :data:`FIGURES`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(_STYLE):
        figure = FIGURES[name](plt, records)
        figure.savefig(path)
        plt.close(figure)


def _overwriting(plt: Any, records: Sequence[Record]) -> Any:
    figure, axes = plt.subplots(1, len(DTYPES), figsize=(7, 3.7), sharey=True, layout="constrained")
    ways = {
        "overwrite_us": ("overwriting, indices and values decoded", _BLUE, "o"),
        "scatter_us": ("overwriting by torch's scatter_, as in the paper", _GREEN, "^"),
        "switcher_us": ("Switcher.load: base checked and kept", _ORANGE, "s"),
    }
    for axis, dtype in zip(axes, DTYPES, strict=True):
        mine = [record for record in records if record["dtype"] == dtype]
        sizes = [record["size"] for record in mine]
        axis.axhspan(
            *PAPER, color=_GREY, alpha=0.35, lw=0, label=f"the paper, large sizes: {PAPER[0]} to {PAPER[1]}"
        )
        axis.axhline(1, color="black", lw=0.7, ls=":")
        for key, (label, colour, mark) in ways.items():
            axis.plot(sizes, [r["fuse_us"] / r[key] for r in mine], mark + "-", color=colour, label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_yticks(
            [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if _within(tick, axis.get_ylim())]
        )
        axis.minorticks_off()
        _plain_numbers(axis.yaxis)
        axis.set_title(f"{dtype} weights")
        axis.set_xlabel("rows = columns of a weight")
    axes[0].set_ylabel("time of $W \\leftarrow W + AB$\nover time of overwriting")
    figure.suptitle(
        f"Overwriting 1 % of a weight, beside fusing a LoRA of rank 32 ({records[0]['machine']})", fontsize=10
    )
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _drift(plt: Any, records: Sequence[Record]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.4), layout="constrained")
    people: dict[str, dict[str, Any]] = {
        "PEFT LoRA": {"color": _ORANGE, "marker": "s"},
        "PEFT SHiRA": {"color": _GREEN, "marker": "^"},
        # Lies under ours: an open ring around our marks.
        "PEFT SHiRA of exact differences": {"color": _GREEN, "marker": "o", "mfc": "white", "ms": 9, "ls": "--"},
        "ours": {"color": _BLUE, "marker": "o"},
    }
    for axis, key, label in ((axes[0], "changed", "weights changed, %"), (axes[1], "error", "largest error, % of largest weight")):  # fmt: skip
        for who, look in people.items():
            mine = [record for record in records if record["who"] == who]
            values = [100 * record[key] for record in mine]
            text = who if any(values) else f"{who}: 0 throughout"
            axis.plot([r["cycles"] for r in mine], values, **look, label=text, clip_on=False, zorder=3)
        axis.set_xscale("log")
        # Linear near 0, which a logarithm does not have.
        axis.set_yscale("symlog", linthresh=0.01, linscale=0.5)
        axis.set_ylim(0, 10 ** math.ceil(math.log10(max(100 * record[key] for record in records))))
        axis.minorticks_off()
        axis.set_xticks(sorted({record["cycles"] for record in records}))
        _plain_numbers(axis.xaxis)
        _plain_numbers(axis.yaxis)
        axis.set_xlabel("loads and unloads")
        axis.set_ylabel(label)
    figure.suptitle("Two adapters in turns put on the bf16 weights of MiniLM and taken off (LoRA: rank 8; SHiRA: 1 %)", fontsize=10)  # fmt: skip
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


FIGURES: dict[str, Callable[[Any, Sequence[Record]], Any]] = {"overwriting": _overwriting, "drift": _drift}


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _read(path: Path) -> list[Record]:
    with open(path, encoding="utf-8", newline="") as file:
        return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


if __name__ == "__main__":
    for drawn in FIGURES:
        if (source := Path(sys.argv[1]) / f"{drawn}.csv").exists():
            draw(drawn, _read(source), source.with_suffix(".png"))
