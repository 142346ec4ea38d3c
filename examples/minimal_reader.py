"""A minimal reader of SHiRA adapter files: the standard library and numpy, and nothing of shira_format.

    python examples/minimal_reader.py adapter.st

It reads sparse tensors with the codecs gap8, varint and flat, and refuses files that need more.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

# --8<-- [start:dtypes]
# numpy has no bfloat16 and no float8: these are kept as bits, which is all that overwriting needs.
DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "I64": "<i8",
    "U8": "u1",
}
# --8<-- [end:dtypes]


# --8<-- [start:container]
def open_adapter(data: bytes) -> tuple[dict[str, Any], dict[str, Any], memoryview]:
    """The manifest, the streams' places and the buffer."""
    size = int.from_bytes(data[:8], "little")
    if size > min(100_000_000, len(data) - 8):
        raise ValueError("the header is too large, or the file is truncated")
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__")
    # Strangers may write numbers of any length, which int refuses; cut, they are still too large.
    manifest = json.loads(metadata["shira"], parse_int=lambda digits: int(digits[:400]))
    if hashlib.sha256(metadata["shira"].encode()).hexdigest() != metadata["shira_digest"]:
        raise ValueError("the manifest is damaged")
    if (
        manifest["format_version"].partition(".")[0] != "1"
        or manifest["features"]
        or manifest["digest"] != "sha256"
    ):
        raise ValueError("the file needs a newer or larger reader than this one")
    return manifest, header, memoryview(data)[8 + size :]


# --8<-- [end:container]


# --8<-- [start:stream]
def stream(header: dict[str, Any], buffer: memoryview, name: str, digest: str) -> np.ndarray:
    """One stream as an array, after its size and digest have been checked."""
    begin, end = header[name]["data_offsets"]
    dtype = np.dtype(DTYPES[header[name]["dtype"]])
    if not 0 <= begin <= end <= len(buffer) or hashlib.sha256(buffer[begin:end]).hexdigest() != digest:
        raise ValueError(f"{name} is damaged")
    return np.frombuffer(buffer[begin:end], dtype)


# --8<-- [end:stream]


# --8<-- [start:indices]
def gaps(codec: str, codes: np.ndarray) -> np.ndarray:
    """The gaps that a stream of gap8 or varint encodes; each code has a last byte, where a sum over its bytes ends."""
    last = codes < (255 if codec == "gap8" else 128)
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]])) if len(codes) else np.zeros(0, np.int64)
    if len(codes) and not last[-1]:
        raise ValueError("the last code is unfinished")
    terms = codes.astype(np.int64)
    if codec == "varint":
        place = np.arange(len(codes)) - np.repeat(starts, np.diff(np.append(starts, len(codes))))
        if len(codes) and place.max() > 7:
            raise ValueError("a code is too long")
        terms = (terms & 127) << (7 * place)
    return np.add.reduceat(terms, starts) if len(codes) else terms


def indices(tensor: dict[str, Any], codes: np.ndarray) -> np.ndarray:
    """The flat indices of the entries: int64, strictly increasing, below the number of elements."""
    codec = tensor["indices"]["codec"]
    found = codes if codec == "flat" else np.cumsum(gaps(codec, codes) + 1) - 1
    numel = 1
    for size in tensor["shape"]:
        numel *= size
    rising = bool((found[1:] > found[:-1]).all())
    if len(found) != tensor["nnz"] or not rising or (len(found) and not 0 <= found[0] <= found[-1] < numel):
        raise ValueError(f"the indices of {tensor['name']} break a rule")
    return found


# --8<-- [end:indices]


# --8<-- [start:read]
def read(path: Path) -> dict[str, tuple[dict[str, Any], np.ndarray, np.ndarray]]:
    """Of each tensor its item of the manifest, its indices and its values."""
    manifest, header, buffer = open_adapter(path.read_bytes())
    if manifest.get("whole"):
        raise ValueError("whole tensors are left as an exercise")
    found = {}
    for tensor in manifest["tensors"]:
        name, digests = tensor["name"], tensor["digests"]
        if tensor["values"] != "target" or tensor["indices"]["codec"] not in {"gap8", "varint", "flat"}:
            raise ValueError(f"{name} needs a larger reader than this one")
        streams = {
            role: stream(header, buffer, f"{name}#{role}", digest)
            for role, digest in digests.items()
            if f"{name}#{role}" in header  # the digest "base" may be there without its stream
        }
        where, values = indices(tensor, streams["indices"]), streams["values"]
        if len(values) != len(where):
            raise ValueError(f"{name} has {len(where)} indices and {len(values)} values")
        found[name] = (tensor, where, values)
    return found


# --8<-- [end:read]


# --8<-- [start:apply]
def apply(path: Path, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Overwrite the entries in ``weights``, given as bits or floats of the right dtype; returns what was there."""
    adapter, before = read(path), {}
    for name, (tensor, where, values) in adapter.items():  # first check everything, then change anything
        before[name] = weights[name].reshape(-1)[where]
        fits = (
            list(weights[name].shape) == tensor["shape"] and weights[name].dtype.itemsize == values.dtype.itemsize
        )
        if not fits or hashlib.sha256(before[name].tobytes()).hexdigest() != tensor["digests"]["base"]:
            raise ValueError(f"{name} is not of the base that this adapter was made for")
    for name, (_, where, values) in adapter.items():
        np.put(weights[name], where, values.view(weights[name].dtype))
    return before


# --8<-- [end:apply]


if __name__ == "__main__":
    example = Path(__file__).parents[1] / "spec" / "vectors" / "good" / "example.st"
    for name, (tensor, where, values) in read(Path(sys.argv[1]) if sys.argv[1:] else example).items():
        print(f"{name}: shape {tensor['shape']}, entries {where.tolist()[:8]}, bits {values.tobytes().hex()[:32]}")
