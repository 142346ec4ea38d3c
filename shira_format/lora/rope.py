"""The two row orders that rotary embeddings have within a head, and the number of heads of a base.

Hugging Face rotates row ``i`` of a head together with row ``i + n/2``; Meta's code, llama.cpp (for Llama and similar) and
torchtune rotate row ``2i`` with ``2i + 1``. A conversion between them permutes the rows of the query and key weights, and
so those of ``lora_B``, within each head. ``lora_A`` is the same for both.
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
from shira_format.storage.paths import is_file

CONFIG = "config.json"


@dataclass(frozen=True)
class Attention:
    """A base's attention.

    Attributes:
        kind: the model's type: ``model_type`` of Hugging Face, or GGUF's name of its architecture.
        query: number of query heads.
        key: number of key heads.
    """

    kind: str
    query: int
    key: int


def attention_of(base: Checkpoint, where: object) -> Attention:
    """The model's type and heads, from a GGUF's header or from ``config.json`` beside the base.

    Raises:
        SourceError: neither exists or states them; the message begins with ``where``.
    """
    if isinstance(base, GGUFCheckpoint):
        header = base.header
        kind = header["general.architecture"]
        query, key = (header.get(f"{kind}.{HEADS[stem]}") for stem in ("attn_q", "attn_k"))
        return _attention(base.path, where, kind, query, key)
    path = None if base.folder is None else base.folder / CONFIG
    if path is None or not is_file(path):
        raise SourceError(
            f"{where}: the rows of queries and keys have another rotary embedding's order within each head: the number of "
            f"heads is needed, but {base.path} has no {CONFIG} beside it and is no GGUF file"
        )
    config = read_json(path)
    if isinstance(inner := config.get("text_config"), dict):
        config = inner
    return _attention(
        path, where, config.get("model_type"), config.get("num_attention_heads"), config.get("num_key_value_heads")
    )


def _attention(path: Path, where: object, kind: Any, query: Any, key: Any) -> Attention:
    if key is None:  # as many key heads as query heads
        key = query
    if not isinstance(kind, str) or not is_rank(query) or not is_rank(key):
        raise SourceError(f"{where}: {path} does not state the model's type and number of heads")
    return Attention(kind, query, key)


def deinterleave_heads(rows: Array, heads: int, where: object) -> Array:
    """``rows``, ``[n, ...]``, in Hugging Face's order: of each head the even, then the odd ones.

    Raises:
        SourceError: a head would not have an even number of rows; the message begins with ``where``.
    """
    if rows.ndim < 1 or rows.shape[0] % (2 * heads):
        raise SourceError(
            f"{where}: shape {list(rows.shape)} cannot be split into {heads} heads of an even number of rows"
        )
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
