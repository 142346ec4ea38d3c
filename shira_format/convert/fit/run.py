"""Fits from end to end: source, live model and inputs in; an adapter file and a report out."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from shira_format._core.arrays import as_array
from shira_format.adapter import Adapter
from shira_format.checkpoints import Checkpoint
from shira_format.convert.fit.data import Data, Inputs, Split, read_inputs, sampled
from shira_format.convert.fit.distill import Distillation, distill
from shira_format.convert.fit.live import Kind, LiveModel, load_base
from shira_format.convert.fit.quality import effect
from shira_format.convert.fit.report import FitReport
from shira_format.convert.fit.sources import SourceWeights, source_weights, tensor_of
from shira_format.convert.fit.task import Entries, OnStep, Task, blocks_of, showing_source
from shira_format.convert.full import FullConversion
from shira_format.convert.given import Given
from shira_format.convert.inputs import Conversion, ConversionInputs
from shira_format.convert.lora import LoraConversion
from shira_format.convert.pipeline import convert, location
from shira_format.convert.refit import AdapterConversion
from shira_format.convert.report import ConversionReport
from shira_format.errors import SourceError
from shira_format.format import load
from shira_format.selection import TopK

SAMPLED = 160  # texts that a causal language model writes, where none are given


class Method(Protocol):
    """A way to fit: exactly ``budget`` entries of all weights together, as flat indices and new values."""

    def __call__(
        self, task: Task, budget: int, *, seed: int = 0, on_step: OnStep = lambda *_: None
    ) -> Mapping[str, tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class FitOptions:
    """How to fit.

    Attributes:
        method: ``"distill"``, or a function (:class:`Method`).
        distillation: of ``"distill"``.
        held: share of the inputs that is held out to measure on.
        batch: inputs of a batch.
        length: tokens after which a text is cut.
        limit: at most so many inputs, held-out ones included; of texts that a model writes: so many.
        seed: of all that is drawn.
        kind: what is compared; see :func:`shira_format.convert.fit.live.load_base`.
        whole_vectors: store biases, norms and other vectors that a full fine-tune changes whole; else they share the budget.
        prefix: what the model's names start with, if the base's fit in several ways.
    """

    method: str | Method = "distill"
    distillation: Distillation = field(default_factory=Distillation)
    held: float = 0.2
    batch: int = 16
    length: int = 64
    limit: int | None = None
    seed: int = 0
    kind: Kind | None = None
    whole_vectors: bool = True
    prefix: str | None = None

    def split(self, longest: int | None = None) -> Split:
        """How inputs are divided and batched, for a model that takes ``longest`` tokens at most."""
        return Split(self.held, self.seed, self.batch, min(self.length, longest or self.length), self.limit)

    def resolved(self) -> tuple[str, Method, dict[str, Any]]:
        """The method's name, the method, and its options for the manifest.

        Raises:
            ValueError: no method has the name.
        """
        if not isinstance(self.method, str):
            return getattr(self.method, "__name__", type(self.method).__name__), self.method, {}
        if self.method not in METHODS:
            raise ValueError(f"no fit is named {self.method!r}; the fits are {', '.join(METHODS)}")
        return self.method, *METHODS[self.method](self)


def _distillation(options: FitOptions) -> tuple[Method, dict[str, Any]]:
    notes = {key: value for key, value in asdict(options.distillation).items() if key != "start"}
    return partial(distill, options=options.distillation), notes


METHODS: dict[str, Callable[[FitOptions], tuple[Method, dict[str, Any]]]] = {"distill": _distillation}


def fit_lora(
    lora: str | os.PathLike[str],
    base: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str] | None,
    data: Data | None = None,
    *,
    density: float | None = None,
    top_k: int | None = None,
    held: Data | None = None,
    model: LiveModel | None = None,
    options: FitOptions = FitOptions(),
    dialect: str | None = None,
    prefix: str | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_unused: bool = False,
    self_contained: bool = False,
    threads: int | None = None,
    force: bool = False,
    on_step: OnStep = lambda *_: None,
    on_stage: Callable[[str], object] = lambda _: None,
) -> FitReport:
    """Convert a LoRA into a sparse adapter whose entries are fitted to do to the model what the LoRA does.

    The adapter is compared with the plain cut of the same number of entries on inputs that were held out, and the nearer one to the
    LoRA is written. The same input and seed give the same bytes on one machine.

    Args:
        lora: see :func:`shira_format.convert.lora.lora_to_shira`, also for the arguments that are not listed here.
        base: likewise.
        out: the adapter file to write; None: only the report.
        data: inputs to fit on, without labels: a file of texts (a text a line, or ``.jsonl`` with ``text``) or of arrays (``.npy``,
            ``.npz``), texts, arrays, or batches as the model takes them. None: a causal language model writes its own.
        density: share of the entries to keep, of all tensors together; 0.01 by default. Give at most one of ``density`` and ``top_k``.
        top_k: number of entries to keep, likewise.
        held: inputs to measure on; by default a share of ``data``.
        model: the live base; loaded from ``base`` by default, in float32. It is as before when this returns.
        options: of the fit.
        dialect: see there.
        prefix: see there.
        rank: see there.
        alpha: see there.
        include: see there.
        exclude: see there.
        allow_unused: see there.
        self_contained: see there.
        threads: see there; torch has its own setting.
        force: see there.
        on_step: called with the number of steps at most, that of this step, and its loss.
        on_stage: called with a line on what comes next.

    Raises:
        ValueError: arguments that exclude each other, or are out of range.
        SourceError: an input that cannot be converted or run; nothing is written.
        BaseMismatch: the live model is not the base.
        FormatError: a safetensors file is damaged.
    """
    conversion = LoraConversion(
        os.fspath(lora), location(base, None), dialect, tuple(include), tuple(exclude), prefix, allow_unused, rank, alpha
    )  # fmt: skip
    fit = _Fit(data, held, model, options, density, top_k, self_contained, threads, force, on_step, on_stage)
    return fit.run(conversion, conversion.open(base if isinstance(base, Checkpoint) else None), out)


def fit_full(
    tuned: str | os.PathLike[str],
    base: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str] | None,
    data: Data | None = None,
    *,
    density: float | None = None,
    top_k: int | None = None,
    held: Data | None = None,
    model: LiveModel | None = None,
    options: FitOptions = FitOptions(),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_unused: bool = False,
    self_contained: bool = False,
    threads: int | None = None,
    force: bool = False,
    on_step: OnStep = lambda *_: None,
    on_stage: Callable[[str], object] = lambda _: None,
) -> FitReport:
    """Convert a full fine-tune into a sparse adapter whose entries are fitted to do to the model what the fine-tune does.

    Biases, norms and other vectors that it changes are stored whole, unless ``options.whole_vectors`` is false.

    Args:
        tuned: see :func:`shira_format.convert.full.full_to_shira`; all other arguments are those of :func:`fit_lora`.
        base: see there.
        out: see there.
        data: see there.
        density: see there.
        top_k: see there.
        held: see there.
        model: see there.
        options: see there.
        include: see there.
        exclude: see there.
        allow_unused: see there.
        self_contained: see there.
        threads: see there.
        force: see there.
        on_step: see there.
        on_stage: see there.

    Raises:
        ValueError, SourceError, BaseMismatch, FormatError: see :func:`fit_lora`.
    """
    conversion = FullConversion(
        os.fspath(tuned), location(base, None), include=tuple(include), exclude=tuple(exclude), allow_unused=allow_unused
    )  # fmt: skip
    fit = _Fit(data, held, model, options, density, top_k, self_contained, threads, force, on_step, on_stage)
    return fit.run(conversion, conversion.open(base if isinstance(base, Checkpoint) else None), out)


def fit_adapter(
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    base: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str] | None,
    data: Data | None = None,
    *,
    strengths: Sequence[float] = (),
    density: float | None = None,
    top_k: int | None = None,
    held: Data | None = None,
    model: LiveModel | None = None,
    options: FitOptions = FitOptions(),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    self_contained: bool = False,
    threads: int | None = None,
    force: bool = False,
    on_step: OnStep = lambda *_: None,
    on_stage: Callable[[str], object] = lambda _: None,
) -> FitReport:
    """Fit an adapter of fewer entries to one adapter, or to what several do together.

    Of several the source is their sum, as a :class:`shira_format.live.switcher.Switcher` loads them one upon the other; for another
    merge give the merged adapter.

    Args:
        adapters: one adapter file, or several of one base.
        base: the checkpoint that they are of.
        out: see :func:`fit_lora`, also for all that is not listed here.
        data: see there.
        strengths: of each adapter, beside its own alpha; 1 by default.
        density: see there.
        top_k: see there.
        held: see there.
        model: see there.
        options: see there.
        include: see there.
        exclude: see there.
        self_contained: see there.
        threads: see there.
        force: see there.
        on_step: see there.
        on_stage: see there.

    Raises:
        ValueError, SourceError, BaseMismatch, FormatError: see :func:`fit_lora`.
    """
    paths = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    conversion = AdapterConversion(
        tuple(os.fspath(path) for path in paths), location(base, None), tuple(map(float, strengths)), tuple(include), tuple(exclude)
    )  # fmt: skip
    fit = _Fit(data, held, model, options, density, top_k, self_contained, threads, force, on_step, on_stage)
    return fit.run(conversion, conversion.open(base if isinstance(base, Checkpoint) else None), out)


@dataclass
class _Fit:
    """One fit, whatever its source."""

    data: Data | None
    held: Data | None
    live: LiveModel | None
    options: FitOptions
    density: float | None
    top_k: int | None
    self_contained: bool
    threads: int | None
    force: bool
    on_step: OnStep
    on_stage: Callable[[str], object]
    seconds: dict[str, float] = field(default_factory=dict)

    def run(
        self, conversion: Conversion, inputs: ConversionInputs, out: str | os.PathLike[str] | None
    ) -> FitReport:
        name, method, notes = self.options.resolved()
        rule = self._rule()
        with self._timed("load"):
            live = self.live or load_base(inputs.base.path, inputs, self.options.kind)
            source = source_weights(
                inputs,
                live.model,
                vectors=self.options.whole_vectors,
                prefix=self.options.prefix,
                threads=self.threads,
            )
        with self._timed("inputs"):
            task, given = self._task(live, source)
        budget = _budget(rule, task)
        self.on_stage(f"fitting {budget} of {task.numel} entries")
        with self._timed("fit"):
            found = method(task, budget, seed=self.options.seed, on_step=self.on_step)
        entries = _by_adapter_name(found, source)
        write = partial(
            convert,
            conversion,
            inputs=source.inputs,
            self_contained=self.self_contained,
            threads=self.threads,
            force=self.force,
        )
        self.on_stage("measuring on the inputs that were held out")
        with self._timed("measure"), tempfile.TemporaryDirectory(prefix="shira-fit-") as folder:
            base = effect(task, {})
            cut = Path(folder) / "plain.st"
            write(cut, rule=rule)
            plain = effect(task, _entries(load(cut), source))
            fitted = Path(folder) / "fit.st"
            write(fitted, rule=Given(entries))
            fit = effect(task, _entries(load(fitted), source))
            kept = "fit" if fit.r2 >= plain.r2 else "plain"
            if kept == "plain":
                entries = {key: (one.indices, one.values) for key, one in load(cut).items()}
        report = FitReport(
            name, ConversionReport(), fit, plain, base, kept, budget,
            options=notes | asdict(self.options.split()),
            inputs=given.source | {"fitted": given.counts[0], "held": given.counts[1]},
            seconds=self.seconds, notices=list(given.notices),
        )  # fmt: skip
        if kept == "plain":
            report.notices.append(
                f"the plain cut is nearer to the source on held-out inputs (R^2 {plain.r2:.3f}, fitted {fit.r2:.3f}), and is what was written"
            )
        selection: dict[str, Any] = {
            "rule": "fit" if kept == "fit" else "top-k",
            "scope": "global" if kept == "fit" else rule.scope,
        }
        selection |= {"density": rule.density} if rule.top_k is None else {"top_k": rule.top_k}
        report.conversion = write(out, rule=Given(entries, selection, {"fit": report.provenance()}))
        return report

    def _rule(self) -> TopK:
        """The plain cut that a fit is compared with."""
        if self.top_k is not None:
            return TopK(self.density, self.top_k, "global")
        return TopK(0.01 if self.density is None else self.density)

    def _task(self, live: LiveModel, source: SourceWeights) -> tuple[Task, Inputs]:
        split = self.options.split(live.longest)
        task = Task(
            live.model, source.sparse, source.whole, [], [], live.outputs, live.is_logits, blocks_of(live.model), source.dtypes
        )  # fmt: skip
        if self.data is None:
            given = self._sampled(task, live, split)
        else:
            given = read_inputs(self.data, split, live.tokenizer, self.held)
        task.train, task.held = given.train, given.held
        return task, given

    def _sampled(self, task: Task, live: LiveModel, split: Split) -> Inputs:
        if not live.is_causal or live.tokenizer is None:
            raise SourceError(
                "there are no inputs to fit on, and this model cannot write any: give texts, arrays or batches"
            )
        count = split.limit or SAMPLED
        self.on_stage(f"writing {count} texts with the source itself")
        with showing_source(task):
            found = sampled(
                live.model,
                live.tokenizer,
                count=count,
                length=split.length,
                seed=self.options.seed,
                batch=split.batch,
            )
        given = read_inputs(found, split)
        given.counts = (
            sum(len(one["input_ids"]) for one in given.train),
            sum(len(one["input_ids"]) for one in given.held),
        )
        given.source = {"name": "sampled from the source", "seed": self.options.seed}
        given.notices.append(
            f"no texts were given: {count} of {split.length} tokens were sampled from the source itself"
        )
        return given

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


def _budget(rule: TopK, task: Task) -> int:
    """As many entries as the plain cut has."""
    if rule.scope == "global":
        return rule.count(task.numel)
    return sum(rule.count(weight.numel()) for weight in task.source.values())


def _by_adapter_name(found: Mapping[str, tuple[Tensor, Tensor]], source: SourceWeights) -> dict[str, Any]:
    return {
        source.names[name]: (as_array(at).astype(np.int64, copy=False), as_array(values.detach()))
        for name, (at, values) in found.items()
    }


def _entries(adapter: Adapter, source: SourceWeights) -> Entries:
    """The entries of an adapter that was read back, by the model's names."""
    return {
        name: (tensor_of(adapter[key].indices), tensor_of(adapter[key].values))
        for name, key in source.names.items()
        if key in adapter
    }
