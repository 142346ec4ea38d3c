"""One adapter on the texts of the other tasks."""

from __future__ import annotations

import time
from typing import Any

from studies.bank import train
from studies.bank.encoder import features, margins, read_head
from studies.bank.plan import BankRun
from studies.fusion import fuse
from studies.neighbours.plan import NeighbourRun

start = fuse.start


def work(run: NeighbourRun) -> dict[str, Any]:
    """Do one run: margins under the head that was fitted to the unchanged encoder, and under that of the task's own adapter."""
    begin = time.perf_counter()
    bank = fuse.place().bank
    done = bank.store()
    others = {
        one["task"]
        for one in done.results.values()
        if (one["form"], one["seed"]) == (run.form, run.seed) and one["task"] != run.source
    }
    found: dict[str, Any] = {"start": {}, "own": {}}
    with fuse.showing(BankRun(run.source, run.form, run.seed)) as model:
        for task in sorted(others):
            held = train.tokens(task)["test"]
            outputs = features(model, held)
            heads = {
                "start": read_head(bank.start(task, run.seed)),
                "own": fuse.head(BankRun(task, run.form, run.seed)),
            }
            for name, head in heads.items():
                found[name][task] = margins(outputs, head, held.labels)
    return found | {"seconds": round(time.perf_counter() - begin, 2)}
