"""From a model and a rule to a mask."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shira_format._core.dtypes import dtype_name
from shira_format._core.threads import Progress, Workers
from shira_format.adapter import Adapter
from shira_format.checkpoints import open_checkpoint
from shira_format.errors import SourceError
from shira_format.format import AdapterWriter, load, save
from shira_format.masks.algebra import difference, intersection, union
from shira_format.masks.base import Rule
from shira_format.masks.gradients import Loss, SummedGradients, reached, sum_gradients
from shira_format.masks.limits import Limits, MaskSource
from shira_format.masks.plan import MaskPlan
from shira_format.masks.registry import rule_of
from shira_format.masks.size import Size
from shira_format.masks.weights import Source, Weight, weights_of
from shira_format.storage.outputs import check_not_input
from shira_format.storage.paths import hub_identity
from shira_format.tensors import SparseTensor, Totals, density, numel


@dataclass(frozen=True)
class MaskedTensor:
    """The mask of one weight.

    Attributes:
        name: the weight.
        shape: its shape.
        dtype: its dtype, as in the file.
        nnz: number of entries.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nnz: int

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return numel(self.shape)

    @property
    def density(self) -> float:
        """``nnz / numel``."""
        return density(self.nnz, self.numel)


@dataclass
class MaskReport(Totals):
    """What a mask is.

    Attributes:
        tensors: of each weight that was ranked; one without entries is not in the mask.
        notes: ``mask`` and ``selection`` as in the manifest.
        unreached: weights that are left out because the loss does not depend on them.
        file_bytes: size of the file; None for a dry run.
    """

    tensors: list[MaskedTensor] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    file_bytes: int | None = None


@dataclass(frozen=True)
class Calibration:
    """What gradients are computed on.

    Attributes:
        model: a torch module.
        batches: what ``loss`` takes.
        loss: from the model and a batch to a tensor of one element.
        at_once: see :func:`shira_format.masks.gradients.sum_gradients`.
        digest: SHA-256 of the data, for the mask's provenance.
        leave_out: leave out weights that the loss does not depend on, instead of raising SourceError.
        progress: called with numbers of batches.
    """

    model: Any
    batches: Iterable[Any]
    loss: Loss
    at_once: int | None = None
    digest: str | None = None
    leave_out: bool = False
    progress: Progress = lambda _: None


def make_mask(
    base: Source | Any,
    rule: str | Rule = "wm",
    *,
    density: float | None = None,
    top_k: int | None = None,
    rank: int | None = None,
    scope: str = "tensor",
    runs: int = 1,
    band: int = 0,
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    within: Sequence[MaskSource] = (),
    without: Sequence[MaskSource] = (),
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    at_once: int | None = None,
    threads: int | None = None,
    progress: Progress = lambda _: None,
) -> Adapter:
    """The mask of a model's weights: an adapter without values, for training, for :func:`save` and for other adapters to share.

    The count is exact; of equal scores the entry of the lower index comes first, and under the global scope that of the earlier
    weight. The result does not depend on the number of threads. In memory are the mask, and a few tiles of the weights.

    Args:
        base: a checkpoint (a path or an open one), or a torch module, which rules that need gradients take.
        rule: a name (``wm``, ``rand``, ``struct``, ``grad``, ``snip``, ``lift``, ``gallop``, ``talos``, ``neuroada``), or a rule of
            :mod:`shira_format.masks` with settings of its own, such as ``Struct("columns", offset=1)`` or ``Given(scores)``.
        density: share of the elements, in (0, 1]; 0.01 by default.
        top_k: instead, a count: for each weight, or in all under the global scope.
        rank: instead, as many entries as a LoRA of this rank has parameters: ``rank (m + n)`` for a matrix ``[m, n]``.
        scope: ``"tensor"``, ``"global"`` (the best of all weights together) or ``"row"`` (of each output the same number).
        runs: take aligned runs of so many entries (2, 4, ... 256) by the sums of their scores; the count is rounded to whole runs.
        band: 0: the best entries; 1: the next so many; and so on. Masks of different bands have no entry in common.
        seed: of the rule ``rand``, if it is given by its name.
        include: regexes; a weight is masked only if one of them is found in its name.
        exclude: regexes; a weight is left out if one of them is found in its name.
        within: masks, adapters or files of them; an entry is chosen only if all of these have it, and a weight that one of them
            lacks is left out.
        without: likewise; an entry is chosen only if none of these has it.
        batches: for gradients: what ``loss`` takes.
        loss: for gradients: ``loss(model, batch)``, a tensor of one element.
        at_once: for gradients: compute those of so many weights at a time, so that memory stays flat; the batches are run once for
            each group.
        threads: at most so many; all cores by default.
        progress: called with numbers of elements.

    Returns:
        A mask with a tensor for each weight that has entries.

    Raises:
        ValueError: arguments that cannot be meant.
        SourceError: no weight is left, a score is no number, a weight is too small, or the loss does not depend on a weight.
        OSError: the checkpoint cannot be read.

    Example:
        >>> mask = make_mask("my-model", "wm", density=0.01, exclude=["embed"])
        >>> mask["model.layers.0.mlp.up_proj.weight"].nnz
        45089
    """
    chosen = rule_of(rule, seed)
    limits = None
    if within or without:
        limits = Limits(within, without, [weight.name for weight in weights_of(base)])
    plan = MaskPlan(chosen, Size(density, top_k, rank, scope), runs, band, limits)
    calibration = _calibration(base, chosen, batches, loss, at_once)
    weights = weights_of(base, include, exclude)
    report = MaskReport()
    found = list(mask_tensors(plan, weights, calibration, report, threads=threads, progress=progress))
    return Adapter(found, manifest=provenance(plan, base, include, exclude, calibration))


def _calibration(
    base: Any, rule: Rule, batches: Iterable[Any] | None, loss: Loss | None, at_once: int | None
) -> Calibration | None:
    if not rule.gradients:
        if batches is not None or loss is not None or at_once is not None:
            raise ValueError(
                f"the rule {rule.name!r} needs no gradients: batches, loss and at_once have no meaning with it"
            )
        return None
    if batches is None or loss is None or not hasattr(base, "named_modules"):
        raise ValueError(f"the rule {rule.name!r} needs gradients: give a torch module, batches and a loss")
    return Calibration(base, batches, loss, at_once)


def mask_tensors(
    plan: MaskPlan,
    weights: Sequence[Weight],
    calibration: Calibration | None,
    report: MaskReport,
    *,
    threads: int | None = None,
    progress: Progress = lambda _: None,
    on_start: Progress = lambda _: None,
) -> Iterator[SparseTensor]:
    """The mask's tensors one after the other; fills in the report.

    Args:
        plan: what to make.
        weights: of a checkpoint, or of ``calibration.model``.
        calibration: for rules that need gradients.
        report: gets the tensors and what is left out.
        threads: at most so many.
        progress: called with numbers of elements.
        on_start: called with what all calls of ``progress`` will add up to, when the gradients are there.

    Raises:
        SourceError: see :func:`make_mask`.
    """
    report.notes = plan.notes
    weights = plan.taken(weights)
    with ExitStack() as stack:
        gradients: SummedGradients | None = None
        if calibration is not None:
            gradients = stack.enter_context(
                sum_gradients(
                    calibration.model, weights, calibration.batches, calibration.loss,
                    squares=plan.rule.gradients == "squares", at_once=calibration.at_once, progress=calibration.progress,
                )
            )  # fmt: skip
            report.unreached = gradients.unreached
            if gradients.unreached and not calibration.leave_out:
                names = ", ".join(map(repr, gradients.unreached[:3]))
                raise SourceError(
                    f"the loss does not depend on {len(gradients.unreached)} weights, such as {names}: leave them out (exclude)"
                )
            weights = reached(weights, gradients)
        on_start(plan.passes() * sum(weight.size for weight in weights))
        workers = stack.enter_context(Workers(threads))
        for weight, indices in plan.masks(weights, gradients, workers, progress):
            report.tensors.append(MaskedTensor(weight.name, weight.shape, dtype_name(weight.dtype), indices.size))
            if indices.size:
                yield SparseTensor(weight.name, weight.shape, indices, value_kind="none", dtype=weight.dtype)


def provenance(
    plan: MaskPlan,
    source: Any,
    include: Sequence[str],
    exclude: Sequence[str],
    calibration: Calibration | None,
) -> dict[str, Any]:
    """What the manifest says of how a mask was made."""
    manifest = plan.notes
    if calibration is not None and calibration.digest is not None:
        manifest["mask"]["calibration_digest"] = calibration.digest
    manifest["selection"] |= {"include": list(include)} if include else {}
    manifest["selection"] |= {"exclude": list(exclude)} if exclude else {}
    if isinstance(source, str | os.PathLike) and (identity := hub_identity(os.fspath(source))):
        manifest["base_model"] = identity
    return manifest


def write_mask(
    source: Source,
    out: Path | None,
    plan: MaskPlan,
    weights: Sequence[Weight],
    *,
    inputs: Sequence[Path] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    calibration: Calibration | None = None,
    compact: bool = False,
    threads: int | None = None,
    progress: Progress = lambda _: None,
    on_start: Progress = lambda _: None,
) -> MaskReport:
    """Make a mask and write it tensor by tensor; see :func:`make_mask` and :func:`mask_tensors`.

    Args:
        source: the checkpoint, for the provenance.
        out: the file, which is replaced if it exists; None for a dry run.
        plan: what to make.
        weights: to be masked.
        inputs: files that must not be the output.
        include: as given, for the provenance.
        exclude: likewise.
        calibration: for rules that need gradients.
        compact: take as few bytes as possible: a mask of the largest weights takes none, and is read with its base.
        threads: at most so many.
        progress: called with numbers of elements.
        on_start: see :func:`mask_tensors`.
    """
    report = MaskReport()
    tensors = mask_tensors(
        plan, weights, calibration, report, threads=threads, progress=progress, on_start=on_start
    )
    if out is None:
        for _ in tensors:
            pass
        return report
    check_not_input(out, list(inputs))
    base = open_checkpoint(source) if compact else None
    notes = provenance(plan, source, include, exclude, calibration)
    with AdapterWriter(out, notes, compact=compact, base=base) as writer:
        for tensor in tensors:
            writer.add(tensor)
    report.file_bytes = out.stat().st_size
    return report


def write_combination(how: str, files: Sequence[Path], out: Path | None) -> MaskReport:
    """Combine mask files, or the entries of adapters, and write the result tensor by tensor.

    Args:
        how: ``"union"``, ``"intersection"`` or ``"difference"``: see :mod:`shira_format.masks.algebra`.
        files: masks or adapters of one base.
        out: the file, which is replaced if it exists; None for a dry run.

    Raises:
        SourceError: a tensor has several shapes, masks have no tensor in common, or no entry is left.
        FormatError: a file is not an adapter.
        OSError: a file cannot be read or written.
    """
    ways: dict[str, Callable[..., Adapter]] = {
        "union": union,
        "intersection": intersection,
        "difference": difference,
    }
    masks = [load(path) for path in files]
    for path, mask in zip(files[1:], masks[1:], strict=True):
        if how != "union" and not masks[0].keys() & mask.keys():
            raise SourceError(
                f"{path}: has no tensor that {files[0]} has: masks of different models, or under other names"
            )
    combined = ways[how](*masks)
    report = MaskReport(notes={"mask": dict(combined.manifest["mask"]), "selection": {"rule": "mask"}})
    found = []
    for tensor in combined.values():
        if tensor.nnz:
            found.append(tensor)
            report.tensors.append(MaskedTensor(tensor.name, tensor.shape, dtype_name(tensor.dtype), tensor.nnz))
    if not found:
        raise SourceError(f"the {how} of these masks has no entries")
    if out is not None:
        check_not_input(out, list(files))
        save(Adapter(found, manifest=report.notes), out)
        report.file_bytes = out.stat().st_size
    return report
