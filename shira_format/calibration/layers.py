"""Watching the inputs of a torch model's layers, for :func:`shira_format.calibration.collect_moments`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from shira_format.calibration.moments import Moment
from shira_format.errors import SourceError

_ROWS = 1024  # inputs at a time, which bounds their copy in float64
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class WatchedLayer:
    """One layer and the sums over its inputs so far.

    Attributes:
        module: its name in the model.
        weight: the name of its weight.
        samples: number of inputs so far.
        shape: of the moments, ``[groups, blocks, size, size]``.
        width: elements of an input.
        nbytes: bytes of the moments and kept inputs.
    """

    def __init__(
        self, name: str, module: nn.Module, block: int | None, dtype: torch.dtype, inputs: int = 0, seed: int = 0
    ) -> None:
        self.module, self.weight, self.samples = name, f"{name}.weight" if name else "weight", 0
        self._layer = module
        self._sum: torch.Tensor | None = None
        weight: Any = module.weight
        self._tokens = isinstance(module, nn.Embedding)
        self.inputs_first = self._tokens or has_inputs_first(module)
        self._groups = groups_of(module)
        self.width = weight.shape[0] if self.inputs_first else weight[0].numel()
        size = 1 if self._tokens else max(1, min(block or self.width, self.width))
        self.shape = (self._groups, -(-self.width // size), size, size)
        self._dtype = dtype
        kept = 0 if self._tokens else inputs
        self._kept = _Sample(kept, seed, name) if kept else None
        cells = int(np.prod(self.shape, dtype=object)) + kept * self._groups * int(self.width)
        self.nbytes = cells * dtype.itemsize

    def see(self, inputs: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Add the inputs of one call: ``[..., width]``, images, or token ids."""
        if self._tokens:
            self._count(inputs, mask)
            return
        for rows in input_rows(self._layer, inputs, mask):
            for start in range(0, len(rows), _ROWS):
                self._add(rows[start : start + _ROWS])

    def _add(self, rows: torch.Tensor) -> None:
        self.samples += len(rows)
        groups, blocks, size, _ = self.shape
        wide = rows.to(self._dtype)
        if wide.numel() and not bool(torch.isfinite(wide).all()):
            raise SourceError(f"module {self.module!r}: an input is NaN or infinite")
        if self._kept is not None:
            self._kept.see(wide)
        wide = nn.functional.pad(wide, (0, blocks * size - self.width))
        wide = wide.reshape(len(rows), groups * blocks, size)
        products = (wide * wide).sum(0) if size == 1 else torch.bmm(wide.permute(1, 2, 0), wide.permute(1, 0, 2))
        self._accumulate(products.reshape(self.shape))

    def _count(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        if mask is not None and ids.shape == mask.shape:
            ids = ids[mask.to(ids.device) != 0]
        self._accumulate(torch.bincount(ids.reshape(-1), minlength=self.width).to(self._dtype).reshape(self.shape))
        self.samples += ids.numel()

    def _accumulate(self, products: torch.Tensor) -> None:
        self._sum = products if self._sum is None else self._sum.add_(products)

    def moment(self, weight: str) -> Moment:
        """The mean over all inputs, of which there must be one; consumes the sum, to save memory."""
        assert self._sum is not None
        blocks = self._sum.div_(self.samples).cpu().numpy()
        self._sum = None
        inputs = None if self._kept is None else self._kept.rows.cpu().numpy()
        return Moment(weight, blocks, int(self.width), self.samples, self.inputs_first, inputs, self._tokens)


class _Sample:
    """A uniform random sample of the rows of a stream, in their order; the same however the stream is split.

    Each row draws a number, and the rows with the smallest ones are kept.
    """

    def __init__(self, count: int, seed: int, name: str) -> None:
        self._count = count
        self._random = np.random.default_rng([seed, *name.encode()])
        self._drawn = np.empty(0)
        self.rows = torch.empty(0)

    def see(self, rows: torch.Tensor) -> None:
        drawn = self._random.random(len(rows))
        low = (
            np.flatnonzero(drawn < self._drawn.max()) if self._drawn.size == self._count else np.arange(len(rows))
        )
        if not low.size:
            return
        some = rows[torch.from_numpy(low).to(rows.device)]
        every = torch.cat([self.rows, some]) if self._drawn.size else some
        drawn = np.concatenate([self._drawn, drawn[low]])
        chosen = np.sort(np.argsort(drawn, kind="stable")[: self._count])
        self.rows, self._drawn = every[torch.from_numpy(chosen).to(every.device)], drawn[chosen]


class Watch:
    """The watched layers of a model.

    Attributes:
        layers: in the order of the model.
    """

    def __init__(
        self, model: Any, names: Iterable[str] | None, *, block: int | None, dtype: str, limit: int, inputs: int = 0,
        seed: int = 0,
    ) -> None:  # fmt: skip
        if inputs < 0 or seed < 0:
            raise SourceError(f"{inputs} inputs to keep, seed {seed}: neither may be negative")
        if block is not None and block < 1:
            raise SourceError(f"blocks of {block} inputs; at least 1 is needed")
        if dtype not in ("float32", "float64"):
            raise SourceError(f"moments in {dtype!r}; float32 and float64 are supported")
        self._model = model
        self._named = names is not None
        found = dict(model.named_modules())
        if names is None:
            chosen = [name for name, module in found.items() if can_watch(module)]
        else:
            chosen = list(dict.fromkeys(names))
            for name in chosen:
                if name not in found:
                    raise SourceError(f"module {name!r}: the model has no such module")
                if not can_watch(found[name]):
                    raise SourceError(
                        f"module {name!r}: the inputs of a {type(found[name]).__name__} cannot be collected"
                    )
        if not chosen:
            raise SourceError("the model has no layer whose inputs can be collected")
        self._modules = [found[name] for name in chosen]
        self.layers = [
            WatchedLayer(name, found[name], block, getattr(torch, dtype), inputs, seed) for name in chosen
        ]
        if (needed := sum(layer.nbytes for layer in self.layers)) > limit:
            raise SourceError(
                f"the moments of {len(chosen)} layers would take {needed / 1e9:.1f} GB, more than {limit / 1e9:.1f} GB: "
                "choose fewer modules, float32, a block, or fewer inputs to keep"
            )

    def run(self, data: Iterable[Any]) -> None:
        """Run the model over all batches."""
        device = next((parameter.device for parameter in self._model.parameters()), torch.device("cpu"))
        mask: torch.Tensor | None = None
        handles: list[Any] = []

        def watch(layer: WatchedLayer, module: nn.Module) -> None:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                layer.see(args[0] if args else next(iter(kwargs.values())), mask)

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

        batches = 0
        try:
            for layer, module in zip(self.layers, self._modules, strict=True):
                watch(layer, module)
            with evaluating(self._model), torch.no_grad():
                for batch in data:
                    batches += 1
                    mask = attention_mask(batch)
                    run_model(self._model, batch, device)
        finally:
            for handle in handles:
                handle.remove()
        if not batches:
            raise SourceError("there are no batches to run the model on")
        for layer in self.layers:
            if self._named and not layer.samples:
                raise SourceError(f"module {layer.module!r}: no input reached it")


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model is in evaluation mode for a while; afterwards each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def restoring_gradients(model: Any) -> Iterator[None]:
    """What happens to gradients meanwhile, and to which parameters need them, is undone afterwards."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, needed, gradient in before:
            parameter.requires_grad_(needed)
            parameter.grad = gradient


def can_watch(module: nn.Module) -> bool:
    """Whether inputs of layers of this type can be collected."""
    return isinstance(module, (nn.Linear, nn.Embedding, *_CONVOLUTIONS)) or has_inputs_first(module)


def has_inputs_first(module: nn.Module) -> bool:
    """Whether it is transformers' linear layer with an ``[in, out]`` weight; transformers is not imported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")


def groups_of(module: nn.Module) -> int:
    """Groups of a convolution; else 1."""
    return module.groups if isinstance(module, _CONVOLUTIONS) else 1


def input_rows(module: Any, inputs: torch.Tensor, mask: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """What a layer multiplies its weight with in one call, ``[rows, groups, width]`` at a time: without padded positions; for a
    convolution image by image, since patches are large, and a patch in the order of the weight's matrix view.
    """
    groups = groups_of(module)
    if not isinstance(module, _CONVOLUTIONS):
        yield without_padding(inputs, mask).reshape(-1, 1, inputs.shape[-1])
        return
    for image in inputs[None] if inputs.ndim == len(module.kernel_size) + 1 else inputs:
        patches = _patches(module, image[None])
        yield patches.reshape(len(patches), groups, -1)


def output_rows(module: Any, output: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What a layer returns in one call, ``[rows, groups, outputs of a group]``, in the order of :func:`input_rows`."""
    if not isinstance(module, _CONVOLUTIONS):
        return without_padding(output, mask).reshape(-1, 1, output.shape[-1])
    images = output[None] if output.ndim == len(module.kernel_size) + 1 else output
    rows = images.movedim(1, -1)
    return rows.reshape(-1, module.groups, images.shape[1] // module.groups)


def without_padding(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """States ``[texts, tokens, ...]`` or ``[texts * tokens, width]`` where the mask is not 0; all of them if it is of another shape."""
    if mask is not None and states.ndim > 2 and states.shape[:2] == mask.shape:
        return states[mask.to(states.device) != 0]
    if mask is not None and states.ndim == 2 and len(states) == mask.numel() > len(mask):
        # Mixtures of experts flatten the tokens first.
        return states[mask.to(states.device).reshape(-1) != 0]
    return states


def attention_mask(batch: Any) -> torch.Tensor | None:
    """The ``attention_mask`` of a batch, ``[texts, tokens]``; None if it has none."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def run_model(model: Any, batch: Any, device: torch.device) -> Any:
    """The output for a batch: keyword arguments as a mapping, positional ones as a sequence, or one argument."""

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{key: moved(value) for key, value in batch.items()})
    if isinstance(batch, Sequence):
        return model(*map(moved, batch))
    return model(moved(batch))


def _patches(module: Any, images: torch.Tensor) -> torch.Tensor:
    """The kernel's input at each position: ``[positions of all images, channels * kernel]``, in the weight's order."""
    dimensions = len(module.kernel_size)
    # The layer's own padding: the last dimension first; "same" may pad one side more.
    padding = module._reversed_padding_repeated_twice  # noqa: SLF001 - torch has no other name for it
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    images = nn.functional.pad(images, padding, mode=mode)
    sizes = images.shape[2:]
    steps = list(zip(sizes, module.kernel_size, module.stride, module.dilation, strict=True))
    counts = [(size - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, dilation in steps]
    # The kernel's offsets as further dimensions: [images, channels, *positions, *kernel].
    strides = images.stride()[2:]
    view = images.as_strided(
        (*images.shape[:2], *counts, *module.kernel_size),
        (
            *images.stride()[:2],
            *(stride * step for stride, (_, _, step, _) in zip(strides, steps, strict=True)),
            *(stride * dilation for stride, (_, _, _, dilation) in zip(strides, steps, strict=True)),
        ),
    )
    order = (0, *range(2, 2 + dimensions), 1, *range(2 + dimensions, 2 + 2 * dimensions))
    return view.permute(order).reshape(-1, images.shape[1] * int(np.prod(module.kernel_size)))
