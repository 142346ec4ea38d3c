"""The pipeline behind all conversions: changes of named weights go in, tensors of an adapter file and a report come out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from shira_format._core.arrays import Array, array_digest, bits_differ
from shira_format._core.dtypes import dtype_name, upcast, working_dtype
from shira_format._core.threads import Progress, Workers
from shira_format.checkpoints import Checkpoint
from shira_format.convert.effect import refuse_lost
from shira_format.convert.exact import CompareStage, DifferingEntries, Exact, read_parts, tensor_digest
from shira_format.convert.given import Given, GivenStage
from shira_format.convert.inputs import Conversion, ConversionInputs, DenseCopy, DenseSum
from shira_format.convert.report import ConversionReport, TensorReport, six_digits
from shira_format.entries.changes import Change, CheckpointChange, Entries
from shira_format.errors import SourceError
from shira_format.format import AdapterWriter, Prepared
from shira_format.selection import AMOUNTS, Engine, LocalEngine, Pending, TopK, passes, select
from shira_format.storage.outputs import check_holds_none, check_not_input
from shira_format.tensors import DenseTensor, SparseTensor

Rule = TopK | Exact | Given


def selection_rule(
    density: float | None, top_k: int | None, energy: float | None, min_change: float | None, scope: str
) -> TopK:
    """The rule that the arguments of a conversion describe.

    Raises:
        ValueError: they cannot be meant.
    """
    if density is None and top_k is None and energy is None:
        density = 0.01 if min_change is None else 1.0
    return TopK(density, top_k, scope, energy, min_change or 0.0)


def location(base: str | os.PathLike[str] | Checkpoint, dask: str | None) -> str:
    """The path of a base, by which a conversion and its parts are known.

    Raises:
        ValueError: workers of a cluster are to open it, and it is an open checkpoint.
    """
    if not isinstance(base, Checkpoint):
        return os.fspath(base)
    if dask is not None:
        raise ValueError("workers of a cluster need the base as a path, not as an open checkpoint")
    return str(base.path)


def convert(
    conversion: Conversion,
    out: str | os.PathLike[str] | None,
    *,
    rule: Rule,
    inputs: ConversionInputs | None = None,
    self_contained: bool = False,
    compact: bool = False,
    threads: int | None = None,
    resume: bool = False,
    dask: str | None = None,
    force: bool = False,
    progress: Progress = lambda _: None,
    on_start: Progress = lambda _: None,
) -> ConversionReport:
    """Run a conversion; see :func:`shira_format.convert.lora.lora_to_shira` for the arguments.

    ``inputs`` is what ``conversion.open()`` gave, if the caller has it already. ``compact``: see
    :class:`shira_format.format.AdapterWriter`; the base is then needed to read the file.
    """
    inputs = inputs or conversion.open()
    report = ConversionReport(
        notices=list(inputs.notices), structure=dict(inputs.structure), unchanged=inputs.unchanged, left_out=inputs.left_out,
        exact=isinstance(rule, Exact), fitted=isinstance(rule, Given),
    )  # fmt: skip
    path = None if out is None else Path(out)
    if path is not None:
        check_not_input(path, [inputs.base.path, *inputs.files])
    on_start(sum(change.size for change in inputs.changes) * (passes(rule) if isinstance(rule, TopK) else 1))
    with ExitStack() as stack:
        workers = stack.enter_context(Workers(threads))
        engine: Engine = LocalEngine(workers, progress)
        if dask is not None:
            from shira_format.convert.cluster import ClusterEngine

            engine = stack.enter_context(ClusterEngine(dask, conversion, inputs, progress))
        if resume and path is not None:
            from shira_format.convert.resume import ResumableEngine, partial_folder

            check_holds_none(partial_folder(path), [inputs.base.path, *inputs.files])
            engine = stack.enter_context(ResumableEngine(engine, path, conversion, rule, inputs, progress))
        # Opened last: the adapter file is in place before the parts kept for resuming are deleted.
        writer = (
            stack.enter_context(AdapterWriter(path, compact=compact, base=None if self_contained else inputs.base))
            if path is not None
            else None
        )
        with _named(inputs.source_file, inputs.files):
            _write(inputs, rule, engine, workers, report, writer, self_contained=self_contained)
            if not force:
                refuse_lost(report.effects)
        if writer is not None:
            writer.manifest |= _provenance(conversion, inputs, rule, report)
    if path is not None:
        report.file_bytes = path.stat().st_size
    return report


def _write(
    inputs: ConversionInputs,
    rule: Rule,
    engine: Engine,
    workers: Workers,
    report: ConversionReport,
    writer: AdapterWriter | None,
    *,
    self_contained: bool,
) -> None:
    copies: list[DenseCopy] = []
    for tensor, account in workers.ahead(_tasks(inputs, rule, engine, workers, writer, self_contained)):
        if isinstance(tensor, DenseCopy):
            copies.append(tensor)
            continue
        if account is None:
            report.unchanged += 1
        else:
            report.tensors.append(account)
        if writer is not None and tensor is not None:
            writer.add(tensor, None if account is None or report.exact else account.notes)
        del tensor  # not to be held while the next one is made
    for tensor in inputs.renamed:
        if writer is not None:
            writer.add(tensor)
    for made in (*copies, *inputs.dense(self_contained)):
        if isinstance(made, DenseSum):
            report.sums.append(made.effect)
        dense = made.tensor if isinstance(made, DenseSum) else made
        report.whole.append(dense.name)
        # One that only has another number of rows than the base's is told of by who read it.
        if isinstance(dense, DenseTensor) and dense.base_digest is None and dense.name not in inputs.base:
            report.notices.append(f"tensor {dense.name!r} is not in the base: stored whole, as a new tensor")
        if writer is not None:
            if isinstance(dense, DenseTensor):
                writer.add_dense(dense)
            else:
                _add_copy(dense, workers, writer, self_contained=self_contained)


# A tensor of the file and its account. Both are None for a tensor that does not change.
_Finished = tuple[Prepared | SparseTensor | DenseCopy | None, TensorReport | None]


def _tasks(
    inputs: ConversionInputs,
    rule: Rule,
    engine: Engine,
    workers: Workers,
    writer: AdapterWriter | None,
    self_contained: bool,
) -> Iterator[Pending[_Finished]]:
    """For each change what is left when it has been read: entries, tensor, encoding and digests, all in one task."""

    def finished(change: Change, result: Callable[[], Any]) -> _Finished:
        found = result()
        options = inputs.options(change)
        tensor: SparseTensor | None
        account: TensorReport | None
        if isinstance(found, Entries):
            tensor, account = sparse_target(change, found, self_contained=self_contained, **options)
        elif found.entries is None:
            assert inputs.copy is not None
            return inputs.copy(change), None
        else:
            tensor, account = _difference(change, found, self_contained=self_contained, **options)
        del found  # not to be held while its tensor is encoded
        return (writer.prepared(tensor) if writer is not None and tensor is not None else tensor), account

    results: Iterator[Pending[Any]]
    if isinstance(rule, Exact):
        results = engine.map(CompareStage(rule), cast("list[CheckpointChange]", inputs.changes))
    elif isinstance(rule, Given):
        results = engine.map(GivenStage(rule), inputs.changes)
    else:
        folder = None if writer is None else writer.path.parent
        results = select(inputs.changes, rule, engine, workers, folder=folder)
    for change in inputs.changes:
        held, result = next(results)
        task = partial(finished, change, result)
        del result  # not to be held while the next change is read
        yield held, task
        del task


def _difference(
    change: Change, found: DifferingEntries, **options: Any
) -> tuple[SparseTensor | None, TensorReport | None]:
    """All that differs, as a tensor; none, and no account, if nothing does and no digest is to be recorded."""
    assert found.entries is not None
    tensor = target_tensor(change.name, change.shape, found.entries, result_digest=found.digest, **options)
    if tensor.nnz == 0 and not tensor.is_patch:
        return (None if found.digest is None else tensor), None
    return tensor, TensorReport(change.name, change.shape, dtype_name(tensor.dtype), tensor.nnz, 0.0, 0.0, 0.0)


def _add_copy(copy: DenseCopy, workers: Workers, writer: AdapterWriter, *, self_contained: bool) -> None:
    name, tuned, tuned_name, base = copy.name, copy.tuned, copy.tuned_name, copy.base
    digest = None if base is None or self_contained else workers.submit(partial(tensor_digest, base, name))
    writer.add_parts(
        name, tuned.dtype(tuned_name), tuned.shape(tuned_name), read_parts(tuned, tuned_name),
        base=read_parts(base, name) if base is not None and self_contained else None,
        base_digest=digest,
    )  # fmt: skip


def _provenance(
    conversion: Conversion, inputs: ConversionInputs, rule: Rule, report: ConversionReport
) -> dict[str, Any]:
    """What the manifest says of how the file was made: no date and no path, so that the same input gives the same bytes."""
    if isinstance(rule, Exact):
        selection: dict[str, Any] = {"rule": "exact"}
    elif isinstance(rule, Given):
        selection = dict(rule.selection)
    else:
        selection = {"rule": "top-k" if rule.energy is None else "energy", "scope": rule.scope}
        amounts = {amount: getattr(rule, amount) for amount in AMOUNTS}
        selection |= {amount: value for amount, value in amounts.items() if value is not None}
        selection |= {"min_change": rule.min_change} if rule.min_change else {}
    selection |= {"include": list(conversion.include)} if conversion.include else {}
    selection |= {"exclude": list(conversion.exclude)} if conversion.exclude else {}
    if not report.exact:
        selection |= {
            "energy_kept": six_digits(report.energy_kept),
            "relative_error": six_digits(report.relative_error),
        }
    found: dict[str, Any] = {
        "base_model": inputs.base_model | {"files": [{"name": path.name} for path in inputs.base.files]},
        "source": inputs.source,
        "selection": selection,
    }
    if isinstance(rule, Given):
        found |= rule.provenance
    if inputs.removed:
        found["removed"] = inputs.removed
    if inputs.base.components:
        found["components"] = {component: {} for component in inputs.base.components}
    return found


@contextmanager
def _named(file: Path | None, read: Sequence[Path]) -> Iterator[None]:
    """Put the source's file before the message of an error that does not name one of the files that are read."""
    try:
        yield
    except SourceError as error:
        named = file is None or str(error).startswith(tuple(f"{one}: " for one in read))
        raise SourceError(str(error) if named else f"{file}: {error}") from None


_STEP = 1 << 18  # entries at a time


def sparse_target(
    change: Change, entries: Entries, *, self_contained: bool = False, **options: Any
) -> tuple[SparseTensor, TensorReport]:
    """The selected entries as targets; those whose target has the bits of the base are dropped.

    Args:
        change: what was selected from.
        entries: what was selected.
        self_contained: keep the base's values.
        options: further arguments of the tensor: ``base_name``, ``rows``, ``new_rows``.

    Raises:
        SourceError: a target that is not finite where the base is.
    """
    energy_stored = selected = reached = error = 0.0
    moved = np.empty(entries.size, bool)
    for start in range(0, entries.size, _STEP):
        part = entries.kept(slice(start, start + _STEP))
        base, target = _wide(part.base), _wide(part.target)
        if not np.isfinite(target).all() and (bad := np.isfinite(base) & ~np.isfinite(target)).any():
            raise SourceError(
                f"tensor {change.name!r}: base + update overflows {dtype_name(change.weight_dtype)} "
                f"at flat index {part.indices[bad][0]}"
            )
        here = bits_differ(part.base, part.target)
        moved[start : start + _STEP] = here
        with np.errstate(invalid="ignore"):  # where both are infinite, nothing is stored
            steps = target - base
            missed = steps - part.values
        selected += _energy(part.values, slice(None))
        energy_stored += _energy(part.values, here)
        reached += _energy(steps, here)
        error += _energy(missed, here)
    stored = entries if moved.all() else entries.kept(np.flatnonzero(moved))
    tensor = target_tensor(change.name, change.shape, stored, self_contained=self_contained, **options)
    # Energy and stored part come from sums in different precision; what rounds below zero is zero.
    error += max(0.0, entries.energy - energy_stored)
    report = TensorReport(
        change.name, change.shape, dtype_name(change.weight_dtype), tensor.nnz,
        max(entries.energy, energy_stored), energy_stored, error, selected, reached,
    )  # fmt: skip
    return tensor, report


def target_tensor(
    name: str, shape: tuple[int, ...], entries: Entries, *, self_contained: bool, **options: Any
) -> SparseTensor:
    """``entries`` as a tensor of the format, with the base's values or their digest."""
    return SparseTensor(
        name, shape, entries.indices, entries.target,
        base=entries.base if self_contained else None,
        base_digest=None if self_contained else array_digest(entries.base), **options,
    )  # fmt: skip


def _wide(array: Array) -> Array:
    return upcast(array, np.empty(array.shape, working_dtype(array.dtype)))


def _energy(values: Array, which: Array | slice) -> float:
    """The sum of squares of some, in float64."""
    wide = values[which].astype(np.float64)
    return float(np.dot(wide, wide))
