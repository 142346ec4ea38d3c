"""GGUF checkpoints, single or split, with the names and orientations of Hugging Face checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, read_only
from shira_format._core.dtypes import DTYPES
from shira_format.checkpoints.base import IndexedCheckpoint
from shira_format.checkpoints.gguf_file import Entry, GGUFFile, load_gguf
from shira_format.checkpoints.gguf_names import ARCHITECTURES, COMPUTED, HEADS, Form
from shira_format.errors import SourceError
from shira_format.tensors import numel

_FILE = ".gguf"
_SPLIT = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.IGNORECASE)
# Elements that are dequantised or transposed at a time; a multiple of every block size.
_CHUNK = 2**18


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor, with what reading undoes of the conversion to GGUF.

    Attributes:
        file: the file that holds it.
        entry: its entry in that file.
        form: what the conversion to GGUF did to it.
        heads: for :attr:`Form.ROTARY`, the number of heads, in which the rows are grouped.
        stored: the dtype in the file; None if it is quantised.
        dtype: the dtype that is returned.
        shape: the shape that is returned.
    """

    file: GGUFFile
    entry: Entry
    form: Form
    heads: int
    stored: np.dtype[Any] | None
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def read(self, start: int, stop: int, out: Array) -> None:
        """Fill ``out`` with the elements ``start`` to ``stop``, at least one, of the flat tensor."""
        if self.form is Form.ROTARY:
            self._read_rotary(start, stop, out)
        elif self.form is Form.TRANSPOSED:
            self._read_transposed(start, stop, out)
        else:
            self._read_stored(start, stop, out)
            if self.form is Form.SHIFTED:
                out -= 1

    def _read_rotary(self, start: int, stop: int, out: Array) -> None:
        """Head by head: rows are reordered only within a head."""
        rows, size = self.shape[0] // self.heads, numel(self.shape) // self.heads
        head = np.empty(size, self.dtype)
        for number in range(start // size, -(-stop // size)):
            begin = number * size
            self._read_stored(begin, begin + size, head)
            ordered = head.reshape(rows // 2, 2, -1).swapaxes(0, 1).reshape(-1)
            low, high = max(start, begin), min(stop, begin + size)
            out[low - start : high - start] = ordered[low - begin : high - begin]

    def _read_transposed(self, start: int, stop: int, out: Array) -> None:
        """Read whole rows of the file and keep a few columns: little memory, much reading."""
        rows, columns = self.entry.shape
        first, last = start // rows, -(-stop // rows)
        kept = np.empty((last - first, rows), self.dtype)
        step = max(1, _CHUNK // columns)
        for row in range(0, rows, step):
            band = np.empty((min(step, rows - row), columns), self.dtype)
            self._read_stored(row * columns, row * columns + band.size, band.reshape(-1))
            kept[:, row : row + len(band)] = band[:, first:last].T
        out[:] = kept.reshape(-1)[start - first * rows : stop - first * rows]

    def _read_stored(self, start: int, stop: int, out: Array) -> None:
        """Elements in the file's order, as :attr:`dtype`."""
        entry, storage = self.entry, self.file.storage
        if self.stored == self.dtype:
            storage.read_into(entry.begin + start * self.dtype.itemsize, out.view(np.uint8).data)
            return
        dequantize = load_gguf(self.file.path).dequantize
        for at in range(start - start % _CHUNK, stop, _CHUNK):
            low, high = max(start, at), min(stop, at + _CHUNK)
            block, last = low // entry.block, -(-high // entry.block)
            raw = np.empty((last - block) * entry.block_bytes, np.uint8)
            storage.read_into(entry.begin + block * entry.block_bytes, raw.data)
            with np.errstate(all="ignore"):  # an infinite scale makes infinite values
                values = dequantize(raw, entry.type)
            out[low - start : high - start] = values[low - block * entry.block : high - block * entry.block]


class GGUFCheckpoint(IndexedCheckpoint[_Tensor]):
    """The tensors of a model in one or more GGUF files; quantised ones are returned as float32.

    Attributes:
        header: the numbers and short strings of its metadata; of a split model, those of the first file.
    """

    def __init__(self, path: Path, files: list[GGUFFile]) -> None:
        """Args: ``files`` are the parts of a split model in order; the metadata of the first one is used.

        Raises:
            SourceError: it is not a whole model, or its architecture or a tensor is not supported.
        """
        self.path = path
        self.files = [file.path for file in files]
        self._where: dict[str, _Tensor] = {}
        left_out: list[str] = []
        self.header = metadata = files[0].metadata
        name = _architecture(path, files)
        architecture = ARCHITECTURES[name]
        for file in files:
            for stem, entry in file.entries.items():
                if COMPUTED.fullmatch(stem):
                    left_out.append(stem)
                    continue
                if (found := architecture.find(stem)) is None:
                    raise SourceError(f"{file.path}: no Hugging Face name is known for tensor {stem!r} of {name}")
                target, form = found
                if target in self._where:
                    raise SourceError(f"{file.path}: tensor {stem!r} is in an earlier part as well")
                heads = _heads(file.path, stem, entry, name, metadata) if form is Form.ROTARY else 1
                self._where[target] = _tensor(file, stem, entry, form, heads)
        self.notices = tuple(_notices(list(self._where.values()), left_out))

    def __getitem__(self, name: str) -> Array:
        shape = self._where[name].shape
        return read_only(self.part(name, 0, numel(shape)).reshape(shape))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._where[name].dtype

    def is_quantised(self, name: str) -> bool:
        return self._where[name].stored is None

    def part(self, name: str, start: int, stop: int, out: Array | None = None) -> Array:
        tensor = self._where[name]
        if out is None:
            out = np.empty(stop - start, tensor.dtype)
        part = out[: stop - start]
        if stop > start:
            tensor.read(start, stop, part)
        return part


def read_stored(file: GGUFFile, name: str) -> Array:
    """A whole tensor as stored, in the file's orientation; a quantised one is returned as float32.

    Raises:
        SourceError: its type cannot be dequantised.
    """
    tensor = _tensor(file, name, file.entries[name], Form.SAME, 1)
    out = np.empty(numel(tensor.shape), tensor.dtype)
    tensor.read(0, out.size, out)
    return out.reshape(tensor.shape)


def open_gguf(path: Path) -> GGUFCheckpoint | None:
    """Open ``path`` if it is a GGUF file, the first of a split one, or a folder with one of these."""
    if path.is_dir():
        found = _find(path)
        return None if found is None else open_gguf(found)
    if not path.name.lower().endswith(_FILE):
        return None
    load_gguf(path)
    files: list[GGUFFile] = []
    try:
        _open_parts(path, files)
        return GGUFCheckpoint(path, files)
    except BaseException:
        for file in files:
            file.storage.close()
        raise


def _open_parts(path: Path, files: list[GGUFFile]) -> None:
    """Append the file, or all parts of a split one, to ``files``."""
    files.append(GGUFFile(path))
    count = files[0].metadata.get("split.count", 1)
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        if count != 1:
            raise SourceError(
                f"{path}: one of {count} parts of a split model, but its name is not ...-00001-of-....gguf"
            )
        return
    stem, number, last = match.groups()
    if int(number) != 1:
        raise SourceError(f"{path}: a later part of a split model: give the first, {stem}-00001-of-{last}.gguf")
    if count != int(last):
        raise SourceError(f"{path}: split.count is {count}, but the file name is that of {int(last)} parts")
    for other in range(2, int(last) + 1):
        part = path.parent / f"{stem}-{other:05}-of-{last}.gguf"
        if not part.is_file():
            raise SourceError(f"{path}: the part {part.name} is missing")
        files.append(GGUFFile(part))
        if (place := files[-1].metadata.get("split.no")) != other - 1:
            raise SourceError(f"{part}: split.no is {place}, not {other - 1}")
    tensors, declared = sum(len(file.entries) for file in files), files[0].metadata.get("split.tensors.count")
    if declared is not None and declared != tensors:
        raise SourceError(f"{path}: the parts have {tensors} tensors, but split.tensors.count is {declared}")


def _find(folder: Path) -> Path | None:
    found = sorted(
        (path for path in folder.iterdir() if path.name.lower().endswith(_FILE)), key=lambda path: path.name
    )
    first = [path for path in found if (match := _SPLIT.fullmatch(path.name)) is None or int(match[2]) == 1]
    if len(first) > 1:
        raise SourceError(f"{folder}: several GGUF files ({first[0].name}, {first[1].name}, ...); name one")
    # Only later parts: opening one raises the error.
    return next(iter(first or found), None)


def _architecture(path: Path, files: list[GGUFFile]) -> str:
    """The name of the model's architecture, one of :data:`ARCHITECTURES`."""
    metadata = files[0].metadata
    if (kind := metadata.get("general.type", "model")) != "model":
        hint = ": a LoRA, not a checkpoint" if kind == "adapter" else ""
        raise SourceError(f"{path}: general.type is {kind!r}, not 'model'{hint}")
    if not any(file.entries for file in files):
        raise SourceError(f"{path}: it has no tensors, only a vocabulary or other metadata")
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise SourceError(f"{path}: general.architecture is missing")
    if name not in ARCHITECTURES:
        raise SourceError(
            f"{path}: the architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return name


def _heads(path: Path, name: str, entry: Entry, architecture: str, metadata: dict[str, Any]) -> int:
    """The number of heads of a tensor of :attr:`Form.ROTARY`."""
    query = f"{architecture}.{HEADS['attn_q']}"
    key = f"{architecture}.{HEADS[name.split('.')[2]]}"
    # Without a number of key heads, there are as many as query heads.
    if key not in metadata:
        key = query
    heads = metadata.get(key)
    if type(heads) is not int or heads < 1:
        raise SourceError(f"{path}: {key} is {'missing' if key not in metadata else 'not a positive integer'}")
    if not entry.shape or entry.shape[0] % (2 * heads):
        raise SourceError(
            f"{path}: tensor {name!r} of shape {list(entry.shape)} cannot be divided into pairs of rows of {heads} heads"
        )
    return heads


def _tensor(file: GGUFFile, name: str, entry: Entry, form: Form, heads: int) -> _Tensor:
    if form is Form.TRANSPOSED and len(entry.shape) != 2:
        raise SourceError(f"{file.path}: tensor {name!r} of shape {list(entry.shape)} is not a matrix")
    stored = DTYPES.get(entry.type.name)
    dtype = DTYPES["F32"] if stored is None else stored
    if form is Form.SHIFTED and dtype not in {DTYPES["F32"], DTYPES["F64"]}:
        dtype = DTYPES["F32"]  # the difference may need its precision
    if stored is None or stored != dtype:
        gguf = load_gguf(file.path)
        try:
            gguf.dequantize(np.zeros(entry.block_bytes, np.uint8), entry.type)
        except NotImplementedError:
            raise SourceError(
                f"{file.path}: tensor {name!r}: the gguf package cannot dequantise {entry.type.name}"
            ) from None
    shape = entry.shape[::-1] if form is Form.TRANSPOSED else entry.shape
    return _Tensor(file, entry, form, heads, stored, dtype, shape)


def _notices(tensors: list[_Tensor], left_out: list[str]) -> Iterator[str]:
    quantised = [tensor for tensor in tensors if tensor.stored is None]
    if quantised:
        kinds = ", ".join(sorted({tensor.entry.type.name for tensor in quantised}))
        yield (
            f"{len(quantised)} of {len(tensors)} tensors are quantised ({kinds}): they are dequantised to float32"
        )
    if any(tensor.form is Form.SHIFTED for tensor in tensors):
        yield "the file has 1 added to the weights of norms: it is subtracted, but the precision that the addition lost is not restored"
    if left_out:
        yield f"left out, computed by llama.cpp and not in Hugging Face checkpoints: {', '.join(left_out)}"
