"""Opening a file and reading one tensor; decoding and encoding; the start of a command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.sizes import uniform
from benchmarks.table import Row, seconds
from shira_format.format import AdapterFile, AdapterWriter, load
from shira_format.format.codecs import BLOCK_SIZE, CODECS
from shira_format.storage.safetensors_file import SafetensorsFile
from shira_format.tensors import SparseTensor

MANY = 10_000  # tensors of a file of many small ones, as of experts


def rows(adapter: Path, folder: Path, *, quick: bool = False) -> Iterator[Row]:
    """Reading beside safetensors, and what is beneath it; if ``quick``, the file of many tensors has a tenth of them."""
    file = AdapterFile(adapter)
    name = max(file.manifest.tensors, key=lambda key: file.manifest.tensors[key].nnz)
    plain = _plain(adapter, folder / "plain.safetensors")

    def peer() -> torch.Tensor:
        with safe_open(plain, "pt") as opened:
            return _touch(opened, name)

    def open_peer() -> object:
        with safe_open(plain, "pt") as opened:
            return opened.keys()

    entries = file.manifest.tensors[name].nnz
    yield Row("open the adapter, header and manifest checked", 1e3 * seconds(lambda: load(adapter)), 1e3 * seconds(open_peer), "ms", "safetensors, int32 + bf16")  # fmt: skip
    for verify in (True, False):
        ours = seconds(lambda verify=verify: load(adapter, verify=verify)[name], repeat=20)  # type: ignore[misc]
        what = "digests checked" if verify else "digests not checked"
        yield Row(f"open and read one tensor of {entries} entries, decoded, {what}", 1e3 * ours, 1e3 * seconds(peer, repeat=20), "ms", "safetensors, not checked, summed")  # fmt: skip
    # In an open file, so that the check of the whole header is not counted for one tensor.
    with safe_open(plain, "pt") as opened:
        ready = seconds(lambda: _touch(opened, name), repeat=20)
    for verify in (True, False):
        reader = load(adapter, verify=verify)
        ours = seconds(lambda reader=reader: reader[name], repeat=20)  # type: ignore[misc]
        what = "digests checked" if verify else "digests not checked"
        yield Row(f"read one tensor of an open file, decoded, {what}", 1e3 * ours, 1e3 * ready, "ms", "safetensors, not checked, summed")  # fmt: skip
    touched, plainly = _bytes(adapter, name), _bytes(plain, name)
    yield Row("bytes of the file that opening and reading it needs", touched, plainly, "bytes", "int32 + bf16")
    yield _opening_many(folder, MANY // 10 if quick else MANY)
    yield from _coding()
    yield _start(adapter)


def _opening_many(folder: Path, count: int) -> Row:
    path, random = folder / "many.st", np.random.default_rng(6)
    with AdapterWriter(path) as writer:
        for number in range(count):
            indices = np.sort(random.choice(4096, 20 + number % 50, replace=False))
            values = random.standard_normal(indices.size, np.float32).astype(ml_dtypes.bfloat16)
            name = f"model.layers.{number // 100}.experts.{number % 100}.weight"
            writer.add(SparseTensor(name, (64, 64), indices, values, base_digest="0" * 64))
    plain = _plain(path, folder / "many.safetensors")

    def open_plain() -> object:
        with safe_open(plain, "pt") as opened:
            return opened.keys()

    ours, peer = seconds(lambda: load(path), repeat=9), seconds(open_plain, repeat=9)
    return Row(f"open a file of {count} tensors, header and manifest checked", 1e3 * ours, 1e3 * peer, "ms", "safetensors, int32 + bf16")  # fmt: skip


def _touch(opened: Any, name: str) -> torch.Tensor:
    """Both arrays of one tensor, summed: safetensors maps them, and nothing is read until somebody looks."""
    values, indices = (opened.get_tensor(f"{name}#{role}") for role in ("values", "indices"))
    return torch.Tensor(values.float() + indices)


def _bytes(path: Path, name: str) -> int:
    """The header and the streams of one tensor."""
    file = SafetensorsFile(path)
    header = file.size - sum(stream.nbytes for stream in file.values())
    return header + sum(stream.nbytes for key, stream in file.items() if key.partition("#")[0] == name)


def _plain(adapter: Path, path: Path) -> Path:
    """The same content as int32 indices and bf16 values."""
    loaded = load(adapter)
    tensors = {}
    for name, tensor in loaded.items():
        tensors[f"{name}#indices"] = torch.from_numpy(tensor.indices.astype(np.int32))
        tensors[f"{name}#values"] = torch.from_numpy(tensor.values.view(np.int16).copy()).view(torch.bfloat16)
    save_file(tensors, path)
    return path


def _coding() -> Iterator[Row]:
    shape = (4096, 4096)
    indices = uniform(shape[0] * shape[1], 0.01, 7)
    gap8 = CODECS["gap8"]
    encoded = gap8.encode(indices, shape, BLOCK_SIZE)
    target = np.empty_like(indices)
    copy = seconds(lambda: np.copyto(target, indices), repeat=50)
    decode = seconds(lambda: gap8.decode(encoded, shape, indices.size), repeat=20)
    encode = seconds(lambda: gap8.encode(indices, shape, BLOCK_SIZE), repeat=20)
    per = 1e9 / indices.size
    yield Row(
        "decode gap8, directory checked, one thread",
        decode * per,
        copy * per,
        "ns/entry",
        "copying the int64 indices",
    )
    yield Row("encode gap8, one thread", encode * per, copy * per, "ns/entry", "copying the int64 indices")


def _start(adapter: Path) -> Row:
    command = [sys.executable, "-m", "shira_cli.inspect", str(adapter)]
    ours = seconds(lambda: subprocess.run(command, check=True, capture_output=True))
    peer = seconds(lambda: subprocess.run([sys.executable, "-c", "import numpy"], check=True))
    return Row("shira-inspect, whole process", ours, peer, "s", "python that imports numpy", "< 0.3 s", ours < 0.3)
