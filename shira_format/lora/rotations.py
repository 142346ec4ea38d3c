"""OFT (arXiv 2306.07280) and BOFT (arXiv 2311.06243) of kohya's trainer and of LyCORIS: rotations of a weight's outputs.

A rotation ``R`` of ``W`` changes it by ``(R - I) W``. The rules are those of ``networks/oft.py`` (kohya-ss/sd-scripts) and of
``lycoris/modules/diag_oft.py`` and ``boft.py``. ``oft_blocks`` are free matrices ``X``, ``Q = X - X^T``, and ``R`` is Cayley's
transform of each block of ``Q``:

* OFT, ``[blocks, b, b]``: block by block, ``W' = R^T W``.
* BOFT, ``[m, blocks, b, b]``: ``m`` such steps one after the other, ``W' = R W`` each; step ``i`` works on rows that are put in
  another order, in groups of ``2^i b`` (a butterfly).
* ``alpha`` is no scale, but bounds ``Q``: its norm over all blocks is at most ``alpha`` times the number of outputs. In LyCORIS an
  alpha of 0 is no bound; in kohya's trainer it is one, and leaves next to nothing of ``Q``.
* ``rescale`` (LyCORIS), ``[out, 1, ...]``, multiplies the outputs afterwards.

The bias is left as it is, as LyCORIS does unless its ``bypass_mode`` is set, which files do not record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.base import Update
from shira_format.lora.cayley import cayley
from shira_format.lora.from_base import Blocks, StoredBlocks, output_map
from shira_format.lora.products import common_dtype

BLOCKS, RESCALE, ALPHA = "oft_blocks", "rescale", "alpha"
OFT_PARTS = frozenset((BLOCKS, RESCALE, ALPHA))
# Parts of other versions, which are refused.
OFT_REFUSED = {
    "oft_diag": "versions of LyCORIS before 2 stored rotations in another way, which readers take differently; merge it with the "
    "version that trained it and convert the full checkpoint (full_to_shira)"
}
_EPS = 1e-8  # both add it to the norm
_MOST = 1 << 28  # elements of all blocks


def rotation(
    parts: Mapping[str, Array],
    name: str,
    shape: tuple[int, ...],
    base: Checkpoint,
    where: str,
    *,
    kohya: bool = False,
) -> Update:
    """OFT or BOFT of one module.

    Args:
        parts: ``oft_blocks``, and maybe ``rescale`` and ``alpha``.
        name: of the weight in the base.
        shape: of the weight, ``[out, ...]``.
        base: the checkpoint that has it.
        where: file and module, for messages.
        kohya: whether kohya's trainer wrote it (keys begin with ``oft_unet_``), not LyCORIS.

    Raises:
        SourceError: a part is missing or unknown, or does not fit the weight.
    """
    if strange := parts.keys() - OFT_PARTS:
        reason = OFT_REFUSED.get(min(strange), "OFT has no such part")
        raise SourceError(f"{where}: unmatched key {min(strange)!r}: {reason}")
    if BLOCKS not in parts:
        raise SourceError(f"{where}: it has {', '.join(sorted(parts))} without {BLOCKS}")
    free = parts[BLOCKS]
    if free.ndim not in (3, 4) or free.shape[-1] != free.shape[-2] or not free.size or free.size > _MOST:
        raise SourceError(f"{where}: {BLOCKS} has shape {list(free.shape)}, not [blocks, b, b] (OFT) or [m, blocks, b, b] (BOFT)")  # fmt: skip
    if kohya and (free.ndim == 4 or RESCALE in parts):
        raise SourceError(
            f"{where}: kohya's OFT has no {RESCALE} and no BOFT: {BLOCKS} has shape {list(free.shape)}"
        )
    if len(shape) < 2 or shape[0] != free.shape[-3] * free.shape[-1]:
        raise SourceError(
            f"{where}: rotates {free.shape[-3] * free.shape[-1]} outputs, the base's {name!r} has shape {list(shape)}"
        )
    rotated = cayley(_bounded(free, _bound(parts, shape[0], where, kohya=kohya), kohya=kohya))
    rescale = _rescale(parts.get(RESCALE), shape, where)
    blocks: Blocks
    if free.ndim == 3:
        blocks = StoredBlocks(_rescaled(rotated.swapaxes(1, 2), rescale))
    else:
        blocks = _butterfly(rotated, rescale, shape[0], where)
    return output_map(name, shape, base, blocks, common_dtype(*parts.values()))


def _bound(parts: Mapping[str, Array], outputs: int, where: str, *, kohya: bool) -> float | None:
    """The most that the norm of ``Q`` may be; None if it is not bounded."""
    if ALPHA not in parts:
        if kohya:
            raise SourceError(f"{where}: kohya's OFT needs {ALPHA}, which bounds the rotation")
        return None
    alpha = parts[ALPHA]
    if alpha.size != 1:
        raise SourceError(f"{where}: {ALPHA} has shape {list(alpha.shape)}, not one number")
    bound = float(alpha.reshape(()).astype(np.float64)) * outputs
    if kohya and bound < 0:
        raise SourceError(f"{where}: {ALPHA} is negative, and bounds a norm")
    return bound if kohya or bound > 0 else None


def _bounded(free: Array, bound: float | None, *, kohya: bool) -> Array:
    """``Q``, in float64."""
    wide = free.astype(np.float64)
    skew = wide - wide.swapaxes(-1, -2)
    if bound is None:
        return np.asarray(skew)
    norm = float(np.sqrt(np.einsum("i,i->", skew.reshape(-1), skew.reshape(-1))))
    if kohya:
        return np.asarray(skew * ((min(norm, bound) + _EPS) / (norm + _EPS)))
    return np.asarray(skew * (bound / (norm + _EPS)) if norm + _EPS > bound else skew)


def _rescale(rescale: Array | None, shape: tuple[int, ...], where: str) -> Array | None:
    """One number for each output, in float64."""
    if rescale is None:
        return None
    if rescale.size != shape[0] or not rescale.ndim or rescale.shape[0] != shape[0]:
        raise SourceError(f"{where}: {RESCALE} has shape {list(rescale.shape)}, not one number for each of {shape[0]} outputs")  # fmt: skip
    return rescale.reshape(-1).astype(np.float64)


def _rescaled(blocks: Array, rescale: Array | None) -> Array:
    """``diag(s) R - I`` of ``R - I``: ``[blocks, b, b]``."""
    if rescale is None:
        return np.ascontiguousarray(blocks)
    count, size, _ = blocks.shape
    factors = rescale.reshape(count, size, 1)
    found = blocks * factors
    diagonal = np.arange(size)
    found[:, diagonal, diagonal] += (factors - 1)[..., 0]
    return np.asarray(found)


@dataclass(frozen=True)
class Butterfly:
    """A product of block-diagonal steps on permuted rows, less the identity; its own blocks are those of the last step's groups.

    Attributes:
        steps: ``R - I`` of each step, ``[m, blocks, b, b]`` in float64, first step first.
        rescale: one number for each output, or None.
    """

    steps: Array
    rescale: Array | None

    @property
    def size(self) -> int:
        return int(self.steps.shape[-1]) << (len(self.steps) - 1)

    @property
    def count(self) -> int:
        return int(self.steps.shape[1] * self.steps.shape[2]) // self.size

    def rows(self, block: int, start: int, stop: int) -> Array:
        size, b = self.size, self.steps.shape[-1]
        found = np.zeros((stop - start, size))
        found[np.arange(stop - start), np.arange(start, stop)] = 1
        within = size // b  # blocks of a step in this block
        for i in reversed(range(len(self.steps))):  # rows of the product: the last step is the first factor
            step = self.steps[i, block * within : (block + 1) * within]
            found += _apply_step(found, step, i)
        found[np.arange(stop - start), np.arange(start, stop)] -= 1
        if self.rescale is not None:
            factors = self.rescale[block * size + start : block * size + stop]
            found *= factors[:, None]
            found[np.arange(stop - start), np.arange(start, stop)] += factors - 1
        return found


def _apply_step(rows: Array, step: Array, number: int) -> Array:
    """``rows @ (P^T D P)``: ``rows`` is ``[n, size]``, ``D`` has the blocks ``step``, ``[size / b, b, b]``.

    ``P`` puts element ``g k + j`` of each group of ``2 k``, where ``g`` is 0 or 1, at ``2 j + g``.
    """
    n, size = rows.shape
    b = step.shape[-1]
    k = (b // 2) << number
    permuted = rows.reshape(n, -1, 2, k).swapaxes(2, 3).reshape(n, -1, b).transpose(1, 0, 2)
    made = (permuted @ step).transpose(1, 0, 2)
    return made.reshape(n, -1, k, 2).swapaxes(2, 3).reshape(n, size)


def _butterfly(rotated: Array, rescale: Array | None, outputs: int, where: str) -> Butterfly:
    found = Butterfly(rotated, rescale)
    m, _, b, _ = rotated.shape
    if b % 2 or m > 62 or outputs % found.size:
        raise SourceError(
            f"{where}: BOFT of {m} steps with blocks of {b} needs an even {b} and outputs in groups of 2^{m - 1} * {b}; there are "
            f"{outputs}"
        )
    return found
