"""A merge of adapters, told before and after.

Do they disturb each other, which lemmas apply, what is lost of each, and would another method keep more?

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
    """Measure a merge; in memory is one weight of each adapter at a time, and its result.

    Args:
        job: from :func:`shira_format.merging.open_merge`.
        moments: of the layers' inputs, for interference in feature space.
        alternatives: other methods to try, with those of the chosen method's options that they have, too; by default all.
        progress: called with the name of each weight that is done.

    Returns:
        The report; if the chosen method refuses the merge, one that says so and why.

    Raises:
        SourceError: a method that is not known, a delta that is not finite, moments of none of the weights, no scipy.
        BaseRequired: target values, and nothing knows those of the base.
        FormatError, BaseMismatch: see :meth:`Merge.joined`.
    """
    others = list(METHODS) if alternatives is None else list(dict.fromkeys(alternatives))
    if unknown := [name for name in others if name not in METHODS]:
        raise SourceError(f"no method {unknown[0]!r}; known: {', '.join(METHODS)}")
    report = _new_report(job, fed=moments is not None)
    if moments is not None and job.names:
        check_moments(moments, job.names)
    _, options = job.settings.of("")
    report.trials += [Trial(name, _carried(job.settings.method, options, METHODS[name]), chosen=False) for name in others if name != job.settings.method.name]  # fmt: skip
    _leave_out_takers(job, report.trials[1:])
    numbers = list(combinations(range(len(job.inputs)), 2))
    pairs = [Pair(report.labels[i], report.labels[j]) for i, j in numbers]
    lemmas: list[list[TensorLemmas]] = [[] for _ in numbers]
    for name in job.names:
        joined = _measurable(job.aligned(name))
        kind = layer_kind(name, joined.shape)
        views = _Views(_signed(joined), moments)
        for pair, found, (i, j) in zip(pairs, lemmas, numbers, strict=True):
            if joined.parts[i].tensor.nnz or joined.parts[j].tensor.nnz:
                measures, said = views.pair(i, j)
                pair.tensors.append(TensorPair(name, joined.shape, kind, measures))
                if said is not None:
                    found.append(said)
        for trial in report.trials:
            _try(job, trial, joined, kind, report)
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
    told = job.settings.to_manifest()
    report = MergeAnalysis(
        [one.label for one in job.inputs], list(weights), [one.adapter.alpha for one in job.inputs],
        [sorted(set(column)) for column in zip(*map(job.strengths, job.names or [""]), strict=True)], told, job.max_density,
        trials=[Trial(told["method"], told["options"], chosen=True)], whole=list(job.whole), fed=fed,
    )  # fmt: skip
    for trial in report.trials:
        trial.accounts = summed([], len(job.inputs))
    if job.whole:
        report.notes.append(
            f"{len(job.whole):,} {'tensor is' if len(job.whole) == 1 else 'tensors are'} replaced as a whole (the first: {job.whole[0]}): "
            "nothing here is about them"
        )
    return report


def _carried(chosen: Method, options: Mapping[str, Any], method: Method) -> dict[str, Any]:
    """The options of ``method``: those of the chosen one that mean the same, and its own defaults."""
    known = chosen.options
    same = {
        key: options[key] for key, own in method.options.items() if key in known and own.about == known[key].about
    }
    return method.settings(same)


def _leave_out_takers(job: Merge, trials: Sequence[Trial]) -> None:
    """Methods that take entries as they are cannot do what other weights than 0 and 1 ask for."""
    weights = {weight for name in ["", *job.names] for weight in job.settings.of(name)[0]}
    for trial in trials:
        trial.accounts = summed([], len(job.inputs))
        if METHODS[trial.method].copies and not weights <= {0.0, 1.0}:
            trial.refused = "takes entries as they are, at weights of 0 and 1 alone"


def _measurable(joined: AlignedEntries) -> AlignedEntries:
    """The same with deltas that are known of every part, which methods ask for.

    Raises:
        SourceError: a delta that is not finite.
        BaseRequired: targets without the base's values.
    """
    parts = []
    for part in joined.parts:
        tensor = part.tensor
        if tensor.value_kind == "target" and tensor.base is None:
            if tensor.nnz:
                raise BaseRequired(
                    f"{part.label}: tensor {joined.name!r} holds target values without those of the base: pass the base (--base), or "
                    "convert with --self-contained"
                )
            nothing = np.empty(0, tensor.dtype)
            tensor = SparseTensor(tensor.name, tensor.shape, tensor.indices, nothing, base=nothing)
        known = replace(part, tensor=tensor)
        _ = known.delta  # refuses what is not finite, with the adapter's name
        parts.append(known)
    return replace(joined, parts=parts)


def _signed(joined: AlignedEntries) -> AlignedEntries:
    """The same with the deltas turned round of parts that are taken away, as they meet in the merge."""
    parts = [
        replace(
            part,
            tensor=SparseTensor(joined.name, joined.shape, part.tensor.indices, -part.delta, value_kind="delta"),
        )
        if part.weight < 0
        else part
        for part in joined.parts
    ]
    return replace(joined, parts=parts)


def _try(job: Merge, trial: Trial, joined: AlignedEntries, kind: str, report: MergeAnalysis) -> None:
    """One method on one weight, if it has not refused another one."""
    if trial.refused is not None:
        return
    _, options = job.settings.of(joined.name)
    method = METHODS[trial.method]
    try:
        found = outcome(joined, method, _carried(job.settings.method, options, method), job.max_density)
    except SourceError as error:
        trial.refused = str(error)
        return
    result, accounts = found.result, found.accounts
    trial.accounts = summed([trial.accounts, accounts], len(accounts))
    trial.energy += found.energy
    trial.energy_cut += found.energy_cut
    if trial.chosen:
        nnz = 0 if result is None else result.nnz
        report.after.append(TensorAfter(joined.name, joined.shape, kind, nnz, accounts))


class _Views:
    """One weight's parts as tensors, and as matrices of their deltas, made when they are asked for."""

    def __init__(self, joined: AlignedEntries, moments: Moments | None) -> None:
        self._joined, self._moments = joined, moments
        self._matrices: dict[int, Any] = {}
        self._structs: dict[int, Any] = {}
        self._rows, self._columns = matrix_shape(joined.shape)
        # A matrix takes some bytes for each row: of a weight with very many, those without entries are left out of all.
        self._used = np.unique(joined.indices // max(1, self._columns)) if self._rows > MAX_ROWS else None

    def pair(self, i: int, j: int) -> tuple[Measures, TensorLemmas | None]:
        """Two adapters, of which at least one has entries: all measures, and what the lemmas say if both have."""
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
        else:  # what chance gives depends on all rows
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
