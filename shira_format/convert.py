"""From a source to an adapter file: tensor by tensor, through selection and rounding, with an account of what is kept.

The pipeline is the same for every source: updates of named weights go in, sparse targets in the base's dtype come out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shira_format.arrays import Array, digest, file_digest
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.container import AdapterWriter
from shira_format.dtypes import dtype_name, is_float, working_dtype
from shira_format.errors import SourceError
from shira_format.filters import name_filter
from shira_format.lora import Lora, open_lora
from shira_format.selection import Progress, Selected, TopK, select
from shira_format.tensors import SparseTensor, WholeTensor, density, numel
from shira_format.update import Update

LITTLE = 0.5  # below this share of the update's energy, much of what the source does is lost


@dataclass(frozen=True)
class TensorReport:
    """What became of one weight; energies are sums of squares of the update."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nnz: int
    energy: float
    energy_stored: float
    error: float

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return numel(self.shape)

    @property
    def density(self) -> float:
        """``nnz / numel``; 0 for a weight without elements."""
        return density(self.nnz, self.numel)

    @property
    def energy_kept(self) -> float:
        """Share of the update's energy at the stored entries, in [0, 1]; 1 for an update of zeros."""
        return self.energy_stored / self.energy if self.energy else 1.0

    @property
    def relative_error(self) -> float:
        """``||update - stored|| / ||update||`` in the Frobenius norm, rounding to the base's dtype included.

        What is left out is a difference of sums in float32: below about 1e-4 the figure is an upper bound.
        """
        return math.sqrt(self.error / self.energy) if self.energy else 0.0


@dataclass
class ConversionReport:
    """What a conversion kept, per tensor and in all, and what its user should know."""

    tensors: list[TensorReport] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    file_bytes: int | None = None

    def _total(self) -> TensorReport:
        return TensorReport(
            "", (self.numel,), "", self.nnz,
            *(sum(getattr(t, key) for t in self.tensors) for key in ("energy", "energy_stored", "error")),
        )  # fmt: skip

    @property
    def nnz(self) -> int:
        """Entries of all tensors."""
        return sum(tensor.nnz for tensor in self.tensors)

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def density(self) -> float:
        """Entries of all tensors over their elements."""
        return self._total().density

    @property
    def energy_kept(self) -> float:
        """Share of the energy of all updates together."""
        return self._total().energy_kept

    @property
    def relative_error(self) -> float:
        """Relative error of all updates together."""
        return self._total().relative_error

    def warnings(self) -> list[str]:
        """What is lost, in plain words; empty if little is."""
        found = []
        if self.energy_kept < LITTLE:
            found.append(
                f"only {self.energy_kept:.1%} of the update's energy is kept (relative error {self.relative_error:.2f}): "
                "the adapter will do much less than its source. A higher density keeps more; so does training a "
                "sparse adapter, instead of cutting a dense one down."
            )
        if unchanged := [t.name for t in self.tensors if t.nnz == 0]:
            found.append(
                f"{len(unchanged)} of {len(self.tensors)} tensors keep no entry at all, for example {unchanged[0]!r}: "
                "their updates are zero, or smaller than the base's dtype can show"
            )
        return found


def lora_to_shira(
    lora: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    *,
    rule: TopK | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    self_contained: bool = False,
    dialect: str | None = None,
    threads: int | None = None,
    progress: Progress = lambda _: None,
) -> ConversionReport:
    """Convert a LoRA into an adapter of target values, exact top-k by magnitude of the update.

    Memory stays at about one tensor of the base. The same input gives the same bytes, whatever ``threads`` is.

    Args:
        lora: a LoRA file or folder; see :mod:`shira_format.lora` for the dialects.
        base: the checkpoint that it adapts.
        out: the adapter file to write, or None to compute the report only.
        rule: what to keep; the largest 1 % of each tensor by default.
        include: regexes; a tensor is converted only if one of them is found in its name.
        exclude: regexes; a tensor is left out if one of them is found in its name.
        self_contained: store the base's values too, so that the file can be undone, scaled and measured alone.
        dialect: of the LoRA; recognised by default.
        threads: at most this many.
        progress: called with numbers of elements done, see :func:`shira_format.selection.select`.

    Raises:
        SourceError: an input that cannot be converted exactly; nothing is written.
        FormatError: a safetensors file is damaged.
    """
    checkpoint = open_checkpoint(base)
    source = filtered(open_lora(lora, checkpoint, dialect=dialect), include, exclude)
    return convert(
        source, checkpoint, out, rule=rule or TopK(), include=include, exclude=exclude,
        self_contained=self_contained, threads=threads, progress=progress,
    )  # fmt: skip


def filtered(source: Lora, include: Sequence[str], exclude: Sequence[str]) -> Lora:
    """The part of ``source`` whose tensor names match.

    Raises:
        SourceError: a bad regex, or no update is left.
    """
    match = name_filter(include, exclude)
    updates = [update for update in source.updates if match(update.name)]
    if not updates:
        raise SourceError(f"no adapted weight is left by --include {list(include)} --exclude {list(exclude)}")
    return Lora(
        updates=updates,
        whole={name: array for name, array in source.whole.items() if match(name)},
        additions={name: array for name, array in source.additions.items() if match(name)},
        source=source.source, base_model=source.base_model, files=source.files, notices=source.notices,
    )  # fmt: skip


def convert(
    source: Lora,
    base: Checkpoint,
    out: str | os.PathLike[str] | None,
    *,
    rule: TopK,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    self_contained: bool = False,
    threads: int | None = None,
    progress: Progress = lambda _: None,
) -> ConversionReport:
    """The pipeline behind :func:`lora_to_shira`, for updates that are open already."""
    report = ConversionReport(notices=list(source.notices))
    _check_base(source.updates, base)
    if out is not None:
        _check_not_input(Path(out), [base.path, *base.files, *source.files])
    with _blamed_on(source.files), AdapterWriter(out) if out is not None else nullcontext() as writer:
        for update, selected in select(source.updates, rule, threads=threads, progress=progress):
            tensor, kept = sparse_target(update, selected, base[update.name], self_contained=self_contained)
            report.tensors.append(kept)
            if writer is not None:
                writer.add(tensor, {"energy_kept": kept.energy_kept, "relative_error": kept.relative_error})
        for whole in _whole_tensors(source, base, self_contained):
            report.whole.append(whole.name)
            if whole.base_digest is None:
                report.notices.append(f"tensor {whole.name!r} is not in the base: stored whole, as a new tensor")
            if writer is not None:
                writer.add_whole(whole)
        if writer is not None:
            writer.manifest |= _provenance(source, base, rule, include, exclude, report)
    if out is not None:
        report.file_bytes = Path(out).stat().st_size
    return report


def _check_not_input(out: Path, inputs: Iterable[Path]) -> None:
    if out.exists() and any(path.exists() and out.samefile(path) for path in inputs):
        raise SourceError(f"{out}: is one of the inputs")


@contextmanager
def _blamed_on(files: Sequence[Path]) -> Iterator[None]:
    """Put the source's file before what is wrong with one of its tensors."""
    try:
        yield
    except SourceError as error:
        raise SourceError(": ".join([*map(str, files[:1]), str(error)])) from None


def sparse_target(
    update: Update, selected: Selected, weight: Array, *, self_contained: bool = False
) -> tuple[SparseTensor, TensorReport]:
    """The selected entries as targets: ``weight + update``, rounded once to the weight's dtype.

    Entries whose target has the bits of the base are dropped.

    Raises:
        SourceError: a target that is not finite where the base is.
    """
    work = np.result_type(working_dtype(weight.dtype), selected.values.dtype)
    before = weight.reshape(-1)[selected.indices]
    with np.errstate(over="ignore"):
        target = (before.astype(work) + selected.values.astype(work)).astype(weight.dtype)
    if (bad := np.isfinite(before.astype(work)) & ~np.isfinite(target.astype(work))).any():
        raise SourceError(
            f"tensor {update.name!r}: base + update overflows {dtype_name(weight.dtype)} "
            f"at flat index {selected.indices[bad][0]}"
        )
    as_bits = np.dtype(f"u{weight.dtype.itemsize}")
    moved = before.view(as_bits) != target.view(as_bits)
    indices, values, before, target = (
        array[moved] for array in (selected.indices, selected.values, before, target)
    )
    tensor = SparseTensor(
        update.name, update.shape, indices, target,
        base=before if self_contained else None, base_digest=None if self_contained else digest(before),
    )  # fmt: skip
    wide = values.astype(np.float64)
    stored = float(np.dot(wide, wide))
    missed = target.astype(np.float64) - before.astype(np.float64) - wide
    # Energy and stored part come from sums in different precision; what rounds below zero is zero.
    error = max(0.0, selected.energy - stored) + float(np.dot(missed, missed))
    energy = max(selected.energy, stored)
    report = TensorReport(update.name, update.shape, dtype_name(weight.dtype), tensor.nnz, energy, stored, error)
    return tensor, report


def _check_base(updates: Iterable[Update], base: Checkpoint) -> None:
    names = set()
    for update in updates:
        if update.name in names:
            raise SourceError(f"two updates of tensor {update.name!r}")
        names.add(update.name)
        if not is_float(base.dtype(update.name)):
            raise SourceError(
                f"{base.path}: tensor {update.name!r} is of dtype {base.dtype(update.name)}, not a float dtype "
                "(a quantised base cannot take exact targets)"
            )


def _whole_tensors(source: Lora, base: Checkpoint, self_contained: bool) -> Iterable[WholeTensor]:
    if twice := source.whole.keys() & source.additions.keys():
        raise SourceError(f"tensor {min(twice)!r} is both replaced and added to")
    for name, array in source.whole.items():
        yield _whole(name, array, base.get(name), self_contained)
    for name, addition in source.additions.items():
        weight = base[name]
        work = working_dtype(weight.dtype)
        yield _whole(name, weight.astype(work) + addition.astype(work), weight, self_contained)


def _whole(name: str, array: Array, weight: Array | None, self_contained: bool) -> WholeTensor:
    """A replacement in the base's dtype, if the base has such a tensor of floats."""
    if weight is None:
        return WholeTensor(name, array)
    if not is_float(weight.dtype):
        raise SourceError(f"tensor {name!r} is of dtype {weight.dtype} in the base, not a float dtype")
    with np.errstate(over="ignore"):
        values = array.astype(weight.dtype)
    if not np.isfinite(values.astype(working_dtype(weight.dtype))).all():
        raise SourceError(
            f"tensor {name!r} does not fit the base's dtype {dtype_name(weight.dtype)}, or holds NaN"
        )
    return WholeTensor(name, values, base=weight if self_contained else None, base_digest=digest(weight))


def _provenance(
    source: Lora,
    base: Checkpoint,
    rule: TopK,
    include: Sequence[str],
    exclude: Sequence[str],
    report: ConversionReport,
) -> dict[str, Any]:
    """What the manifest says of how the file was made; the same input gives the same text, so no date and no paths."""
    selection: dict[str, Any] = {"rule": "top-k", "scope": rule.scope}
    selection |= {"density": rule.density} if rule.density is not None else {"top_k": rule.top_k}
    selection |= {"include": list(include)} if include else {}
    selection |= {"exclude": list(exclude)} if exclude else {}
    selection |= {"energy_kept": report.energy_kept, "relative_error": report.relative_error}
    files = [{"name": path.name, "digest": file_digest(path)} for path in source.files]
    return {
        "base_model": source.base_model | {"files": [{"name": path.name} for path in base.files]},
        "source": source.source | {"files": files},
        "selection": selection,
    }
