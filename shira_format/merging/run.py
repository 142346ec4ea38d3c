"""Merging adapters tensor by tensor, sparse in and sparse out, to a file or in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core import compiled
from shira_format._core.arrays import Array
from shira_format._core.threads import Workers
from shira_format.adapter import Adapter
from shira_format.entries.aligned import AlignedEntries, Contribution
from shira_format.entries.mixing import keep_base, mix
from shira_format.errors import SourceError
from shira_format.format import AdapterWriter, Prepared
from shira_format.merging.dense import merge_dense
from shira_format.merging.density import limit_density
from shira_format.merging.inputs import NO_TENSOR, Base, Input, Source, open_base, open_inputs, read_files
from shira_format.merging.methods import METHODS
from shira_format.merging.report import MergedTensor, MergeReport
from shira_format.merging.settings import Settings
from shira_format.names.filters import name_filter
from shira_format.storage.outputs import check_not_input
from shira_format.tensors import DenseTensor, SparseTensor


@dataclass(frozen=True)
class Merge:
    """Adapters and how to merge them; each tensor is computed when it is asked for.

    Attributes:
        inputs: the adapters.
        settings: method, weights and options.
        names: the sparse tensors of the adapters, in their order.
        whole: the tensors that are replaced as a whole, likewise.
        max_density: the greatest density of a tensor of the result; None: any.
        self_contained: whether the result keeps the base's values.
        compact: whether its file takes as few bytes as possible.
    """

    inputs: Sequence[Input]
    settings: Settings
    names: Sequence[str]
    whole: Sequence[str]
    max_density: float | None
    self_contained: bool
    compact: bool = False

    @property
    def alpha(self) -> float:
        """The result's alpha: that of the one adapter with a weight, if this is 1; else 1, as the alphas are in the weights."""
        alone = self._alone
        return 1.0 if alone is None else self.inputs[alone].adapter.alpha

    @property
    def _alone(self) -> int | None:
        """The number of the only adapter with a weight, if this is 1 for all tensors."""
        weights, _ = self.settings.of("")
        active = [number for number, weight in enumerate(weights) if weight]
        return active[0] if len(active) == 1 and weights[active[0]] == 1 and not self.settings.layers else None

    def strengths(self, name: str) -> list[float]:
        """What each adapter's deltas of one tensor are multiplied by: its weight, times its alpha unless the result keeps it."""
        weights, _ = self.settings.of(name)
        if self._alone is not None:
            return weights
        return [weight * one.adapter.alpha for weight, one in zip(weights, self.inputs, strict=True)]

    def aligned(self, name: str) -> AlignedEntries:
        """The entries of all adapters on one weight.

        Raises:
            FormatError, BaseMismatch: see :meth:`Input.sparse` and :meth:`AlignedEntries.of`.
        """
        found = [one.sparse(name) if name in one.adapter else None for one in self.inputs]
        if len({tensor.value_kind for tensor in found if tensor is not None}) > 1:
            found = [
                tensor and one.delta_with_base(tensor) for tensor, one in zip(found, self.inputs, strict=True)
            ]
        known = next(tensor for tensor in found if tensor is not None)
        no_base = np.empty(0, known.dtype) if known.base_digest is not None else None
        empty = SparseTensor(
            name, known.shape, np.empty(0, np.int64), np.empty(0, known.values.dtype), value_kind=known.value_kind,
            dtype=known.dtype, base=no_base,
        )  # fmt: skip
        parts = [
            Contribution(empty if tensor is None else tensor, strength, one.label)
            for tensor, strength, one in zip(found, self.strengths(name), self.inputs, strict=True)
        ]
        return AlignedEntries.of(parts)

    def tensor(self, name: str) -> tuple[SparseTensor | None, MergedTensor]:
        """One tensor of the result (None: no entries are left), and the report on it.

        Raises:
            SourceError: the method refuses it.
            BaseRequired: the base's values are needed, and nothing knows them.
            FormatError, BaseMismatch: see :meth:`aligned`.
        """
        aligned = self.aligned(name)
        _, options = self.settings.of(name)
        factors = self.settings.method.factors(aligned, options)
        result = mix(aligned, factors, self_contained=self.self_contained or self.max_density is not None)
        energy = kept = None
        if self.max_density is not None and result is not None:
            result, energy, kept = limit_density(result, self.max_density)
            result = keep_base(result, self_contained=self.self_contained)
        entries = tuple(part.tensor.nnz for part in aligned.parts)
        report = MergedTensor(
            name, aligned.shape, 0 if result is None else result.nnz, aligned.numel, entries,
            sum(entries) - aligned.size if len(entries) == 2 else int(np.count_nonzero(aligned.counts > 1)), energy, kept,
            0 if result is None else _not_finite(result.values),
        )  # fmt: skip
        return result, report

    def dense_tensor(self, name: str) -> DenseTensor | None:
        """One dense tensor of the result; None if no adapter with a weight has it. See :func:`merge_dense`."""
        _, options = self.settings.of(name)
        strengths, method = self.strengths(name), self.settings.method
        return merge_dense(name, self.inputs, strengths, method, options, self_contained=self.self_contained)

    def adapter(self) -> Adapter:
        """The result in memory; see :func:`shira_format.merging.merge` for what is raised."""
        tensors = [tensor for name in self.names if (tensor := self.tensor(name)[0]) is not None]
        dense = [found for name in self.whole if (found := self.dense_tensor(name)) is not None]
        return Adapter(tensors, dense=dense, manifest=self.provenance())

    def _writer(self, path: Path) -> AdapterWriter:
        base = None if self.self_contained else self.inputs[0].base
        return AdapterWriter(path, self.provenance(), compact=self.compact, base=base)

    def write(
        self,
        out: str | os.PathLike[str] | None,
        *,
        threads: int | None = None,
        progress: Callable[[str], object] = lambda _: None,
    ) -> MergeReport:
        """Compute the whole result, and write it to ``out`` unless this is None; see :func:`shira_format.merging.merge`."""
        path = None if out is None else Path(out)
        if path is not None:
            check_not_input(path, read_files(self.inputs))
        report = MergeReport([one.label for one in self.inputs], self.settings.method.name)
        with ExitStack() as stack:
            workers = stack.enter_context(Workers(threads))
            writer = stack.enter_context(self._writer(path)) if path is not None else None
            for tensor, row in _computed(self, workers, writer):
                report.tensors.append(row)
                if writer is not None and tensor is not None:
                    writer.add(tensor)
                progress(row.name)
            for name in self.whole:
                whole = self.dense_tensor(name)
                if whole is not None:
                    report.whole.append(name)
                    if writer is not None:
                        writer.add_dense(whole)
                progress(name)
        if path is not None:
            report.file_bytes = path.stat().st_size
        report.notices += self._notices(report)
        return report

    def _notices(self, report: MergeReport) -> Iterator[str]:
        licences = {str(one.adapter.manifest.get("license")) for one in self.inputs}
        if len(licences) > 1:
            yield f"the adapters' licences differ ({', '.join(sorted(licences))}): the result has none"
        if not report.nnz and not report.whole:
            yield "no entries are left: the result changes no weight"
        if not_finite := sum(tensor.not_finite for tensor in report.tensors):
            first = next(tensor.name for tensor in report.tensors if tensor.not_finite)
            yield f"{not_finite:,} entries of the result are NaN or infinite, for example in tensor {first!r}"
        if len(self.inputs) > 1 and not report.shared and all(one.base is None for one in self.inputs):
            yield "the adapters share no entries, so whether they are of one base was not checked: pass --base to check it"

    def provenance(self) -> dict[str, Any]:
        """The manifest of the result: its base, the inputs, and how they were merged."""
        found: dict[str, Any] = {}
        manifests = [one.adapter.manifest for one in self.inputs]
        for key in ("base_model", "license", "components"):
            values = [manifest[key] for manifest in manifests if key in manifest]
            if key == "components":
                found |= {key: {k: v for value in values for k, v in value.items()}} if values else {}
            elif values and all(value == values[0] for value in values):
                found[key] = values[0]
            elif key == "base_model" and values:
                found[key] = {k: values[0][k] for k in values[0] if all(v.get(k) == values[0][k] for v in values)}
        weights, _ = self.settings.of("")
        found["source"] = {
            "kind": "merge",
            "files": [
                one.to_manifest() | {"weight": weight, "alpha": one.adapter.alpha}
                for one, weight in zip(self.inputs, weights, strict=True)
            ],
        } | self.settings.to_manifest()
        if self.max_density is not None:
            found["selection"] = {"rule": "top-k", "scope": "tensor", "density": self.max_density}
        if self.alpha != 1:
            found["alpha"] = self.alpha
        return found


def open_merge(
    adapters: Sequence[Source],
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    layers: Sequence[tuple[str, Mapping[str, Any]]] = (),
    base: Base = None,
    max_density: float | None = None,
    self_contained: bool | None = None,
    compact: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Merge:
    """Open adapters, and check everything that can be checked without reading tensors.

    See :func:`shira_format.merging.merge` for the arguments.

    Raises:
        SourceError: an unknown method, invalid options or weights, or no tensor is left.
        FormatError, BaseMismatch, OSError: see :func:`open_inputs`.
    """
    if method not in METHODS:
        raise SourceError(f"no method {method!r}; known: {', '.join(METHODS)}")
    if max_density is not None and not 0 < max_density <= 1:
        raise SourceError(f"max_density {max_density} is not in (0, 1]")
    weights = [1.0] * len(adapters) if weights is None else weights
    if len(weights) != len(adapters):
        raise SourceError(f"{len(weights)} weights for {len(adapters)} adapters")
    settings = Settings(METHODS[method], weights, options, layers)
    inputs = open_inputs(adapters, open_base(base))
    chosen = name_filter(include, exclude)
    names = list(dict.fromkeys(name for one in inputs for name in one.adapter if chosen(name)))
    whole = list(dict.fromkeys(name for one in inputs for name in one.adapter.dense if chosen(name)))
    if both := set(names) & set(whole):
        raise SourceError(f"tensor {min(both)!r}: one adapter changes entries of it, another one replaces it")
    if not names and not whole:
        raise SourceError(NO_TENSOR)
    if unused := settings.unused([*names, *whole]):
        raise SourceError(f"the pattern {unused[0]!r} matches no tensor's name")
    if self_contained is None:
        self_contained = all(one.self_contained for one in inputs)
    return Merge(inputs, settings, names, whole, max_density, self_contained, compact)


def _not_finite(values: Array) -> int:
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of signalling NaNs
        return values.size - int(np.count_nonzero(np.isfinite(values)))


def _computed(
    job: Merge, workers: Workers, writer: AdapterWriter | None
) -> Iterator[tuple[SparseTensor | Prepared | None, MergedTensor]]:
    """The tensors in order, computed, encoded and hashed on all threads."""

    def finished(name: str) -> tuple[SparseTensor | Prepared | None, MergedTensor]:
        tensor, report = job.tensor(name)
        return (tensor if tensor is None or writer is None else writer.prepared(tensor)), report

    def tasks() -> Iterator[tuple[int, Callable[[], tuple[SparseTensor | Prepared | None, MergedTensor]]]]:
        for name in job.names:
            yield sum(one.nnz(name) for one in job.inputs), partial(finished, name)

    compiled.load()
    yield from workers.ahead(tasks())
