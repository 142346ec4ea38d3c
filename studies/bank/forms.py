"""The forms of an adapter, at equal numbers of entries, and the tasks that each is trained for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shira_format.adapter import Adapter
from shira_format.masks import Struct, make_mask
from studies.masks import MATRICES

TASKS = {
    "spam": "ham or spam",
    "genre": "news or romance",
    "editorial": "editorial or fiction",
    "hobbies": "hobbies or adventure",
    "learned": "belles lettres or learned",
    "lore": "government or lore",
}
"""What each has to tell apart. ``genre``, ``editorial`` and ``hobbies`` are neighbours: fact from fiction, in other genres each."""

RANK = 2  # of the LoRA; masks have as many entries as it has parameters, 82 944
CUT = 0.05  # density of the form ``cut``

# Every so many rows of the matrices of a shape, so that rows and diagonal are about as many entries as the LoRA has.
STEPS = (
    (r"encoder\.layer\.\d+\.attention\..*(query|key|value|dense)\.weight$", 128),
    (r"encoder\.layer\.\d+\.intermediate\.dense\.weight$", 171),
    (r"encoder\.layer\.\d+\.output\.dense\.weight$", 192),
)


@dataclass(frozen=True)
class Form:
    """A form.

    Attributes:
        label: in tables.
        kind: ``"lora"``, ``"mask"``: entries of a mask are trained, ``"fitted"``: distilled from the LoRA, or ``"cut"``: the LoRA's
            largest changes.
        rule: of the mask.
        rate: learning rate, that of the study of masks.
        apart: whether each task has a mask of its own, made so as to have little or nothing in common with the others.
        runs: entries in a row.
    """

    label: str
    kind: str = "mask"
    rule: str = ""
    rate: float = 0.0
    apart: bool = False
    runs: int = 1


FORMS = {
    "lora": Form("LoRA", "lora", rate=3e-3),
    "wm": Form("WM, one mask for all", rule="wm", rate=1e-2),
    "wm-bands": Form("WM, a band for each", rule="wm", rate=1e-2, apart=True),
    "struct": Form("Struct, one mask for all", rule="struct", rate=3e-2),
    "struct-apart": Form("Struct, other rows for each", rule="struct", rate=3e-2, apart=True),
    "rand": Form("Rand, another for each", rule="rand", rate=1e-2, apart=True),
    "runs": Form("WM in runs of 16, one mask for all", rule="wm", rate=3e-2, runs=16),
    "fitted": Form("fitted to the LoRA", "fitted"),
    "cut": Form("LoRA cut to its largest 5 %", "cut"),
}


def mask_of(model: Any, form: Form, number: int, seed: int) -> Adapter:
    """The mask of a form for one task.

    Args:
        model: a torch module.
        form: of the kind ``"mask"``.
        number: of the task; tasks of different numbers have different masks if the form says so.
        seed: of the training; a random mask has one that is the task's, too.
    """
    place = number if form.apart else 0
    size: dict[str, Any] = {"rank": RANK, "threads": 1}
    if form.rule == "struct":
        return Adapter(one for part in _struct(model, place) for one in part.values())
    if form.rule == "rand":
        return make_mask(model, "rand", seed=1 + 100 * seed + place, include=[MATRICES], **size)
    return make_mask(model, form.rule, band=place, runs=form.runs, include=[MATRICES], **size)


def _struct(model: Any, offset: int) -> Iterator[Adapter]:
    """Rows of one step each, so that those of other offsets are others; the main diagonal is in all."""
    for pattern, step in STEPS:
        rule = Struct("rows", step=step, offset=offset)
        yield make_mask(model, rule, rank=RANK, include=[pattern], threads=1)
