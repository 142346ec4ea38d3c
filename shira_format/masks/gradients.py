"""Gradients of a loss over batches, summed in float32, for all weights at once or for a few at a time."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from shira_format._core.arrays import Array, as_array
from shira_format._core.files import naming
from shira_format._core.threads import Progress
from shira_format.errors import SourceError
from shira_format.masks.weights import Weight

# From the model and a batch to the loss, a tensor with one element.
Loss = Callable[[Any, Any], Any]


class SummedGradients:
    """What :func:`sum_gradients` found, in memory or in a temporary file; a context manager that frees both.

    Attributes:
        unreached: the names of weights that the loss does not depend on.
    """

    def __init__(self, *, on_disk: bool) -> None:
        """Args: ``on_disk``: keep the sums in an unnamed temporary file."""
        self.unreached: list[str] = []
        self._held: dict[str, Array] = {}
        self._places: dict[str, int] = {}
        self._lock = threading.Lock()
        self._end = 0
        self._file: IO[bytes] | None = tempfile.TemporaryFile() if on_disk else None  # noqa: SIM115 - closed on exit

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory or the file."""
        self._held.clear()
        if self._file is not None:
            with naming(tempfile.gettempdir()):  # what is in the buffer of a full disk fails again
                self._file.close()

    def put(self, name: str, gradient: Array) -> None:
        """Keep the flat gradient of a weight, float32."""
        if self._file is None:
            self._held[name] = gradient
            return
        with naming(tempfile.gettempdir()):
            self._file.seek(self._end)
            self._file.write(np.ascontiguousarray(gradient).view(np.uint8).data)
        self._places[name] = self._end
        self._end += gradient.nbytes

    def __call__(self, name: str) -> Callable[[int, int], Array]:
        """What reads elements ``start`` to ``stop`` of a weight's gradient, ``[stop - start]`` float32; thread-safe."""
        if self._file is None:
            held = self._held[name]
            return lambda start, stop: held[start:stop]
        file, place = self._file, self._places[name]

        def part(start: int, stop: int) -> Array:
            with self._lock:
                file.seek(place + 4 * start)
                return np.frombuffer(file.read(4 * (stop - start)), np.float32)

        return part


def sum_gradients(
    model: Any,
    weights: Sequence[Weight],
    batches: Iterable[Any],
    loss: Loss,
    *,
    squares: bool = False,
    at_once: int | None = None,
    progress: Progress = lambda _: None,
) -> SummedGradients:
    """The sum over the batches of the gradients of a loss, or of their squares, for each weight.

    Each batch's gradient is converted to float32, added to the sum on the weight's device, and freed during the backward pass. The
    model is in evaluation mode meanwhile; its mode, ``requires_grad`` and gradients are as before when this returns.

    Args:
        model: a torch module.
        weights: of that model.
        batches: what ``loss`` takes; read once for each group of weights.
        loss: from the model and a batch to a tensor of one element.
        squares: sum the squares of each batch's gradient.
        at_once: the sums of so many weights are in memory at a time, and the others in a temporary file; the batches are run once
            for each group. None: all, with the batches run once.
        progress: called with numbers of batches.

    Returns:
        To be used as a context manager.

    Raises:
        ValueError: ``at_once`` is not positive, or the batches can be read only once and are needed more often.
        SourceError: no batches, or a loss that is no finite number or depends on none of the weights.
    """
    if at_once is not None and at_once < 1:
        raise ValueError(f"{at_once} weights at once: at least 1 is needed")
    step = at_once or max(1, len(weights))
    if len(weights) > step and iter(batches) is batches:
        raise ValueError(
            "the batches can be read only once, and are needed for each group of weights: give a list or a DataLoader"
        )
    found = SummedGradients(on_disk=at_once is not None)
    with ExitStack() as stack:
        stack.push(found.__exit__)
        for start in range(0, len(weights), step):
            group = weights[start : start + step]
            with _only(model, group), _summing(group, squares=squares) as sums:
                _run(model, batches, loss, progress)
            for weight in group:
                total = sums.pop(weight.name, None)
                if total is None:
                    found.unreached.append(weight.name)
                else:
                    found.put(weight.name, as_array(total).reshape(-1))
        if len(found.unreached) == len(weights):
            raise SourceError("the loss depends on none of the weights")
        stack.pop_all()
    return found


@contextmanager
def _only(model: Any, weights: Sequence[Weight]) -> Iterator[None]:
    """The model in evaluation mode, where only these weights have gradients."""
    from shira_format.calibration.layers import evaluating, restoring_gradients

    wanted = {id(weight.parameter) for weight in weights}
    with evaluating(model), restoring_gradients(model):
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in wanted)
            parameter.grad = None
        yield


@contextmanager
def _summing(weights: Sequence[Weight], *, squares: bool) -> Iterator[dict[str, Any]]:
    """Gradients are added up as they come, and not kept; yields the sums by name."""
    import torch

    sums: dict[str, Any] = {}
    handles: list[Any] = []

    def hook(weight: Weight) -> Callable[[Any], None]:
        def add(parameter: Any) -> None:
            gradient = parameter.grad.detach()
            gradient = (gradient.to_dense() if gradient.is_sparse else gradient).to(torch.float32)
            if squares:
                gradient = gradient.square()
            if weight.name in sums:
                sums[weight.name] += gradient
            else:
                sums[weight.name] = gradient.clone()
            parameter.grad = None

        return add

    try:
        handles += [weight.parameter.register_post_accumulate_grad_hook(hook(weight)) for weight in weights]
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _run(model: Any, batches: Iterable[Any], loss: Loss, progress: Progress) -> None:
    import torch

    number = 0
    for number, batch in enumerate(batches, 1):
        with torch.enable_grad():
            value: Any = loss(model, batch)
            if not isinstance(value, torch.Tensor) or value.numel() != 1:
                raise SourceError(f"batch {number}: the loss is not a tensor of one element")
            if not bool(torch.isfinite(value).all()):
                raise SourceError(f"batch {number}: the loss is {float(value.detach())}")
            if value.requires_grad:
                value.reshape(()).backward()  # type: ignore[no-untyped-call]
        progress(1)
    if not number:
        raise SourceError("there are no batches to compute gradients on")


def reached(weights: Sequence[Weight], gradients: SummedGradients) -> list[Weight]:
    """The weights that the loss depends on."""
    left = set(gradients.unreached)
    return [weight for weight in weights if weight.name not in left]
