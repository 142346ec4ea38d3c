"""Distillation: a support by what a change of each entry is expected to gain, and values trained to do what the source does."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from shira_format.calibration.layers import evaluating, restoring_gradients
from shira_format.convert.fit.quality import kl_divergence
from shira_format.convert.fit.support import Rule, largest, scores
from shira_format.convert.fit.task import Entries, OnStep, SourceOutputs, Task, changed, see, showing_base
from shira_format.errors import SourceError
from shira_format.training.sparse import SparseParameters, sparse_parameters

_NO_INDICES = torch.empty(0, dtype=torch.int64)
KEPT = 1 << 30  # bytes of the source's outputs that are kept; beyond that they are computed again at each step


@dataclass(frozen=True)
class Distillation:
    """How values are trained.

    Attributes:
        steps: of Adam, each with one batch.
        learning_rate: the highest; None: by the share of the entries that are trained.
        warmup: share of the steps in which the learning rate rises; then it falls as a cosine.
        rule: by which entries are scored; see :func:`shira_format.convert.fit.support.scores`.
        run: choose aligned runs of so many entries; 1: single entries.
        wide: how many times as many entries are trained at first as are kept; 1: those that are kept; None: 8 times, but no more
            than 2 % of all, beyond which the texts are too few to tell good entries from bad ones.
        prune: share of the steps after which no more than the budget is left.
        stages: in how many steps entries are dropped.
        regrow: share of the entries that is exchanged, each time, for those with the largest scores at the fitted point; 0: none.
        regrowths: how many times, spread evenly over the first half of the steps that are left once the budget is reached.
        hidden: the weight of the hidden states in the loss, beside the outputs'.
        batches: how many batches the scores are computed on.
        start: entries to start from, such as those of another fit, in place of a support by ``rule`` and the source's values; if they
            are fewer than are kept, the best others are added by ``rule``.
    """

    steps: int = 300
    learning_rate: float | None = None
    warmup: float = 0.05
    rule: Rule = "product"
    run: int = 1
    wide: float | None = None
    prune: float = 0.6
    stages: int = 12
    regrow: float = 0.0
    regrowths: int = 3
    hidden: float = 0.3
    batches: int = 8
    start: Entries | None = None

    def rate(self, share: float) -> float:
        """The learning rate for a share of the entries: the fewer they are, the farther each has to go.

        ``docs/studies/fits.md`` says what it was chosen by.
        """
        return self.learning_rate or min(1e-2, max(1e-4, 1e-5 * share**-0.85))

    def width(self, share: float) -> float:
        """How many times as many entries as this share are trained at first."""
        return max(1.0, min(8.0, 0.02 / share) if self.wide is None else self.wide)


def distill(
    task: Task,
    budget: int,
    *,
    seed: int = 0,
    on_step: OnStep = lambda *_: None,
    options: Distillation = Distillation(),
) -> dict[str, tuple[Tensor, Tensor]]:
    """Fit ``budget`` entries of all weights together by training them; see :class:`Distillation`.

    The loss of a batch is ``|z - z_source|^2`` of the outputs, plus the mean of ``|h - h_source|^2`` over the layers, each divided
    by what it is for the base. Of a language model's logits the KL divergence takes the place of the squares (Hinton, Vinyals and
    Dean 2015, arXiv 1503.02531). Training starts at the source's values; if more entries are trained at first than are kept, those
    are dropped whose change matters least, by ``(w - w_base)^2`` times Adam's mean square of the gradient.

    Raises:
        SourceError: the budget exceeds the weights, or the loss is no number.
    """
    run = _Run(task, options, seed, on_step)
    with showing_base(task), evaluating(task.model), restoring_gradients(task.model):
        return run.entries(budget)


class _Run:
    """One distillation."""

    def __init__(self, task: Task, options: Distillation, seed: int, on_step: OnStep) -> None:
        self.task, self.options, self.seed, self.on_step = task, options, seed, on_step
        self.teacher = Teacher(task)
        self.order = _order(len(task.train), seed)
        self.step = 0

    def entries(self, budget: int) -> dict[str, tuple[Tensor, Tensor]]:
        task, options = self.task, self.options
        self.teacher.measure_base()
        state = self._start(budget)
        share = budget / task.numel
        rate = options.rate(share)
        sizes = self._sizes(state.size, budget)
        for stage, size in enumerate(sizes):
            if size < state.size:
                state = state.largest(size, task, options.run)
            if stage < len(sizes) - 1:
                state = self._train(state, round(options.steps * options.prune / (len(sizes) - 1)), rate)
        if exchanged := round(options.regrow * budget):
            between = (options.steps - self.step) // (2 * options.regrowths)
            for _ in range(options.regrowths):
                state = self._regrown(self._train(state, between, rate), exchanged)
        state = self._train(state, options.steps - self.step, rate)
        return {name: (state.support[name], state.values[name]) for name in state.support}

    def _start(self, budget: int) -> _State:
        """The entries that are trained at first, and their values."""
        task, options, given = self.task, self.options, self.options.start or {}
        known = sum(len(at) for at, _ in given.values())
        support = {name: at.cpu() for name, (at, _) in given.items()}
        if known < budget:
            found = self._scores()
            for name, at in support.items():
                found[name][at] = math.inf
            wide = 1.0 if given else options.width(budget / task.numel)
            support = largest(found, min(task.numel, round(budget * wide)), run=1 if given else options.run)
        values = {name: task.source[name].reshape(-1)[at].float() for name, at in support.items()}
        for name, (at, new) in given.items():
            values[name][torch.searchsorted(support[name], at.cpu())] = new.float().cpu()
        return _State(support, values)

    def _regrown(self, state: _State, count: int) -> _State:
        """With ``count`` entries exchanged: those whose change matters least, for those that promise most where the fit is now."""
        with ExitStack() as stack:
            for name, at in state.support.items():
                stack.enter_context(changed(self.task, name, at, state.values[name]))
            found = self._scores()
        for name, at in state.support.items():
            found[name][at] = 0.0
        new = largest(found, count)
        source = {name: self.task.source[name].reshape(-1)[at].float() for name, at in new.items()}
        return state.largest(state.size - count, self.task, 1).joined(_State(new, source))

    def _scores(self) -> dict[str, Tensor]:
        """Of all entries, by the rule, for the model as it is now."""
        return scores(
            self.task, self.options.rule, self._spread(self.options.batches), lambda _, number: self._loss(number), self.seed
        )  # fmt: skip

    def _spread(self, count: int) -> list[int]:
        """Numbers of batches, spread evenly over all lengths."""
        total = len(self.task.train)
        count = min(count, total)
        return [(2 * i + 1) * total // (2 * count) for i in range(count)]

    def _sizes(self, wide: int, budget: int) -> list[int]:
        """How many entries are trained in each stage: a cubic fall to the budget (Zhu and Gupta 2017, arXiv 1710.01878)."""
        if wide <= budget:
            return [budget]
        stages = self.options.stages
        return [round(budget + (wide - budget) * (1 - number / stages) ** 3) for number in range(stages + 1)]

    def _loss(self, number: int) -> Tensor:
        return self.teacher.loss(number, self.options.hidden)

    def _train(self, state: _State, steps: int, rate: float) -> _State:
        options, task = self.options, self.task
        training = sparse_parameters(
            task.model, {name: at.numpy() for name, at in state.support.items()}, dtype=torch.float32
        )
        try:
            state.put(training)
            optimizer = torch.optim.Adam(training.parameters(), lr=rate, betas=(0.9, 0.99))
            state.restore(optimizer, training)
            for _ in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = rate * self._schedule()
                loss = self._loss(next(self.order))
                found = float(loss.detach())
                if not math.isfinite(found):
                    raise SourceError(f"the loss is {found} at step {self.step + 1}: choose a lower learning rate")
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                self.step += 1
                self.on_step(options.steps, self.step, found)
            return state.after(training, optimizer)
        finally:
            training.detach(restore=True)

    def _schedule(self) -> float:
        done = self.step / max(1, self.options.steps)
        if done < self.options.warmup:
            return (self.step + 1) / (self.options.warmup * self.options.steps + 1)
        return 0.5 * (1 + math.cos(math.pi * (done - self.options.warmup) / (1 - self.options.warmup)))


@dataclass
class _State:
    """Entries under training between two stages, by the weight's name.

    Attributes:
        support: int64 ``[n]``.
        values: float32 ``[n]``, the new values.
        first: Adam's mean of gradients; empty before the first stage.
        second: Adam's mean of squared gradients.
        steps: of Adam.
    """

    support: dict[str, Tensor]
    values: dict[str, Tensor]
    first: dict[str, Tensor] | None = None
    second: dict[str, Tensor] | None = None
    steps: Tensor | None = None

    @property
    def size(self) -> int:
        return sum(len(at) for at in self.support.values())

    def put(self, training: SparseParameters) -> None:
        for name, weight in training.weights.items():
            weight.set_values(self.values[name].to(weight.weight.device))

    def restore(self, optimizer: torch.optim.Optimizer, training: SparseParameters) -> None:
        if self.first is None or self.second is None or self.steps is None:
            return
        for name, weight in training.weights.items():
            parameter = weight.parameter("values")
            optimizer.state[parameter] = {
                "step": self.steps.clone(),
                "exp_avg": self.first[name].to(parameter.device),
                "exp_avg_sq": self.second[name].to(parameter.device),
            }

    def after(self, training: SparseParameters, optimizer: torch.optim.Optimizer) -> _State:
        values, first, second = {}, {}, {}
        steps = None
        for name, weight in training.weights.items():
            parameter = weight.parameter("values")
            values[name] = parameter.detach().cpu().clone()
            if held := optimizer.state.get(parameter):
                first[name], second[name] = held["exp_avg"].cpu(), held["exp_avg_sq"].cpu()
                steps = held["step"].cpu()
        kept = {name: self.support[name] for name in values}
        return _State(kept, values, first or None, second or None, steps)

    def joined(self, new: _State) -> _State:
        """With other entries, which training has not moved yet."""
        orders = {
            name: torch.argsort(
                torch.cat([self.support.get(name, _NO_INDICES), new.support.get(name, _NO_INDICES)])
            )
            for name in self.support | new.support
        }

        def both(one: Mapping[str, Tensor], other: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
            found = {}
            for name, order in orders.items():
                added = len(new.support.get(name, _NO_INDICES))
                tail = torch.zeros(added) if other is None else other.get(name, _NO_INDICES)
                found[name] = torch.cat([one.get(name, tail[:0]), tail])[order]
            return found

        return _State(
            both(self.support, new.support), both(self.values, new.values),
            None if self.first is None else both(self.first, None),
            None if self.second is None else both(self.second, None), self.steps,
        )  # fmt: skip

    def largest(self, size: int, task: Task, run: int) -> _State:
        """The entries whose change matters most."""
        found = {}
        for name, at in self.support.items():
            base = task.parameter(name).detach().cpu().reshape(-1)[at].float()
            curvature = torch.ones(len(at)) if self.second is None else self.second[name]
            found[name] = (self.values[name] - base).square() * curvature.sqrt()
        kept = largest(found, size, run=run)

        def part(of: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: of[name][places] for name, places in kept.items()}

        return _State(
            part(self.support), part(self.values),
            None if self.first is None else part(self.first), None if self.second is None else part(self.second), self.steps,
        )  # fmt: skip


class Teacher:
    """What the source does on the batches to fit on, and how far from it the model is."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.source = SourceOutputs(task, task.train, KEPT)
        self._outputs, self._hidden = 1.0, [1.0] * len(task.layers)

    def measure_base(self) -> None:
        """Set the scale of the loss: what it is for the model as it is now, the base."""
        outputs, hidden, rows = 0.0, [0.0] * len(self.task.layers), 0
        for number in range(0, len(self.task.train), max(1, len(self.task.train) // 8)):
            want = self.source[number]
            with torch.no_grad():
                here = see(self.task, self.task.train[number])
            rows += 1
            outputs += float(self._apart(here.outputs, want.outputs))
            hidden = [
                total + float(_distance(one, other))
                for total, one, other in zip(hidden, here.hidden, want.hidden, strict=True)
            ]
        self._outputs = outputs / rows
        self._hidden = [one / rows for one in hidden]
        if not self._outputs > 0:
            raise SourceError("the source does on these inputs what the base does: there is nothing to fit")

    def loss(self, number: int, hidden: float) -> Tensor:
        """The loss of one batch, with its graph; 1 plus ``hidden`` for the base, on average."""
        want = self.source[number]
        here = see(self.task, self.task.train[number], hidden=hidden > 0)
        loss = self._apart(here.outputs, want.outputs) / self._outputs
        layers = [
            _distance(one, other) / scale
            for one, other, scale in zip(here.hidden, want.hidden, self._hidden, strict=False)
            if scale > 0
        ]
        return loss + hidden * torch.stack(layers).mean() if layers else loss

    def _apart(self, here: Tensor, want: Tensor) -> Tensor:
        if self.task.is_causal:
            return kl_divergence(here.float(), want.float()).mean()
        return _distance(here, want)


def _distance(here: Tensor, want: Tensor) -> Tensor:
    """The mean of squared differences."""
    return (here.float() - want.float()).square().mean()


def _order(count: int, seed: int) -> Iterator[int]:
    """Numbers of batches without end, each once in every pass, in an order by the seed."""
    draw = random.Random(seed)  # noqa: S311 - reproducible, not secret
    while True:
        places = list(range(count))
        draw.shuffle(places)
        yield from places
