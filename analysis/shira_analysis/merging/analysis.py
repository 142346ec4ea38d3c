"""Analysis of a merge: how the adapters interfere, which lemmas apply, what each loses, and what other methods would keep.

>>> from shira_format.merging import open_merge
>>> report = analyse_merge(open_merge(["a.st", "b.st"], method="ties"))
>>> print(report.text())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from math import expm1, log1p
from typing import Any

import numpy as np

from shira_analysis.measures.deltas import delta_matrix, entries_matrix
from shira_analysis.measures.interference import interference
from shira_analysis.measures.layer_kinds import layer_kind
from shira_analysis.measures.orthogonality import orthogonality
from shira_analysis.measures.overlap import overlap
from shira_analysis.measures.pairs import Measures, Pair, TensorPair, check_moments
from shira_analysis.merging.accounts import Trial, outcome, summed
from shira_analysis.merging.lemmas import PairLemmas, TensorLemmas, struct_rows, tensor_lemmas
from shira_analysis.merging.report import MergeAnalysis, MergedPair, TensorAfter
from shira_format._core.arrays import distinct
from shira_format.calibration.moments import Moments
from shira_format.convert.csr.matrix import MAX_ROWS
from shira_format.entries.aligned import AlignedEntries
from shira_format.errors import BaseRequired, SourceError
from shira_format.merging import METHODS, Merge, Method
from shira_format.tensors import SparseTensor, matrix_shape

__all__ = ["MergeAnalysis", "analyse_merge"]


def analyse_merge(
    job: Merge,
    moments: Moments | None = None,
    *,
    alternatives: Sequence[str] | None = None,
    progress: Callable[[str], object] = lambda _: None,
) -> MergeAnalysis:
    """Measure a merge; only one weight of each adapter and of the result is in memory at a time.

    Args:
        job: from :func:`shira_format.merging.open_merge`.
        moments: of the layers' inputs, to measure interference on them.
        alternatives: other methods to compare, with the chosen method's options where they have the same; by default all.
        progress: called with the name of each weight after it is measured.

    Returns:
        The analysis; if the chosen method refuses the merge, with the reason.

    Raises:
        SourceError: an unknown method, a delta that is not finite, moments of none of the weights, no scipy.
        BaseRequired: target values without those of the base.
        FormatError, BaseMismatch: see :meth:`Merge.aligned`.
    """
    others = list(METHODS) if alternatives is None else list(dict.fromkeys(alternatives))
    if unknown := [name for name in others if name not in METHODS]:
        raise SourceError(f"no method {unknown[0]!r}; known: {', '.join(METHODS)}")
    report = _new_report(job, fed=moments is not None)
    if moments is not None and job.names:
        check_moments(moments, job.names)
    _, options = job.settings.of("")
    report.trials += [Trial(name, _shared_options(job.settings.method, options, METHODS[name]), chosen=False) for name in others if name != job.settings.method.name]  # fmt: skip
    _refuse_copying_methods(job, report.trials[1:])
    numbers = list(combinations(range(len(job.inputs)), 2))
    pairs = [Pair(report.labels[i], report.labels[j]) for i, j in numbers]
    lemmas: list[list[TensorLemmas]] = [[] for _ in numbers]
    for name in job.names:
        aligned = _measurable(job.aligned(name))
        kind = layer_kind(name, aligned.shape)
        views = _Views(_signed(aligned), moments)
        for pair, found, (i, j) in zip(pairs, lemmas, numbers, strict=True):
            if aligned.parts[i].tensor.nnz or aligned.parts[j].tensor.nnz:
                measures, said = views.pair(i, j)
                pair.tensors.append(TensorPair(name, aligned.shape, kind, measures))
                if said is not None:
                    found.append(said)
        for trial in report.trials:
            _try(job, trial, aligned, kind, report)
        progress(name)
    if report.chosen.refused is not None:
        report.after.clear()
    report.pairs = [
        MergedPair(number, pair, PairLemmas(tuple(found)))
        for number, pair, found in zip(numbers, pairs, lemmas, strict=True)
    ]
    return report


def _new_report(job: Merge, *, fed: bool) -> MergeAnalysis:
    weights, _ = job.settings.of("")
    settings = job.settings.to_manifest()
    report = MergeAnalysis(
        [one.label for one in job.inputs], list(weights), [one.adapter.alpha for one in job.inputs],
        [sorted(set(column)) for column in zip(*map(job.strengths, job.names or [""]), strict=True)], settings, job.max_density,
        trials=[Trial(settings["method"], settings["options"], chosen=True)], whole=list(job.whole), fed=fed,
    )  # fmt: skip
    for trial in report.trials:
        trial.accounts = summed([], len(job.inputs))
    if job.whole:
        report.notes.append(
            f"{len(job.whole):,} {'tensor is' if len(job.whole) == 1 else 'tensors are'} replaced as a whole (the first: {job.whole[0]}): "
            "they are not measured"
        )
    return report


def _shared_options(chosen: Method, options: Mapping[str, Any], method: Method) -> dict[str, Any]:
    """The options of ``method``: the chosen method's where they mean the same, else the defaults."""
    known = chosen.options
    same = {
        key: options[key] for key, own in method.options.items() if key in known and own.about == known[key].about
    }
    return method.settings(same)


def _refuse_copying_methods(job: Merge, trials: Sequence[Trial]) -> None:
    """Mark methods that copy entries as refused if a weight is neither 0 nor 1."""
    weights = {weight for name in ["", *job.names] for weight in job.settings.of(name)[0]}
    for trial in trials:
        trial.accounts = summed([], len(job.inputs))
        if METHODS[trial.method].copies and not weights <= {0.0, 1.0}:
            trial.refused = "copies entries unchanged: its weights can only be 0 and 1"


def _measurable(aligned: AlignedEntries) -> AlignedEntries:
    """``aligned`` with known deltas in every part, as the methods need.

    Raises:
        SourceError: a delta that is not finite.
        BaseRequired: targets without the base's values.
    """
    parts = []
    for part in aligned.parts:
        tensor = part.tensor
        if tensor.value_kind == "target" and tensor.base is None:
            if tensor.nnz:
                raise BaseRequired(
                    f"{part.label}: tensor {aligned.name!r} holds target values without those of the base: pass the base (--base), or "
                    "convert with --self-contained"
                )
            nothing = np.empty(0, tensor.dtype)
            tensor = SparseTensor(tensor.name, tensor.shape, tensor.indices, nothing, base=nothing)
        known = replace(part, tensor=tensor)
        _ = known.delta  # refuses what is not finite, with the adapter's name
        parts.append(known)
    return replace(aligned, parts=parts)


def _signed(aligned: AlignedEntries) -> AlignedEntries:
    """``aligned`` with the deltas of each part negated if its weight is negative."""
    parts = [
        replace(
            part,
            tensor=SparseTensor(aligned.name, aligned.shape, part.tensor.indices, -part.delta, value_kind="delta"),
        )
        if part.weight < 0
        else part
        for part in aligned.parts
    ]
    return replace(aligned, parts=parts)


def _try(job: Merge, trial: Trial, aligned: AlignedEntries, kind: str, report: MergeAnalysis) -> None:
    """Apply one method to one weight, unless it refused an earlier one."""
    if trial.refused is not None:
        return
    _, options = job.settings.of(aligned.name)
    method = METHODS[trial.method]
    try:
        found = outcome(aligned, method, _shared_options(job.settings.method, options, method), job.max_density)
    except SourceError as error:
        trial.refused = str(error)
        return
    result, accounts = found.result, found.accounts
    trial.accounts = summed([trial.accounts, accounts], len(accounts))
    trial.energy += found.energy
    trial.energy_cut += found.energy_cut
    if trial.chosen:
        nnz = 0 if result is None else result.nnz
        report.after.append(TensorAfter(aligned.name, aligned.shape, kind, nnz, accounts))


class _Views:
    """The parts of one weight as tensors and as delta matrices, which are made on demand."""

    def __init__(self, aligned: AlignedEntries, moments: Moments | None) -> None:
        self._joined, self._moments = aligned, moments
        self._matrices: dict[int, Any] = {}
        self._structs: dict[int, Any] = {}
        self._rows, self._columns = matrix_shape(aligned.shape)
        # A matrix takes memory for each row: if there are very many, rows without entries are left out.
        self._used = distinct(aligned.indices // max(1, self._columns)) if self._rows > MAX_ROWS else None

    def pair(self, i: int, j: int) -> tuple[Measures, TensorLemmas | None]:
        """All measures of two adapters, of which one has entries, and whether the lemmas apply if both have."""
        a, b = (self._joined.parts[number].tensor for number in (i, j))
        common = overlap(*(one if one.nnz else None for one in (a, b)))
        if not a.nnz or not b.nnz:
            return Measures(1, 0, common), None
        if len(a.shape) < 2:
            return Measures(1, 1, common), None
        first, second = self._matrix(i), self._matrix(j)
        try:
            product = orthogonality(first, second)
        except SourceError as error:
            raise SourceError(f"tensor {a.name!r}: {error}") from None
        fed = None
        if self._used is None:
            if self._moments is not None and a.name in self._moments:
                fed = interference(first, second, self._moments[a.name])
        else:  # the expectation by chance depends on all rows
            both = first.nnz / a.numel * (second.nnz / b.numel)
            product = replace(
                product, reached_if_uniform=-product.cells * expm1(self._rows * log1p(-min(both, 1 - 2**-53)))
            )
        said = tensor_lemmas((a, b), (first, second), (self._struct(i), self._struct(j)), (common, product))
        return Measures(1, 1, common, product, None, int(fed is not None), fed), said

    def _matrix(self, number: int) -> Any:
        if number not in self._matrices:
            part = self._joined.parts[number]
            if self._used is None:
                self._matrices[number] = delta_matrix(part.tensor)
            else:
                row, column = np.divmod(part.tensor.indices, self._columns)
                indices = np.searchsorted(self._used, row) * self._columns + column
                some = np.flatnonzero(part.delta)
                shape = (self._used.size, self._columns)
                self._matrices[number] = entries_matrix(part.tensor.name, shape, indices[some], part.delta[some])
        return self._matrices[number]

    def _struct(self, number: int) -> Any:
        if number not in self._structs:
            self._structs[number] = struct_rows(self._joined.parts[number].tensor)
        return self._structs[number]
