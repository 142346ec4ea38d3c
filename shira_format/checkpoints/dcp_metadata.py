"""``.metadata`` of a distributed checkpoint: its tensors, their chunks, and where these are."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shira_format.checkpoints.index import is_file_name
from shira_format.checkpoints.pickles import MAX_PICKLE, PickleError, Record, load, ordered_dict, record
from shira_format.checkpoints.torch_file import TORCH_DTYPES
from shira_format.errors import SourceError
from shira_format.storage.paths import read_file
from shira_format.tensors import MAX_RANK, is_too_large, numel

NAME = ".metadata"

_METADATA = "torch.distributed.checkpoint.metadata"
_OLDER = "torch.distributed._shard.sharded_tensor.metadata"  # where two classes were before torch 2.3


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, as one ``torch.save`` within a file.

    Attributes:
        offsets: its first element in each dimension.
        sizes: its shape.
        file: the name of the file.
        begin: where it begins in the file, in bytes.
        length: its size in bytes, including all that ``torch.save`` adds.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    length: int


@dataclass(frozen=True, slots=True)
class Sharded:
    """A tensor in chunks that cover it exactly once; empty ones are left out."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[Chunk, ...]


class Metadata:
    """The content of ``.metadata``.

    Attributes:
        path: the file.
        tensors: the keys of tensors, in order.
        others: the keys of everything that is not a tensor.
        paths: the path of a key's item in the saved nested dict; only of keys that were flattened.

    Raises:
        SourceError: it is damaged, or its pickle needs something that metadata does not have.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            root = load(io.BytesIO(read_file(path, MAX_PICKLE)), _names())
            self._items = _dict(root, "Metadata", "state_dict_metadata")
            places = _dict(root, "Metadata", "storage_data")
            self.paths = _paths(root.state.get("planner_data"))
        except PickleError as error:
            raise SourceError(f"{path}: {error}") from None
        kinds = {key: item.kind if type(item) is Record else "" for key, item in self._items.items()}
        self.tensors = [key for key, kind in kinds.items() if kind == "TensorStorageMetadata"]
        self.others = [key for key, kind in kinds.items() if kind == "BytesStorageMetadata"]
        if len(self.tensors) + len(self.others) != len(kinds) or not all(type(key) is str for key in kinds):
            raise SourceError(f"{path}: it has items that are neither tensors nor bytes")
        self._places: dict[tuple[Any, Any], Any] = {}
        for index, place in places.items():
            if type(index) is not Record or type(index.state) is not dict:
                raise SourceError(f"{path}: storage_data has a key that is not a MetadataIndex")
            where = index.state.get("fqn"), index.state.get("offset")
            if type(where[0]) is not str or not (where[1] is None or _is_size(where[1])):
                raise SourceError(f"{path}: storage_data has a key that is not a MetadataIndex")
            self._places[where] = place

    def tensor(self, key: str) -> Sharded:
        """One of :attr:`tensors`, checked: its chunks cover it, without gap or overlap.

        Raises:
            SourceError: they do not, or the tensor is damaged otherwise.
        """
        try:
            return self._tensor(key)
        except RecursionError:
            raise SourceError(
                f"{self.path}: tensor {key!r}: its chunks are arranged in a way that is not supported"
            ) from None
        except PickleError as error:
            raise SourceError(f"{self.path}: tensor {key!r}: {error}") from None

    def _tensor(self, key: str) -> Sharded:
        item = self._items[key]
        shape = _size(item, "TensorStorageMetadata", "size")
        dtype = _dtype(_field(item, "TensorStorageMetadata", "properties"))
        if is_too_large(shape):
            raise PickleError(f"shape {list(shape)} has more than 2^53 - 1 elements")
        entries = _field(item, "TensorStorageMetadata", "chunks")
        if type(entries) is not list:
            raise PickleError("its chunks are not a list")
        chunks = []
        for entry in entries:
            offsets, sizes = (_size(entry, "ChunkStorageMetadata", name) for name in ("offsets", "sizes"))
            if len(offsets) != len(shape) or len(sizes) != len(shape):
                raise PickleError(f"a chunk of rank {len(sizes)} of a tensor of shape {list(shape)}")
            if any(at + size > whole for at, size, whole in zip(offsets, sizes, shape, strict=True) if size):
                raise PickleError(
                    f"the chunk at {list(offsets)} of shape {list(sizes)} is not within shape {list(shape)}"
                )
            if numel(sizes):
                chunks.append(self._chunk(key, offsets, sizes, alone=len(entries) == 1))
        if sum(numel(chunk.sizes) for chunk in chunks) != numel(shape) or not _are_apart(chunks):
            raise PickleError(f"its chunks do not cover shape {list(shape)} exactly once")
        return Sharded(shape, dtype, tuple(chunks))

    def _chunk(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], *, alone: bool) -> Chunk:
        place = self._places.get((key, offsets))
        if place is None and alone:  # the offset may be missing if there is only one chunk
            place = self._places.get((key, None))
        if place is None:
            raise PickleError(f"storage_data does not say where the chunk at {list(offsets)} is")
        file, begin, length = (
            _field(place, "_StorageInfo", name) for name in ("relative_path", "offset", "length")
        )
        if place.state.get("transform_descriptors"):
            raise PickleError("its file is compressed or otherwise transformed, which is not supported")
        if not is_file_name(file):
            shown = repr(file) if type(file) is str else "something"
            raise PickleError(f"it is in {shown:.200}, which is not the name of a file in the folder")
        if not _is_size((begin, length)):
            raise PickleError("the offset or length of a chunk is invalid")
        return Chunk(offsets, sizes, file, begin, length)


def _names() -> dict[tuple[str, str], Any]:
    names: dict[tuple[str, str], Any] = {
        **{("torch", name): name for name in TORCH_DTYPES},
        **{("torch", name): name for name in ("complex64", "complex128", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")},
        **{(_METADATA, name): record(name) for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )},
        (_OLDER, "TensorProperties"): record("TensorProperties"),
        (_OLDER, "MEM_FORMAT_ENCODING"): record("_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): record("_StorageInfo"),
        ("torch", "Size"): tuple,
        ("torch.serialization", "_get_layout"): _layout,
        ("collections", "OrderedDict"): ordered_dict,
        # The folder where it was saved.
        **{(module, name): record(name) for module in ("pathlib", "pathlib._local") for name in (
            "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath",
        )},
    }  # fmt: skip
    return names


def _layout(name: Any) -> str:
    return name if type(name) is str else ""


def _field(value: Any, kind: str, name: str) -> Any:
    if type(value) is not Record or value.kind != kind or type(value.state) is not dict or name not in value.state:
        raise PickleError(f"not a {kind} with {name}")
    return value.state[name]


def _dict(value: Any, kind: str, name: str) -> dict[Any, Any]:
    found = _field(value, kind, name)
    if type(found) is not dict:
        raise PickleError(f"{name} of {kind} is not a dict")
    return found


def _is_size(value: Any) -> bool:
    return type(value) is tuple and len(value) <= MAX_RANK and all(type(n) is int and n >= 0 for n in value)


def _size(value: Any, kind: str, name: str) -> tuple[int, ...]:
    found = _field(value, kind, name)
    if not _is_size(found):
        raise PickleError(f"{name} of {kind} is not a size")
    return tuple(found)


def _dtype(properties: Any) -> np.dtype[Any]:
    state = properties.state if type(properties) is Record else None
    if type(state) is not tuple or len(state) < 2 or type(state[0]) is not str:
        raise PickleError("its properties are not a TensorProperties")
    if state[0] not in TORCH_DTYPES:
        raise PickleError(f"dtype {state[0]:.100} is not known")
    if state[1] != "torch.strided":
        raise PickleError("its layout is not torch.strided; only dense tensors are read")
    return TORCH_DTYPES[state[0]]


def _paths(planner_data: Any) -> dict[str, tuple[str | int, ...]]:
    if type(planner_data) is not dict:  # the planner did not flatten
        return {}
    return {
        key: path
        for key, path in planner_data.items()
        if type(key) is str and type(path) is tuple and all(type(step) in (str, int) for step in path)
    }


def _are_apart(chunks: Sequence[Chunk]) -> bool:
    """Whether no two chunks overlap; fast if they come from cuts across the whole tensor, as all known ones do."""
    if len(chunks) < 2:
        return True
    for axis in range(len(chunks[0].sizes)):
        slabs = list(_slabs(chunks, axis))
        if len(slabs) > 1:
            return all(_are_apart(slab) for slab in slabs)
    return len(chunks) <= 1000 and all(
        any(
            one.offsets[axis] + one.sizes[axis] <= other.offsets[axis]
            or other.offsets[axis] + other.sizes[axis] <= one.offsets[axis]
            for axis in range(len(one.sizes))
        )
        for one, other in itertools.combinations(chunks, 2)
    )


def _slabs(chunks: Sequence[Chunk], axis: int) -> Iterator[list[Chunk]]:
    """Divide chunks by the planes across ``axis`` that cut none of them."""
    slab: list[Chunk] = []
    end = 0
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets[axis]):
        if slab and chunk.offsets[axis] >= end:
            yield slab
            slab = []
        slab.append(chunk)
        end = max(end, chunk.offsets[axis] + chunk.sizes[axis])
    if slab:
        yield slab
