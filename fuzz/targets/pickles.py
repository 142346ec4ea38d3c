"""Files of torch.save, in both formats: pickles of a generator, and real ones with changed bytes."""

from __future__ import annotations

import functools
import io
import struct
import zipfile
from pathlib import Path
from random import Random

import torch

from fuzz.mutate import mutated_bytes
from fuzz.opcodes import Program, called, integer, read_all, text
from shira_format.checkpoints.torch_file import _names

FILE = "pytorch_model.bin"
_MAGIC = b"\x80\x02" + integer(0x1950A86A20F9469CFC6C) + b"."
_VERSION = b"\x80\x02M\xe9\x03."
_SYSTEM = b"\x80\x02}X\x0d\x00\x00\x00little_endian\x88s."
_BYTES = 256  # of the one storage
_SIDES = [0, 1, 2, 8, 63, 2**32, 2**53]


def make(random: Random, folder: Path) -> None:
    """One file."""
    how = random.choice(["zip", "zip", "legacy", "bytes"])
    if how == "bytes":
        data = mutated_bytes(random, random.choice(_real()), most=random.choice([1, 3, 8]))
    else:
        program = Program(random, sorted(_names()), _tensors(random, legacy=how == "legacy")).pickled()
        if random.random() < 0.5:
            program = (
                b"\x80\x02}("
                + b"".join(text(f"w{n}") + atom for n, atom in enumerate(_tensors(random, legacy=how == "legacy")))
                + b"u."
            )
        if random.random() < 0.2:
            program = mutated_bytes(random, program)
        data = _zip(random, program) if how == "zip" else _legacy(random, program)
    (folder / FILE).write_bytes(data)


def check(folder: Path) -> None:
    """Open it and read every tensor; no function of the file's choice runs."""
    read_all(folder / FILE)


def _tensors(random: Random, *, legacy: bool) -> list[bytes]:
    return [_tensor(random, legacy=legacy) for _ in range(3)]


def _tensor(random: Random, *, legacy: bool) -> bytes:
    kind = random.choice(
        [
            "FloatStorage",
            "HalfStorage",
            "BFloat16Storage",
            "LongStorage",
            "BoolStorage",
            "ComplexFloatStorage",
            "No",
        ]
    )
    width = {"FloatStorage": 4, "LongStorage": 8, "ComplexFloatStorage": 8, "BoolStorage": 1}.get(kind, 2)
    count = _BYTES // width if random.random() < 0.8 else random.choice(_SIDES)
    key = text("0" if random.random() < 0.9 else random.choice(["1", "../0", ""]))
    storage = (
        b"("
        + text("storage")
        + f"ctorch\n{kind}\n".encode()
        + key
        + text("cpu")
        + integer(count)
        + (b"N" if legacy else b"")
        + b"tQ"
    )
    shape = [random.choice([1, 2, 3, 4]) for _ in range(random.choice([0, 1, 2, 2, 3]))]
    strides = [1] * len(shape)
    for at in range(len(shape) - 2, -1, -1):
        strides[at] = strides[at + 1] * shape[at + 1]
    if random.random() < 0.3 and shape:
        (shape if random.random() < 0.5 else strides)[random.randrange(len(shape))] = random.choice([*_SIDES, -1])
    sizes = [b"(" + b"".join(map(integer, one)) + b"t" for one in (shape, strides)]
    offset = integer(random.choice([0, 0, 0, 1, 2**40, -1]))
    rebuilt = called(
        "torch._utils",
        "_rebuild_tensor_v2",
        storage,
        offset,
        *sizes,
        b"\x89",
        called("collections", "OrderedDict"),
    )
    return (
        called("torch._utils", "_rebuild_parameter", rebuilt, b"\x89", b"N") if random.random() < 0.2 else rebuilt
    )


def _zip(random: Random, program: bytes) -> bytes:
    data = io.BytesIO()
    packing = zipfile.ZIP_DEFLATED if random.random() < 0.05 else zipfile.ZIP_STORED
    with zipfile.ZipFile(data, "w", packing) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", bytes(range(_BYTES % 257))[:_BYTES].ljust(_BYTES, b"\1"))
        archive.writestr("archive/version", "3\n")
    found = data.getvalue()
    return mutated_bytes(random, found, most=1) if random.random() < 0.1 else found


def _legacy(random: Random, program: bytes) -> bytes:
    keys = b"\x80\x02](" + text("0") + b"e."
    count = random.choice([_BYTES // 4, _BYTES // 4, _BYTES // 2, 2**40])
    return _MAGIC + _VERSION + _SYSTEM + program + keys + struct.pack("<Q", count) + bytes(_BYTES)


@functools.cache
def _real() -> list[bytes]:
    """Files that torch writes."""
    shared = torch.arange(12.0).reshape(3, 4)
    state = {
        "a.weight": shared,
        "b.weight": shared.T,
        "c": torch.ones(5, dtype=torch.bfloat16),
        "d": torch.tensor(True),
    }
    found = []
    for legacy in (False, True):
        data = io.BytesIO()
        torch.save({"state_dict": state, "epoch": 3}, data, _use_new_zipfile_serialization=not legacy)
        found.append(data.getvalue())
    return found
