"""XLabs' LoRAs of FLUX.1: attention processors, ``double_blocks.0.processor.qkv_lora1.down.weight``.

The rules are those of x-flux (XLabs-AI/x-flux, ``flux/modules/layers.py``): ``delta W = up @ down``. Its linear layers have
a ``network_alpha``, which it never sets or saves. ``lora1`` adapts the image's stream, ``lora2`` the text's. In a single
block, ``qkv_lora`` adapts the first rows of ``linear1``, whose others feed the MLP, and ``proj_lora`` adapts ``linear2``. The
weight that x-flux applies when it loads a LoRA (0.7 by default, on both factors) is the user's choice and not in the file:
it is 1 here, as in diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.base import Lora, Update
from shira_format.lora.files import PICKLES, SAFETENSORS, open_tensors, read_tensors
from shira_format.lora.keys import check_pairs, group_keys
from shira_format.lora.products import low_rank
from shira_format.lora.row_stack import stack_rows
from shira_format.names.components import component_names
from shira_format.names.flux import flux_parts, is_diffusers_flux
from shira_format.names.prefixes import match_names, prefix_of
from shira_format.names.row_blocks import RowBlock

_KEY = re.compile(
    r"(?:diffusion_model\.)?(?P<block>(?P<kind>double|single)_blocks\.(?:0|[1-9][0-9]*))\.processor\."
    r"(?P<layer>\w+)\.(?P<part>down|up)\.weight"
)
# The modules of FLUX's authors.
_LAYERS = {
    "double": {
        "qkv_lora1": "img_attn.qkv", "proj_lora1": "img_attn.proj", "qkv_lora2": "txt_attn.qkv",
        "proj_lora2": "txt_attn.proj",
    },
    "single": {"qkv_lora": "linear1", "proj_lora": "linear2"},
}  # fmt: skip
_QKV = 3  # parts of linear1 before the MLP's: q, k, v


class _Layer(NamedTuple):
    down: Array
    up: Array
    key: str  # of ``up``, for messages


# A layer's updates, given its module.
_Resolve = Callable[[str, _Layer], list[Update]]


class Xlabs:
    """Files that x-flux writes."""

    name = "xlabs"

    def recognises(self, path: Path) -> bool:
        file = _find(path)
        if file is None:
            return False
        try:
            return any(map(_parse, open_tensors(file)))
        except SourceError:  # of another kind than tensors
            return False

    def read(self, path: Path, base: Checkpoint, prefix: str | None = None) -> Lora:
        file = _find(path)
        if file is None:
            raise SourceError(f"{path}: no LoRA of XLabs: need one {SAFETENSORS} file")
        return _Reader(file, base, prefix).read()


def _find(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix in (SAFETENSORS, *PICKLES) else None
    files = [file for file in path.iterdir() if file.is_file() and file.suffix == SAFETENSORS]
    return files[0] if len(files) == 1 else None


def _parse(key: str) -> tuple[str, str] | None:
    """The module, by the name of FLUX's authors, and the factor."""
    match = _KEY.fullmatch(key)
    if match is None or match["layer"] not in _LAYERS[match["kind"]]:
        return None
    return f"{match['block']}.{_LAYERS[match['kind']][match['layer']]}", match["part"]


class _Reader:
    """Turns the tensors of one file into updates."""

    def __init__(self, path: Path, base: Checkpoint, prefix: str | None) -> None:
        self.path = path
        self.prefix = prefix
        self.base = base
        self.notices: list[str] = []

    def read(self) -> Lora:
        layers = self._layers(read_tensors(self.path, self.base)[0])
        resolve = self._resolver(list(layers))
        return Lora(
            updates=[update for module, layer in layers.items() for update in resolve(module, layer)],
            source={
                "kind": "lora",
                "dialect": "xlabs",
                "ranks": sorted({layer.down.shape[0] for layer in layers.values()}),
            },
            files=[self.path],
            notices=self.notices,
        )

    def _layers(self, tensors: Mapping[str, Array]) -> dict[str, _Layer]:
        groups = group_keys(tensors, _parse, self.path, "x-flux has no such LoRA")
        check_pairs(groups.values(), self.path)
        layers = {}
        for module, keys in groups.items():
            down, up = tensors[keys["down"]], tensors[keys["up"]]
            if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
                raise SourceError(
                    f"{self.path}: {keys['down']!r} of shape {list(down.shape)} and {keys['up']!r} of shape "
                    f"{list(up.shape)} are not two matrices with a rank in common"
                )
            layers[module] = _Layer(down, up, keys["up"])
        return layers

    def _resolver(self, modules: list[str]) -> _Resolve:
        prefix, names = "", list(self.base)
        if self.base.components:
            prefix, names = component_names(self.base, "transformer", self.path, alone=True)
        if is_diffusers_flux(names):
            return self._in_diffusers(prefix, names)
        rename = match_names(
            [f"{module}.weight" for module in modules], names, self.path, prefix=prefix_of(self.prefix, prefix)
        )
        self.notices += rename.notices("the LoRA")
        return lambda module, layer: [self._in_original(module, layer, lambda name: prefix + rename(name))]

    def _in_diffusers(self, prefix: str, names: list[str]) -> _Resolve:
        """For a base with diffusers' names, where several modules are rows of one of the authors'."""
        fused = flux_parts(names, lambda name: self.base.shape(prefix + name)[0])

        def resolve(module: str, layer: _Layer) -> list[Update]:
            if module not in fused:
                raise SourceError(f"{self.path}: {layer.key!r}: the base has no such block")
            adapted = fused[module][:_QKV]
            self._check_rows(layer, adapted[-1].rows[-1][1])
            where = f"{self.path}: {layer.key!r}"
            return [
                low_rank(name, self.base.shape(name), part.take(layer.up), layer.down, 1.0, where)
                for part in adapted
                for name in (f"{prefix}{part.module}.weight",)
            ]

        return resolve

    def _in_original(self, module: str, layer: _Layer, rename: Callable[[str], str]) -> Update:
        name, where = rename(f"{module}.weight"), f"{self.path}: {layer.key!r}"
        shape = self.base.shape(name)
        if not module.endswith("linear1"):
            return low_rank(name, shape, layer.up, layer.down, 1.0, where)
        output = rename(f"{module.removesuffix('linear1')}linear2.weight")
        if output not in self.base or len(shape) != 2:
            raise SourceError(
                f"{where}: the base has no {output!r}, whose size determines how the rows of {name!r} are split"
            )
        rows = 3 * self.base.shape(output)[0]
        self._check_rows(layer, rows)
        if rows >= shape[0]:
            raise SourceError(f"{where}: the base's {name!r} has shape {list(shape)}, no more than {rows} rows")
        update = low_rank(name, (rows, shape[1]), layer.up, layer.down, 1.0, where)
        return stack_rows(name, shape, [(RowBlock(name, 0, ((0, rows),)), update)], where)

    def _check_rows(self, layer: _Layer, rows: int) -> None:
        if layer.up.shape[0] != rows:
            raise SourceError(
                f"{self.path}: {layer.key!r} has shape {list(layer.up.shape)}, the base has {rows} rows to adapt"
            )
