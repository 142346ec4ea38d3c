"""From an adapter and its base back to a full checkpoint, in the base's layout, tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, bits
from shira_format._core.dtypes import DTYPES, FLOATS
from shira_format._core.fits import check_dense, check_values, missing
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.entries.base_check import check_frame
from shira_format.entries.changes import TILE
from shira_format.errors import BaseMismatch, FormatError, SourceError
from shira_format.format import AdapterFile
from shira_format.format.manifest import SparseEntry
from shira_format.names.filters import name_filter
from shira_format.selection import Progress, Workers
from shira_format.storage.atomic import replaced_file, replaced_folder
from shira_format.storage.paths import located
from shira_format.storage.safetensors_file import header_of
from shira_format.tensors import SparseTensor, numel

_HASHING = 16  # parts that wait to be hashed
SHARD_BYTES = 5_000_000_000  # what transformers fills a shard with
# Files of weights, in whatever format: a copy of the base has none of the base's own.
_WEIGHTS = re.compile(
    r".*(\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|onnx_data|distcp|st)|\.index(\.\w+)?\.json)|\.metadata",
    re.IGNORECASE,
)
_MODEL_FOLDER = ("config.json", "model_index.json")
_SHARD = re.compile(r"(?P<stem>.+?)(?P<variant>\.[^./]+)?-\d{5}-of-\d{5}\.safetensors")


@dataclass
class RestoreReport:
    """What was written.

    Attributes:
        files: name of each weight file and its bytes.
        copied: names of the other files, taken over from the model's folder.
        patched: sparse tensors that were applied; ``whole``: tensors replaced or added; ``removed``: left out.
        verified: tensors whose whole content was compared with the digest that the adapter holds.
        notices: what a user should know.
    """

    files: dict[str, int] = field(default_factory=dict)
    copied: list[str] = field(default_factory=list)
    patched: int = 0
    whole: int = 0
    removed: int = 0
    verified: int = 0
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Piece:
    """One tensor of the result: of the base, patched or not, or whole from the adapter."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    origin: str | None
    sparse: bool = False

    @property
    def nbytes(self) -> int:
        return numel(self.shape) * self.dtype.itemsize


def shira_to_full(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    *,
    alpha: float | None = None,
    files_from: str | os.PathLike[str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress = lambda _: None,
) -> RestoreReport:
    """Write the base with the adapter applied, as a folder of safetensors files sharded as the base is.

    Memory stays at the entries of one tensor. At strength 1 an exact patch gives the fine-tune bit for bit.

    Args:
        adapter: the adapter file.
        base: the checkpoint that it was made for, in any layout.
        out: the folder to write, which takes the place of what is there; None to check everything only.
        alpha: strength; the adapter's own by default.
        files_from: a model's folder from which config and tokenizer are copied; by default that of the base.
        include: regexes; a tensor of the adapter is applied only if one of them is found in its name.
        exclude: regexes; a tensor of the adapter is left out if one of them is found in its name.
        threads: at most this many.
        progress: called with numbers of bytes done; all together make those of the result.

    Raises:
        BaseMismatch: the base is not the one that the adapter was made for; nothing is written.
        FormatError: the adapter's file is damaged; nothing is written.
        SourceError: the base cannot be read, or the adapter has nothing to apply.
    """
    plan = RestorePlan(
        AdapterFile(adapter, apart=True), open_checkpoint(base), alpha, name_filter(include, exclude)
    )
    return plan.write(None if out is None else Path(out), files_from, threads, progress)


class RestorePlan:
    """What the result will hold, checked as far as shapes and dtypes tell."""

    def __init__(
        self, adapter: AdapterFile, base: Checkpoint, alpha: float | None, chosen: Callable[[str], bool]
    ) -> None:
        """See :func:`shira_to_full`."""
        self._adapter, self._base = adapter, base
        manifest = adapter.manifest
        self._alpha = float(manifest.raw.get("alpha", 1.0)) if alpha is None else alpha
        if not math.isfinite(self._alpha):
            raise ValueError(f"alpha {self._alpha} is not a finite number")
        idle = self._alpha == 0  # then the result is the base as it is
        self._sparse = [name for name in manifest.tensors if chosen(name) and not idle]
        self._whole = [name for name in manifest.whole if chosen(name) and not idle]
        self._removed = {name for name in manifest.removed if chosen(name) and not idle}
        known = manifest.tensors or manifest.whole or manifest.removed  # a patch of equal checkpoints has nothing
        if known and not idle and not (self._sparse or self._whole or self._removed):
            raise SourceError(f"{adapter.path}: no tensor of it is left by the choice of names")
        self._report = RestoreReport(notices=list(base.notices))
        self._shards = self._laid_out()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(piece.nbytes for pieces in self._shards.values() for piece in pieces)

    def _laid_out(self) -> dict[str, list[_Piece]]:
        base = self._base
        derived: dict[str, list[_Piece]] = {}
        replaced = set(self._whole)
        for name in self._sparse:
            tensor = self._adapter.manifest.tensors[name]
            self._check(tensor)
            dtype = base.dtype(tensor.base_name)
            derived.setdefault(tensor.base_name, []).append(
                _Piece(name, dtype, tensor.result_shape, tensor.base_name, sparse=True)
            )
            replaced.add(name)
        for name in sorted(self._removed):
            if name not in base:
                raise BaseMismatch(f"tensor {name!r}: the adapter removes it, and the base {base.path} has none")
        layout = base.shards
        shards: dict[str, list[_Piece]] = {}
        for shard, names in (layout or {"model.safetensors": list(base)}).items():
            pieces = shards.setdefault(shard, [])
            for name in names:
                if name in self._whole:
                    pieces.append(self._whole_piece(name))
                elif name not in replaced and name not in self._removed:
                    pieces.append(_Piece(name, base.dtype(name), base.shape(name), name))
                pieces += derived.get(name, ())
        for name in self._whole:
            if name not in base:
                _home(shards, name, base.components).append(self._whole_piece(name))
        if layout is None:
            shards = _by_size(shards["model.safetensors"])
        # Larger elements first, so that each tensor is aligned: the adapter may have brought others than the base has.
        return {
            shard: sorted(pieces, key=lambda piece: -piece.dtype.itemsize)
            for shard, pieces in shards.items()
            if pieces
        }

    def _whole_piece(self, name: str) -> _Piece:
        stream = self._adapter.streams[name]
        if "base" in self._adapter.manifest.whole[name].digests and name not in self._base:
            raise missing(f"tensor {name!r}", name, f"the base {self._base.path}")
        return _Piece(name, DTYPES[stream.dtype], stream.shape, None)

    def _check(self, tensor: SparseEntry) -> None:
        base, origin, what = self._base, tensor.base_name, f"tensor {tensor.name!r}"
        if tensor.values == "none":
            raise BaseMismatch(f"{what} is a mask, without values to apply")
        # New rows are in the adapter's dtype, and so must be the base's.
        any_float = "base" not in tensor.digests and not tensor.new_rows
        check_frame(what, origin, tensor.shape, FLOATS[tensor.dtype], base, any_float=any_float)

    def write(
        self,
        out: Path | None,
        files_from: str | os.PathLike[str] | None,
        threads: int | None,
        progress: Progress,
    ) -> RestoreReport:
        """Write the folder, or with None read and check everything only."""
        if out is not None:
            self._check_output(out)
        report = self._report
        report.patched, report.whole, report.removed = len(self._sparse), len(self._whole), len(self._removed)
        with ExitStack() as stack:
            workers = stack.enter_context(Workers(threads))
            self._hashing = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="shira-hash"))
            folder = stack.enter_context(replaced_folder(out)) if out is not None else None
            for shard, pieces in self._shards.items():
                self._write_shard(folder, shard, pieces, workers, progress)
            if folder is not None:
                _write_indexes(folder, self._shards, self._base)
                self._copy_others(folder, files_from)
        return report

    def _check_output(self, out: Path) -> None:
        """The folder is replaced with all that is in it: refuse one that holds an input."""
        if out.exists() and not out.is_dir():
            raise SourceError(f"{out}: is a file, not a folder to write")
        here = out.resolve()
        for path in (self._adapter.path, self._base.path, *self._base.files):
            if isinstance(path, Path) and (here == path.resolve() or here in path.resolve().parents):
                raise SourceError(f"{out}: holds {path}, an input, and cannot be replaced")

    def _write_shard(
        self, folder: Path | None, shard: str, pieces: list[_Piece], workers: Workers, progress: Progress
    ) -> None:
        if folder is None:
            for piece in pieces:
                for part in self._parts(piece, workers):
                    progress(part.nbytes)
            return
        path = folder / shard
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = self._base.metadata(shard) if self._base.shards else {"format": "pt"}
        header = _header(pieces, _component(shard, self._base.components), metadata)
        with replaced_file(path) as file:
            file.write(header)
            for piece in pieces:
                for part in self._parts(piece, workers):
                    file.write(bits(part).data)
                    progress(part.nbytes)
        self._report.files[shard] = path.stat().st_size

    def _parts(self, piece: _Piece, workers: Workers) -> Iterator[Array]:
        """The tensor in flat parts; raises BaseMismatch in the end if the base was another one."""
        if piece.origin is None:
            yield from self._whole_parts(piece, workers)
        elif piece.sparse:
            yield from self._patched(self._adapter.sparse(piece.name), workers)
        else:
            for _, part in self._base_parts(piece.origin, numel(piece.shape), workers):
                yield part

    def _base_parts(self, name: str, size: int, workers: Workers) -> Iterator[tuple[int, Array]]:
        """Parts of a base tensor up to ``size`` elements, each writable and of its own, with their first index."""
        dtype = self._base.dtype(name)

        def read(start: int, stop: int) -> tuple[int, Array]:
            buffer = np.empty(stop - start, dtype)
            part = self._base.part(name, start, stop, buffer)
            if part.base is not buffer and part is not buffer:
                buffer[...] = part
            return start, buffer

        return workers.ranges(size, TILE, read)

    def _patched(self, tensor: SparseTensor, workers: Workers) -> Iterator[Array]:
        before, after = hashlib.sha256(), hashlib.sha256()
        check = tensor.result_digest is not None and self._alpha == 1
        hashing: deque[Future[None]] = deque()  # in order, on a thread of its own, while the parts are written
        size = min(numel(tensor.shape), numel(tensor.result_shape))
        at = 0
        for start, part in self._base_parts(tensor.base_name, size, workers):
            until = int(np.searchsorted(tensor.indices, start + part.size))
            here = tensor.indices[at:until] - start
            found = part[here]
            before.update(bits(found).data)
            part[here] = tensor.applied(found, self._alpha, at)
            at = until
            if check:
                hashing.append(self._hashing.submit(after.update, bits(part).data))
                if len(hashing) > _HASHING:
                    hashing.popleft().result()
            yield part
        check_values(
            f"tensor {tensor.name!r}", tensor.base_digest, before.hexdigest(), f"the base {self._base.path}"
        )
        if tensor.new_rows is not None:
            if check:
                hashing.append(self._hashing.submit(after.update, bits(tensor.new_rows).data))
            yield tensor.new_rows.reshape(-1)
        if check:
            for done in hashing:
                done.result()
            if after.hexdigest() != tensor.result_digest:
                raise BaseMismatch(
                    f"tensor {tensor.name!r}: the base {self._base.path} differs from the right one outside the adapter's "
                    "entries: the result is not what it should be (digest differs)"
                )
            self._report.verified += 1

    def _whole_parts(self, piece: _Piece, workers: Workers) -> Iterator[Array]:
        base, name, size = self._base, piece.name, numel(piece.shape)
        digests, found = self._adapter.manifest.whole[name].digests, hashlib.sha256()
        if "base" in digests:
            before = hashlib.sha256()
            alike = (base.shape(name), base.dtype(name)) == (piece.shape, piece.dtype)
            if alike:
                for _, part in self._base_parts(name, size, workers):
                    before.update(bits(part).data)
            digest = before.hexdigest() if alike else None
            check_dense(f"tensor {name!r}", digests["base"], digest, f"the base {base.path}")
        for start in range(0, size, TILE):
            part = self._adapter.streams.read_part(name, start, min(start + TILE, size))
            found.update(bits(part).data)
            yield part
        if found.hexdigest() != digests["values"]:
            raise FormatError(
                "digest-mismatch",
                "the stream is damaged (its digest differs)",
                file=self._adapter.path,
                tensor=name,
            )

    def _copy_others(self, folder: Path, files_from: str | os.PathLike[str] | None) -> None:
        """Config, tokenizer and the like; links are followed, weights and hidden files are not taken."""
        source = self._base.folder if files_from is None else located(files_from)
        if files_from is not None and (source is None or not source.is_dir()):
            raise SourceError(f"{files_from}: no such folder")
        if source is None or not any((source / name).is_file() for name in _MODEL_FOLDER):
            if files_from is not None:
                raise SourceError(f"{files_from}: no model's folder: it has neither {' nor '.join(_MODEL_FOLDER)}")
            self._report.notices.append("the base has no folder with a config: only weights were written")
            return
        for name, path in _others(source):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as there, target.open("wb") as here:
                shutil.copyfileobj(there, here, 1 << 20)
            self._report.copied.append(name)
        chosen = [self._adapter.manifest.tensors[name] for name in self._sparse]
        resized = [tensor for tensor in chosen if tensor.result_shape != tensor.shape]
        if resized and files_from is None:
            tensor = resized[0]
            self._report.notices.append(
                f"tensor {tensor.name!r} now has {tensor.rows} rows, the base {tensor.shape[0]}: config and tokenizer are those "
                "of the base, and may need the fine-tune's (--files-from)"
            )


def _home(shards: dict[str, list[_Piece]], name: str, components: tuple[str, ...]) -> list[_Piece]:
    """The shard that a new tensor goes to: the last one, of its component if there are components."""
    if components:
        component = name.partition("/")[0]
        own = [shard for shard in shards if shard.startswith(f"{component}/")]
        if own:
            return shards[own[-1]]
        raise BaseMismatch(f"tensor {name!r}: the base has no component {component!r}")
    return shards[list(shards)[-1]]


def _by_size(pieces: list[_Piece]) -> dict[str, list[_Piece]]:
    """Shards of at most 5 GB, or of one tensor that is larger."""
    groups: list[list[_Piece]] = [[]]
    for piece in pieces:
        if groups[-1] and sum(p.nbytes for p in groups[-1]) + piece.nbytes > SHARD_BYTES:
            groups.append([])
        groups[-1].append(piece)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _component(file: str, components: tuple[str, ...]) -> str:
    """What names in the adapter have before those in a file of the pipeline: ``"unet/"``, or nothing."""
    component = file.rpartition("/")[0]
    return f"{component}/" if component in components else ""


def _header(pieces: list[_Piece], prefix: str, metadata: dict[str, str]) -> bytes:
    return header_of(((piece.name.removeprefix(prefix), piece.dtype, piece.shape) for piece in pieces), metadata)[
        0
    ]


def _write_indexes(folder: Path, shards: dict[str, list[_Piece]], base: Checkpoint) -> None:
    """The index of each group of shards, as transformers and diffusers look for it."""
    groups: dict[str, dict[str, list[_Piece]]] = {}
    several = len(shards) > 1 and not base.components  # under names of their own, which nothing tells but an index
    for shard, pieces in shards.items():
        if match := _SHARD.fullmatch(shard):
            variant = match["variant"] or ""
            groups.setdefault(f"{match['stem']}.safetensors.index{variant}.json", {})[shard] = pieces
        elif several:
            groups.setdefault("model.safetensors.index.json", {})[shard] = pieces
    for name, group in groups.items():
        prefix = _component(name, base.components)
        weight_map = {
            piece.name.removeprefix(prefix): shard.rpartition("/")[2]
            for shard, pieces in group.items()
            for piece in pieces
        }
        total = sum(piece.nbytes for pieces in group.values() for piece in pieces)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        with replaced_file(folder / name) as file:
            file.write(text.encode() + b"\n")


def _others(folder: Path, inside: str = "") -> Iterator[tuple[str, Path]]:
    """Files of a model's folder that hold no weights, by their path in it."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        name = f"{inside}{path.name}"
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not path.is_symlink():  # which could lead back here
                yield from _others(path, f"{name}/")
        elif not _WEIGHTS.fullmatch(path.name):
            yield name, path
