"""Reading a file of ``torch.save`` without torch: its pickle by an allow-list, its tensors by ranges.

Both formats: a zip archive (PyTorch 1.6 and later), and the older sequence of pickles.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.dtypes import DTYPES
from shira_format.checkpoints.pickles import MAX_PICKLE, PickleError, load, ordered_dict
from shira_format.checkpoints.strided import boxes, extent, gather, is_contiguous
from shira_format.storage.paths import Storage
from shira_format.tensors import MAX_NUMEL, MAX_RANK, numel

_LEGACY = 0x1950A86A20F9469CFC6C  # the first pickle of the sequence

# torch dtypes by the names of their storages.
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip
TORCH_DTYPES: dict[str, np.dtype[Any]] = {
    "float64": DTYPES["F64"], "float32": DTYPES["F32"], "float16": DTYPES["F16"], "bfloat16": DTYPES["BF16"],
    "float8_e4m3fn": DTYPES["F8_E4M3"], "float8_e5m2": DTYPES["F8_E5M2"],
    "int64": DTYPES["I64"], "int32": DTYPES["I32"], "int16": DTYPES["I16"], "int8": DTYPES["I8"],
    "uint64": DTYPES["U64"], "uint32": DTYPES["U32"], "uint16": DTYPES["U16"], "uint8": DTYPES["U8"],
    "bool": DTYPES["BOOL"],
}  # fmt: skip
# Known, so that such tensors are not taken for damage, but not supported.
_OTHERS = {"complex64": 8, "complex128": 16}
_NAMED = (
    *TORCH_DTYPES, "complex32", "complex64", "complex128", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
    "float4_e2m1fn_x2",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Storage:
    """A range of bytes in the file that tensors share."""

    key: str
    dtype: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file; nothing of it is checked before :meth:`TorchFile.check`.

    Attributes:
        storage: where its bytes are.
        dtype: its torch dtype, without ``torch.``.
        offset: its first element within the storage, in elements.
        shape: its shape.
        strides: its strides, in elements.
        flags: lazy operations, such as a conjugation.
    """

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    flags: tuple[str, ...] = ()


class TorchFile:
    """One file of ``torch.save``, or a part of a file that is one.

    Attributes:
        root: what was saved: plain values, and :class:`StoredTensor` for tensors.

    Raises:
        PickleError: it is not such a file, is damaged, or contains more than plain values and dense tensors.
        OSError: it cannot be read.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._begins: dict[str, int] = {}  # where the bytes of a storage begin, as far as that is known
        self._records: dict[str, Any] | None = None
        file = _Bounded(storage)
        if bytes(file.read(4)) == b"PK\3\4":
            self.root = self._open_zip(file)
        else:
            file.seek(0)
            self.root = self._open_legacy(file)

    def check(self, tensor: StoredTensor) -> None:
        """Raise PickleError unless ``tensor`` is within the file, and has a valid shape and a supported dtype."""
        if tensor.dtype not in TORCH_DTYPES:
            raise PickleError(f"dtype {tensor.dtype} is not known")
        if tensor.flags:
            raise PickleError(f"it is a lazy view ({', '.join(tensor.flags)}), which is not supported")
        shape, strides = tensor.shape, tensor.strides
        if len(shape) != len(strides) or len(shape) > MAX_RANK or not _are_counts(tensor.offset, *shape, *strides):
            raise PickleError("its shape, strides or offset are invalid")
        if numel(tuple(n for n in shape if n)) > MAX_NUMEL:
            raise PickleError(f"shape {list(shape)} has more than 2^53 - 1 elements")
        size = TORCH_DTYPES[tensor.dtype].itemsize
        # An expanded tensor may be larger than its storage; without a limit, a small file could fill the memory.
        if numel(shape) * size > self._storage.size:
            raise PickleError(f"shape {list(shape)} has more bytes than the file")
        if numel(shape) and (tensor.offset + extent(shape, strides)) * size > tensor.storage.nbytes:
            raise PickleError(
                f"shape {list(shape)} does not fit into its storage of {tensor.storage.nbytes} bytes"
            )
        self._check_storage(tensor.storage)

    def read(self, tensor: StoredTensor, start: int, stop: int, out: Array | None = None) -> Array:
        """Elements ``start`` to ``stop`` of a checked, flat tensor, ``[stop - start]``, read into ``out`` or a new array.

        Only that range is read if the tensor is contiguous. Safe from several threads.
        """
        dtype = TORCH_DTYPES[tensor.dtype]
        part = (np.empty(stop - start, dtype) if out is None else out)[: stop - start]
        if start >= stop:
            return part
        begin = self._begin(tensor.storage)

        def read(element: int, buffer: memoryview) -> None:
            self._storage.read_into(begin + element * dtype.itemsize, buffer)

        if is_contiguous(tensor.shape, tensor.strides):
            read(tensor.offset + start, part.view(np.uint8).data)
            return part
        at = 0
        for offsets, sizes in boxes(tensor.shape, start, stop):
            first = tensor.offset + sum(n * stride for n, stride in zip(offsets, tensor.strides, strict=True))
            count = numel(sizes)
            gather(read, first, tensor.strides, part[at : at + count].reshape(sizes))
            at += count
        return part

    def _open_zip(self, file: IO[bytes]) -> Any:
        import zipfile

        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except (
            zipfile.BadZipFile,
            ValueError,
            LookupError,
            NotImplementedError,
            OverflowError,
            struct.error,
        ) as error:
            raise PickleError(f"a damaged zip archive: {error}") from None
        # Like torch: all records are in one folder, the one of the first record.
        folder = entries[0].filename.partition("/")[0] + "/" if entries else "/"
        self._records = {e.filename.removeprefix(folder): e for e in entries if e.filename.startswith(folder)}
        if len({entry.filename for entry in entries}) != len(entries):
            raise PickleError("a zip archive with two records of one name")
        if "constants.pkl" in self._records:
            raise PickleError("a TorchScript archive, which is a program: save the state_dict of its module")
        if "data.pkl" not in self._records:
            raise PickleError("a zip archive without data.pkl, so not written by torch.save")
        if "byteorder" in self._records and self._record("byteorder") != b"little":
            raise PickleError("its tensors are big-endian, which is not supported")
        return load(io.BytesIO(self._record("data.pkl")), _names(), _storage)

    def _record(self, name: str) -> bytes:
        assert self._records is not None
        size = self._records[name].file_size
        if size > MAX_PICKLE:
            raise PickleError(f"its record {name} has {size} bytes, the limit is {MAX_PICKLE}")
        begin = self._begin_of_record(name)
        return self._bytes(begin, size)

    def _bytes(self, begin: int, size: int) -> bytes:
        found = bytearray(size)
        self._storage.read_into(begin, memoryview(found))
        return bytes(found)

    def _begin_of_record(self, name: str) -> int:
        assert self._records is not None
        entry = self._records[name]
        header: int = entry.header_offset
        if entry.compress_type != 0 or entry.flag_bits & 1:
            raise PickleError(f"its record {name} is compressed or encrypted, which torch.save does not do")
        if not 0 <= header <= self._storage.size - 30:
            raise PickleError(f"its record {name} is outside of the file")
        local = self._bytes(header, 30)
        # torch aligns records by an extra field of the local header, so its length there counts.
        begin = header + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        if local[:4] != b"PK\3\4" or begin + entry.file_size > self._storage.size:
            raise PickleError(f"its record {name} is outside of the file")
        return begin

    def _check_storage(self, storage: _Storage) -> None:
        if self._records is None:
            if storage.key not in self._begins:
                raise PickleError(f"its storage {storage.key} is missing")
            return
        entry = self._records.get(f"data/{storage.key}")
        if entry is None:
            raise PickleError(f"its storage {storage.key} is missing")
        if entry.file_size < storage.nbytes or entry.compress_type != 0:
            raise PickleError(f"its storage {storage.key} is compressed, or shorter than {storage.nbytes} bytes")
        if entry.header_offset + 30 + len(entry.filename) + entry.file_size > self._storage.size:
            raise PickleError(f"its storage {storage.key} is outside of the file")

    def _begin(self, storage: _Storage) -> int:
        # Headers are read when first needed: hundreds of requests would be slow on remote storage.
        if storage.key not in self._begins:
            self._begins[storage.key] = self._begin_of_record(f"data/{storage.key}")
        return self._begins[storage.key]

    def _open_legacy(self, file: IO[bytes]) -> Any:
        try:
            if load(file, {}) != _LEGACY:
                raise PickleError("a pickle of another kind")
        except PickleError as error:
            raise PickleError(f"not written by torch.save ({error})") from None
        version, system = load(file, {}), load(file, {})
        if version != 1001 or type(system) is not dict or system.get("little_endian") is not True:
            raise PickleError("a torch.save file of an unknown version, or of a big-endian machine")
        storages: dict[str, _Storage] = {}

        def persistent(identity: Any) -> _Storage:
            if type(identity) is not tuple or len(identity) != 6 or identity[5] is not None:
                raise PickleError("it has views of storages, or code, of very old versions of torch")
            found = _storage(identity[:5])
            return storages.setdefault(found.key, found)

        root = load(file, _names(), persistent)
        keys = load(file, {})
        if type(keys) is not list or not all(type(key) is str and key in storages for key in keys):
            raise PickleError("its list of storages is damaged")
        at = file.tell()
        for key in keys:
            storage = storages[key]
            file.seek(at)
            count = int.from_bytes(file.read(8), "little")
            if count * _itemsize(storage.dtype) != storage.nbytes or at + 8 + storage.nbytes > self._storage.size:
                raise PickleError(f"its storage {key} is damaged or not within the file")
            self._begins[key] = at + 8
            at += 8 + storage.nbytes
        return root


def _names() -> dict[tuple[str, str], Any]:
    """What ``torch.load(weights_only=True)`` allows, as far as dense tensors need it; none of it has side effects."""
    names: dict[tuple[str, str], Any] = {("torch", name): name for name in _NAMED}
    names |= {("torch", name): dtype for name, dtype in _STORAGES.items()}
    names |= {
        ("torch.storage", "UntypedStorage"): "uint8",
        ("collections", "OrderedDict"): ordered_dict,
        ("torch._utils", "_rebuild_tensor"): _tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
        ("torch._utils", "_rebuild_parameter"): _same,
        ("torch._utils", "_rebuild_parameter_with_state"): _same,
        ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
        ("torch", "Tensor"): "Tensor",
        ("torch.nn.parameter", "Parameter"): "Parameter",
        ("torch", "Size"): tuple,
        ("torch", "device"): _nothing,
        ("torch.serialization", "_get_layout"): _nothing,
        ("collections", "Counter"): _nothing,
        ("_codecs", "encode"): _nothing,
        **{(module, name): _nothing for module in ("builtins", "__builtin__") for name in ("set", "bytearray", "complex")},
    }  # fmt: skip
    return names


def _storage(identity: Any) -> _Storage:
    if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
        raise PickleError("a persistent id that is not a storage")
    _, dtype, key, _, count = identity
    if type(dtype) is not str or type(key) is not str or not _are_counts(count):
        raise PickleError("a persistent id that is not a storage")
    return _Storage(key, dtype, count * _itemsize(dtype))


def _tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    _grad: Any = False,
    _hooks: Any = None,
    metadata: Any = None,
) -> StoredTensor:
    if type(storage) is not _Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise PickleError("a tensor without a storage")
    # Types first: what a pickle nests, with itself again and again, would make a text without end.
    if metadata is not None and (
        type(metadata) is not dict or not all(type(key) is str and type(metadata[key]) is bool for key in metadata)
    ):
        raise PickleError("a tensor's flags are not true or false")
    flags = tuple(key for key, value in metadata.items() if value) if metadata else ()
    return StoredTensor(storage, storage.dtype, offset, shape, strides, flags)


def _tensor_of_dtype(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> StoredTensor:
    found = _tensor(storage, offset, shape, strides, grad, hooks, metadata)
    if type(dtype) is not str:
        raise PickleError("a tensor's dtype is not one")
    return StoredTensor(found.storage, dtype, offset, shape, strides, found.flags)


def _same(data: Any, *_: Any) -> Any:
    return data


def _of_type(rebuild: Any, kind: Any, arguments: Any, _state: Any) -> StoredTensor:
    if rebuild not in (_tensor, _tensor_of_dtype, _same) or kind not in ("Tensor", "Parameter"):
        raise PickleError("a tensor of an unknown class")
    found = rebuild(*arguments)
    if type(found) is not StoredTensor:
        raise PickleError("a rebuilt object that is not a tensor")
    return found


def _nothing(*_: Any) -> None:
    """For settings and counters, whose values are not needed."""


def _itemsize(dtype: str) -> int:
    if dtype in _OTHERS:
        return _OTHERS[dtype]
    if dtype not in TORCH_DTYPES:
        raise PickleError(f"a storage of {dtype:.100}")
    return TORCH_DTYPES[dtype].itemsize


def _are_counts(*values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


class _File(io.RawIOBase):
    """A storage as a file object."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, self._storage.size)[whence]
        if at < 0:
            raise ValueError(f"a seek to {at}")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._storage.size - self._at)]
        self._storage.read_into(self._at, view)
        self._at += len(view)
        return len(view)


class _Bounded(io.BufferedReader):
    """A file object that does not trust counts in a stranger's file: it allocates no more than the file has."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(_File(storage), 2**16)
        self._size = storage.size

    def read(self, size: int | None = -1, /) -> bytes:
        rest = max(0, self._size - self.tell())
        size = rest if size is None or size < 0 else min(size, rest)
        if size > MAX_PICKLE:
            raise ValueError(f"a read of {size} bytes; the limit is {MAX_PICKLE}")
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        return super().readline(4096)
