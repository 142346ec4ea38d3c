"""The UNet of Stable Diffusion, in SGM's names (``input_blocks.4.1``) and diffusers'.

SGM is the code of its authors; single-file checkpoints and most LoRAs of SDXL use its names. It numbers all blocks of a
side consecutively, where diffusers (``down_blocks.1.attentions.0``) counts levels, and kinds of layers within a level.
How many there are is read from the names of the UNet at hand. Within an attention both agree.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import count

from shira_format.names.models.locations import whole
from shira_format.names.models.tables import Marks, ShapeOf
from shira_format.names.row_blocks import Location

_THEIRS = Marks(("input_blocks.0.0.weight", "middle_block.0.in_layers.2.weight"))
_OURS = Marks(
    ("down_blocks.0.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.weight"), ("transformer_in.norm.weight",)
)

_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    # What SDXL adds to the time is, for some UNets of SD 2, a class.
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_DOWNSAMPLER = {"conv": "op"}
_MIDDLE = (
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
)

_BLOCK = re.compile(r"(?:down|up)_blocks\.\d+\.\w+\.\d+|mid_block\.\w+\.\d+|(?:in|out)put_blocks\.\d+\.\d+|middle_block\.\d+")  # fmt: skip


def unet(names: Collection[str], shape: ShapeOf) -> dict[str, Location]:
    """See :data:`shira_format.names.spaces.Table`."""
    theirs = _THEIRS.fit(names)
    if not theirs and not _OURS.fit(names):
        return {}
    known = {match[0] for match in map(_BLOCK.match, names) if match}
    samplers = {name.removesuffix(".weight") for name in names if name.endswith((".op.weight", ".conv.weight"))}
    pairs = dict([*_MIDDLE, *(_blocks_of_sgm(known, samplers) if theirs else _blocks_of_diffusers(known))])
    modules = _Modules(pairs, theirs=theirs)
    found = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        if shape(name):
            found.update({f"{other}.{kind}": whole(name, shape(name)) for other in modules.others(module)})
    return found


class _Modules:
    """The names of modules in the other name space."""

    def __init__(self, blocks: Mapping[str, str], *, theirs: bool) -> None:
        """Args: ``blocks``: from diffusers' names to SGM's; ``theirs``: whether the modules have SGM's."""
        pairs = ((ours, sgm, _layers_of(ours)) for ours, sgm in blocks.items())
        if theirs:
            self._blocks = {sgm: (ours, layers and _inverted(layers)) for ours, sgm, layers in pairs}
        else:
            self._blocks = {ours: (sgm, layers) for ours, sgm, layers in pairs}
        self._ends: dict[str, list[str]] = {}
        for ours, sgm in _ENDS.items():
            self._ends.setdefault(sgm if theirs else ours, []).append(ours if theirs else sgm)

    def others(self, module: str) -> Iterable[str]:
        """All names that a module has there; mostly one."""
        if module in self._ends:
            return self._ends[module]
        match = _BLOCK.match(module)
        if match is None or match[0] not in self._blocks:
            return ()
        block, layers = self._blocks[match[0]]
        inner = module[match.end() + 1 :]
        other = inner if layers is None else layers.get(inner)
        return () if other is None else (f"{block}.{other}",)


def _inverted(table: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}


def _layers_of(block: str) -> Mapping[str, str] | None:
    """The layers of a block with this name in diffusers, by their names there; None if both sets agree on them."""
    return _RESNET if ".resnets." in block else _DOWNSAMPLER if ".downsamplers." in block else None


def _blocks_of_diffusers(known: Collection[str]) -> Iterator[tuple[str, str]]:
    """The blocks on both sides of a UNet with diffusers' names: diffusers' name and SGM's."""
    number = 1
    for block, layers in _levels("down_blocks", known):
        for layer in range(layers):
            yield f"{block}.resnets.{layer}", f"input_blocks.{number}.0"
            yield f"{block}.attentions.{layer}", f"input_blocks.{number}.1"
            number += 1
        if f"{block}.downsamplers.0" in known:
            yield f"{block}.downsamplers.0", f"input_blocks.{number}.0"
            number += 1
    number = 0
    for block, layers in _levels("up_blocks", known):
        for layer in range(layers):
            yield f"{block}.resnets.{layer}", f"output_blocks.{number}.0"
            yield f"{block}.attentions.{layer}", f"output_blocks.{number}.1"
            number += 1
        # It is in the last block of its level, after the attention if there is one.
        place = 2 if f"{block}.attentions.0" in known else 1
        yield f"{block}.upsamplers.0", f"output_blocks.{number - 1}.{place}"


def _levels(side: str, known: Collection[str]) -> Iterator[tuple[str, int]]:
    """The levels of one side by diffusers' name, each with its number of layers."""
    for level in count():
        block = f"{side}.{level}"
        layers = next(layer for layer in count() if f"{block}.resnets.{layer}" not in known)
        if not layers:
            return
        yield block, layers


def _blocks_of_sgm(known: Collection[str], samplers: Collection[str]) -> Iterator[tuple[str, str]]:
    """As :func:`_blocks_of_diffusers`, of a UNet with SGM's names; ``samplers`` are its layers ``op`` and ``conv``."""
    level = layer = 0
    for number in count(1):
        block = f"input_blocks.{number}"
        if f"{block}.0" not in known:
            break
        if f"{block}.0.op" in samplers:
            yield f"down_blocks.{level}.downsamplers.0", f"{block}.0"
            level, layer = level + 1, 0
            continue
        yield f"down_blocks.{level}.resnets.{layer}", f"{block}.0"
        yield f"down_blocks.{level}.attentions.{layer}", f"{block}.1"
        layer += 1
    level = layer = 0
    for number in count():
        block = f"output_blocks.{number}"
        if f"{block}.0" not in known:
            break
        yield f"up_blocks.{level}.resnets.{layer}", f"{block}.0"
        place = next((place for place in (1, 2) if f"{block}.{place}.conv" in samplers), None)
        if place != 1:
            yield f"up_blocks.{level}.attentions.{layer}", f"{block}.1"
        layer += 1
        if place is not None:
            yield f"up_blocks.{level}.upsamplers.0", f"{block}.{place}"
            level, layer = level + 1, 0
