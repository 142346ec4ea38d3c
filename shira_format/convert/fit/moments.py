"""A fit without backpropagation: layer after layer, the entries that bring its outputs nearest to the source's.

1. The layers are taken in the order in which they run. A layer of the fitted model is fed inputs ``x'``, which earlier layers have
   changed, and is to return what the source's layer returns for the source's inputs: the change ``s`` of a row of its weight is to
   add ``t = y_source(x) - y_base(x')``. So errors of earlier layers are made up for in later ones, as far as these can.
2. Over all positions of all calibration inputs ``sum x' x'^T`` and ``sum t x'^T`` are summed up; nothing else of a layer is kept.
3. Support and values follow from these moments; see :mod:`shira_format.convert.fit.least_squares`. The support of the largest updates,
   with the best values that it can have, is taken where it is better.
4. How many entries a layer gets: see :mod:`shira_format.convert.fit.shares`.

Layer-wise reconstruction from moments is that of Optimal Brain Compression (Frantar and Alistarh 2022, arXiv 2208.11580), with targets
from the source's own inputs as in AdaRound's asymmetric reconstruction (Nagel et al. 2020, arXiv 2004.10568) and of a change, not of
a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shira_format.calibration.layers import evaluating
from shira_format.convert.fit.least_squares import Problem, grow, solve
from shira_format.convert.fit.shares import shares_of
from shira_format.convert.fit.support import largest, update_of
from shira_format.convert.fit.task import OnStep, Task, changed, replaced, showing_base, showing_source
from shira_format.convert.fit.walk import (
    Layer,
    Path,
    Segment,
    Stage,
    call,
    entering,
    find_path,
    layers_of,
    rows,
    states_of,
    watching,
    without_cache,
)
from shira_format.errors import SourceError

# By the weight's name, what the source's layer returned for each batch: rows as of :func:`shira_format.convert.fit.walk.rows`.
_Wanted = dict[str, list[list[Tensor]]]

KEPT = 1 << 29  # bytes of the source's outputs that are kept at a time


@dataclass(frozen=True)
class Reconstruction:
    """How entries are found from moments.

    Attributes:
        ridge: what is added to the diagonal of a layer's moments, as a share of its mean; more where inputs are few.
        rounds: in how many rounds a layer's support grows.
        widest: of a layer with wider inputs than that, so many columns are chosen first, by what each would gain alone.
    """

    ridge: float = 0.01
    rounds: int = 8
    widest: int = 12288


def moments(
    task: Task,
    budget: int,
    *,
    seed: int = 0,  # noqa: ARG001 - all methods take one
    on_step: OnStep = lambda *_: None,
    options: Reconstruction = Reconstruction(),
) -> dict[str, tuple[Tensor, Tensor]]:
    """Fit ``budget`` entries of all weights together, layer by layer and without backpropagation; see the module.

    Embeddings, layers that no input reaches and weights that no layer multiplies its inputs with get the source's values where these
    differ most from the base's. Of a layer that is called several times, and of experts that are chosen by their inputs, the source's
    outputs for the same inputs are matched. Nothing is drawn, so that ``seed`` is not used. ``on_step`` is called after each group of layers that
    share their input, with the share of what was asked of them that is missed.

    Raises:
        SourceError: the budget exceeds the weights, or an input is not finite.
    """
    if not 1 <= budget <= task.numel:
        raise SourceError(f"a budget of {budget} entries; the weights have {task.numel}")
    with torch.no_grad(), without_cache(task.model), evaluating(task.model):
        layers = layers_of(task)
        path = find_path(task, layers)
        plain = sorted((set(task.source) - {one.name for one in layers.values()}) | set(path.unseen))
        shares = shares_of(task, budget)
        run = _Run(task, path, shares, options, on_step)
        with showing_base(task), run.changes:
            for name in plain:
                run.cut(name)
            run.walk()
    return {name: run.entries[name] for name in task.source if name in run.entries}


@dataclass
class _Run:
    """One fit."""

    task: Task
    path: Path
    shares: Mapping[str, int]
    options: Reconstruction
    on_step: OnStep
    entries: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    changes: ExitStack = field(default_factory=ExitStack)
    step: int = 0

    def cut(self, name: str) -> None:
        """Take the source's values where they differ most."""
        if count := self.shares[name]:
            at = largest({name: update_of(self.task, name).abs_()}, count)[name]
            self._keep(name, at, self.task.source[name].reshape(-1).cpu()[at].float())

    def walk(self) -> None:
        """Fit all layers in their order."""
        source = self.path.entering
        fitted: list[Tensor] = []
        for segment in self.path.segments:
            if segment.block is not None and not fitted:
                fitted = entering(segment.block, self.task)
            source = self._segment(segment, source, fitted)
            if segment.block is not None:
                fitted = [states_of(call(segment, self.task, n, fitted)) for n in range(len(fitted))]

    def _segment(self, segment: Segment, source: list[Tensor], fitted: list[Tensor]) -> list[Tensor]:
        """Fit a segment's layers; returns what the source's block returns."""
        after: list[Tensor] = []
        for stages in self._kept_together(segment.stages) or [[]]:
            layers = [layer for stage in stages for layer in stage.layers]
            wanted: _Wanted = {layer.name: [] for layer in layers}
            with self._showing_source(segment):
                after = self._watch_source(segment, source, layers, wanted)
            for stage in stages:
                self._stage(segment, stage, fitted, wanted)
        return after if segment.block is not None else source

    def _showing_source(self, segment: Segment) -> ExitStack:
        stack = ExitStack()
        if segment.block is None:
            stack.enter_context(showing_source(self.task))
        else:
            inside = [name for name in self.task.source if name.startswith(f"{segment.block.path}.")]
            stack.enter_context(replaced(self.task, {name: self.task.source[name] for name in inside}))
        return stack

    def _watch_source(
        self, segment: Segment, source: Sequence[Tensor], layers: Sequence[Layer], wanted: _Wanted
    ) -> list[Tensor]:  # fmt: skip
        """What the source's layers return for each call of each batch, and what its block returns."""
        found = []
        for number, batch in enumerate(self.task.train):
            for calls in wanted.values():
                calls.append([])

            def see(layer: Layer, inputs: Tensor, output: Tensor, batch: object = batch) -> None:
                wanted[layer.name][-1] += [y.clone() for _, y in rows(layer, inputs, output, batch)]

            with watching(layers, see, stop=False):
                found.append(states_of(call(segment, self.task, number, source)))
        return found

    def _kept_together(self, stages: Sequence[Stage]) -> list[list[Stage]]:
        """Stages whose outputs are kept at the same time, within the bytes that may be kept."""
        groups: list[list[Stage]] = []
        used = KEPT
        for stage in stages:
            needed = sum(self.path.nbytes[layer.path] for layer in stage.layers)
            if used + needed > KEPT:
                groups.append([])
                used = 0
            groups[-1].append(stage)
            used += needed
        return groups

    def _stage(self, segment: Segment, stage: Stage, fitted: Sequence[Tensor], wanted: _Wanted) -> None:
        """Fit layers that share their input."""
        layers = [layer for layer in stage.layers if self.shares[layer.name]]
        missed = [math.nan]
        if layers:
            try:
                sums = self._summed(segment, stage, layers, fitted, wanted, paired=stage.alone)
            except _OtherRowsError:
                sums = self._summed(segment, stage, layers, fitted, wanted, paired=False)
            missed = [self._fit(layer, sums) for layer in layers]
        for layer in stage.layers:
            del wanted[layer.name]
        self.step += 1
        self.on_step(self.path.stages, self.step, max(missed))

    def _summed(
        self, segment: Segment, stage: Stage, layers: list[Layer], fitted: Sequence[Tensor], wanted: _Wanted, *, paired: bool
    ) -> _Sums:  # fmt: skip
        """The moments of layers that share their input."""
        sums = _Sums(layers, self.task, paired=paired)
        if sums.width > self.options.widest:
            self._watch_fitted(segment, stage, fitted, wanted, sums)
            least = max(-(-self.shares[layer.name] // math.prod(layer.shape[:2])) for layer in layers)
            columns = sums.best_columns(max(self.options.widest, least))
            sums = _Sums(layers, self.task, columns, paired=paired)
        sums.gram = sums.square()
        self._watch_fitted(segment, stage, fitted, wanted, sums)
        return sums

    def _watch_fitted(
        self, segment: Segment, stage: Stage, fitted: Sequence[Tensor], wanted: _Wanted, sums: _Sums
    ) -> None:
        for number, batch in enumerate(self.task.train):
            calls = {layer.name: iter(wanted[layer.name][number]) for layer in sums.layers}

            def see(layer: Layer, inputs: Tensor, output: Tensor, batch: Any = batch, calls: Any = calls) -> None:
                for x, y in rows(layer, inputs, output, batch):
                    sums.add(layer, x, y, next(calls[layer.name], None))

            with watching(sums.layers, see, stop=stage.alone):
                call(segment, self.task, number, fitted)

    def _fit(self, layer: Layer, sums: _Sums) -> float:
        """Find the entries of a layer; returns which share of the change asked of its outputs is missed."""
        problem = sums.problem(layer, self.options.ridge)
        count = self.shares[layer.name]
        if problem is None:
            self.cut(layer.name)
            return math.nan
        update = sums.narrow(layer.matrix(_update(self.task, layer.name)))
        cut = torch.zeros(update.numel(), dtype=torch.bool, device=update.device)
        cut[largest({"": update.abs().reshape(-1).cpu()}, count)[""]] = True
        found = max(
            grow(problem, count, rounds=self.options.rounds),
            solve(problem, cut.view(update.shape)),
            key=lambda solution: problem.gained(solution.change),
        )
        at = layer.flat(sums.widen(found.support)).nonzero()[:, 0]
        base = self.task.parameter(layer.name).detach().reshape(-1)[at].float()
        self._keep(layer.name, at, base + layer.flat(sums.widen(found.change))[at])
        asked = sums.asked[layer.name]
        return (asked - problem.gained(found.change)) / asked if asked else math.nan

    def _keep(self, name: str, at: Tensor, values: Tensor) -> None:
        """Put entries into the model, for the layers that come after."""
        self.entries[name] = (at, values)
        self.changes.enter_context(changed(self.task, name, at, values))


class _OtherRowsError(Exception):
    """A layer of the fitted model is fed other rows than the source's, as an expert that is chosen by its inputs."""


class _Sums:
    """Moments of the inputs of layers that share them, and of what is asked of their outputs.

    With ``paired`` they are to return what the source's layers returned; otherwise, as for a layer that is called several times or an
    expert, what the source's layers return for the same inputs.
    """

    def __init__(
        self, layers: Sequence[Layer], task: Task, columns: Tensor | None = None, *, paired: bool = True
    ) -> None:
        self.layers, self.task, self.columns, self.paired = layers, task, columns, paired
        groups, _, self.width = layers[0].shape
        self.device = task.device
        kept = self.width if columns is None else len(columns)
        self.squares = torch.zeros(groups, kept, device=self.device)
        self.gram: Tensor | None = None
        self.cross = {layer.name: torch.zeros(*layer.shape[:2], kept, device=self.device) for layer in layers}
        self.asked = dict.fromkeys(self.cross, 0.0)

    def square(self) -> Tensor:
        """Zeros for the sum of ``x x^T``; without it only the squares are summed."""
        groups, kept = self.squares.shape
        return torch.zeros(groups, kept, kept, device=self.device)

    def add(self, layer: Layer, inputs: Tensor, output: Tensor, wanted: Tensor | None) -> None:
        """Add rows of a call: ``[n, groups, width]``, ``[n, groups, outputs]``, and what the source returned there."""
        x = inputs.float().transpose(0, 1)
        if not self.paired:
            asked = layer.matrix(_update(self.task, layer.name)) @ x.transpose(1, 2)
        elif wanted is not None and wanted.shape == output.shape:
            asked = (wanted.float() - output.float()).permute(1, 2, 0)
        else:
            raise _OtherRowsError
        x = self.narrow(x)
        self.cross[layer.name] += asked @ x
        self.asked[layer.name] += float(asked.square().sum(dtype=torch.float64))
        if layer is not self.layers[0]:
            return
        if self.gram is None:
            self.squares += x.square().sum(1)
        else:
            self.gram += x.transpose(1, 2) @ x

    def best_columns(self, count: int) -> Tensor:
        """The columns whose entries would gain most alone, in order."""
        gains = sum((cross.square().sum(1) for cross in self.cross.values()), torch.zeros_like(self.squares))
        gains = (gains / self.squares.clamp(min=torch.finfo(torch.float32).tiny)).sum(0)
        return gains.topk(count).indices.sort().values

    def problem(self, layer: Layer, ridge: float) -> Problem | None:
        """Least squares for one layer; None if all inputs were zeros."""
        assert self.gram is not None
        cross = self.cross[layer.name]
        mean = self.gram.diagonal(dim1=1, dim2=2).mean()
        if not (mean.isfinite() and cross.isfinite().all()):
            raise SourceError(f"tensor {layer.name!r}: an input or output of its layer is NaN or infinite")
        if mean == 0:
            return None
        gram = self.gram.clone()
        gram.diagonal(dim1=1, dim2=2).add_(ridge * mean)
        return Problem(gram, cross)

    def narrow(self, matrix: Tensor) -> Tensor:
        """The columns that are kept, of all."""
        return matrix if self.columns is None else matrix[..., self.columns]

    def widen(self, matrix: Tensor) -> Tensor:
        """All columns, with zeros for those that are not kept."""
        if self.columns is None:
            return matrix
        whole = torch.zeros(*matrix.shape[:-1], self.width, dtype=matrix.dtype, device=matrix.device)
        whole[..., self.columns] = matrix
        return whole


def _update(task: Task, name: str) -> Tensor:
    """Source minus base, float32, in the weight's shape, where the weight is still the base's."""
    parameter = task.parameter(name)
    return update_of(task, name).to(parameter.device).view(parameter.shape)
