"""Joining two adapters: ours, sparse, beside PEFT's own functions on the same weights made dense.

Both start from the base's values and the tuned ones in bf16 (ours: at the entries) and end with the merged ones in bf16.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from peft.utils import merge_utils

from benchmarks.apart import peak
from benchmarks.model import LARGE, Shape
from benchmarks.sizes import uniform
from benchmarks.table import Row
from shira_format._core import compiled
from shira_format._core.arrays import as_array
from shira_format._core.threads import Workers
from shira_format.adapter import Adapter
from shira_format.format import AdapterWriter, load
from shira_format.merging import Merge, merge, open_merge
from shira_format.tensors import SparseTensor

DENSITY = 0.01
FASTER = 50
ROOM = 1.0  # GB
WEIGHTS = (0.7, 0.3)
METHODS: dict[str, Callable[..., Any]] = {"linear": merge_utils.task_arithmetic, "ties": merge_utils.ties}
# TIES keeps half of each adapter's entries: of the dense weight they are this share.
TRIMMED = DENSITY / 2
_RUNS = 3
_UNEQUAL = 0.02  # of the entries


def rows(shape: Shape, folder: Path) -> Iterator[Row]:
    """In memory, layer by layer and in turns; from file to file; and the peak of memory of that."""
    paths = [_adapter(shape, folder / f"merge-{n}.st", seed=1000 * n) for n in (1, 2)]
    size = f"{shape.adapted / 1e9:.2g} G parameters"
    for method, function in METHODS.items():
        options = {} if method == "linear" else {"density": TRIMMED}
        ours, theirs = _beside(paths, method, function, options)
        demand = (f"{FASTER}x", theirs >= FASTER * ours) if shape == LARGE else ()
        peer = f"PEFT's {function.__name__} on dense weights, {torch.get_num_threads()} threads"
        yield Row(f"{method} of two adapters at {DENSITY:.0%} in memory, {size}", ours, theirs, "s", peer, *demand)
        whole = min(_timed(lambda m=method, o=options: merge(paths, folder / "merged.st", method=m, weights=WEIGHTS, options=o)) for _ in range(_RUNS))  # type: ignore[misc] # fmt: skip
        peer = "the same, without reading or writing a checkpoint"
        yield Row(f"  {method}, from file to file, checked and hashed", whole, theirs, "s", peer)
        most = _peak(paths, method, options)
        yield Row(
            f"  {method}, peak of memory, whole process",
            most,
            ROOM,
            "GB",
            "what is allowed",
            f"< {ROOM:g}",
            most < ROOM,
        )


def _beside(
    paths: list[Path], method: str, function: Callable[..., Any], options: dict[str, Any]
) -> tuple[float, float]:
    """Seconds of both for all layers, on as many threads as there are; ours has its tensors decoded, PEFT its in memory."""
    adapters = [Adapter(list(load(path).values())) for path in paths]
    job = open_merge(adapters, method=method, weights=WEIGHTS, options=options)
    compiled.load()  # as merge does
    with Workers() as workers:
        ours = min(_timed(lambda: _all(job, workers)) for _ in range(_RUNS))
    theirs = 0.0
    for number, name in enumerate(job.names):
        tensors = [adapter[name] for adapter in adapters]
        base = _weight(number, tensors[0].shape)
        tuned = [_patched(base, tensor) for tensor in tensors]
        start = time.perf_counter()
        deltas = [weight.float() - base.float() for weight in tuned]
        result = function(deltas, torch.tensor(WEIGHTS), *options.values()).add_(base).bfloat16()
        theirs += time.perf_counter() - start
        found, _ = job.tensor(name)
        assert found is not None
        # The same but for the last bit, and for which of several deltas of the same size TIES keeps at the edge.
        same = torch.isclose(result.float(), _patched(base, found).float(), rtol=2**-7, atol=1e-6)
        assert int((~same).sum()) <= _UNEQUAL * found.nnz, name
    return ours, theirs


def _all(job: Merge, workers: Workers) -> None:
    for _ in workers.map(job.tensor, job.names):
        pass


def _weight(number: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)).mul_(0.02).bfloat16()


def _patched(base: torch.Tensor, tensor: SparseTensor) -> torch.Tensor:
    weight = base.clone()
    as_array(weight).reshape(-1)[tensor.indices] = tensor.values
    return weight


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _adapter(shape: Shape, path: Path, seed: int) -> Path:
    """Uniform masks; targets and the values of one base at the entries, bf16."""
    random = np.random.default_rng(seed)
    with AdapterWriter(path, {"base_model": {"id": "llama-shaped"}}) as writer:
        for number, (name, rows_, columns) in enumerate(shape.linear()):
            flat = as_array(_weight(number, (rows_, columns))).reshape(-1)
            indices = uniform(flat.size, DENSITY, seed + number)
            base = flat[indices]
            values = (base + 0.01 * random.standard_normal(indices.size, np.float32)).astype(ml_dtypes.bfloat16)
            writer.add(SparseTensor(f"{name}.weight", (rows_, columns), indices, values, base=base))
    return path


def _peak(paths: list[Path], method: str, options: dict[str, Any]) -> float:
    """GB of the largest resident set of a process that merges the files."""
    out = paths[0].with_name("merged.st")
    command = [sys.executable, "-c", _APART, *map(str, paths), str(out), method, *map(str, options.values())]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


_APART = "import sys; from benchmarks.merging import merge_apart; merge_apart(*sys.argv[1:])"


def merge_apart(first: str, second: str, out: str, method: str, *density: str) -> None:
    """Merge two files; print the peak of memory in GB."""
    options = {"density": float(density[0])} if density else {}
    merge([first, second], out, method=method, weights=WEIGHTS, options=options)
    print(peak() / 1e9)
