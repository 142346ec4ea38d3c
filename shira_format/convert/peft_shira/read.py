"""From PEFT's sparse adapters to adapter files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from shira_format._core.arrays import Array, array_digest, sum_of_squares
from shira_format._core.threads import Progress
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.checkpoints.quantised import quantised_named
from shira_format.convert.effect import refuse_lost
from shira_format.convert.inputs import ConversionInputs
from shira_format.convert.lora import lora_inputs
from shira_format.convert.peft_shira.files import SHIRA, Kind, ShiraKeys, find, read_config, sort_keys
from shira_format.convert.peft_shira.layers import ShiraLayer
from shira_format.convert.pipeline import sparse_target
from shira_format.convert.report import ConversionReport, TensorReport
from shira_format.convert.unused import check_all_used, opened_files
from shira_format.entries.changes import Entries, UpdateChange
from shira_format.entries.moved import on_base
from shira_format.errors import SourceError
from shira_format.format import AdapterFile, AdapterWriter, save
from shira_format.lora import Lora
from shira_format.lora.files import checked, open_tensors
from shira_format.lora.peft.promised import check_saved
from shira_format.lora.peft.resized import is_resized, resized_notices
from shira_format.lora.peft.stated import statements
from shira_format.names.filters import NOT_CHOSEN, name_filter
from shira_format.names.located import in_any_names
from shira_format.names.prefixes import match_names, match_others
from shira_format.storage.outputs import check_not_input
from shira_format.storage.paths import hub_identity, resolve_path, same_files
from shira_format.tensors import DenseTensor, SparseTensor, numel

_LARGEST = 1e150  # of float64; the sums of squares in the report must stay numbers

Values = Literal["target", "delta"]


def peft_to_shira(
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str] | None,
    *,
    values: Values = "target",
    self_contained: bool = False,
    compact: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    prefix: str | None = None,
    allow_unused: bool = False,
    force: bool = False,
    progress: Progress = lambda _: None,
    on_start: Progress = lambda _: None,
) -> ConversionReport:
    """Make an adapter of a SHiRA or Super-Tuning adapter of PEFT.

    Targets are ``round(base + value)`` in the base's dtype, which is what PEFT computes; an entry whose target has the bits of
    the base is left out. Deltas are the values of the file, bit for bit and every one, with the digest of the base's values: the
    form from which ``shira_to_peft`` makes the same file again. One tensor is in memory at a time.

    Args:
        folder: PEFT's folder, or the ``adapter_model`` file in it.
        base: the checkpoint that it adapts; names and shapes are resolved against it.
        out: the adapter file to write, which takes the place of what is there; None for a dry run.
        values: what to store.
        self_contained: store the base's values too.
        compact: see :func:`shira_format.convert.lora.lora_to_shira`.
        include: regexes; a tensor is taken only if one of them is found in its name in the base.
        exclude: regexes; a tensor is left out if one of them is found in its name.
        prefix: what the base's names of the adapted weights start with, if several are possible.
        allow_unused: see :func:`shira_format.convert.lora.lora_to_shira`.
        force: write the adapter even if its targets change the base by less than a thousandth of what PEFT's values would (in norm),
            as a whole or in some tensors.
        progress: called with 1 after each adapted layer.
        on_start: called once with the number of adapted layers.

    Raises:
        SourceError: an input that cannot be converted exactly; nothing is written.
        FormatError: a safetensors file is damaged.
    """
    if values not in ("target", "delta"):
        raise ValueError(f"values {values!r} is neither 'target' nor 'delta'")
    chosen = name_filter(include, exclude)
    with same_files():
        weights, config_path = find(resolve_path(folder))
        kind, config = read_config(config_path)
        checkpoint = open_checkpoint(base)
        with quantised_named(checkpoint):
            read_from, source = in_any_names(
                lambda known: _Reader(weights, config_path, kind, config, known, prefix).read(chosen), checkpoint
            )
        notices = check_all_used(
            resolve_path(folder), [weights, *checkpoint.files], opened_files([weights]), allow=allow_unused
        )
        source = replace(source, notices=notices + source.notices)
        job = lora_inputs(source, read_from, {} if isinstance(base, Checkpoint) else hub_identity(base))
    path = None if out is None else Path(out)
    if path is not None:
        check_not_input(path, job.files)
    report = ConversionReport(notices=list(job.notices), left_out=job.left_out)
    given = rounded_first = 0
    on_start(len(source.updates))
    with ExitStack() as stack:
        written = path
        if read_from is not checkpoint:
            written = Path(stack.enter_context(TemporaryDirectory(prefix="shira-"))) / "by-peft.st"
        writing = stack.enter_context(ExitStack())
        packing: dict[str, Any] = {"compact": compact, "base": None if self_contained else checkpoint}
        writer = None
        if written is not None:  # one that will be moved to the base's names is packed then
            writer = writing.enter_context(AdapterWriter(written, **(packing if written is path else {})))
        for layer in source.updates:
            assert isinstance(layer, ShiraLayer)
            tensor, account, done = _convert_layer(layer, read_from, values, self_contained=self_contained)
            given += done.entries
            rounded_first += done.rounded
            report.tensors.append(account)
            if writer is not None:
                writer.add(tensor, account.notes if values == "target" else None)
            progress(1)
        for whole in _wholes(job, weights, self_contained=self_contained):
            report.whole.append(whole.name)
            if whole.base_digest is None:
                report.notices.append(f"tensor {whole.name!r} is not in the base: stored whole, as a new tensor")
            if writer is not None:
                writer.add_dense(whole)
        if not force:
            refuse_lost(report.effects)
        if writer is not None:
            files = [{"name": file.name} for file in checkpoint.files]
            writer.manifest |= {"base_model": job.base_model | {"files": files}, "source": job.source}
            if include or exclude:
                names = {"include": list(include), "exclude": list(exclude)}
                writer.manifest["selection"] = {key: value for key, value in names.items() if value}
        writing.close()
        if written is not None and written is not path:
            with on_base(AdapterFile(written), checkpoint, lambda _: True) as moved:
                report.notices += moved.notices
                if path is not None:
                    save(moved.file.adapter(), path, **packing)
    if path is not None:
        report.file_bytes = path.stat().st_size
    if values == "target" and (lost := given - report.nnz):
        report.notices.append(
            f"{lost} of {given} entries do not change the base's values, as its dtype rounds them, and were left out "
            "(--values delta keeps them)"
        )
    if values == "delta" and rounded_first:
        report.notices.append(
            f"Super-Tuning rounds {rounded_first} of {given} values to the base's dtype before it adds them; they are stored as the "
            "file has them, and base + delta may differ from PEFT's in the last bit (--values target does not)"
        )
    return report


@dataclass(frozen=True)
class _SourceCounts:
    """The number of entries of a layer in PEFT's file, and of those that PEFT rounds before it adds them."""

    entries: int
    rounded: int


def _convert_layer(
    layer: ShiraLayer, base: Checkpoint, values: Values, *, self_contained: bool
) -> tuple[SparseTensor, TensorReport, _SourceCounts]:
    """The tensor, its account, and what PEFT's file had for it."""
    indices, stored = layer.entries()
    steps = layer.steps(stored)
    if steps.dtype == np.float64 and steps.size and np.abs(steps).max() > _LARGEST:
        raise SourceError(
            f"{layer.path}: {layer.values_key!r} holds values beyond {_LARGEST:g}, whose squares overflow"
        )
    change = UpdateChange(layer, base)
    before, target = change.completed(indices, steps)
    entries = Entries(indices, steps, before, target, sum_of_squares(steps))
    try:
        tensor, account = sparse_target(change, entries, self_contained=self_contained)
    except SourceError as error:
        raise SourceError(f"{layer.path}: {error}") from None
    if values == "delta":
        tensor = SparseTensor(
            layer.name, layer.shape, indices, stored, value_kind="delta", dtype=before.dtype,
            base=before if self_contained else None, base_digest=None if self_contained else array_digest(before),
        )  # fmt: skip
        account = replace(
            account, nnz=tensor.nnz, energy_stored=account.energy, error=0.0, energy_moved=account.energy_selected
        )
    rounded_first = 0
    if layer.kind.rounds_first:
        with np.errstate(over="ignore"):
            rounded_first = int(np.count_nonzero(stored.astype(steps.dtype) != steps))
    return tensor, account, _SourceCounts(indices.size, rounded_first)


def _wholes(job: ConversionInputs, path: Path, *, self_contained: bool) -> Iterator[DenseTensor]:
    try:
        for whole in job.dense(self_contained):
            assert isinstance(whole, DenseTensor)
            yield whole
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from None


@dataclass(frozen=True)
class _Reader:
    """Reads an adapter: from keys to layers and dense tensors of the base."""

    path: Path
    config_path: Path
    kind: Kind
    config: Mapping[str, Any]
    base: Checkpoint
    prefix: str | None

    def read(self, chosen: Callable[[str], bool]) -> Lora:
        tensors = open_tensors(self.path, self.base)
        keys = sort_keys(tensors, self.kind, self.path)
        check_saved(self.config.get("modules_to_save") or (), keys.plain, self.base, self.path)
        needed = {f"{module}.weight": module for module in keys.values}
        fits = self._fits(needed, keys, tensors)
        rename = match_names(
            needed,
            self.base,
            self.path,
            prefix=self.prefix,
            fits=fits,
            statements=statements(self.config, self.base),
        )
        rename = match_others(rename, needed, keys.plain, self.base, self.path, prefix=self.prefix, fits=fits)
        rank = self.config["r"] if self.kind is SHIRA else None
        layers = []
        for weight, module in needed.items():
            name = rename(weight)
            layer = ShiraLayer(
                name, self.base.shape(name), self.base.dtype(name), self.kind, tensors,
                keys.indices[module], keys.values[module], self.path,
            )  # fmt: skip
            layer.check(rank)
            layers.append(layer)
        for name, key in keys.own_base.items():
            self._check_own_base(key, tensors[key], rename(name))
        whole = dict(self._replacement(name, key, tensors, rename(name)) for name, key in keys.plain.items())
        if not any(chosen(name) for name in [*whole, *(layer.name for layer in layers)]):
            raise SourceError(f"{self.path}: no tensor is left by the choice of names")
        not_chosen = [name for name in [*(layer.name for layer in layers), *whole] if not chosen(name)]
        left_out = {"equal to the base's": list(keys.own_base.values()), NOT_CHOSEN: not_chosen}
        return Lora(
            updates=[layer for layer in layers if chosen(layer.name)],
            whole={name: array for name, array in whole.items() if chosen(name)},
            source=self._source(),
            base_model=self._base_model(),
            files=[self.path, self.config_path],
            left_out={reason: names for reason, names in left_out.items() if names},
            notices=[
                *tensors.notices,
                *rename.notices("the adapter"),
                *self._notices(keys),
                *resized_notices(whole, self.base, self.path),
            ],
        )

    def _fits(self, needed: Mapping[str, str], keys: ShiraKeys, tensors: Checkpoint) -> Callable[[str, str], bool]:
        """Whether a tensor of the base has room for a layer's largest index."""

        def fits(name: str, found: str) -> bool:
            if name in keys.plain:
                whole = tensors.shape(keys.plain[name])
                return self.base.shape(found) == whole or is_resized(found, self.base.shape(found), whole)
            shape, indices = self.base.shape(found), tensors[keys.indices[needed[name]]]
            if self.kind is not SHIRA:
                return not indices.size or int(indices.max()) < numel(shape)
            if len(shape) != 2 or indices.ndim != 2 or len(indices) != 2:
                return False
            is_inside = all(
                not line.size or int(line.max()) < size for line, size in zip(indices, shape, strict=True)
            )
            return is_inside and indices.shape[1] == self.config["r"] * sum(shape)

        return fits

    def _notices(self, keys: ShiraKeys) -> list[str]:
        if not keys.own_base:
            return []
        return [f"{', '.join(keys.own_base)}: PEFT saved the base's own values too; they are left out"]

    def _check_own_base(self, key: str, array: Array, name: str) -> None:
        """PEFT also saves the base weight of an adapted ``lm_head``: it must be the base's, possibly rounded."""
        if name not in self.base:
            raise SourceError(f"{self.path}: {key!r}: the base has no {name!r}")
        weight = self.base[name]
        with np.errstate(over="ignore"):
            if weight.shape != array.shape or not np.array_equal(weight.astype(array.dtype), array):
                raise SourceError(
                    f"{self.path}: {key!r} is not the base's {name!r} (resized, or another base): merge the adapter with "
                    "PEFT and convert the full checkpoint (full_to_shira)"
                )

    def _replacement(self, name: str, key: str, tensors: Checkpoint, base_name: str) -> tuple[str, Array]:
        array = checked(self.path, key, tensors[key])
        if base_name in self.base:
            shape = self.base.shape(base_name)
            if shape != array.shape and not is_resized(base_name, shape, array.shape):
                raise SourceError(
                    f"{self.path}: {key!r} has shape {list(array.shape)}, the base's {base_name!r} {list(shape)}"
                )
            return base_name, array
        if not self._is_saved(name):
            raise SourceError(f"{self.path}: unmatched key {key!r}: neither in the base nor of modules_to_save")
        return name, array

    def _is_saved(self, name: str) -> bool:
        """Whether a tensor is in one of ``modules_to_save``; PEFT takes these for ends of names."""
        saved = tuple(self.config.get("modules_to_save") or ())
        parts = name.split(".")
        return any(".".join(parts[:n]).endswith(saved) for n in range(1, len(parts)))

    def _source(self) -> dict[str, Any]:
        keys = ("r", "mask_type", "random_seed", "sparsity", "select_top", "modules_to_save", "peft_version")
        given = {key: self.config[key] for key in keys if self.config.get(key) is not None}
        return {"kind": "shira", "dialect": self.kind.dialect} | given

    def _base_model(self) -> dict[str, Any]:
        wanted = {"id": self.config.get("base_model_name_or_path"), "revision": self.config.get("revision")}
        return {key: value for key, value in wanted.items() if isinstance(value, str) and value}
