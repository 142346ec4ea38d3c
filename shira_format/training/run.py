"""From a base, a file of texts and a mask to an adapter file, a report, and a LoRA of equal size to compare with."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shira_format._core.optional import optional_import
from shira_format.adapter import Adapter
from shira_format.checkpoints import open_checkpoint
from shira_format.errors import SourceError
from shira_format.format import load
from shira_format.masks.gradients import Loss
from shira_format.masks.make import Calibration, MaskReport, mask_tensors, provenance
from shira_format.masks.plan import MaskPlan
from shira_format.masks.tasks import own_loss, weights_in_files
from shira_format.storage.outputs import check_holds_none, check_not_input
from shira_format.storage.paths import hub_identity
from shira_format.tensors import matrix_shape
from shira_format.training.fit import Fitter, OnStep, Rows, Schedule
from shira_format.training.models import TrainedModel, load_trained_model
from shira_format.training.report import Run, TrainingReport
from shira_format.training.sparse import Options, SparseParameters, sparse_parameters
from shira_format.training.state import check_state, state_path
from shira_format.training.texts import Task, TextFile, read_file, split, tokenized
from shira_format.training.trainer import ADAPTER, adapter_trainer

_SUMMED = 5  # steps whose gradients are summed before entries change

# Without a choice of the user's: the matrices of the model's blocks, neither embeddings nor heads.
BLOCKS = r"\.\d+\."


@dataclass(frozen=True)
class Plan:
    """What is to be trained.

    Attributes:
        task: ``"classify"`` or ``"causal"``.
        mask: a rule and a size, or a mask file.
        include: regexes on the checkpoint's names; by default the blocks' matrices.
        exclude: regexes.
        options: how entries are trained.
        regrow: steps from one change of entries to the next (:meth:`SparseParameters.regrow`); 0: a tenth of all steps, at most 100;
            None: entries do not change.
        schedule: how long and how fast.
        validation: share of the texts that is held out.
        limit: the first so many texts only.
        max_length: tokens after which a text is cut.
        calibration: batches of texts for the gradients of a mask.
        lora: train a LoRA of equal size, too.
        self_contained: keep the base's values in the file.
        compact: take as few bytes as possible; see :func:`shira_format.save`.
    """

    task: Task
    mask: MaskPlan | Path
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    options: Options = field(default_factory=Options)
    regrow: int | None = None
    schedule: Schedule = field(default_factory=Schedule)
    validation: float = 0.2
    limit: int | None = None
    max_length: int = 128
    calibration: int = 8
    lora: bool = False
    self_contained: bool = False
    compact: bool = False


@dataclass(frozen=True)
class Events:
    """What is called on the way.

    Attributes:
        ready: with the report, when everything is read and the mask is made.
        step: see :data:`shira_format.training.fit.OnStep`.
        stage: with a line on what comes next.
    """

    ready: Callable[[TrainingReport], object] = lambda _: None
    step: OnStep = lambda *_: None
    stage: Callable[[str], object] = lambda _: None


def train_adapter(
    base: Path,
    data: Path,
    out: Path | None,
    plan: Plan,
    *,
    test: Path | None = None,
    checkpoints: Path | None = None,
    events: Events = Events(),
) -> TrainingReport:
    """Train a sparse adapter of ``base`` on ``data`` and write it.

    Args:
        base: a folder that transformers loads, or a GGUF file.
        data: ``.jsonl`` of objects with ``text`` and, to classify, ``label``.
        out: the adapter file to write; None: read all and make the mask, but train nothing.
        plan: what to train.
        test: another such file, that has no part in the training, to measure the result on.
        checkpoints: a folder for checkpoints; if it has some, the training goes on from the last one.
        events: what is called on the way.

    Raises:
        SourceError: an input cannot be used, or would be replaced or removed; a package is missing; or the loss is no number.
        OSError: a file cannot be read or written.
    """
    read = [base, data, test, plan.mask]
    if out is not None:
        for path in (out, state_path(out)):
            check_not_input(path, [*read, checkpoints])
        check_state(out)
        _check_checkpoints(checkpoints, [*read, out.parent])
    texts = read_file(data, plan.task, limit=plan.limit)
    tested = None if test is None else read_file(test, plan.task)
    labels = texts.labels
    loaded = load_trained_model(base, labels, plan.schedule.seed)
    rows = _rows(plan, texts, tested, loaded)
    fitter = Fitter(rows, loaded.tokenizer, plan.schedule, causal=plan.task == "causal")
    report = TrainingReport(plan.task, labels, len(rows.train), len(rows.validation), len(rows.test))
    mask = _mask(base, plan, loaded, fitter, report)
    training = _attached(plan, loaded, mask, report)
    events.ready(report)
    if out is None:
        return report
    with _folder(checkpoints) as folder:
        run = Run("shira", training.nnz)
        report.runs.append(run)
        events.stage("training the sparse adapter")
        fitter.fit(
            loaded.model, run, folder, adapter_trainer(), resume=_last(checkpoints), on_step=events.step
        )  # fmt: skip
    opened = open_checkpoint(base) if plan.compact and not plan.self_contained else None
    training.save(
        out,
        manifest=_manifest(base, plan, texts, run),
        self_contained=plan.self_contained,
        compact=plan.compact,
        base=opened,
    )
    report.file_bytes = out.stat().st_size
    with training.base():
        report.base = fitter.quality(loaded.model, rows.validation)
        report.base_test = fitter.quality(loaded.model, rows.test) if rows.test else None
    if plan.lora:
        training.detach()
        events.stage("training a LoRA of equal size")
        report.runs.append(_lora(base, plan, labels, list(training.weights.values()), fitter, events))
    return report


def _rows(plan: Plan, texts: TextFile, tested: TextFile | None, loaded: TrainedModel) -> Rows:
    train, held = split(texts.texts, plan.validation, plan.schedule.seed)
    length = min(plan.max_length, loaded.longest or plan.max_length)
    found = [
        tokenized(loaded.tokenizer, part, texts.labels, length) if part else []
        for part in (train, held, tested.texts if tested else [])
    ]
    return Rows(*found)


def _mask(base: Path, plan: Plan, loaded: TrainedModel, fitter: Fitter, report: TrainingReport) -> Adapter:
    if isinstance(plan.mask, Path):
        if plan.include or plan.exclude:
            raise SourceError(
                f"{plan.mask}: a mask file says which weights are trained: leave out include and exclude"
            )
        return load(plan.mask)
    include = plan.include or (BLOCKS,)
    weights, unknown = weights_in_files(loaded.model, loaded.checkpoint, include, plan.exclude)
    if unknown and plan.include:
        report.notices.append(f"not masked, because no tensor in the files has the name: {unknown[0]}")
    calibration, stack = None, ExitStack()
    if plan.mask.rule.gradients:
        texts = fitter.rows.train[: plan.calibration * plan.schedule.batch]
        batches = _collated(fitter, texts, plan.schedule.batch)
        stack.enter_context(_fitted_head(loaded, batches))
        loss: Loss = _loss_of_labels
        if (
            plan.mask.rule.gradients == "squares"
        ):  # the Fisher information: of single texts, whose labels the model draws
            batches, loss = _collated(fitter, texts, 1), own_loss(plan.schedule.seed, causal=fitter.causal)
        calibration = Calibration(loaded.model, batches, loss, leave_out=True)
    with stack:
        found = list(mask_tensors(plan.mask, weights, calibration, MaskReport()))
    return Adapter(found, manifest=provenance(plan.mask, base, plan.include, plan.exclude, calibration))


def _collated(fitter: Fitter, texts: Sequence[dict[str, Any]], size: int) -> list[Any]:
    return [fitter.collate(list(texts[at : at + size])) for at in range(0, len(texts), size)]


def _loss_of_labels(model: Any, batch: Any) -> Any:
    return model(**batch).loss


_HEAD_PASSES, _HEAD_RATE = 4, 1e-2


@contextmanager
def _fitted_head(loaded: TrainedModel, batches: Sequence[Any]) -> Iterator[None]:
    """A new head is fitted to the unchanged model in this block: the gradients that a random one passes on are noise."""
    model, names = loaded.model, loaded.new
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    parameters = [model.get_parameter(name) for name in names]
    model.eval()
    if parameters:
        optimizer = torch.optim.AdamW(parameters, lr=_HEAD_RATE, weight_decay=0.0)
        for batch in [*batches] * _HEAD_PASSES:
            grads = torch.autograd.grad(model(**batch).loss, parameters)
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            optimizer.step()
        optimizer.zero_grad()
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                model.get_parameter(name).copy_(value)


def _attached(plan: Plan, loaded: TrainedModel, mask: Adapter, report: TrainingReport) -> SparseParameters:
    options = plan.options
    training = sparse_parameters(
        loaded.model, mask, dtype=options.dtype or torch.float32, rounding=options.rounding, seed=options.seed,
        method=options.method, dora=options.dora, new=[rf"^{_escaped(name)}$" for name in loaded.new],
    )  # fmt: skip
    if plan.regrow is not None:
        steps = plan.schedule.of(report.train)
        every = plan.regrow or min(max(steps // 10, 1), 100)
        training.regrow(steps, every=every, summed=min(every, _SUMMED))
    report.mask = dict(training.mask.get("mask", {}))
    report.weights, report.nnz = len(training.weights), training.nnz
    report.numel = sum(weight.weight.numel() for weight in training.weights.values())
    report.new = sum(parameter.numel() for _, parameter in training.whole_parameters())
    return training


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


def _manifest(base: Path, plan: Plan, texts: TextFile, run: Run) -> dict[str, Any]:
    """No date and no path, so that the same input gives the same provenance."""
    source: dict[str, Any] = {
        "kind": "training", "task": plan.task, "files": [{"name": texts.name, "digest": texts.digest}],
        "steps": run.best_step, "batch": plan.schedule.batch, "learning_rate": run.learning_rate, "seed": plan.schedule.seed,
    }  # fmt: skip
    source |= {"labels": list(texts.labels)} if texts.labels else {}
    source |= {"dora": True} if plan.options.dora else {}
    identity = hub_identity(str(base))
    return {"source": source} | ({"base_model": identity} if identity else {})


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
    else:
        with tempfile.TemporaryDirectory(prefix="shira-train-") as folder:
            yield Path(folder)


def _check_checkpoints(folder: Path | None, kept: list[Any]) -> None:
    """Refuse a folder of checkpoints that are not this trainer's or hold what is to stay, since old ones are removed."""
    for one in [] if folder is None else sorted(folder.glob("checkpoint-*")):
        if one.is_dir() and not (one / ADAPTER).is_file():
            raise SourceError(f"{one}: has no {ADAPTER}, which checkpoints of this trainer have")
        check_holds_none(one, kept)


def _last(checkpoints: Path | None) -> str | None:
    """The last checkpoint in a folder; None if there is none."""
    if checkpoints is None or not checkpoints.is_dir():
        return None
    from transformers.trainer_utils import get_last_checkpoint

    found: str | None = get_last_checkpoint(str(checkpoints))
    return found


def _lora(
    base: Path, plan: Plan, labels: Sequence[str], weights: Sequence[Any], fitter: Fitter, events: Events
) -> Run:
    """A LoRA of the same matrices, whose rank makes it as large as the mask, as nearly as whole ranks allow."""
    with optional_import("a LoRA to compare with needs peft", "train"):
        from peft import LoraConfig, get_peft_model
    from transformers import Trainer

    matrices = [weight for weight in weights if len(weight.weight.shape) == 2]
    if not matrices:
        raise SourceError("the mask has no matrices, on which a LoRA could be trained")
    entries = sum(len(weight.indices) for weight in weights)
    sides = sum(sum(matrix_shape(tuple(weight.weight.shape))) for weight in matrices)
    rank = max(1, round(entries / sides))
    loaded = load_trained_model(base, labels, plan.schedule.seed)
    heads = sorted({name.rpartition(".")[0] for name in loaded.new})
    modules = [weight.path.removesuffix(".weight") for weight in matrices]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, modules_to_save=heads or None)
    torch.manual_seed(plan.schedule.seed)
    model = get_peft_model(loaded.model, config)
    trained = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    run = Run("lora", trained)
    with tempfile.TemporaryDirectory(prefix="shira-train-") as folder:
        fitter.fit(model, run, Path(folder), Trainer, on_step=events.step)
    return run
