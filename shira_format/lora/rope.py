"""The two orders of a head's rows that rotary embeddings have, and what a base says of its heads.

Hugging Face turns row ``i`` of a head together with row ``i + n/2``; Meta's code, llama.cpp (for Llama and its like) and
torchtune turn row ``2i`` with ``2i + 1``. Whoever converts between them moves the rows of the query and key weights,
and so those of ``lora_B``, head by head. ``lora_A`` stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint
from shira_format.checkpoints.gguf import GGUFCheckpoint
from shira_format.checkpoints.gguf_names import HEADS
from shira_format.errors import SourceError
from shira_format.lora.files import is_rank, read_json

CONFIG = "config.json"


@dataclass(frozen=True)
class Attention:
    """What a base says of its attention.

    Attributes:
        kind: the model's type: ``model_type`` of Hugging Face, or GGUF's name of its architecture.
        query: how many heads the queries have.
        key: how many the keys have.
    """

    kind: str
    query: int
    key: int


def attention_of(base: Checkpoint, where: object) -> Attention:
    """The model's type and heads, from a GGUF's header or from ``config.json`` beside the base.

    Raises:
        SourceError: neither is there, or it does not say; the message begins with ``where``.
    """
    if isinstance(base, GGUFCheckpoint):
        header = base.header
        kind = header["general.architecture"]
        query, key = (header.get(f"{kind}.{HEADS[stem]}") for stem in ("attn_q", "attn_k"))
        return _attention(base.path, where, kind, query, key)
    path = None if base.folder is None else base.folder / CONFIG
    if path is None or not path.is_file():
        raise SourceError(
            f"{where}: the rows of queries and keys are in the order of another rotary embedding, head by head: the "
            f"number of heads is needed, but {base.path} has no {CONFIG} beside it and is no GGUF file"
        )
    config = read_json(path)
    if isinstance(inner := config.get("text_config"), dict):
        config = inner
    return _attention(
        path, where, config.get("model_type"), config.get("num_attention_heads"), config.get("num_key_value_heads")
    )


def _attention(path: Path, where: object, kind: Any, query: Any, key: Any) -> Attention:
    if key is None:  # a model that does not say has as many of both
        key = query
    if not isinstance(kind, str) or not is_rank(query) or not is_rank(key):
        raise SourceError(f"{where}: {path} does not say what the model is and how many heads it has")
    return Attention(kind, query, key)


def halves(rows: Array, heads: int, where: object) -> Array:
    """``rows`` (``[n, ...]``) of neighbours in pairs, in Hugging Face's order: of each head the even, then the odd ones.

    Raises:
        SourceError: they are not pairs in every head; the message begins with ``where``.
    """
    if rows.ndim < 1 or rows.shape[0] % (2 * heads):
        raise SourceError(f"{where}: shape {list(rows.shape)} has no pairs of rows for {heads} heads")
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
