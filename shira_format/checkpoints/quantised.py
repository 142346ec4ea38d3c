"""Quantised weights by the tensors beside them: codes that are no weights without their scales.

A weight that a scheme of :data:`SCHEMES` stores as codes cannot take an update: the update would be added to the codes. A
weight in float8 without scales is a plain weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from shira_format._core.dtypes import is_float
from shira_format.checkpoints.base import Checkpoint
from shira_format.errors import SourceError
from shira_format.storage.paths import MOST_JSON, read_file

_UNQUANTISED = "use the unquantised checkpoint, or dequantise it first"


@dataclass(frozen=True)
class Scheme:
    """How one program stores quantised weights.

    Attributes:
        name: as users know it.
        codes: the end of the name of the tensor of codes.
        beside: the ends of the names of its scales, one of which is there, in place of ``codes``.
        way_out: what a user can do.
    """

    name: str
    codes: str
    beside: tuple[str, ...]
    way_out: str = _UNQUANTISED


# The first that fits counts.
SCHEMES = (
    Scheme("FP8 with block scales", "", ("_scale_inv",)),
    Scheme("NVFP4", "", ("_scale_2",)),
    Scheme("ComfyUI's scaled FP8", ".weight", (".scale_weight", ".scale_input")),
    Scheme(
        "bitsandbytes 4-bit", "", (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"),
        "load it with transformers, call model.dequantize() and save it, or use the unquantised checkpoint",
    ),
    Scheme(
        "bitsandbytes 8-bit", ".weight", (".SCB", ".weight_format"),
        "load it with transformers, call model.dequantize() and save it, or use the unquantised checkpoint",
    ),
    Scheme("GPTQ or AWQ", ".qweight", (".qzeros", ".scales", ".g_idx")),
    Scheme("compressed-tensors", ".weight_packed", (".weight_scale", ".weight_shape", ".weight_global_scale")),
    Scheme("MXFP4", "_blocks", ("_scales",)),
    Scheme("MLX", ".weight", (".scales",), "dequantise it with mlx_lm.convert -d, or use the unquantised checkpoint"),
    Scheme("HQQ", ".W_q", (".scale", ".zero", ".meta")),
    Scheme("quanto", ".weight._data", (".weight._scale",)),
    Scheme("AQLM", ".codes", (".codebooks",)),
    Scheme("codes with scales", "", ("_scale", "_scales", ".scale", ".input_scale", "_zero_point")),
    Scheme("FP8 with input scales", ".weight", (".input_scale",)),
)  # fmt: skip


@dataclass(frozen=True)
class Quantised:
    """A quantised weight.

    Attributes:
        scheme: how it is stored.
        codes: the name of its codes.
        scales: the name of one of the tensors beside it; of a weight that only ``config.json`` calls quantised, "config.json".
    """

    scheme: Scheme
    codes: str
    scales: str

    def __str__(self) -> str:
        return (
            f"{self.codes!r} holds codes of {self.scheme.name}, with {self.scales!r} beside: {self.scheme.way_out}"
        )


def find_quantised(checkpoint: Checkpoint, name: str) -> Quantised | None:
    """How the weight ``name`` is quantised, or None: it is not there, or is a plain weight. Reads no tensor.

    ``name`` is that of the codes, or of the weight that they stand for (``q_proj.weight`` for ``q_proj.qweight``).
    """
    if name in checkpoint:
        return _stored(checkpoint, name)
    stem = name.removesuffix(".weight")
    for scheme in SCHEMES:
        whole = name if scheme.codes.startswith(("_", ".weight.")) else stem
        codes = whole.removesuffix(".weight" if scheme.codes.startswith(".weight") else "") + scheme.codes
        if scheme.codes not in ("", ".weight") and codes in checkpoint:
            return _stored(checkpoint, codes)
    return None


def any_quantised(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> Quantised | None:
    """The first quantised weight among ``names``, by default all."""
    return next(
        filter(None, (_stored(checkpoint, name) for name in (checkpoint if names is None else names))), None
    )


def refuse_quantised(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Refuse quantised weights.

    Raises:
        SourceError: one of ``names`` is quantised; the message has the scheme, both tensors and the way out.
    """
    for name in names:
        if (found := find_quantised(checkpoint, name)) is not None:
            raise SourceError(f"{checkpoint.path}: {found}")


@contextmanager
def quantised_named(base: Checkpoint) -> Iterator[None]:
    """Add that ``base`` is quantised to the message of a SourceError, such as that of a weight that is only there as codes."""
    try:
        yield
    except SourceError as error:
        if (found := any_quantised(base)) is not None:
            raise SourceError(f"{error}; the base {base.path} is quantised: {found}") from None
        raise


def belongs_to_quantised(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the tensor ``name`` is a quantised weight's codes or one of its scales."""
    if _stored(checkpoint, name) is not None:
        return True
    for scheme in SCHEMES:
        for end in scheme.beside:
            if name.endswith(end) and _is_codes(checkpoint, name.removesuffix(end) + scheme.codes):
                return True
    return False


def _stored(checkpoint: Checkpoint, name: str) -> Quantised | None:
    if not _is_codes(checkpoint, name):
        return None
    for scheme in SCHEMES:
        if not name.endswith(scheme.codes):
            continue
        stem = name.removesuffix(scheme.codes)
        for end in scheme.beside:
            if stem + end in checkpoint:
                return Quantised(scheme, name, stem + end)
    if name.endswith(".weight") and _is_float8(checkpoint.dtype(name)) and (method := _method(checkpoint, name)):
        return Quantised(Scheme(f"{method} (quantization_config)", "", ()), name, "config.json")
    return None


def _is_codes(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is there, and can be codes: integers or float8."""
    if name not in checkpoint:
        return False
    dtype = checkpoint.dtype(name)
    return not is_float(dtype) or _is_float8(dtype)


def _is_float8(dtype: np.dtype[np.generic]) -> bool:
    return is_float(dtype) and dtype.itemsize == 1


def _method(checkpoint: Checkpoint, name: str) -> str | None:
    """The method in ``quantization_config`` of the ``config.json`` beside the weights of a model."""
    component = name.partition("/")[0] if checkpoint.components else ""
    if checkpoint.folder is None or not (path := checkpoint.folder / component / "config.json").is_file():
        return None
    try:
        config = json.loads(read_file(path, MOST_JSON))
        found = config.get("quantization_config") or config.get("compression_config")
        return None if not found else str(found.get("quant_method", "quantised"))
    except (ValueError, RecursionError, AttributeError):
        return None
