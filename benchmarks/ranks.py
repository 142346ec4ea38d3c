"""Time of a proven rank beside that of the singular values, of one weight with a uniform 1 % mask."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import ml_dtypes
import numpy as np

from benchmarks.sizes import uniform
from benchmarks.table import Row
from shira_analysis.measures.rank import rank_of
from shira_format.tensors import SparseTensor

_T = TypeVar("_T")


def rows(*, quick: bool) -> list[Row]:
    """The certificate of a 4096 x 4096 bf16 weight (1024 x 1024 if ``quick``), and of a wide one with as many rows."""
    side = 1024 if quick else 4096
    found = []
    for shape in ((side, side), (side, 7 * side // 2)):
        tensor = adapter(shape)
        certificate, proof = _timed(lambda tensor=tensor: rank_of(tensor, spectrum=False).bounds)  # type: ignore[misc]
        values, spectrum = _timed(lambda tensor=tensor: rank_of(tensor, exact=False).spectrum)  # type: ignore[misc]
        assert proof is not None
        assert spectrum is not None
        case = f"rank of {shape[0]} x {shape[1]} at 1 %: {proof.lower} proven" + (
            "" if proof.exact else f", at most {proof.upper}"
        )
        limit = 20 if not quick and shape == (side, side) else None
        demand = f"<= {limit} s and <= 2 x" if limit else "<= 2 x"
        met = certificate <= 2 * values and (limit is None or certificate <= limit)
        found.append(
            Row(case, certificate, values, "s", f"singular values ({spectrum.numerical_rank})", demand, met)
        )
    return found


def adapter(shape: tuple[int, int]) -> SparseTensor:
    """A bf16 weight whose changed entries are a tenth of its size away."""
    indices = uniform(shape[0] * shape[1], 0.01, 3)
    random = np.random.default_rng(4)
    base, change = (random.standard_normal(indices.size).astype(np.float32) for _ in range(2))
    dtype = ml_dtypes.bfloat16
    return SparseTensor("w", shape, indices, (base + change / 10).astype(dtype), base=base.astype(dtype))


def _timed(work: Callable[[], _T]) -> tuple[float, _T]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result
