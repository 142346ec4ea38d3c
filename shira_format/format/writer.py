"""Writing adapter files: tensor by tensor to unnamed temporary files, then header and data to one file, atomically."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from shira_format._core import fits
from shira_format._core.arrays import Array, array_digest, as_array, as_bytes
from shira_format._core.dtypes import dtype_name
from shira_format._core.files import naming
from shira_format.adapter import Adapter
from shira_format.errors import FormatError
from shira_format.format.codecs import BLOCK_SIZE, CODECS, Encoded, Hints, encode_smallest, encode_with, seed_of
from shira_format.format.compact.values import encode_floats, encode_steps
from shira_format.format.items import check_name, stream_name
from shira_format.format.manifest import (
    DERIVED,
    DIGEST,
    DIGEST_KEY,
    ENTRIES_PER_BYTE,
    FORMAT_VERSION,
    FREE_ENTRIES,
    METADATA_KEY,
    NEWER,
    parse_manifest,
)
from shira_format.format.provenance import check_provenance
from shira_format.format.reader import AdapterFile
from shira_format.storage.atomic import atomic_file
from shira_format.storage.paths import read_file
from shira_format.storage.safetensors_header import MAX_HEADER, Stream, file_header
from shira_format.tensors import DenseTensor, SparseTensor, numel
from shira_format.version import __version__

_WORTH = 40  # bytes that the words in the manifest for it take
# The same for an item of `tensors` or `whole`.
_DERIVED_OF_TENSOR = {
    "name", "shape", "dtype", "nnz", "values", "indices", "digests", "base_values", "from", "rows", "coding",
}  # fmt: skip


def save(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    masks: str | os.PathLike[str] | None = None,
    block_size: int = BLOCK_SIZE,
    compact: bool = False,
    base: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter to ``path``, replacing what is there; one tensor is in memory at a time.

    The same adapter gives the same bytes. Readers see the old file or the new one, never a partial one.

    Args:
        adapter: what to write; provenance comes from ``adapter.manifest``.
        path: the file.
        masks: a mask file that is, or will be, in the same folder: a tensor whose indices equal those of the mask file's
            tensor of the same name stores none of its own.
        block_size: entries per block of the block directory.
        compact: see :class:`AdapterWriter`.
        base: likewise.

    Raises:
        FormatError: the adapter breaks a rule of the format.
        BaseMismatch: ``base`` is not the one that the adapter was made for.
        OSError: it cannot be written; nothing is left behind.
    """
    notes = {item["name"]: item for key in ("tensors", "whole") for item in adapter.manifest.get(key, ())}
    with AdapterWriter(
        path, adapter.manifest, masks=masks, block_size=block_size, compact=compact, base=base
    ) as writer:
        for name in adapter:
            writer.add(adapter[name], notes.get(name, {}))
        for name in adapter.dense:
            writer.add_dense(adapter.dense[name], notes.get(name, {}))


@dataclass(frozen=True)
class Prepared:
    """A sparse tensor with encoded and hashed streams: the part of :meth:`AdapterWriter.add` that needs no file."""

    tensor: SparseTensor
    encoded: Encoded
    digests: dict[str, str]
    coded: dict[str, Array]
    coding: dict[str, dict[str, Any]]


class AdapterWriter:
    """Writes an adapter file tensor by tensor: a context manager that creates the file if the block raises nothing.

    Streams are spooled to an unnamed temporary file, so that nothing is left behind if the process is killed. Those of a
    tensor follow each other, in the order of the tensors: the file can be read in one pass.

    Example:
        >>> with AdapterWriter("style.st", {"base_model": {"id": "me/base"}}) as writer:
        ...     writer.add(tensor)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        manifest: Mapping[str, Any] | None = None,
        *,
        masks: str | os.PathLike[str] | None = None,
        block_size: int = BLOCK_SIZE,
        compact: bool = False,
        base: Mapping[str, Any] | None = None,
    ) -> None:
        """Open it.

        Args:
            path: see :func:`save`.
            manifest: provenance; keys may be added until the block ends.
            masks: see :func:`save`.
            block_size: likewise.
            compact: take as few bytes as possible; with ``base``, of what a reader finds in the base nothing is stored, and the
                base is needed to read the file.
            base: with ``compact``: the weights that the adapter was made for, by name: an open checkpoint or a state dict.
        """
        self._compact = compact
        self._base = base if compact else None
        self.path = Path(path)
        self.manifest = dict(manifest or {})
        # Read once: the digest that is written is that of the bytes whose indices are shared.
        content = None if masks is None else read_file(Path(masks))
        self._masks = None if masks is None else AdapterFile(masks, content=content, base=base)
        self._masks_digest = None if content is None else hashlib.sha256(content).hexdigest()
        self._open = ExitStack()
        self._block_size = block_size
        self._spool_file: IO[bytes] | None = None
        self._size = 0  # of the buffer so far, in bytes
        self._streams: dict[str, Stream] = {}
        self._entries = 0
        self._tensors: list[dict[str, Any]] = []
        self._whole: list[dict[str, Any]] = []
        self._seen: dict[tuple[Any, ...], str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except FormatError as bad:
            raise bad.at(file=self.path) from None
        finally:
            if self._masks is not None:
                self._masks.streams.close()
            with naming(self.path):  # what is in the buffer of a full disk fails again
                self._open.close()

    def prepared(self, tensor: SparseTensor, *, bytewise: bool = False) -> Prepared:
        """Encode and hash a tensor's streams; may run on any thread before :meth:`add`.

        With ``bytewise`` each entry takes at least a byte.
        """
        weight, own = self._known_base(tensor)
        if bytewise:
            encoded = encode_smallest(tensor.indices, tensor.shape, self._block_size, bytewise=True)
        else:
            encoded = encode_with(tensor.indices, tensor.shape, self._block_size, self._hints(tensor, weight))
        coded, coding = _coded_values(tensor, own) if self._compact and not bytewise else ({}, {})
        streams = {"indices": encoded.stream, "blocks": encoded.blocks, "rows": tensor.new_rows}
        if tensor.value_kind != "none":
            streams["values"] = coded.get("values", tensor.values)
        digests = {role: array_digest(s) for role, s in streams.items() if s is not None}
        if CODECS[encoded.params["codec"]].is_implied(encoded.params):
            digests["entries"] = array_digest(tensor.indices)
        return Prepared(tensor, encoded, digests, coded, coding)

    def _hints(self, tensor: SparseTensor, base: Array | None) -> Hints:
        mask = self.manifest.get("mask", {})
        seed = seed_of(mask, tensor.name) if mask.get("rule") == "rand" else None
        return Hints(seed, mask.get("band", 0), base, self._compact)

    def _known_base(self, tensor: SparseTensor) -> tuple[Array | None, Array | None]:
        """The base's tensor, flat, and its values at the entries, each of which a reader may be asked for, or has; else None.

        Raises:
            BaseMismatch: the base has none, or one of another shape, dtype or with other values at the entries.
        """
        if (
            self._base is None or tensor.base is not None
        ):  # a file that holds the base's values is to be read without it
            return None, tensor.base
        what = f"tensor {tensor.name!r}"
        if tensor.base_name not in self._base:
            raise fits.missing(what, tensor.base_name)
        weight = as_array(self._base[tensor.base_name])
        fits.check_shape(what, tensor.shape, weight.shape)
        own = None if tensor.value_kind == "none" else tensor.checked_base(weight)
        return (weight.reshape(-1), own) if weight.dtype == tensor.dtype else (None, None)

    def add(self, tensor: SparseTensor | Prepared, notes: Mapping[str, Any] | None = None) -> int:
        """Write a sparse tensor; returns the bytes of its streams.

        Args:
            tensor: the tensor, or the result of :meth:`prepared`.
            notes: more keys of its item in the manifest, such as ``energy_kept``.

        Raises:
            FormatError: the name is not allowed or not new, or the values are targets without base values or their digest.
                Nothing of the tensor is written then, and others may follow.
        """
        with self._all_or_nothing():
            return self._add(tensor if isinstance(tensor, Prepared) else self.prepared(tensor), notes)

    def _add(self, prepared: Prepared, notes: Mapping[str, Any] | None) -> int:
        tensor = prepared.tensor
        must_store = self._must_store(prepared)
        if must_store and self._must_store(prepared, with_indices=True):
            prepared = self.prepared(tensor, bytewise=True)
        check_name(tensor.name, None)
        before = self._size
        item: dict[str, Any] = {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "dtype": dtype_name(tensor.dtype),
            "nnz": tensor.nnz,
            "values": tensor.value_kind,
        }
        digests: dict[str, str] = {}
        item["indices"] = self._add_indices(prepared, digests, may_share=not must_store)
        if tensor.value_kind != "none":
            self._spool_digest(tensor, "values", prepared.coded.get("values", tensor.values), prepared, digests)
        if tensor.base_digest is not None:
            digests["base"] = tensor.base_digest
        elif tensor.value_kind == "target":
            raise FormatError("manifest-schema", "target values need the base values or their digest", tensor=tensor.name)  # fmt: skip
        item["digests"] = digests
        if tensor.base is not None:
            self._spool(
                stream_name(tensor.name, "base"), prepared.coded.get("base", tensor.base), tensor.base_digest
            )
            item["base_values"] = True
        if tensor.base_name != tensor.name:
            item["from"] = tensor.base_name
        if tensor.rows is not None:
            item["rows"] = tensor.rows
        if tensor.new_rows is not None:
            self._spool_digest(tensor, "rows", tensor.new_rows, prepared, digests)
        if tensor.result_digest is not None:
            digests["result"] = tensor.result_digest
        if prepared.coding:
            item["coding"] = prepared.coding
        self._tensors.append(item | _others(notes, _DERIVED_OF_TENSOR))
        self._entries += tensor.nnz
        return self._size - before

    def _spool_digest(
        self, tensor: SparseTensor, role: str, array: Array, prepared: Prepared, digests: dict[str, str]
    ) -> None:
        digests[role] = prepared.digests[role]
        self._spool(stream_name(tensor.name, role), array, digests[role])

    def add_dense(self, tensor: DenseTensor, notes: Mapping[str, Any] | None = None) -> None:
        """Write a dense tensor; see :meth:`add`."""
        values, base = tensor.values, tensor.base
        self.add_parts(
            tensor.name, values.dtype, values.shape, [values],
            base=None if base is None else [base], base_digest=tensor.base_digest, notes=notes,
        )  # fmt: skip

    def add_parts(
        self,
        name: str,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        parts: Iterable[Array],
        *,
        base: Iterable[Array] | None = None,
        base_digest: str | Future[str] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a dense tensor that comes in parts, so that it is never whole in memory.

        Args:
            name: its name.
            dtype: its dtype.
            shape: its shape.
            parts: its elements in row-major order.
            base: those of the base's tensor, of the same dtype and shape, to be stored as well.
            base_digest: SHA-256 of the base's tensor, or a future of it.
            notes: see :meth:`add`.
        """
        with self._all_or_nothing():
            check_name(name, None)
            digests = {"values": self._spool_parts(name, dtype, shape, parts)}
            item: dict[str, Any] = {
                "name": name, "shape": list(shape), "dtype": dtype_name(dtype), "digests": digests,
            }  # fmt: skip
            if base is not None:
                base_digest = self._spool_parts(stream_name(name, "base"), dtype, shape, base)
                item["base_values"] = True
            if base_digest is not None:
                digests["base"] = base_digest if isinstance(base_digest, str) else base_digest.result()
            self._whole.append(item | _others(notes, _DERIVED_OF_TENSOR))

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """On an exception, remove what the block has spooled: no stream may be left without a tensor."""
        streams, seen, size = len(self._streams), len(self._seen), self._size
        try:
            yield
        except BaseException:
            while len(self._streams) > streams:
                self._streams.popitem()
            while len(self._seen) > seen:
                self._seen.popitem()
            self._size = size
            if self._spool_file is not None:
                with naming(self.path):  # what is in the buffer of a full disk fails again
                    self._spool_file.seek(size)
                    self._spool_file.truncate()
            raise

    def _must_store(self, prepared: Prepared, *, with_indices: bool = False) -> bool:
        """Whether the file would pass the limit of entries (rule ``limit``) with a tensor's values, and maybe its indices."""
        tensor, coded = prepared.tensor, prepared.coded
        if tensor.value_kind != "none" and "values" not in coded:
            return False  # an entry takes a byte at least
        size = self._size + sum(stream.nbytes for stream in coded.values())
        if with_indices:
            size += prepared.encoded.stream_bytes
        return self._entries + tensor.nnz > FREE_ENTRIES + ENTRIES_PER_BYTE * size

    def _add_indices(self, prepared: Prepared, digests: dict[str, str], *, may_share: bool) -> dict[str, Any]:
        tensor, encoded = prepared.tensor, prepared.encoded
        if may_share and self._masks is not None and self._in_mask_file(tensor):
            return {"codec": "shared", "tensor": tensor.name, "file": self._masks.path.name}
        if encoded.stream is not None:
            key = (
                tensor.shape,
                *encoded.params.values(),
                prepared.digests["indices"],
                prepared.digests.get("entries"),
            )
            twin = self._seen.setdefault(key, tensor.name)
            if may_share and twin != tensor.name and encoded.stream_bytes > len(twin):
                return {"codec": "shared", "tensor": twin}
            self._spool_digest(tensor, "indices", encoded.stream, prepared, digests)
        if encoded.blocks is not None:
            self._spool_digest(tensor, "blocks", encoded.blocks, prepared, digests)
        if "entries" in prepared.digests:
            digests["entries"] = prepared.digests["entries"]
        return encoded.params

    def _in_mask_file(self, tensor: SparseTensor) -> bool:
        assert self._masks is not None
        entry = self._masks.manifest.tensors.get(tensor.name)
        return (
            entry is not None
            and entry.codec != "shared"
            and (entry.shape, entry.nnz) == (tensor.shape, tensor.nnz)
            and np.array_equal(self._masks.indices(entry), tensor.indices)
        )

    def _spool(self, name: str, array: Array, known: str | None = None) -> str:
        """Append an array to the spool; returns its digest, computed unless it is ``known``."""
        return self._spool_parts(name, array.dtype, array.shape, [array], known)

    def _spool_parts(
        self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], parts: Iterable[Array], known: str | None = None
    ) -> str:  # fmt: skip
        if name in self._streams:
            raise FormatError("duplicate-name", f"the stream name {name!r} occurs twice", tensor=name)
        if self._spool_file is None:
            spool = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115 - closed on exit
            self._spool_file = self._open.enter_context(spool)
        begin, found = self._size, hashlib.sha256()
        for part in parts:
            raw = as_bytes(part).data
            with naming(self.path):
                self._spool_file.write(raw)
            self._size += len(raw)
            if known is None:
                found.update(raw)
        if self._size - begin != numel(shape) * dtype.itemsize:
            raise FormatError("count-mismatch", f"its parts do not add up to shape {list(shape)}", tensor=name)
        self._streams[name] = Stream(dtype_name(dtype), shape, begin, self._size)
        return known or found.hexdigest()

    def _finish(self) -> None:
        header = self._header()
        with atomic_file(self.path) as file:
            file.write(header)
            if self._spool_file is not None:
                self._spool_file.seek(0)  # writes what is in the buffer
                shutil.copyfileobj(self._spool_file, file, 1 << 20)

    def _header(self) -> bytes:
        manifest = self._full_manifest()
        text = _json(manifest)
        parse_manifest(text)  # what the caller gave must pass the same checks as a stranger's file
        check_provenance(manifest)
        digest = hashlib.sha256(text.encode()).hexdigest()
        header = file_header(self._streams, {METADATA_KEY: text, DIGEST_KEY: digest})
        if len(header) - 8 > MAX_HEADER:
            raise FormatError(
                "header-too-large", f"a header of {len(header) - 8} bytes; the limit is {MAX_HEADER}"
            )
        return header

    def _full_manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, "features": [], "digest": DIGEST}
        manifest |= {"writer": f"shira-format {__version__}"} | _others(self.manifest, DERIVED)
        if any("file" in item["indices"] for item in self._tensors):
            assert self._masks is not None
            manifest["features"].append("mask-file")
            manifest["mask_files"] = {self._masks.path.name: self._masks_digest}
        if manifest.get("removed") or any("from" in item or "rows" in item for item in self._tensors):
            manifest["features"].append("patch")
        codecs = {item["indices"]["codec"] for item in self._tensors}
        features = {c.feature for c in CODECS.values() if c.feature and c.name in codecs}
        features |= {"compact" for item in self._tensors if "coding" in item}
        manifest["features"] += sorted(features)
        manifest["format_version"] = max([FORMAT_VERSION, *(NEWER.get(f, "") for f in manifest["features"])])
        manifest["tensors"] = self._tensors
        if self._whole:
            manifest["whole"] = self._whole
        return manifest


def _coded_values(tensor: SparseTensor, base: Array | None) -> tuple[dict[str, Array], dict[str, dict[str, Any]]]:
    """The streams of values that are smaller when coded, and how they are.

    Args:
        tensor: the tensor.
        base: the base's values at its entries, if a reader has them.
    """
    coded: dict[str, Array] = {}
    coding: dict[str, dict[str, Any]] = {}

    def offer(role: str, plain: Array, codec: str, stream: Array | None, **more: Any) -> None:
        if stream is not None and stream.nbytes + _WORTH < plain.nbytes:
            coded[role], coding[role] = stream, {"codec": codec, **more}

    if base is not None and tensor.value_kind == "target":
        offer("values", tensor.values, "steps", encode_steps(tensor.values, base))
    if tensor.value_kind != "none" and "values" not in coded:
        dtype = tensor.values.dtype
        more = {} if dtype == tensor.dtype else {"dtype": dtype_name(dtype)}
        offer("values", tensor.values, "floats", encode_floats(tensor.values), **more)
    if tensor.base is not None:
        offer("base", tensor.base, "floats", encode_floats(tensor.base))
    return coded, coding


def _others(keys: Mapping[str, Any] | None, known: Container[str]) -> dict[str, Any]:
    return {key: value for key, value in (keys or {}).items() if key not in known}


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise FormatError("manifest-json", f"the manifest cannot be written as JSON: {error}") from None
