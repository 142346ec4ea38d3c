"""Whether the stored values change the base by what the update asked for.

Where an update is much smaller than the steps of a weight's dtype, rounding gives the base's own values back. That is rare for
the base that an update was made for, and the rule for a wrong one: codes without their scales, another checkpoint, a wrong alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shira_format.errors import SourceError

LEAST = 1e-3  # of the norm that was asked for
_SHARE = 0.01  # of the energy of all, from which on lost tensors count; as in shira_analysis.merging.check
_NAMED = 3


@dataclass(frozen=True)
class Effect:
    """What was selected of the update of one tensor, and what the stored values change; sums of squares.

    Attributes:
        name: the tensor.
        asked: of the selected entries of the update.
        moved: of the differences between the stored values and the base's.
    """

    name: str
    asked: float
    moved: float

    @property
    def is_lost(self) -> bool:
        """Whether less than a thousandth of the norm is left; not for an update of zeros."""
        return self.moved < LEAST**2 * self.asked

    def __str__(self) -> str:
        return f"{self.name!r} ({_norm(self.moved)} of {_norm(self.asked)})"


def lost(effects: Sequence[Effect]) -> list[Effect]:
    """The tensors whose change rounding takes away."""
    return [effect for effect in effects if effect.is_lost]


def words(effects: Sequence[Effect]) -> str:
    """The first lost tensors with both norms, and how many there are."""
    text = ", ".join(map(str, effects[:_NAMED]))
    return text if len(effects) <= _NAMED else f"{text}, ... ({len(effects)} tensors)"


def refuse_lost(effects: Sequence[Effect]) -> None:
    """Refuse an adapter that does not change the base as its source asks for.

    Raises:
        SourceError: all stored values together, or those of tensors with at least 1 % of the selected energy, change the base by
            less than a thousandth of the norm of the selected update.
    """
    whole = Effect("", *(math.fsum(getattr(effect, key) for effect in effects) for key in ("asked", "moved")))
    found = lost(effects)
    is_much = bool(found) and math.fsum(effect.asked for effect in found) >= _SHARE * whole.asked
    if not is_much and not whole.is_lost:
        return
    raise SourceError(
        f"the stored values would change the base by less than a thousandth of what the update asks for: {words(found or effects)} "
        f"(norms; of all tensors {_norm(whole.moved)} of {_norm(whole.asked)}): rounded to the base's dtype, base + update is the "
        "base. Check that it is the base that the source was made for, with plain weights and not codes of a quantisation; leave the "
        "tensors out (--exclude), or write it anyway (--force)"
    )


def _norm(energy: float) -> str:
    return f"{math.sqrt(energy):.3g}" if math.isfinite(energy) else str(energy)
