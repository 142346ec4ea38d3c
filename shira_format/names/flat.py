"""Names of modules in which "." has become "_", as kohya and LyCORIS write them, matched to the base's weights.

Such a name can be read in many ways (``a_b_c``: ``a.b.c``, ``a_b.c``...). So it is looked up among the flattened names of
the base's modules: their own ones, and those that other programs give them. A name that two modules share is refused.
One prefix, the same for all, may be missing or in excess.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from difflib import get_close_matches

from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.names.flux import flux_parts, is_diffusers_flux
from shira_format.names.open_clip import open_clip_parts
from shira_format.names.prefixes import Renaming, leading_parts, numbers, only_one, renamings
from shira_format.names.row_blocks import FusedPart, RowBlock, whole_weight
from shira_format.names.sd3 import is_diffusers_sd3, sd3_parts
from shira_format.names.unet import unet_other_names

_WEIGHT = ".weight"

# Where a module is: several blocks if the base holds it in parts.
RowBlocks = tuple[RowBlock, ...]


def flat(module: str) -> str:
    """The name of a module as kohya writes it."""
    return module.replace(".", "_")


class FlatNames:
    """The modules of one component of a base, by their flat names."""

    def __init__(self, base: Checkpoint, prefix: str, tensors: Sequence[str]) -> None:
        """Args: ``prefix``: of the names of the component's ``tensors`` in ``base``."""
        self._found: dict[str, dict[RowBlocks, str]] = {}
        for module, blocks in _modules(base, prefix, tensors):
            self._found.setdefault(flat(module), {}).setdefault(blocks, module)

    def resolve(
        self,
        needed: Collection[str],
        where: str,
        *,
        fits: Callable[[str, RowBlocks], bool] = lambda _name, _blocks: True,
        prefix: str | None = None,
    ) -> tuple[dict[str, RowBlocks], Renaming]:
        """Where each needed module is, and the renaming that finds it (of names with dots).

        Args:
            needed: flat names.
            where: file and component, for messages.
            fits: whether a module has the shape that the LoRA needs; decides if several renamings are possible.
            prefix: the user's choice: what the names in the component start with.

        Raises:
            SourceError: one is not in the base, or could be several modules.
        """
        ways = [
            rename
            for rename in self._renamings(needed, prefix)
            if all(flat(rename(n)) in self._found for n in needed)
        ]
        # Renamings that find the same modules are one.
        ways = list({tuple(flat(rename(n)) for n in needed): rename for rename in reversed(ways)}.values())[::-1]
        if not ways:
            possible = [Renaming(), *self._renamings(needed, prefix)]
            nearest = max(possible, key=lambda rename: sum(flat(rename(n)) in self._found for n in needed))
            missing = next((n for n in needed if flat(nearest(n)) not in self._found), next(iter(needed)))
            near = get_close_matches(missing, self._found, 2, 0.8)
            hint = f"; there is {' and '.join(map(repr, near))}" if near else ""
            among = "" if prefix is None else f" under --prefix {prefix}"
            raise SourceError(f"{where}: the base has no module{among} that is written {missing!r}{hint}")
        rename = only_one(
            ways, needed, where, fits=lambda n, found: any(fits(n, blocks) for blocks in self._found[flat(found)])
        )
        return {name: self._only(flat(rename(name)), name, where) for name in needed}, rename

    def _only(self, key: str, name: str, where: str) -> RowBlocks:
        found = self._found[key]
        if len(found) > 1:
            raise SourceError(
                f"{where}: {name!r} could be any of the base's modules {', '.join(map(repr, found.values()))}"
            )
        return next(iter(found))

    def _renamings(self, needed: Collection[str], prefix: str | None) -> Iterator[Renaming]:
        """All that are possible; none but the empty one if that is enough."""
        if prefix is not None:
            theirs = self._leading_parts()
            names = {flat(module): module for modules in self._found.values() for module in modules.values()}
            ways = renamings(self._common_parts(needed), dict.fromkeys([*theirs, prefix]))
            return (
                rename
                for rename in ways
                if rename.new == prefix
                or all(names.get(flat(rename(name)), "").startswith(prefix) for name in needed)
            )
        if all(name in self._found for name in needed):
            return iter([Renaming()])
        return renamings(self._common_parts(needed), self._leading_parts())

    @staticmethod
    def _common_parts(needed: Collection[str]) -> list[str]:
        """The leading parts that all flat names share, but for those with numbers."""
        ours = leading_parts(list(needed)[:1], "_")
        return [
            prefix
            for prefix in ours
            if all(name.startswith(prefix) for name in needed) and not numbers(prefix.replace("_", "."))
        ]

    def _leading_parts(self) -> list[str]:
        return leading_parts(sorted(module for modules in self._found.values() for module in modules.values()))


def _modules(base: Checkpoint, prefix: str, tensors: Sequence[str]) -> Iterator[tuple[str, RowBlocks]]:
    """Every name that a module of the base has in some program, and where its rows are."""
    tensors = [tensor for tensor in tensors if base.shape(prefix + tensor)]  # a lone number has no rows
    weights = {tensor.removesuffix(_WEIGHT) for tensor in tensors if tensor.endswith(_WEIGHT)}
    others = unet_other_names(weights)
    for module in sorted(weights):
        blocks = (whole_weight(f"{prefix}{module}{_WEIGHT}", base),)
        yield module, blocks
        if module in others:
            yield others[module], blocks
    for tensor, modules in open_clip_parts(tensors):
        name = prefix + tensor
        height = base.shape(name)[0] // len(modules)
        for number, module in enumerate(modules):
            yield module, (RowBlock(name, number * height, ((0, height),)),)

    def height_of(tensor: str) -> int:
        return base.shape(prefix + tensor)[0]

    fused: dict[str, tuple[FusedPart, ...]] = {}
    if is_diffusers_flux(tensors):
        fused = flux_parts(tensors, height_of)
    elif is_diffusers_sd3(tensors):
        fused = sd3_parts(tensors, height_of, height_of("context_embedder.weight"))
    for module, parts in fused.items():
        yield module, tuple(RowBlock(f"{prefix}{part.module}{_WEIGHT}", 0, part.rows) for part in parts)
