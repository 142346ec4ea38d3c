"""How indices become bytes: a registry of codecs, one file each.

A new codec is a new module with an :class:`IndexCodec` and one line in :data:`CODECS` (and a feature name in the
spec, so that old readers refuse what they cannot read). ``shared`` is not here: it needs the other tensor, so the reader
resolves it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shira_format._core.arrays import Array, Indices
from shira_format.format.codecs.base import Encoded, IndexCodec, IndexRange, cut
from shira_format.format.codecs.classes import Classes, encode_classes
from shira_format.format.codecs.flat import Flat
from shira_format.format.codecs.gaps import Gap8, Varint
from shira_format.format.codecs.magnitude import Magnitude, encode_largest
from shira_format.format.codecs.runs import Runs
from shira_format.format.codecs.seeded import Seeded, encode_drawn
from shira_format.format.codecs.structured import Structured

BLOCK_SIZE = 4096  # entries per block: 16 bytes of directory for each are 0.03 bits an entry

# Those that our writer chooses from; flat is never smaller than varint.
_WRITTEN: tuple[IndexCodec, ...] = (Gap8(), Varint(), Structured())
# One that readers of version 1.0 lack is written only where it takes half of the bytes, and this many fewer.
_RUNS, _WORTH_A_FEATURE = Runs(), 256
_NOT_BYTEWISE = [codec for codec in (*_WRITTEN, _RUNS) if not codec.bytewise]
CODECS = {codec.name: codec for codec in (*_WRITTEN, Flat(), _RUNS, Seeded(), Magnitude(), Classes())}

__all__ = [
    "BLOCK_SIZE", "CODECS", "Encoded", "Hints", "IndexCodec", "IndexRange", "cut", "encode_smallest", "encode_with",
    "stored_bytes",
]  # fmt: skip


@dataclass(frozen=True)
class Hints:
    """What a writer knows of a tensor's entries beyond their indices.

    Attributes:
        seed: the text that may have drawn them; None: they were not drawn.
        band: the band of the permutation.
        base: the base's tensor, flat, if a reader may be asked for it.
        compact: whether to take as few bytes as possible.
    """

    seed: str | None = None
    band: int = 0
    base: Array | None = None
    compact: bool = False


def seed_of(mask: Mapping[str, Any], name: str) -> str:
    """The seed by which the mask rule ``rand`` draws the entries of a tensor, from its provenance."""
    return f"{mask.get('seed', 0)} {name}"


def encode_with(indices: Indices, shape: tuple[int, ...], block_size: int, hints: Hints) -> Encoded:
    """As :func:`encode_smallest`; or, if the hints tell the entries, without any bits for them, or compact."""
    found = None
    if hints.seed is not None:
        found = encode_drawn(indices, shape, hints.seed, hints.band)
    if found is None and hints.base is not None:
        found = encode_largest(indices, hints.base)
    if found is not None:
        return found
    if not (hints.compact and indices.size):
        return encode_smallest(indices, shape, block_size)
    found = encode_classes(indices, shape, hints.base)
    if stored_bytes(found) <= indices.size and all(codec.size(indices, shape) is None for codec in _NOT_BYTEWISE):
        return found
    return min(encode_smallest(indices, shape, block_size), found, key=stored_bytes)


def encode_smallest(
    indices: Indices, shape: tuple[int, ...], block_size: int = BLOCK_SIZE, *, bytewise: bool = False
) -> Encoded:
    """Encode ``indices`` (int64 ``[nnz]``, strictly increasing) by the codec that takes the fewest bytes.

    Ties go to the codec that is first in the registry. Sizes are computed first, and only the best codec encodes. ``runs`` is
    chosen only where it saves half, because readers of version 1.0 refuse it. With ``bytewise`` only codecs that take at least
    a byte for each entry are.
    """
    codecs = [codec for codec in _WRITTEN if codec.bytewise or not bytewise]
    sizes = [(codec.size(indices, shape), order) for order, codec in enumerate(codecs)]
    least, best = min((size, order) for size, order in sizes if size is not None)
    if bytewise:
        return codecs[best].encode(indices, shape, block_size)
    in_runs = _RUNS.size(indices, shape)
    if in_runs is not None and 2 * in_runs <= least and least - in_runs >= _WORTH_A_FEATURE:
        return _RUNS.encode(indices, shape, block_size)
    return codecs[best].encode(indices, shape, block_size)


def stored_bytes(encoded: Encoded) -> int:
    """Bytes that the indices take in the file: stream, directory and the codec's parameters in the manifest."""
    return encoded.stream_bytes + len(json.dumps(encoded.params, separators=(",", ":")))
