"""Masks for PEFT's SHiRA: ``ShiraConfig.mask_fn``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from shira_format._core.arrays import Indices
from shira_format._core.threads import Workers
from shira_format.errors import SourceError
from shira_format.masks.base import Rule
from shira_format.masks.gradients import Loss, SummedGradients, sum_gradients
from shira_format.masks.plan import MaskPlan
from shira_format.masks.rand import Rand
from shira_format.masks.registry import rule_of
from shira_format.masks.size import Size
from shira_format.masks.struct import Struct
from shira_format.masks.weights import Weight, weight_of_layer, weights_of_model
from shira_format.tensors import SparseTensor

MaskFunction = Callable[..., Any]


def peft_mask_fn(
    rule: str | Rule | Mapping[str, SparseTensor] = "wm",
    *,
    model: Any = None,
    seed: int = 0,
    scope: str = "tensor",
    runs: int = 1,
    band: int = 0,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    at_once: int | None = None,
) -> MaskFunction:
    """A ``mask_fn`` for PEFT's ``ShiraConfig``, by any rule, or of a mask that is made already.

    PEFT asks for exactly ``r (m + n)`` entries of each weight, so the global scope is refused, and a mask that is made already has
    to have that many. ``Struct`` is made exact by the first entries that are left.

    Args:
        rule: see :func:`shira_format.masks.make_mask`; or a mask, such as ``shira.load("mask.st")``, under the model's names.
        model: the model before ``get_peft_model``, for its layers' names: needed for a mask, for ``rand`` (whose entries differ by
            name) and for gradients.
        seed: of the rule ``rand``.
        scope: ``"tensor"`` or ``"row"``; with the latter ``r (m + n)`` has to be a multiple of the number of rows.
        runs: see :func:`make_mask`; ``r (m + n)`` has to be a multiple of it.
        band: see :func:`make_mask`.
        batches: for gradients, which are computed when the first layer asks.
        loss: likewise.
        at_once: likewise.

    Raises:
        ValueError: arguments that cannot be meant.

    Example:
        >>> config = ShiraConfig(r=8, mask_type="wm", target_modules=["q_proj", "v_proj"])
        >>> config.mask_fn = peft_mask_fn("wm")
        >>> model = get_peft_model(model, config)
    """
    if scope == "global":
        raise ValueError(
            "PEFT's SHiRA gives each weight r (m + n) entries: the scope 'global' has no meaning with it"
        )
    layers = None if model is None else {id(module): name for name, module in model.named_modules()}
    if isinstance(rule, Mapping):
        if layers is None:
            raise ValueError("a mask is made for weights by name: give the model")
        return _Made(rule, layers).mask
    chosen = rule_of(rule, seed)
    if layers is None and (chosen.gradients or isinstance(chosen, Rand)):
        raise ValueError(f"the rule {chosen.name!r} goes by the layers' names: give the model")
    if chosen.gradients and (batches is None or loss is None):
        raise ValueError(f"the rule {chosen.name!r} needs gradients: give batches and a loss")
    if isinstance(chosen, Struct):
        chosen = replace(chosen, exact=True)
    MaskPlan(chosen, Size(scope=scope), runs, band)  # whose arguments are checked now
    return _Chosen(chosen, scope, runs, band, layers or {}, _Lazy(model, batches, loss, at_once, chosen)).mask


class _Lazy:
    """Gradients that are computed when a layer first needs them: the model may still be moved before that."""

    def __init__(self, model: Any, batches: Any, loss: Any, at_once: int | None, rule: Rule) -> None:
        self._given = model, batches, loss, at_once, rule
        self._found: SummedGradients | None = None
        # The model's own layers are wrapped one by one while PEFT asks, so the weights are found before.
        self._weights = weights_of_model(model) if rule.gradients else []

    def of(self, name: str) -> SummedGradients | None:
        model, batches, loss, at_once, rule = self._given
        if not rule.gradients:
            return None
        if self._found is None:
            squares = rule.gradients == "squares"
            self._found = sum_gradients(model, self._weights, batches, loss, squares=squares, at_once=at_once)
            weakref.finalize(self, self._found.close)
        if name in self._found.unreached:
            raise SourceError(f"tensor {name!r}: the loss does not depend on it")
        return self._found


class _Chosen:
    """Masks that a rule chooses."""

    def __init__(
        self, rule: Rule, scope: str, runs: int, band: int, layers: Mapping[int, str], gradients: _Lazy
    ) -> None:
        self._rule, self._scope, self._runs, self._band = rule, scope, runs, band
        self._layers, self._gradients = layers, gradients

    def mask(self, base_layer: Any, r: int, **_kwargs: Any) -> Any:
        """PEFT's ``mask_fn``: ones and zeros in the shape, dtype and device of the layer's weight."""
        weight = _weight(base_layer, self._layers)
        plan = MaskPlan(self._rule, Size(rank=r, scope=self._scope), self._runs, self._band)
        with Workers() as workers:
            ((_, indices),) = plan.masks([weight], self._gradients.of(weight.name), workers)
        return _dense(weight, indices, r)


class _Made:
    """Masks that are made already."""

    def __init__(self, masks: Mapping[str, SparseTensor], layers: Mapping[int, str]) -> None:
        self._masks, self._layers = masks, layers

    def mask(self, base_layer: Any, r: int, **_kwargs: Any) -> Any:
        """PEFT's ``mask_fn``; see :meth:`_Chosen.mask`."""
        weight = _weight(base_layer, self._layers)
        if weight.name not in self._masks:
            raise SourceError(f"tensor {weight.name!r}: is not in the mask; PEFT's target_modules name its layer")
        tensor = self._masks[weight.name]
        if tensor.shape != weight.shape:
            raise SourceError(
                f"tensor {weight.name!r}: has the shape {list(weight.shape)}, in the mask {list(tensor.shape)}"
            )
        return _dense(weight, tensor.indices, r)


def _weight(layer: Any, layers: Mapping[int, str]) -> Weight:
    name = layers.get(id(layer))
    if layers and name is None:
        raise SourceError(
            f"PEFT asks for a mask of a {type(layer).__name__} that is not in the model that was given"
        )
    return weight_of_layer("weight" if name is None else f"{name}.weight", layer)


def _dense(weight: Weight, indices: Indices, r: int) -> Any:
    import torch

    wanted = weight.lora_size(r)
    if indices.size != wanted:
        raise SourceError(
            f"tensor {weight.name!r}: the mask has {indices.size} entries, and PEFT asks for r (m + n) = {wanted} with r = {r}"
        )
    like = weight.parameter
    mask = torch.zeros(like.numel(), dtype=like.dtype, device=like.device)
    mask[torch.from_numpy(indices.copy()).to(like.device)] = 1  # those of a file cannot be written to
    return mask.reshape(like.shape)
