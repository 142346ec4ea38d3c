"""Converting a LoRA against PEFT merging it; exact top-k against torch.topk."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.model import Shape
from benchmarks.table import Row, seconds
from shira_format.arrays import Array
from shira_format.selection import TopK, select

# In a process of its own: the peak of its resident memory is then that of the conversion, imports included.
_CONVERT = """
import json, resource, sys, time
from shira_format.convert import lora_to_shira
from shira_format.selection import TopK
start = time.perf_counter()
lora_to_shira(sys.argv[1], sys.argv[2], sys.argv[3], rule=TopK(0.01, scope=sys.argv[4]))
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
    merge = _peft_merge(base, lora)
    what = f"{shape.adapted / 1e9:.2f} G bf16, r 32, 1 %"
    for scope in ("tensor", "global"):
        runs = [_convert(lora, base, folder / f"{scope}.st", scope) for _ in range(RUNS)]
        taken, peak = min(run[0] for run in runs), max(run[1] for run in runs)
        # A model of a few million parameters is all start-up; only the large one says anything about the rate.
        required = ("faster", taken < merge) if scope == "tensor" and shape.adapted > 5e8 else ("", None)
        yield Row(f"convert LoRA, {scope} scope ({what})", taken, merge, "s", "PEFT merge_adapter", *required)
        yield Row(
            f"  peak resident memory, {scope} scope",
            peak / 1e6,
            1500,
            "MB",
            "the limit",
            "< 1500 MB",
            peak < 1.5e9,
        )
    yield _top_k()


def _convert(lora: Path, base: Path, out: Path, scope: str) -> tuple[float, float]:
    command = [sys.executable, "-c", _CONVERT, str(lora), str(base), str(out), scope]
    taken, peak = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return taken, peak


def _peft_merge(base: Path, lora: Path) -> float:
    """PEFT's merge of the loaded LoRA into the loaded model: loading is not counted, as it is for us."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16), str(lora))
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        model.merge_adapter()
        times.append(time.perf_counter() - start)
        model.unmerge_adapter()
    return min(times)


class _Dense:
    """An update that is there already."""

    name = "w"

    def __init__(self, weight: Array) -> None:
        self._weight = weight
        self.shape, self.dtype = weight.shape, weight.dtype

    def tile(self, start: int, stop: int, out: Array) -> None:
        out[:] = self._weight[start:stop]


def _top_k(side: int = 4096) -> Row:
    weight = np.random.default_rng(0).standard_normal((side, side), np.float32)
    tensor, k = torch.from_numpy(weight), side * side // 100
    rule = TopK(None, k)

    def ours() -> Array:
        return next(iter(select([_Dense(weight)], rule)))[1].indices

    def peer() -> torch.Tensor:
        return torch.topk(tensor.abs().flatten(), k, sorted=False).indices

    same = np.array_equal(ours(), np.sort(peer().numpy()))
    return Row(
        f"exact top 1 % of {side} x {side} float32",
        1e3 * seconds(ours), 1e3 * seconds(peer), "ms", "torch.topk", "same set", same,
    )  # fmt: skip
