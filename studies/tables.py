"""Tables in pages, and what all reports of the bank's studies share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from studies.bank.forms import FORMS, TASKS
from studies.bank.plan import Bank, BankRun, Settings
from studies.learning import BATCH
from studies.report import facts_table, filled
from studies.runs import Result, Store
from studies.statistics import Case

PAGES = Path(__file__).parents[1] / "docs" / "studies"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    rows = [" | ".join(head), *(" | ".join(line) for line in lines)]
    return "\n".join([f"| {rows[0]} |", "|---|" + "--:|" * (len(head) - 1), *(f"| {row} |" for row in rows[1:])])


def settings(bank: Bank, results: Sequence[Result], machine: dict[str, Any], about: Mapping[str, str]) -> str:
    """What a study of a bank consisted of."""
    of: Settings = bank.settings()
    facts = {
        "model": "all-MiniLM-L6-v2, float32, without dropout; each task has a head of its own, which is never fused",
        "tasks": "; ".join(f"{name}: {what}" for name, what in TASKS.items()),
        "texts": f"{of.held} held out for each task, cut to {of.tokens} tokens",
        "training": f"{of.steps} steps of {BATCH} texts, AdamW without decay; learning rates are those of the study of masks",
        **about,
        "runs": f"{len(results)}, {sum(one['seconds'] for one in results) / 60:.0f} minutes of one thread on a shared machine",
    }  # fmt: skip
    return facts_table(facts, machine)


def machine_of(folder: Path) -> dict[str, Any]:
    """What the runs of a folder were done on."""
    found: dict[str, Any] = json.loads((folder / "machine.json").read_text("utf-8"))
    return found


def write_page(page: Path, parts: dict[str, str]) -> None:
    """Replace the parts of a page."""
    page.write_text(filled(page.read_text("utf-8"), parts), "utf-8")


class Singles:
    """The adapters of a bank alone."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __getitem__(self, run: BankRun) -> Result:
        return self.store.results[run.key]

    def case(self, run: BankRun, fused: Sequence[float]) -> Case:
        """An adapter beside what it became: margins on the held-out texts of its task."""
        alone = self[run]
        return Case.of(run.task, fused, alone["margins"], alone["base"])


def order_of_form(form: str) -> int:
    """The place of a form in tables."""
    return list(FORMS).index(form)
