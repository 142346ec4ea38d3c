"""Bytes: files against those of PEFT, index codecs against the entropy of the mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from peft import LoraConfig, ShiraConfig, get_peft_model

from benchmarks.model import RANK, Shape
from benchmarks.table import Row
from shira_format._core.arrays import Array, Indices
from shira_format.format import AdapterWriter
from shira_format.format.codecs import encode_smallest
from shira_format.tensors import SparseTensor

ENTRIES = 1 << 24


def uniform(elements: int, density: float, seed: int) -> Indices:
    """A mask in which each entry is there with probability ``density``, by its gaps."""
    random = np.random.default_rng(seed)
    expected = elements * density
    gaps = random.geometric(density, int(expected + 8 * math.sqrt(expected) + 16))
    indices = np.cumsum(gaps) - 1
    return indices[indices < elements]


def entropy(density: float) -> float:
    """Bits that an entry of a uniform mask takes at least."""
    p = density
    return (-p * math.log2(p) - (1 - p) * math.log2(1 - p)) / p


def rows(shape: Shape, folder: Path, uniform_file: Path) -> Iterator[Row]:
    """The file of the whole model, PEFT's files, and the codecs."""
    index, whole = account(uniform_file)
    limit = entropy(0.01)
    case = f"indices of {shape.adapted / 1e9:.2f} G at 1 %, uniform, directory included"
    yield Row(case, index, limit, "bits/entry", "entropy", "<= 8.8", index <= 8.8)
    # In a small model the header weighs more.
    demand = ("<= 3.2", whole <= 3.2) if shape.adapted > 5e8 else ("", None)
    yield Row("file, bf16, all that it holds", whole, 6, "bytes/entry", "int32 + bf16", *demand)
    yield from _against_peft(folder)
    for density in (0.001, 0.01, 0.02, 0.05, 0.1):
        indices = uniform(ENTRIES, density, 3)
        encoded = encode_smallest(indices, (4096, 4096))
        bits = 8 * encoded.stream_bytes / indices.size
        yield Row(f"{encoded.params['codec']} at {density:.1%}", bits, entropy(density), "bits/entry", "entropy")
    few = np.sort(np.random.default_rng(4).choice(500_000_000, 10, replace=False))
    stored = encode_smallest(few, (500_000_000,)).stream_bytes
    yield Row("10 entries in 500 M", stored, 80, "bytes", "8 bytes an entry", "<= 80", stored <= 80)


def uniform_adapter(shape: Shape, path: Path) -> Path:
    """An adapter of the whole model with uniform 1 % masks and bf16 targets."""
    random = np.random.default_rng(5)
    with AdapterWriter(path, {"base_model": {"id": "llama-shaped"}}) as writer:
        for seed, (name, out_features, in_features) in enumerate(shape.linear()):
            indices = uniform(out_features * in_features, 0.01, seed)
            values = random.standard_normal(indices.size, np.float32).astype(ml_dtypes.bfloat16)
            writer.add(
                SparseTensor(f"{name}.weight", (out_features, in_features), indices, values, base_digest="0" * 64)
            )
    return path


def account(path: Path) -> tuple[float, float]:
    """Index bits an entry and file bytes an entry."""
    from shira_format.format import AdapterFile

    file = AdapterFile(path)
    nnz = sum(entry.nnz for entry in file.manifest.tensors.values())
    index = sum(s.nbytes for name, s in file.streams.items() if name.endswith(("#indices", "#blocks")))
    return 8 * index / nnz, path.stat().st_size / nnz


def _against_peft(folder: Path) -> Iterator[Row]:
    """Files that PEFT itself writes for one layer, per parameter; ours with as many entries in the same weight."""
    side = 2048
    parameters = 2 * RANK * side
    indices = uniform(side * side, parameters / side**2, 6)
    for kind, config in (
        ("SHiRA", ShiraConfig(r=RANK, target_modules=["0"])),
        ("LoRA", LoraConfig(r=RANK, target_modules=["0"])),
    ):
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(side, side, bias=False)), config)
        model.save_pretrained(folder / kind)
        peer = (folder / kind / "adapter_model.safetensors").stat().st_size / parameters
        for dtype in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
            ours = _one_layer(folder / "one.st", side, indices, np.zeros(indices.size, dtype))
            case = f"file of {parameters} parameters, {dtype}, beside PEFT {kind}"
            yield Row(case, ours, peer, "bytes/entry", f"PEFT {kind}, float32")


def _one_layer(path: Path, side: int, indices: Indices, values: Array) -> float:
    with AdapterWriter(path) as writer:
        writer.add(SparseTensor("0.weight", (side, side), indices, values, base_digest="0" * 64))
    return path.stat().st_size / indices.size
