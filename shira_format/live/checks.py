"""Checks that adapters fit a live model; the messages start with the adapter's file and name the model's tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shira_format._core import fits
from shira_format._core.arrays import Array, array_digest
from shira_format._core.compiled import union
from shira_format.entries.aligned import AlignedEntries, Contribution
from shira_format.errors import BaseMismatch
from shira_format.live.weights import LiveWeight
from shira_format.tensors import DenseTensor, SparseTensor, same_bits

Parts = Sequence[Contribution]


@dataclass(frozen=True)
class Replacement:
    """A dense tensor, and how messages about its adapter start."""

    tensor: DenseTensor
    where: str


def check_frames(name: str, parts: Parts, weight: LiveWeight | None) -> None:
    """Raise BaseMismatch unless the weight exists and has the shape and dtype of all parts; ValueError for their strengths."""
    if weight is None:
        raise fits.missing(parts[0].what, name, "the model")
    for part in parts:
        what, tensor = part.about(name), part.tensor
        fits.check_shape(what, tensor.shape, weight.shape, "the weight")
        fits.check_dtype(what, tensor.dtype, weight.dtype, any_float=part.fits_any_float, base="the weight")
        fits.check_strength(what, part.weight, weight.dtype)


def check_digests(name: str, aligned: AlignedEntries, base: Array) -> None:
    """Raise BaseMismatch unless ``base``, the values at all entries, are those that each part was made for."""
    for number, part in enumerate(aligned.parts):
        if (expected := part.tensor.base_digest) is not None:
            fits.check_values(part.about(name), expected, array_digest(aligned.of_part(number, base)))


def check_replacement(name: str, new: Replacement, base: Array | None) -> None:
    """Raise BaseMismatch unless ``base``, the model's tensor before any adapter, is the one that ``new`` replaces."""
    what = f"{new.where}tensor {name!r}"
    if base is None:
        if new.tensor.base_digest is not None:
            raise fits.missing(f"{new.where}tensor {new.tensor.name!r}", name, "the model")
        return
    fits.check_shape(what, new.tensor.values.shape, base.shape, "the weight")
    alike = base.dtype == new.tensor.values.dtype
    fits.check_dense(what, new.tensor.base_digest, array_digest(base) if alike else None)


def check_replaced(name: str, replaced: Parts, changed: Parts) -> list[Contribution]:
    """All contributions to one weight, each of the replaced parts once.

    Raises:
        BaseMismatch: a part that is replaced, and not by the same values, has entries in common with another contribution.
    """
    found: list[Contribution] = []
    for part in replaced:
        if not any(_is_same(part.tensor, other.tensor) for other in found):
            found.append(part)
    if _meet(found):
        raise BaseMismatch(f"{found[-1].about(name)}: another adapter replaces it by other values")
    for part in changed:
        if any(_meet([part, other]) for other in found):
            raise BaseMismatch(f"{part.about(name)}: one adapter changes entries of it, another one replaces it")
    return [*changed, *found]


def _is_same(one: SparseTensor, other: SparseTensor) -> bool:
    return np.array_equal(one.indices, other.indices) and same_bits(one.values, other.values)


def _meet(parts: Parts) -> bool:
    """Whether two of them have an entry in common."""
    together, _ = union([part.tensor.indices for part in parts])
    return int(together.size) < sum(part.tensor.nnz for part in parts)


def check_same(where: str, one: SparseTensor, other: SparseTensor) -> None:
    """Raise BaseMismatch unless two tensors of an adapter do the same to weights that are tied in the model."""
    if not _is_same(one, other):
        raise BaseMismatch(
            f"{where}tensors {one.name!r} and {other.name!r} are tied in the model, and the adapter changes them "
            "differently"
        )
