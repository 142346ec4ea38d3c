"""Scores that the caller has, and products of gradients with an update that the caller has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from shira_format._core.arrays import Array, as_array
from shira_format._core.dtypes import working_dtype
from shira_format.errors import SourceError
from shira_format.masks.base import Gradients, ScoredRule
from shira_format.masks.last import LastOne
from shira_format.masks.scores import Scores
from shira_format.masks.weights import Weight

# A tensor for each weight's name, numpy or torch, of the weight's shape; a function is called anew for each reading of it.
Tensors = Mapping[str, Any] | Callable[[str], Any]


@dataclass(frozen=True)
class Given(ScoredRule):
    """Scores of your own.

    Attributes:
        tensors: for each weight's name a tensor of its shape, numpy or torch, of numbers of at least 0: a mapping, or a
            function that is called with the name.
        label: the rule's name in the mask file.
    """

    name: ClassVar[str] = "given"
    tensors: Tensors
    label: str = "given"
    _kept: LastOne[Array] = field(default_factory=LastOne, compare=False, repr=False)

    @property
    def notes(self) -> dict[str, Any]:
        """The label, in place of the name."""
        return {"rule": self.label}

    def scores(self, weight: Weight, gradients: Gradients | None) -> Scores:
        """The scores in float32, or in float64 if they are."""

        def found() -> Array:
            return self._kept.get(weight, lambda: flat_tensor(self.tensors, weight, "score"))

        def fill(start: int, stop: int, out: Array) -> None:
            out[:] = found()[start:stop]

        return Scores(weight, fill, working_dtype(found().dtype))


@dataclass(frozen=True)
class GradUpdate(ScoredRule):
    """``|g d|``: how much of the change of the loss, to first order, an entry of the update ``d`` makes.

    For an adapter that keeps the effect of an update, with the scope ``"global"``: entries of different weights compare.

    Attributes:
        updates: for each weight's name a tensor of its shape, numpy or torch: a mapping, or a function that is called with the name.
    """

    name: ClassVar[str] = "grad-update"
    gradients: ClassVar[str] = "sum"
    updates: Tensors
    _kept: LastOne[Array] = field(default_factory=LastOne, compare=False, repr=False)

    def scores(self, weight: Weight, gradients: Gradients | None) -> Scores:
        """``|g d|`` in float32."""
        assert gradients is not None
        gradient = gradients(weight.name)

        def fill(start: int, stop: int, out: Array) -> None:
            update = self._kept.get(weight, lambda: flat_tensor(self.updates, weight, "update"))
            np.multiply(gradient(start, stop), update[start:stop].astype(out.dtype), out=out)
            np.abs(out, out=out)

        return Scores(weight, fill)


def flat_tensor(tensors: Tensors, weight: Weight, what: str) -> Array:
    """The tensor of one weight, flat.

    Raises:
        SourceError: there is none, or it has another shape.
    """
    found = tensors(weight.name) if callable(tensors) else tensors.get(weight.name)
    if found is None:
        raise SourceError(f"tensor {weight.name!r}: no {what} is given for it; leave the tensor out, or give one")
    array = as_array(found)
    if array.shape != weight.shape:
        raise SourceError(
            f"tensor {weight.name!r}: has the shape {list(weight.shape)}, the {what} {list(array.shape)}"
        )
    return array.reshape(-1)
