"""Work that runs in a process of its own: its peak of memory is then its own, and nothing that ran before helps it.

``python -m benchmarks.apart TASK JSON`` is what :func:`apart` starts. A task imports and loads what it needs, and does
the work itself under the clock.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARC = "arc_v3"  # the densest format of fireworks-delta-compression
_PART = 1 << 20  # bytes that a thread reads at once: they stay in its cache


@dataclass(frozen=True)
class Run:
    """What a task took.

    Attributes:
        seconds: under the clock.
        peak: resident bytes of the process at most, imports and what was loaded before included; on Linux while the clock
            ran, elsewhere from the start of the process.
    """

    seconds: float
    peak: int


def apart(task: str, **arguments: Any) -> Run:
    """Run a task of this module; raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "benchmarks.apart", task, json.dumps(arguments, default=str)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    return Run(*json.loads(done.stdout))


class _Clock:
    """A stopwatch, once around the work."""

    seconds: float
    peak: int

    def __enter__(self) -> None:
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text(
                    "5", "ascii"
                )  # VmHWM starts anew from what is resident now
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self.peak = peak()


def peak() -> int:
    """Resident bytes of this process at most, so far."""
    if sys.platform == "linux":
        # ru_maxrss starts at what the parent had when it forked; VmHWM starts anew with the program.
        status = Path("/proc/self/status").read_text("ascii")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _read(clock: _Clock, files: list[str]) -> None:
    """Each file into memory that is new, as most readers do, and gone before the next one."""
    with clock:
        for name in files:
            with open(name, "rb") as file:
                file.read()


def _read_again(clock: _Clock, files: list[str], threads: int) -> None:
    """All bytes by several threads, each into one small buffer: what the memory and the system can do at best."""
    sizes = [Path(name).stat().st_size for name in files]
    handles = [os.open(name, os.O_RDONLY) for name in files]
    parts = [(handle, at) for handle, size in zip(handles, sizes, strict=True) for at in range(0, size, _PART)]

    def read(mine: list[tuple[int, int]]) -> None:
        buffer = bytearray(_PART)
        for handle, at in mine:
            os.preadv(handle, [buffer], at)

    with ThreadPoolExecutor(threads) as pool, clock:
        list(pool.map(read, [parts[i::threads] for i in range(threads)]))


def _convert(clock: _Clock, base: str, tuned: str, out: str, rule: str, options: dict[str, Any]) -> None:
    from shira_format.convert import full_to_shira

    with clock:
        full_to_shira(tuned, base, out, exact=rule == "exact", **options)


def _top_k_script(clock: _Clock, base: list[str], tuned: list[str], out: str, density: float) -> None:
    """What one writes in ten lines."""
    import torch
    from safetensors.torch import load_file, save_file

    with clock:
        found: dict[str, torch.Tensor] = {}
        for before, after in zip(base, tuned, strict=True):
            weights, targets = load_file(before), load_file(after)
            for name, target in targets.items():
                change = target.float() - weights[name].float()
                k = max(1, round(density * change.numel()))
                indices = torch.topk(change.abs().flatten(), k, sorted=False).indices
                found[f"{name}#indices"] = indices.int()
                found[f"{name}#values"] = target.flatten()[indices]
        save_file(found, out)


def _restore(clock: _Clock, adapter: str, base: str, out: str) -> None:
    from shira_format.export.full import shira_to_full

    with clock:
        shira_to_full(adapter, base, out)


def _copy(clock: _Clock, files: list[str], out: str) -> None:
    folder = Path(out)
    folder.mkdir(exist_ok=True)
    with clock:
        for name in files:
            target = folder / Path(name).name
            shutil.copyfile(name, target)
            handle = os.open(target, os.O_RDWR)
            os.fsync(handle)
            os.close(handle)


def _loaded(files: list[str]) -> dict[str, Any]:
    """All tensors, in memory of their own: ``load_file`` alone maps them, and reads nothing yet."""
    from safetensors.torch import load_file

    return {name: tensor.clone() for file in files for name, tensor in load_file(file).items()}


def _apply(clock: _Clock, adapter: str, base: list[str], tuned: list[str]) -> None:
    """Apply our file to weights in memory, in place."""
    from shira_format.format import load
    from shira_format.live import apply

    weights = _loaded(base)
    with clock:
        apply(load(adapter), weights)
    _check_equal(weights, tuned)


def _apply_compact(clock: _Clock, adapter: str, base: list[str], tuned: list[str]) -> None:
    """The same with a compact file, for which these weights are the base."""
    from shira_format.live import Switcher

    weights = _loaded(base)
    with clock:
        Switcher(weights).switch(adapter)
    _check_equal(weights, tuned)


def _arc() -> Any:
    """``fireworks_delta_compression``, which is not typed; torch warns of a read-only buffer in it."""
    warnings.simplefilter("ignore")
    return importlib.import_module("fireworks_delta_compression")


def _arc_encode(clock: _Clock, base: list[str], tuned: list[str], out: str) -> None:
    arc = _arc()
    folder = Path(out)
    folder.mkdir(exist_ok=True)
    with clock:
        for before, after in zip(base, tuned, strict=True):
            diff = str(folder / Path(before).name)
            arc.delta_compress_files_to_file(src=before, dst=after, diff_file=diff, compression_format=ARC)


def _arc_decode(clock: _Clock, base: list[str], tuned: list[str], diffs: list[str]) -> None:
    """Decode their files to new tensors, shard by shard, beside weights in memory; with their own pool."""
    arc = _arc()
    shards = [_loaded([file]) for file in base]
    result: dict[str, Any] = {}
    with clock:
        for shard, diff in zip(shards, diffs, strict=True):
            result |= arc.delta_decompress_dict_from_file(
                src=shard,
                diff_file=diff,
                compression_format=ARC,
                executor=arc.compression.get_delta_decompress_executor(),
            )
            shard.clear()  # so that theirs, too, needs room for the weights only once, and a shard
    _check_equal(result, tuned)


def _arc_in_place(clock: _Clock, base: list[str], tuned: list[str], diffs: list[str], out: str) -> None:
    """Decode their files into mapped copies of the base's, nothing flushed."""
    arc = _arc()
    folder = Path(out)
    folder.mkdir(exist_ok=True)
    copies = [shutil.copyfile(file, folder / Path(file).name) for file in base]
    with clock:
        for copy, diff in zip(copies, diffs, strict=True):
            arc.delta_decompress_inplace(base_path=str(copy), diff_path=diff, compression_format=ARC)
    _check_equal(_loaded([str(copy) for copy in copies]), tuned)


def _check_equal(weights: dict[str, Any], files: list[str]) -> None:
    """Bit for bit; raises AssertionError."""
    import torch
    from safetensors.torch import load_file

    names = set()
    for file in files:
        for name, tensor in load_file(file).items():
            assert torch.equal(weights[name].view(torch.int16), tensor.view(torch.int16)), name
            names.add(name)
    assert names == set(weights)


def _train(clock: _Clock, method: str, setting: dict[str, Any]) -> None:
    from benchmarks.training import train

    train(clock, method, setting)


_TASKS: dict[str, Callable[..., None]] = {
    "read": _read,
    "read again": _read_again,
    "convert": _convert,
    "top-k script": _top_k_script,
    "restore": _restore,
    "copy": _copy,
    "apply": _apply,
    "apply compact": _apply_compact,
    "arc encode": _arc_encode,
    "arc decode": _arc_decode,
    "arc in place": _arc_in_place,
    "train": _train,
}


def _main() -> None:
    clock = _Clock()
    _TASKS[sys.argv[1]](clock, **json.loads(sys.argv[2]))
    print(json.dumps([clock.seconds, clock.peak]))


if __name__ == "__main__":
    _main()
