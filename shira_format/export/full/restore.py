"""From an adapter and its base to a full checkpoint, in the base's layout, tensor by tensor."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shira_format._core.arrays import Array, as_bytes
from shira_format._core.fits import check_dense, check_values
from shira_format._core.threads import Progress, Workers
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.entries.changes import TILE
from shira_format.entries.moved import Moved, left_out, on_base
from shira_format.errors import BaseMismatch, FormatError
from shira_format.export.full.layout import Layout, Piece
from shira_format.export.full.other_files import component_prefix, copy_model_files, write_indexes
from shira_format.format import AdapterFile
from shira_format.names.filters import name_filter
from shira_format.storage.output_folder import new_file, output_folder, weights_file
from shira_format.storage.outputs import check_output_folder
from shira_format.tensors import SparseTensor, numel

_PARTS_AHEAD = 16  # parts that wait to be hashed


@dataclass
class RestoreReport:
    """What was written.

    Attributes:
        files: bytes of each weight file, by name.
        copied: names of the other files, copied from the model's folder.
        patched: number of sparse tensors applied; ``whole``: of tensors replaced or added; ``removed``: of tensors left out.
        verified: number of tensors whose whole content was compared with the digest in the adapter.
        left_out: the adapter's tensors that were not taken, by the reason.
        notices: what a user should know.
    """

    files: dict[str, int] = field(default_factory=dict)
    copied: list[str] = field(default_factory=list)
    patched: int = 0
    whole: int = 0
    removed: int = 0
    verified: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def shira_to_full(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str] | None,
    *,
    alpha: float | None = None,
    files_from: str | os.PathLike[str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    force: bool = True,
    threads: int | None = None,
    progress: Progress = lambda _: None,
    on_start: Progress = lambda _: None,
) -> RestoreReport:
    """Write the base with the adapter applied, as a folder of safetensors files sharded as the base is.

    Memory stays at the entries of one tensor. At strength 1 an exact patch restores the fine-tune bit for bit.

    Args:
        adapter: the adapter file.
        base: the checkpoint that it was made for, in any layout, and under the names of other programs too: a path or an open
            checkpoint. The result has the base's names.
        out: the folder to write; None to check everything only. A folder that holds an input is never replaced.
        alpha: strength; the adapter's own by default.
        files_from: a model's folder to copy config and tokenizer from; the base's by default.
        include: regexes; a tensor of the adapter is applied only if one of them is found in its name.
        exclude: regexes; a tensor of the adapter is left out if one of them is found in its name.
        force: replace ``out`` and all that is in it.
        threads: at most this many; all cores by default.
        progress: called with the number of bytes done since the last call.
        on_start: called once with the sum of all calls of ``progress``.

    Raises:
        ValueError: ``alpha`` is not finite.
        BaseMismatch: ``base`` is not the base of the adapter; nothing is written.
        FormatError: the adapter's file is damaged; nothing is written.
        SourceError: the base cannot be read, no tensor is left to apply, or ``out`` must not be replaced.
    """
    path = None if out is None else Path(out)
    checkpoint = open_checkpoint(base)
    source = AdapterFile(adapter)
    with ExitStack() as stack:
        moved = stack.enter_context(on_base(source, checkpoint, name_filter(include, exclude), alpha=alpha))
        layout = Layout(moved.file, checkpoint, alpha, moved.chosen)
        check_output_folder(path, [source.path, checkpoint.path, *checkpoint.files, files_from], force=force)
        on_start(layout.nbytes)
        workers = stack.enter_context(Workers(threads))
        hashing = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="shira-hash"))
        restore = _Restore(moved, checkpoint, layout, workers, hashing)
        folder = stack.enter_context(output_folder(path))
        for shard, pieces in layout.shards.items():
            restore.write(folder, shard, pieces, progress)
        if folder is not None:
            write_indexes(folder, layout.shards, checkpoint.components)
            restore.copy_others(folder, files_from)
    return restore.report


class _Restore:
    """The work of one call."""

    def __init__(
        self, moved: Moved, base: Checkpoint, layout: Layout, workers: Workers, hashing: ThreadPoolExecutor
    ) -> None:
        self._adapter, self._base, self._layout = moved.file, base, layout
        self._workers, self._hashing = workers, hashing
        self.report = RestoreReport(
            patched=len(layout.sparse), whole=len(layout.dense), removed=len(layout.removed),
            left_out=left_out(moved), notices=[*base.notices, *moved.notices],
        )  # fmt: skip

    def write(self, folder: Path | None, shard: str, pieces: list[Piece], progress: Progress) -> None:
        """Write one file, or without a folder read and check its tensors only."""

        def parts(piece: Piece) -> Iterator[Array]:
            for part in self._parts(piece):
                yield part
                progress(part.nbytes)

        if folder is None:
            for piece in pieces:
                for _ in parts(piece):
                    pass
            return
        path = new_file(folder, shard)
        prefix = component_prefix(shard, self._base.components)
        metadata = self._base.metadata(shard) if self._base.shards else {"format": "pt"}
        tensors = [(piece.name.removeprefix(prefix), piece.dtype, piece.shape) for piece in pieces]
        with weights_file(path, tensors, metadata) as put:
            for piece in pieces:
                put(piece.name.removeprefix(prefix), parts(piece))
        self.report.files[shard] = path.stat().st_size

    def _parts(self, piece: Piece) -> Iterator[Array]:
        """The tensor in flat parts; raises BaseMismatch at the end if the base is another one."""
        if piece.base_name is None:
            yield from self._dense_parts(piece)
        elif piece.sparse:
            yield from self._patched(self._adapter.sparse(piece.name))
        else:
            for _, part in self._base_parts(piece.base_name, numel(piece.shape)):
                yield part

    def _base_parts(self, name: str, size: int) -> Iterator[tuple[int, Array]]:
        """The first ``size`` elements of a base tensor in writable parts, each with its first index."""
        dtype = self._base.dtype(name)

        def read(start: int, stop: int) -> tuple[int, Array]:
            buffer = np.empty(stop - start, dtype)
            part = self._base.part(name, start, stop, buffer)
            if part.base is not buffer and part is not buffer:
                buffer[...] = part
            return start, buffer

        return self._workers.ranges(size, TILE, read)

    def _patched(self, tensor: SparseTensor) -> Iterator[Array]:
        before, after = hashlib.sha256(), hashlib.sha256()
        check = tensor.result_digest is not None and self._layout.alpha == 1
        hashing: deque[Future[None]] = deque()  # in order, on a thread of its own, while the parts are written
        size = min(numel(tensor.shape), numel(tensor.result_shape))
        done = 0
        for start, part in self._base_parts(tensor.base_name, size):
            until = int(np.searchsorted(tensor.indices, start + part.size))
            indices = tensor.indices[done:until] - start
            found = part[indices]
            before.update(as_bytes(found).data)
            part[indices] = tensor.applied(found, self._layout.alpha, done)
            done = until
            if check:
                hashing.append(self._hashing.submit(after.update, as_bytes(part).data))
                if len(hashing) > _PARTS_AHEAD:
                    hashing.popleft().result()
            yield part
        check_values(
            f"tensor {tensor.name!r}", tensor.base_digest, before.hexdigest(), f"the base {self._base.path}"
        )
        if tensor.new_rows is not None:
            if check:
                hashing.append(self._hashing.submit(after.update, as_bytes(tensor.new_rows).data))
            yield tensor.new_rows.reshape(-1)
        if check:
            for hashed in hashing:
                hashed.result()
            if after.hexdigest() != tensor.result_digest:
                raise BaseMismatch(
                    f"tensor {tensor.name!r}: the base {self._base.path} differs from the right one outside the adapter's "
                    "entries: the result is not what it should be (digest differs)"
                )
            self.report.verified += 1

    def _dense_parts(self, piece: Piece) -> Iterator[Array]:
        base, name, size = self._base, piece.name, numel(piece.shape)
        digests = self._adapter.manifest.whole[name].digests
        if "base" in digests:
            before = hashlib.sha256()
            alike = (base.shape(name), base.dtype(name)) == (piece.shape, piece.dtype)
            if alike:
                for _, part in self._base_parts(name, size):
                    before.update(as_bytes(part).data)
            digest = before.hexdigest() if alike else None
            check_dense(f"tensor {name!r}", digests["base"], digest, f"the base {base.path}")
        found = hashlib.sha256()
        for start in range(0, size, TILE):
            part = self._adapter.streams.read_part(name, start, min(start + TILE, size))
            found.update(as_bytes(part).data)
            yield part
        if found.hexdigest() != digests["values"]:
            raise FormatError(
                "digest-mismatch",
                "the stream is damaged (its digest differs)",
                file=self._adapter.path,
                tensor=name,
            )

    def copy_others(self, folder: Path, files_from: str | os.PathLike[str] | None) -> None:
        """Copy config and tokenizer, with a notice where they may not fit."""
        copied = copy_model_files(folder, self._base.folder, files_from)
        if copied is None:
            self.report.notices.append("the base has no folder with a config: only weights were written")
            return
        self.report.copied += copied
        chosen = [self._adapter.manifest.tensors[name] for name in self._layout.sparse]
        resized = [tensor for tensor in chosen if tensor.result_shape != tensor.shape]
        if resized and files_from is None:
            tensor = resized[0]
            self.report.notices.append(
                f"tensor {tensor.name!r} now has {tensor.rows} rows, the base {tensor.shape[0]}: config and tokenizer are those "
                "of the base, and may need the fine-tune's (--files-from)"
            )
