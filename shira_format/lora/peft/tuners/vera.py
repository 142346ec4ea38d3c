"""VeRA (arXiv 2310.11454): ``delta W = (lambda_b * B) @ (lambda_d * A)``, where all layers take their rows of one random ``A`` and ``B``.

The rules are those of ``peft.tuners.vera``. The projections must be in the file (``save_projection``, the default): they depend on
a generator of random numbers, of which PEFT says itself that another version or machine may give others.
"""

from __future__ import annotations

import numpy as np

from shira_format.errors import SourceError
from shira_format.lora.peft.tuners.common import Effect, Tuner, TunerLayer
from shira_format.lora.products import LowRank, common_dtype, transposed


def _effect(layer: TunerLayer) -> Effect:
    if not {"vera_A", "vera_B"} <= layer.shared.keys():
        raise SourceError(
            f"{layer.where}: the random projections vera_A and vera_B are not in the file (save_projection is false): load it with "
            "PEFT where it was trained, set save_projection, and save it again"
        )
    a, b = layer.shared["vera_A"], layer.shared["vera_B"]
    by_output, by_rank = layer.part("vera_lambda_b", 1), layer.part("vera_lambda_d", 1)
    if (
        len(layer.shape) != 2
        or a.ndim != 2
        or b.ndim != 2
        or a.shape[0] != b.shape[1]
        or by_rank.size != a.shape[0]
    ):
        raise SourceError(
            f"{layer.where}: vera_A of shape {list(a.shape)}, vera_B of {list(b.shape)} and {by_rank.size} factors do not fit a weight "
            f"of shape {list(layer.shape)}"
        )
    outputs = by_output.size
    if outputs not in layer.shape:
        raise layer.misfit(f"{outputs} outputs")
    rows, columns = layer.shape
    inputs = columns if outputs == rows else rows
    if outputs > b.shape[0] or inputs > a.shape[1]:
        raise layer.misfit(f"at most {b.shape[0]} outputs and {a.shape[1]} inputs")
    turned = layer.is_transposed(outputs, inputs)
    dtype = common_dtype(a, b, by_output, by_rank)
    up = (by_output.astype(np.float64)[:, None] * b[:outputs].astype(np.float64)).astype(dtype)
    down = (by_rank.astype(np.float64)[:, None] * a[:, :inputs].astype(np.float64)).astype(dtype)
    update = LowRank(layer.name, (outputs, inputs), up, down)
    return Effect(transposed(update, layer.shape) if turned else update)


TUNER = Tuner(
    parts=("vera_lambda_b", "vera_lambda_d"),
    effect=_effect,
    options=frozenset(("r", "projection_prng_key", "save_projection")),
    harmless=frozenset(("init_weights", "vera_dropout", "d_initial")),
    shared=("vera_A", "vera_B"),
)
