"""Embeddings and heads that are saved whole with more or fewer rows than the base's: those of a vocabulary that was resized."""

from __future__ import annotations

import re
from collections.abc import Mapping

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError

EMBEDDINGS = re.compile(
    r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings?|embed_in|tok_embeddings|tokens_embed|embeddings|shared)\.weight"
)
HEAD = re.compile(r"(?:.*\.)?(?:lm_head|embed_out|output_layer)\.weight")


def is_resized(name: str, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether embeddings or a head differ from the base's in their number of rows alone."""
    is_vocabulary = EMBEDDINGS.fullmatch(name) or HEAD.fullmatch(name)
    return (
        bool(is_vocabulary) and len(before) == len(after) == 2 and before[0] != after[0] and before[1] == after[1]
    )


def resized_notices(found: Mapping[str, Array], base: Checkpoint, where: object) -> list[str]:
    """What to tell the user of the tensors in ``found`` that replace the base's with another number of rows.

    Raises:
        SourceError: other tensors of the vocabulary, in ``found`` or the base, have another number.
    """
    resized = {
        name: array
        for name, array in found.items()
        if name in base and is_resized(name, base.shape(name), array.shape)
    }
    if not resized:
        return []
    first, array = next(iter(resized.items()))
    before, after = base.shape(first)[0], array.shape[0]
    for name in {**dict.fromkeys(base), **found}:
        weight = (
            name.removesuffix("bias") + "weight" if HEAD.fullmatch(name.removesuffix("bias") + "weight") else name
        )
        if not EMBEDDINGS.fullmatch(weight) and not HEAD.fullmatch(weight):
            continue
        rows = found[name].shape[0] if name in found else base.shape(name)[0]
        if rows != after and (name in resized or name not in base or base.shape(name)[0] == before):
            raise SourceError(
                f"{where}: {first!r} has {after} rows, the base {before} (a resized vocabulary), but {name!r} has {rows}: merge the adapter "
                "with PEFT and convert the full checkpoint (full_to_shira)"
            )
    names = ", ".join(map(repr, resized))
    words = f"{after} rows, the base has {before} (a resized vocabulary): replaced whole"
    return [f"{names}: {words}; set vocab_size to {after} in config.json of the result"]
