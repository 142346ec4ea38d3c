"""LoRA files as updates of named weights; a file per dialect.

A new dialect is a module with a :class:`Dialect` and one line in :data:`DIALECTS`. It detects its files and reads them as
a :class:`Lora`: updates that can fill any tile of ``delta W``, and tensors to replace.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.base import Dialect, Lora
from shira_format.lora.files import PICKLES, SAFETENSORS, open_tensors
from shira_format.lora.peft.bare import bare_weights, missing_config
from shira_format.lora.peft.config import CONFIG
from shira_format.lora.peft.placed import placed
from shira_format.lora.products import LowRank
from shira_format.lora.refusals import why_unknown
from shira_format.names.located import LocatedCheckpoint, in_any_names, other_names
from shira_format.storage.paths import check_exists, is_file, naming_remote, resolve_path


class _Dialects(Mapping[str, Dialect]):
    """Dialects by name; the module of one is imported when it is looked up."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Dialect:
        module, _, cls = self._places[name].partition(":")
        dialect: Dialect = getattr(import_module(f"{__name__}.{module}"), cls)()
        return dialect

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


# In the order in which they are tried.
DIALECTS: Mapping[str, Dialect] = _Dialects(
    {
        "mlx": "mlx:Mlx",
        "peft": "peft.reader:Peft",
        "gguf": "gguf:Gguf",
        "torchtune": "torchtune:Torchtune",
        "xlabs": "xlabs:Xlabs",
        "diffusers": "diffusers:Diffusers",
        "kohya": "kohya:Kohya",
        "lycoris": "lycoris:Lycoris",
    }
)

# Those with files of their own; the others have one grammar, and are told apart by a single look at the keys.
_OWN_FILES = ("mlx", "peft", "gguf", "torchtune")
# What a file of a dialect is called, where its name must match.
_FILES = {"mlx": "*adapters.safetensors"}
# Dialects that change weights only, by names that they look for in the base.
_OF_ONE_BASE = ("mlx", "gguf", "torchtune")
# Dialects whose files state their scales, or have none.
_OWN_SCALES = ("xlabs", "kohya", "lycoris")

__all__ = ["DIALECTS", "Dialect", "Lora", "LowRank", "open_lora"]


def open_lora(
    path: str | os.PathLike[str],
    base: Checkpoint,
    *,
    dialect: str | None = None,
    prefix: str | None = None,
    rank: int | None = None,
    alpha: float | None = None,
) -> Lora:
    """Read the LoRA at ``path`` as updates of the tensors of ``base``.

    Args:
        path: a file or folder.
        base: the checkpoint that it adapts; names and shapes are resolved against it.
        dialect: a key of :data:`DIALECTS`; detected from files and keys by default.
        prefix: what the base's names of the adapted weights start with, if they are not those of the LoRA and several would
            be possible; of one component of a pipeline if it starts with ``COMPONENT/``.
        rank: of PEFT's weights without ``adapter_config.json``: all others state their own.
        alpha: likewise; the scale is ``alpha / rank``.

    Raises:
        SourceError: not a LoRA, or one with a key, shape or option that cannot be converted exactly.
        FormatError: a safetensors file is damaged.
    """
    path = resolve_path(path)
    with naming_remote(path):
        return _opened(path, base, dialect, prefix, rank, alpha)


def _opened(
    path: Path, base: Checkpoint, dialect: str | None, prefix: str | None, rank: int | None, alpha: float | None
) -> Lora:
    check_exists(path)
    dialect = _detected(path) if dialect is None else dialect
    if rank is not None or alpha is not None:
        if dialect not in (None, "peft"):
            raise SourceError(f"{path}: a LoRA of {dialect} states its own scale: leave out rank and alpha")
        from shira_format.lora.peft.reader import read_by_hand

        return _checked("peft", read_by_hand(path, base, prefix, rank, alpha), base)
    if dialect is not None:
        return _checked(dialect, _read(DIALECTS[dialect], path, base, prefix), base)
    if bare := bare_weights(path):
        raise missing_config(bare)
    weights = _only_weights(path)
    if (why := why_unknown(path)) is not None:
        raise SourceError(f"{path}: not a LoRA that can be converted: {why}")
    if weights is not None:
        open_tensors(weights, base)  # raises why it cannot be read, if that is the reason
    raise SourceError(f"{path}: not a LoRA of a known dialect ({', '.join(DIALECTS)})")


def _detected(path: Path) -> str | None:
    files = [path.name] if path.is_file() else [one.name for one in path.iterdir()]
    for name in _OWN_FILES:
        # Looked at by name first, so that no module is imported for files that it cannot read.
        if fnmatch.filter(files, _FILES.get(name, "*")) and DIALECTS[name].recognises(path):
            return name
    from shira_format.lora.keyed import dialect_of

    return dialect_of(path)


def _only_weights(path: Path) -> Path | None:
    """The file of weights at ``path``, or None.

    Raises:
        SourceError: there are several, or it lies beside PEFT's configuration under a name that PEFT does not give it.
    """
    files = [path] if path.is_file() else sorted(one for one in path.iterdir() if one.is_file())
    weights = [file for file in files if file.suffix in (SAFETENSORS, *PICKLES)]
    names = ", ".join(file.name for file in weights)
    if len(weights) > 1:
        raise SourceError(f"{path}: several files ({names}); name one")
    if weights and path.is_dir() and is_file(path / CONFIG):
        raise SourceError(
            f"{path}: {CONFIG}, and no weights of the name that PEFT gives them, but {names}: name this file"
        )
    return weights[0] if weights else None


def _read(dialect: Dialect, path: Path, base: Checkpoint, prefix: str | None) -> Lora:
    """The LoRA; of a dialect that looks for names in the base alone, also by other programs' names for its tensors."""
    if dialect.name not in _OF_ONE_BASE:
        return dialect.read(path, base, prefix)
    located, lora = in_any_names(lambda known: dialect.read(path, known, prefix), base)
    if not isinstance(located, LocatedCheckpoint):
        return lora
    places = [
        (update.name, located.locations[update.name])
        for update in lora.updates
        if update.name in located.locations
    ]
    return replace(lora, updates=placed(lora.updates, located, path), notices=[other_names(places), *lora.notices])


def _checked(dialect: str, lora: Lora, base: Checkpoint) -> Lora:
    """``lora`` with a notice of what was left out of its file's keys.

    Raises:
        SourceError: PEFT's configuration is beside it, and its dialect has no use for it.
    """
    config = lora.files[0].with_name(CONFIG) if lora.files else None
    if dialect in _OWN_SCALES and config is not None and is_file(config):
        raise SourceError(
            f"{lora.files[0]} and {config}: a LoRA of {dialect} has no such configuration: move it away if it belongs to "
            "another adapter"
        )
    weights = [file for file in lora.files if file.suffix in (SAFETENSORS, *PICKLES)]
    found = [notice for file in weights for notice in open_tensors(file, base).notices]
    return replace(lora, notices=found + lora.notices) if found else lora
