"""From the stored runs of the study of fits to a CSV, tables in the page, and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from studies import fit_language
from studies.fits import (
    BATCH,
    COUNTS,
    DENSITIES,
    LANGUAGE,
    LANGUAGE_STEPS,
    LORAS,
    METHODS,
    SOURCES,
    SUPPORTED,
    TOKENS,
    TUNED,
)
from studies.report import facts_table, filled, write_csv
from studies.runs import Result, Store

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "studies" / "fits.md"
README = ROOT / "README.md"


@dataclass(frozen=True)
class Row:
    """A source, method and density, over its seeds.

    Attributes:
        source: of the study's.
        method: likewise.
        density: share of the weights that the source changes.
        texts: to fit on; 0: all.
        seeds: how many.
        r2: of the outputs on held-out texts, the mean over seeds.
        r2_low: of the 95 % interval over the texts; the mean over seeds.
        r2_high: likewise.
        r2_sd: standard deviation over seeds; None for one.
        accuracy: of a classifier on held-out texts, the mean over seeds.
        cosine: of embeddings to the source's, likewise.
        kl: divergence of a language model's or classifier's outputs from the source's, in nats, likewise.
        log_perplexity: of a language model on held-out texts, in nats a token, likewise.
        share: of the file's bytes in the source's.
        bytes: of the file.
        seconds: of one core, to fit.
    """

    source: str
    method: str
    density: float
    texts: int
    seeds: int
    r2: float
    r2_low: float
    r2_high: float
    r2_sd: float | None
    accuracy: float | None
    cosine: float | None
    kl: float | None
    log_perplexity: float | None
    share: float
    bytes: int
    seconds: float


def rows(results: Iterable[Result]) -> list[Row]:
    """All that were run, in the study's order."""
    groups: dict[tuple[str, str, float, int], list[Result]] = {}
    for one in results:
        groups.setdefault((one["source"], one["method"], one["density"], one["texts"]), []).append(one)
    order = {name: number for number, name in enumerate((*SOURCES, *METHODS))}
    return [
        _row(groups[key]) for key in sorted(groups, key=lambda key: (order[key[0]], order[key[1]], key[2], key[3]))
    ]


def _row(group: Sequence[Result]) -> Row:
    first = group[0]

    def average(name: str) -> float | None:
        return mean(one[name] for one in group) if first.get(name) is not None else None

    r2 = [one["r2"] for one in group]
    return Row(
        first["source"], first["method"], first["density"], first["texts"], len(group), mean(r2),
        mean(one["low"] for one in group), mean(one["high"] for one in group), stdev(r2) if len(r2) > 1 else None,
        average("accuracy"), average("cosine"), average("kl"), average("log_perplexity"), mean(one["bytes"] / one["source_bytes"] for one in group),
        round(mean(one["bytes"] for one in group)), mean(one["fit_seconds"] for one in group),
    )  # fmt: skip


def table(found: Sequence[Row], methods: Sequence[str], densities: Sequence[float], sources: Sequence[str]) -> str:
    """Methods and densities as rows, and for each source what is kept, with the share of its file's bytes."""
    head = ["", "entries, %"]
    for source in sources:
        quality = "cosine" if source == TUNED else "accuracy, %"
        head += [f"{source}: R²", quality, "bytes", "s"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1)]
    for method in methods:
        for density in densities:
            here = {
                row.source: row for row in found if (row.method, row.density, row.texts) == (method, density, 0)
            }
            if any(source not in here for source in sources):
                continue
            cells = [METHODS[method].label, f"{100 * density:g}" if 0 < density < 1 else ""]
            for source in sources:
                cells += _cells(here[source])
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    kept = f"{row.r2:.3f} ± {(row.r2_high - row.r2_low) / 2:.3f}"
    quality = f"{row.cosine:.4f}" if row.accuracy is None else f"{100 * row.accuracy:.1f}"
    return [kept, quality, f"{100 * row.share:.1f} %", f"{row.seconds:.0f}"]


def language_table(found: Sequence[Row]) -> str:
    """Of the language model: the perplexity, and the share of what the source gains of it."""
    here = [row for row in found if row.source == LANGUAGE]
    ends = {row.method: row.log_perplexity or 0.0 for row in here if row.method in ("base", "source")}
    lines = [
        "|  | entries, % | R² | KL, nats | perplexity | gain kept | bytes | s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in here if len(ends) == 2 else ():
        own = row.log_perplexity or 0.0
        gain = (ends["base"] - own) / (ends["base"] - ends["source"])
        density = f"{100 * row.density:g}" if 0 < row.density < 1 else ""
        lines.append(
            f"| {METHODS[row.method].label} | {density} | {row.r2:.3f} ± {(row.r2_high - row.r2_low) / 2:.3f} | {row.kl or 0.0:.4f} | "
            f"{exp(own):.2f} | {100 * gain:.1f} % | {100 * row.share:.1f} % | {row.seconds:.0f} |"
        )  # fmt: skip
    return "\n".join(lines)


def texts_table(found: Sequence[Row]) -> str:
    """What fewer texts to fit on cost."""
    lines = [f"| texts | {' | '.join(f'{source}: R² | accuracy, %' for source in LORAS)} |", "|--:|" + "--:|" * 4]
    for count in COUNTS:
        here = {
            row.source: row
            for row in found
            if (row.method, row.density, row.texts) == ("distill", SUPPORTED, count or 0)
        }
        if all(source in here for source in LORAS):
            cells = [cell for source in LORAS for cell in _cells(here[source])[:2]]
            lines.append(f"| {count or 'all 512'} | {' | '.join(cells)} |")
    return "\n".join(lines)


_README = (
    ("base", 0.0), ("cut", 0.01), ("cut", 0.05), ("distill", 0.0001), ("distill", 0.0005), ("distill", 0.002), ("distill", 0.01),
    ("low-rank", 0.0005), ("low-rank", 0.002),
    ("source", 1.0),
)  # fmt: skip
_NAMES = {
    "base": "base, LoRA's head",
    "cut": "cut to the largest",
    "distill": "fitted,",
    "low-rank": "lower rank, distilled",
    "source": "LoRA",
}


def short(found: Sequence[Row]) -> str:
    """The table of the README: what is left of the two LoRAs, with their accuracies, by size of file."""
    lines = [f"| | {' | '.join(f'{source}: file | R² | accuracy' for source in LORAS)} |", "|---|" + "--:|" * 6]
    for method, density in _README:
        here = {row.source: row for row in found if (row.method, row.density, row.texts) == (method, density, 0)}
        if any(source not in here for source in LORAS):
            continue
        name = _NAMES[method] + (f" {100 * density:g} %" if method in ("cut", "distill") else "")
        cells = []
        for source in LORAS:
            row = here[source]
            size = f"{row.bytes / 1000:.0f} kB" if row.bytes else ""
            cells += [size, f"{row.r2:.3f}", f"{100 * (row.accuracy or 0):.1f} %"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def settings(results: Sequence[Result], machine: dict[str, Any]) -> str:
    """What was fitted, how, and on what."""
    steps = max(one["steps"] for one in results)
    facts = {
        "sources": "spam and genre, the LoRAs that ship (rank 8, 1.34 MB); sre, a full fine-tune of all-MiniLM-L6-v2 (90.9 MB); smollm2, a "
        f"LoRA of SmolLM2 (135 M, from its GGUF file) on all linear layers, rank {fit_language.RANK}, trained on 256 passages of romance",
        "texts": f"512 of each task to fit on, without labels; 300 held out; cut to {TOKENS} tokens. For sre those of both tasks, for smollm2 "
        "256 and 150 passages of romance",
        "distill": f"{steps} steps of {BATCH} texts; of smollm2 {LANGUAGE_STEPS}",
        "seeds": ", ".join(map(str, sorted({one["seed"] for one in results}))),
        "runs": f"{len(results)}, {sum(one['seconds'] for one in results) / 3600:.1f} hours of one thread on a shared machine",
    }  # fmt: skip
    return facts_table(facts, machine)


FITS = ("base", "source", "cut", "cut-global", "moments", "distill")
SUPPORTS = ("distill", "magnitude", "gradient", "fisher", "wm", "random", "runs")
RIVALS = ("distill", "moments", "low-rank", "dare", "darex", "learned")


def parts(results: Sequence[Result], machine: dict[str, Any]) -> dict[str, str]:
    """What the page has of the results."""
    found = rows(results)
    return {
        "settings": settings(results, machine),
        "fits": table(found, FITS, (0.0, *DENSITIES, 1.0), LORAS),
        "tuned": table(found, FITS, (0.0, *DENSITIES, 1.0), (TUNED,)),
        "language": language_table(found),
        "texts": texts_table(found),
        "supports": table(found, SUPPORTS, (SUPPORTED, 0.01), ("spam",)),
        "rivals": table(found, RIVALS, (0.0005, SUPPORTED, 0.01), ("spam",)),
    }


def write(folder: Path, page: Path = PAGE, readme: Path = README) -> None:
    """CSV, tables and a picture from what is stored.

    Args:
        folder: with ``runs.jsonl`` and ``machine.json``; gets ``fits.csv``.
        page: whose parts are replaced; the picture goes beside it.
        readme: whose table is replaced.
    """
    results = list(Store(folder / "runs.jsonl").results.values())
    machine = json.loads((folder / "machine.json").read_text("utf-8"))
    found = rows(results)
    write_csv(found, folder / "fits.csv")
    page.write_text(filled(page.read_text("utf-8"), parts(results, machine)), "utf-8")
    readme.write_text(filled(readme.read_text("utf-8"), {"short": short(found)}), "utf-8")
    (page.parent / "fits.png").write_bytes(picture(found))


_LINES = {
    "cut": ("o", ":"),
    "cut-global": ("s", ":"),
    "moments": ("^", "--"),
    "distill": ("D", "-"),
    "low-rank": ("v", "--"),
    "runs": ("P", "-"),
}


_DRAWN = (*LORAS, TUNED)


def picture(found: Sequence[Row]) -> bytes:
    """What is kept by the bytes of the file, one panel a source."""
    from matplotlib.ticker import NullFormatter

    from shira_analysis.figures.style import BLUE, GREEN, GREY, ORANGE, RED, figure, our_style, render

    colours = dict(zip(_LINES, (GREY, "black", GREEN, BLUE, RED, ORANGE), strict=True))
    with our_style():
        drawn = figure(7.6, 3.2)
        axes = drawn.subplots(1, len(_DRAWN), sharey=True)
        for axis, source in zip(axes, _DRAWN, strict=True):
            for method, (mark, dashes) in _LINES.items():
                here = [row for row in found if (row.source, row.method, row.texts) == (source, method, 0)]
                if not here:
                    continue
                here.sort(key=lambda row: row.bytes)
                axis.plot(
                    [row.bytes / 1000 for row in here], [max(row.r2, -0.05) for row in here],
                    marker=mark, ls=dashes, color=colours[method], ms=4, lw=1.2, label=METHODS[method].label,
                )  # fmt: skip
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_title(source)
            axis.set_xlabel("file, kB")
            axis.set_ylim(-0.07, 1.03)
            axis.grid()
        axes[0].set_ylabel("R² of held-out outputs")
        handles, labels = axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=3)
        return render(drawn)
