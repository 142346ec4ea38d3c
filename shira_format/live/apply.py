"""Applying an adapter to a dictionary of weights, and reverting it bit for bit."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from shira_format.adapter import Adapter
from shira_format.live.switcher import Switcher


class Applied:
    """An applied adapter; :meth:`revert` restores the weights."""

    def __init__(self, switcher: Switcher) -> None:
        self._switcher = switcher

    def revert(self) -> None:
        """Restore the weights bit for bit; a second call does nothing."""
        self._switcher.revert()


def apply(
    adapter: Adapter,
    weights: MutableMapping[str, Any],
    alpha: float | None = None,
    *,
    rename: Callable[[str], str] = lambda name: name,
) -> Applied:
    """Apply ``adapter`` in place to a dictionary of weights, after everything has been checked.

    To change adapters often use a :class:`Switcher`, which takes the same dictionaries.

    Args:
        adapter: the adapter.
        weights: numpy arrays or torch tensors by name, such as ``model.state_dict()``. Tensors that the base does not have
            are added.
        alpha: strength; the adapter's own by default.
        rename: from a name in the adapter to one in ``weights``.

    Returns:
        A handle whose ``revert`` removes the adapter.

    Raises:
        BaseMismatch: ``weights`` are not the base of this adapter; nothing was changed.
        FormatError: the adapter's file is damaged; nothing was changed.

    Example:
        >>> applied = apply(load("adapter.st"), model.state_dict())
        >>> applied.revert()
    """
    switcher = Switcher(weights, rename=rename)
    switcher.load(adapter, alpha)
    return Applied(switcher)
