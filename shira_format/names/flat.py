"""Names of modules in which "." has become "_", as kohya and LyCORIS write them, back to the base's weights.

Such a name can be read in many ways (``a_b_c``: ``a.b.c``, ``a_b.c``...). So it is looked for among the names that the
base's modules get when they are written like this, by their own names and by those that other programs give them. A
name that two modules would get is refused. One prefix, the same for all, may be missing or be too much.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from difflib import get_close_matches

from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.places import RowBlock, whole
from shira_format.names.flux import Piece, diffusers_pieces, is_diffusers_flux
from shira_format.names.open_clip import transformers_names
from shira_format.names.sd3 import is_diffusers_sd3, sd3_pieces
from shira_format.names.unet import other_names

_WEIGHT = ".weight"

# Where a module is: several places if the base holds it in parts.
Places = tuple[RowBlock, ...]


def flat(module: str) -> str:
    """How kohya writes the name of a module."""
    return module.replace(".", "_")


class FlatNames:
    """The modules of one component of a base, by their flat names."""

    def __init__(self, base: Checkpoint, prefix: str, tensors: Sequence[str]) -> None:
        """Args: ``prefix``: what stands before the component's ``tensors`` in ``base``."""
        self._found: dict[str, dict[Places, str]] = {}
        for module, places in _modules(base, prefix, tensors):
            self._found.setdefault(flat(module), {}).setdefault(places, module)

    def resolve(self, needed: Collection[str], where: str) -> tuple[dict[str, Places], str]:
        """Where each needed module is, and what was done to the names, in words ("" for nothing).

        Args:
            needed: flat names.
            where: file and component, for messages.

        Raises:
            SourceError: one is not in the base, or could be several modules.
        """
        ways = [
            (words, rename)
            for words, rename in self._ways(needed)
            if all(rename(n) in self._found for n in needed)
        ]
        if not ways:
            missing = next((name for name in needed if name not in self._found), next(iter(needed)))
            near = get_close_matches(missing, self._found, 2, 0.8)
            hint = f"; there is {' and '.join(map(repr, near))}" if near else ""
            raise SourceError(f"{where}: the base has no module that is written {missing!r}{hint}")
        words, rename = ways[0]
        if words and len(ways) > 1:
            raise SourceError(f"{where}: {next(iter(needed))!r} and the others could be of two parts of the base: {words}, or {ways[1][0]}")  # fmt: skip
        return {name: self._only(rename(name), where) for name in needed}, words

    def _only(self, name: str, where: str) -> Places:
        found = self._found[name]
        if len(found) > 1:
            raise SourceError(
                f"{where}: {name!r} could be any of the base's modules {', '.join(map(repr, found.values()))}"
            )
        return next(iter(found))

    def _ways(self, needed: Collection[str]) -> Iterator[tuple[str, Callable[[str], str]]]:
        """Ways of naming, the plain one first; others only if that one does not do."""
        yield "", str
        if all(name in self._found for name in needed):
            return
        for prefix in _leading(list(needed)[:1], "_"):
            if all(name.startswith(prefix) for name in needed):
                yield f"the prefix {prefix!r} is left out", lambda name, p=prefix: name.removeprefix(p)  # type: ignore[misc]
        for prefix in _leading((module for modules in self._found.values() for module in modules.values()), "."):
            start = flat(prefix)
            yield f"the prefix {prefix!r} is added", lambda name, p=start: p + name  # type: ignore[misc]


def _leading(names: Iterable[str], separator: str) -> list[str]:
    """The first one to three parts of the names, with what separates them from the rest; shortest first."""
    found: dict[str, None] = {}
    parted = [name.split(separator) for name in sorted(names)]
    for depth in (1, 2, 3):
        for parts in parted:
            if len(parts) > depth:
                found[separator.join(parts[:depth]) + separator] = None
    return list(found)


def _modules(base: Checkpoint, prefix: str, tensors: Sequence[str]) -> Iterator[tuple[str, Places]]:
    """Every name that a module of the base has in some program, and where it is."""
    tensors = [tensor for tensor in tensors if base.shape(prefix + tensor)]  # a lone number has no rows
    weights = {tensor.removesuffix(_WEIGHT) for tensor in tensors if tensor.endswith(_WEIGHT)}
    others = other_names(weights)
    for module in sorted(weights):
        places = (whole(f"{prefix}{module}{_WEIGHT}", base),)
        yield module, places
        if module in others:
            yield others[module], places
    for tensor, modules in transformers_names(tensors):
        name = prefix + tensor
        height = base.shape(name)[0] // len(modules)
        for number, module in enumerate(modules):
            yield module, (RowBlock(name, number * height, ((0, height),)),)

    def height_of(tensor: str) -> int:
        return base.shape(prefix + tensor)[0]

    pieces: dict[str, tuple[Piece, ...]] = {}
    if is_diffusers_flux(tensors):
        pieces = diffusers_pieces(tensors, height_of)
    elif is_diffusers_sd3(tensors):
        pieces = sd3_pieces(tensors, height_of, height_of("context_embedder.weight"))
    for module, parts in pieces.items():
        yield module, tuple(RowBlock(f"{prefix}{part.module}{_WEIGHT}", 0, part.rows) for part in parts)
