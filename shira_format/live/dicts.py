"""Applying an adapter to weights held as a dictionary, and taking it off again bit for bit."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from shira_format.adapter import Adapter
from shira_format.live.switcher import Switcher


class Applied:
    """An adapter that lies on weights; :meth:`revert` restores what was there."""

    def __init__(self, switcher: Switcher) -> None:
        self._switcher = switcher

    def revert(self) -> None:
        """Restore the bits that were there before; a second call does nothing."""
        self._switcher.revert()


def apply(
    adapter: Adapter,
    weights: MutableMapping[str, Any],
    alpha: float | None = None,
    *,
    rename: Callable[[str], str] = lambda name: name,
) -> Applied:
    """Apply ``adapter`` in place to weights held as a dictionary, after everything has been checked.

    For arrays without a framework, and for once; a :class:`Switcher` takes the same dictionaries.

    Args:
        adapter: the adapter.
        weights: numpy arrays, or torch tensors, by name; ``model.state_dict()`` for example. Tensors that are new to the
            base are added.
        alpha: strength; the adapter's own by default.
        rename: from a name in the adapter to one in ``weights``.

    Returns:
        A handle whose ``revert`` takes the adapter off again.

    Raises:
        BaseMismatch: ``weights`` are not the base of this adapter; none was changed.
        FormatError: the adapter's file is damaged; none was changed.

    Example:
        >>> applied = apply(load("adapter.st"), model.state_dict())
        >>> applied.revert()
    """
    switcher = Switcher(weights, rename=rename)
    switcher.load(adapter, alpha)
    return Applied(switcher)
