"""The reader of LoRA files whose keys say what each tensor is: those of kohya, LyCORIS, diffusers, XLabs and their like.

What tells these dialects apart is in their modules: which files are theirs, and the scale of a module's update.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint
from shira_format.errors import FormatError, SourceError
from shira_format.lora.algorithms import STORED, layer
from shira_format.lora.base import Lora, Update
from shira_format.lora.decomposed import Decomposed
from shira_format.lora.files import PICKLES, SAFETENSORS, open_tensors, refuse_scale_beside
from shira_format.lora.fits import fits
from shira_format.lora.groups import Group, Layer
from shira_format.lora.keys import ALPHA, DOWN, UP, WHOLE, Key, parse_key
from shira_format.lora.refusals import check_input, kind_of, unmatched
from shira_format.lora.row_stack import Piece, stack_rows, take_update_rows
from shira_format.names.components import component_names, component_of
from shira_format.names.located import LocatedCheckpoint, check_location, other_names
from shira_format.names.modules import Modules
from shira_format.names.prefixes import prefix_of
from shira_format.names.row_blocks import Location, RowBlock

_MOST_SHOWN = 80  # different ranks or alphas in the provenance
# The name of a file that is taken from a folder with others.
NAMED = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")

PEFT = "base_model.model"  # the prefix of PEFT's keys
OPTIONS = "lora_adapter_metadata"  # PEFT's options in a header, as diffusers writes them

Groups = Mapping[Key, Group]  # by module
Scale = Callable[[Group, int], float]


def find_file(path: Path, what: str) -> Path:
    """The file at ``path``; in a folder the one with diffusers' own name, else the only safetensors file, else the only other.

    Raises:
        SourceError: there is none, or there are several.
    """
    if path.is_file():
        if path.suffix in (SAFETENSORS, *PICKLES):
            return path
    else:
        for name in NAMED:
            if (path / name).is_file():
                return path / name
        files = sorted(file for file in path.iterdir() if file.is_file())
        for suffixes in ((SAFETENSORS,), PICKLES):
            found = [file for file in files if file.suffix in suffixes]
            if len(found) > 1:
                raise SourceError(f"{path}: several files ({', '.join(file.name for file in found)}); name one")
            if found:
                return found[0]
    raise SourceError(f"{path}: no LoRA of {what}: need one file that ends in {SAFETENSORS}, {', '.join(PICKLES)}")


def dialect_of(path: Path) -> str | None:
    """The dialect of the LoRA at ``path``, from its keys, its name and its header; None if they tell of none that is read here."""
    try:
        tensors = open_tensors(file := find_file(path, ""))
    except (SourceError, FormatError):  # reported when it is read
        return None
    keys = [key for key in map(parse_key, tensors) if key is not None]
    styles = {key.style for key in keys}
    if "xlabs" in styles:
        return "xlabs"
    ours = file.name in NAMED or OPTIONS in tensors.metadata(file.name) or "diffusers" in styles
    flux = any(key.module.startswith(("double_blocks.", "single_blocks.")) for key in keys)
    scaled = {key.module for key in keys if key.part == ALPHA}
    if not flux and any(key.module not in scaled for key in keys if _is_of_peft(key, ours=ours)):
        return None
    if "lycoris" in styles or (any(key.prefix == "lycoris" for key in keys) and _has_factors(keys)):
        return "lycoris"
    if not _has_factors(keys):
        return None
    if "kohya" in styles or any(key.is_flat for key in keys):
        return "kohya"
    # PEFT's parts without a component are not enough: they may be from another library, and their scale in a configuration
    # file that is lost. Those of FLUX's authors behind PEFT's prefix are ai-toolkit's and fal's, which write none.
    if ours or any(key.prefix not in ("", PEFT) or (key.prefix and flux) for key in keys):
        return "diffusers"
    return "kohya" if all(key.module in scaled for key in keys if key.part in (DOWN, UP)) else None


def _is_of_peft(key: Key, *, ours: bool) -> bool:
    """Whether PEFT wrote it, with the scale in its configuration: LoHa and LoKr have their parts' names from LyCORIS."""
    return key.prefix == PEFT and (key.part.startswith(("hada_", "lokr_")) or (key.style == "peft" and not ours))


def _has_factors(keys: Iterable[Key]) -> bool:
    return any(key.part in (DOWN, UP) for key in keys)


class Scaling:
    """How a dialect scales updates; kohya's and LyCORIS' rule: ``alpha / rank``, where alpha is the rank if it is 0 or missing."""

    def of_components(self, components: Mapping[str, Groups], tensors: Checkpoint, path: Path) -> dict[str, Scale]:
        """The scale of the groups of each component, by component.

        Raises:
            SourceError: options and keys contradict each other.
        """
        if tensors.metadata(path.name).get(OPTIONS):
            raise SourceError(
                f"{path}: its header has PEFT's options ({OPTIONS}), and its keys are not those of diffusers"
            )
        return {component: lambda group, rank: group.alpha(rank) / rank for component in components}

    def source(self) -> dict[str, Any]:
        """For the provenance."""
        return {}

    def files(self) -> list[Path]:
        """The files that were read for it."""
        return []

    def notices(self) -> list[str]:
        """What a user should know."""
        return []


def read_keyed(
    path: Path,
    base: Checkpoint,
    dialect: str,
    prefix: str | None,
    *,
    scaling: Scaling | None = None,
    modules_of: Callable[[str], list[str]] = lambda module: [module],
) -> Lora:
    """Read the LoRA at ``path``; see :func:`shira_format.lora.open_lora`.

    Args:
        path: a file or folder.
        base: the checkpoint that it adapts.
        dialect: for the provenance.
        prefix: the user's choice.
        scaling: the dialect's rule for scales.
        modules_of: the modules that are the rows of one in the file, top to bottom.
    """
    return _Reader(find_file(path, dialect), base, dialect, prefix, scaling or Scaling(), modules_of).read()


class _Reader:
    def __init__(
        self, path: Path, base: Checkpoint, dialect: str, prefix: str | None, scaling: Scaling,
        modules_of: Callable[[str], list[str]],
    ) -> None:  # fmt: skip
        self.path, self.base, self.dialect, self.prefix = path, base, dialect, prefix
        self.scaling, self.modules_of = scaling, modules_of
        self.tensors = open_tensors(path, base)
        refuse_scale_beside(self.tensors)
        self.notices: list[str] = []
        # By the base's tensor.
        self._updates: dict[str, Update] = {}
        self._pieces: dict[str, list[Piece]] = {}
        self._additions: dict[str, Array] = {}
        self._whole: dict[str, Array] = {}
        self._owners: dict[str, str] = {}

    def read(self) -> Lora:
        self._refuse_transposed()
        components = self._components()
        scales = self.scaling.of_components(components, self.tensors, self.path)
        ranks: set[int] = set()
        alphas: set[float] = set()
        for component, groups in components.items():
            for group, location, bias in self._located(component, groups, alone=len(components) == 1):
                group.scale_of = scales[component]
                check_input(group, group.key.module, location.shape)
                name, view = self._view(location, group.where)
                made = layer(group, name, location.shape, view)
                if made.update is not None:
                    self._add_update(self._decomposed(made, name, view), location, group.name)
                self._apply(group, made, location, bias)
                if made.rank is not None and made.scale is not None:
                    ranks.add(made.rank)
                    alphas.add(made.scale * made.rank)
        if self._whole:
            self.notices.append(
                f"{len(self._whole)} tensors replace the base's, {next(iter(self._whole))!r} for example"
            )
        shown = {"ranks": sorted(ranks)[:_MOST_SHOWN], "alphas": sorted(alphas)[:_MOST_SHOWN]}
        source = {"kind": "lora", "dialect": self.dialect} | {key: found for key, found in shown.items() if found}
        return Lora(
            updates=[*self._updates.values(), *self._stacked()],
            whole=self._whole,
            additions=self._additions,
            source=source | self.scaling.source(),
            files=[self.path, *self.scaling.files()],
            notices=[*self.scaling.notices(), *self.notices],
        )

    def _refuse_transposed(self) -> None:
        """Refuse GPT-2, whose weights are ``[in, out]``, as is seen of its fused queries, keys and values; square ones look alike."""
        for name in self.base:
            if name.endswith(".attn.c_attn.weight") and self.base.shape(name)[1:] == (
                3 * self.base.shape(name)[0],
            ):
                raise SourceError(
                    f"{self.path}: the base's {name!r} is stored as [in, out], as GPT-2's layers are, and a LoRA of {self.dialect} "
                    "is of layers that are stored as [out, in]: it is read as PEFT's with its adapter_config.json"
                )

    def _components(self) -> dict[str, dict[Key, Group]]:
        """The groups by component and module."""
        if (kind := kind_of(self.tensors)) is not None:
            raise SourceError(f"{self.path}: not a LoRA that can be converted: {kind}")
        parsed = {name: parse_key(name) for name in self.tensors}
        prefixes = {key.prefix for key in parsed.values() if key is not None}
        found: dict[str, dict[Key, Group]] = {}
        for name, key in parsed.items():
            if key is None:
                raise SourceError(f"{self.path}: unmatched key {name!r}: {unmatched(name, self.tensors)}")
            component = component_of(key.prefix, prefixes, self.base, self.path)
            module = Key("", key.module, "", key.is_flat)
            group = found.setdefault(component, {}).setdefault(module, Group(self.path, key, self.tensors))
            group.add(key.part, name, stored=key.part in STORED and len(self.tensors.shape(name)) > 1)
        if not found:
            raise SourceError(f"{self.path}: it holds no tensors")
        if all(key is not None and key.part == WHOLE for key in parsed.values()):
            raise SourceError(
                f"{self.path}: no key is a part of a LoRA; whole weights are converted by full_to_shira"
            )
        return found

    def _located(
        self, component: str, groups: Groups, *, alone: bool
    ) -> Iterator[tuple[Group, Location, Location | None]]:
        """Each group, and where the base has its weight and bias."""
        where = f"{self.path}: {component}" if component else str(self.path)
        prefix, names = component_names(self.base, component, self.path, alone=alone)
        modules = Modules(self.base, prefix, names)
        chosen = prefix_of(self.prefix, prefix if self.base.components else "")
        others: list[tuple[str, Location]] = []
        for is_flat in (False, True):
            members = {key.module: group for key, group in groups.items() if key.is_flat == is_flat}
            if not members:
                continue
            parts = {module: self.modules_of(module) for module in members}
            owners = {
                part: members[module] for module, found in parts.items() for part in found if len(found) == 1
            }

            def fits_owner(part: str, location: Location, owners: Mapping[str, Group] = owners) -> bool:
                return part not in owners or fits(owners[part], location.shape)

            found, rename = modules.resolve(
                [part for names in parts.values() for part in names],
                where,
                fits=fits_owner,
                prefix=chosen,
                is_flat=is_flat,
            )
            self.notices += rename.notices("the LoRA", component)
            others += [
                (members[module].name, modules.weight(found[module]))
                for module in members
                if module in found and modules.is_other(found[module])
            ]
            for module, group in members.items():
                known = [found[part] for part in parts[module]]
                yield group, _stack([modules.weight(name) for name in known]), _biases(modules, known)
        if others:
            self.notices.append(other_names(others))

    def _apply(self, group: Group, made: Layer, location: Location, bias: Location | None) -> None:
        """Add what a module's LoRA adds to small tensors, or replaces."""
        first = location.blocks[0].name
        if made.weight is not None:
            self._add(group, made.weight, location, ("diff", "w_norm"))
        if made.bias is not None:
            if bias is None:
                raise SourceError(
                    f"{self.path}: {_key(group, _BIASES)!r}: the base has no {first.removesuffix('weight') + 'bias'!r}"
                )
            self._add(group, made.bias, bias, _BIASES)
        if made.whole is not None:
            if not _is_whole(location, self.base) or made.whole.shape != self.base.shape(first):
                raise SourceError(
                    f"{group.where} of shape {list(made.whole.shape)} would replace the base's {first!r} of shape "
                    f"{list(self.base.shape(first))}"
                )
            self._claim(first, group.name)
            self._whole[first] = made.whole

    def _view(self, location: Location, where: str) -> tuple[str, Checkpoint]:
        """A name for the tensor at a location, and a checkpoint that has it under this name."""
        if _is_whole(location, self.base):
            return location.blocks[0].name, self.base
        check_location(self.base, location, where)
        names = list(dict.fromkeys(block.name for block in location.blocks))
        # A name that no tensor has, and that shows where this one is.
        name = f"{'rows of ' if len(names) == 1 else ''}{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        return name, LocatedCheckpoint(self.base, {name: location})

    def _claim(self, what: str, owner: str) -> None:
        """Refuse a tensor of the base that is adapted twice."""
        if (other := self._owners.setdefault(what, owner)) != owner:
            raise SourceError(f"{self.path}: {other!r} and {owner!r} both adapt the base's {what!r}")

    def _add_update(self, update: Update, location: Location, owner: str) -> None:
        if _is_whole(location, self.base):
            self._claim(update.name, owner)
            self._updates[update.name] = update
            return
        for block in location.blocks:
            part = take_update_rows(update, block.name, block.rows)
            self._pieces.setdefault(block.name, []).append(Piece(block.start, part, owner))

    def _decomposed(self, made: Layer, name: str, base: Checkpoint) -> Update:
        """The update, brought to the norms of DoRA."""
        update, magnitude = made.update, made.magnitude
        assert update is not None
        if magnitude is None:
            return update
        magnitude = magnitude.astype(update.dtype)
        return Decomposed(update, base, magnitude, bool(made.kernel), made.kernel or 1, made.eps)

    def _add(self, group: Group, array: Array, location: Location, parts: Collection[str]) -> None:
        """Add to 1-D tensors of the base."""
        for block in location.blocks:
            shape = self.base.shape(block.name)
            if len(location.shape) != 1 or array.shape != location.shape or len(shape) != 1:
                raise SourceError(
                    f"{self.path}: {_key(group, parts)!r} has shape {list(array.shape)}, the base's {block.name!r} {list(shape)}"
                )
            self._claim(block.name if block.height == shape[0] else f"{block.name}[{block.start}]", group.name)
            total = self._additions.setdefault(block.name, np.zeros(shape, array.dtype))
            total[block.start : block.start + block.height] += block.take(array)

    def _stacked(self) -> Iterator[Update]:
        for name, pieces in self._pieces.items():
            self._claim(name, pieces[0].owner)
            yield stack_rows(name, self.base.shape(name), pieces, self.path)


_BIASES = ("lora_bias", "diff_b", "b_norm")


def _key(group: Group, parts: Collection[str]) -> str:
    return next(group.keys[part] for part in parts if part in group.keys)


def _is_whole(location: Location, base: Checkpoint) -> bool:
    """Whether it is exactly one tensor of the base."""
    block, *more = location.blocks
    shape = base.shape(block.name)
    return not more and shape == location.shape and block.rows == ((0, shape[0] if shape else 1),)


def _stack(locations: list[Location]) -> Location:
    """Modules that are the rows of one, top to bottom."""
    if len(locations) == 1:
        return locations[0]
    blocks, height = [], 0
    for location in locations:
        for block in location.blocks:
            moved = tuple((start + height, stop + height) for start, stop in block.rows)
            blocks.append(RowBlock(block.name, block.start, moved))
        height += location.shape[0]
    return Location((height, *locations[0].shape[1:]), tuple(blocks))


def _biases(modules: Modules, known: list[str]) -> Location | None:
    found = [modules.tensor(f"{module}.bias") for module in known]
    there = [location for location in found if location is not None]
    return _stack(there) if there and len(there) == len(found) else None
