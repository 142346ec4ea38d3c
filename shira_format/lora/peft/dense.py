"""Tensors that are saved whole: of ``modules_to_save``, biases, and copies of the base's embeddings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.dtypes import is_float
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.peft.base_names import BaseNames, PeftLayer
from shira_format.lora.peft.config import MERGE_FIRST, Config
from shira_format.lora.peft.resized import EMBEDDINGS, HEAD, is_resized, resized_notices
from shira_format.lora.peft.stated import base_config

# The embeddings of T5, BART and their like, which encoder and decoder share whatever config.json says of the head.
_SHARED = re.compile(r"(?:.*\.)?shared\.weight")
_UNTIE = "untie them first (a base that has the head's weight, and tie_word_embeddings false in its config.json)"


class DenseReplacements:
    """Whole tensors that replace the base's, or are new to it.

    Attributes:
        equal: names of copies of the base's tensors; complete after :meth:`found`.
        notices: what a user should know; likewise.
    """

    def __init__(
        self,
        plain: Mapping[str, Array],
        layers: set[str],
        rows: set[str],
        names: BaseNames,
        config: Config,
        where: object,
    ) -> None:
        """Args: ``layers`` and ``rows``: names, in the model, of weights with a LoRA, and of weights with trained rows."""
        self.plain, self.layers, self.rows, self.names, self.config, self.where = (
            plain, layers, rows, names, config, where
        )  # fmt: skip
        self.base = names.base
        self.equal: list[str] = []
        self.notices: list[str] = []

    def found(self) -> dict[str, Array]:
        """The tensors by their names in the base.

        Raises:
            SourceError: a tensor is neither in the base nor in ``modules_to_save``, or does not fit.
        """
        found = {}
        for name, array in self.plain.items():
            target = self.names.tensor(name)
            if name in self.layers or name in self.rows:
                self._check_own_base(name, array, target)
                self.equal.append(name)
            elif self._is_copy(name, array, target):
                self.equal.append(name)
            else:
                found[target if target in self.base else name] = self._checked(name, array, target)
        self.notices += resized_notices(found, self.base, self.where)
        self._check_tied(found)
        return found

    def _check_own_base(self, name: str, array: Array, target: str) -> None:
        """PEFT also saves the weight below an adapted embedding or ``lm_head``: it must equal the base's."""
        if not self._equal(array, target):
            raise SourceError(
                f"{self.where}: {name!r} lies below its LoRA and is not the base's {target!r} (resized or trained): "
                f"{MERGE_FIRST}"
            )

    def _is_copy(self, name: str, array: Array, target: str) -> bool:
        """Whether it only repeats a tensor of the base (``save_embedding_layers``), or embeddings that a head is tied to."""
        if target not in self.base and HEAD.fullmatch(name):
            saved = [other for other in self.plain if EMBEDDINGS.fullmatch(other)]
            if any(np.array_equal(array, self.plain[other]) for other in saved):
                return True
            return any(self._equal(array, other) for other in self.base if EMBEDDINGS.fullmatch(other))
        return not self._is_saved(name) and self._equal(array, target)

    def _equal(self, array: Array, target: str) -> bool:
        """Whether it is the base's tensor, up to the rounding of ``array``'s dtype."""
        if target not in self.base or self.base.shape(target) != array.shape:
            return False
        weight = self.base[target]
        with np.errstate(over="ignore"):
            return is_float(weight.dtype) and np.array_equal(weight.astype(array.dtype), array)

    def _is_saved(self, name: str) -> bool:
        return any(re.search(rf"(^|\.){re.escape(module)}\.", name) for module in self.config.saved)

    def _checked(self, name: str, array: Array, target: str) -> Array:
        if target not in self.base:
            if not self._is_saved(name):
                raise SourceError(
                    f"{self.where}: unmatched key {name!r}: neither in the base nor in modules_to_save"
                )
        elif self.base.shape(target) != array.shape and not is_resized(
            target, self.base.shape(target), array.shape
        ):
            raise SourceError(
                f"{self.where}: {name!r} has shape {list(array.shape)}, "
                f"the base's {target!r} has {list(self.base.shape(target))}: {MERGE_FIRST}"
            )
        if target in self.names.base.locations:
            raise SourceError(
                f"{self.where}: {name!r} is saved whole, and is rows of the base's {self.names.base.locations[target].blocks[0].name!r}: "
                f"{MERGE_FIRST}"
            )
        return array

    def _check_tied(self, found: Mapping[str, Array]) -> None:
        """Refuse, or notify of, changed embeddings to which the base ties its head.

        Merged models and our results change the head, too. PEFT's model does not, unless ``ensure_weight_tying`` is set:
        there a LoRA or a copy of the embeddings changes the input only. Trained rows are tied wherever the weights are.
        """
        new_heads = [name for name in found if HEAD.fullmatch(name) and name not in self.base]
        for head in new_heads:
            self.notices.append(
                f"tensor {head!r} is new: if the base's model ties its head to its embeddings, set tie_word_embeddings to false "
                "in config.json of the result"
            )
        # PEFT also saves the embeddings of a resized vocabulary as the model has them, tied or not.
        trained = (
            n for n in found if n not in self.base or found[n].shape == self.base.shape(n) or self._is_saved(n)
        )
        changed = sorted(name for name in (*self.layers, *trained) if self._is_vocabulary(name))
        has_head = new_heads or any(HEAD.fullmatch(name) for name in self.base)
        if shared := next(filter(_SHARED.fullmatch, changed), None):
            raise SourceError(
                f"{self.where}: changes {shared!r}, which the encoder's and the decoder's embeddings share: PEFT's model does not change "
                f"all of these, and its merged model does; if that is wanted, {MERGE_FIRST}"
            )
        if self.config["ensure_weight_tying"] or not changed or (has_head and not self._tied):
            return
        if self._tied:
            raise SourceError(
                f"{self.where}: changes {changed[0]!r}, to which the base's head is tied: PEFT changes the input "
                f"embeddings alone, and merges both. To keep the head, {_UNTIE}; or train with ensure_weight_tying"
            )
        self.notices.append(
            f"{changed[0]!r} changes: if the base's model ties its head to it, the head changes as well, as when PEFT merges "
            f"the LoRA; in PEFT's own model it does not. To keep the head, {_UNTIE}"
        )

    def _is_vocabulary(self, name: str) -> bool:
        """Whether a tensor is the embeddings of the vocabulary, by its name or by as many rows as ``config.json`` says."""
        target = self.names.tensor(name)
        if EMBEDDINGS.fullmatch(name) or target not in self.base or HEAD.fullmatch(name):
            return EMBEDDINGS.fullmatch(name) is not None
        shape = self.base.shape(target)
        return self._tied and len(shape) == 2 and shape[0] == base_config(self.base).get("vocab_size")

    @cached_property
    def _tied(self) -> bool:
        """Whether the base's ``config.json`` ties head and embeddings."""
        return is_tied(self.base)


def is_tied(base: Checkpoint) -> bool:
    """Whether ``config.json`` in the base's folder ties head and embeddings; False if it is missing or unreadable."""
    return base_config(base).get("tie_word_embeddings") is True


def drop_tied_head(layers: list[PeftLayer], base: Checkpoint, config: Config, where: object) -> list[PeftLayer]:
    """The layers without the LoRA of a head that the base lacks, if it repeats that of the embeddings.

    Under ``ensure_weight_tying`` PEFT gives a tied head the embeddings' factors, swapped, and saves both. The base
    stores the weight once, so it is changed once, as in the forward pass. PEFT's merge adds the update twice.

    Raises:
        SourceError: the head has a LoRA of its own.
    """
    if any(HEAD.fullmatch(name) for name in base):
        return layers
    embeddings = [
        layer for layer in layers if layer.is_embedding and EMBEDDINGS.fullmatch(f"{layer.module}.weight")
    ]
    kept = []
    for layer in layers:
        if not HEAD.fullmatch(f"{layer.module}.weight"):
            kept.append(layer)
        elif not any(_is_transposed(layer, other, config, where) for other in embeddings):
            raise SourceError(
                f"{where}: {layer.module!r} has a LoRA of its own, and the base has no weight of it: if its head is tied "
                f"to its embeddings, {_UNTIE}"
            )
    return kept


def _is_transposed(head: PeftLayer, embedding: PeftLayer, config: Config, where: object) -> bool:
    (a, b), (rows, columns) = head.pair(where), embedding.pair(where)
    return (
        a.shape == columns.shape[::-1]
        and b.shape == rows.shape[::-1]
        and np.array_equal(a, columns.T)
        and np.array_equal(b, rows.T)
        and config.scales.scale(head.module) == config.scales.scale(embedding.module)
        and head.parts.keys() == {"lora_A.weight", "lora_B.weight"}
        and embedding.parts.keys() == {"lora_embedding_A", "lora_embedding_B"}
    )
