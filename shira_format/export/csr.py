"""From an adapter file to a folder of CSR matrices."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shira_format._core.arrays import Array, array_digest
from shira_format._core.dtypes import dtype_name, working_dtype
from shira_format._core.threads import Progress
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.convert.csr.folder import ORIGINAL, Index, Item, file_names, provenance, read_index, write_index
from shira_format.convert.csr.matrix import check_rows, write_matrix
from shira_format.entries.base_check import base_values
from shira_format.entries.moved import Moved, left_out, on_base
from shira_format.entries.values import difference, wide
from shira_format.errors import SourceError
from shira_format.format import AdapterFile, AdapterWriter
from shira_format.format.items import SparseEntry
from shira_format.names.filters import name_filter
from shira_format.storage.output_folder import folder_bytes, output_folder
from shira_format.storage.outputs import check_output_folder
from shira_format.tensors import SparseTensor, ValueKind, matrix_shape


@dataclass(frozen=True)
class CsrTensor:
    """One matrix: the tensor's name, its file, shape, dtype and entries, and what the data are."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    nnz: int
    values: ValueKind


@dataclass
class CsrReport:
    """What was written.

    Attributes:
        tensors: the matrices.
        whole: names of whole tensors, which are in ``original.st`` only.
        left_out: the adapter's tensors that were not taken, by the reason.
        notices: what a user should know.
        folder_bytes: size of all files; None for a dry run.
    """

    tensors: list[CsrTensor] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    folder_bytes: int | None = None


def shira_to_csr(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    values: Literal["delta", "target"] = "delta",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    force: bool = False,
    progress: Progress = lambda _: None,
    on_start: Progress = lambda _: None,
) -> CsrReport:
    """Write an adapter as a folder of matrices that ``scipy.sparse.load_npz`` opens; see :mod:`shira_format.convert.csr`.

    One tensor is in memory at a time, and the folder appears whole or not at all.

    Args:
        adapter: the adapter file.
        out: the folder to write; None for a dry run, which computes everything and writes nothing.
        base: the checkpoint that the adapter was made for, a path or an open checkpoint: needed for deltas of an adapter without
            the base's values, and for targets of one that holds deltas. If it has other programs' names for the adapter's tensors,
            the matrices are of its own.
        values: what the matrices hold, ``"delta"`` or ``"target"``. Masks have ones in either case.
        include: regexes; a tensor, sparse or whole, is taken only if one of them is found in its name.
        exclude: regexes; a tensor is left out if one of them is found in its name.
        force: replace ``out``, if ``shira_to_csr`` wrote it and nothing else was put there.
        progress: called with 1 after each matrix.
        on_start: called once with the number of matrices.

    Raises:
        ValueError: ``values`` is neither of the two.
        SourceError: base values are needed; a tensor has too many rows for a CSR matrix; no tensor is chosen; ``out``
            exists and must not be replaced.
        BaseMismatch: ``base`` is not the base of the adapter.
        FormatError: the adapter's file is damaged.
    """
    if values not in ("delta", "target"):
        raise ValueError(f"values {values!r} is neither 'delta' nor 'target'")
    path, target = Path(adapter), None if out is None else Path(out)
    checkpoint = None if base is None else open_checkpoint(base)
    inputs = [path, *([] if checkpoint is None else [checkpoint.path, *checkpoint.files])]
    check_output_folder(
        target, inputs, force=force, writer="shira_to_csr", own_files=lambda f: read_index(f).files()
    )
    opened = AdapterFile(path)
    with ExitStack() as stack:
        stack.callback(opened.streams.close)
        moved = stack.enter_context(on_base(opened, checkpoint, name_filter(include, exclude)))
        return _export(moved, target, checkpoint, values, progress, on_start, filtered=bool(include or exclude))


def _export(
    moved: Moved,
    target: Path | None,
    checkpoint: Checkpoint | None,
    values: ValueKind,
    progress: Progress,
    on_start: Progress,
    *,
    filtered: bool,
) -> CsrReport:
    source, chosen, path = moved.file, moved.chosen, moved.file.path
    entries = [entry for name, entry in source.manifest.tensors.items() if chosen(name)]
    report = CsrReport(whole=[name for name in source.manifest.whole if chosen(name)], left_out=left_out(moved))
    if not (entries or report.whole or any(map(chosen, source.manifest.removed))) and filtered:
        raise SourceError(f"{path}: no tensor is left by the choice of names")
    for entry in entries:
        _check(entry, path, values, has_base=checkpoint is not None)
    if checkpoint is not None:
        report.notices += [*checkpoint.notices, *moved.notices]
    on_start(len(entries))
    with ExitStack() as stack:
        folder = stack.enter_context(output_folder(target))
        _write(source, entries, chosen, report, folder, checkpoint, values, progress)
        if folder is not None:
            report.folder_bytes = folder_bytes(folder)
    return report


def _check(entry: SparseEntry, path: Path, values: ValueKind, *, has_base: bool) -> None:
    """Check a tensor by its manifest entry, before any work."""
    try:
        check_rows(matrix_shape(entry.shape)[0], entry.nnz)
        if entry.values in (values, "none") or entry.base_values or has_base:
            return
        if values == "delta":
            raise SourceError(
                "holds target values without those of the base: pass --base for deltas, or take --values target"
            )
        raise SourceError("holds deltas: pass --base for targets, or take --values delta")
    except SourceError as error:
        raise SourceError(f"{path}: tensor {entry.name!r}: {error}") from None


def _write(
    source: AdapterFile,
    entries: list[SparseEntry],
    chosen: Callable[[str], bool],
    report: CsrReport,
    folder: Path | None,
    base: Checkpoint | None,
    values: ValueKind,
    progress: Progress,
) -> None:
    files = file_names(entry.name for entry in entries)
    items: list[Item] = []
    manifest = provenance(source.manifest.raw, chosen)
    with ExitStack() as stack:
        # A dry run reads and computes all the same, so that it fails where the run would.
        writer = stack.enter_context(AdapterWriter(folder / ORIGINAL, manifest)) if folder is not None else None
        for entry in entries:
            tensor = source.sparse(entry.name)
            item, data = _item(tensor, files[entry.name], base, values)
            items.append(item)
            report.tensors.append(
                CsrTensor(item.name, item.file, item.shape, dtype_name(item.dtype), tensor.nnz, item.values)
            )
            if folder is not None and writer is not None:
                write_matrix(folder / item.file, item.shape, tensor.indices, data)
                writer.add(tensor, entry.raw)
            progress(1)
        for name in report.whole:
            whole = source.dense(name)
            if writer is not None:
                writer.add_dense(whole, source.manifest.whole[name].raw)
    if folder is not None:
        write_index(folder, Index(items, report.whole, manifest, original=True))


def _item(tensor: SparseTensor, file: str, base: Checkpoint | None, values: ValueKind) -> tuple[Item, Array]:
    """What ``index.json`` says of a tensor, and the data of its matrix."""
    value_kind, dtype, base_digest = tensor.value_kind, tensor.dtype, tensor.base_digest
    if value_kind == "none":
        data = np.ones(tensor.nnz, working_dtype(dtype))
    elif value_kind == values:
        data = wide(tensor.values)
    else:
        start = base_values(tensor, base)
        dtype, base_digest = start.dtype, array_digest(start)
        data = difference(tensor.values, start) if values == "delta" else wide(tensor.applied(start))
        value_kind = values
    digests = {"indices": array_digest(tensor.indices), value_kind: array_digest(data)}
    if base_digest is not None:
        digests["base"] = base_digest
    more: dict[str, Any] = {"nnz": tensor.nnz}
    if tensor.base_name != tensor.name:
        more["from"] = tensor.base_name
    if tensor.rows is not None:
        more["rows"] = tensor.rows
    return Item(tensor.name, file, tensor.shape, dtype, value_kind, data.dtype, digests, more), data
