"""Which file of a folder holds its weights, by the names that transformers and diffusers give to files.

Names alone decide, so that the same holds for a folder on disk and for the list of a repository's files.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

STEMS = {
    ".safetensors": ("model", "diffusion_pytorch_model"),
    ".bin": ("pytorch_model", "diffusion_pytorch_model"),
}
# model.safetensors.index.json; with a variant, which may not look like a part of the name: model.safetensors.index.fp16.json
_INDEX = re.compile(r"(?P<stem>.+)(?P<ending>\.safetensors|\.bin)\.index\.(?:(?P<variant>[\w-]+)\.)?json")
# model.fp16.safetensors and its shards, model.fp16-00001-of-00002.safetensors or model-00001-of-00002.fp16.safetensors
_OF = r"-\d{5}-of-\d{5}"
_VARIANT = re.compile(
    rf"(?P<stem>[A-Za-z_]+)(?P<old>{_OF})?\.(?P<variant>\w[\w-]*?)(?P<new>{_OF})?(?P<ending>\.safetensors|\.bin)"
)


@dataclass(frozen=True)
class Weights:
    """The file to open, and what there is beside it.

    Attributes:
        name: a file of weights, or an index of several.
        variant: such as ``"fp16"``; None for the plain weights.
        others: the variants that are not taken.
    """

    name: str
    variant: str | None = None
    others: tuple[str, ...] = ()


def is_index(name: str, ending: str | None = None) -> bool:
    """Whether ``name`` is that of an index of shards, of files that end in ``ending``."""
    found = _INDEX.fullmatch(name)
    return found is not None and ending in (None, found["ending"])


def find_weights(names: Collection[str]) -> Weights | None:
    """The weights of a folder with these files, if any has a usual name.

    Plain weights go before variants, safetensors before PyTorch's files, an index before a single file. Several
    variants without plain weights: the first in the alphabet is named, with the others in ``others``.
    """
    variants = _variants(names)
    for ending, stems in STEMS.items():
        for stem in stems:
            for name in (f"{stem}{ending}.index.json", f"{stem}{ending}"):
                if name in names:
                    return Weights(name, None, tuple(variants))
    for variant, name in variants.items():
        return Weights(name, variant, tuple(other for other in variants if other != variant))
    return None


def _variants(names: Iterable[str]) -> dict[str, str]:
    """The file to open by variant."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    for name in names:
        index = _INDEX.fullmatch(name)
        match = index or _VARIANT.fullmatch(name)
        if match is None or match["variant"] is None or match["stem"] not in STEMS[match["ending"]]:
            continue
        if index is None and (match["old"] or match["new"]):
            continue  # a shard, which an index names
        order = (list(STEMS).index(match["ending"]), 0 if index else 1, name)
        found.setdefault(match["variant"], []).append(order)
    return {variant: min(files)[2] for variant, files in sorted(found.items())}
