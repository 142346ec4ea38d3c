"""Random numbers from a weight's name, an adapter's content and a seed: the same on every machine, with any numpy version.

An adapter gets the same numbers whatever the order of the adapters and whatever else is merged; two adapters get different ones.
"""

from __future__ import annotations

import hashlib

import numpy as np

from shira_format._core.arrays import array_digest, as_bytes
from shira_format.entries.aligned import AlignedEntries, Contribution, Floats
from shira_format.tensors import SparseTensor

_FEW = 64


def uniform(aligned: AlignedEntries, number: int, seed: int) -> Floats:
    """A number in [0, 1) for each entry of one part: float64 ``[nnz]``, multiples of 2^-53.

    From the upper 53 bits of each output of Philox 4x64-10, a published generator: numpy guarantees its ``random_raw`` stream, but
    not those of its distributions.

    Args:
        aligned: the weight.
        number: of the part.
        seed: any integer.
    """
    part = aligned.parts[number]
    content = (
        str(seed),
        str(_occurrence(aligned, number)),
        array_digest(part.tensor.indices),
        array_digest(part.tensor.values),
        aligned.name,
    )
    key = hashlib.sha256("\n".join(content).encode("utf-8", "surrogatepass")).digest()
    raw = np.random.Philox(key=int.from_bytes(key[:16], "little")).random_raw(part.tensor.nnz)
    found: Floats = (raw >> np.uint64(11)).astype(np.float64)
    found *= 2.0**-53
    return found


def _occurrence(aligned: AlignedEntries, number: int) -> int:
    """The number of parts with the same entries before this one: those with less weight, or with equal weight and earlier."""
    part = aligned.parts[number]
    return sum(
        (other.weight, place) < (part.weight, number) and _same(other, part)
        for place, other in enumerate(aligned.parts)
        if place != number
    )


def _same(one: Contribution, other: Contribution) -> bool:
    a, b = one.tensor, other.tensor
    if a.nnz != b.nnz or not np.array_equal(a.indices[:_FEW], b.indices[:_FEW]):  # most differ here
        return False
    return np.array_equal(a.indices, b.indices) and _same_values(a, b)


def _same_values(a: SparseTensor, b: SparseTensor) -> bool:
    return np.array_equal(as_bytes(a.values), as_bytes(b.values))
