"""Folders of CSR matrices, and files of moments: matrices, lists and numbers that are right or not."""

from __future__ import annotations

import functools
import io
import json
import shutil
import tempfile
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzz import safetensors
from fuzz.mutate import TEXTS, mutated_bytes, mutated_json
from fuzz.oracle import Violation, aside
from shira_format.adapter import Adapter
from shira_format.calibration.moments import Moments
from shira_format.convert.csr import csr_to_shira
from shira_format.errors import ShiraError
from shira_format.export.csr import shira_to_csr
from shira_format.format import load, save
from shira_format.tensors import DenseTensor, SparseTensor

CSR, OUT, MOMENTS = "csr", "adapter.st", "moments.safetensors"
_KEYS = [
    "name",
    "file",
    "shape",
    "dtype",
    "values",
    "data_dtype",
    "digests",
    "original",
    "whole",
    "manifest",
    "version",
    "format",
]
_VALUES: list[Any] = [
    "target",
    "delta",
    "none",
    "F32",
    "BF16",
    "float32",
    "float64",
    "w.npz",
    "../w.npz",
    "CON.npz",
    [6, 8],
    [48],
    {},
    *TEXTS,
]
_NUMBERS = [-1, 0, 1, 2, 7, 2**31 - 1, -(2**31), 2**62]


def make(random: Random, folder: Path) -> None:
    """A folder, or a file."""
    if random.random() < 0.35:
        (folder / MOMENTS).write_bytes(_moments(random))
        return
    files = dict(_exported())
    how = random.choice(["index", "index", "arrays", "arrays", "arrays", "bytes", "both"])
    if how in ("index", "both"):
        files["index.json"] = json.dumps(
            mutated_json(random, json.loads(files["index.json"]), _KEYS, _VALUES)
        ).encode()
    if how in ("arrays", "both"):
        name = random.choice([name for name in files if name.endswith(".npz")])
        files[name] = _npz(random, files[name])
    if how == "bytes":
        name = random.choice(sorted(files))
        files[name] = mutated_bytes(random, files[name])
    (folder / CSR).mkdir()
    for name, data in files.items():
        (folder / CSR / name).write_bytes(data)


def check(folder: Path) -> None:
    """Convert it: there is an adapter that can be read afterwards, or nothing. Or read all moments."""
    if (folder / MOMENTS).exists():
        for moment in Moments.read(folder / MOMENTS).values():
            moment.blocks.tobytes()
        return
    out = folder / OUT
    out.unlink(missing_ok=True)
    try:
        csr_to_shira(folder / CSR, out)
    except ShiraError as error:
        if [path.name for path in folder.iterdir()] != [CSR]:
            raise Violation(f"refused, and something was written: {error}") from error
        raise
    with aside():
        adapter = load(out)
        for name in adapter:
            adapter[name].indices.tobytes()


@functools.cache
def _exported() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    base, target = (random.standard_normal(9).astype(np.float32) for _ in range(2))
    indices = np.array([0, 3, 8, 17, 18, 25, 40, 41, 47])
    tensors = [
        SparseTensor("w", (6, 8), indices, target, base=base),
        SparseTensor("a/\u00e9", (2, 3, 8), indices, target, value_kind="delta"),
        SparseTensor("m", (48,), indices, value_kind="none", dtype=np.float16),
    ]
    place = Path(tempfile.mkdtemp(prefix="fuzz-"))
    save(
        Adapter(tensors, dense=[DenseTensor("d", base, base=target)], manifest={"description": "x"}),
        place / "a.st",
    )
    shira_to_csr(place / "a.st", place / "csr")
    found = {path.name: path.read_bytes() for path in (place / "csr").iterdir()}
    shutil.rmtree(place)
    return found


def _npz(random: Random, data: bytes) -> bytes:
    """Its arrays, one or two of them changed."""
    with np.load(io.BytesIO(data)) as file:
        arrays = dict(file)
    for _ in range(random.randint(1, 2)):
        name = random.choice(sorted(arrays))
        array = np.array(arrays[name])
        how = random.choice(["cell", "cell", "dtype", "shape", "gone", "more", "length"])
        if how == "cell" and array.size and array.dtype.kind in "iuf":
            array.reshape(-1)[random.randrange(array.size)] = np.array(random.choice(_NUMBERS)).astype(array.dtype)
        elif how == "dtype" and array.dtype.kind in "iuf":
            array = array.astype(
                random.choice(["int64", "int8", "uint64", "float16", "float64", ">i4", "complex64", "bool"])
            )
        elif how == "shape":
            array = array.reshape(random.choice([(-1,), (1, -1)])) if array.size else array
        elif how == "length" and array.size:
            array = np.resize(array, random.choice([0, 1, array.size - 1, array.size + 1, 5000]))
        elif how == "more":
            arrays["x"] = np.zeros(3)
        if how == "gone":
            del arrays[name]
        else:
            arrays[name] = array
        if not arrays:
            break
    out = io.BytesIO()
    np.savez_compressed(out, **arrays) if random.random() < 0.2 else np.savez(out, **arrays)
    if random.random() < 0.2:
        return _mutated_member(random, out.getvalue())
    return out.getvalue()


def _mutated_member(random: Random, data: bytes) -> bytes:
    """One of the arrays' files with changed bytes, such as of its header, and checksums that are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = random.choice(old.namelist()) if old.namelist() else ""
        for name in old.namelist():
            member = old.read(name)
            if name == chosen:
                member = random.choice([
                    mutated_bytes(random, member), member.replace(b"(", b"(9,"), member.replace(b"'descr': '<", b"'descr': '|O"),
                    member.replace(b"False", b"True "),
                ])  # fmt: skip
            new.writestr(name, member)
    return out.getvalue()


def _moments(random: Random) -> bytes:
    width, samples = random.choice([1, 3, 4]), random.choice([1, 10, 0, -1, 2**70])
    inputs = (
        np.random.default_rng(random.getrandbits(32))
        .standard_normal((10, width))
        .astype(random.choice(["float32", "float64"]))
    )
    blocks = (inputs.T @ inputs / 10)[None, None]
    if random.random() < 0.4:
        blocks.reshape(-1)[random.randrange(blocks.size)] = random.choice([np.nan, np.inf, -1.0, 1e30, 0.0])
    if random.random() < 0.2:
        blocks = blocks.reshape(random.choice([(-1,), (1, -1), (1, 1, -1, 1), (1, -1, 1, 1)]))
    entry: dict[str, Any] = {"samples": samples, "width": width, "inputs_first": False}
    arrays = {"w": blocks}
    if random.random() < 0.4:
        arrays["w#inputs"] = inputs[:5].reshape(random.choice([(5, 1, width), (5, width)]))
        entry["inputs"] = random.choice([5, 5, 4, 2**70, -1])
    manifest: Any = {"version": 2 if "inputs" in entry else 1, "weights": {"w": entry}}
    if random.random() < 0.5:
        manifest = mutated_json(random, manifest, ["tokens", "inputs", "width", "samples"], [True, 5])
    return safetensors.damaged(random, arrays, {"shira_moments": json.dumps(manifest)})
