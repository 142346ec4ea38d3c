"""The one pipeline behind all conversions: changes of named weights go in, tensors of an adapter file come out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from shira_format._core.dtypes import dtype_name
from shira_format.convert.exact import CompareStage, Exact, parts_of, tensor_digest
from shira_format.convert.finish import rounded, sparse_target, target_tensor
from shira_format.convert.jobs import ConversionInputs, DenseCopy, Job
from shira_format.convert.report import ConversionReport, TensorReport
from shira_format.entries.changes import CheckpointChange
from shira_format.entries.selected import Entries
from shira_format.errors import SourceError
from shira_format.format import AdapterWriter, Prepared
from shira_format.selection import AMOUNTS, Engine, LocalEngine, Progress, TopK, Workers, passes, select
from shira_format.storage.paths import check_not_input
from shira_format.tensors import DenseTensor, SparseTensor

_MOST = 1 << 22  # entries that are encoded and hashed while more are looked at


def convert(
    job: Job,
    out: str | os.PathLike[str] | None,
    *,
    rule: TopK | Exact,
    self_contained: bool = False,
    threads: int | None = None,
    resume: bool = False,
    dask: str | None = None,
    progress: Progress = lambda _: None,
    opened: ConversionInputs | None = None,
) -> ConversionReport:
    """Run a conversion; see :func:`full_to_shira` and :func:`lora_to_shira` for the arguments.

    ``opened`` is what ``job.open()`` gave, if the caller has it already.
    """
    opened = opened or job.open()
    report = ConversionReport(
        notices=list(opened.notices), structure=dict(opened.structure), unchanged=opened.unchanged,
        exact=isinstance(rule, Exact),
    )  # fmt: skip
    path = None if out is None else Path(out)
    if path is not None:
        check_not_input(path, [opened.base.path, *opened.files])
    with ExitStack() as stack:
        workers = stack.enter_context(Workers(threads))
        engine: Engine = LocalEngine(workers, progress)
        if dask is not None:
            from shira_format.convert.cluster import ClusterEngine

            engine = stack.enter_context(ClusterEngine(dask, job, progress))
        if resume and path is not None:
            from shira_format.convert.resume import ResumableEngine

            engine = stack.enter_context(ResumableEngine(engine, path, job, rule, opened, progress))
        # The file is there before what was kept for resuming goes.
        writer = stack.enter_context(AdapterWriter(path)) if path is not None else None
        with _blamed_on(opened.blamed):
            _write(opened, rule, engine, workers, report, writer, self_contained)
        if writer is not None:
            writer.manifest |= _provenance(job, opened, rule, report)
    if path is not None:
        report.file_bytes = path.stat().st_size
    return report


def work_of(opened: ConversionInputs, rule: TopK | Exact) -> int:
    """How many elements ``progress`` will have been told of in the end."""
    return opened.size * (1 if isinstance(rule, Exact) else passes(rule))


# Makes a tensor of the file and its account, which is None for a tensor that does not change. Runs on any thread.
_Finish = Callable[[], "tuple[SparseTensor | None, TensorReport | None]"]

_Finished = tuple[Prepared | SparseTensor | None, TensorReport | None]


def _write(
    opened: ConversionInputs,
    rule: TopK | Exact,
    engine: Engine,
    workers: Workers,
    report: ConversionReport,
    writer: AdapterWriter | None,
    self_contained: bool,
) -> None:
    copies: list[DenseCopy] = []
    if isinstance(rule, Exact):
        finishes = _every_difference(opened, rule, engine, copies, self_contained)
    else:
        folder = writer.path.parent if writer is not None else None
        finishes = _largest_changes(opened, rule, engine, folder, self_contained)
    for tensor, account in _ahead(finishes, workers, writer):
        if account is None:
            report.unchanged += 1
        else:
            report.tensors.append(account)
        if writer is not None and tensor is not None:
            writer.add(tensor, None if account is None or report.exact else _notes(account))
        del tensor  # not to be held while the next one is made
    for tensor in opened.copies:
        if writer is not None:
            writer.add(tensor)
    for whole in (*copies, *opened.wholes(self_contained)):
        report.whole.append(whole.name)
        if isinstance(whole, DenseTensor) and whole.base_digest is None:
            report.notices.append(f"tensor {whole.name!r} is not in the base: stored whole, as a new tensor")
        if writer is not None:
            if isinstance(whole, DenseTensor):
                writer.add_dense(whole)
            else:
                _copy(whole, workers, writer, self_contained)


def _largest_changes(
    opened: ConversionInputs, rule: TopK, engine: Engine, folder: Path | None, self_contained: bool
) -> Iterator[tuple[int, _Finish]]:
    selected = select(opened.changes, rule, engine, folder=folder)
    for change in opened.changes:
        entries = next(selected)
        frame = partial(opened.frame, change)
        finish = partial(sparse_target, change, entries, self_contained=self_contained, frame=frame)
        size = entries.size
        del entries  # not to be held while the next ones are selected
        yield size, finish
        del finish


def _every_difference(
    opened: ConversionInputs, rule: Exact, engine: Engine, copies: list[DenseCopy], self_contained: bool
) -> Iterator[tuple[int, _Finish]]:
    changes = cast("Sequence[CheckpointChange]", opened.changes)
    results = engine.map(CompareStage(rule), changes)
    for change in changes:
        found = next(results)
        if found.entries is None:
            assert opened.copy is not None
            copies.append(opened.copy(change))
            continue
        size = found.entries.size
        finish = partial(_difference, opened, change, found.entries, found.digest, self_contained)
        del found  # not to be held while the next one is looked at
        yield size, finish
        del finish


def _difference(
    opened: ConversionInputs, change: CheckpointChange, entries: Entries, seen: str | None, self_contained: bool
) -> tuple[SparseTensor | None, TensorReport | None]:
    frame = opened.frame(change)
    tensor = target_tensor(
        change.name, change.shape, entries, self_contained=self_contained, result_digest=seen, **frame
    )
    if tensor.nnz == 0 and not tensor.is_patch:
        return (None if seen is None else tensor), None
    return tensor, TensorReport(change.name, change.shape, dtype_name(tensor.dtype), tensor.nnz, 0.0, 0.0, 0.0)


def _ahead(
    finishes: Iterator[tuple[int, _Finish]], workers: Workers, writer: AdapterWriter | None
) -> Iterator[_Finished]:
    """Finished tensors in order; some are encoded and hashed while the next one is looked at."""

    def finished(finish: _Finish) -> _Finished:
        tensor, account = finish()
        return (writer.prepared(tensor) if writer is not None and tensor is not None else tensor), account

    def tasks() -> Iterator[tuple[int, Callable[[], _Finished]]]:
        for size, finish in finishes:
            yield size, partial(finished, finish)
            del finish  # not to be held while the next one is made

    return workers.ahead(tasks(), _MOST)


def _copy(whole: DenseCopy, workers: Workers, writer: AdapterWriter, self_contained: bool) -> None:
    name, tuned, source, base = whole.name, whole.tuned, whole.tuned_name, whole.base
    seen = None if base is None or self_contained else workers.submit(partial(tensor_digest, base, name))
    writer.add_parts(
        name, tuned.dtype(source), tuned.shape(source), parts_of(tuned, source),
        base=parts_of(base, name) if base is not None and self_contained else None,
        base_digest=seen,
    )  # fmt: skip


def _notes(account: TensorReport) -> dict[str, float]:
    return {"energy_kept": rounded(account.energy_kept), "relative_error": rounded(account.relative_error)}


def _provenance(
    job: Job, opened: ConversionInputs, rule: TopK | Exact, report: ConversionReport
) -> dict[str, Any]:
    """What the manifest says of how the file was made; the same input gives the same text, so no date and no paths."""
    if isinstance(rule, Exact):
        selection: dict[str, Any] = {"rule": "exact"}
    else:
        selection = {"rule": "top-k" if rule.energy is None else "energy", "scope": rule.scope}
        amounts = {amount: getattr(rule, amount) for amount in AMOUNTS}
        selection |= {amount: value for amount, value in amounts.items() if value is not None}
        selection |= {"min_change": rule.min_change} if rule.min_change else {}
    selection |= {"include": list(job.include)} if job.include else {}
    selection |= {"exclude": list(job.exclude)} if job.exclude else {}
    if not report.exact:
        selection |= {"energy_kept": rounded(report.energy_kept), "relative_error": rounded(report.relative_error)}
    found: dict[str, Any] = {
        "base_model": opened.base_model | {"files": [{"name": path.name} for path in opened.base.files]},
        "source": opened.source,
        "selection": selection,
    }
    if opened.removed:
        found["removed"] = opened.removed
    if opened.base.components:
        found["components"] = {component: {} for component in opened.base.components}
    return found


@contextmanager
def _blamed_on(files: Sequence[Path]) -> Iterator[None]:
    """Put the source's file before what is wrong with one of its tensors."""
    try:
        yield
    except SourceError as error:
        raise SourceError(": ".join([*map(str, files[:1]), str(error)])) from None
