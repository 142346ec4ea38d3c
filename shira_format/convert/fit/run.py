"""Fits from end to end: source, live model and inputs in; an adapter file and a report out."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from shira_format.checkpoints import Checkpoint
from shira_format.convert.fit.attempts import Amount, Attempts, Made
from shira_format.convert.fit.data import Data, Inputs, Split, read_inputs, sampled
from shira_format.convert.fit.distill import Distillation, distill
from shira_format.convert.fit.live import Kind, LiveModel, load_base
from shira_format.convert.fit.moments import Reconstruction, moments
from shira_format.convert.fit.parts import Part, part_inputs
from shira_format.convert.fit.quality import effect
from shira_format.convert.fit.report import FitReport
from shira_format.convert.fit.search import Trial, halved, input_count
from shira_format.convert.fit.sources import SourceWeights, source_weights
from shira_format.convert.fit.task import Entries, OnStep, Task, blocks_of, showing_source
from shira_format.convert.full import FullConversion
from shira_format.convert.given import Given
from shira_format.convert.inputs import Conversion, ConversionInputs
from shira_format.convert.lora import LoraConversion
from shira_format.convert.pipeline import convert, location
from shira_format.convert.refit import AdapterConversion
from shira_format.convert.report import ConversionReport
from shira_format.errors import SourceError

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
        method: ``"distill"``, ``"moments"``, or a function (:class:`Method`).
        distillation: of ``"distill"``.
        reconstruction: of ``"moments"``.
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
    reconstruction: Reconstruction = field(default_factory=Reconstruction)
    held: float = 0.2
    batch: int = 8
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


def _reconstruction(options: FitOptions) -> tuple[Method, dict[str, Any]]:
    return partial(moments, options=options.reconstruction), asdict(options.reconstruction)


METHODS: dict[str, Callable[[FitOptions], tuple[Method, dict[str, Any]]]] = {
    "distill": _distillation,
    "moments": _reconstruction,
}


def fit_lora(
    lora: str | os.PathLike[str],
    base: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str] | None,
    data: Data | None = None,
    *,
    density: float | None = None,
    top_k: int | None = None,
    keep: float | None = None,
    max_bytes: int | None = None,
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
    compact: bool = False,
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
        density: share of the entries to keep, of all tensors together; 0.01 by default. Give at most one of these four.
        top_k: number of entries to keep, likewise.
        keep: the fewest entries that keep this share of the effect (R^2), in (0, 1), found by several fits: see
            :func:`shira_format.convert.fit.search.fewest_entries`.
        max_bytes: as many entries as a file of so many bytes has room for, found likewise: see
            :func:`shira_format.convert.fit.search.fullest_file`.
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
        compact: likewise.
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
    amount = Amount(density, top_k, keep, max_bytes)
    fit = _Fit(data, held, model, options, amount, self_contained, compact, threads, force, on_step, on_stage)
    return fit.run(conversion, conversion.open(base if isinstance(base, Checkpoint) else None), out)


def fit_full(
    tuned: str | os.PathLike[str],
    base: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str] | None,
    data: Data | None = None,
    *,
    density: float | None = None,
    top_k: int | None = None,
    keep: float | None = None,
    max_bytes: int | None = None,
    held: Data | None = None,
    model: LiveModel | None = None,
    options: FitOptions = FitOptions(),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_unused: bool = False,
    self_contained: bool = False,
    compact: bool = False,
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
        keep: see there.
        max_bytes: see there.
        held: see there.
        model: see there.
        options: see there.
        include: see there.
        exclude: see there.
        allow_unused: see there.
        self_contained: see there.
        compact: likewise.
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
    amount = Amount(density, top_k, keep, max_bytes)
    fit = _Fit(data, held, model, options, amount, self_contained, compact, threads, force, on_step, on_stage)
    return fit.run(conversion, conversion.open(base if isinstance(base, Checkpoint) else None), out)


def fit_adapter(
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    base: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str] | None,
    data: Data | None = None,
    *,
    strengths: Sequence[float] = (),
    parts: Sequence[Data] = (),
    held_parts: Sequence[Data] = (),
    density: float | None = None,
    top_k: int | None = None,
    keep: float | None = None,
    max_bytes: int | None = None,
    held: Data | None = None,
    model: LiveModel | None = None,
    options: FitOptions = FitOptions(),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    self_contained: bool = False,
    compact: bool = False,
    threads: int | None = None,
    force: bool = False,
    on_step: OnStep = lambda *_: None,
    on_stage: Callable[[str], object] = lambda _: None,
) -> FitReport:
    """Fit an adapter of fewer entries to one adapter, or to what several do together.

    Of several the source is their sum, as a :class:`shira_format.live.switcher.Switcher` loads them one upon the other. With inputs of
    each (``parts``) the result is distilled from the separate adapters instead: on the inputs of one it is to do what that one alone
    does, and it is measured so; training starts at the sum. For another merge give the merged adapter.

    Args:
        adapters: one adapter file, or several of one base.
        base: the checkpoint that they are of.
        out: see :func:`fit_lora`, also for all that is not listed here.
        data: see there.
        strengths: of each adapter, beside its own alpha; 1 by default.
        parts: inputs of each adapter, in their order, in place of ``data``.
        held_parts: inputs of each adapter to measure on, likewise; by default a share of ``parts``.
        density: see there.
        top_k: see there.
        keep: see there.
        max_bytes: see there.
        held: see there.
        model: see there.
        options: see there.
        include: see there.
        exclude: see there.
        self_contained: see there.
        compact: likewise.
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
    _check_parts(len(paths), parts, held_parts, data, held, options)
    amount = Amount(density, top_k, keep, max_bytes)
    fit = _Fit(data, held, model, options, amount, self_contained, compact, threads, force, on_step, on_stage)
    each: Sequence[Data | None] = held_parts or [None] * len(parts)
    fit.parts = list(zip(conversion.alone(), parts, each, strict=True)) if parts else []
    return fit.run(conversion, conversion.open(base if isinstance(base, Checkpoint) else None), out)


def _check_parts(
    adapters: int,
    parts: Sequence[Data],
    held: Sequence[Data],
    data: Data | None,
    all_held: Data | None,
    options: FitOptions,
) -> None:
    """Raise ValueError for inputs of each adapter that do not go with the rest."""
    if held and not parts:
        raise ValueError("held_parts go with parts")
    if not parts:
        return
    if data is not None or all_held is not None:
        raise ValueError("parts are inputs of each adapter: they stand in place of data and held")
    if options.method == "moments":
        raise ValueError("moments follow one source: give data, or choose the method distill")
    for what, given in (("parts", parts), ("held_parts", held)):
        if given and len(given) != adapters:
            raise ValueError(f"{len(given)} {what} for {adapters} adapters")


@dataclass
class _Fit:
    """One fit, whatever its source."""

    data: Data | None
    held: Data | None
    live: LiveModel | None
    options: FitOptions
    amount: Amount
    self_contained: bool
    compact: bool
    threads: int | None
    force: bool
    on_step: OnStep
    on_stage: Callable[[str], object]
    seconds: dict[str, float] = field(default_factory=dict)
    parts: list[tuple[AdapterConversion, Data, Data | None]] = field(default_factory=list)

    def run(
        self, conversion: Conversion, inputs: ConversionInputs, out: str | os.PathLike[str] | None
    ) -> FitReport:
        name, _, notes = self.options.resolved()
        with self._timed("load"):
            live = self.live or load_base(inputs, self.options.kind)
            source = source_weights(
                inputs,
                live.model,
                # One vector cannot be what several adapters make of it: it competes for entries like a matrix.
                vectors=self.options.whole_vectors and not self.parts,
                prefix=self.options.prefix,
                threads=self.threads,
            )
        with self._timed("inputs"):
            task, given = self._task(live, source)
        task, measured, counts = self._divided(task, given)
        options = notes | asdict(self.options.split())
        where = given.source | counts
        write = partial(
            convert, conversion, inputs=source.inputs, self_contained=self.self_contained, compact=self.compact, threads=self.threads,
            force=self.force,
        )  # fmt: skip

        def report(made: Made, trials: Sequence[Trial] = ()) -> FitReport:
            return FitReport(
                name, ConversionReport(), made.fit, made.plain, base, made.trial.kept, made.trial.budget, options, where, self.amount.goal,
                list(trials), self.seconds, list(given.notices),
            )  # fmt: skip

        def rule(made: Made) -> Given:
            return Given(made.entries, made.selection, {"fit": report(made).provenance()})

        with self._timed("measure"), tempfile.TemporaryDirectory(prefix="shira-fit-") as folder:
            base = effect(measured, {})
            attempts = Attempts(task, measured, source, self._method, write, rule, Path(folder), self.on_stage)
            made, trials = attempts.run(self.amount)
        self.seconds["measure"] -= self.seconds["fit"]
        found = report(made, trials)
        if found.kept == "plain":
            found.notices.append(
                f"the plain cut is nearer to the source on held-out inputs (R^2 {made.trial.plain.r2:.3f}, fitted {made.trial.fit.r2:.3f}), and is "
                "what was written"
            )
        found.conversion = write(out, rule=rule(made))
        if not self.amount.goal and found.conversion.file_bytes is not None:
            found.trials = [replace(made.trial, file_bytes=found.conversion.file_bytes)]
        return found

    def _method(self, task: Task, budget: int, start: Entries | None) -> Entries:
        options = replace(
            self.options,
            distillation=replace(self.options.distillation, start=start or self.options.distillation.start),
        )
        _, method, _ = options.resolved()
        with self._timed("fit"):
            return method(task, budget, seed=self.options.seed, on_step=self.on_step)

    def _divided(self, task: Task, given: Inputs) -> tuple[Task, Task, dict[str, int]]:
        """The task, that with the inputs to measure on, and how many inputs are for what: a search chooses by some that nothing is measured on."""
        counts = {"fitted": given.counts[0], "held": given.counts[1]}
        if not self.amount.goal:
            return task, task, counts
        choosing, held = halved(task.held)
        counts |= {"choosing": input_count(choosing), "held": input_count(held)}
        return replace(task, held=choosing), replace(task, held=held), counts

    def _task(self, live: LiveModel, source: SourceWeights) -> tuple[Task, Inputs]:
        split = self.options.split(live.longest)
        task = Task(
            live.model, source.sparse, source.whole, [], [], live.outputs, live.is_logits, live.is_causal, blocks_of(live.model),
            source.dtypes,
        )  # fmt: skip
        if self.parts:
            parts = [
                Part(data, held, partial(self._alone, conversion, source, live))
                for conversion, data, held in self.parts
            ]
            given = part_inputs(task, parts, split, live.tokenizer)
        elif self.data is None:
            given = self._sampled(task, live, split)
        else:
            given = read_inputs(self.data, split, live.tokenizer, self.held)
        task.train, task.held = given.train, given.held
        return task, given

    def _alone(self, conversion: AdapterConversion, together: SourceWeights, live: LiveModel) -> dict[str, Tensor]:
        """What one of several adapters makes of the model's parameters."""
        inputs = conversion.open(together.inputs.base)
        return source_weights(
            inputs, live.model, vectors=False, prefix=self.options.prefix, threads=self.threads
        ).sparse

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
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
