"""Every writer, killed at each call that changes the disk: what it writes is the old, the new or not there; the next run leaves no trace.

The n-th of these calls is a sudden end of the process, for n = 1, 2, ... until the writer gets through; of a write, half of the
bytes are there then. What a power cut does to data that is not flushed is not covered, nor memory that is mapped.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from fuzz import safetensors, system
from fuzz.oracle import Violation
from shira_format._core import system as files
from shira_format.adapter import Adapter
from shira_format.convert import lora_to_shira
from shira_format.export.csr import shira_to_csr
from shira_format.export.full import shira_to_full
from shira_format.export.lora import shira_to_lora
from shira_format.export.peft_shira.export import shira_to_peft
from shira_format.format import save
from shira_format.merging.verbs import merge
from shira_format.storage import owners
from shira_format.sync import Publisher, Subscriber
from shira_format.tensors import SparseTensor
from shira_format.training.sparse import sparse_parameters

_KILLED = 137
_CALLS = [
    "replace",
    "rename",
    "fsync",
    "mkdir",
    "rmdir",
    "unlink",
    "remove",
    "truncate",
]  # of os; shutil.rmtree calls these
_SHAPE = (6, 8)
_NAMES = ["a.weight", "b.weight"]

# What a server gets before the first version, and what it gets of the first.
_ZEROS, _ONES = ({name: fill(_SHAPE, np.float32).tobytes() for name in _NAMES} for fill in (np.zeros, np.ones))

Writer = Callable[[Path], object]


def make(random: Random, folder: Path) -> None:
    """The name of a writer, whether there is an old result, and whether the system can exchange two names."""
    case = {
        "writer": random.choice(sorted(_WRITERS)),
        "old": random.random() < 0.6,
        "exchange": random.random() < 0.6,
    }
    (folder / "case.json").write_text(json.dumps(case | {"seed": random.randrange(1000)}), "utf-8")


def check(folder: Path) -> None:
    """Kill it at every call, each time from the same start."""
    case = json.loads((folder / "case.json").read_text("utf-8"))
    write, start = _WRITERS[case["writer"]], folder / "start"
    exchange = bool(case["exchange"])
    start.mkdir()
    _inputs(start, case["seed"])
    if case["old"]:
        _must_end(write, start, exchange)
        _inputs(start, case["seed"] + 1)
    old = _state(start)
    whole = shutil.copytree(start, folder / "whole")
    _must_end(write, whole, exchange)
    new, killed = _state(whole), 0
    while True:
        killed += 1
        place = shutil.copytree(start, folder / f"run-{killed}")
        code = _in_child(write, place, killed, exchange)
        if code not in (0, _KILLED):
            raise Violation(f"call {killed}: the writer ended with {code}")
        if code == 0:
            break
        _check_state(killed, _state(place), old, new)
        _must_end(write, place, exchange)
        if (after := _state(place)) != new:
            wrong = sorted(str(name) for name in after.keys() ^ new.keys()) or [
                name for name in new if after[name] != new[name]
            ]
            raise Violation(f"call {killed}: the next run leaves others than a run that was not killed: {wrong}")
        shutil.rmtree(place)


def _check_state(killed: int, found: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> None:
    for name, content in found.items():
        if name.startswith(".") or name.endswith(".partial"):  # what the next run takes up, or removes
            continue
        allowed = [old.get(name), new.get(name), *([_ONES, _ZEROS] if name == "published" else [])]
        if content not in allowed:
            raise Violation(f"call {killed}: {name!r} is neither the old one nor the new one")


def _must_end(write: Writer, place: Path, exchange: bool) -> None:
    if (code := _in_child(write, place, 0, exchange)) != 0:
        raise Violation(f"a run that is not killed ends with {code}")


def _in_child(write: Writer, place: Path, at: int, exchange: bool) -> int:
    """The exit code of a writer, killed at a call; 0: at none."""
    name = next(name for name, one in _WRITERS.items() if one is write)
    child = system.children().Process(target=_run, args=(name, place, at, exchange))
    child.start()
    child.join()
    return int(child.exitcode)


def _run(name: str, place: Path, at: int, exchange: bool) -> None:
    left = [at]

    def is_last() -> bool:
        left[0] -= 1
        return left[0] == 0

    def killing(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            if is_last():
                os._exit(_KILLED)
            return call(*arguments, **options)

        return called

    builtins.open = io.open = _opening(is_last)
    for call in _CALLS:
        setattr(os, call, killing(getattr(os, call)))
    files.exchange = killing(files.exchange) if exchange else lambda *_: False
    owners._cleaned.clear()  # a new process has cleaned no folder yet
    _WRITERS[name](place)


def _opening(is_last: Callable[[], bool]) -> Callable[..., Any]:
    """``open`` of files whose writes are counted, and the last of which is not finished."""
    plain = builtins.open

    class Torn(io.FileIO):
        def write(self, data: Any) -> int:
            if is_last():
                view = memoryview(data).cast("B")
                super().write(view[: len(view) // 2])
                os._exit(_KILLED)
            return super().write(data)

    def opened(file: Any, mode: str = "r", buffering: int = -1, *text: Any, **options: Any) -> Any:
        if not set("wax+") & set(mode) or "opener" in options:  # those are files without a name
            return plain(file, mode, buffering, *text, **options)
        raw = Torn(file, mode.translate({ord("b"): None, ord("t"): None}))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *text, **options)

    return opened


def _state(place: Path) -> dict[str, Any]:
    """What is in a folder by its visible and hidden names; the content of folders as a whole."""
    found: dict[str, Any] = {}
    for path in sorted(place.iterdir()):
        if path.name == "published":
            found[path.name] = _published(path)
        elif path.is_dir():
            found[path.name] = {
                str(one.relative_to(path)): one.read_bytes() for one in sorted(path.rglob("*")) if one.is_file()
            }
        else:
            found[path.name] = path.read_bytes()
    return found


def _published(path: Path) -> dict[str, bytes]:
    """What a server gets: tokens of publishers are others each time."""
    weights = {name: np.zeros(_SHAPE, np.float32) for name in _NAMES}
    if any(one.suffix in (".json", ".jsonl") or "index" in one.name for one in path.rglob("*") if one.is_file()):
        Subscriber(weights, path).update()
    return {name: weight.tobytes() for name, weight in weights.items()}


def _inputs(place: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    base = {name: np.random.default_rng(0).standard_normal(_SHAPE).astype(np.float32) for name in _NAMES}
    (place / "base.safetensors").write_bytes(safetensors.content(base))
    for file in ("one.st", "two.st"):
        tensors = []
        for name, weight in base.items():
            indices = np.flatnonzero(random.random(weight.size) < 0.3)
            own = weight.reshape(-1)[indices]
            tensors.append(
                SparseTensor(
                    name, _SHAPE, indices, own + random.standard_normal(indices.size).astype(np.float32), base=own
                )
            )
        save(Adapter(tensors), place / file)
    (place / "lora").mkdir(exist_ok=True)
    pairs = {"lora_A": (2, _SHAPE[1]), "lora_B": (_SHAPE[0], 2)}
    factors = {
        f"base_model.model.{name.removesuffix('.weight')}.{part}.weight": random.standard_normal(shape).astype(np.float32)
        for name in _NAMES for part, shape in pairs.items()
    }  # fmt: skip
    (place / "lora" / "adapter_model.safetensors").write_bytes(safetensors.content(factors))
    (place / "lora" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}), "utf-8"
    )
    np.save(place / "step.npy", random.standard_normal(_SHAPE).astype(np.float32))


def _train(place: Path) -> None:
    model = torch.nn.Linear(_SHAPE[1], _SHAPE[0], bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.ones(_SHAPE))
    training = sparse_parameters(model, {"weight": np.arange(0, 48, 5)})
    optimizer = torch.optim.SGD(training.parameters(), lr=0.1)
    (model(torch.from_numpy(np.load(place / "step.npy"))) ** 2).sum().backward()
    optimizer.step()
    training.save_state(place / "trained.st", optimizer)


def _publish(place: Path) -> None:
    """The weights of this run: what is published is never half a version."""
    weights = {name: np.ones(_SHAPE, np.float32) for name in _NAMES}
    publisher = Publisher(weights, place / "published", snapshot_every=2)
    weights[_NAMES[0]][...] = np.load(place / "step.npy")
    publisher.publish()


_WRITERS: dict[str, Writer] = {
    "adapter": lambda place: save(Adapter({}), place / "new.st"),
    "conversion": lambda place: lora_to_shira(
        place / "lora",
        place / "base.safetensors",
        place / "new.st",
        density=0.3,
        threads=1,
        resume=True,
        force=True,
    ),
    "csr": lambda place: shira_to_csr(place / "one.st", place / "new", force=True),
    "full": lambda place: shira_to_full(place / "one.st", place / "base.safetensors", place / "new", threads=1),
    "lora": lambda place: shira_to_lora(
        place / "one.st", out=place / "new", base=place / "base.safetensors", rank=2, force=True
    ),
    "merge": lambda place: merge([place / "one.st", place / "two.st"], place / "new.st", threads=1),
    "peft": lambda place: shira_to_peft(
        place / "one.st", out=place / "new", base=place / "base.safetensors", pad=True, force=True
    ),
    "publisher": _publish,
    "training": _train,
}
