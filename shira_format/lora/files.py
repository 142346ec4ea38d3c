"""Files of LoRAs: tensors by key, from safetensors or ``torch.save``, and JSON. Needs no torch; no pickle is executed.

Keys are read as a saved adapter has them: without the words of wrappers (:mod:`shira_format.checkpoints.wrapped`), also in
kohya's form, in which "." is "_", and without PEFT's name of the adapter (``lora_A.default.weight``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.dtypes import is_float, working_dtype
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.checkpoints.wrapped import (
    CERTAIN,
    MODULE,
    UnwrappedCheckpoint,
    by_plain,
    notice_of,
    unwrapped_names,
)
from shira_format.errors import SourceError
from shira_format.lora.keys import FLAT
from shira_format.storage.paths import MOST_JSON, read_file

SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def open_tensors(path: Path, base: Collection[str] | None = None) -> Checkpoint:
    """The tensors of one file by the keys that a saved adapter has.

    Args:
        path: the file.
        base: the base's names; a wrapper's word that occurs in them is kept in keys.

    Raises:
        SourceError: neither a safetensors file nor one of ``torch.save``, or it holds other things than tensors.
        FormatError: a damaged safetensors file.
    """
    if not path.is_file() or path.suffix not in (SAFETENSORS, *PICKLES):
        raise SourceError(f"{path}: need a file that ends in {SAFETENSORS}, {', '.join(PICKLES)}")
    return unwrapped_adapter(open_checkpoint(path, wrapped=True), base)


# Entries that state a LoRA's scale, by the last part of their path: lora_alpha, network_alphas, rank, r.
_OF_SCALE = re.compile(r"(?:\A|[/._])(?:\w*alphas?|(?:lora_|network_)?(?:rank|dim|scale)|lora_r|r|scaling)\Z")
_LONGEST_PATH = 200  # characters of such a path: a longer one of underscores alone would take for ever


def refuse_scale_beside(tensors: Checkpoint) -> None:
    """Refuse a file of ``torch.save`` with a scale beside its tensors, for which each program has another place and rule.

    Raises:
        SourceError: there is one; the message names it.
    """
    if (stated := next(filter(_is_of_scale, tensors.beside), None)) is not None:
        raise SourceError(
            f"{tensors.path}: {stated!r} lies beside the tensors, and may change their scale: save the tensors alone, with a tensor "
            "MODULE.alpha for each module if the scale is not that of a file without alphas"
        )


def _is_of_scale(key: str) -> bool:
    return _OF_SCALE.search(key[-_LONGEST_PATH:]) is not None


def read_tensors(path: Path, base: Collection[str]) -> tuple[dict[str, Array], dict[str, str]]:
    """All tensors of one file by key, checked as in :func:`checked`, and its ``__metadata__``.

    Raises:
        SourceError: as :func:`open_tensors` and :func:`checked`.
        FormatError: a damaged safetensors file.
    """
    tensors = open_tensors(path, base)
    found = {key: checked(path, key, tensors[key]) for key in tensors}
    return found, tensors.metadata(path.name)


def checked(path: Path, key: str, array: Array) -> Array:
    """``array``, whose dtype must be a float, and whose values finite.

    Raises:
        SourceError: they are not.
    """
    if not is_float(array.dtype):
        raise SourceError(f"{path}: {key!r} is of dtype {array.dtype}, not a float")
    if not np.isfinite(array.astype(working_dtype(array.dtype))).all():
        raise SourceError(f"{path}: {key!r} holds NaN or Inf")
    return array


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        SourceError: not a JSON object, or too large.
    """
    return parse_json(read_file(path, MOST_JSON), path)


def parse_json(text: str | bytes, where: object) -> dict[str, Any]:
    """The JSON object in ``text``.

    Raises:
        SourceError: not a JSON object; the message begins with ``where``.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: unreadable JSON: {error}") from None
    if not isinstance(found, dict):
        raise SourceError(f"{where}: not a JSON object but {type(found).__name__}")
    return found


def is_rank(value: Any) -> bool:
    """Whether a configuration's value can be a rank."""
    return type(value) is int and value > 0


def is_number(value: Any) -> bool:
    """Whether a configuration's value is a finite number."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def number_in(array: Array, key: str, path: Path) -> float:
    """The number in a tensor of one element such as ``alpha``.

    Raises:
        SourceError: it has more or no elements.
    """
    if array.size != 1:
        raise SourceError(f"{path}: {key!r} has shape {list(array.shape)}, not one number")
    return float(array.reshape(()).astype(np.float64))


_FLAT_WORD = re.compile(rf"(?:(?<=_)|\A)(?:{'|'.join(CERTAIN)})_")
# A part of PEFT's with the name of an adapter in it.
_NAMED = re.compile(
    r"\.(?:lora_[AB]\.([^.]+)(?=\.(?:weight|bias)\Z)|lora_magnitude_vector\.(?!weight\Z)([^.]+)(?=\.weight\Z|\Z)"
    r"|(?:lora_embedding_[AB]|trainable_tokens_delta|shira_(?:indices|weight)|supertuning_(?:indices|values))\.([^.]+)\Z"
    # Those of its other tuners.
    r"|(?:oft_R|oft_embedding_R|gralora_[AB]_general)\.([^.]+)(?=\.weight\Z)|ln_tuning_layers\.([^.]+)(?=\.(?:weight|bias)\Z)|glora_[A-E]\.([^.]+)(?=\.(?:X[du]?|zeros)\Z)"
    r"|lora_[ABE]\.(?!(?:weight|bias)\Z)([^.]+)\Z|(?:boft_[Rs]|hra_u|road_(?:theta|alpha)|ia3_l|beft_bias|hada_(?:w[12]_[ab]|t[12])"
    r"|lokr_(?:w[12](?:_[ab])?|t2)|hira_(?:embedding_)?[AB]|delora_(?:[AB]|lambda|w_norm)|gralora_[AB]|vera_(?:lambda_[bd]|[AB])|randlora_(?:lambda|gamma|[AB])"
    r"|vblora_(?:logits_[AB](?:_topk_(?:indices|weights))?|vector_bank)|miss_block|c3a_kernel|fourierft_spectrum)\.([^.]+)\Z)"
)
_BARE = re.compile(r"\.lora_[AB]\.weight\Z")
_SAVED = re.compile(r"\.modules_to_save\.(?P<name>[^.]+)\.(?P<rest>.+)\Z", re.DOTALL)
_DEFAULT = "default"  # PEFT's name for an adapter without one


def unwrapped_adapter(tensors: Checkpoint, base: Collection[str] | None = None) -> Checkpoint:
    """The tensors of an adapter by the keys of :func:`unwrapped_keys`; ``tensors`` itself if these are its keys."""
    keys = unwrapped_keys(tensors, base, tensors.path)
    if all(short == key for short, key in keys.items()):
        return tensors
    return UnwrappedCheckpoint(tensors, keys, notice_of(keys, tensors.path))


def unwrapped_keys(keys: Collection[str], base: Collection[str] | None, where: object) -> dict[str, str]:
    """The keys by what they are without the words of wrappers and the name of an adapter, in the same order.

    Args:
        keys: of an adapter.
        base: the base's names; a word that occurs in them is kept.
        where: the file, for messages.

    Raises:
        SourceError: two keys become one, or there are keys of several adapters.
    """
    known = [] if base is None else base
    unnamed = {key: _without_flat(short, known) for short, key in unwrapped_names(keys, known, where).items()}
    return by_plain(_without_adapter_name(unnamed, known, where), where)


def _without_flat(key: str, base: Iterable[str]) -> str:
    if (match := FLAT.match(key)) is None or "." not in key:
        return key
    module = _FLAT_WORD.sub("", match["module"])
    if module.startswith(f"{MODULE}_") and not any(name.rpartition("/")[2].startswith(MODULE) for name in base):
        module = module.removeprefix(f"{MODULE}_")
    return f"{match['prefix']}_{module}{key[match.end() :]}"


def _without_adapter_name(keys: Mapping[str, str], base: Iterable[str], where: object) -> dict[str, str]:
    """The keys, by the file's, as PEFT saves them."""
    named = {}
    for key, short in keys.items():
        if match := _NAMED.search(short):
            named[key] = next(filter(None, match.groups()))
    adapters = set(named.values())
    bare = [key for key, short in keys.items() if _BARE.search(short)]
    if named and bare:
        raise SourceError(f"{where}: {next(iter(named))!r} has the name of an adapter in it and {bare[0]!r} has none: save one adapter alone")  # fmt: skip
    found = {}
    tails: set[str] | None = None
    for key, short in keys.items():
        found[key] = short
        if key in named:
            found[key] = _NAMED.sub(lambda match: match[0][: match[0].rindex(".")], short)
        elif match := _SAVED.search(short):
            tails = _tails(base) if tails is None else tails
            module = short[: match.start()].rpartition(".")[2]
            # Files of older versions of PEFT have a submodule there instead.
            is_submodule = f"{module}.{match['name']}.{match['rest']}" in tails
            is_known = match["name"] in (*adapters, _DEFAULT) or f"{module}.{match['rest']}" in tails
            if is_known and not is_submodule:
                adapters.add(match["name"])
                found[key] = f"{short[: match.start()]}.modules_to_save.{match['rest']}"
    if len(adapters) > 1:
        first, second, *_ = sorted(adapters)
        raise SourceError(
            f"{where}: it has keys of several adapters, {first!r} and {second!r}: save one of them alone"
        )
    return found


def _tails(names: Iterable[str]) -> set[str]:
    """The ends of names from two parts on."""
    found = set()
    for name in names:
        parts = name.rpartition("/")[2].split(".")
        found |= {".".join(parts[-n:]) for n in range(2, len(parts) + 1)}
    return found
