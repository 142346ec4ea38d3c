"""The profiles of the format side by side, beside peers: bits of an entry, encoding, decoding, switching, and steps that are shipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.embeddings import BASE, shipped
from benchmarks.model import Shape
from benchmarks.steps import MOVES
from benchmarks.table import Row, seconds
from shira_analysis.measures.classifier import LabelledTexts
from shira_format._core import compiled
from shira_format._core.arrays import Array, Indices, array_digest
from shira_format.adapter import Adapter
from shira_format.convert import full_to_shira
from shira_format.format import load, save
from shira_format.format.codecs.magnitude import largest
from shira_format.format.codecs.seeded import drawn
from shira_format.live import Switcher
from shira_format.sync import Publisher, Subscriber
from shira_format.tensors import SparseTensor

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PROFILES = ("plain", "compact", "compact, self-contained")
RATES = (1e-6, 1e-5)
_SYNCED = 6  # layers of the model whose steps are published
_TEXTS = Path(__file__).parents[1] / "cli" / "shira_cli" / "data" / "text"


def rows(shape: Shape, folder: Path, *, quick: bool = False) -> Iterator[Row]:
    """All of them.

    Args:
        shape: of the model that is switched and published.
        folder: for files.
        quick: a weight of 1 M elements in place of 16.8 M, and fewer texts.
    """
    compiled.load()
    folder = folder / "profiles"
    folder.mkdir(parents=True, exist_ok=True)
    for load_of in _loads(1024 if quick else 4096):
        yield from _profiles(load_of, folder / "one.st")
    yield from _peers(_step(1024 if quick else 4096), folder / "one.st")
    yield from _real_steps(folder, quick=quick)
    yield from _switching(shape, folder)
    yield from _syncing(shape, folder)


# Profiles of one weight


@dataclass(frozen=True)
class Load:
    """What is stored of one bf16 weight.

    Attributes:
        case: in words.
        base: ``[side, side]``.
        indices: of the entries.
        values: their targets.
        manifest: provenance.
    """

    case: str
    base: Array
    indices: Indices
    values: Array
    manifest: Mapping[str, Any]

    def adapter(self, *, self_contained: bool) -> Adapter:
        own = self.base.reshape(-1)[self.indices]
        known: dict[str, Any] = {"base": own} if self_contained else {"base_digest": array_digest(own)}
        tensor = SparseTensor("w", self.base.shape, self.indices, self.values, **known)
        return Adapter([tensor], manifest=self.manifest)


def _weight(side: int) -> tuple[Array, Array]:
    weight = np.random.default_rng(7).normal(0, 0.02, (side, side)).astype(np.float32)
    return weight, weight.astype(BFLOAT16)


def _moved(weight: Array, move: float) -> Array:
    by = np.random.default_rng(8).normal(0, move, weight.shape).astype(np.float32)
    return (weight + by).astype(BFLOAT16).reshape(-1)


def _step(side: int) -> Load:
    weight, base = _weight(side)
    tuned = _moved(weight, MOVES["step"])
    indices = np.flatnonzero(base.reshape(-1).view(np.uint16) != tuned.view(np.uint16))
    return Load(f"a step, {indices.size / base.size:.1%}", base, indices, tuned[indices], {})


def _loads(side: int) -> Iterator[Load]:
    yield _step(side)
    weight, base = _weight(side)
    tuned, count = _moved(weight, 1e-3), base.size // 100
    seeded = {"mask": {"rule": "rand", "seed": 0}}
    for case, indices, manifest in (
        ("1 %, random, seeded", drawn("0 w", base.size, count), seeded),
        ("1 %, largest weights", largest(base.reshape(-1), count), {}),
        ("1 %, any entries", drawn("1 w", base.size, count), {}),
    ):
        yield Load(case, base, indices, tuned[indices], manifest)


def _profiles(given: Load, path: Path) -> Iterator[Row]:
    base = {"w": given.base}
    found = {}
    for profile in PROFILES:
        adapter = given.adapter(self_contained=profile.endswith("self-contained"))
        options: dict[str, Any] = {"compact": profile != "plain", "base": base}

        def write(adapter: Adapter = adapter, options: dict[str, Any] = options) -> None:
            save(adapter, path, **options)

        def read() -> None:
            load(path, base=base)["w"]

        per = 1e9 / given.indices.size
        encode = seconds(write, repeat=3) * per
        found[profile] = 8 * path.stat().st_size / given.indices.size, encode, seconds(read, repeat=3) * per
    for profile, figures in found.items():
        for what, unit, ours, plain in zip(
            ("size", "encode, files and digests included", "decode, every check included"),
            ("bits/entry", "ns/entry", "ns/entry"), figures, found["plain"], strict=True,
        ):  # fmt: skip
            yield Row(f"{profile}; {given.case}; {what}", ours, plain, unit, "plain")


# Peers


def _peers(step: Load, path: Path) -> Iterator[Row]:
    """The compact file of a step beside general compressors; one thread on each side."""
    base = {"w": step.base}
    adapter, count = step.adapter(self_contained=False), step.indices.size
    encode = seconds(lambda: save(adapter, path, compact=True, base=base), repeat=3)
    bits, decode = 8 * path.stat().st_size / count, seconds(lambda: load(path, base=base)["w"], repeat=3)
    for peer, (pack, unpack) in _packers(step).items():
        packed = pack()
        case = f"compact file of {step.case} of {step.base.size / 1e6:.1f} M bf16, beside {peer}"
        yield Row(case, bits, 8 * sum(map(len, packed)) / count, "bits/changed entry", peer)
        yield Row(f"  encode, {peer}", 1e3 * encode, 1e3 * seconds(pack, repeat=3), "ms", peer)
        unpacking = seconds(partial(unpack, packed), repeat=3)
        yield Row(f"  decode, {peer}", 1e3 * decode, 1e3 * unpacking, "ms", peer)


_Packer = tuple[Callable[[], list[bytes]], Callable[[list[bytes]], object]]


def _packers(step: Load) -> dict[str, _Packer]:
    import zstandard
    from pcodec import ChunkConfig, standalone

    old = step.base.reshape(-1).view(np.uint16)
    new = old.copy()
    new[step.indices] = step.values.view(np.uint16)
    unpack = zstandard.ZstdDecompressor()

    def zstd(level: int, *, apart: bool) -> _Packer:
        pack = zstandard.ZstdCompressor(level=level)

        def xor() -> list[bytes]:
            differs = old ^ new
            parts = differs.view(np.uint8).reshape(-1, 2).T.copy() if apart else [differs]
            return [pack.compress(part.tobytes()) for part in parts]

        def back(packed: list[bytes]) -> None:
            parts = [np.frombuffer(unpack.decompress(one), np.uint8) for one in packed]
            bits = np.stack(parts, axis=1).reshape(-1) if apart else parts[0]
            assert np.array_equal(bits.view(np.uint16) ^ old, new)

        return xor, back

    def gaps() -> list[bytes]:
        steps = step.values.view(np.int16) - old[step.indices].view(np.int16)
        gaps = np.diff(step.indices, prepend=-1).astype(np.uint32)
        return [standalone.simple_compress(one, ChunkConfig()) for one in (gaps, steps)]

    def placed(packed: list[bytes]) -> None:
        gaps, steps = map(standalone.simple_decompress, packed)
        at = np.cumsum(gaps, dtype=np.int64) - 1
        found = old.copy()
        found[at] += steps.view(np.uint16)
        assert np.array_equal(found, new)

    return {
        "zstd of the XOR": zstd(3, apart=False),
        "zstd of the XOR, high and low bytes apart": zstd(3, apart=True),
        "pcodec of gaps and steps": (gaps, placed),
    }


# Steps of a real model


def _real_steps(folder: Path, *, quick: bool) -> Iterator[Row]:
    """One step of AdamW of MiniLM, by the bf16 rounding of its float32 weights before and after."""
    for rate in RATES:
        for name, weights in zip(("before", "after"), _adamw_step(rate, quick=quick), strict=True):
            save_file(weights, folder / f"{name}.safetensors")
        before, after, out = folder / "before.safetensors", folder / "after.safetensors", folder / "step.st"
        bits = {}
        for compact in (True, False):
            report = full_to_shira(after, before, out, exact=True, compact=compact)
            bits[compact] = 8 * out.stat().st_size / report.nnz
        case = f"one step of AdamW at {rate:g}, MiniLM in bf16, {report.density:.1%} of {len(report.tensors)} tensors changed"
        yield Row(case, bits[True], bits[False], "bits/changed entry", "plain")


def _adamw_step(rate: float, *, quick: bool) -> list[dict[str, torch.Tensor]]:
    """The weights before and after a step that follows a few others: two passes with dropout of one text are to be more alike than
    those of different texts (Gao, Yao, Chen: SimCSE, arXiv 2104.08821).
    """
    from transformers import AutoModel, AutoTokenizer

    texts = [text for file in sorted(_TEXTS.glob("*.jsonl")) for text in LabelledTexts.read(file).texts]
    size, warm_up = (4, 1) if quick else (16, 5)
    torch.manual_seed(0)
    model, tokenizer = (
        AutoModel.from_pretrained(shipped(*BASE)).train(),
        AutoTokenizer.from_pretrained(shipped(*BASE)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    found: list[dict[str, torch.Tensor]] = []
    for number in range(warm_up + 1):
        if number == warm_up:
            found.append(_rounded(model))
        batch = tokenizer(
            texts[number * size : (number + 1) * size],
            padding=True,
            truncation=True,
            max_length=64,
            return_tensors="pt",
        )
        one, other = (torch.nn.functional.normalize(model(**batch).last_hidden_state.mean(1)) for _ in range(2))
        loss: Any = torch.nn.functional.cross_entropy(20 * one @ other.T, torch.arange(size))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*found, _rounded(model)]


def _rounded(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.detach().bfloat16() for name, one in model.named_parameters()}


# Live models


def _live(shape: Shape) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return {
        f"{name}.weight": torch.randn((rows, columns), generator=random).mul_(0.02).bfloat16()
        for name, rows, columns in shape.linear()
    }


def _numpy(weight: torch.Tensor) -> Array:
    return weight.view(torch.int16).numpy().view(BFLOAT16)


def _switching(shape: Shape, folder: Path) -> Iterator[Row]:
    """1 % of each weight, from a file to weights ready, compact and plain, in turns."""
    live = _live(shape)
    base = {name: _numpy(weight) for name, weight in live.items()}
    random = np.random.default_rng(9)

    def tensor(name: str, weight: Array) -> SparseTensor:
        at = drawn(f"2 {name}", weight.size, weight.size // 100)
        own = weight.reshape(-1)[at]
        moved = own.astype(np.float32) + random.normal(0, 1e-3, at.size).astype(np.float32)
        return SparseTensor(name, weight.shape, at, moved.astype(BFLOAT16), base_digest=array_digest(own))

    adapter = Adapter([tensor(name, weight) for name, weight in base.items()])
    files = {"compact": folder / "switch-compact.st", "plain": folder / "switch-plain.st"}
    for profile, path in files.items():
        save(adapter, path, compact=profile == "compact", base=base)
    switcher = Switcher(live)
    times: dict[str, list[float]] = {profile: [] for profile in files}
    for _ in range(4):
        for profile, path in files.items():
            start = time.perf_counter()
            switcher.switch(path)
            times[profile].append(time.perf_counter() - start)
            switcher.revert()
    ours, plain = (1e3 * min(times[profile][1:]) for profile in ("compact", "plain"))
    case = f"switch to a compact file ({shape.adapted / 1e9:.2f} G bf16, 1 %)"
    yield Row(case, ours, plain, "ms", "the same, a plain file")
    size, size_plain = (files[name].stat().st_size / 1e6 for name in ("compact", "plain"))
    yield Row("  its file", size, size_plain, "MB", "the plain file")


def _syncing(shape: Shape, folder: Path) -> Iterator[Row]:
    """A step published and followed, beside writing and reading all weights."""
    shape = replace(shape, layers=min(shape.layers, _SYNCED))
    for encoding in ("plain", "compact"):
        yield from _synced(shape, folder / f"place-{encoding}", encoding)


def _synced(shape: Shape, place: Path, encoding: str) -> Iterator[Row]:
    random, whole = torch.Generator().manual_seed(4), place.with_suffix(".safetensors")
    master = {name: one.float() for name, one in _live(shape).items()}
    trained, served = ({name: one.bfloat16() for name, one in master.items()} for _ in range(2))
    publisher = Publisher(trained, place, encoding=encoding, snapshot_every=None)
    subscriber = Subscriber(served, place)
    subscriber.update()
    for _ in range(2):  # the first one warms up
        for name, one in master.items():
            one.add_(torch.randn(one.shape, generator=random), alpha=MOVES["step"])
            trained[name].copy_(one)
        start = time.perf_counter()
        done = publisher.publish()
        between = time.perf_counter()
        subscriber.update()
        publishing, following = between - start, time.perf_counter() - between
    assert all(torch.equal(served[name].view(torch.int16), trained[name].view(torch.int16)) for name in trained)
    writing = seconds(lambda: save_file(trained, whole), repeat=3)
    reading = seconds(lambda: [served[name].copy_(one) for name, one in load_file(whole).items()], repeat=3)
    size = f"{sum(one.numel() for one in trained.values()) / 1e9:.2f} G bf16"
    all_weights = "of all weights, from the page cache"
    yield Row(
        f"publish a step, {encoding} ({size})", publishing, writing, "s", "save_file of all weights, not flushed"
    )
    yield Row(f"  follow it, {encoding}", following, reading, "s", f"load_file and copy_ {all_weights}")
    yield Row(f"  bytes sent, {encoding}", done.nbytes / 1e6, whole.stat().st_size / 1e6, "MB", "all weights")
    whole.unlink()
