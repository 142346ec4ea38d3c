"""Adapted modules: linear layers, convolutions, embeddings and ``MultiheadAttention``, with DoRA or without.

PEFT's forward pass and its ``merge_and_unload`` agree on all of these, for one adapter, to rounding; what is wrong for
rslora, DoRA and biases is its ``add_weighted_adapter``, whose files look like any other and are read as PEFT loads them.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.lora.decomposed import Decomposed
from shira_format.lora.pairs import common_dtype, plain, scaled, transposed
from shira_format.lora.peft.config import CONFIG, Config
from shira_format.lora.peft.keys import PeftLayer
from shira_format.lora.peft.places import Places
from shira_format.lora.products import LowRank
from shira_format.lora.update import Update


class Modules:
    """All layers that wrap modules."""

    def __init__(self, places: Places, config: Config, layers: list[PeftLayer], where: object) -> None:
        self.places, self.base, self.config, self.layers, self.where = places, places.base, config, layers, where

    def update(self, layer: PeftLayer) -> Update:
        """The update of the layer's weight.

        Raises:
            SourceError: its tensors fit neither each other, nor the options, nor the base.
        """
        if layer.depth:
            raise SourceError(f"{self.where}: {layer.module!r} is wrapped more than once, and is no parameter")
        a, b = layer.pair(self.where)
        name = self.places.tensor(self.places.parameters(layer)[0])
        self._check_rank(layer, name, a, b)
        if layer.is_embedding:
            update, by_column = self._embedding(layer, name, a, b), True
        elif a.ndim == 2 and self._is_transposed(layer.module, name, (b.shape[0], a.shape[1])):
            update, by_column = self._plain(layer, name, a, b, turned=True), True
        else:
            update, by_column = self._plain(layer, name, a, b), False
        return self._decomposed(layer, update, by_column)

    def bias(self, layer: PeftLayer) -> tuple[str, Array] | None:
        """What is added to the layer's bias under ``lora_bias``."""
        bias = layer.parts.get("lora_B.bias")
        if bias is None:
            return None
        module = layer.module
        name = self.places.tensor(f"{module}.bias")
        if layer.is_embedding or self.places.is_attention(module) or self.config["use_dora"]:
            raise SourceError(
                f"{self.where}: {module!r} has a lora_bias, which PEFT does not know for such a layer"
            )
        if name not in self.base:
            raise SourceError(f"{self.where}: lora_bias for {module!r}, but the base has no {name!r}")
        if self.base.shape(name) != bias.shape:
            raise SourceError(f"{self.where}: {module}.lora_B.bias has shape {list(bias.shape)}, {name!r} {list(self.base.shape(name))}")  # fmt: skip
        return name, scaled(bias, self.scale(layer, twice=False), common_dtype(bias))

    def scale(self, layer: PeftLayer, *, twice: bool = True) -> float:
        """What ``B @ A`` is multiplied by."""
        if not self._of_attention(layer):
            return self.config.scales.scale(layer.module)
        # PEFT gives the output projection of a MultiheadAttention the rank and alpha of the whole. It merges that LoRA
        # into its weight twice, and as the forward pass works by merging, too, the model was trained with twice the
        # update (peft 0.14 to 0.21).
        return self.config.scales.scale(layer.parent) * (2 if twice else 1)

    def _of_attention(self, layer: PeftLayer) -> bool:
        return bool(layer.parent) and self.places.is_attention(layer.parent)

    def _check_rank(self, layer: PeftLayer, name: str, a: Array, b: Array) -> None:
        rank = self.config.scales.rank(layer.parent if self._of_attention(layer) else layer.module)
        if a.ndim < 2 or b.ndim != a.ndim:
            raise SourceError(f"{self.where}: {layer.module!r} is no layer that is known (lora_A has shape {list(a.shape)} and lora_B {list(b.shape)})")  # fmt: skip
        shape = self.base.shape(name)
        if (
            a.ndim > 2
            and len(shape) == a.ndim
            and a.shape[0] == rank
            and shape[1] * rank == a.shape[1] * b.shape[1]
            and shape[1] < a.shape[1]
        ):
            # Each group of outputs goes through its own part of B, but A reads the inputs of all groups.
            raise SourceError(
                f"{self.where}: {layer.module!r} is a convolution in {a.shape[1] // shape[1]} groups, and its LoRA reaches "
                "inputs of other groups: no change of its weight does that, and PEFT cannot merge it either"
            )
        if a.shape[0] != rank or b.shape[1] != rank:
            raise SourceError(
                f"{self.where}: {layer.module!r} should have rank {rank} by {CONFIG}, "
                f"lora_A has shape {list(a.shape)} and lora_B {list(b.shape)}"
            )

    def _plain(self, layer: PeftLayer, name: str, a: Array, b: Array, *, turned: bool = False) -> LowRank:
        shape = self.base.shape(name)
        where = f"{self.where}: {layer.module!r}"
        update = plain(name, shape[::-1] if turned else shape, b, a, self.scale(layer), where)
        return transposed(update, shape) if turned else update

    def _embedding(self, layer: PeftLayer, name: str, a: Array, b: Array) -> LowRank:
        """``(B @ A).T``: ``lora_embedding_A`` is ``[r, rows]``, ``lora_embedding_B`` is ``[columns, r]``."""
        shape, made = self.base.shape(name), (a.shape[1], b.shape[0])
        if shape != made:
            raise SourceError(
                f"{self.where}: {layer.module!r} updates a weight of shape {list(made)}, the base's {name!r} has {list(shape)}"
            )
        dtype = common_dtype(a, b)
        up = scaled(a.T, self.scale(layer), dtype)
        return LowRank(name, shape, np.ascontiguousarray(up), np.ascontiguousarray(b.T.astype(dtype)))

    def _decomposed(self, layer: PeftLayer, update: LowRank, by_column: bool) -> Update:
        """DoRA: a norm for each output of a linear layer or a convolution, and for each column of an embedding.

        PEFT takes the norm of the base's weight and the scaled update together, as they are now, not as they were in
        training; in the base's precision, where here it is float32 at least.
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

        PEFT decides by the layer's class and corrects ``fan_in_fan_out`` by it; here the shape decides, and the
        option where the weight is square.
        """
        shape = self.base.shape(name)
        if shape == update == update[::-1]:
            stored = bool(self.config["fan_in_fan_out"])
            # PEFT leaves the option as the last adapted layer set it, so other layers can prove it wrong.
            if (not stored) in self._orientations:
                raise SourceError(
                    f"{self.where}: {module!r} updates a square weight, and other layers are not stored as "
                    f"fan_in_fan_out={stored} says (Conv1D or Linear): nothing tells how this one is"
                )
            return stored
        return shape != update and shape == update[::-1]

    @cached_property
    def _orientations(self) -> set[bool]:
        """Which ways of storing weights this LoRA and its base surely have: ``[out, in]`` (False), ``[in, out]`` (True).

        A layer that is not square tells by its shape, or, where it is not adapted, by the length of its bias.
        """
        found = set()
        for layer in self.layers:
            a, b = layer.parts.get("lora_A.weight"), layer.parts.get("lora_B.weight")
            if a is not None and b is not None and a.ndim == b.ndim == 2:
                update = (b.shape[0], a.shape[1])
                shape = self.base.shape(self.places.tensor(self.places.parameters(layer)[0]))
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
