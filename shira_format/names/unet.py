"""The two sets of names that the UNet of Stable Diffusion has: SGM's (``input_blocks.4.1``) and diffusers'.

SGM is the code of its authors, by whose names single-file checkpoints and most LoRAs of SDXL go. It numbers all blocks
of one side through, where diffusers (``down_blocks.1.attentions.0``) counts levels, and kinds of layers within a level.
How many there are is read from the names of the UNet at hand. Within an attention both agree.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from itertools import count

_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
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
_MIDDLE = [
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
]

_BLOCK = re.compile(r"(?:down|up)_blocks\.\d+\.\w+\.\d+|mid_block\.\w+\.\d+|(?:in|out)put_blocks\.\d+\.\d+|middle_block\.\d+")  # fmt: skip


def other_names(modules: Collection[str]) -> dict[str, str]:
    """What modules of a UNet are called in the other set of names; without those that have no name there.

    Args:
        modules: the names of all of its modules that have weights, in either set, with nothing before them. Those of
            another model have no other names.
    """
    from_sgm = "input_blocks.0.0" in modules
    blocks = dict(_pairs(modules, from_sgm=from_sgm))
    ends = {theirs: ours for ours, theirs in _ENDS.items()} if from_sgm else _ENDS
    if from_sgm:
        blocks = {theirs: ours for ours, theirs in blocks.items()}
    found = {}
    for module in modules:
        if module in ends:
            found[module] = ends[module]
        elif (match := _BLOCK.match(module)) and (block := blocks.get(match[0])):
            inner = _inner(match[0] if not from_sgm else block, module[match.end() + 1 :], from_sgm=from_sgm)
            if inner is not None:
                found[module] = f"{block}.{inner}"
    return found


def _inner(block: str, inner: str, *, from_sgm: bool) -> str | None:
    """The other name of a layer within ``block``, which is diffusers' name of it."""
    table = _RESNET if ".resnets." in block else _DOWNSAMPLER if ".downsamplers." in block else None
    if table is None:
        return inner
    return ({theirs: ours for ours, theirs in table.items()} if from_sgm else table).get(inner)


def _pairs(modules: Collection[str], *, from_sgm: bool) -> Iterator[tuple[str, str]]:
    """The blocks that hold layers: diffusers' name and SGM's."""
    known = {match[0] for match in map(_BLOCK.match, modules) if match}
    yield from _MIDDLE
    if from_sgm:
        yield from _of_sgm(known, {module for module in modules if module.endswith((".op", ".conv"))})
    else:
        yield from _of_diffusers(known)


def _of_diffusers(known: set[str]) -> Iterator[tuple[str, str]]:
    number = 1
    for level in count():
        block = f"down_blocks.{level}"
        if f"{block}.resnets.0" not in known:
            break
        for layer in count():
            if f"{block}.resnets.{layer}" not in known:
                break
            yield f"{block}.resnets.{layer}", f"input_blocks.{number}.0"
            yield f"{block}.attentions.{layer}", f"input_blocks.{number}.1"
            number += 1
        if f"{block}.downsamplers.0" in known:
            yield f"{block}.downsamplers.0", f"input_blocks.{number}.0"
            number += 1
    number = 0
    for level in count():
        block = f"up_blocks.{level}"
        if f"{block}.resnets.0" not in known:
            break
        for layer in count():
            if f"{block}.resnets.{layer}" not in known:
                break
            yield f"{block}.resnets.{layer}", f"output_blocks.{number}.0"
            yield f"{block}.attentions.{layer}", f"output_blocks.{number}.1"
            number += 1
        # It stands in the last block of its level, after the attention if there is one.
        place = 2 if f"{block}.attentions.0" in known else 1
        yield f"{block}.upsamplers.0", f"output_blocks.{number - 1}.{place}"


def _of_sgm(known: set[str], samplers: set[str]) -> Iterator[tuple[str, str]]:
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
