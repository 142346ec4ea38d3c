"""An adapter to a PEFT LoRA."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.dtypes import DTYPES
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.errors import BaseMismatch, SourceError
from shira_format.export.lora.factors import Factors, best_factors
from shira_format.export.lora.folder import (
    FILE,
    Shapes,
    WeightsFile,
    check_replaceable,
    config,
    factors_of,
    largest_shapes,
    size_of,
    write_config,
)
from shira_format.export.lora.plan import EMBEDDING, LayerPlan, LoraPlan, Planner, Saved
from shira_format.export.lora.report import LayerReport, LoraReport
from shira_format.export.lora.svd import scipy_linalg
from shira_format.format import AdapterFile
from shira_format.lora.peft import PREFIX
from shira_format.names.filters import name_filter
from shira_format.selection import single_threaded_blas
from shira_format.storage.atomic import replaced_file, replaced_folder
from shira_format.tensors import SparseTensor, matrix_view


def shira_to_lora(
    adapter_path: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    base: str | os.PathLike[str] | None = None,
    prefix: str = "",
    embedding: str = EMBEDDING,
    fan_in_fan_out: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    force: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> LoraReport:
    """Write the best low-rank approximation of an adapter as a LoRA that PEFT loads; see :mod:`shira_format.export.lora`.

    One layer is in memory at a time, and the folder appears whole or not at all. The same input gives the same bytes.

    Args:
        adapter_path: the adapter file.
        folder: where to; None for a dry run, which computes everything and writes nothing.
        rank: the rank of every layer, or less where a layer has no more. Either this or ``energy``.
        energy: the share, in (0, 1], of each layer's sum of squares to keep, by as small a rank as possible.
        base: the checkpoint that the adapter was made for. It is needed for targets without base values and for tensors that
            are replaced as a whole, and it tells how weights are stored.
        prefix: what names in the live model start with, where those of the checkpoint do not: ``"bert."``, ``"model."``.
        embedding: a regex that is found in the names of weights of embeddings.
        fan_in_fan_out: a regex that is found in the names of weights that are stored ``[in, out]``; None: the base tells.
        include: regexes; a tensor, sparse or whole, is taken only if one of them is found in its name.
        exclude: regexes; a tensor is left out if one of them is found in its name.
        force: replace ``folder``, if ``shira_to_lora`` wrote it and nothing else was put there.
        progress: called with 1 after each tensor.

    Raises:
        SourceError: scipy is missing; base values are needed; a LoRA cannot hold a tensor, or nothing tells what it is; nothing
            is left to adapt; ``folder`` exists and must not be replaced. Nothing is written.
        BaseMismatch: ``base`` is not the base of the adapter.
        FormatError: the adapter's file is damaged.
    """
    if (rank is None) == (energy is None):
        raise ValueError("either rank or energy")
    if rank is not None and rank < 1:
        raise ValueError(f"rank {rank} is not positive")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy {energy} is not in (0, 1]")
    scipy_linalg()
    path, target = Path(adapter_path), None if folder is None else Path(folder)
    if target is not None and os.path.lexists(target):
        if not force:
            raise SourceError(f"{target}: exists")
        check_replaceable(target)
    source = AdapterFile(path, apart=True)
    with ExitStack() as stack:
        stack.callback(source.streams.close)
        checkpoint = None if base is None else open_checkpoint(base)
        if target is not None:
            _check_inputs(target, [path, *(checkpoint.files if checkpoint is not None else ())])
        chosen = name_filter(include, exclude)
        plan = Planner(
            path, source.manifest, checkpoint, chosen, prefix=prefix, embedding=embedding, fan_in_fan_out=fan_in_fan_out
        ).plan()  # fmt: skip
        job = _Job(source, checkpoint, plan, rank, energy, progress)
        job.report.adapter_bytes = path.stat().st_size
        # So that the bytes do not depend on how many threads there are.
        stack.enter_context(single_threaded_blas())
        job.run(stack.enter_context(replaced_folder(target)) if target is not None else None)
    return job.report


def _check_inputs(folder: Path, inputs: Sequence[Any]) -> None:
    """A folder that holds an input is not replaced."""
    here = folder.resolve()
    for path in inputs:
        if isinstance(path, Path) and here in path.resolve().parents:
            raise SourceError(f"{folder}: holds {path}, an input, and so is not replaced")


class _Job:
    def __init__(
        self,
        source: AdapterFile,
        base: Checkpoint | None,
        plan: LoraPlan,
        rank: int | None,
        energy: float | None,
        progress: Callable[[int], object],
    ) -> None:
        self._source, self._base, self._plan = source, base, plan
        self._rank, self._energy, self._progress = rank, energy, progress
        self._alpha = float(source.manifest.raw.get("alpha", 1.0))
        self.report = LoraReport(notices=[*(base.notices if base is not None else ()), *plan.notices])
        if self._alpha != 1:
            self.report.notices.append(f"the adapter's strength of {self._alpha:g} is part of the factors")

    def run(self, folder: Path | None) -> None:
        """Write the folder, or with None compute everything only."""
        if folder is None:
            for _ in self._arrays():
                pass
        else:
            with replaced_file(folder / FILE) as file:
                weights = WeightsFile(file, self._largest())
                for name, array in self._arrays():
                    weights.add(name, array)
                weights.finish()
        report = self.report
        if not report.layers:
            reason = (
                "all updates are zero" if report.left_out else "it changes no weight of two or more dimensions"
            )
            raise SourceError(f"{self._source.path}: {reason}: PEFT has no LoRA without an adapted module")
        self._tell()
        if folder is not None:
            base_model = self._source.manifest.raw.get("base_model") or {}
            write_config(folder, config(report.layers, sorted(self._plan.saved), self._plan.modules, base_model))
            report.folder_bytes = size_of(folder)

    def _largest(self) -> Shapes:
        """What :meth:`_arrays` may give, at most."""
        most: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        for layer in self._plan.layers:
            shape = layer.entry.shape
            rank = min(*matrix_view(shape), self._rank or 1 << 53)
            most |= largest_shapes(layer.module, layer.kind, shape, max(1, rank))
        for saved in self._saved():
            most[PREFIX + saved.name] = self._type(saved)
        return most

    def _arrays(self) -> Iterator[tuple[str, Array]]:
        """All tensors of the file, larger elements first, so that each is aligned."""
        saved = sorted(self._saved(), key=lambda saved: -self._type(saved)[0].itemsize)
        large = [tensor for tensor in saved if self._type(tensor)[0].itemsize >= 4]
        yield from map(self._replacement, large)
        for layer in self._plan.layers:
            yield from self._factors(layer).items()
            self._progress(1)
        yield from map(self._replacement, saved[len(large) :])

    def _saved(self) -> list[Saved]:
        return [tensor for module in sorted(self._plan.saved) for tensor in self._plan.saved[module]]

    def _type(self, saved: Saved) -> tuple[np.dtype[Any], tuple[int, ...]]:
        if saved.origin == "whole":
            stream = self._source.streams[saved.key]
            return DTYPES[stream.dtype], stream.shape
        assert self._base is not None
        return self._base.dtype(saved.key), self._base.shape(saved.key)

    def _factors(self, layer: LayerPlan) -> dict[str, Array]:
        """The tensors of one layer; none if its update is zero."""
        entry, report = layer.entry, self.report
        tensor = self._source.sparse(entry.name)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is named here
            values = self._delta(tensor).astype(np.float64) * self._alpha
        if not np.isfinite(values).all():
            at = tensor.indices[np.flatnonzero(~np.isfinite(values))[0]]
            raise self._error(entry.name, f"its update is not finite at flat index {at}")
        if not values.any():
            report.left_out.append(entry.name)
            return {}
        shape = matrix_view(entry.shape)
        try:
            found = best_factors(shape, tensor.indices, values, rank=self._rank, energy=self._energy)
        except SourceError as error:
            raise self._error(entry.name, str(error)) from None
        report.layers.append(_account(layer, tensor, found))
        return factors_of(layer.module, layer.kind, entry.shape, found.up, found.down)

    def _delta(self, tensor: SparseTensor) -> Array:
        if self._base is None:
            return tensor.delta()
        weight = self._base[tensor.base_name]
        if tensor.value_kind == "delta":
            tensor.checked_base(weight)
        return tensor.delta(weight)

    def _replacement(self, saved: Saved) -> tuple[str, Array]:
        name, base = PREFIX + saved.name, self._base
        self.report.saved.append(saved.key)
        assert base is not None
        if saved.origin == "base":
            return name, base[saved.key]
        if saved.origin == "whole":
            whole = self._source.dense(saved.key)
            if whole.base_digest is not None:
                if saved.key not in base:
                    raise BaseMismatch(f"tensor {saved.key!r}: the base {base.path} has no such tensor")
                whole.check_base(base[saved.key])
            return name, whole.values
        tensor = self._source.sparse(saved.key)
        weight = np.array(base[saved.key])
        weight.reshape(-1)[tensor.indices] = tensor.applied(tensor.checked_base(weight), self._alpha)
        return name, weight

    def _error(self, name: str, reason: str) -> SourceError:
        return SourceError(f"{self._source.path}: tensor {name!r}: {reason}")

    def _tell(self) -> None:
        report = self.report
        if report.left_out:
            report.notices.append(f"left out, since their updates are zero: {', '.join(report.left_out)}")
        if self._rank is not None and (low := [layer for layer in report.layers if layer.rank < self._rank]):
            report.notices.append(
                f"{len(low)} of {len(report.layers)} updates have a lower rank than {self._rank} and are held exactly, "
                f"for example {low[0].name!r} of rank {low[0].rank}"
            )


def _account(layer: LayerPlan, tensor: SparseTensor, found: Factors) -> LayerReport:
    return LayerReport(
        layer.entry.name, layer.module, layer.kind, tensor.shape, tensor.nnz, found.rank, found.full_rank, found.norm,
        found.error, found.spectral_error, found.bound, found.spectral_bound, found.energy_kept, found.method,
    )  # fmt: skip
