"""Patches between two versions: written from two checkpoints of one structure, and several composed into one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shira_format._core.arrays import array_digest
from shira_format._core.dtypes import is_float
from shira_format.adapter import Adapter
from shira_format.checkpoints import Checkpoint
from shira_format.checkpoints.same import same_bits
from shira_format.convert.exact import Exact
from shira_format.convert.inputs import ConversionInputs, DenseCopy
from shira_format.convert.pipeline import convert
from shira_format.convert.report import ConversionReport
from shira_format.entries.changes import CheckpointChange
from shira_format.entries.loaded import LoadedAdapter, load_adapter
from shira_format.errors import BaseMismatch
from shira_format.merging.algebra import compose
from shira_format.sync.structure import Structure
from shira_format.tensors import DenseTensor, SparseTensor, numel

# By name: what the writer is told.
ENCODINGS: Mapping[str, Mapping[str, Any]] = {"plain": {}}


@dataclass(frozen=True)
class _Step:
    """The conversion of two versions into the patch between them."""

    before: Checkpoint
    after: Checkpoint
    version: int
    base_version: int
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def open(self) -> ConversionInputs:
        """All tensors, compared bit for bit; other than floats are stored whole."""
        before, after = self.before, self.after
        changes = [
            CheckpointChange(name, before, name, after, name, numel(before.shape(name)))
            for name in before
            if is_float(before.dtype(name))
        ]
        others = [name for name in before if not is_float(before.dtype(name))]
        moved = [name for name in others if not same_bits(before, name, after, name)]

        def dense(_: bool) -> Iterator[DenseCopy]:
            return (DenseCopy(name, after, name, before) for name in moved)

        return ConversionInputs(
            base=before,
            changes=changes,
            dense=dense,
            copy=lambda change: DenseCopy(change.name, after, change.name, before),
            source={"kind": "step", "version": self.version, "base_version": self.base_version},
        )


def write_patch(
    before: Checkpoint,
    after: Checkpoint,
    path: Path,
    *,
    version: int,
    base_version: int,
    encoding: str,
    threads: int | None,
) -> ConversionReport:
    """Write every entry whose bits differ; memory stays at the changes of a few tensors.

    Args:
        before: version ``base_version``.
        after: version ``version``, with the same names, dtypes and shapes.
        path: the file, which appears whole.
        version: see above.
        base_version: see above.
        encoding: a key of :data:`ENCODINGS`.
        threads: at most this many; all cores by default.
    """
    step = _Step(before, after, version, base_version)
    # Digests of whole tensors would say again what the digest of the state in the index says.
    rule = Exact(digests=False)
    return convert(step, path, rule=rule, inputs=step.open(), threads=threads, **ENCODINGS[encoding])


def composed(patches: Iterator[LoadedAdapter], base: Checkpoint) -> LoadedAdapter:
    """One patch that does what several do one after the other, in memory; each is checked against the result of those before.

    Args:
        patches: in order; one after the other is read.
        base: what the first of them is for.

    Raises:
        BaseMismatch: a patch is for something else.
    """
    together = next(patches)
    for patch in patches:
        found = compose(_in_memory(together), _in_memory(patch), base=base)
        together = load_adapter(found)
    return together


def _in_memory(patch: LoadedAdapter) -> Adapter:
    return Adapter(patch.tensors, dense=patch.dense)


def check_patch(patch: LoadedAdapter, structure: Structure) -> None:
    """Raise BaseMismatch unless a patch changes published tensors, and says of each what it was before."""
    if patch.alpha != 1:
        raise BaseMismatch(f"{patch.where}has strength {patch.alpha}: not a patch of a version")
    found = [
        (one.name, (one.dtype, one.shape), one.base_digest) for one in patch.tensors if one.value_kind == "target"
    ]
    found += [(one.name, (one.values.dtype, one.values.shape), one.base_digest) for one in patch.dense]
    if len(found) != len(patch.tensors) + len(patch.dense):
        raise BaseMismatch(f"{patch.where}has deltas: not a patch of a version")
    for name, kind, digest in found:
        if structure.tensors.get(name) != kind:
            raise BaseMismatch(f"{patch.where}tensor {name!r}: is not published in this dtype and shape")
        if digest is None:
            raise BaseMismatch(f"{patch.where}tensor {name!r}: does not say what was there before")


def renamed(patch: LoadedAdapter, names: Mapping[str, list[str]]) -> LoadedAdapter:
    """The patch with each tensor under its names in a model, which may be several.

    Raises:
        BaseMismatch: tensors that are one in the model do not change alike.
    """
    changes: Iterable[SparseTensor | DenseTensor] = (*patch.tensors, *patch.dense)
    own = {one.name: one for one in changes}
    shared: dict[str, list[str]] = defaultdict(list)
    for name, found in names.items():
        for one in found:
            shared[one].append(name)
    for name, several in shared.items():
        if len(several) > 1 and len({_change(own.get(one)) for one in several}) > 1:
            raise BaseMismatch(
                f"{patch.where}tensors {several[0]!r} and {several[1]!r} are one in the model, {name!r}, and do not change alike"
            )
    if all(names[name] == [name] for name in own):
        return patch
    tensors = {
        name: SparseTensor(name, one.shape, one.indices, one.values, base=one.base, base_digest=one.base_digest)
        for one in patch.tensors
        for name in names[one.name]
    }
    dense = {
        name: DenseTensor(name, one.values, base=one.base, base_digest=one.base_digest)
        for one in patch.dense
        for name in names[one.name]
    }
    return LoadedAdapter(patch.source, list(tensors.values()), list(dense.values()), patch.alpha)


def _change(tensor: SparseTensor | DenseTensor | None) -> tuple[str, ...]:
    """Tells changes of a tensor apart."""
    if tensor is None:
        return ()
    where = (array_digest(tensor.indices),) if isinstance(tensor, SparseTensor) else ()
    return (*where, array_digest(tensor.values))
