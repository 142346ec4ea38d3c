"""One weight after the other, by size: overwriting 1 % of its entries against fusing a LoRA, as in the paper's appendix A.

The paper times ``scatter_`` against ``W += A @ B`` on a CPU, with 50 random weights of each size, and reports 13 to 16 times
for large ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.model import RANK
from benchmarks.sizes import uniform
from benchmarks.table import Row, machine_name
from shira_format._core import compiled
from shira_format._core.arrays import Indices, as_array
from shira_format.adapter import Adapter
from shira_format.live import Switcher
from shira_format.tensors import SparseTensor

DENSITY = 0.01
SIZES = (512, 1024, 2048, 4096, 8192)
PAPER = (13, 16)  # times, "for large sizes"
WEIGHTS = 50  # of each size, as in the paper ...
LEAST, MOST = 1 << 30, 3 << 30  # ... but so many that no cache holds these bytes, and so few that the memory does
PASSES = 3  # over all weights; the best counts
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Record = dict[str, Any]


def rows(*, quick: bool) -> tuple[list[Row], list[Record]]:
    """A row for each size and dtype; and the same as records for a figure."""
    compiled.load()
    records = list(_records(quick=quick))
    found = []
    for record in records:
        case = (
            f"{record['weights']} weights of {record['size']} x {record['size']} {record['dtype']}: overwrite 1 %"
        )
        same = f"{record['size']} {record['dtype']}"
        fuse, peer = record["fuse_us"], f"W += A @ B, r {RANK}"
        found.append(Row(case, record["overwrite_us"], fuse, "us/weight", peer))
        found.append(
            Row(f"  {same} by the Switcher, checked, base kept", record["switcher_us"], fuse, "us/weight", peer)
        )
        found.append(
            Row(f"  {same} by torch's scatter_, as in the paper", record["scatter_us"], fuse, "us/weight", peer)
        )
    return found, records


def _records(*, quick: bool) -> Iterator[Record]:
    for name, dtype in DTYPES.items():
        for size in SIZES[: 2 if quick else None]:
            taken = _measure(size, dtype, quick=quick)
            yield {"machine": machine_name(), "dtype": name, "size": size} | taken


def _measure(size: int, dtype: torch.dtype, *, quick: bool) -> Record:
    one = (0.02 * torch.randn(size, size)).to(dtype)
    each = one.numel() * one.element_size()
    number = max(math.ceil(LEAST / each), min(WEIGHTS, MOST // each)) if not quick else 4
    weights = {str(n): one.clone() for n in range(number)}
    # A few masks, values and factors serve all weights in turn: a decoded adapter lies in memory, and so do the factors.
    entries = [_entries(size, one, seed) for seed in range(4)]
    factors = [_factors(size, dtype, seed) for seed in range(4)]
    adapter = Adapter(
        [
            SparseTensor(name, (size, size), indices, values, base_digest=digest)
            for n, name in enumerate(weights)
            for indices, values, digest in [entries[n % 4]]
        ]
    )
    flats = [as_array(weight).reshape(-1) for weight in weights.values()]
    sent = [(torch.from_numpy(at), torch.from_numpy(v.view(f"i{v.itemsize}")).view(dtype)) for at, v, _ in entries]
    switcher = Switcher(weights)
    switcher.load(adapter)
    switcher.revert()

    def overwrite() -> None:
        for n, flat in enumerate(flats):
            compiled.put(flat, entries[n % 4][0], entries[n % 4][1])

    def scatter() -> None:
        for n, weight in enumerate(weights.values()):
            weight.view(-1).scatter_(0, *sent[n % 4])

    def fuse() -> None:
        for n, weight in enumerate(weights.values()):
            a, b = factors[n % 4]
            weight.add_(a @ b)

    ways = {"overwrite": overwrite, "scatter": scatter, "fuse": fuse}
    taken = {"switcher": _timed(lambda: switcher.load(adapter))}
    for _ in range(PASSES - 1):
        switcher.revert()
        taken["switcher"] = min(taken["switcher"], _timed(lambda: switcher.load(adapter)))
    switcher.revert()
    for _ in range(PASSES):
        for name, work in ways.items():
            taken[name] = min(taken.get(name, math.inf), _timed(work))
    return {"weights": number} | {f"{name}_us": 1e6 * seconds / number for name, seconds in taken.items()}


def _entries(size: int, weight: torch.Tensor, seed: int) -> tuple[Indices, Any, str]:
    """A mask, its targets, and the digest of the base's values there."""
    indices = uniform(size * size, DENSITY, seed)
    flat = as_array(weight).reshape(-1)
    values = np.random.default_rng(seed).permutation(flat[indices])
    made = SparseTensor("w", (size, size), indices, values, base=flat[indices])
    assert made.base_digest is not None
    return indices, values, made.base_digest


def _factors(size: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Small ones, so that a sum of many updates stays finite."""
    random = torch.Generator().manual_seed(seed)
    a, b = (0.01 * torch.randn(shape, generator=random) for shape in ((size, RANK), (RANK, size)))
    return a.to(dtype), b.to(dtype)


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
