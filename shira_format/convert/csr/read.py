"""A folder of CSR matrices to an adapter."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import array_digest
from shira_format._core.dtypes import dtype_name
from shira_format._core.threads import Progress
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.checkpoints.index import some
from shira_format.convert.csr.changed import ChangedMatrix, exactly
from shira_format.convert.csr.folder import (
    INDEX,
    ORIGINAL,
    Index,
    Item,
    file_names,
    inside,
    provenance,
    read_index,
)
from shira_format.convert.csr.matrix import read_matrix
from shira_format.convert.effect import Effect, lost, refuse_lost, words
from shira_format.entries.base_check import base_values, check_dense
from shira_format.errors import FormatError, SourceError
from shira_format.format import AdapterFile, AdapterWriter
from shira_format.names.filters import NOT_CHOSEN, name_filter
from shira_format.storage.outputs import check_not_input
from shira_format.tensors import DenseTensor, SparseTensor, ValueKind

# Figures of a selection, which are valid only for its exact entries.
_ACCOUNTS = ("energy_kept", "relative_error")


@dataclass(frozen=True)
class FromCsrTensor:
    """One tensor of the adapter; ``changed``: whether its matrix differs from what ``shira_to_csr`` wrote."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nnz: int
    values: ValueKind
    changed: bool


@dataclass
class FromCsrReport:
    """What was written.

    Attributes:
        tensors: the sparse tensors.
        whole: names of the whole tensors.
        notices: what a user should know.
        file_bytes: size of the file; None for a dry run.
    """

    tensors: list[FromCsrTensor] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    file_bytes: int | None = None


def csr_to_shira(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    self_contained: bool = False,
    compact: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_unused: bool = False,
    force: bool = False,
    progress: Progress = lambda _: None,
    on_start: Progress = lambda _: None,
) -> FromCsrReport:
    """Make an adapter of a folder that ``shira_to_csr`` wrote, changed or not.

    Without changes the adapter is equal to the one that was exported. For changed matrices see
    :mod:`shira_format.convert.csr`. One tensor is in memory at a time; the file appears whole or not at all.

    Args:
        folder: the folder.
        out: the adapter file, which takes the place of what is there; None for a dry run.
        base: the checkpoint that the adapter is for: checked where it can be, and needed for entries that are new.
        self_contained: store the base's values, from ``base`` or ``original.st``. They are stored in any case where ``original.st``
            has them and they are known of all entries.
        compact: take as few bytes as possible; with ``base``, a file that does not hold the base's values is read with its base.
        include: regexes; a tensor, sparse or whole, is taken only if one of them is found in its name.
        exclude: regexes; a tensor is left out if one of them is found in its name.
        allow_unused: go on although the folder has matrices that ``index.json`` does not list.
        force: write the adapter even if the targets of changed matrices change the base by less than a thousandth of what their
            deltas ask for (in norm).
        progress: called with 1 after each matrix.
        on_start: called once with the number of matrices.

    Raises:
        SourceError: a file is missing, damaged or breaks a rule; base values are needed; a target
            overflows its dtype; no tensor is chosen.
        BaseMismatch: ``base`` is not the base of the adapter.
        FormatError: the tensors cannot make an adapter.
    """
    source = Path(folder)
    index = read_index(source)
    chosen = name_filter(include, exclude)
    items = [item for item in index.items if chosen(item.name)]
    whole = [name for name in index.whole if chosen(name)]
    if not (items or whole or any(map(chosen, index.manifest.get("removed", ())))) and (include or exclude):
        raise SourceError(f"{source}: no tensor is left by the choice of names")
    checkpoint = None if base is None else open_checkpoint(base)
    original = AdapterFile(inside(source, ORIGINAL), base=checkpoint) if index.original else None
    if out is not None:
        inputs = [source / file for file in index.files()] + (checkpoint.files if checkpoint is not None else [])
        check_not_input(Path(out), inputs)
    report = FromCsrReport(whole=whole, notices=list(checkpoint.notices if checkpoint is not None else ()))
    report.notices += _left_out(index, original, chosen)
    on_start(len(items))
    folder_reader = _Folder(source, index, chosen, original, checkpoint, self_contained)
    with ExitStack() as stack:
        if original is not None:
            stack.callback(original.streams.close)
        writer = (
            stack.enter_context(AdapterWriter(out, compact=compact, base=checkpoint)) if out is not None else None
        )
        effects = folder_reader.write(items, whole, writer, report, progress)
        report.notices += _check_all_used(source, index, original, allow=allow_unused)
        if not force:
            try:
                refuse_lost(effects)
            except SourceError as error:
                raise SourceError(f"{source}: {error}") from None
    if rounded := lost(effects):
        report.notices.append(f"rounding to the base's dtype takes away the changes of {words(rounded)} (norms)")
    if out is not None:
        report.file_bytes = Path(out).stat().st_size
    deltas = [tensor for tensor in report.tensors if tensor.changed and tensor.values == "delta"]
    if deltas:
        report.notices.append(
            f"{len(deltas)} changed tensors, {deltas[0].name!r} for example, hold deltas: "
            "the base's values at their entries are not available (--base)"
        )
    return report


def _check_all_used(folder: Path, index: Index, original: AdapterFile | None, *, allow: bool) -> list[str]:
    """A notice of matrices that ``index.json`` does not list, which are refused unless ``allow``.

    Those of the original's tensors were taken out of the list by the user.
    """
    known = index.files() | ({*file_names(original.manifest.tensors).values()} if original is not None else set())
    if not (unused := sorted(path.name for path in folder.glob("*.npz") if path.name not in known)):
        return []
    if not allow:
        raise SourceError(
            f"{folder}: matrices that {INDEX} does not list: {some(unused)}; list them, remove them, or allow unused files "
            "(--allow-unused)"
        )
    return [f"{folder.name}: not read: {some(unused)}"]


def _left_out(index: Index, original: AdapterFile | None, chosen: Callable[[str], bool]) -> list[str]:
    """Notices of tensors of the original that the adapter lacks: taken out of ``index.json``, or not chosen."""
    listed = [*(item.name for item in index.items), *index.whole]
    gone = [] if original is None else [
        name for name in (*original.manifest.tensors, *original.manifest.whole) if name not in set(listed)
    ]  # fmt: skip
    unchosen = [name for name in listed if not chosen(name)]
    reasons = ((f"in {ORIGINAL}, and not in {INDEX}", gone), (NOT_CHOSEN, unchosen))
    return [f"left out, {why}: {some(names)}" for why, names in reasons if names]


@dataclass
class _Folder:
    """The folder, and what its matrices are compared with."""

    folder: Path
    index: Index
    chosen: Callable[[str], bool]
    original: AdapterFile | None
    base: Checkpoint | None
    self_contained: bool

    def write(
        self,
        items: list[Item],
        whole: list[str],
        writer: AdapterWriter | None,
        report: FromCsrReport,
        progress: Progress,
    ) -> list[Effect]:
        effects = []
        for item in items:
            tensor, changed, effect = self._tensor(item)
            effects += [] if effect is None else [effect]
            report.tensors.append(
                FromCsrTensor(
                    item.name, tensor.shape, dtype_name(tensor.dtype), tensor.nnz, tensor.value_kind, changed
                )
            )
            if writer is not None:
                writer.add(tensor, self._notes(item.name, changed=changed))
            progress(1)
        for name in whole:
            replaced = self._whole(name)
            if writer is not None:
                assert self.original is not None
                writer.add_dense(replaced, self.original.manifest.whole[name].raw)
        if writer is not None:
            writer.manifest |= self._manifest(report)
        return effects

    def _notes(self, name: str, *, changed: bool) -> dict[str, Any]:
        entry = self.original.manifest.tensors.get(name) if self.original is not None else None
        notes = {} if entry is None else dict(entry.raw)
        return {key: value for key, value in notes.items() if not (changed and key in _ACCOUNTS)}

    def _manifest(self, report: FromCsrReport) -> dict[str, Any]:
        manifest = provenance(self.index.manifest, self.chosen)
        names = set(self.original.manifest.tensors) if self.original is not None else set()
        same = names == {tensor.name for tensor in report.tensors} and not any(t.changed for t in report.tensors)
        if not same and isinstance(manifest.get("selection"), dict):
            manifest["selection"] = {k: v for k, v in manifest["selection"].items() if k not in _ACCOUNTS}
        return manifest

    def _tensor(self, item: Item) -> tuple[SparseTensor, bool, Effect | None]:
        """The tensor by the rules of the package, whether its matrix was changed, and what deltas become if it was."""
        path = inside(self.folder, item.file)
        before = self._before(item)
        indices, data = read_matrix(path, item.shape)
        data = exactly(data, item.data_dtype)
        same_entries = array_digest(indices) == item.digests.get("indices")
        same = same_entries and array_digest(data) == item.digests.get(item.values)
        try:
            if same and before is not None and np.array_equal(indices, before.indices):
                return self._unchanged(before), False, None
            changed = ChangedMatrix(item, indices, data, same_entries, before, self.base, self.self_contained)
            tensor = changed.tensor()
            return tensor, not same, changed.effect(tensor)
        except SourceError as error:
            raise SourceError(f"{path}: tensor {item.name!r}: {error}") from None
        except FormatError as error:
            raise error.at(file=path, tensor=item.name) from None

    def _before(self, item: Item) -> SparseTensor | None:
        """The tensor in ``original.st``."""
        if self.original is None or item.name not in self.original.manifest.tensors:
            if "from" in item.more or "rows" in item.more:
                raise SourceError(
                    f"{self.folder}: tensor {item.name!r} is part of a patch, which needs {ORIGINAL}"
                )
            return None
        before = self.original.sparse(item.name)
        if before.shape != item.shape or (before.dtype != item.dtype and before.value_kind != "delta"):
            raise SourceError(f"{self.folder}: tensor {item.name!r} has another shape or dtype in {ORIGINAL}")
        return before

    def _unchanged(self, tensor: SparseTensor) -> SparseTensor:
        if tensor.value_kind == "none":
            return tensor
        if self.base is None and (tensor.base is not None or not self.self_contained):
            return tensor
        if self.base is None:
            raise SourceError("the base's values are not available: pass --base")
        start = base_values(tensor, self.base)
        if not self.self_contained:
            return tensor
        return SparseTensor(
            tensor.name, tensor.shape, tensor.indices, tensor.values, value_kind=tensor.value_kind, dtype=start.dtype, base=start,
            base_name=tensor.base_name, rows=tensor.rows, new_rows=tensor.new_rows, result_digest=tensor.result_digest,
        )  # fmt: skip

    def _whole(self, name: str) -> DenseTensor:
        if self.original is None or name not in self.original.manifest.whole:
            raise SourceError(f"{self.folder}: the whole tensor {name!r} is not in {ORIGINAL}")
        tensor = self.original.dense(name)
        if self.base is None:
            if self.self_contained and tensor.base is None and tensor.base_digest is not None:
                raise SourceError(
                    f"{self.folder}: tensor {name!r}: the base's values are not available: pass --base"
                )
            return tensor
        weight = check_dense(tensor, self.base)
        return (
            tensor if weight is None or not self.self_contained else DenseTensor(name, tensor.values, base=weight)
        )
