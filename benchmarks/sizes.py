"""Bytes: files against those of PEFT, index codecs against the entropy of the mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from safetensors.torch import save_file

from benchmarks.embeddings import BASE, shipped
from benchmarks.model import RANK, Shape
from benchmarks.table import Row
from shira_format._core.arrays import Array, Indices, array_digest
from shira_format.adapter import Adapter
from shira_format.checkpoints import open_checkpoint
from shira_format.convert.lora import lora_to_shira
from shira_format.format import AdapterWriter, load, save
from shira_format.format.codecs import encode_smallest
from shira_format.format.codecs.magnitude import largest
from shira_format.format.codecs.seeded import drawn
from shira_format.tensors import SparseTensor

ENTRIES = 1 << 24
_LORA = Path(__file__).parents[1] / "cli" / "shira_cli" / "data" / "loras" / "spam"


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
    yield from _compact(folder)
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


def _compact(folder: Path) -> Iterator[Row]:
    """Compact files of 1 % of a bf16 weight, and of the shipped LoRAs; beside plain ones."""
    side, random = 4096, np.random.default_rng(7)
    weight = random.normal(0, 0.02, side * side).astype(np.float32)
    base = weight.astype(ml_dtypes.bfloat16)
    tuned = (weight + random.normal(0, 1e-3, weight.size).astype(np.float32)).astype(ml_dtypes.bfloat16)
    count = base.size // 100
    for case, indices, manifest, most in (
        ("largest weights", largest(base, count), {}, 8.0),
        ("random, seeded", drawn("0 w", base.size, count), {"mask": {"rule": "rand", "seed": 0}}, 8.0),
        ("random, seed not known", drawn("0 w", base.size, count), {}, None),
    ):
        own = base[indices]
        adapter = Adapter([SparseTensor("w", (side, side), indices, tuned[indices], base_digest=array_digest(own))], manifest=manifest)  # fmt: skip
        plain, bits = (
            _bits(adapter, folder, base={"w": base.reshape(side, side)}, compact=one) for one in (False, True)
        )
        demand = ("", None) if most is None else (f"<= {most:g}", bits <= most)
        yield Row(f"compact, 1 % bf16, updates of 1e-3, {case}", bits, plain, "bits/entry", "plain", *demand)
    for dtype, most in (("bf16", 15.5), ("fp32", 28.0)):
        bits, plain = _shipped_lora(folder, dtype)
        yield Row(f"compact, 1 % of MiniLM in {dtype}, top-k of the shipped LoRA", bits, plain, "bits/entry", "plain", f"<= {most:g}", bits <= most)  # fmt: skip


def _bits(adapter: Adapter, folder: Path, **options: Any) -> float:
    save(adapter, folder / "compact.st", **options)
    nnz = sum(tensor.nnz for tensor in adapter.values())
    return 8 * (folder / "compact.st").stat().st_size / nnz


def _shipped_lora(folder: Path, dtype: str) -> tuple[float, float]:
    """Bits an entry of the spam LoRA cut to 1 %, compact and plain; header and manifest included, whole tensors not."""
    base: Any = open_checkpoint(shipped(*BASE))
    if dtype == "bf16":
        weights = {name: torch.from_numpy(one.copy()) for name, one in base.items()}
        narrow = {name: one.bfloat16() if one.dtype == torch.float32 else one for name, one in weights.items()}
        save_file(narrow, folder / "narrow.safetensors")
        base = open_checkpoint(folder / "narrow.safetensors")
    lora_to_shira(_LORA, base, folder / "shipped.st", density=0.01)
    adapter = Adapter(dict(load(folder / "shipped.st")))  # without the head
    plain, bits = (_bits(adapter, folder, base=base, compact=one) for one in (False, True))
    return bits, plain


def _one_layer(path: Path, side: int, indices: Indices, values: Array) -> float:
    with AdapterWriter(path) as writer:
        writer.add(SparseTensor("0.weight", (side, side), indices, values, base_digest="0" * 64))
    return path.stat().st_size / indices.size
