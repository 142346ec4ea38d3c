"""Masked gradients for any trainer: the parameters stay whole, and an optimizer sees the entries of the mask alone.

When a gradient has accumulated, a hook sets all of it to zero but the entries of the mask: clipping counts these alone. For the
time of an optimizer step each parameter *is* its entries: momentum, second moments and weight decay have the size of the mask,
and what is frozen is not read or written by the optimizer, and keeps its bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from shira_format._core.arrays import Array, as_array
from shira_format.adapter import Adapter
from shira_format.errors import SourceError
from shira_format.live.weights import check_memory, live_weight
from shira_format.training.masks import Mask, MaskedWeight, check_stays, masked_weights, read_mask
from shira_format.training.trained import TrainedEntries, Training, freeze_others, whole_parameters

_live: WeakSet[MaskedParameter] = WeakSet()


class MaskedParameter:
    """One parameter of which some entries are trained.

    Attributes:
        of: the weight and its entries.
        base: ``[K]``, what the entries were.
    """

    def __init__(self, of: MaskedWeight) -> None:
        self.of = of
        parameter = of.parameter
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
        self._index = torch.from_numpy(of.indices.copy()).to(parameter.device)
        self._whole: tuple[Tensor, Tensor | None] | None = None
        self.base: Array = as_array(self.read()).copy()
        self._trained: Array | None = None
        parameter.requires_grad_(True)
        self._hook: Any = parameter.register_post_accumulate_grad_hook(self._mask_gradient)  # type: ignore[no-untyped-call]
        _live.add(self)

    def read(self) -> Tensor:
        """The entries now, ``[K]``."""
        return self._at(self._weight().detach())

    def _weight(self) -> nn.Parameter:
        """The parameter, whole.

        Raises:
            BaseMismatch: it was resized, or its memory was released.
        """
        self.grow()  # if a step failed half-way
        check_stays(self.of.path, self.of.shape, self.of.parameter)
        check_memory(self.of.path, self.of.parameter)
        return self.of.parameter

    def write_base(self) -> None:
        """Put the base's values into the weight."""
        self._trained = as_array(self.read()).copy()
        self._put(self.base)

    def write(self) -> None:
        """Put back what :meth:`show_base` replaced."""
        if self._trained is not None:
            self._put(self._trained)
            self._trained = None

    @property
    def trained(self) -> Array:
        """``[K]``: the trained entries."""
        return as_array(self.read()).copy() if self._trained is None else self._trained

    def check_state(self, optimizer: Any) -> None:
        """Raise SourceError if the optimizer has a state of the parameter that cannot be cut to the entries, BaseMismatch if it was resized."""
        shape = self._weight().shape
        for name, value in optimizer.state.get(self.of.parameter, {}).items():
            if self._is_of_elements(value) and value.shape != shape:
                raise SourceError(
                    f"the optimizer's {name} of {self.of.path} is neither one number nor one for each element of the weight: attach "
                    "before its first step"
                )

    def _is_of_elements(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.numel() != 1 and value.shape != self._index.shape

    def shrink(self, optimizer: Any) -> None:
        """Before a step: the parameter becomes its entries, and so does what the optimizer holds for it."""
        parameter = self.of.parameter
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if self._is_of_elements(value):  # made for the whole weight, before the mask was attached
                state[name] = self._at(value)
        whole, grad = parameter.data, parameter.grad
        self._whole = whole, grad
        parameter.grad = None
        parameter.data = self._at(whole)
        if grad is not None:
            parameter.grad = self._at(grad)

    def grow(self) -> None:
        """After a step: the parameter is whole again, with the entries as the optimizer left them."""
        if self._whole is None:
            return
        parameter, (whole, grad) = self.of.parameter, self._whole
        self._whole = None
        entries = parameter.data
        parameter.grad = None
        parameter.data = whole
        whole.view(-1).index_copy_(0, self._index, entries)
        parameter.grad = grad

    def remove(self) -> None:
        """Remove the hook."""
        self._hook.remove()
        _live.discard(self)

    def _mask_gradient(self, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is None:
            return
        if grad.is_sparse:
            raise SourceError(
                f"{self.of.path}: the gradient is a sparse tensor: make the embedding with sparse=False"
            )
        check_stays(self.of.path, self.of.shape, parameter)  # type: ignore[arg-type]
        flat = grad.reshape(-1)
        kept = flat.index_select(0, self._index_on(grad.device))
        grad.zero_()
        if grad.is_contiguous():
            grad.view(-1).index_copy_(0, self._index, kept)
        else:
            grad.copy_(torch.zeros_like(flat).index_copy_(0, self._index, kept).view(grad.shape))

    def _at(self, whole: Tensor) -> Tensor:
        return whole.reshape(-1).index_select(0, self._index_on(whole.device))

    def _index_on(self, device: torch.device) -> Tensor:
        if self._index.device != device:
            self._index = self._index.to(device)
        return self._index

    def _put(self, values: Array) -> None:
        live_weight(self.of.path, self._weight().detach()).put(self.of.indices, values)


class MaskedGradients(Training):
    """A model whose gradients are masked; made by :func:`attach`."""

    def __init__(
        self, model: nn.Module, mask: Mask, whole: Sequence[str], new: Sequence[str], prefix: str | None
    ) -> None:
        found = read_mask(mask)
        chosen = masked_weights(model, mask if not isinstance(mask, str | os.PathLike) else found, prefix=prefix)
        trained_whole = whole_parameters(model, {one.path: one.name for one in chosen}, whole, new)
        super().__init__(model, trained_whole, found.manifest if isinstance(found, Adapter) else {})
        self.weights = {one.name: MaskedParameter(one) for one in chosen}
        _watch_optimizers()

    def entries(self) -> Iterator[TrainedEntries]:
        """The entries of each weight."""
        for name, one in self.weights.items():
            yield TrainedEntries(name, one.of.shape, one.of.indices, one.trained, one.base)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Paths and parameters for the optimizer."""
        for one in self.weights.values():
            yield one.of.path, one.of.parameter
        yield from self.whole_parameters()

    def _written(self) -> Iterable[MaskedParameter]:
        return self.weights.values()

    def _holders(self) -> Iterator[tuple[str, nn.Module]]:
        for one in self.weights.values():
            yield one.of.path, one.of.places[0][0]

    def detach(self, *, restore: bool = False) -> None:
        """End the training; see :meth:`shira_format.training.sparse.SparseParameters.detach`."""
        self.show_base() if restore else self.show_trained()
        for one in self.weights.values():
            one.remove()
        self._forget()


def attach(
    model: nn.Module,
    mask: Mask,
    *,
    whole: Sequence[str] = (),
    new: Sequence[str] = (),
    freeze: bool = True,
    prefix: str | None = None,
) -> MaskedGradients:
    """Train only the entries of ``mask``, whatever the trainer, the optimizer and the modules are.

    Dense gradients are computed and masked; :func:`shira_format.training.sparse.sparse_parameters` computes fewer. Attach before
    the optimizer's first step. Frozen entries keep the base's bits.

    Args:
        model: any module.
        mask: a mask file or any adapter (its indices), or a mapping from name to flat indices or booleans.
        whole: regexes; parameters that are trained whole, such as biases.
        new: regexes; parameters that are trained whole and that the base lacks, such as a new head.
        freeze: train nothing else.
        prefix: what the names in the model start with, if the mask's names fit in several ways.

    Raises:
        SourceError: the mask does not fit the model, or the model is under training already.
        BaseMismatch: a weight of another shape or of a dtype that cannot be trained.

    Example:
        >>> training = attach(model, "mask.st")
        >>> trainer.train()
        >>> training.save("adapter.st")
    """
    made = MaskedGradients(model, mask, whole, new, prefix)
    for _, parameter in made.whole_parameters():
        parameter.requires_grad_(True)
    if freeze:
        freeze_others(model, made.parameters())
    return made


_is_watching: list[Any] = []


def _watch_optimizers() -> None:
    if not _is_watching:
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        _is_watching.append(register_optimizer_step_pre_hook(_before_step))
        _is_watching.append(register_optimizer_step_post_hook(_after_step))


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> Any:
    mine = _stepped(optimizer)
    if not mine:
        return None
    if isinstance(optimizer, torch.optim.LBFGS):
        raise SourceError("LBFGS evaluates the model within a step, where masked parameters are not whole: use sparse_parameters")  # fmt: skip
    for one in mine:
        one.grow()  # if the last step failed half-way
    args, kwargs = _evaluated(args, kwargs)
    for one in mine:
        one.check_state(optimizer)
    for one in mine:
        one.shrink(optimizer)
    return args, kwargs


def _evaluated(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A closure is run now, while the parameters are whole; the optimizer gets its loss."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        return args, kwargs
    with torch.enable_grad():
        loss = closure()
    if "closure" in kwargs:
        return args, {**kwargs, "closure": lambda: loss}
    return (args[0], lambda: loss, *args[2:]), kwargs


def _after_step(optimizer: Any, *_: object) -> None:
    for one in _stepped(optimizer):
        one.grow()


def _stepped(optimizer: Any) -> list[MaskedParameter]:
    parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [one for one in list(_live) if id(one.of.parameter) in parameters]
