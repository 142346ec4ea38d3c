"""From the stored runs of the study of masks to a CSV, tables in the page, and pictures."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from studies.learning import BATCH
from studies.masks import LENGTH, METHODS, SCALED, SIZES, TASKS
from studies.runs import Result, Store

PAGE = Path(__file__).parents[1] / "docs" / "studies" / "masks.md"
REFERENCE = "lora"


@dataclass(frozen=True)
class Row:
    """A method, size and task over its seeds.

    Attributes:
        method: of ``METHODS``.
        size: of the mask.
        task: whose held-out texts are scored.
        seeds: how many.
        accuracy: mean over seeds, a share.
        accuracy_sd: its standard deviation over seeds.
        loss: mean cross-entropy over seeds.
        loss_sd: likewise.
        rate: learning rate.
        steps: of training.
        trained: parameters, without the head.
        entries: of the mask or of the factors.
        seconds: of a training, mean.
    """

    method: str
    size: str
    task: str
    seeds: int
    accuracy: float
    accuracy_sd: float
    loss: float
    loss_sd: float
    rate: float
    steps: int
    trained: int
    entries: int
    seconds: float


def tested(store: Store) -> list[Result]:
    """The results on held-out texts."""
    return [result for result in store.results.values() if result["part"] == "test"]


def rows(results: Iterable[Result]) -> list[Row]:
    """All methods, sizes and tasks with two seeds or more, in the study's order: without a second one there is no spread."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result["size"], result["method"], result["task"]), []).append(result)
    order = ["all", "none", *SIZES]
    keys = sorted(groups, key=lambda key: (order.index(key[0]), list(METHODS).index(key[1]), key[2]))
    return [_row(groups[key]) for key in keys if len(groups[key]) > 1]


def _row(group: Sequence[Result]) -> Row:
    first = group[0]
    accuracies = [one["accuracy"] for one in group]
    losses = [math.inf if one["loss"] is None else one["loss"] for one in group]
    return Row(
        first["method"], first["size"], first["task"], len(group), mean(accuracies), stdev(accuracies),
        mean(losses), stdev(losses) if math.isfinite(max(losses)) else math.nan, first["rate"], first["steps"],
        first["trained"], first["entries"], mean(one["train_seconds"] for one in group),
    )  # fmt: skip


def difference(results: Sequence[Result], case: tuple[str, str], other: tuple[str, str]) -> tuple[float, float]:
    """How much more of the texts of both tasks one method has right than another, and the standard error over the texts.

    Of each text the difference of its shares over the seeds counts, so that what is hard for both does not.

    Args:
        results: of test runs.
        case: method and size.
        other: likewise.
    """
    parts = []
    for task in TASKS:
        ours, theirs = (_shares(results, task, *one) for one in (case, other))
        parts.append(ours - theirs)
    each = np.concatenate(parts)
    return float(each.mean()), float(each.std(ddof=1) / math.sqrt(each.size))


def _shares(results: Sequence[Result], task: str, method: str, size: str) -> Any:
    """Of each text, the share of the seeds in which it is right."""
    found = [r for r in results if (r["task"], r["method"], r["size"]) == (task, method, size)]
    bits = [np.unpackbits(np.frombuffer(bytes.fromhex(r["right"]), np.uint8))[: r["texts"]] for r in found]
    return np.mean(bits, axis=0)


def write_csv(found: Sequence[Any], path: Path) -> None:
    """One line a row; rows are of one dataclass, whose fields are the columns."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, [column.name for column in fields(found[0])], lineterminator="\n")
        table.writeheader()
        for row in found:
            table.writerow({key: f"{v:.5g}" if isinstance(v, float) else v for key, v in asdict(row).items()})


def table(found: Sequence[Row], results: Sequence[Result], sizes: Sequence[str]) -> str:
    """The methods of some sizes, by their mean accuracy over both tasks."""
    head = ["method", "trained", *(f"{task}, %" for task in TASKS), *(f"{task}, loss" for task in TASKS)]
    head += ["both, against LoRA", "rate"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for _, method, size, both in sorted(_pairs(found, sizes), key=lambda one: -one[0]):
        reference = (REFERENCE, size if size in METHODS[REFERENCE].sizes else SIZES[0])
        gain, error = difference(results, (method, size), reference)
        cells = [METHODS[method].label, f"{both[0].trained:,}".replace(",", " ")]
        cells += [f"{100 * row.accuracy:.1f} ± {100 * row.accuracy_sd:.1f}" for row in both]
        cells += [f"{row.loss:.3f} ± {row.loss_sd:.3f}" for row in both]
        cells += [
            "0 ± 0" if (method, size) == reference else f"{100 * gain:+.1f} ± {100 * error:.1f}",
            _rate(both[0]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rate(row: Row) -> str:
    return f"{row.rate:g}"


def _pairs(found: Sequence[Row], sizes: Sequence[str]) -> list[tuple[float, str, str, list[Row]]]:
    """Mean accuracy, method, size, and the rows of all tasks."""
    pairs = []
    for method, size in dict.fromkeys((row.method, row.size) for row in found if row.size in sizes):
        both = [row for task in TASKS for row in found if (row.method, row.size, row.task) == (method, size, task)]
        if len(both) == len(TASKS):
            pairs.append((mean(row.accuracy for row in both), method, size, both))
    return pairs


def alphas(results: Sequence[Result]) -> dict[tuple[str, str], dict[float, list[float]]]:
    """Accuracies of the seeds by strength, for each method that has them and each task."""
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for result in results:
        for alpha, accuracy in result.get("alphas", {}).items():
            found.setdefault((result["method"], result["task"]), {}).setdefault(float(alpha), []).append(accuracy)
    return {key: found[key] for key in sorted(found, key=lambda one: (SCALED.index(one[0]), one[1]))}


def settings(results: Sequence[Result], machine: dict[str, Any]) -> str:
    """What was trained, how, and on what."""
    some = results[0]
    seeds = sorted({result["seed"] for result in results})
    facts = {
        "model": "all-MiniLM-L6-v2, float32, without dropout; a head of two classes",
        "tasks": "genre: news or romance; spam: ham or spam",
        "texts": f"{some['texts']} held out for each task, cut to {LENGTH} tokens",
        "training": f"{some['steps']} steps of {BATCH} texts, AdamW without decay, gradients clipped to 1",
        "seeds": ", ".join(map(str, seeds)),
        "trainings": f"{len(results)}, {sum(one['seconds'] for one in results) / 3600:.1f} hours of one thread on a shared machine",
    }  # fmt: skip
    return facts_table(facts, machine)


def facts_table(facts: Mapping[str, str], machine: dict[str, Any]) -> str:
    """What a study consisted of, and at the end the machine that it ran on."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    cpu = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    lines = [*facts.items(), ("machine", f"{cpu}; Python {machine['python']}; {packages}")]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in lines)])


def filled(page: str, parts: dict[str, str]) -> str:
    """The page with what stands between ``<!-- results: NAME -->`` and ``<!-- end -->`` replaced.

    Raises:
        ValueError: a part has no place in the page, or a place no part.
    """
    places = re.findall(r"<!-- results: (.+?) -->", page)
    if sorted(places) != sorted(parts):
        raise ValueError(f"the page has places for {sorted(places)}, and there are {sorted(parts)}")
    return re.sub(
        r"(<!-- results: (.+?) -->\n).*?(<!-- end -->)",
        lambda place: f"{place[1]}\n{parts[place[2]]}\n\n{place[3]}",
        page,
        flags=re.DOTALL,
    )


def parts(store: Store, machine: dict[str, Any]) -> dict[str, str]:
    """What the page has of the results."""
    results = tested(store)
    found = rows(results)
    return {
        "settings": settings(results, machine),
        "large": table(found, results, ("all", "none", "large")),
        "small": table(found, results, ("small",)),
    }


def write(folder: Path, page: Path = PAGE) -> None:
    """CSV, tables and pictures from what is stored.

    Args:
        folder: with ``runs.jsonl`` and ``machine.json``; gets ``masks.csv``.
        page: whose parts are replaced; pictures go beside it.
    """
    from studies import pictures

    store = Store(folder / "runs.jsonl")
    machine = json.loads((folder / "machine.json").read_text("utf-8"))
    results = tested(store)
    found = rows(results)
    write_csv(found, folder / "masks.csv")
    page.write_text(filled(page.read_text("utf-8"), parts(store, machine)), "utf-8")
    whole = {method: both for _, method, _, both in _pairs(found, ("all", "none")) if method in pictures.LINES}
    (page.parent / "masks-accuracy.png").write_bytes(pictures.accuracies(_pairs(found, SIZES), whole))
    (page.parent / "masks-alpha.png").write_bytes(pictures.strengths(alphas(results)))
