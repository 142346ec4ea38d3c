"""How the gradient reaches the entries under training: the modules' own forward passes, and backward passes of ours.

A module whose weight is under training becomes an instance of a subclass of its own class, in place. Its weight is then seen
as a tensor whose gradient is gathered at the entries and dropped, whatever the module does with it (convolutions, experts,
attention). For ``nn.Linear``, ``Conv1D`` of transformers and ``nn.Embedding`` no dense gradient is computed at all.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from shira_format.training.candidates import Candidates
from shira_format.training.pattern import MatrixPattern, gradient, gradient_at
from shira_format.training.sampling import multiplied
from shira_format.training.weight import SparseWeight, held_by, refresh


def switch_class(module: nn.Module) -> None:
    """Make ``module`` train the entries of its weights that :func:`held_by` has."""
    attributes = tuple(held_by(module))
    module.__class__ = _trained_class(type(module), attributes)  # type: ignore[arg-type]


def switch_back(module: nn.Module) -> None:
    """Undo :func:`switch_class`."""
    module.__class__ = type(module).__mro__[1]


def is_switched(module: nn.Module) -> bool:
    """Whether :func:`switch_class` was applied."""
    return getattr(type(module), "_shira_trained", False)


@cache
def _trained_class(original: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    body: dict[str, Any] = {attribute: _seen(attribute) for attribute in attributes}
    body |= {"_shira_trained": True, "__module__": original.__module__, "__reduce_ex__": _reduced}
    if attributes == ("weight",):
        if original is nn.Linear:
            body["forward"] = _linear
        elif original is nn.Embedding:
            body["forward"] = _embedding
        elif _is_conv1d(original):
            body["forward"] = _conv1d
    return type(f"Sparse{original.__name__}", (original,), body)


def _reduced(self: nn.Module, protocol: Any) -> Any:  # noqa: ARG001 - pickle's and copy's interface
    original = type(self).__mro__[1]
    return _rebuilt, (original, tuple(held_by(self))), self.__dict__


def _rebuilt(original: type[nn.Module], attributes: tuple[str, ...]) -> nn.Module:
    made = _trained_class(original, attributes)  # type: ignore[arg-type]
    return made.__new__(made)


def _is_conv1d(original: type[nn.Module]) -> bool:
    """Transformers' layer whose weight is ``[in, out]``."""
    return (original.__module__, original.__qualname__) == ("transformers.pytorch_utils", "Conv1D")


def _seen(attribute: str) -> property:
    """The weight as the module sees it: with a way back to the entries while gradients are recorded."""

    def read(self: nn.Module) -> Tensor | None:
        weight = self._parameters[attribute]
        held = held_by(self).get(attribute)
        if held is None or weight is None:
            return weight
        refresh(held)
        if not torch.is_grad_enabled():
            return weight
        return _applied(_Gathered, held, held.values(), weight)

    return property(read)


class _Gathered(torch.autograd.Function):
    """The weight; its gradient is gathered at the entries, and dropped."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor, pattern: MatrixPattern, candidates: Candidates | None
    ) -> Tensor:
        ctx.pattern, ctx.dtype, ctx.candidates = pattern, values.dtype, candidates
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _of_dense(ctx, grad), None, None, None


def _applied(function: Any, held: SparseWeight, *inputs: Any) -> Tensor:
    """A function of this module, whose last arguments are the entries and what takes dense gradients, if they are summed."""
    if held.candidates is None:
        found: Tensor = function.apply(*inputs, held.pattern, None)
        return found
    held.candidates.listen(held.parameter("values"))
    summed: Tensor = _uncompiled(function, *inputs, held.pattern, held.candidates)
    return summed


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(function: Any, *inputs: Any) -> Tensor:
    """The few steps whose gradients are summed are not compiled: sums are kept on the way."""
    found: Tensor = function.apply(*inputs)
    return found


def _of_dense(ctx: Any, dense: Tensor) -> Tensor:
    """The gradient at the entries of a dense one, which candidates see before it is dropped."""
    if ctx.candidates is not None:
        ctx.candidates.add(dense)
    return dense.reshape(-1).index_select(0, ctx.pattern.index_on(dense.device)).to(ctx.dtype)


def _of_product(ctx: Any, outer: Tensor, inner: Tensor) -> Tensor:
    """The gradient at the entries of ``outer^T inner``."""
    if ctx.candidates is not None:
        return _of_dense(ctx, multiplied(outer.t(), inner))
    if torch.compiler.is_compiling():
        return gradient_at(outer, inner, ctx.pattern).to(ctx.dtype)
    return gradient(outer, inner, ctx.pattern).to(ctx.dtype)


def _kept(ctx: Any, inner: Tensor) -> Tensor:
    """What of the inner factor the gradient needs: all of it, if candidates see the whole product."""
    return inner if ctx.candidates is not None else ctx.pattern.kept_inputs(inner)


def _autocast(x: Tensor) -> Tensor:
    """What autocast makes of an input, so that this is kept and not the wider one."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


class _Linear(torch.autograd.Function):
    """``x W^T + b``; kept are the weight and the inputs that the entries need."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, pattern: MatrixPattern, candidates: Candidates | None
    ) -> Tensor:  # fmt: skip
        ctx.pattern, ctx.dtype, ctx.candidates = pattern, values.dtype, candidates
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(_kept(ctx, _autocast(flat)) if ctx.needs_input_grad[1] else None, weight)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        dx = dvalues = dbias = None
        if ctx.needs_input_grad[0]:
            dx = multiplied(grad, weight.to(grad.dtype)).to(grad.dtype)
        flat = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            dvalues = _of_product(ctx, flat, kept.to(grad.dtype))
        if ctx.needs_input_grad[3]:
            dbias = flat.sum(0)
        return dx, dvalues, None, dbias, None, None


class _Conv1D(torch.autograd.Function):
    """``x W + b`` with the weight as ``[in, out]``; the outputs' gradient is what can be narrowed, and is not kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, weight: Tensor, bias: Tensor, pattern: MatrixPattern, candidates: Candidates | None
    ) -> Tensor:  # fmt: skip
        ctx.pattern, ctx.dtype, ctx.candidates = pattern, values.dtype, candidates
        needs = ctx.needs_input_grad[1]
        ctx.save_for_backward(_autocast(x.reshape(-1, x.shape[-1])) if needs else None, weight)
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dvalues = dbias = None
        if ctx.needs_input_grad[0]:
            dx = multiplied(grad, weight.to(grad.dtype).t()).to(grad.dtype)
        flat = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            dvalues = _of_product(ctx, x.to(grad.dtype), _kept(ctx, flat))
        if ctx.needs_input_grad[3]:
            dbias = flat.sum(0)
        return dx, dvalues, None, dbias, None, None


class _Embedding(torch.autograd.Function):
    """Rows of the weight; the gradient is summed over the tokens of a batch, never over the vocabulary."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, values: Tensor, weight: Tensor, padding: int | None, by_frequency: bool,
        pattern: MatrixPattern, candidates: Candidates | None,
    ) -> Tensor:  # fmt: skip
        ctx.pattern, ctx.dtype, ctx.candidates = pattern, values.dtype, candidates
        ctx.padding, ctx.by_frequency = padding, by_frequency
        ctx.save_for_backward(tokens)
        return functional.embedding(tokens, weight, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        if ctx.candidates is not None:
            padding = -1 if ctx.padding is None else ctx.padding
            wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
            dense = torch.ops.aten.embedding_dense_backward(
                wide, tokens, ctx.pattern.shape[0], padding, ctx.by_frequency
            )
            return None, _of_dense(ctx, dense), None, None, None, None, None
        found = _embedding_gradient(tokens, grad, ctx.pattern, ctx.padding, by_frequency=ctx.by_frequency)
        return None, found.to(ctx.dtype), None, None, None, None, None


def _embedding_gradient(
    tokens: Tensor, grad: Tensor, pattern: MatrixPattern, padding: int | None, *, by_frequency: bool
) -> Tensor:
    """``[K]`` in float32 or wider: for entry ``(i, j)`` the sum of ``grad[t, j]`` over the places ``t`` of token ``i``."""
    size, width = pattern.shape
    index = pattern.index_on(grad.device)
    row = index // width
    wide = torch.promote_types(grad.dtype, torch.float32)
    used, place, counts = tokens.reshape(-1).unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    sums = torch.zeros(len(used), width, dtype=wide, device=grad.device)
    sums.index_add_(0, place, grad.reshape(-1, width).to(wide))
    if by_frequency:
        sums /= counts[:, None]
    if padding is not None:
        sums.masked_fill_((used == padding % size)[:, None], 0)
    slot = torch.full((size,), -1, device=grad.device)
    slot[used] = torch.arange(len(used), device=grad.device)
    of = slot[row]
    hit = (of >= 0).nonzero().flatten()
    found = torch.zeros(len(index), dtype=wide, device=grad.device)
    found[hit] = sums[of[hit], (index % width)[hit]]
    return found


def _held(module: nn.Module) -> tuple[SparseWeight, Tensor]:
    held = held_by(module)["weight"]
    refresh(held)
    weight = module._parameters["weight"]  # noqa: SLF001 - the attribute is a property
    assert weight is not None
    return held, weight


def _linear(self: nn.Module, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
    """As ``nn.Linear``."""
    held, weight = _held(self)
    if not torch.is_grad_enabled():
        return functional.linear(input, weight, self.bias)  # type: ignore[arg-type]
    return _applied(_Linear, held, input, held.values(), weight, self.bias)


def _conv1d(self: nn.Module, x: Tensor) -> Tensor:
    """As transformers' ``Conv1D``."""
    held, weight = _held(self)
    if not torch.is_grad_enabled():
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), weight)  # type: ignore[arg-type]
        return flat.view(*x.shape[:-1], weight.shape[1])
    return _applied(_Conv1D, held, x, held.values(), weight, self.bias)


def _embedding(self: nn.Embedding, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
    """As ``nn.Embedding``."""
    held, weight = _held(self)
    if not torch.is_grad_enabled():
        return functional.embedding(input, weight, self.padding_idx)
    return _applied(_Embedding, held, input, held.values(), weight, self.padding_idx, self.scale_grad_by_freq)
