"""What the parts of one module's LoRA do to its weight, whatever the program that wrote them.

``R`` is the module's rank, ``s`` its scale:

* LoRA: ``s * up @ down``; LyCORIS' LoCon also with a Tucker core: ``s * einsum("i j ..., i p, j r -> p r ...", mid, up.T, down)``.
* LoHa: ``s * (w1_a @ w1_b) * (w2_a @ w2_b)``; with Tucker each half is such a product, with cores ``t1`` and ``t2``.
* LoKr: ``s * kron(w1, w2)``; a factor is whole or ``a @ b``, ``w2`` also with a core. No scale if both are whole.
* OFT, BOFT: :mod:`shira_format.lora.rotations`; (IA)^3: :mod:`shira_format.lora.scalings`; GLoRA: :mod:`shira_format.lora.glora`.
* full: ``diff`` is added unscaled, and so are ``w_norm`` and ``b_norm`` to a norm's weight and bias.
* whole: a tensor of the model's own name, or ComfyUI's ``set_weight``, replaces the base's.

Beside any of these: ``diff_b`` is added to the bias unscaled, ``lora_B.bias`` with the scale; DoRA scales the sum to norms:
PEFT's ``lora_magnitude_vector`` by output, ``dora_scale`` by output (``[out, 1, ...]``) or by input (``[1, in, 1, ...]``).

The rules are those of ``lycoris/modules`` (KohakuBlueleaf/LyCORIS) and of ComfyUI (``comfy/lora.py``, ``comfy/weight_adapter``).
Two options need not be in the file: rs_lora (``alpha / sqrt(R)``) is included in the saved alpha (but lost for a LoKr of
whole factors, which LyCORIS reads without it), and a learned scalar is multiplied into a factor.

Where LyCORIS contradicts itself, the trained model counts: ``forward`` of LoHa and LoKr scales once, as ComfyUI and
diffusers do; ``merge_to`` (4.1.3) scales twice, which is wrong unless alpha is the rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, scratch
from shira_format._core.dtypes import upcast, working_dtype
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.base import Update
from shira_format.lora.glora import GLORA_PARTS, glora
from shira_format.lora.groups import Group, Layer
from shira_format.lora.keys import ALPHA, BIAS, DORA, DOWN, MAGNITUDE, MID, UP, WHOLE
from shira_format.lora.products import (
    Hadamard,
    Kronecker,
    LowRank,
    check_shape,
    common_dtype,
    low_rank,
    scale_factor,
    without_unit_kernel,
)
from shira_format.lora.rotations import OFT_PARTS, rotation
from shira_format.lora.scalings import IA3_PARTS, ia3
from shira_format.lora.tucker import with_core
from shira_format.tensors import numel

_SCALAR = "scalar"
_ALGORITHMS = {
    "LoRA": frozenset((DOWN, UP, MID)),
    "LoHa": frozenset(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")),
    "LoKr": frozenset(("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")),
    "OFT": frozenset((*OFT_PARTS, "oft_diag")) - {ALPHA},
    "(IA)^3": IA3_PARTS,
    "GLoRA": GLORA_PARTS - {ALPHA},
    "full": frozenset(("diff",)),
    "norm": frozenset(("w_norm", "b_norm")),
    "whole": frozenset((WHOLE,)),
}
_COMMON = frozenset((ALPHA, DORA, MAGNITUDE, _SCALAR, BIAS, "diff_b"))
# Parts that are no change of one weight by a rule that is known here.
UNSUPPORTED = {
    "lambda_layer": "T-LoRA depends on the sampling step, and is no change of weights",
    "lokr_t1": "no version of LyCORIS gives it a meaning",
    "bias_indices": "LoCons with a sparse part beside the factors are not supported",
    "reshape_weight": "it changes the shape of the base's weight, as control LoRAs do, and an adapter cannot: merge it with "
    "ComfyUI and convert the full checkpoint (full_to_shira --exact)",
}
# Parts that may be as large as the base's weight, and are read in pieces.
STORED = frozenset(("diff",))


def layer(group: Group, name: str, shape: tuple[int, ...], base: Checkpoint) -> Layer:
    """What a module's LoRA does.

    Args:
        group: its parts.
        name: the weight that it adapts.
        shape: of the module's weight.
        base: a checkpoint that has it under this name.

    Raises:
        SourceError: the parts do not belong together, or do not fit the weight.
    """
    parts = group.keys.keys()
    if unsupported := next((part for part in UNSUPPORTED if part in parts), None):
        raise SourceError(f"{group.path}: unmatched key {group.keys[unsupported]!r}: {UNSUPPORTED[unsupported]}")
    kinds = [kind for kind, known in _ALGORITHMS.items() if parts & known]
    if not kinds and "diff_b" not in parts:
        raise SourceError(f"{group.path}: {group.keys[min(parts)]!r} has no partner: {', '.join(sorted(parts))} alone change nothing")  # fmt: skip
    # Numbers by which (IA)^3 scales have the name of a whole weight.
    kind = "(IA)^3" if "on_input" in parts else next((kind for kind in kinds if kind != "(IA)^3"), "full")
    if strange := parts - _ALGORITHMS[kind] - _COMMON:
        raise SourceError(f"{group.path}: unmatched key {group.keys[min(strange)]!r}: {kind} has no such part")
    if _SCALAR in parts and group.number(_SCALAR) != 1:
        raise SourceError(
            f"{group.where}: the scalar is not 1: LyCORIS multiplies it into a factor when it saves, and whether it did so here "
            "is unknown"
        )
    if kind in ("full", "norm", "whole"):
        if decomposed := parts & {DORA, MAGNITUDE, BIAS}:
            raise SourceError(
                f"{group.path}: unmatched key {group.keys[min(decomposed)]!r}: {kind} has no such part"
            )
        made = Layer(whole=group.parts[WHOLE]) if kind == "whole" else _added(group, name, shape, kind)
    else:
        if len(shape) < 2 or not numel(shape):
            raise SourceError(f"{group.where}: {kind} of the base's {name!r}, whose shape is {list(shape)}")
        if kind in ("OFT", "(IA)^3", "GLoRA"):
            made = Layer(_from_base(group, kind, name, shape, base))
        else:
            made = {"LoRA": _locon, "LoHa": _loha, "LoKr": _lokr}[kind](group, name, shape)
    return _with_magnitude(group, _with_bias(group, made), shape)


def _from_base(group: Group, kind: str, name: str, shape: tuple[int, ...], base: Checkpoint) -> Update:
    """An update that depends on the base's weight."""
    parts = {part: array for part, array in group.parts.items() if part != "diff_b"}
    if kind == "OFT":
        return rotation(parts, name, shape, base, group.where, kohya=group.key.prefix == "oft_unet")
    return (ia3 if kind == "(IA)^3" else glora)(parts, name, shape, base, group.where)


def _with_bias(group: Group, made: Layer) -> Layer:
    if BIAS in group.parts:
        if "diff_b" in group.parts:
            raise SourceError(f"{group.where}: it has both lora_B.bias and diff_b")
        if {DORA, MAGNITUDE} & group.parts.keys():
            raise SourceError(f"{group.path}: {group.keys[BIAS]!r}: DoRA with a bias of lora_B is not supported")
        bias = group.parts[BIAS]
        return made._replace(
            bias=scale_factor(bias, 1.0 if made.scale is None else made.scale, common_dtype(bias))
        )
    return made._replace(bias=_float(group.parts["diff_b"])) if "diff_b" in group.parts else made


def _with_magnitude(group: Group, made: Layer, shape: tuple[int, ...]) -> Layer:
    if DORA in group.parts and MAGNITUDE in group.parts:
        raise SourceError(f"{group.where}: it has both {DORA} and {MAGNITUDE}")
    if DORA in group.parts:
        magnitude, kernel = _magnitude(group, shape)
        # LyCORIS: torch.finfo(dtype).eps of the dtype of dora_scale, which it keeps in float32.
        assert made.update is not None
        return made._replace(magnitude=magnitude, kernel=kernel, eps=float(np.finfo(made.update.dtype).eps))
    if MAGNITUDE in group.parts:
        magnitude = group.parts[MAGNITUDE]
        if magnitude.size != shape[0]:
            raise SourceError(
                f"{group.path}: {group.keys[MAGNITUDE]!r} has shape {list(magnitude.shape)}, not one number for each of "
                f"{shape[0]} rows"
            )
        return made._replace(magnitude=magnitude.reshape(-1))
    return made


def _added(group: Group, name: str, shape: tuple[int, ...], kind: str) -> Layer:
    if kind == "norm":
        weight, bias = (
            None if (found := group.parts.get(part)) is None else _float(found) for part in ("w_norm", "b_norm")
        )
        return Layer(weight=weight, bias=bias)
    if "diff" in group.parts:
        return Layer(weight=_float(group.parts["diff"]))
    if "diff" not in group.keys:
        return Layer()
    key = group.keys["diff"]
    check_shape(group.tensors.shape(key), name, shape, group.where)
    return Layer(_Stored(name, shape, group.tensors, key))


def _float(array: Array) -> Array:
    return array.astype(common_dtype(array))


def _locon(group: Group, name: str, shape: tuple[int, ...]) -> Layer:
    up, down = group.factors()
    rank = down.shape[0]
    scale = group.scale(rank)
    if (mid := group.parts.get(MID)) is not None:
        if math.prod(up.shape[2:]) != 1 or math.prod(down.shape[2:]) != 1:
            raise SourceError(f"{group.where}: lora_down or lora_up has a kernel beside lora_mid")
        down = _tucker(group, mid, down.reshape(down.shape[:2]), shape)
    where = f"{group.path}: {group.keys[UP]!r}"
    return Layer(low_rank(name, shape, up, down, scale, where), rank=rank, scale=scale)


def _tucker(group: Group, core: Array, down: Array, shape: tuple[int, ...]) -> Array:
    """``down`` with its core, in the type of both; see :func:`shira_format.lora.tucker.with_core`."""
    return with_core(core, down, group.where, numel(shape)).astype(common_dtype(core, down))


def _factors(group: Group, stem: str, core: str, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """``up``, ``[out, R]``, and ``down``, ``[R, in]`` or ``[R, in, *kernel]``, of one half, which may have a core."""
    up, down = _part(group, f"{stem}_a"), _part(group, f"{stem}_b")
    if core not in group.parts:
        if up.ndim != 2 or down.ndim < 2 or up.shape[1] != down.shape[0] or not down.shape[0]:
            raise SourceError(
                f"{group.where}: {stem}_a of shape {list(up.shape)} and {stem}_b of shape {list(down.shape)} do not fit"
            )
        return up, down
    if up.ndim != 2 or down.ndim != 2 or up.shape[0] != down.shape[0] or not down.shape[0]:
        raise SourceError(
            f"{group.where}: {stem}_a of shape {list(up.shape)} and {stem}_b of shape {list(down.shape)} do not fit a core"
        )
    return up.T, _tucker(group, group.parts[core], down, shape)


def _part(group: Group, part: str) -> Array:
    if part not in group.parts:
        raise SourceError(f"{group.where}: it has {', '.join(sorted(group.parts))} without {part}")
    return group.parts[part]


def _loha(group: Group, name: str, shape: tuple[int, ...]) -> Layer:
    if ("hada_t1" in group.parts) != ("hada_t2" in group.parts):
        raise SourceError(f"{group.where}: it has only one of hada_t1 and hada_t2")
    first = _factors(group, "hada_w1", "hada_t1", shape)
    second = _factors(group, "hada_w2", "hada_t2", shape)
    rank = _rank(group, first[1].shape[0], second[1].shape[0])
    scale, dtype = group.scale(rank), common_dtype(*first, *second)
    update = Hadamard(
        _matrix(group, name, shape, *first, scale, dtype), _matrix(group, name, shape, *second, 1.0, dtype)
    )
    return Layer(update, rank=rank, scale=scale)


def _rank(group: Group, *ranks: int) -> int:
    if len(set(ranks)) > 1:
        raise SourceError(
            f"{group.where}: its factors have ranks {' and '.join(map(str, ranks))}, which must be equal"
        )
    return ranks[0]


def _matrix(
    group: Group, name: str, shape: tuple[int, ...], up: Array, down: Array, scale: float, dtype: np.dtype[Any]
) -> LowRank:
    """``up @ down`` as the weight's matrix; ``down`` may have in_features and kernel as one dimension."""
    columns = numel(shape[1:])
    if up.shape[0] != shape[0] or math.prod(down.shape[1:]) != columns or (
        down.ndim > 2 and without_unit_kernel(down.shape)[1:] != without_unit_kernel(shape)[1:]
    ):  # fmt: skip
        raise SourceError(
            f"{group.where}: updates a weight of shape {[up.shape[0], *down.shape[1:]]}, "
            f"the base's {name!r} has {list(shape)}"
        )
    return LowRank(
        name, shape,
        np.ascontiguousarray(scale_factor(up, scale, dtype)),
        np.ascontiguousarray(down.reshape(-1, columns).astype(dtype)),
    )  # fmt: skip


def _lokr(group: Group, name: str, shape: tuple[int, ...]) -> Layer:
    split = [f"lokr_w{number}" not in group.parts for number in (1, 2)]
    for number, is_split in zip((1, 2), split, strict=True):
        if not is_split and {f"lokr_w{number}_a", f"lokr_w{number}_b"} & group.parts.keys():
            raise SourceError(f"{group.where}: it has lokr_w{number} both whole and in factors")
    if "lokr_t2" in group.parts and not split[1]:
        raise SourceError(f"{group.where}: it has lokr_t2 beside a whole lokr_w2")
    left = _factors(group, "lokr_w1", "", shape) if split[0] else (group.parts["lokr_w1"],)
    right = _factors(group, "lokr_w2", "lokr_t2", shape) if split[1] else (group.parts["lokr_w2"],)
    rank, scale = None, 1.0  # no scale if both are whole
    if split[0] or split[1]:
        rank = _rank(group, *(half[1].shape[0] for half in (left, right) if len(half) == 2))
        scale = group.scale(rank)
    if not all(factor.ndim for factor in (*left, *right)):
        raise SourceError(f"{group.where}: a factor has no dimensions")
    dtype = common_dtype(*left, *right)
    a, b = left[0].shape[0], left[-1].shape[-1] if left[-1].ndim == 2 else 0
    c, columns = right[0].shape[0], math.prod(right[-1].shape[1:]) if right[-1].ndim > 1 else 0
    kernel = numel(shape[2:])
    fits = a * c == shape[0] and b * columns == numel(shape[1:]) and columns % kernel == 0
    if not fits or (right[-1].ndim > 2 and right[-1].shape[2:] != shape[2:]):
        shapes = " and ".join(str([half[0].shape[0], *half[-1].shape[1:]]) for half in (left, right))
        raise SourceError(
            f"{group.where}: the Kronecker product of matrices of shapes {shapes} does not have the shape of the base's "
            f"{name!r}, {list(shape)}"
        )
    first = left[0].astype(np.float64)
    if len(left) == 2:
        first = first @ left[1].astype(np.float64)
    outer = scale_factor(first, scale, dtype)
    if len(right) == 1:
        update: Update = Kronecker(name, shape, outer, right[0].reshape(c, columns).astype(dtype))
        return Layer(update, rank=rank, scale=scale)
    inner = LowRank(
        name, (c, columns),
        np.ascontiguousarray(right[0].astype(dtype)), np.ascontiguousarray(right[1].reshape(-1, columns).astype(dtype)),
    )  # fmt: skip
    return Layer(_KroneckerOfLowRank(name, shape, outer, inner), rank=rank, scale=scale)


def _magnitude(group: Group, shape: tuple[int, ...]) -> tuple[Array, int]:
    """``dora_scale`` as a vector, and the kernel if it is by input (0 if by output).

    Its shape shows which, even for a square weight: ``[out, 1, ...]``, the default since December 2024, or
    ``[1, in, 1, ...]``. One dimension is PEFT's format, whose norms are by output.
    """
    scale = group.parts[DORA]
    if scale.ndim and scale.size == scale.shape[0] == shape[0]:
        return scale.reshape(-1), 0
    if scale.ndim > 1 and scale.size == scale.shape[1] == shape[1]:
        return scale.reshape(-1), numel(shape[2:])
    raise SourceError(
        f"{group.where}: dora_scale has shape {list(scale.shape)}, neither one number per output nor one per input "
        f"of a weight of shape {list(shape)}"
    )


@dataclass(frozen=True)
class _Stored:
    """A delta that the file holds in full; it may be as large as the base's weight, and is read in pieces."""

    name: str
    shape: tuple[int, ...]
    tensors: Checkpoint
    key: str

    @property
    def dtype(self) -> np.dtype[Any]:
        return working_dtype(self.tensors.dtype(self.key))

    @property
    def columns(self) -> int:
        return numel(self.shape[1:])

    def tile(self, start: int, stop: int, out: Array) -> None:
        first = start * self.columns
        raw = scratch("stored delta", out.size, self.tensors.dtype(self.key))
        part = self.tensors.part(self.key, first, first + out.size, raw)
        upcast(part, out.reshape(-1))


@dataclass(frozen=True)
class _KroneckerOfLowRank:
    """``kron(left, up @ down)``: a :class:`Kronecker` whose right factor is computed by rows."""

    name: str
    shape: tuple[int, ...]
    left: Array
    right: LowRank

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.left.dtype

    @property
    def columns(self) -> int:
        return int(self.left.shape[1]) * self.right.columns

    def tile(self, start: int, stop: int, out: Array) -> None:
        i, p = np.divmod(np.arange(start, stop), self.right.shape[0])
        rows = self.right.up[p] @ self.right.down
        blocks = out.reshape(stop - start, self.left.shape[1], self.right.columns)
        np.multiply(self.left[i, :, None], rows[:, None, :], out=blocks)
