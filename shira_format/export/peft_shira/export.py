"""From adapter files to PEFT's SHiRA."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, Indices, bits_differ
from shira_format._core.dtypes import DTYPES, FLOATS, is_float, working_dtype
from shira_format._core.threads import Progress
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.convert.peft_shira.files import SHIRA
from shira_format.entries.base_check import base_values, check_dense
from shira_format.entries.moved import left_out, on_base
from shira_format.entries.values import difference, wide
from shira_format.errors import SourceError
from shira_format.export.peft_shira.config import own_files, peft_config
from shira_format.export.peft_shira.padding import padded
from shira_format.export.peft_shira.plan import PeftPlan, Target, make_plan
from shira_format.format import AdapterFile
from shira_format.format.items import SparseEntry
from shira_format.lora.peft.config import CONFIG, PREFIX, WEIGHTS
from shira_format.names.filters import name_filter
from shira_format.storage.output_folder import TensorLayout, folder_bytes, output_folder, weights_file, write_json
from shira_format.storage.outputs import check_output_folder
from shira_format.tensors import SparseTensor

_INDEX = np.dtype(np.int32)


@dataclass(frozen=True)
class PeftTensor:
    """One adapted layer.

    Attributes:
        name: the weight's name in the adapter.
        module: the module's name in PEFT's model.
        shape: the weight's shape.
        nnz: entries in PEFT's file, zeros included.
        zeros: entries that were added.
        inexact: targets that base + delta does not give bit for bit; None if the base's values were not at hand.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    nnz: int
    zeros: int
    inexact: int | None


@dataclass
class PeftReport:
    """What was written.

    Attributes:
        rank: PEFT's ``r``.
        tensors: the adapted layers.
        modules_to_save: modules that are saved whole.
        whole: names of the tensors of these.
        filled: those of them that come from the base.
        left_out: the adapter's tensors that were not taken, by the reason.
        notices: what a user should know.
        folder_bytes: size of all files; None for a dry run.
    """

    rank: int = 0
    tensors: list[PeftTensor] = field(default_factory=list)
    modules_to_save: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    filled: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    folder_bytes: int | None = None


def shira_to_peft(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    prefix: str = "",
    pad: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    force: bool = False,
    progress: Progress = lambda _: None,
    on_start: Progress = lambda _: None,
) -> PeftReport:
    """Write an adapter as a folder that ``PeftModel.from_pretrained`` loads; see :mod:`shira_format.export.peft_shira`.

    Values are deltas in float32, in float64 for a float64 weight, at the adapter's own strength. One tensor is in memory at a
    time, and the folder appears whole or not at all.

    Args:
        adapter: the adapter file.
        out: the folder to write; None for a dry run, which computes everything and writes nothing.
        base: the checkpoint that the adapter was made for, a path or an open checkpoint: needed for targets of an adapter without
            the base's values, and for tensors of ``modules_to_save`` that the adapter does not change. It is checked. If it has other
            programs' names for the adapter's tensors, the result is for its own.
        prefix: what the names of PEFT's model have before those of the adapter: a base of a bare model calls its weights
            ``encoder...``, where a model with a head on top says ``bert.encoder...``.
        pad: fill layers up with zeros where PEFT requires more entries.
        include: regexes; a tensor, sparse or whole, is taken only if one of them is found in its name.
        exclude: regexes; a tensor is left out if one of them is found in its name.
        force: replace ``out``, if it holds a SHiRA adapter of PEFT, and nothing else was put there.
        progress: called with 1 after each layer.
        on_start: called once with the number of layers.

    Raises:
        SourceError: PEFT cannot hold the adapter; base values are needed; ``out`` exists and must not be replaced.
        BaseMismatch: ``base`` is not the base of the adapter.
        FormatError: the adapter's file is damaged.
    """
    path, target = Path(adapter), None if out is None else Path(out)
    checkpoint = None if base is None else open_checkpoint(base)
    inputs = [path, *([] if checkpoint is None else [checkpoint.path, *checkpoint.files])]
    check_output_folder(target, inputs, force=force, writer="shira_to_peft", own_files=own_files)
    source = AdapterFile(path)
    with ExitStack() as stack:
        stack.callback(source.streams.close)
        moved = stack.enter_context(on_base(source, checkpoint, name_filter(include, exclude)))
        source = moved.file
        plan = make_plan(source, moved.chosen, checkpoint, prefix, pad=pad)
        report = PeftReport(
            plan.rank, modules_to_save=plan.saved, whole=list(plan.whole), filled=list(plan.filled),
            left_out=left_out(moved),
            notices=[*(checkpoint.notices if checkpoint is not None else ()), *moved.notices, *plan.notices],
        )  # fmt: skip
        on_start(len(plan.targets))
        export = _Export(source, plan, checkpoint)
        folder = stack.enter_context(output_folder(target))
        put: Callable[[str, list[Array]], None] = lambda _name, _parts: None  # noqa: E731
        with ExitStack() as file:
            if folder is not None:
                tensors = sorted(_layout(source, plan, checkpoint))
                put = file.enter_context(weights_file(folder / WEIGHTS[0], tensors, {"format": "pt"}))
            for layer in plan.targets:
                arrays, account = export.layer(layer)
                for key, array in arrays.items():
                    put(key, [array])
                report.tensors.append(account)
                progress(1)
            for key, array in export.saved():
                put(key, [array])
        if folder is not None:
            model = source.manifest.raw.get("base_model") or {}
            modules = [layer.module for layer in plan.targets]
            write_json(folder / CONFIG, peft_config(plan.rank, modules, plan.saved, model))
            report.folder_bytes = folder_bytes(folder)
    report.notices += _notices(report, plan, export.alpha)
    return report


def _keys(target: Target) -> tuple[str, str]:
    return f"{PREFIX}{target.module}.{SHIRA.indices}", f"{PREFIX}{target.module}.{SHIRA.values}"


def _layout(source: AdapterFile, plan: PeftPlan, base: Checkpoint | None) -> Iterator[TensorLayout]:
    """All tensors of the file."""
    for target in plan.targets:
        count = plan.entries_of(target)
        indices, values = _keys(target)
        yield indices, _INDEX, (2, count)
        yield values, _delta_dtype(target.entry), (count,)
    for key, name in plan.whole.items():
        stream = source.streams[name]
        yield PREFIX + key, DTYPES[stream.dtype], stream.shape
    for key, name in plan.filled.items():
        assert base is not None
        yield PREFIX + key, base.dtype(name), base.shape(name)


def _delta_dtype(entry: SparseEntry) -> np.dtype[Any]:
    return working_dtype(FLOATS[entry.dtype])


@dataclass(frozen=True)
class _Export:
    """The tensors of one adapter, one at a time."""

    source: AdapterFile
    plan: PeftPlan
    base: Checkpoint | None

    @property
    def alpha(self) -> float:
        """The strength of the adapter, which is worked into the deltas."""
        return float(self.source.manifest.raw.get("alpha", 1.0))

    def layer(self, target: Target) -> tuple[dict[str, Array], PeftTensor]:
        """The two tensors of a layer by their keys, and its account."""
        tensor = self.source.sparse(target.entry.name)
        steps, inexact = self._steps(tensor)
        flat, steps = padded(tensor.indices, steps, self.plan.entries_of(target))
        indices, values = _keys(target)
        zeros = flat.size - tensor.nnz
        account = PeftTensor(tensor.name, target.module, tensor.shape, flat.size, zeros, inexact)
        return {indices: _pairs(flat, tensor.shape[1]), values: steps}, account

    def _steps(self, tensor: SparseTensor) -> tuple[Array, int | None]:
        """What PEFT has to add, and how many targets that misses."""
        start = None
        if self.base is not None or tensor.base is not None:
            start = base_values(tensor, self.base)
        if tensor.value_kind == "target":
            assert start is not None
            steps = difference(tensor.values, start)
        else:
            steps = tensor.delta()
        if self.alpha != 1:
            with np.errstate(over="ignore", invalid="ignore"):
                steps = steps.dtype.type(self.alpha) * steps
        if (bad := np.flatnonzero(~np.isfinite(steps))).size:
            raise SourceError(
                f"{self.source.path}: tensor {tensor.name!r}: the change at flat index {tensor.indices[bad[0]]} is not finite, "
                "and PEFT adds"
            )
        if start is None:
            return steps, None
        with np.errstate(over="ignore", invalid="ignore"):
            found = (wide(start) + steps).astype(start.dtype)
        return steps, int(np.count_nonzero(bits_differ(found, tensor.applied(start, self.alpha))))

    def saved(self) -> Iterator[tuple[str, Array]]:
        """Keys and values of the tensors that are saved whole."""
        for key, name in self.plan.whole.items():
            whole = self.source.dense(name)
            if is_float(whole.values.dtype) and not np.isfinite(wide(whole.values)).all():
                raise SourceError(f"{self.source.path}: whole tensor {name!r} holds NaN or Inf")
            if self.base is not None:
                check_dense(whole, self.base)
            yield PREFIX + key, whole.values
        for key, name in self.plan.filled.items():
            assert self.base is not None
            yield PREFIX + key, self.base[name]


def _pairs(flat: Indices, columns: int) -> Array:
    """Rows and columns, int32 ``[2, n]``."""
    pairs = np.empty((2, flat.size), _INDEX)
    pairs[0], pairs[1] = np.divmod(flat, columns)
    return pairs


def _notices(report: PeftReport, plan: PeftPlan, alpha: float) -> Iterator[str]:
    if alpha != 1:
        yield f"the adapter's strength {alpha:g} is worked into the deltas: in PEFT it acts at scale 1"
    if zeros := sum(tensor.zeros for tensor in report.tensors):
        entries = sum(tensor.nnz for tensor in report.tensors)
        cost = sum(
            tensor.zeros * (2 * _INDEX.itemsize + _delta_dtype(target.entry).itemsize)
            for tensor, target in zip(report.tensors, plan.targets, strict=True)
        )
        yield f"--pad added {zeros} zeros to {entries - zeros} entries, {cost} bytes, for r = {report.rank}"
    if missed := sum(tensor.inexact or 0 for tensor in report.tensors):
        total = sum(tensor.nnz - tensor.zeros for tensor in report.tensors)
        yield f"PEFT's additive form cannot reproduce {missed} of {total} targets bit for bit"
    if any(_delta_dtype(target.entry) == np.float64 for target in plan.targets):
        yield "deltas of float64 weights are float64: PEFT rounds them to float32 under a model in a narrower dtype"
    if report.filled:
        yield f"{len(report.filled)} tensors of modules that PEFT saves whole come from the base, {report.filled[0]!r} for example"
