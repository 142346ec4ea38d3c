"""Writing adapter files: tensor by tensor into unnamed spools, then header and data in one file that appears whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from shira_format.adapter import Adapter
from shira_format.arrays import Array, bits, digest, file_digest
from shira_format.codecs import BLOCK_SIZE, encode_smallest
from shira_format.container.atomic import replaced_file
from shira_format.container.reader import AdapterFile
from shira_format.dtypes import dtype_name
from shira_format.errors import FormatError
from shira_format.manifest import DIGEST, FORMAT_VERSION, METADATA_KEY, check_name, parse_manifest, stream_name
from shira_format.safetensors_file import MAX_HEADER
from shira_format.tensors import SparseTensor, WholeTensor, numel
from shira_format.version import __version__

# What `add` and `close` derive; everything else of a manifest is taken over as it is.
_DERIVED = {"format_version", "features", "digest", "mask_files", "tensors", "whole"}
_DERIVED_OF_TENSOR = {"name", "shape", "dtype", "nnz", "values", "indices", "digests", "base_values"}


def save(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    masks: str | os.PathLike[str] | None = None,
    block_size: int = BLOCK_SIZE,
) -> None:
    """Write an adapter to ``path``, replacing what is there; one tensor is in memory at a time.

    The same adapter gives the same bytes. Readers see the old file or the new one, never a part.

    Args:
        adapter: what to write; provenance comes from ``adapter.manifest``.
        path: where to.
        masks: a mask file that lies, or will lie, in the same folder: tensors whose indices equal those of its tensor of the
            same name store none of their own.
        block_size: entries a block of the index directory.

    Raises:
        FormatError: the adapter has something that the format cannot hold.
        OSError: it cannot be written; nothing is left behind.
    """
    notes = {item["name"]: item for key in ("tensors", "whole") for item in adapter.manifest.get(key, ())}
    with AdapterWriter(path, adapter.manifest, masks=masks, block_size=block_size) as writer:
        for name in adapter:
            writer.add(adapter[name], notes.get(name, {}))
        for name in adapter.whole:
            writer.add_whole(adapter.whole[name], notes.get(name, {}))


class AdapterWriter:
    """Writes one adapter file as its tensors come: a context manager that keeps the file only if all went well.

    Streams are spooled to unnamed temporary files, one for each element size, so that nothing is left if the process
    is killed, and so that each stream is aligned in the end. The file itself appears when the block ends.

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
    ) -> None:
        """Args: see :func:`save`; ``manifest`` holds provenance, and may still grow until the block ends."""
        self.path = Path(path)
        self.manifest = dict(manifest or {})
        self._masks = AdapterFile(masks) if masks is not None else None
        self._open = ExitStack()
        self._block_size = block_size
        self._spools: dict[int, IO[bytes]] = {}
        self._sizes: dict[int, int] = {}
        self._streams: dict[str, tuple[str, list[int], int, int]] = {}
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
            self._open.close()

    def add(self, tensor: SparseTensor, notes: Mapping[str, Any] | None = None) -> int:
        """Write one sparse tensor; returns the bytes that its streams take.

        Args:
            tensor: the tensor.
            notes: more keys for its item in the manifest, such as ``energy_kept``.

        Raises:
            FormatError: a name that is not allowed or not new, or targets of which nothing tells the base. Nothing
                of the tensor is kept then, and others may follow.
        """
        with self._whole_or_not():
            return self._add(tensor, notes)

    def _add(self, tensor: SparseTensor, notes: Mapping[str, Any] | None) -> int:
        check_name(tensor.name, None)
        before = sum(self._sizes.values())
        item: dict[str, Any] = {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "dtype": dtype_name(tensor.dtype),
            "nnz": tensor.nnz,
            "values": tensor.meaning,
        }
        digests: dict[str, str] = {}
        item["indices"] = self._add_indices(tensor, digests)
        if tensor.meaning != "none":
            digests["values"] = self._spool(stream_name(tensor.name, "values"), tensor.values)
        if tensor.base_digest is not None:
            digests["base"] = tensor.base_digest
        elif tensor.meaning == "target":
            raise FormatError("manifest-schema", "target values need the base's values or their digest", tensor=tensor.name)  # fmt: skip
        item["digests"] = digests
        if tensor.base is not None:
            self._spool(stream_name(tensor.name, "base"), tensor.base, tensor.base_digest)
            item["base_values"] = True
        self._tensors.append(item | _others(notes, _DERIVED_OF_TENSOR))
        return sum(self._sizes.values()) - before

    def add_whole(self, tensor: WholeTensor, notes: Mapping[str, Any] | None = None) -> None:
        """Write one whole tensor; see :meth:`add`."""
        with self._whole_or_not():
            self._add_whole(tensor, notes)

    def _add_whole(self, tensor: WholeTensor, notes: Mapping[str, Any] | None) -> None:
        check_name(tensor.name, None)
        digests = {"values": self._spool(tensor.name, tensor.values)}
        item: dict[str, Any] = {"name": tensor.name, "digests": digests}
        if tensor.base_digest is not None:
            digests["base"] = tensor.base_digest
        if tensor.base is not None:
            self._spool(stream_name(tensor.name, "base"), tensor.base, tensor.base_digest)
            item["base_values"] = True
        self._whole.append(item | _others(notes, _DERIVED_OF_TENSOR))

    @contextmanager
    def _whole_or_not(self) -> Iterator[None]:
        """On an exception, forget what was spooled in the block: no stream may be left without a tensor."""
        streams, seen, sizes = len(self._streams), len(self._seen), dict(self._sizes)
        try:
            yield
        except BaseException:
            while len(self._streams) > streams:
                self._streams.popitem()
            while len(self._seen) > seen:
                self._seen.popitem()
            for size, spool in self._spools.items():
                self._sizes[size] = sizes.get(size, 0)
                spool.seek(self._sizes[size])
                spool.truncate()
            raise

    def _add_indices(self, tensor: SparseTensor, digests: dict[str, str]) -> dict[str, Any]:
        if self._masks is not None and self._in_mask_file(tensor):
            return {"codec": "shared", "tensor": tensor.name, "file": self._masks.path.name}
        encoded = encode_smallest(tensor.indices, tensor.shape, self._block_size)
        if encoded.stream is not None:
            found = digest(encoded.stream)
            key = (tensor.shape, encoded.params["codec"], found)
            twin = self._seen.setdefault(key, tensor.name)
            if twin != tensor.name and encoded.stream_bytes > len(twin):
                return {"codec": "shared", "tensor": twin}
            digests["indices"] = self._spool(stream_name(tensor.name, "indices"), encoded.stream, found)
        if encoded.blocks is not None:
            digests["blocks"] = self._spool(stream_name(tensor.name, "blocks"), encoded.blocks)
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
        """Append an array to the spool of its element size; returns its digest, which may be known already."""
        if name in self._streams:
            raise FormatError("duplicate-name", f"the stream name {name!r} occurs twice", tensor=name)
        size = array.dtype.itemsize
        if size not in self._spools:
            spool = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115 - closed on exit
            self._spools[size] = self._open.enter_context(spool)
            self._sizes[size] = 0
        raw = bits(array)
        self._spools[size].write(raw.data)
        begin = self._sizes[size]
        self._sizes[size] += raw.size
        self._streams[name] = (dtype_name(array.dtype), list(array.shape), size, begin)
        return known or digest(array)

    def _finish(self) -> None:
        header = self._header()
        with replaced_file(self.path) as file:
            file.write(len(header).to_bytes(8, "little"))
            file.write(header)
            for size in sorted(self._spools, reverse=True):
                self._spools[size].seek(0)
                shutil.copyfileobj(self._spools[size], file, 1 << 20)

    def _header(self) -> bytes:
        text = _json(self._full_manifest())
        parse_manifest(text)  # what was handed in as provenance is held to the same rules as a stranger's file
        begins, at = {}, 0
        for size in sorted(self._spools, reverse=True):
            begins[size] = at
            at += self._sizes[size]
        entries: dict[str, Any] = {"__metadata__": {METADATA_KEY: text}}
        for name, (dtype, shape, size, begin) in self._streams.items():
            start = begins[size] + begin
            length = numel(tuple(shape)) * size
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + length]}
        header = _json(entries).encode()
        header += b" " * (-len(header) % 8)
        if len(header) > MAX_HEADER:
            raise FormatError("header-too-large", f"a header of {len(header)} bytes, the limit is {MAX_HEADER}")
        return header

    def _full_manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, "features": [], "digest": DIGEST}
        manifest |= {"writer": f"shira-format {__version__}"} | _others(self.manifest, _DERIVED)
        if any("file" in item["indices"] for item in self._tensors):
            assert self._masks is not None
            manifest["features"] = ["mask-file"]
            manifest["mask_files"] = {self._masks.path.name: file_digest(self._masks.path)}
        manifest["tensors"] = self._tensors
        if self._whole:
            manifest["whole"] = self._whole
        return manifest


def _others(keys: Mapping[str, Any] | None, known: set[str]) -> dict[str, Any]:
    return {key: value for key, value in (keys or {}).items() if key not in known}


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise FormatError("manifest-json", f"the manifest cannot be written as JSON: {error}") from None
