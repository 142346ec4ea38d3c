"""What a rule is: it scores the entries of a weight, or it places them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from shira_format._core.arrays import Array, Indices
from shira_format.masks.scores import Scores
from shira_format.masks.weights import Weight

# Of a weight's name, what reads elements start to stop of its flat gradient, [stop - start] float32.
Gradients = Callable[[str], Callable[[int, int], Array]]


class Rule:
    """A rule by which a mask is chosen; a subclass has :meth:`scores` or :meth:`indices`.

    Attributes:
        name: as in the registry and the manifest.
        gradients: what it needs: ``""``, ``"sum"`` (of the batches' gradients) or ``"squares"`` (the sum of their squares).
        scope: the scope that the rule has by itself; None: any.
    """

    name: ClassVar[str] = ""
    gradients: ClassVar[str] = ""
    scope: ClassVar[str | None] = None

    @property
    def notes(self) -> dict[str, Any]:
        """Its settings, for the manifest's ``mask``."""
        return {}


class ScoredRule(Rule, ABC):
    """A rule that takes the entries of the best scores."""

    @abstractmethod
    def scores(self, weight: Weight, gradients: Gradients | None) -> Scores:
        """The scores of a weight's entries; ``gradients`` is there if the rule needs it."""


class PlacedRule(Rule, ABC):
    """A rule that says where the entries are, whatever the weight holds."""

    @abstractmethod
    def indices(self, weight: Weight, count: int) -> Indices:
        """Flat positions, int64, strictly increasing; at most ``count``.

        Raises:
            SourceError: the weight is too small for the rule.
        """
