"""One training by transformers' Trainer: schedule, validation, early stop, the best checkpoint, and the learning-rate search."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from shira_format.errors import SourceError
from shira_format.training.report import Quality, Run
from shira_format.training.sparse import SparseParameters
from shira_format.training.texts import Collator
from shira_format.training.trained import training_of

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# Where none is given. An entry of a weight moves by itself, and takes larger steps than the factors of a LoRA.
DEFAULT_RATES = {"shira": 5e-3, "lora": 1e-3}
_PILOT_TEXTS = 64  # validation texts of the search
_EVALUATION_BATCH = 32

# Called at each step: how many there will be at most, which one, and its loss.
OnStep = Callable[[int, int, float], object]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: of the optimizer at most; None: as many as ``epochs`` take.
        epochs: passes over the texts, if ``steps`` is None.
        batch: texts of a step.
        accumulate: parts in which a step's batch is computed.
        learning_rate: of AdamW; None: that of :data:`DEFAULT_RATES`; ``"auto"``: searched among :data:`LEARNING_RATES` by short
            runs, for each method by itself.
        warmup: share of the steps in which the learning rate rises; then it falls linearly to 0.
        weight_decay: of AdamW.
        clip: the norm of all gradients at most.
        evaluations: how often the validation texts are measured.
        patience: end after so many measures without a better one; None: never.
        seed: of the order of texts, and of dropout.
    """

    steps: int | None = None
    epochs: float = 8.0
    batch: int = 16
    accumulate: int = 1
    learning_rate: float | Literal["auto"] | None = None
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    evaluations: int = 10
    patience: int | None = 4
    seed: int = 0

    def of(self, texts: int) -> int:
        """The steps for so many texts."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil(self.epochs * math.ceil(texts / self.batch)))


@dataclass(frozen=True)
class Rows:
    """Tokenized texts.

    Attributes:
        train: to train on.
        validation: to choose by.
        test: to measure by, maybe none.
    """

    train: Sequence[dict[str, Any]]
    validation: Sequence[dict[str, Any]]
    test: Sequence[dict[str, Any]] = ()


class Fitter:
    """Trains models on the same texts in the same way."""

    def __init__(self, rows: Rows, tokenizer: Any, schedule: Schedule, *, causal: bool) -> None:
        self.rows, self.schedule, self.causal = rows, schedule, causal
        self.collate = Collator(tokenizer, causal=causal)

    def fit(
        self, model: Any, run: Run, folder: Path, trainer: Any, *, resume: str | None = None, on_step: OnStep = lambda *_: None
    ) -> None:  # fmt: skip
        """Train ``model``, which ends as its best checkpoint, and fill in ``run``.

        Args:
            model: of transformers, with what is to be trained.
            run: gets what happened.
            folder: for checkpoints.
            trainer: a class: transformers' Trainer, or made from it.
            resume: the checkpoint to go on from.
            on_step: see :data:`OnStep`.

        Raises:
            SourceError: the loss is no number.
        """
        rate = self.schedule.learning_rate or DEFAULT_RATES[run.method]
        if rate == "auto":
            rate = self._search(model, run, folder, trainer, on_step)
        run.learning_rate = rate
        start = time.perf_counter()
        with _quiet():
            steps = self.schedule.of(len(self.rows.train))
            made = self._trainer(model, run, folder, trainer, rate, steps, on_step)
            _restart(model, steps)
            made.train(resume_from_checkpoint=resume)
        run.seconds = time.perf_counter() - start
        run.steps = made.state.global_step
        run.best_step = made.state.best_global_step or run.steps
        if not all(math.isfinite(loss) for _, loss in run.losses):
            raise SourceError(
                f"the loss is not a number with the learning rate {rate:g}: choose a lower one (--lr)"
            )
        run.quality = self.quality(model, self.rows.validation)
        if self.rows.test:
            run.test = self.quality(model, self.rows.test)

    def quality(self, model: Any, rows: Sequence[dict[str, Any]]) -> Quality:
        """Loss and accuracy on some texts."""
        model.eval()
        device = next(model.parameters()).device
        loss, counted, right = 0.0, 0, 0
        with torch.inference_mode():
            for start in range(0, len(rows), _EVALUATION_BATCH):
                batch = self.collate(list(rows[start : start + _EVALUATION_BATCH]))
                batch = {key: value.to(device) for key, value in batch.items()}
                labels = batch.pop("labels")
                logits = model(**batch).logits.float()
                if self.causal:
                    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
                loss += float(
                    torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
                )
                counted += int((labels != -100).sum())
                right += int((logits.argmax(-1) == labels).sum())
        return Quality(len(rows), loss / max(counted, 1), None if self.causal else right / max(counted, 1))

    def _search(self, model: Any, run: Run, folder: Path, trainer: Any, on_step: OnStep) -> float:
        """The learning rate whose short run ends with the lowest validation loss; the model ends as it was."""
        whole = self.schedule.of(len(self.rows.train))
        steps = min(whole, max(20, whole // 5))
        chosen = np.linspace(
            0, len(self.rows.validation), min(_PILOT_TEXTS, len(self.rows.validation)), endpoint=False
        )
        texts = [self.rows.validation[int(place)] for place in chosen]
        pilot = replace(self.schedule, evaluations=0, patience=None)
        fitter = Fitter(replace(self.rows, validation=texts), None, pilot, causal=self.causal)
        fitter.collate = self.collate
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        for rate in LEARNING_RATES:
            with _quiet():
                made = fitter._trainer(
                    model, Run(run.method, 0), folder / f"pilot-{rate:g}", trainer, rate, steps, on_step
                )
                _restart(model, steps)
                made.train()
            loss = fitter.quality(model, texts).loss
            run.tried[rate] = loss if math.isfinite(loss) else math.inf
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in before:
                        parameter.copy_(before[name])
            _restart(model, steps)
        return min(run.tried, key=run.tried.__getitem__)

    def _trainer(
        self, model: Any, run: Run, folder: Path, trainer: Any, rate: float, steps: int, on_step: OnStep
    ) -> Any:
        from transformers import EarlyStoppingCallback, TrainingArguments

        schedule = self.schedule
        every = max(1, steps // schedule.evaluations) if schedule.evaluations else 0
        checked: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no"}
        if every:
            checked = {
                "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": every, "save_steps": every,
                "save_total_limit": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss",
            }  # fmt: skip
        arguments = TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=max(1, schedule.batch // schedule.accumulate),
            per_device_eval_batch_size=_EVALUATION_BATCH, gradient_accumulation_steps=schedule.accumulate,
            learning_rate=rate, warmup_steps=int(schedule.warmup * steps), weight_decay=schedule.weight_decay,
            max_grad_norm=schedule.clip, lr_scheduler_type="linear", logging_steps=1, logging_nan_inf_filter=False,
            seed=schedule.seed, report_to=[], disable_tqdm=True, dataloader_pin_memory=False, remove_unused_columns=False,
            label_names=["labels"], use_cpu=next(model.parameters()).device.type == "cpu", **checked,
        )  # fmt: skip
        callbacks: list[Any] = [_recorder(run, steps, on_step)]
        if every and schedule.patience is not None:
            callbacks.append(EarlyStoppingCallback(schedule.patience))
        return _without_printing(trainer)(
            model, arguments, train_dataset=list(self.rows.train), eval_dataset=list(self.rows.validation),
            data_collator=self.collate, callbacks=callbacks,
            compute_metrics=None if self.causal else _accuracy,
        )  # fmt: skip


def _restart(model: Any, steps: int) -> None:
    """Entries that change in training are those that it starts with, and change over so many steps."""
    training = training_of(model)
    if isinstance(training, SparseParameters) and training.regrowth is not None:
        training.regrowth.restart(steps)


def _accuracy(predicted: Any) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def _without_printing(trainer: Any) -> Any:
    from transformers.trainer_callback import PrinterCallback

    def made(*args: Any, **options: Any) -> Any:
        found = trainer(*args, **options)
        found.remove_callback(PrinterCallback)
        return found

    return made


def _recorder(run: Run, steps: int, on_step: OnStep) -> Any:
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):  # type: ignore[misc]
        """Losses as they come."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
            if logs and "loss" in logs:
                run.losses.append((state.global_step, float(logs["loss"])))
                on_step(steps, state.global_step, float(logs["loss"]))

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:  # noqa: ARG002
            if metrics and "eval_loss" in metrics:
                found = Quality(0, float(metrics["eval_loss"]), metrics.get("eval_accuracy"))
                run.validation.append((state.global_step, found))

    return Recorder()


@contextmanager
def _quiet() -> Iterator[None]:
    """What transformers and PEFT deprecate in each other tells our users nothing; nor do their logs."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
