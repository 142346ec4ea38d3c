"""One run of the study of fits, in a process that keeps models and texts between runs."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from shira_format._core.arrays import as_array
from shira_format.adapter import Adapter
from shira_format.convert.fit.distill import Distillation, distill
from shira_format.convert.fit.quality import effect
from shira_format.convert.fit.support import Rule, largest, update_of
from shira_format.convert.fit.task import Task, see, showing, showing_base
from shira_format.format import save
from shira_format.tensors import DenseTensor, SparseTensor
from studies import fit_rivals
from studies.fit_language import log_perplexity
from studies.fit_sources import Source, source_of
from studies.fits import BATCH, METHODS, FitRun, Method

Found = dict[str, tuple[Tensor, Tensor]]


def work(run: FitRun) -> dict[str, Any]:
    """Do one run."""
    source, method = source_of(run.source), METHODS[run.method]
    if source.task.reference is None:
        effect(source.task, {})  # what source and base do, for all runs
    task = _fewer(source.task, run.texts, run.seed)
    budget = round(run.density * task.numel)
    begin, spent = time.perf_counter(), time.process_time()
    shown, found, written = _made(source, task, budget, run, method)
    took = time.process_time() - spent
    if written is None:
        written = _bytes(source, found)
    measured = effect(shown, found)
    with showing(shown, found):
        accuracy = None if source.labels is None else _accuracy(shown, source.labels)
        perplexity = round(log_perplexity(shown), 5) if shown.is_causal else None
    return measured.as_dict() | {
        "budget": budget, "bytes": written, "source_bytes": source.bytes, "fit_seconds": round(took, 2), "accuracy": accuracy,
        "log_perplexity": perplexity,
        "seconds": round(time.perf_counter() - begin, 2),
    }  # fmt: skip


def _made(source: Source, task: Task, budget: int, run: FitRun, method: Method) -> tuple[Task, Found, int | None]:
    """What a method makes: the task with weights that are not sparse in it, entries, and bytes if it is no adapter."""
    if method.kind in ("base", "source"):
        weights = task.source if method.kind == "source" else {}
        return _with(task, weights), {}, source.bytes if weights else 0
    if method.kind == "low-rank":
        # As many bytes as the adapter has: an entry takes its value and about as much as an index.
        room = _bytes(source, _cut(task, budget, "global"))
        weights, size = fit_rivals.low_rank(task, room // 4, run.seed, run.steps)
        return _with(task, weights), {}, 4 * size + sum(one.nbytes for one in task.whole.values())
    return task, _entries(task, budget, run, method), None


def _with(task: Task, weights: dict[str, Tensor]) -> Task:
    """The task with weights that are in the model beside what is stored whole."""
    return replace(task, whole=task.whole | weights)


def _fewer(task: Task, count: int, seed: int) -> Task:
    """With so many texts to fit on, in whole batches."""
    train = task.train
    if count:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        train = [train[int(at)] for at in order[: max(1, count // BATCH)]]
    return replace(task, train=train)


def _entries(task: Task, budget: int, run: FitRun, method: Method) -> Found:
    if method.kind == "cut":
        return _cut(task, budget, method.support)
    if method.kind == "moments":
        from shira_format.convert.fit.moments import moments

        return dict(moments(task, budget, seed=run.seed))
    if method.kind == "dare":
        return fit_rivals.dare(task, budget, run.seed)
    if method.kind == "darex":
        return fit_rivals.darex(task, budget, run.seed)
    if method.kind == "learned":
        return fit_rivals.learned(task, budget, run.seed, run.steps)
    options = Distillation(steps=run.steps, rule=cast("Rule", method.support), run=method.run)
    return distill(task, budget, seed=run.seed, options=options)


def _cut(task: Task, budget: int, scope: str) -> Found:
    """The largest updates of all tensors together, or of each."""
    with showing_base(task):
        sizes = {name: update_of(task, name).abs() for name in task.source}
        if scope == "global":
            chosen = largest(sizes, budget)
        else:
            share = budget / task.numel
            chosen = {}
            for name, one in sizes.items():
                chosen |= largest({name: one}, max(1, round(share * one.numel())))
        return {name: (at, task.source[name].reshape(-1)[at].float()) for name, at in chosen.items()}


def _accuracy(task: Task, labels: Any) -> float:
    with torch.no_grad():
        logits = torch.cat([see(task, batch, hidden=False).outputs for batch in task.held])
    return round(float((logits.argmax(1).numpy() == labels).mean()), 5)


def _bytes(source: Source, found: Found) -> int:
    """The size of the adapter's file, with what is stored whole."""
    sparse = [
        SparseTensor(
            source.names[name], tuple(source.task.source[name].shape), as_array(at), as_array(source.task.rounded(name, values)),
            base_digest="0" * 64,
        )
        for name, (at, values) in found.items()
    ]  # fmt: skip
    dense = [DenseTensor(source.names.get(name, name), as_array(one)) for name, one in source.task.whole.items()]
    with tempfile.TemporaryDirectory(prefix="shira-studies-") as folder:
        path = Path(folder) / "adapter.st"
        save(Adapter(sparse, dense=dense), path)
        return path.stat().st_size
