"""Words that wrappers put into names of tensors: torch.compile, DDP, FSDP and activation checkpoints.

A state dict of a wrapped model has them at the front or between (``_orig_mod.layers.0._checkpoint_wrapped_module.fc.weight``).
Only whole parts of names are left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from shira_format._core.notices import NamesNotice
from shira_format.checkpoints.base import Checkpoint
from shira_format.checkpoints.renamed import RenamedCheckpoint
from shira_format.errors import SourceError

# No module has such a name of its own; a module may be called "module".
CERTAIN = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
MODULE = "module"


class UnwrappedCheckpoint(RenamedCheckpoint):
    """A checkpoint by its names without the words of wrappers."""

    def __init__(self, base: Checkpoint, names: Mapping[str, str], notice: str) -> None:
        """Args: ``notice``: what was left out."""
        super().__init__(base, names)
        self.notice = notice
        self.notices = (*base.notices, notice)

    def metadata(self, shard: str) -> dict[str, str]:
        return self.base.metadata(shard)


def unwrapped(checkpoint: Checkpoint, base: Collection[str] | None = None) -> Checkpoint:
    """``checkpoint`` by the names of :func:`unwrapped_names`; itself if these are its names.

    Raises:
        SourceError: two names become one.
    """
    names = unwrapped_names(checkpoint, base, checkpoint.path)
    if all(short == name for short, name in names.items()):
        return checkpoint
    return UnwrappedCheckpoint(checkpoint, names, notice_of(names, checkpoint.path))


def notice_of(names: Mapping[str, str], where: object) -> str:
    """A notice for the user of what names have become: an example."""
    changed = [(name, short) for short, name in names.items() if short != name]
    name, short = changed[0]
    return NamesNotice(
        f"{where}: {len(changed)} names are read without the words of wrappers: {name!r} is {short!r}"
    )


def unwrapped_names(names: Collection[str], base: Collection[str] | None, where: object) -> dict[str, str]:
    """The names by what they are without the words of wrappers, in the same order.

    Args:
        names: of a checkpoint, or the keys of an adapter.
        base: names beside which they are read: a word that occurs there is kept. None: "module" is kept, which may be the
            name of a module; at the front it is a prefix like others.
        where: the file, for messages.

    Raises:
        SourceError: two names become one.
    """
    own = {part for name in base or () for part in re.split(r"[./]", name)}
    words = {word for word in CERTAIN if word not in own}
    plain = {name: _without(name, words) for name in names}
    if base is not None and MODULE not in own:
        plain = {name: _without(short, {MODULE}) for name, short in plain.items()}
    return by_plain(plain, where)


def by_plain(plain: Mapping[str, str], where: object) -> dict[str, str]:
    """From name to plain name the other way round.

    Raises:
        SourceError: two names become one.
    """
    found: dict[str, str] = {}
    for name, short in plain.items():
        if (other := found.setdefault(short, name)) != name:
            raise SourceError(
                f"{where}: without the words of wrappers {other!r} and {name!r} are one name, {short!r}"
            )
    return found


def _without(name: str, words: set[str]) -> str:
    component, slash, rest = name.rpartition("/")
    *parts, last = rest.split(".")
    return component + slash + ".".join([*(part for part in parts if part not in words), last])
