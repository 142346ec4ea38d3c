"""Which file of a folder holds its weights, by the file names of transformers and diffusers.

Only names are used, so that the same code works for a folder on disk and for the file list of a repository.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

# How the names of files begin that trainers save next to the weights.
TRAINING = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")
STEMS = {
    ".safetensors": ("model", "diffusion_pytorch_model"),
    ".bin": ("pytorch_model", "diffusion_pytorch_model"),
}
# model.safetensors.index.json; with a variant: model.safetensors.index.fp16.json
_INDEX = re.compile(r"(?P<stem>.+)(?P<ending>\.safetensors|\.bin)\.index\.(?:(?P<variant>[\w-]+)\.)?json")
# model.fp16.safetensors and its shards, model.fp16-00001-of-00002.safetensors or model-00001-of-00002.fp16.safetensors
_OF = r"-\d{5}-of-\d{5}"
SHARD = re.compile(rf"{_OF}(?=(?:\.[\w-]+)?\.\w+$)")  # one of several files of a model
_VARIANT = re.compile(
    rf"(?P<stem>[A-Za-z_]+)(?P<old>{_OF})?\.(?P<variant>\w[\w-]*?)(?P<new>{_OF})?(?P<ending>\.safetensors|\.bin)"
)


_DTYPE = re.compile(r"(?:bf|fp|f)\d+")


@dataclass(frozen=True)
class WeightFiles:
    """The file to open, and the variants beside it.

    Attributes:
        name: a file of weights, or an index of several.
        variant: such as ``"fp16"``; None for the plain weights.
        others: the variants that are not used.
    """

    name: str
    variant: str | None = None
    others: tuple[str, ...] = ()


def is_index(name: str, ending: str | None = None) -> bool:
    """Whether ``name`` is that of an index of shards; with ``ending``, of shards with that ending."""
    found = _INDEX.fullmatch(name)
    return found is not None and ending in (None, found["ending"])


def find_weights(names: Collection[str]) -> WeightFiles | None:
    """The weights of a folder with these files; None if none has a standard name.

    Plain weights are preferred to variants, safetensors to PyTorch files, an index to a single file. Of several variants
    without plain weights, the first in alphabetical order is returned, with the others in ``others``.
    """
    variants = _variants(names)
    for ending, stems in STEMS.items():
        for stem in stems:
            for name in (f"{stem}{ending}.index.json", f"{stem}{ending}"):
                if name in names:
                    return WeightFiles(name, None, tuple(variants))
    for variant, name in variants.items():
        return WeightFiles(name, variant, tuple(other for other in variants if other != variant))
    return None


def is_in_other_dtype(name: str) -> bool:
    """Whether ``name`` is that of a variant, such as "fp16", that has the plain weights in another dtype."""
    match = _VARIANT.fullmatch(name)
    return (
        match is not None
        and match["stem"] in STEMS[match["ending"]]
        and _DTYPE.fullmatch(match["variant"]) is not None
    )


def _variants(names: Iterable[str]) -> dict[str, str]:
    """The file to open for each variant."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    for name in names:
        index = _INDEX.fullmatch(name)
        match = index or _VARIANT.fullmatch(name)
        if match is None or match["variant"] is None or match["stem"] not in STEMS[match["ending"]]:
            continue
        if index is None and (match["old"] or match["new"]):
            continue  # a shard, listed in an index
        order = (list(STEMS).index(match["ending"]), 0 if index else 1, name)
        found.setdefault(match["variant"], []).append(order)
    return {variant: min(files)[2] for variant, files in sorted(found.items())}
