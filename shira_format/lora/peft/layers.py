"""Adapted modules: linear layers, convolutions, embeddings and ``MultiheadAttention``, with DoRA or without.

For one adapter, PEFT's forward pass and ``merge_and_unload`` agree on all of these up to rounding. ``add_weighted_adapter``
is wrong for rslora, DoRA and biases; its files look like any other, and are read as PEFT loads them.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.lora.base import Update
from shira_format.lora.decomposed import Decomposed
from shira_format.lora.peft.base_names import BaseNames, PeftLayer
from shira_format.lora.peft.config import MERGE_FIRST, Config
from shira_format.lora.peft.resized import is_resized
from shira_format.lora.products import LowRank, common_dtype, low_rank, scale_factor, transposed


class ModuleLayers:
    """All layers that wrap modules."""

    def __init__(self, names: BaseNames, config: Config, layers: list[PeftLayer], where: object) -> None:
        self.names, self.base, self.config, self.layers, self.where = names, names.base, config, layers, where

    def update(self, layer: PeftLayer) -> Update:
        """The update of the layer's weight.

        Raises:
            SourceError: its tensors fit neither each other, nor the options, nor the base.
        """
        if layer.depth:
            raise SourceError(f"{self.where}: {layer.module!r} is wrapped several times, and is no parameter")
        a, b = layer.pair(self.where)
        name = self.names.tensor(self.names.parameters(layer)[0])
        self._check_rank(layer, name, a, b)
        if layer.is_embedding:
            update, by_column = self._embedding(layer, name, a, b), True
        elif a.ndim == 2 and self._is_transposed(layer.module, name, (b.shape[0], a.shape[1])):
            update, by_column = self._matrix(layer, name, a, b, is_transposed=True), True
        else:
            update, by_column = self._matrix(layer, name, a, b), False
        return self._decomposed(layer, update, by_column)

    def bias(self, layer: PeftLayer) -> tuple[str, Array] | None:
        """The name of the layer's bias and what ``lora_bias`` adds to it, or None if it adds nothing."""
        bias = layer.parts.get("lora_B.bias")
        module = layer.module
        if bias is None:
            if self.config["lora_bias"] and not layer.is_embedding:
                raise SourceError(f"{self.where}: {module!r} has no lora_B.bias, and lora_bias is set")
            return None
        name = self.names.tensor(f"{module}.bias")
        if layer.is_embedding or self.names.is_attention(module) or self.config["use_dora"]:
            raise SourceError(
                f"{self.where}: {module!r} has a lora_bias, which PEFT does not support for such a layer"
            )
        if name not in self.base:
            raise SourceError(f"{self.where}: lora_bias for {module!r}, but the base has no {name!r}")
        if self.base.shape(name) != bias.shape:
            raise SourceError(f"{self.where}: {module}.lora_B.bias has shape {list(bias.shape)}, {name!r} {list(self.base.shape(name))}")  # fmt: skip
        return name, scale_factor(bias, self.scale(layer, twice=False), common_dtype(bias))

    def scale(self, layer: PeftLayer, *, twice: bool = True) -> float:
        """The factor of ``B @ A``."""
        if not self._of_attention(layer):
            return self.config.scales.scale(layer.module)
        # PEFT gives the output projection of a MultiheadAttention the rank and alpha of the attention, and merges its LoRA
        # into the weight twice. The forward pass merges, too, so training had twice the update (peft 0.14 to 0.21).
        return self.config.scales.scale(layer.parent) * (2 if twice else 1)

    def _of_attention(self, layer: PeftLayer) -> bool:
        return bool(layer.parent) and self.names.is_attention(layer.parent)

    def _check_rank(self, layer: PeftLayer, name: str, a: Array, b: Array) -> None:
        rank = self.config.scales.rank(layer.parent if self._of_attention(layer) else layer.module)
        if a.ndim < 2 or b.ndim != a.ndim:
            raise SourceError(f"{self.where}: {layer.module!r} is of no known layer type (lora_A has shape {list(a.shape)} and lora_B {list(b.shape)})")  # fmt: skip
        shape = self.base.shape(name)
        if (
            a.ndim > 2
            and len(shape) == a.ndim
            and a.shape[0] == rank
            and shape[1] * rank == a.shape[1] * b.shape[1]
            and shape[1] < a.shape[1]
        ):
            # Each group of outputs has its own part of B, but A reads the inputs of all groups.
            raise SourceError(
                f"{self.where}: {layer.module!r} is a convolution in {a.shape[1] // shape[1]} groups, and its LoRA reads "
                "inputs of other groups: no change of its weight can do that, and PEFT cannot merge it either"
            )
        if a.shape[0] != rank or b.shape[1] != rank:
            raise SourceError(
                f"{self.where}: {layer.module!r} should have rank {rank} by {self.config.stated_by}, "
                f"lora_A has shape {list(a.shape)} and lora_B {list(b.shape)}"
            )

    def _matrix(self, layer: PeftLayer, name: str, a: Array, b: Array, *, is_transposed: bool = False) -> LowRank:
        shape = self.base.shape(name)
        where = f"{self.where}: {layer.module!r}"
        if is_resized(name, shape, (b.shape[0], *a.shape[1:])):
            raise self._of_resized(layer, (b.shape[0], a.shape[1]), name)
        update = low_rank(name, shape[::-1] if is_transposed else shape, b, a, self.scale(layer), where)
        return transposed(update, shape) if is_transposed else update

    def _embedding(self, layer: PeftLayer, name: str, a: Array, b: Array) -> LowRank:
        """``(B @ A).T``: ``lora_embedding_A`` is ``[r, rows]``, ``lora_embedding_B`` is ``[columns, r]``."""
        shape, made = self.base.shape(name), (a.shape[1], b.shape[0])
        if is_resized(name, shape, made):
            raise self._of_resized(layer, made, name)
        if shape != made:
            raise SourceError(
                f"{self.where}: {layer.module!r} updates a weight of shape {list(made)}, the base's {name!r} has {list(shape)}"
            )
        dtype = common_dtype(a, b)
        up = scale_factor(a.T, self.scale(layer), dtype)
        return LowRank(name, shape, np.ascontiguousarray(up), np.ascontiguousarray(b.T.astype(dtype)))

    def _of_resized(self, layer: PeftLayer, made: tuple[int, ...], name: str) -> SourceError:
        return SourceError(
            f"{self.where}: {layer.module!r} updates a weight of shape {list(made)}, the base's {name!r} has "
            f"{list(self.base.shape(name))} (a resized vocabulary): {MERGE_FIRST}"
        )

    def _decomposed(self, layer: PeftLayer, update: LowRank, by_column: bool) -> Update:
        """DoRA: a norm for each output of a linear layer or a convolution, and for each column of an embedding.

        Like PEFT, the norm is that of the given base's weight plus the scaled update, not the norm in training; it is
        computed in float32 at least, where PEFT uses the base's precision.
        """
        magnitude = layer.parts.get("lora_magnitude_vector")
        if magnitude is None:
            if self.config["use_dora"]:
                raise SourceError(
                    f"{self.where}: {layer.module!r} has no lora_magnitude_vector, and use_dora is set"
                )
            return update
        norms = update.columns if by_column else update.up.shape[0]
        # A convolution has it as [1, out, 1, ...].
        if magnitude.size != norms or max(magnitude.shape, default=1) != norms:
            raise SourceError(f"{self.where}: {layer.module}.lora_magnitude_vector has shape {list(magnitude.shape)}, not one number for each of {norms}")  # fmt: skip
        wide = magnitude.reshape(-1).astype(common_dtype(magnitude, update.up))
        return Decomposed(update, self.base, wide, by_column=by_column)

    def _is_transposed(self, module: str, name: str, update: tuple[int, int]) -> bool:
        """Whether the base stores the weight as ``[in, out]`` (transformers' ``Conv1D``).

        PEFT decides by the layer's class and corrects ``fan_in_fan_out`` accordingly; here the shape decides, or for
        square weights the option.
        """
        shape = self.base.shape(name)
        if shape == update == update[::-1]:
            stored = bool(self.config["fan_in_fan_out"])
            # PEFT saves the option as corrected for the last adapted layer, so other layers may contradict it. A model with
            # Conv1D has layers that show it, since these have biases; none in a model of linear layers need.
            if (not stored) in self._orientations or (stored and True not in self._orientations):
                raise SourceError(
                    f"{self.where}: {module!r} updates a square weight, and other layers "
                    f"{'contradict' if (not stored) in self._orientations else 'do not show'} fan_in_fan_out={stored} "
                    "(Conv1D or Linear): how this one is stored is unknown"
                )
            return stored
        return shape != update and shape == update[::-1]

    @cached_property
    def _orientations(self) -> set[bool]:
        """The layouts that some weights certainly have: ``[out, in]`` (False), ``[in, out]`` (True).

        Shown by the shape of weights that are not square or, if they are not adapted, by the length of their bias.
        """
        found = set()
        for layer in self.layers:
            a, b = layer.parts.get("lora_A.weight"), layer.parts.get("lora_B.weight")
            if a is not None and b is not None and a.ndim == b.ndim == 2:
                update = (b.shape[0], a.shape[1])
                shape = self.base.shape(self.names.tensor(self.names.parameters(layer)[0]))
                if update != update[::-1] and shape in (update, update[::-1]):
                    found.add(shape != update)
        for name in self.base:
            shape, bias = self.base.shape(name), f"{name.removesuffix('weight')}bias"
            if (
                len(shape) == 2
                and shape[0] != shape[1]
                and bias in self.base
                and self.base.shape(bias) == shape[1:]
            ):
                found.add(True)
        return found
