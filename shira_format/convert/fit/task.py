"""What a fit works on: a live model, the source's weights for it, and inputs to compare the two on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shira_format._core.arrays import as_array
from shira_format.calibration.layers import attention_mask, run_model
from shira_format.convert.fit.weights import ComputedWeights
from shira_format.errors import BaseMismatch
from shira_format.live.weights import live_weight

# By the parameter's name: int64 ``[n]`` flat indices, strictly increasing, and ``[n]`` the new values of the weight there.
Entries = Mapping[str, tuple[Tensor, Tensor]]

# From a model's output and the batch to what counts of it, ``[rows, width]``.
Outputs = Callable[[Any, Any], Tensor]

# Called after each step of a fit: how many there will be at most, which one, and its loss (nan where a step has none).
OnStep = Callable[[int, int, float], object]


@dataclass
class Task:
    """One fit: find entries that make ``model`` do what it does with the weights of ``source``.

    Attributes:
        model: the base in evaluation mode, without the adapter.
        source: by parameter, the source's weights: the shape of the parameter, floats; only those that may become sparse. They may be
            computed when they are asked for, so that all of them at once may not fit into memory.
        whole: by parameter, the tensors that the adapter replaces whole; in the model for all comparisons.
        train: batches to fit on: keyword arguments as a mapping, positional ones as a sequence, or one argument.
        held: batches to measure on.
        outputs: what counts of an output; see :mod:`shira_format.convert.fit.outputs`.
        is_logits: whether outputs are logits, so that a KL divergence and the first choice mean something.
        is_causal: whether these are a language model's, of the next token: in training their KL divergence is matched.
        layers: modules whose outputs are matched and measured too, by the model's names.
        dtypes: by parameter, the dtype that its values are stored in, where it is not the parameter's own.
        reference: what :func:`shira_format.convert.fit.quality.effect` keeps about the source from one call to the next.
    """

    model: nn.Module
    source: Mapping[str, Tensor]
    whole: dict[str, Tensor]
    train: Sequence[Any]
    held: Sequence[Any]
    outputs: Outputs
    is_logits: bool = False
    is_causal: bool = False
    layers: tuple[str, ...] = ()
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    reference: Any = None

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device

    @property
    def numel(self) -> int:
        """Elements of all weights that may become sparse."""
        return sum(self.parameter(name).numel() for name in self.source)

    def parameter(self, name: str) -> nn.Parameter:
        """A parameter by name."""
        return self.model.get_parameter(name)

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer by name."""
        module, _, attribute = name.rpartition(".")
        found = getattr(self.model.get_submodule(module), attribute)
        assert isinstance(found, Tensor)
        return found

    def rounded(self, name: str, values: Tensor) -> Tensor:
        """Values as a file gives them back: rounded to the stored dtype, to nearest with ties to even, in the parameter's dtype."""
        parameter = self.parameter(name)
        return values.to(self.dtypes.get(name, parameter.dtype)).to(parameter.dtype)


class TaughtBatch(dict[str, Any]):
    """Keyword arguments of the model, on which other weights than the task's source are the example to follow.

    Attributes:
        weights: these, of each parameter in the task's source.
    """

    weights: Mapping[str, Tensor]

    def __init__(self, batch: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Args: ``batch``: the keyword arguments; ``weights``: see the class."""
        super().__init__(batch)
        self.weights = weights


@contextmanager
def showing_base(task: Task) -> Iterator[None]:
    """The model is the base with the tensors that are stored whole; afterwards it is what it was, bit for bit."""
    with replaced(task, task.whole):
        yield


@contextmanager
def showing_source(task: Task, batch: Any = None) -> Iterator[None]:
    """The model is the source, or the one for this batch; afterwards it is what it was, bit for bit."""
    weights = batch.weights if isinstance(batch, TaughtBatch) else task.source
    blocks = task.layers if isinstance(weights, ComputedWeights) and not weights.are_kept else ()
    inside = {block: [name for name in weights if name.startswith(f"{block}.")] for block in blocks}
    late = {name for names in inside.values() for name in names}
    with ExitStack() as stack:
        stack.enter_context(
            replaced(task, task.whole | {name: weights[name] for name in weights if name not in late})
        )
        for block, names in inside.items():
            stack.enter_context(_replaced_in_calls(task, block, names, weights))
        yield


@contextmanager
def _replaced_in_calls(
    task: Task, block: str, names: Sequence[str], weights: Mapping[str, Tensor]
) -> Iterator[None]:
    """Parameters of a block have other data while it runs, so that those of one block at a time are in memory."""
    running = ExitStack()

    def enter(*_: object) -> None:
        running.enter_context(replaced(task, {name: weights[name] for name in names}))

    module = task.model.get_submodule(block)
    first = module.register_forward_pre_hook(enter, prepend=True)
    last = module.register_forward_hook(lambda *_: running.close(), always_call=True)
    try:
        yield
    finally:
        first.remove()
        last.remove()
        running.close()


@contextmanager
def showing(task: Task, entries: Entries) -> Iterator[None]:
    """The model has these entries, rounded as a file rounds them; afterwards it is what it was, bit for bit."""
    with showing_base(task), ExitStack() as stack:
        for name, (indices, values) in entries.items():
            stack.enter_context(changed(task, name, indices, values))
        yield


@contextmanager
def changed(task: Task, name: str, indices: Tensor, values: Tensor) -> Iterator[None]:
    """A parameter has these values at flat indices, rounded as a file rounds them; afterwards it is what it was, bit for bit."""
    weight = live_weight(name, task.parameter(name).detach())
    at = as_array(indices.cpu())
    before = weight.get(at)
    try:
        weight.put(at, as_array(task.rounded(name, values.detach()).cpu()))
        yield
    finally:
        now = live_weight(
            name, task.parameter(name).detach()
        )  # where it is, if the model moved or resized it when it ran
        if now.shape != weight.shape:
            raise BaseMismatch(
                f"tensor {name!r}: the weight of {list(weight.shape)} became {list(now.shape)} as the model ran"
            )
        now.put(at, before)


@contextmanager
def replaced(task: Task, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters with other data for a while: their memory is exchanged, not copied."""
    with ExitStack() as stack:
        for name, weight in weights.items():
            tensor = task.tensor(name)
            stack.callback(setattr, tensor, "data", tensor.data)
            tensor.data = weight.to(tensor.device, tensor.dtype).view(tensor.shape)
        yield


@dataclass(frozen=True)
class Seen:
    """What a model does with one batch.

    Attributes:
        outputs: ``[rows, width]`` what counts of the output.
        hidden: for each of the task's layers, ``[positions, width]`` its output without padding.
    """

    outputs: Tensor
    hidden: list[Tensor]


def see(task: Task, batch: Any, *, hidden: bool = True) -> Seen:
    """Run the model, as it is now, on a batch; with gradients if they are enabled."""
    found: dict[str, Tensor] = {}
    mask = attention_mask(batch)

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found[name] = _positions(output, mask)

        return hook

    with ExitStack() as stack:
        for name in task.layers if hidden else ():
            stack.callback(task.model.get_submodule(name).register_forward_hook(keep(name)).remove)
        output = run_model(task.model, batch, task.device)
    return Seen(task.outputs(output, batch), [found[name] for name in task.layers if name in found])


class SourceOutputs:
    """What the source does on some batches: computed when it is first asked for, and kept as far as memory allows."""

    def __init__(self, task: Task, batches: Sequence[Any], limit: int) -> None:
        """Args: ``limit``: bytes that are kept; what does not fit is computed again each time."""
        self._task, self._batches, self._left = task, batches, limit
        self._kept: dict[int, Seen] = {}

    def __getitem__(self, number: int) -> Seen:
        """For one batch."""
        if number in self._kept:
            return self._kept[number]
        with torch.no_grad(), showing_source(self._task, self._batches[number]):
            found = see(self._task, self._batches[number])
        size = sum(one.nbytes for one in (found.outputs, *found.hidden))
        if size <= self._left:
            self._left -= size
            self._kept[number] = found
        return found


def _positions(output: Any, mask: Tensor | None) -> Tensor:
    """A layer's output as ``[positions, width]``, without padded positions."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    if mask is not None and output.shape[:2] == mask.shape:
        return output[mask.to(output.device) != 0]
    return output.flatten(1) if output.ndim > 3 else output.reshape(-1, output.shape[-1])


def inputs_of(batch: Any, rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """``[rows]``: the input of a batch that each row of its outputs belongs to; all are one input where that cannot be told."""
    mask = attention_mask(batch)
    if mask is not None and rows == int((mask != 0).sum()) != len(mask):
        return np.repeat(np.arange(len(mask)), (mask != 0).sum(1).cpu().numpy())
    first = _first_tensor(batch)
    count = len(first) if first is not None and first.ndim else 1
    return np.arange(rows) * count // rows if rows % count == 0 else np.zeros(rows, np.int64)


def _first_tensor(batch: Any) -> Tensor | None:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else [batch]
    return next((value for value in values if isinstance(value, Tensor)), None)


def blocks_of(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's blocks: the members of its outermost lists of modules."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in found)
        if isinstance(module, nn.ModuleList) and not inside:
            found += [f"{name}.{number}" if name else str(number) for number in range(len(module))]
    return tuple(found)
