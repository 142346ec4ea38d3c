"""Joining adapters: tensor by tensor, sparse in and sparse out, to a file or in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shira_format._core import compiled
from shira_format._core.arrays import Array
from shira_format._core.threads import Workers
from shira_format.adapter import Adapter
from shira_format.entries.aligned import AlignedEntries, Contribution
from shira_format.entries.mixing import framed, mix
from shira_format.errors import SourceError
from shira_format.format import AdapterWriter, Prepared
from shira_format.merge.cutting import cut
from shira_format.merge.inputs import Input, Source, open_inputs
from shira_format.merge.methods import METHODS
from shira_format.merge.report import MergedTensor, MergeReport
from shira_format.merge.settings import Settings
from shira_format.merge.wholes import joined_whole
from shira_format.names.filters import name_filter
from shira_format.storage.paths import check_not_input
from shira_format.tensors import DenseTensor, SparseTensor

if TYPE_CHECKING:
    from shira_format.checkpoints import Checkpoint



@dataclass(frozen=True)
class Merge:
    """Adapters and how to join them; nothing is computed before it is asked for.

    Attributes:
        inputs: the adapters.
        settings: method, weights and options.
        names: sparse tensors of the result that may come out, in the order of the adapters.
        whole: whole tensors, likewise.
        density: share of a weight's elements that its result may have at most; None: any.
        self_contained: whether the result keeps the base's values.
    """

    inputs: Sequence[Input]
    settings: Settings
    names: Sequence[str]
    whole: Sequence[str]
    density: float | None
    self_contained: bool

    @property
    def alpha(self) -> float:
        """The result's own: if one adapter is taken alone, at the weight 1, it keeps its alpha; else alphas count in the weights."""
        alone = self._alone
        return 1.0 if alone is None else self.inputs[alone].adapter.alpha

    @property
    def _alone(self) -> int | None:
        told = self.settings.told()
        weights, _ = self.settings.of("")
        active = [number for number, weight in enumerate(weights) if weight]
        return active[0] if len(active) == 1 and weights[active[0]] == 1 and "layers" not in told else None

    def strengths(self, name: str) -> list[float]:
        """What the adapters' deltas of one tensor are multiplied by: their weights, times their own strengths unless these stay apart."""
        weights, _ = self.settings.of(name)
        if self._alone is not None:
            return weights
        return [weight * one.adapter.alpha for weight, one in zip(weights, self.inputs, strict=True)]

    def joined(self, name: str) -> AlignedEntries:
        """One weight as all adapters see it.

        Raises:
            FormatError, BaseMismatch: see :meth:`Input.sparse` and :meth:`AlignedEntries.of`.
        """
        found = [one.sparse(name) if name in one.adapter else None for one in self.inputs]
        if len({tensor.value_kind for tensor in found if tensor is not None}) > 1:
            found = [tensor and one.bound(tensor) for tensor, one in zip(found, self.inputs, strict=True)]
        known = next(tensor for tensor in found if tensor is not None)
        no_base = np.empty(0, known.dtype) if known.base_digest is not None else None
        nothing = SparseTensor(
            name, known.shape, np.empty(0, np.int64), np.empty(0, known.values.dtype), value_kind=known.value_kind,
            dtype=known.dtype, base=no_base,
        )  # fmt: skip
        parts = [
            Contribution(nothing if tensor is None else tensor, strength, one.label)
            for tensor, strength, one in zip(found, self.strengths(name), self.inputs, strict=True)
        ]
        return AlignedEntries.of(parts)

    def tensor(self, name: str) -> tuple[SparseTensor | None, MergedTensor]:
        """One weight of the result (None: nothing is left of it), and its account.

        Raises:
            SourceError: the method refuses it.
            BaseRequired: the base's values are needed, and nothing knows them.
            FormatError, BaseMismatch: see :meth:`joined`.
        """
        joined = self.joined(name)
        _, options = self.settings.of(name)
        factors = self.settings.method.factors(joined, options)
        result = mix(joined, factors, self_contained=self.self_contained or self.density is not None)
        energy = kept = None
        if self.density is not None and result is not None:
            result, energy, kept = cut(result, self.density)
            result = framed(result, self_contained=self.self_contained)
        entries = tuple(part.tensor.nnz for part in joined.parts)
        account = MergedTensor(
            name, joined.parts[0].tensor.shape, 0 if result is None else result.nnz, joined.numel, entries,
            sum(entries) - joined.size if len(entries) == 2 else int(np.count_nonzero(joined.touches > 1)), energy, kept,
            0 if result is None else _not_finite(result.values),
        )  # fmt: skip
        return result, account

    def whole_tensor(self, name: str) -> DenseTensor | None:
        """One whole tensor of the result, or None if no adapter with a weight has it; see :func:`joined_whole`."""
        _, options = self.settings.of(name)
        return joined_whole(
            name,
            self.inputs,
            self.strengths(name),
            self.settings.method,
            options,
            self_contained=self.self_contained,
        )

    def write(
        self,
        out: str | os.PathLike[str] | None,
        *,
        threads: int | None = None,
        progress: Callable[[str], object] = lambda _: None,
    ) -> MergeReport:
        """Compute all of the result, and write it to a file unless ``out`` is None; see :func:`merge`."""
        path = None if out is None else Path(out)
        if path is not None:
            check_not_input(path, self._files)
        report = MergeReport([one.label for one in self.inputs], self.settings.method.name)
        with ExitStack() as stack:
            workers = stack.enter_context(Workers(threads))
            writer = stack.enter_context(AdapterWriter(path, self.provenance())) if path is not None else None
            for tensor, account in _computed(self, workers, writer):
                report.tensors.append(account)
                if writer is not None and tensor is not None:
                    writer.add(tensor)
                progress(account.name)
            for name in self.whole:
                whole = self.whole_tensor(name)
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
            yield f"the adapters' licences differ ({', '.join(sorted(licences))}): the result names none"
        if not report.nnz and not report.whole:
            yield "nothing is left: the result changes no weight"
        if not_finite := sum(tensor.not_finite for tensor in report.tensors):
            first = next(tensor.name for tensor in report.tensors if tensor.not_finite)
            yield f"{not_finite:,} entries of the result are NaN or infinite, of the tensor {first!r} for example"
        if len(self.inputs) > 1 and not report.shared and all(one.base is None for one in self.inputs):
            yield "no entry is in two of the adapters, so that nothing tells whether they are of one base: --base checks it"

    @property
    def _files(self) -> list[Path]:
        """All that is read."""
        bases = {id(one.base): one.base for one in self.inputs if one.base is not None}
        adapters = [one.file.path for one in self.inputs if one.file is not None]
        return [*adapters, *(path for base in bases.values() for path in (base.path, *base.files))]

    def provenance(self) -> dict[str, Any]:
        """The manifest of the result: of what base it is, how it was made, and from what."""
        found: dict[str, Any] = {}
        told = [one.adapter.manifest for one in self.inputs]
        for key in ("base_model", "license", "components"):
            values = [manifest[key] for manifest in told if key in manifest]
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
                one.told() | {"weight": weight, "alpha": one.adapter.alpha}
                for one, weight in zip(self.inputs, weights, strict=True)
            ],
        } | self.settings.told()
        if self.density is not None:
            found["selection"] = {"rule": "top-k", "scope": "tensor", "density": self.density}
        if self.alpha != 1:
            found["alpha"] = self.alpha
        return found


def open_merge(
    sources: Sequence[Source],
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    layers: Sequence[tuple[str, Mapping[str, Any]]] = (),
    base: Checkpoint | None = None,
    density: float | None = None,
    self_contained: bool | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Merge:
    """Open adapters, and check all that can be checked without reading tensors; see :func:`merge`.

    Raises:
        SourceError: a method, an option or weights that cannot be, or no tensor is left.
        FormatError, BaseMismatch, OSError: see :func:`open_inputs`.
    """
    if method not in METHODS:
        raise SourceError(f"no method {method!r}; known: {', '.join(METHODS)}")
    if density is not None and not 0 < density <= 1:
        raise SourceError(f"density {density} is not in (0, 1]")
    weights = [1.0] * len(sources) if weights is None else weights
    if len(weights) != len(sources):
        raise SourceError(f"{len(weights)} weights for {len(sources)} adapters")
    settings = Settings(METHODS[method], weights, options, layers)
    inputs = open_inputs(sources, base)
    chosen = name_filter(include, exclude)
    names = list(dict.fromkeys(name for one in inputs for name in one.adapter if chosen(name)))
    whole = list(dict.fromkeys(name for one in inputs for name in one.adapter.dense if chosen(name)))
    if both := set(names) & set(whole):
        raise SourceError(f"tensor {min(both)!r}: one adapter changes entries, another one replaces it as a whole")
    if not names and not whole:
        raise SourceError("no tensor is left by the choice of names")
    if unused := settings.unused([*names, *whole]):
        raise SourceError(f"the pattern {unused[0]!r} is found in no tensor's name")
    if self_contained is None:
        self_contained = all(one.self_contained for one in inputs)
    return Merge(inputs, settings, names, whole, density, self_contained)


def merge(
    sources: Sequence[Source],
    out: str | os.PathLike[str] | None,
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    layers: Sequence[tuple[str, Mapping[str, Any]]] = (),
    base: Checkpoint | None = None,
    density: float | None = None,
    self_contained: bool | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    threads: int | None = None,
    progress: Callable[[str], object] = lambda _: None,
) -> MergeReport:
    """Join adapters of one base to one file; one weight of each is in memory at a time, and never a dense one.

    The same adapters and settings give the same bytes, on any number of threads.

    Args:
        sources: adapters, or the paths of their files.
        out: the file to write, which appears whole or not at all, and replaces one that is there; None computes the report alone.
        method: a key of :data:`shira_format.merge.METHODS`.
        weights: of each adapter, times its own alpha; 1 by default.
        options: of the method; ``density``, ``gamma`` and ``epsilon`` may be a sequence, of one for each adapter.
        layers: options (and ``"weights"``) for tensors in whose name a regex is found.
        base: the checkpoint that they were made for, checked by digests; needed for targets without their base's values.
        density: share of a weight's elements that the result may have at most, the largest changes of it.
        self_contained: keep the base's values in the result; by default, if all adapters have them.
        include: regexes; a tensor is taken only if one of them is found in its name.
        exclude: regexes; a tensor is left out if one of them is found in its name.
        threads: at most so many.
        progress: called with the name of each tensor that is done.

    Raises:
        SourceError: a method, an option or weights that cannot be; what the method refuses; ``out`` is an input.
        BaseRequired: the base's values are needed, and nothing knows them.
        BaseMismatch: adapters of different bases, or not of ``base``; masks and patches.
        FormatError: a file is no adapter, or is damaged.
        OSError: a file cannot be read or written.

    Example:
        >>> merge(["a.st", "b.st"], "ab.st", method="ties", weights=[0.7, 0.3]).nnz
        2903
    """
    job = open_merge(
        sources, method=method, weights=weights, options=options, layers=layers, base=base, density=density,
        self_contained=self_contained, include=include, exclude=exclude,
    )  # fmt: skip
    return job.write(out, threads=threads, progress=progress)


def merged(sources: Sequence[Source], **settings: Any) -> Adapter:
    """Join adapters in memory; see :func:`merge` for the arguments and what is raised."""
    job = open_merge(sources, **settings)
    tensors = [tensor for name in job.names if (tensor := job.tensor(name)[0]) is not None]
    whole = [found for name in job.whole if (found := job.whole_tensor(name)) is not None]
    return Adapter(tensors, dense=whole, manifest=job.provenance())


def _not_finite(values: Array) -> int:
    with np.errstate(invalid="ignore"):  # what ml_dtypes says of signalling NaNs
        return values.size - int(np.count_nonzero(np.isfinite(values)))


def _computed(
    job: Merge, workers: Workers, writer: AdapterWriter | None
) -> Iterator[tuple[SparseTensor | Prepared | None, MergedTensor]]:
    """Tensors in order, computed, encoded and hashed on all threads."""

    def finished(name: str) -> tuple[SparseTensor | Prepared | None, MergedTensor]:
        tensor, account = job.tensor(name)
        return (tensor if tensor is None or writer is None else writer.prepared(tensor)), account

    def tasks() -> Iterator[tuple[int, Callable[[], tuple[SparseTensor | Prepared | None, MergedTensor]]]]:
        for name in job.names:
            yield sum(one.nnz(name) for one in job.inputs), partial(finished, name)

    compiled.load()
    yield from workers.ahead(tasks())
