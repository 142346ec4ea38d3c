"""kohya's LoRA: ``lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight`` and the like, in one file.

The rules are those of ``networks/lora.py`` (kohya-ss/sd-scripts): ``delta W = alpha / rank * up @ down``, where the rank is
that of the layer's ``lora_down``, and alpha is the rank if it is 0 or missing. Rank and alpha in the header are the trainer's
arguments, and are kept as provenance only. Names: see :mod:`shira_format.names.flat`.

LyCORIS writes the same files with other parts; both dialects share the reader in this module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.dtypes import is_float
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.base import Lora, Update
from shira_format.lora.decomposed import Decomposed
from shira_format.lora.files import PICKLES, SAFETENSORS, checked, number_in, open_tensors
from shira_format.lora.products import fits_factors, low_rank
from shira_format.lora.row_stack import stack_rows
from shira_format.names.components import component_names
from shira_format.names.flat import FlatNames, RowBlocks, flat
from shira_format.names.prefixes import prefix_of
from shira_format.names.row_blocks import RowBlock, is_one_weight
from shira_format.names.single_file import is_single_file, single_file_names

DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"
PARTS = frozenset((DOWN, UP, ALPHA))

# lora_transformer is OneTrainer's; lycoris is the prefix of LyCORIS' wrapper for any model. Names after ComfyUI's prefix
# keep their dots.
_KEY = re.compile(
    r"(?P<prefix>lora_unet|lora_transformer|lora_te[123]?|lycoris)_(?P<module>[^.]+)\.(?P<part>.+)"
    r"|(?P<comfy>diffusion_model)\.(?P<dotted>.+?)\.(?P<what>lora_(?:down|up|mid)\.weight|alpha|dora_scale|(?:hada|lokr)_\w+)"
)  # fmt: skip
_TEXT = {
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
}
# Keys of the header that go into the provenance.
_HEADER = ("ss_network_dim", "ss_network_alpha", "ss_base_model_version")
_MOST_SHOWN = 80  # characters of a header's value; different ranks or alphas


class KohyaKey(NamedTuple):
    """A parsed key: the prefix, which means a component; the module's flat name; the part of its LoRA."""

    prefix: str
    module: str
    part: str


def parse(key: str) -> KohyaKey | None:
    """The parsed key; None if it is of another dialect."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    if match["comfy"]:
        return KohyaKey(match["comfy"], flat(match["dotted"]), match["what"])
    return KohyaKey(match["prefix"], match["module"], match["part"])


def find(path: Path) -> Path | None:
    """The file at ``path``, or the only one in a folder."""
    if path.is_file():
        return path if path.suffix in (SAFETENSORS, *PICKLES) else None
    files = [file for file in sorted(path.iterdir()) if file.suffix in (SAFETENSORS, *PICKLES) and file.is_file()]
    return files[0] if len(files) == 1 else None


def keys_at(path: Path) -> list[KohyaKey]:
    """The keys of the file at ``path`` that :func:`parse` knows."""
    found = find(path)
    try:
        return [] if found is None else [key for key in map(parse, open_tensors(found)) if key is not None]
    except SourceError:  # not a file of tensors
        return []


class Kohya:
    """Files of kohya's sd-scripts, and of trainers that follow it."""

    name = "kohya"

    def recognises(self, path: Path) -> bool:
        keys = keys_at(path)
        return any(key.part in (DOWN, UP) for key in keys) and not any(map(is_lycoris, keys))

    def read(self, path: Path, base: Checkpoint, prefix: str | None = None) -> Lora:
        return Reader(path, base, self.name, _layer, prefix=prefix).read()


def is_lycoris(key: KohyaKey) -> bool:
    """Whether kohya's own trainer does not write such keys."""
    return key.part not in PARTS or key.prefix == "lycoris"


@dataclass
class Group:
    """The parts of one module's LoRA, as the file has them.

    Attributes:
        path: the file.
        name: prefix and module, as in the file.
        tensors: all that the file holds.
        parts: the tensors by part, but for large ones.
        stored: keys of large tensors, which are read in pieces, by part.
    """

    path: Path
    name: str
    tensors: Checkpoint
    parts: dict[str, Array] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)

    def alpha(self, rank: int) -> float:
        """Alpha; the rank if the file has none or 0."""
        return (self.number(ALPHA) if ALPHA in self.parts else 0.0) or float(rank)

    def number(self, part: str) -> float:
        """The number in a part of one element."""
        key = f"{self.name}.{part}"
        return number_in(self.parts[part], key, self.path)

    @property
    def where(self) -> str:
        """File and name, for messages."""
        return f"{self.path}: {self.name!r}"


class KohyaLayer(NamedTuple):
    """The effect of a module's LoRA.

    Attributes:
        update: of the weight.
        weight: addition to a 1-D weight, instead of an update.
        bias: addition to the bias.
        magnitude: of DoRA: ``[rows]``, or with ``kernel`` ``[columns / kernel]``.
        kernel: for DoRA by columns, the number of columns that share a norm; 0 for DoRA by rows.
        rank: for the provenance.
        alpha: for the provenance.
    """

    update: Update | None = None
    weight: Array | None = None
    bias: Array | None = None
    magnitude: Array | None = None
    kernel: int = 0
    rank: int | None = None
    alpha: float | None = None


# Makes a layer from a module's LoRA, the weight's name, and the shape of the module, of which the base may hold parts.
Build = Callable[[Group, str, tuple[int, ...]], KohyaLayer]


def factors_of(group: Group) -> tuple[Array, Array]:
    """The factors ``up`` and ``down``, whose ranks agree.

    Raises:
        SourceError: one is missing, or they do not fit.
    """
    for part, partner in ((DOWN, UP), (UP, DOWN)):
        if part not in group.parts:
            raise SourceError(f"{group.where}: it has {partner} without {part}" if partner in group.parts else f"{group.where}: it has neither {DOWN} nor {UP}")  # fmt: skip
    up, down = group.parts[UP], group.parts[DOWN]
    if up.ndim < 2 or down.ndim < 2 or up.shape[1] != down.shape[0] or not down.shape[0]:
        raise SourceError(
            f"{group.where}: factors of shapes {list(up.shape)} and {list(down.shape)} have no rank in common"
        )
    return up, down


def _layer(group: Group, name: str, shape: tuple[int, ...]) -> KohyaLayer:
    if strange := group.parts.keys() - PARTS:
        raise SourceError(f"{group.where}: unmatched key: kohya's LoRA has no {min(strange)!r}")
    up, down = factors_of(group)
    rank = down.shape[0]
    alpha = group.alpha(rank)
    return KohyaLayer(low_rank(name, shape, up, down, alpha / rank, group.where), rank=rank, alpha=alpha)


class Reader:
    """Turns the tensors of one file into updates."""

    def __init__(
        self, path: Path, base: Checkpoint, dialect: str, build: Build, *,
        stored: frozenset[str] = frozenset(), refused: Mapping[str, str] | None = None,
        prefix: str | None = None,
    ) -> None:  # fmt: skip
        """Args: ``stored``: parts that may be as large as the base's weights, and are read later. ``refused``: why some parts
        are not supported.
        """
        found = find(path)
        if found is None:
            raise SourceError(f"{path}: no LoRA of {dialect}: need one file that ends in {SAFETENSORS}, {', '.join(PICKLES)}")  # fmt: skip
        self.path = found
        self.base = base
        self.dialect = dialect
        self.build = build
        self.stored = stored
        self.refused = refused or {}
        self.prefix = prefix
        self.notices: list[str] = []
        # By the base's tensor: updates of some of its rows, and of all; additions; and by block, who adapts it.
        self._parts: dict[str, list[tuple[RowBlock, Update]]] = {}
        self._whole: dict[str, Update] = {}
        self._additions: dict[str, Array] = {}
        self._claimed: dict[str, str] = {}

    def read(self) -> Lora:
        tensors = open_tensors(self.path, self.base)
        groups = self._groups(tensors)
        ranks: set[float] = set()
        alphas: set[float] = set()
        for component, members in self._components(groups).items():
            blocks = self._resolve(component, members, alone=len(members) == len(groups))
            for key, group in members.items():
                layer = self._add(group, blocks[key.module])
                if layer.rank is not None and layer.alpha is not None:
                    ranks.add(layer.rank)
                    alphas.add(layer.alpha)
        return Lora(
            updates=self._updates(),
            additions=self._additions,
            source={"kind": "lora", "dialect": self.dialect}
            | {
                key: sorted(values)[:_MOST_SHOWN]
                for key, values in (("ranks", ranks), ("alphas", alphas))
                if values
            }
            | _shown(tensors.metadata(self.path.name)),
            files=[self.path],
            notices=self.notices,
        )

    def _groups(self, tensors: Checkpoint) -> dict[KohyaKey, Group]:
        """By prefix and module: keys without a part."""
        found: dict[KohyaKey, Group] = {}
        for name in tensors:
            key = parse(name)
            if key is None:
                raise SourceError(f"{self.path}: unmatched key {name!r}: {_reason(name)}")
            if key.part in self.refused:
                raise SourceError(f"{self.path}: unmatched key {name!r}: {self.refused[key.part]}")
            module = name.removesuffix(f".{key.part}")
            group = found.setdefault(key._replace(part=""), Group(self.path, module, tensors))
            if group.name != module:
                raise SourceError(f"{self.path}: {group.name!r} and {module!r} are one module")
            if key.part in self.stored and len(tensors.shape(name)) > 1:
                _check_stored(tensors, name, self.path)
                group.stored[key.part] = name
            else:
                group.parts[key.part] = _checked(self.path, name, key.part, tensors[name])
        if not found:
            raise SourceError(f"{self.path}: it holds no tensors")
        return found

    def _components(self, groups: Mapping[KohyaKey, Group]) -> dict[str, dict[KohyaKey, Group]]:
        prefixes = {key.prefix for key in groups}
        found: dict[str, dict[KohyaKey, Group]] = {}
        for key, group in groups.items():
            found.setdefault(self._component(key.prefix, prefixes), {})[key] = group
        return found

    def _component(self, prefix: str, prefixes: set[str]) -> str:
        """Diffusers' name of the component that the prefix means."""
        models = self.base.components
        if prefix in _TEXT:
            # FLUX's T5 is the third text encoder for kohya and ComfyUI, and the second in diffusers' pipeline.
            third = prefix == "lora_te3" and "text_encoder_3" not in models and "lora_te2" not in prefixes
            return "text_encoder_2" if models and third else _TEXT[prefix]
        if "transformer" in models and "transformer_2" in models:
            raise SourceError(
                f"{self.path}: the base has two denoisers, transformer and transformer_2, and the file does not say which it "
                "adapts: give the folder of one of them as the base"
            )
        return next((name for name in ("unet", "transformer", "prior") if name in models), "unet")

    def _resolve(self, component: str, members: Mapping[KohyaKey, Group], *, alone: bool) -> dict[str, RowBlocks]:
        where = f"{self.path}: {component}"
        if is_single_file(self.base):
            prefix, names = single_file_names(self.base, component, str(self.path))
        else:
            prefix, names = component_names(self.base, component, self.path, alone=alone)
        by_name = {key.module: group for key, group in members.items()}

        def fits(name: str, blocks: RowBlocks) -> bool:
            up, down = (by_name[name].parts.get(part) for part in (UP, DOWN))
            if up is None or down is None or "lora_mid.weight" in by_name[name].parts:
                return True
            height = sum(block.height for block in blocks)
            return fits_factors((height, *self.base.shape(blocks[0].name)[1:]), up, down)

        found, rename = FlatNames(self.base, prefix, names).resolve(
            by_name, where, fits=fits, prefix=prefix_of(self.prefix, prefix if self.base.components else "")
        )
        self.notices += rename.notices("the LoRA", component)
        return found

    def _add(self, group: Group, blocks: RowBlocks) -> KohyaLayer:
        """Apply a module's LoRA to its blocks of rows."""
        height = sum(block.height for block in blocks)
        shape = (height, *self.base.shape(blocks[0].name)[1:])
        if any(self.base.shape(block.name)[1:] != shape[1:] for block in blocks):
            raise SourceError(f"{group.where}: the base's {', '.join(repr(block.name) for block in blocks)} differ in columns")  # fmt: skip
        layer = self.build(group, blocks[0].name, shape)
        for block in blocks:
            self._claim(group, block, blocks)
            if layer.update is not None:
                self._add_update(group, layer, block, blocks)
            if layer.weight is not None:
                self._add_addition(group, block.name, block, layer.weight, height)
            if layer.bias is not None:
                self._add_addition(group, block.bias, block, layer.bias, height)
        return layer

    def _claim(self, group: Group, block: RowBlock, blocks: RowBlocks) -> None:
        other = self._claimed.setdefault(f"{block.name} {block.start}", group.name)
        if other != group.name or blocks.count(block) > 1:
            raise SourceError(f"{self.path}: {other!r} and {group.name!r} both adapt the base's {block.name!r}")

    def _add_update(self, group: Group, layer: KohyaLayer, block: RowBlock, blocks: RowBlocks) -> None:
        assert layer.update is not None
        shape = self.base.shape(block.name)
        is_whole = block.height == shape[0]
        update = layer.update
        if not is_one_weight(blocks, self.base):
            if not is_whole and layer.magnitude is not None:
                raise SourceError(
                    f"{group.where}: DoRA of some rows of the base's {block.name!r} is not supported; take a base that has this "
                    "module as a weight of its own, such as diffusers' folder of the same model"
                )
            if not is_whole:
                self._parts.setdefault(block.name, []).append((block, update))
                return
            if layer.kernel:
                raise SourceError(
                    f"{group.where}: DoRA by columns of a module that the base holds in parts is not supported; take a base "
                    "that has this module as one weight, such as the authors' single file"
                )
            update = stack_rows(block.name, shape, [(block, update)], str(self.path))
        if layer.magnitude is not None:
            magnitude = layer.magnitude if layer.kernel else block.take(layer.magnitude)
            # LyCORIS: torch.finfo(dtype).eps of the dtype of dora_scale, which it keeps in float32.
            eps = float(np.finfo(update.dtype).eps)
            update = Decomposed(
                update, self.base, magnitude.astype(update.dtype), bool(layer.kernel), layer.kernel or 1, eps
            )
        self._whole[block.name] = update

    def _add_addition(self, group: Group, name: str, block: RowBlock, array: Array, height: int) -> None:
        """Add the rows of ``array`` in this block; ``height`` is the number of rows of the whole module."""
        if name not in self.base:
            raise SourceError(f"{group.where}: adds to a bias, but the base has no {name!r}")
        shape = self.base.shape(name)
        if len(shape) != 1 or array.shape != (height,) or block.start + block.height > shape[0]:
            raise SourceError(
                f"{group.where}: its addition has shape {list(array.shape)}, the base's {name!r} has {list(shape)}"
            )
        total = self._additions.setdefault(name, np.zeros(shape, array.dtype))
        total[block.start : block.start + block.height] += block.take(array)

    def _updates(self) -> list[Update]:
        fused = {
            name: stack_rows(name, self.base.shape(name), parts, str(self.path))
            for name, parts in self._parts.items()
        }
        return [*self._whole.values(), *fused.values()]


def _checked(path: Path, name: str, part: str, array: Array) -> Array:
    """As ``checked``, but an alpha may be an integer, as some trainers save it."""
    if part == ALPHA and array.dtype.kind in "iu":
        return array.astype(np.float64)
    return checked(path, name, array)


def _check_stored(tensors: Checkpoint, name: str, path: Path) -> None:
    """As ``checked``, in pieces."""
    if not is_float(dtype := tensors.dtype(name)):
        raise SourceError(f"{path}: {name!r} is of dtype {dtype}, not a float")
    size, step = int(np.prod(tensors.shape(name), dtype=object)), 1 << 22
    for start in range(0, size, step):
        checked(path, name, tensors.part(name, start, min(size, start + step)))


def _reason(name: str) -> str:
    if name.startswith("bundle_emb."):
        return "the LoRA is bundled with an embedding of new tokens, which is no change of the base's weights"
    return "it begins with none of kohya's and LyCORIS' prefixes (lora_unet_, lora_te_, lycoris_)"


def _shown(header: Mapping[str, str]) -> dict[str, Any]:
    """Provenance from the header: only short and printable text, since it comes from others."""
    found = {key: header.get(key) for key in _HEADER}
    return {
        key: value
        for key, value in found.items()
        if isinstance(value, str) and 0 < len(value) <= _MOST_SHOWN and value.isprintable()
    }
