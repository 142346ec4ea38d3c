"""Reading adapter files: the header is checked when the file is opened, a tensor when it is read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core import fits
from shira_format._core.arrays import Array, Indices, array_digest, as_array, frozen
from shira_format._core.compiled import take
from shira_format._core.dtypes import FLOATS
from shira_format.adapter import Adapter, LazyMapping
from shira_format.errors import BaseMismatch, BaseRequired, FormatError, SourceError
from shira_format.format.codecs import CODECS, Encoded, IndexRange, cut
from shira_format.format.compact.values import decode_floats, decode_steps
from shira_format.format.items import DenseEntry, SparseEntry, check_shared_target, stream_name
from shira_format.format.manifest import (
    DIGEST_KEY,
    ENTRIES_PER_BYTE,
    FREE_ENTRIES,
    METADATA_KEY,
    parse_manifest,
)
from shira_format.storage.paths import read_file
from shira_format.storage.safetensors_file import SafetensorsFile
from shira_format.tensors import DenseTensor, SparseTensor, check_increasing, numel


def load(
    path: str | os.PathLike[str],
    *,
    verify: bool = True,
    masks: str | os.PathLike[str] | None = None,
    base: Mapping[str, Any] | None = None,
) -> Adapter:
    """Open an adapter file.

    The header, the manifest and all sizes are checked now; a tensor is read into memory, decoded and checked at each access,
    and not kept.

    Args:
        path: the file.
        verify: check each stream's digest when it is read. Order, range and counts of indices are always checked.
        masks: folder of mask files, by default that of ``path``.
        base: the weights that the adapter was made for, by name: an open checkpoint or a state dict. Files whose entries follow
            from the base's values need it.

    Raises:
        FormatError: the file breaks a rule of the format.
        OSError: it cannot be read.
    """
    return AdapterFile(path, verify=verify, masks=masks, base=base).adapter()


_NONE = np.empty(0, np.int64)


class AdapterFile:
    """An open adapter file: the checked manifest, and its tensors one by one.

    Attributes:
        path: the file.
        manifest: the checked manifest.
        streams: the checked safetensors header.
        key: SHA-256 of the manifest's text, which has the digests of everything else.
        base: the base's weights by name, for tensors whose entries follow from them; None: these cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        verify: bool = True,
        masks: str | os.PathLike[str] | None = None,
        content: bytes | None = None,
        base: Mapping[str, Any] | None = None,
    ) -> None:
        """Open it; see :func:`load`.

        ``content`` are the file's bytes, if they have been read; then nothing else is.
        """
        self.base = base
        self.path = Path(path)
        self._verify = verify
        self._masks = Path(masks) if masks is not None else self.path.parent
        self._mask_files: dict[str, AdapterFile] = {}
        self.streams = SafetensorsFile(self.path, content)
        try:
            text = self.streams.metadata.get(METADATA_KEY)
            if text is None:
                raise FormatError("no-manifest", "a safetensors file without a SHiRA manifest, so not an adapter")
            self.manifest = parse_manifest(text, self.streams.metadata.get(DIGEST_KEY, ""))
            self.key = self.manifest.digest
            self._check_streams()
        except FormatError as error:
            self.streams.close()
            raise error.at(file=self.path) from None

    def adapter(self) -> Adapter:
        """The adapter; its tensors are read at each access, and not kept."""
        return Adapter(
            LazyMapping(self.manifest.tensors, self.sparse),
            dense=LazyMapping(self.manifest.whole, self.dense),
            manifest=self.manifest.raw,
        )

    def sparse(self, name: str) -> SparseTensor:
        """Read, check and decode a sparse tensor.

        Raises:
            FormatError: a rule of the tensor is broken.
            BaseRequired: its entries follow from the base's values, and there is no :attr:`base`.
            BaseMismatch: they are not those of :attr:`base`.
        """
        entry = self.manifest.tensors[name]
        try:
            indices = self.indices(entry)  # first: most of what can be wrong shows here
            base = self._base_values(entry) if entry.base_values else None
            values = self._values(entry, indices, base) if entry.values != "none" else None
            rows = self._read(entry, "rows") if entry.new_rows else None
            return SparseTensor(
                name,
                entry.shape,
                indices,
                values,
                value_kind=entry.values,
                dtype=FLOATS[entry.dtype],
                base=base,
                base_digest=entry.digests.get("base"),
                base_name=entry.base_name,
                rows=entry.rows,
                new_rows=rows,
                result_digest=entry.digests.get("result"),
            )
        except FormatError as error:
            raise error.at(file=self.path, tensor=name) from None

    def within(self, name: str, ranges: Sequence[tuple[int, int]]) -> tuple[SparseTensor, int]:
        """The entries of a sparse tensor within ranges of its flat indices, decoded with the block directory.

        Digests of the streams are checked as for :meth:`sparse`; of a tensor without a directory all entries are decoded.

        Args:
            name: of the tensor, which is not a patch.
            ranges: ``(start, stop)``, in order and apart.

        Returns:
            A tensor of these entries, whose digest of base values is known if they are all, or if their base values are in
            the file; and the number of entries that were decoded.

        Raises:
            FormatError: a rule of the tensor is broken.
        """
        entry = self.manifest.tensors[name]
        if entry.coding:
            return _within(self.sparse(name), ranges), entry.nnz
        try:
            found = self._index_ranges(entry, ranges) if ranges else []
            indices = np.concatenate([np.empty(0, np.int64), *(part.indices for part in found)])

            def of_range(role: str) -> Array:
                if not found:  # a stream that is not used is not read
                    return np.empty(0, FLOATS[self.streams[stream_name(name, role)].dtype])
                stream = self._read(entry, role)
                return np.concatenate([stream[:0], *(stream[part.first : part.last] for part in found)])

            is_all = indices.size == entry.nnz
            tensor = SparseTensor(
                name,
                entry.shape,
                indices,
                of_range("values") if entry.values != "none" else None,
                value_kind=entry.values,
                dtype=FLOATS[entry.dtype],
                base=of_range("base") if entry.base_values else None,
                base_digest=entry.digests.get("base") if is_all else None,
            )
        except FormatError as error:
            raise error.at(file=self.path, tensor=name) from None
        return tensor, sum(part.decoded for part in found)

    def dense(self, name: str) -> DenseTensor:
        """Read and check a dense tensor."""
        entry = self.manifest.whole[name]
        try:
            values = self._checked(name, entry.digests["values"])
            base = self._checked(stream_name(name, "base"), entry.digests["base"]) if entry.base_values else None
            return DenseTensor(name, values, base=base, base_digest=entry.digests.get("base"))
        except FormatError as error:
            raise error.at(file=self.path, tensor=name) from None

    def values(self, name: str) -> Array | None:
        """The values of a sparse tensor, ``[nnz]``, whether or not its entries can be told; None for a mask.

        Raises:
            FormatError: a rule of the stream is broken.
            BaseRequired: they are steps from values that only the base has, and there is no :attr:`base`.
        """
        entry = self.manifest.tensors[name]
        if entry.values == "none":
            return None
        try:
            base = self._base_values(entry) if entry.base_values else None
            indices = self.indices(entry) if entry.value_codec("values") == "steps" and base is None else _NONE
            return self._values(entry, indices, base)
        except FormatError as error:
            raise error.at(file=self.path, tensor=name) from None

    def verify(self) -> list[str]:
        """Read every tensor; raises FormatError at the first broken rule.

        Returns:
            The tensors of which only the streams were checked, because :attr:`base` is needed to tell their entries.
        """
        untold = []
        for name, entry in self.manifest.tensors.items():
            if self.base is None and self.needs_base(name):
                untold.append(name)
                for role in entry.streams():
                    self._read(entry, role)
            else:
                self.sparse(name)
        for name in self.manifest.whole:
            self.dense(name)
        return untold

    def needs_base(self, name: str) -> bool:
        """Whether the entries of a sparse tensor follow from the base's values.

        Raises:
            FormatError: its indices are in a mask file that is not there.
        """
        return self.holder(self.manifest.tensors[name])[1].needs_base

    def indices(self, entry: SparseEntry) -> Indices:
        """The decoded indices of a tensor, read-only; :class:`SparseTensor` checks their order and range."""
        file, own = self.holder(entry)
        return frozen(file.own_indices(own))

    def own_indices(self, entry: SparseEntry) -> Indices:
        """The decoded indices of a tensor that does not share another's."""
        codec = CODECS[entry.codec]
        needs_base = codec.needs_base(entry.indices)
        base = self._base_of(entry) if needs_base else None
        try:
            found = codec.decode(self.encoded(entry), entry.shape, entry.nnz, base)
        except FormatError as error:
            if error.rule != BaseMismatch.rule:
                raise
            raise BaseMismatch(
                f"{self.path}: tensor {entry.name!r}: not the adapter's base: {error.reason}"
            ) from None
        # What a base says is checked for every base, also if the file was checked before.
        if entry.is_implied and (needs_base or self._verify) and array_digest(found) != entry.digests["entries"]:
            if not needs_base:
                raise FormatError("digest-mismatch", "the entries are others than those of the digest")
            raise BaseMismatch(
                f"{self.path}: tensor {entry.name!r}: the adapter's entries do not follow from this base's values (digest differs)"
            )
        return found

    def _values(self, entry: SparseEntry, indices: Indices, base: Array | None) -> Array:
        """The values, ``[nnz]``; steps are from ``base``, or from the values of :attr:`base` at ``indices``."""
        stream, codec = self._read(entry, "values"), entry.value_codec("values")
        if codec is None:
            return stream
        if codec == "floats":
            dtype = FLOATS[entry.coding["values"].get("dtype", entry.dtype)]
            return frozen(decode_floats(stream, dtype, entry.nnz))
        if base is None:
            weight = self._base_of(entry)
            check_increasing(indices, weight.size)
            base = take(weight, indices)
            fits.check_values(f"{self.path}: tensor {entry.name!r}", entry.digests["base"], array_digest(base))
        return frozen(decode_steps(stream, base))

    def _base_values(self, entry: SparseEntry) -> Array:
        """The base's values that the file holds, ``[nnz]``."""
        if entry.value_codec("base") is None:
            return self._read(entry, "base")
        found = decode_floats(self.streams.read(stream_name(entry.name, "base")), FLOATS[entry.dtype], entry.nnz)
        if array_digest(found) != entry.digests["base"]:  # which is that of the values, not of their stream
            raise FormatError("digest-mismatch", "the base's values are damaged (their digest differs)")
        return frozen(found)

    def _base_of(self, entry: SparseEntry) -> Array:
        """The base's tensor that an item of the manifest is about, flat."""
        what = f"{self.path}: tensor {entry.name!r}"
        if self.base is None:
            raise BaseRequired(f"{what}: it can be read with its base alone: pass the base (--base)")
        if entry.base_name not in self.base:
            raise fits.missing(what, entry.base_name)
        weight = as_array(self.base[entry.base_name])
        fits.check_shape(what, entry.shape, weight.shape)
        fits.check_dtype(what, FLOATS[entry.dtype], weight.dtype, any_float=False)
        return weight.reshape(-1)

    def _index_ranges(self, entry: SparseEntry, ranges: Sequence[tuple[int, int]]) -> list[IndexRange]:
        """The entries within each of the ranges."""
        file, own = self.holder(entry)
        codec, stored = CODECS[own.codec], file.encoded(own)
        found = [codec.decode_range(stored, own.shape, own.nnz, *one) for one in ranges]
        if all(part is not None for part in found):
            return [part for part in found if part is not None]
        indices = file.own_indices(own)
        check_increasing(indices, numel(own.shape))
        parts = [cut(indices, *one) for one in ranges]
        return [replace(part, decoded=0 if number else part.decoded) for number, part in enumerate(parts)]

    def encoded(self, entry: SparseEntry) -> Encoded:
        """The encoded indices of a tensor that does not share another's."""
        streams = {role: self._read(entry, role) for role in entry.index_streams()}
        return Encoded(dict(entry.indices), streams.get("indices"), streams.get("blocks"))

    def holder(self, entry: SparseEntry) -> tuple[AdapterFile, SparseEntry]:
        """The file and the tensor that hold the indices of a tensor, which may share another's."""
        if entry.codec != "shared":
            return self, entry
        target, file = entry.indices["tensor"], entry.indices.get("file")
        if file is None:
            return self.holder(self.manifest.tensors[target])
        masks = self._mask_file(file)
        other = masks.manifest.tensors.get(target)
        if other is None:
            raise FormatError("shared-target", f"the mask file {file!r} has no tensor {target!r}")
        check_shared_target(entry, other)
        return masks.holder(other)

    def _mask_file(self, name: str) -> AdapterFile:
        if name not in self._mask_files:
            path = self._masks / name
            try:
                content = read_file(path)
            except (OSError, SourceError, ValueError) as error:  # ValueError: a NUL in the name
                raise FormatError("mask-file", f"the mask file {path} cannot be read: {error}") from None
            if hashlib.sha256(content).hexdigest() != self.manifest.raw["mask_files"][name]:
                raise FormatError(
                    "mask-file", f"the mask file {path} is not the one that the adapter needs (its digest differs)"
                )
            try:
                # What the digest covers is what is used, whatever becomes of the file.
                self._mask_files[name] = AdapterFile(path, verify=self._verify, content=content, base=self.base)
            except FormatError as error:
                of_tensor = f"tensor {error.tensor!r}: " if error.tensor else ""
                raise FormatError(error.rule, f"the mask file {path}: {of_tensor}{error.reason}") from None
        return self._mask_files[name]

    def _read(self, entry: SparseEntry, role: str) -> Array:
        return self._checked(stream_name(entry.name, role), entry.digests[role])

    def _checked(self, stream: str, expected: str) -> Array:
        array = self.streams.read(stream)
        if self._verify and array_digest(array) != expected:
            raise FormatError("digest-mismatch", f"the stream {stream!r} is damaged (its digest differs)")
        return array

    def _check_streams(self) -> None:
        number = self._fitting()
        if number is None:
            for entry in self.manifest.tensors.values():
                for role in entry.streams():
                    self._check_stream(entry, role)
        for whole in self.manifest.whole.values():
            self._check_whole(whole)
        stray = set() if number == len(self.streams) else set(self.streams) - set(self.manifest.stream_names())
        if stray:
            raise FormatError("stray-stream", "the manifest does not list it", tensor=min(stray))
        entries = self.manifest.nnz
        if entries > (most := FREE_ENTRIES + ENTRIES_PER_BYTE * self.streams.buffer_size):
            raise FormatError("limit", f"{entries} entries; a file of this size may have {most}")

    def _fitting(self) -> int | None:
        """How many of the streams are those of sparse tensors, if all these are certainly as they should be."""
        number = 0
        for kind in self.manifest.kinds or ():
            found = kind.fitting(self.streams.header.forms)
            if found is None:
                return None
            number += found
        return None if self.manifest.kinds is None else number

    def _check_stream(self, entry: SparseEntry, role: str) -> None:
        name = stream_name(entry.name, role)
        if role in (own := entry.index_streams()):
            dtype, shape = own[role]
            self._check_shape(name, {dtype}, shape, "block-directory" if role == "blocks" else "count-mismatch")
        elif role in entry.coding:
            self._check_shape(name, {"U8"}, None)
            dtype = entry.coding[role].get("dtype", entry.dtype)
            if dtype != entry.dtype and not (entry.values == "delta" and "base" in entry.digests):
                raise FormatError(
                    "stream-dtype", f"coded values of {dtype} in a tensor of {entry.dtype}", tensor=entry.name
                )
        elif role == "rows":
            self._check_shape(name, {entry.dtype}, (entry.new_rows, *entry.shape[1:]))
        elif role == "values" and entry.values == "delta":
            same = "base" not in entry.digests  # without a base, the deltas have the tensor's dtype
            self._check_shape(name, {entry.dtype} if same else set(FLOATS), (entry.nnz,))
        else:
            self._check_shape(name, {entry.dtype}, (entry.nnz,))

    def _check_shape(
        self, name: str, dtypes: set[str], shape: tuple[int, ...] | None, rule: str = "count-mismatch"
    ) -> None:
        if name not in self.streams:
            raise FormatError("missing-stream", "the manifest lists it, but the file lacks it", tensor=name)
        stream = self.streams[name]
        rank = 1 if shape is None else len(shape)
        if stream.dtype not in dtypes or len(stream.shape) != rank:
            wanted = "/".join(sorted(dtypes))
            raise FormatError(
                "stream-dtype", f"{stream.dtype}{list(stream.shape)}, expected {wanted}", tensor=name
            )
        if shape is not None and stream.shape != shape:
            raise FormatError(rule, f"shape {list(stream.shape)}, expected {list(shape)}", tensor=name)

    def _check_whole(self, entry: DenseEntry) -> None:
        self._check_shape(entry.name, {entry.dtype}, entry.shape)
        if entry.base_values:
            self._check_shape(stream_name(entry.name, "base"), {entry.dtype}, entry.shape)


def _within(tensor: SparseTensor, ranges: Sequence[tuple[int, int]]) -> SparseTensor:
    """The entries of a tensor, which is no patch, within ranges of its flat indices."""
    parts = [np.arange(*np.searchsorted(tensor.indices, one)) for one in ranges]
    at = np.concatenate([_NONE, *parts])
    if at.size == tensor.nnz:
        return tensor
    return SparseTensor(
        tensor.name, tensor.shape, tensor.indices[at], tensor.values[at] if tensor.value_kind != "none" else None,
        value_kind=tensor.value_kind, dtype=tensor.dtype, base=None if tensor.base is None else tensor.base[at],
    )  # fmt: skip
