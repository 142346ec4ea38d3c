"""Changing the adapter of a model in memory: ours beside PEFT, a dense fuse by hand, and the limit of the memory.

Each comparison has both models in one process and lets them switch in turns, so that whatever else the machine does falls
on both. A switch takes one adapter off and puts another one on; two of them alternate.
"""

from __future__ import annotations

import gc
import statistics
import time
import tracemalloc
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numba import njit
from peft import PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, logging

from benchmarks.model import LINEAR, RANK, Shape, make_lora
from benchmarks.sizes import uniform
from benchmarks.table import Row
from shira_format._core.arrays import as_array
from shira_format._core.threads import Threads
from shira_format.convert import lora_to_shira
from shira_format.format import AdapterWriter
from shira_format.live import AdapterPool, Switcher
from shira_format.tensors import SparseTensor

DENSITY = 0.01
LINE = 64  # bytes of a cache line
RUNS = 3  # switches of the slow peers, after one that is not counted; the best counts
QUICK_RUNS = 5  # times two switches of those that take a fraction of a second
Times = dict[str, list[float]]


def rows(shape: Shape, base: Path, lora: Path, folder: Path) -> Iterator[Row]:
    """All comparisons; on a GPU once more, if there is one.

    Args:
        shape: of the model.
        base: its folder.
        lora: a LoRA of it.
        folder: for adapters and a second LoRA.
    """
    loras = [lora, make_lora(shape, folder / "lora-2", seed=3)]
    uniform_ones = [_uniform_adapter(shape, base, folder / f"switch-{n}.st", seed=1000 * n) for n in (1, 2)]
    converted = [folder / f"switch-converted-{n}.st" for n in (1, 2)]
    for one, path in zip(loras, converted, strict=True):
        lora_to_shira(one, base, path, density=DENSITY)
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT, transformers and torch deprecate in each other
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            ours = _Ours(base, uniform_ones, device)
            table = _Table(shape, ours, device)
            yield from table.beside_lora(_PeftLora(base, loras, device), converted)
            yield from table.beside_shira(_PeftShira(base, shape, device))
            yield from table.beside_dense(_Dense(base, loras, device))
            if device == "cpu":
                yield from table.beside_limit()
                yield table.memory(base)
            yield table.unchanged(base)


def _uniform_adapter(shape: Shape, base: Path, path: Path, seed: int) -> Path:
    """Uniform masks and bf16 targets over all linear layers, with digests of this base."""
    random = np.random.default_rng(seed)
    weights = load_file(base / "model.safetensors")
    with AdapterWriter(path, {"base_model": {"id": "llama-shaped"}}) as writer:
        for number, (name, rows, columns) in enumerate(shape.linear()):
            size = (rows, columns)
            flat = as_array(weights[f"{name}.weight"]).reshape(-1)
            indices = uniform(flat.size, DENSITY, seed + number)
            values = (0.02 * random.standard_normal(indices.size, np.float32)).astype(ml_dtypes.bfloat16)
            digest = SparseTensor(name, size, indices, values, base=flat[indices]).base_digest
            writer.add(SparseTensor(f"{name}.weight", size, indices, values, base_digest=digest))
    return path


class _Ours:
    """A model, its switcher, and two adapters as files and in memory."""

    def __init__(self, base: Path, paths: Sequence[Path], device: str) -> None:
        self.model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to(device)
        self.paths = paths
        self.switcher = Switcher(self.model)
        pool = AdapterPool({str(n): path for n, path in enumerate(paths)})
        self.decoded = [pool.get_adapter(name) for name in pool]

    def fresh(self) -> Switcher:
        """A switcher that has seen no adapter, on the bare base."""
        self.switcher.revert()
        self.switcher = Switcher(self.model)
        return self.switcher


class _PeftLora:
    """Two LoRAs on their base; PEFT holds them in float32, its default."""

    def __init__(self, base: Path, loras: Sequence[Path], device: str) -> None:
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        self.model: Any = PeftModel.from_pretrained(model, str(loras[0]), adapter_name="0")
        self.model.load_adapter(str(loras[1]), adapter_name="1")
        self.model.to(device)

    def off(self) -> None:
        self.model.unmerge_adapter()

    def on(self, number: int) -> None:
        self.model.set_adapter(str(number))
        self.model.merge_adapter()

    def both(self) -> None:
        """The first at its full strength, the second at half of it."""
        layers = [module for module in self.model.modules() if hasattr(module, "set_scale")]
        for layer in layers:
            layer.set_scale("1", 0.5)
        self.model.merge_adapter(["0", "1"])


class _PeftShira(_PeftLora):
    """Two sparse adapters with as many entries as ours, near enough: PEFT's are multiples of rows + columns."""

    def __init__(self, base: Path, shape: Shape, device: str) -> None:
        sides = sum(rows + columns for _, rows, columns in shape.linear())
        self.rank = round(DENSITY * shape.adapted / sides)
        self.entries = self.rank * sides
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        self.model = get_peft_model(model, self._config(0), adapter_name="0")
        self.model.add_adapter("1", self._config(1))
        self.model.to(device)

    def _config(self, seed: int) -> ShiraConfig:
        config = ShiraConfig(r=self.rank, target_modules=list(LINEAR), init_weights=False)
        config.mask_fn = partial(_random_mask, np.random.default_rng(seed))  # PEFT's own takes 20 s for the model
        return config


def _random_mask(random: np.random.Generator, layer: torch.nn.Linear, r: int, **_: Any) -> torch.Tensor:
    weight = layer.weight
    at = random.choice(weight.numel(), r * sum(weight.shape), replace=False, shuffle=False)
    mask = torch.zeros_like(weight)
    mask.view(-1)[torch.from_numpy(at)] = 1
    return mask


class _Dense:
    """A loop over the layers, in place on bf16 weights whose base is kept, with what is fastest here."""

    def __init__(self, base: Path, loras: Sequence[Path], device: str) -> None:
        weights = load_file(base / "model.safetensors", device=device)
        factors = [load_file(path / "adapter_model.safetensors", device=device) for path in loras]
        prefix, end = "base_model.model.", ".lora_A.weight"
        names = [key.removeprefix(prefix).removesuffix(end) for key in factors[0] if key.endswith(end)]
        self._layers = []
        for name in names:
            kept = weights[f"{name}.weight"].clone()
            wide = [tuple(of[f"{prefix}{name}.lora_{factor}.weight"] for factor in "BA") for of in factors]
            narrow = [tuple(factor.bfloat16() for factor in pair) for pair in wide]
            self._layers.append((kept.clone(), kept, narrow, wide))
        two_steps = {"addmm_ in bf16": self._narrow, "add_ of a float32 product": self._wide}
        taken = {}
        for way, work in two_steps.items():
            work(0, of=len(LINEAR))
            taken[way] = _timed(partial(work, 1, of=len(LINEAR)), device)
        self.name = min(taken, key=taken.__getitem__)
        self.two_steps = two_steps[self.name]

    def _narrow(self, number: int, of: int | None = None) -> None:
        for live, kept, pairs, _ in self._layers[:of]:
            live.copy_(kept)
            live.addmm_(*pairs[number], alpha=2)

    def _wide(self, number: int, of: int | None = None) -> None:
        for live, kept, _, pairs in self._layers[:of]:
            live.copy_(kept)
            live.add_(torch.mm(*pairs[number]), alpha=2)

    def one_step(self, number: int) -> None:
        """Never the base alone: there is no time at which the adapter is off."""
        for live, kept, pairs, _ in self._layers:
            torch.addmm(kept, *pairs[number], alpha=2, out=live)


class _Limit:
    """One byte into each cache line in which a switch between two adapters changes something, on the same threads.

    In the model's own memory, so that both sides meet the same pages; the bytes that were there come back afterwards.
    """

    def __init__(self, ours: _Ours) -> None:
        live = ours.model.state_dict()
        self._work = []
        for first, second in zip(*(adapter.tensors for adapter in ours.decoded), strict=True):
            assert first.name == second.name
            flat = as_array(live[first.name]).reshape(-1).view(np.uint8)
            before = flat.ctypes.data % LINE  # bytes of the first line that belong to something else
            lines = [(tensor.indices * tensor.dtype.itemsize + before) // LINE for tensor in (first, second)]
            at = np.maximum(np.unique(np.concatenate(lines)) * LINE - before, 0).astype(np.uint32)
            self._work.append((flat, at))
        self.lines = sum(at.size for _, at in self._work)
        self._kept = [flat[at] for flat, at in self._work]
        self._threads = Threads()

    def touch(self) -> None:
        self._threads.map(lambda work: _touch(*work), self._work)

    def restore(self) -> None:
        """Put back what was there when this was made."""
        for (flat, at), kept in zip(self._work, self._kept, strict=True):
            flat[at] = kept


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _touch(flat: Any, at: Any) -> None:
    for i in range(at.size):
        flat[at[i]] = 1


class _Table:
    """The rows of one device."""

    def __init__(self, shape: Shape, ours: _Ours, device: str) -> None:
        self._ours = ours
        self._device = device
        self._where = "" if device == "cpu" else ", GPU"
        self._what = f"({shape.adapted / 1e9:.2f} G bf16, 1 %)"
        # A small model is all overhead; only the large one is slower than its memory.
        self._large = shape.adapted > 5e8
        self._demands = self._large and device == "cpu"

    def beside_lora(self, peer: _PeftLora, converted: Sequence[Path]) -> Iterator[Row]:
        ours, taken = self._ours, _times()
        self._warm_up()
        for path in converted:
            ours.switcher.switch(path)
        peer.on(0)  # which faults memory in
        for number in (1, 0, 1)[:RUNS]:
            off = self._time(taken, "unmerge", peer.off)
            taken["switch"].append(off + self._time(taken, "merge", partial(peer.on, number)))
            self._time(taken, "converted", partial(ours.switcher.switch, converted[number]))
            ours.switcher.switch(ours.paths[1 - number])
            for path in (ours.paths[number], ours.paths[1 - number], ours.paths[number]):
                self._time(taken, "file", partial(ours.switcher.switch, path))
            self._time(taken, "revert", ours.switcher.revert)
            self._time(taken, "load", partial(ours.switcher.load, ours.paths[number]))
            ours.fresh().switch(ours.paths[1 - number])
            self._time(taken, "first", partial(ours.switcher.switch, ours.paths[number]))
        peer.off()
        self._time(taken, "merge both", peer.both)
        for _ in range(RUNS):
            ours.switcher.revert()
            self._time(taken, "both", lambda: ours.switcher.set([(ours.paths[0], 1.0), (ours.paths[1], 0.5)]))
        ours.switcher.revert()
        lora, of = f"PEFT LoRA, r {RANK}", "unmerge_adapter + merge_adapter"
        yield from self._rows(
            f"switch, from a file {self._what}, beside LoRA", taken, "file", "switch", f"{lora}, {of}", 100
        )
        case = "  adapters that were converted from these LoRAs"
        yield from self._rows(case, taken, "converted", "switch", f"{lora}, {of}")
        case = "  the first time, the base checked in a pass of its own"
        yield from self._rows(case, taken, "first", "switch", f"{lora}, {of}")
        yield from self._rows("  load alone, from a file", taken, "load", "merge", f"{lora}, merge_adapter")
        yield from self._rows("  revert alone", taken, "revert", "unmerge", f"{lora}, unmerge_adapter")
        case = "  two at once, at strengths 1 and 0.5, from files"
        yield from self._rows(case, taken, "both", "merge both", f"{lora}, merge_adapter of both")

    def beside_shira(self, peer: _PeftShira) -> Iterator[Row]:
        ours, taken = self._ours, _times()
        self._warm_up()
        peer.on(0)
        for number in (1, 0, 1)[:RUNS]:
            off = self._time(taken, "unmerge", peer.off)
            taken["switch"].append(off + self._time(taken, "merge", partial(peer.on, number)))
            for path in (ours.paths[number], ours.paths[1 - number], ours.paths[number]):
                self._time(taken, "file", partial(ours.switcher.switch, path))
        mine = sum(tensor.nnz for tensor in ours.decoded[0].tensors)
        who = f"PEFT SHiRA, r {peer.rank}: {peer.entries / mine:.2f} times as many entries"
        yield from self._rows(f"switch, from a file {self._what}, beside SHiRA", taken, "file", "switch", who, 25)

    def beside_dense(self, peer: _Dense) -> Iterator[Row]:
        ours, taken = self._ours, _times()
        self._warm_up()
        for work in (peer.two_steps, peer.one_step):
            work(0)
        for number in (1, 0) * QUICK_RUNS:
            self._time(taken, "two steps", partial(peer.two_steps, number))
            self._time(taken, "file", partial(ours.switcher.switch, ours.paths[number]))
            self._time(taken, "one step", partial(peer.one_step, number))
            self._time(taken, "decoded", partial(ours.switcher.switch, ours.decoded[1 - number]))
        two, one = (
            f"dense by hand, r {RANK}: copy_ of the kept base, {peer.name}",
            "the same by addmm(out=), in one pass",
        )
        yield from self._rows(
            f"switch, from a file {self._what}, beside a dense fuse", taken, "file", "two steps", two, 5
        )
        yield from self._rows("  beside a dense fuse in one pass", taken, "file", "one step", one)
        yield from self._rows(
            "  decoded in memory, beside the dense fuse in two", taken, "decoded", "two steps", two
        )

    def beside_limit(self) -> Iterator[Row]:
        ours, taken = self._ours, _times()
        self._warm_up()
        ours.switcher.switch(ours.decoded[0])
        peer = _Limit(ours)
        peer.touch()  # compiled by that
        peer.restore()
        for _ in range(QUICK_RUNS):
            self._time(taken, "touch", peer.touch)
            peer.restore()
            for adapter in ours.decoded[::-1]:  # the first one is on again at the end, as when the limit was made
                self._time(taken, "decoded", partial(ours.switcher.switch, adapter))
        who = f"writing a byte in each of its {peer.lines / 1e6:.1f} M cache lines"
        yield from self._rows(
            f"switch, decoded in memory {self._what}",
            taken,
            "decoded",
            "touch",
            who,
            0.5,
            "at most twice the time",
        )

    def memory(self, base: Path) -> Row:
        """What stays allocated with one adapter on, by tracemalloc, which slows and so comes last."""
        ours = self._ours
        kept = sum(as_array(w).nbytes for n, w in load_file(base / "model.safetensors").items() if "layers" in n and w.ndim == 2)  # fmt: skip
        switcher = ours.fresh()
        tracemalloc.start()
        switcher.switch(ours.paths[0])
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return Row(
            "  memory held with one adapter on", held / 1e6, kept / 1e6, "MB", "a copy of the adapted weights"
        )

    def unchanged(self, base: Path) -> Row:
        """Whether the model is the base again."""
        self._ours.switcher.revert()
        live, same, number = self._ours.model.state_dict(), 0, 0
        for name, weight in load_file(base / "model.safetensors").items():
            same += int(torch.count_nonzero(live[name].cpu().view(torch.int16) == weight.view(torch.int16)))
            number += weight.numel()
        case = f"  weights that are the base's after all these switches{self._where}"
        return Row(case, same, number, "weights", "all", "bit for bit", same == number)

    def _warm_up(self) -> None:
        for adapter in self._ours.decoded:
            self._ours.switcher.switch(adapter)
        for path in self._ours.paths:
            self._ours.switcher.switch(path)

    def _time(self, taken: Times, what: str, work: Callable[[], object]) -> float:
        found = _timed(work, self._device)
        taken[what].append(found)
        return found

    def _rows(
        self, case: str, taken: Times, ours: str, peer: str, who: str, least: float | None = None, demand: str = ""
    ) -> Iterator[Row]:
        """The best of each side; and the medians, if one of them is far from the best."""
        one, two = 1e3 * min(taken[ours]), 1e3 * min(taken[peer])
        case += self._where
        required: tuple[str, bool | None] = ("", None)
        if least is not None and self._demands:
            required = demand or f"{least:g} times as fast", two >= least * one
        yield Row(case, one, two, "ms", who, *required)
        medians = 1e3 * statistics.median(taken[ours]), 1e3 * statistics.median(taken[peer])
        if medians[0] > 1.2 * one or medians[1] > 1.2 * two:
            counts = f"{len(taken[ours])} and {len(taken[peer])}"
            yield Row(f"  {case.strip()}: medians of {counts}", *medians, "ms", who)


def _times() -> Times:
    return defaultdict(list)


def _timed(work: Callable[[], object], device: str) -> float:
    """Seconds, until the device has done it."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
