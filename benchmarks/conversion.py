"""Converting a LoRA against PEFT merging it; exact top-k against torch.topk."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.model import Shape
from benchmarks.sizes import account, entropy
from benchmarks.table import Row, seconds
from shira_format._core.arrays import Array
from shira_format._core.threads import Workers
from shira_format.entries.changes import Tile
from shira_format.selection import LocalEngine, TopK, select

# In a process of its own: the peak of its resident memory is then that of the conversion, imports included.
_CONVERT = """
import json, resource, sys, time
from shira_format.convert import lora_to_shira
start = time.perf_counter()
lora_to_shira(sys.argv[1], sys.argv[2], sys.argv[3], density=0.01, scope=sys.argv[4])
taken = time.perf_counter() - start
if sys.platform == "linux":
    # ru_maxrss starts at what the parent had when it forked; VmHWM starts anew with the program.
    status = open("/proc/self/status").read()
    peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([taken, peak]))
"""
RUNS = 3


def rows(shape: Shape, base: Path, lora: Path, folder: Path) -> Iterator[Row]:
    """Conversion, per tensor and global, and top-k of one weight."""
    what = f"{shape.adapted / 1e9:.2f} G bf16, r 32, 1 %"
    # A model of a few million parameters is all start-up; only the large one says anything about the rate.
    large = shape.adapted > 5e8
    for held in ("float32", "bfloat16"):
        model = _peft(base, lora, held)
        _merge(model)  # a warm-up: it faults memory in
        merges: list[float] = []
        runs: dict[str, list[tuple[float, float]]] = {"tensor": [], "global": []}
        # In turns, so that whatever else the machine does falls on both.
        for _ in range(RUNS):
            merges.append(_merge(model))
            for scope, found in runs.items():
                found.append(_convert(lora, base, folder / f"{scope}.st", scope))
        del model
        for scope, found in runs.items():
            taken, merge = min(run[0] for run in found), min(merges)
            if held == "bfloat16":  # PEFT's default is float32 whatever the file holds; this merges faster
                case = f"  beside a LoRA that PEFT holds in bf16, {scope} scope"
                yield Row(case, taken, merge, "s", "PEFT merge_adapter, autocast off")
                continue
            required = ("faster", taken < merge) if large and scope == "tensor" else ("", None)
            yield Row(f"convert LoRA, {scope} scope ({what})", taken, merge, "s", "PEFT merge_adapter", *required)
            peak, case = max(run[1] for run in found), f"  peak resident memory, {scope} scope"
            yield Row(case, peak / 1e6, 1500, "MB", "the limit", "< 1500 MB", peak < 1.5e9)
            yield from _as_converted(folder / f"{scope}.st", scope, large=large)
    yield from _top_k()


def _as_converted(path: Path, scope: str, *, large: bool) -> Iterator[Row]:
    """The largest entries of a product of factors lie in rows and columns: their gaps are not those of chance."""
    index, whole = account(path)
    yield Row(f"  indices as converted, {scope} scope", index, entropy(0.01), "bits/entry", "uniform entropy")
    demand = ("<= 3.2", whole <= 3.2) if large else ("", None)
    yield Row(f"  file as converted, {scope} scope", whole, 6, "bytes/entry", "int32 + bf16", *demand)


def _convert(lora: Path, base: Path, out: Path, scope: str) -> tuple[float, float]:
    command = [sys.executable, "-c", _CONVERT, str(lora), str(base), str(out), scope]
    taken, peak = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return taken, peak


def _peft(base: Path, lora: Path, held: str) -> Any:
    """The LoRA on its base, ready to merge; PEFT holds the LoRA in float32 by default, or in the base's bfloat16."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, str(lora), autocast_adapter_dtype=held == "float32")
    found = {str(p.dtype) for name, p in model.named_parameters() if "lora_" in name}
    assert found == {f"torch.{held}"}, found
    return model


def _merge(model: Any) -> float:
    """Seconds of one merge into the loaded model: loading is not counted, while ours reads its files."""
    start = time.perf_counter()
    model.merge_adapter()
    taken = time.perf_counter() - start
    model.unmerge_adapter()
    return taken


class _Dense:
    """A change that is there already, of a base of zeros."""

    name, grain = "w", 1

    def __init__(self, weight: Array) -> None:
        self._flat = weight.reshape(-1)
        self.shape, self.size = weight.shape, weight.size
        self.dtype = self.weight_dtype = weight.dtype

    def tile(self, start: int, stop: int, out: Array) -> Tile:
        out[:] = self._flat[start:stop]
        return Tile(out)

    def completed(self, indices: Array, values: Array) -> tuple[Array, Array]:
        return np.zeros(indices.size, self.dtype), values


def _top_k(side: int = 4096) -> Iterator[Row]:
    weight = np.random.default_rng(0).standard_normal((side, side), np.float32)
    flat, k = weight.reshape(-1), side * side // 100
    tensor, rule = torch.from_numpy(flat), TopK(None, k)

    def ours() -> tuple[Array, Array]:
        with Workers() as workers:
            ((_, selected),) = select([_Dense(weight)], rule, LocalEngine(workers), workers)
            entries = selected()
        return entries.indices, entries.values

    def by_torch() -> tuple[torch.Tensor, torch.Tensor]:
        indices = torch.topk(tensor.abs(), k, sorted=False).indices
        return indices, tensor[indices]

    def by_partition() -> tuple[Array, Array]:
        magnitudes = np.abs(flat)
        indices = np.flatnonzero(magnitudes >= np.partition(magnitudes, flat.size - k)[flat.size - k])
        return indices, flat[indices]

    indices, values = ours()
    same = np.array_equal(indices, np.sort(by_torch()[0].numpy())) and np.array_equal(values, flat[indices])
    taken, case = 1e3 * seconds(ours), f"exact top 1 % of {side} x {side} float32"
    yield Row(case, taken, 1e3 * seconds(by_torch), "ms", "torch.topk", "same set", same)
    same = np.array_equal(indices, by_partition()[0])
    yield Row(f"{case}, beside numpy", taken, 1e3 * seconds(by_partition), "ms", "np.partition", "same set", same)
