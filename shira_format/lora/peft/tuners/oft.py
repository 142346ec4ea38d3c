"""OFT (arXiv 2306.07280, 2506.19847): the inputs of a layer are rotated in blocks, ``W' = W R^T``; an embedding's columns, ``W' = W R``.

The rules are those of ``peft.tuners.oft`` since 0.14: ``oft_R.weight`` is ``[blocks, b (b - 1) / 2]``, the upper triangles of
skew-symmetric ``Q``. ``R = (I - Q) (I + Q)^-1``, or under ``use_cayley_neumann`` a series for ``(I + Q) (I - Q)^-1``: the two have
opposite signs. ``coft`` bounds each block's norm by ``eps / sqrt(blocks)``; PEFT does so in each forward pass.

A convolution with a kernel is refused: PEFT's forward pass rotates patches of the input and puts them together by adding what
overlaps, which is no change of the weight (and not the identity even where ``R`` is); ``merge_and_unload`` makes another model.
"""

from __future__ import annotations

import math

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.lora.cayley import cayley, cayley_neumann, skew_symmetric
from shira_format.lora.from_base import input_map
from shira_format.lora.peft.tuners.common import Effect, Options, Tuner, TunerLayer
from shira_format.lora.products import common_dtype
from shira_format.tensors import numel

ROTATION, EMBEDDING = "oft_R.weight", "oft_embedding_R.weight"


def _check(options: Options) -> None:
    if "oft_block_size" not in options.raw:
        raise SourceError(
            f"{options.path}: OFT of PEFT before 0.14 (there is no oft_block_size) had other rules, and PEFT no longer reads it: "
            "merge it with the version that wrote it and convert the full checkpoint (full_to_shira)"
        )
    if "use_cayley_neumann" not in options.raw:
        raise SourceError(
            f"{options.path}: use_cayley_neumann is not set, and versions of PEFT differ in what that means: set it to false if the "
            "adapter was trained by PEFT before 0.18 or with it false"
        )
    if options.flag("use_cayley_neumann") and (options.version is None or options.version < (0, 18)):
        raise SourceError(
            f"{options.path}: use_cayley_neumann of PEFT before 0.18 had another series: merge it with the version that wrote it "
            "and convert the full checkpoint (full_to_shira)"
        )


def _effect(layer: TunerLayer) -> Effect:
    is_embedding = EMBEDDING in layer.parts
    upper = layer.part(EMBEDDING if is_embedding else ROTATION, 2)
    if len(layer.shape) < 2 or numel(layer.shape[2:]) != 1:
        raise SourceError(
            f"{layer.where} is a convolution with a kernel, for which PEFT's forward pass of OFT is no change of the weight: "
            "there is nothing that would do the same"
        )
    inputs = layer.shape[1]
    size = _block_size(upper, layer)
    count = len(upper)
    if layer.options.flag("block_share"):
        if count != 1 or inputs % size:
            raise layer.misfit(f"{count} shared blocks of {size} inputs")
        count = inputs // size
    if count * size != inputs:
        raise layer.misfit(f"{count} blocks of {size} inputs")
    rotated = _rotations(upper, size, layer.options)
    blocks = rotated if is_embedding else rotated.swapaxes(1, 2)
    blocks = np.broadcast_to(blocks, (count, size, size))
    return Effect(input_map(layer.name, layer.shape, layer.base, blocks, common_dtype(upper)))


def _block_size(upper: Array, layer: TunerLayer) -> int:
    size = (1 + math.isqrt(1 + 8 * upper.shape[1])) // 2
    if not len(upper) or size * (size - 1) // 2 != upper.shape[1]:
        raise SourceError(
            f"{layer.where}: oft_R has shape {list(upper.shape)}, which are no triangles of matrices"
        )
    return size


def _rotations(upper: Array, size: int, options: Options) -> Array:
    """``R - I``, ``[blocks, b, b]``."""
    skew = skew_symmetric(upper, size)
    if options.flag("coft"):
        most = options.number("eps") / math.sqrt(len(upper))
        norms = np.sqrt(np.einsum("kij,kij->k", skew, skew))[:, None, None]
        skew = np.where(norms <= most, skew, skew * (most / np.where(norms > 0, norms, 1)))
    if options.flag("use_cayley_neumann"):
        return cayley_neumann(skew, options.size("num_cayley_neumann_terms"))
    return cayley(-skew)


TUNER = Tuner(
    parts=(ROTATION, EMBEDDING),
    effect=_effect,
    options=frozenset(("coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms")),
    harmless=frozenset(("init_weights", "r", "oft_block_size", "module_dropout")),
    check=_check,
)
