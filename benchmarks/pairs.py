"""AWOM and AWOR of a whole pair of adapters: our sparse products beside torch's dense ones, in turns, layer by layer."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.apart import peak
from benchmarks.model import LARGE, SMALL, Shape
from benchmarks.sizes import uniform
from benchmarks.table import Row
from shira_analysis.measures.deltas import delta_matrix
from shira_analysis.measures.orthogonality import orthogonality
from shira_format.tensors import SparseTensor

DENSITY = 0.01
FASTER = 10
ROOM = 2.0  # GB
_AGREE = 1e-3  # relative: the peer sums 30 million squares in float32


def rows(shape: Shape) -> Iterator[Row]:
    """Time of both on the same two adapters with random masks; our peak of memory, in a process of its own."""
    ours = theirs = 0.0
    for number, (name, outputs, inputs) in enumerate(shape.linear()):
        pair = [_tensor(name, outputs, inputs, 2 * number + side) for side in (0, 1)]
        if not number:
            orthogonality(*pair)  # compiles
        start = time.perf_counter()
        found = orthogonality(*pair)
        ours += time.perf_counter() - start
        dense = [torch.from_numpy(delta_matrix(tensor).toarray().astype(np.float32)) for tensor in pair]
        start = time.perf_counter()
        norm, zeros = _dense(*dense)
        theirs += time.perf_counter() - start
        assert abs(norm - found.awom) <= _AGREE * norm, (name, norm, found.awom)
        assert found.awor is not None
        assert abs(zeros - found.awor) <= _AGREE, (name, zeros, found.awor)
    case = f"AWOM and AWOR of two adapters at {DENSITY:.0%}, {shape.adapted / 1e9:.2g} G parameters"
    peer = f"torch, dense float32, {torch.get_num_threads()} threads"
    demand = (f"{FASTER}x", theirs >= FASTER * ours) if shape == LARGE else ()
    yield Row(case, ours, theirs, "s", peer, *demand)
    most = _peak(shape)
    yield Row("  peak of memory, whole process", most, ROOM, "GB", "what is allowed", f"< {ROOM:g}", most < ROOM)


def _tensor(name: str, outputs: int, inputs: int, seed: int) -> SparseTensor:
    indices = uniform(outputs * inputs, DENSITY, seed)
    values = np.random.default_rng(seed).standard_normal(indices.size, np.float32)
    return SparseTensor(f"{name}.weight", (outputs, inputs), indices, values, value_kind="delta")


def _dense(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    product = a.T @ b
    return float(torch.linalg.matrix_norm(product)), 1 - int(torch.count_nonzero(product)) / product.numel()


def _peak(shape: Shape) -> float:
    """GB of the largest resident set of a process that holds both adapters and measures them."""
    command = [sys.executable, "-c", _APART, "large" if shape == LARGE else "small"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


_APART = "import sys; from benchmarks.pairs import measure_all; measure_all(sys.argv[1])"


def measure_all(which: str) -> None:
    """Hold both adapters and measure them; print the peak of memory in GB."""
    shape = LARGE if which == "large" else SMALL
    held: list[Any] = [
        [_tensor(name, outputs, inputs, 2 * number + side) for side in (0, 1)]
        for number, (name, outputs, inputs) in enumerate(shape.linear())
    ]
    for pair in held:
        orthogonality(*pair)
    print(peak() / 1e9)
