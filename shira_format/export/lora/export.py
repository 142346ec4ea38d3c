"""From an adapter file to a PEFT LoRA."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.dtypes import DTYPES
from shira_format._core.threads import Progress, single_threaded_blas
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.entries.base_check import check_dense
from shira_format.entries.moved import Moved, left_out, on_base
from shira_format.errors import SourceError
from shira_format.export.lora.factors import Factors, best_factors, check_amount
from shira_format.export.lora.folder import (
    FILE,
    METADATA,
    WRITER,
    Shapes,
    config,
    factors_of,
    largest_shapes,
    own_files,
)
from shira_format.export.lora.plan import EMBEDDING, LayerPlan, LoraPlan, Planner, Saved
from shira_format.export.lora.report import ZERO, LayerReport, LoraReport
from shira_format.format import AdapterFile
from shira_format.lora.peft.config import CONFIG, PREFIX
from shira_format.names.filters import name_filter
from shira_format.storage.atomic import atomic_file
from shira_format.storage.output_folder import folder_bytes, output_folder, write_json
from shira_format.storage.outputs import check_output_folder
from shira_format.storage.safetensors_file import SafetensorsWriter
from shira_format.tensors import SparseTensor, matrix_shape


def shira_to_lora(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str] | Checkpoint | None,
    out: str | os.PathLike[str] | None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    prefix: str = "",
    embedding: str = EMBEDDING,
    fan_in_fan_out: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    force: bool = False,
    progress: Progress = lambda _: None,
    on_start: Progress = lambda _: None,
) -> LoraReport:
    """Write the best low-rank approximation of an adapter as a LoRA that PEFT loads; see :mod:`shira_format.export.lora`.

    One layer is in memory at a time, and the folder appears whole or not at all. The same input gives the same bytes.

    Args:
        adapter: the adapter file.
        base: the checkpoint that the adapter was made for, a path or an open checkpoint. It is needed for targets without base
            values and for dense tensors, and shows how weights are stored. If it has other programs' names for the adapter's
            tensors, the LoRA is for its own. None if it is not available.
        out: the folder to write; None for a dry run, which computes everything and writes nothing.
        rank: the rank of every layer, or less where a layer has no more. Give either this or ``energy``.
        energy: keep this share, in (0, 1], of each layer's energy (the sum of squares) with as small a rank as possible.
        prefix: what names in the live model start with, where those of the checkpoint do not: ``"bert."``, ``"model."``.
        embedding: a regex that is found in the names of weights of embeddings.
        fan_in_fan_out: a regex that is found in the names of weights stored ``[in, out]``; None: detected from the base.
        include: regexes; a tensor, sparse or dense, is taken only if one of them is found in its name.
        exclude: regexes; a tensor is left out if one of them is found in its name.
        force: replace ``out``, if ``shira_to_lora`` wrote it and nothing else was put there.
        progress: called with 1 after each layer.
        on_start: called once with the number of layers.

    Raises:
        ValueError: not exactly one of ``rank`` and ``energy``, or one that is out of range.
        SourceError: base values are needed; a LoRA cannot hold a tensor, or its kind is not known; nothing is left to adapt;
            ``out`` exists and must not be replaced. Nothing is written.
        BaseMismatch: ``base`` is not the base of the adapter.
        FormatError: the adapter's file is damaged.
    """
    check_amount(rank, energy)
    path, target = Path(adapter), None if out is None else Path(out)
    checkpoint = None if base is None else open_checkpoint(base)
    inputs = [path, *([] if checkpoint is None else [checkpoint.path, *checkpoint.files])]
    check_output_folder(target, inputs, force=force, writer=WRITER, own_files=own_files)
    source = AdapterFile(path)
    with ExitStack() as stack:
        stack.callback(source.streams.close)
        moved = stack.enter_context(on_base(source, checkpoint, name_filter(include, exclude)))
        plan = Planner(
            path, moved.file.manifest, checkpoint, moved.chosen,
            prefix=prefix, embedding=embedding, fan_in_fan_out=fan_in_fan_out,
        ).plan()  # fmt: skip
        on_start(len(plan.layers))
        export = _Export(moved, checkpoint, plan, rank, energy, progress)
        export.report.adapter_bytes = path.stat().st_size
        # So that the bytes do not depend on the number of threads.
        stack.enter_context(single_threaded_blas())
        export.run(stack.enter_context(output_folder(target)))
    return export.report


class _Export:
    """The work of one call."""

    def __init__(
        self,
        moved: Moved,
        base: Checkpoint | None,
        plan: LoraPlan,
        rank: int | None,
        energy: float | None,
        progress: Progress,
    ) -> None:
        self._source, self._base, self._plan = moved.file, base, plan
        self._rank, self._energy, self._progress = rank, energy, progress
        self._alpha = float(self._source.manifest.raw.get("alpha", 1.0))
        self.report = LoraReport(
            left_out=left_out(moved),
            notices=[*(base.notices if base is not None else ()), *moved.notices, *plan.notices],
        )
        if self._alpha != 1:
            self.report.notices.append(f"the adapter's strength of {self._alpha:g} is part of the factors")

    def run(self, folder: Path | None) -> None:
        """Write the folder, or with None compute everything only."""
        if folder is None:
            for _ in self._arrays():
                pass
        else:
            with atomic_file(folder / FILE) as file:
                weights = SafetensorsWriter(file, self._largest(), METADATA)
                for name, array in self._arrays():
                    weights.add(name, array)
                weights.finish()
        report = self.report
        if not report.layers:
            reason = (
                "all updates are zero"
                if ZERO in report.left_out
                else "it changes no weight of two or more dimensions"
            )
            raise SourceError(f"{self._source.path}: {reason}: PEFT has no LoRA without an adapted module")
        self._add_notices()
        if folder is not None:
            base_model = self._source.manifest.raw.get("base_model") or {}
            values = config(report.layers, sorted(self._plan.saved), self._plan.modules, base_model)
            write_json(folder / CONFIG, values)
            report.folder_bytes = folder_bytes(folder)

    def _largest(self) -> Shapes:
        """What :meth:`_arrays` may give, at most."""
        most: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        for layer in self._plan.layers:
            shape = layer.entry.shape
            rank = min(*matrix_shape(shape), self._rank or 1 << 53)
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
            report.left_out.setdefault(ZERO, []).append(entry.name)
            return {}
        shape = matrix_shape(entry.shape)
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
            check_dense(whole, base)
            return name, whole.values
        tensor = self._source.sparse(saved.key)
        weight = np.array(base[saved.key])
        weight.reshape(-1)[tensor.indices] = tensor.applied(tensor.checked_base(weight), self._alpha)
        return name, weight

    def _error(self, name: str, reason: str) -> SourceError:
        return SourceError(f"{self._source.path}: tensor {name!r}: {reason}")

    def _add_notices(self) -> None:
        report = self.report
        if zero := report.left_out.get(ZERO):
            report.notices.append(f"left out, {ZERO}: {', '.join(zero)}")
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
