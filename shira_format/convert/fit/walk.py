"""A model layer by layer: which layers run when, on what inputs, and blocks that run alone on inputs that were kept.

A model whose blocks follow each other, each on what the one before returned, is walked block by block: a block's inputs are kept, so
that what comes before it need not run again. Any other model is run from its start for each group of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from shira_format.calibration.layers import (
    attention_mask,
    can_watch,
    groups_of,
    has_inputs_first,
    input_rows,
    output_rows,
    run_model,
)
from shira_format.convert.fit.task import Task, showing_base, showing_source

Call = Callable[[int], Any]


@dataclass(frozen=True)
class Layer:
    """A layer that multiplies its inputs with a weight.

    Attributes:
        name: of the weight, a parameter of the model.
        path: of the module.
        module: the module.
    """

    name: str
    path: str
    module: Any

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Groups, outputs of a group, width of an input."""
        shape, groups = tuple(self.module.weight.shape), groups_of(self.module)
        if has_inputs_first(self.module):
            return 1, shape[1], shape[0]
        return groups, shape[0] // groups, math.prod(shape[1:])

    def matrix(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as ``[groups, outputs, width]``."""
        if has_inputs_first(self.module):
            return weight.T[None]
        return weight.reshape(self.shape)

    def flat(self, matrix: Tensor) -> Tensor:
        """``[groups, outputs, width]`` in the weight's order, as ``[numel]``."""
        return matrix[0].T.reshape(-1) if has_inputs_first(self.module) else matrix.reshape(-1)


def layers_of(task: Task) -> dict[str, Layer]:
    """The task's weights that a layer multiplies its inputs with, by the layer's path; an embedding looks its rows up instead."""
    found: dict[str, Layer] = {}
    for name in task.source:
        path, _, attribute = name.rpartition(".")
        module = task.model.get_submodule(path)
        if attribute == "weight" and can_watch(module) and not isinstance(module, nn.Embedding):
            found[path] = Layer(name, path, module)
    return found


@dataclass
class Stage:
    """Layers that share their input.

    Attributes:
        layers: in the order in which they run.
        alone: whether each runs once for a batch, so that nothing after the last of them matters.
    """

    layers: list[Layer]
    alone: bool = True


@dataclass
class Segment:
    """A part of the model that can be run by itself, and its layers.

    Attributes:
        stages: in the order in which they run.
        block: None: the part is the whole model.
    """

    stages: list[Stage]
    block: Block | None = None


@dataclass
class Block:
    """A block of a model.

    Attributes:
        path: its name in the model.
        module: the module.
        more: for each batch its further arguments, which do not depend on the weights.
    """

    path: str
    module: nn.Module
    more: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def run(self, number: int, states: Tensor) -> Any:
        """Its output for a batch."""
        args, kwargs = self.more[number]
        return self.module(states, *args, **kwargs)


class _Stop(Exception):
    """What is wanted of a run has been seen."""


def call(segment: Segment, task: Task, number: int, states: Sequence[Tensor]) -> Any:
    """Run a segment on a batch; None if the run was stopped."""
    try:
        if segment.block is None:
            return run_model(task.model, task.train[number], task.device)
        return segment.block.run(number, states[number])
    except _Stop:
        return None


def states_of(output: Any) -> Any:
    """The hidden states that a block returned: the output itself, or the first of several."""
    return output[0] if isinstance(output, Sequence) and output else output


@contextmanager
def watching(
    layers: Sequence[Layer], see: Callable[[Layer, Tensor, Tensor], object], *, stop: bool
) -> Iterator[None]:
    """Call ``see`` with input and output of each call of the layers; with ``stop``, the last layer's first call ends the run."""

    def hook(layer: Layer) -> Callable[..., None]:
        def seen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            see(layer, args[0] if args else next(iter(kwargs.values())), output)
            if stop and layer is layers[-1]:
                raise _Stop

        return seen

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_hook(hook(layer), with_kwargs=True).remove)
        yield


def entering(block: Block, task: Task) -> list[Tensor]:
    """For each batch the hidden states that come to a block, with the model as it is now."""
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise _Stop

    handle = block.module.register_forward_pre_hook(hook)
    try:
        for number in range(len(task.train)):
            call(Segment([]), task, number, ())
    finally:
        handle.remove()
    return found


def rows(layer: Layer, inputs: Tensor, output: Tensor, batch: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs ``[n, groups, width]`` and outputs ``[n, groups, outputs]`` of one call, some at a time, without padding."""
    mask = attention_mask(batch)
    returned, start = output_rows(layer.module, output, mask), 0
    for some in input_rows(layer.module, inputs, mask):
        yield some, returned[start : start + len(some)]
        start += len(some)


@dataclass
class Path:
    """How to walk a model.

    Attributes:
        segments: in the order in which they run.
        unseen: weights of layers that no input reached.
        nbytes: of all that each layer returns for all batches, by its path.
        entering: for each batch the hidden states that come to the first block of the source; empty without blocks.
    """

    segments: list[Segment]
    unseen: list[str]
    nbytes: dict[str, int]
    entering: list[Tensor] = field(default_factory=list)

    @property
    def stages(self) -> int:
        """How many there are."""
        return sum(len(segment.stages) for segment in self.segments)


def find_path(task: Task, layers: Mapping[str, Layer]) -> Path:
    """Run the source once on all batches, and see what runs when; within :func:`without_cache` and without gradients."""
    with showing_source(task):
        seen = _recorded(task, layers)
    with showing_base(task):
        chained = seen.is_chain and _independent(task, seen)
    unseen = [layer.name for path, layer in layers.items() if path not in seen.order]
    if not chained:
        return Path([Segment(_stages(list(seen.order), layers, seen))], unseen, seen.nbytes)
    segments = [Segment(_stages(seen.before, layers, seen))]
    for path, block in seen.blocks.items():
        inside = [one for one in seen.order if one.startswith(f"{path}.")]
        segments.append(Segment(_stages(inside, layers, seen), block))
    taken = {one.path for segment in segments for stage in segment.stages for one in stage.layers}
    after = [one for one in seen.order if one not in taken]
    segments.append(Segment(_stages(after, layers, seen)))
    kept = [segment for segment in segments if segment.stages or segment.block]
    return Path(kept, unseen, seen.nbytes, seen.entering)


@dataclass
class _Record:
    """What was seen in a run of all batches."""

    order: dict[str, int] = field(default_factory=dict)  # of layers: number of the input that they share
    nbytes: dict[str, int] = field(default_factory=dict)  # of what layers return
    often: set[str] = field(default_factory=set)  # layers that do not run exactly once for each batch
    before: list[str] = field(default_factory=list)  # layers that run before the first block
    blocks: dict[str, Block] = field(default_factory=dict)
    entering: list[Tensor] = field(default_factory=list)
    is_chain: bool = True


def _recorded(task: Task, layers: Mapping[str, Layer]) -> _Record:
    found = _Record(blocks={path: Block(path, task.model.get_submodule(path)) for path in task.layers})
    found.is_chain = bool(found.blocks)
    for number in range(len(task.train)):
        run = _Run(found, list(found.blocks))
        with ExitStack() as stack:
            for path, layer in layers.items():
                hook = run.saw_layer(path)
                stack.callback(layer.module.register_forward_hook(hook, with_kwargs=True).remove)
            for path, block in found.blocks.items():
                stack.callback(
                    block.module.register_forward_pre_hook(run.enters(path, number), with_kwargs=True).remove
                )
                stack.callback(block.module.register_forward_hook(run.leaves).remove)
            call(Segment([]), task, number, ())
        found.often |= {path for path in layers if run.calls.get(path, 0) != 1}
        found.is_chain &= run.entered == list(found.blocks)
    found.is_chain &= found.is_chain and _replays(found)
    return found


class _Run:
    """The hooks of one run."""

    def __init__(self, record: _Record, blocks: list[str]) -> None:
        self.record, self.blocks = record, blocks
        self.calls: dict[str, int] = {}
        self.entered: list[str] = []
        self.inputs: list[Any] = []  # kept, so that no other tensor gets the same identity
        self.last: Any = None

    def saw_layer(self, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            self.calls[path] = self.calls.get(path, 0) + 1
            self.record.nbytes[path] = self.record.nbytes.get(path, 0) + output.nbytes
            given = args[0] if args else next(iter(kwargs.values()))
            if path in self.record.order:
                return
            number = next((n for n, one in enumerate(self.inputs) if one is given), len(self.inputs))
            self.inputs += [given] if number == len(self.inputs) else []
            self.record.order[path] = number
            if not self.entered:
                self.record.before.append(path)

        return hook

    def enters(self, path: str, number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args and isinstance(args[0], Tensor) else None
            first = not self.entered
            self.entered.append(path)
            if states is None or not (first or states is self.last):
                self.record.is_chain = False
            if not self.record.is_chain or states is None:
                return
            if first:
                self.record.entering.append(states)
            self.record.blocks[path].more.append((args[1:], kwargs))

        return hook

    def leaves(self, _: nn.Module, __: Any, output: Any) -> None:
        self.last = states_of(output)


def _replays(record: _Record) -> bool:
    """Whether the blocks alone give the same twice, on what they were given: nothing is remembered from call to call."""
    if not record.entering:
        return False
    states: Any = record.entering[0]
    for block in record.blocks.values():
        first = states_of(block.run(0, states))
        again = states_of(block.run(0, states))
        if not isinstance(first, Tensor) or first.shape != states.shape or not torch.equal(first, again):
            return False
        states = first
    return True


def _independent(task: Task, source: _Record) -> bool:
    """Whether the blocks of the base get the same further arguments as those of the source, so that no weight changes these."""
    one = Task(task.model, task.source, task.whole, task.train[:1], [], task.outputs, layers=task.layers)
    base = _recorded(one, {})
    return base.is_chain and all(
        _same(block.more[0], base.blocks[path].more[0]) for path, block in source.blocks.items()
    )


def _same(one: Any, other: Any) -> bool:
    ones, others = tree_leaves(one), tree_leaves(other)
    return len(ones) == len(others) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(ones, others, strict=True)
    )


def _stages(paths: Sequence[str], layers: Mapping[str, Layer], record: _Record) -> list[Stage]:
    """Layers in the order in which they run, those that follow each other on the same input together."""
    stages: list[Stage] = []
    last: int | None = None
    for path in paths:
        once, number = path not in record.often, record.order[path]
        if once and number == last:
            stages[-1].layers.append(layers[path])
        else:
            stages.append(Stage([layers[path]], once))
        last = number if once else None
    return stages


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Language models keep no keys and values: a block that runs alone would add to them each time."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is None:
        yield
        return
    assert config is not None
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before
