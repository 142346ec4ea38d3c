"""An adapter's tensors on the parameters of a model that holds them otherwise: fused, split, or a rank's slices.

Entries of one parameter are merged, whatever tensors they come from, so that everything after works on parameters. The
digest of a tensor's base values is about all its entries in its own order: it becomes that of the parameter where these are
the same entries; else the values are taken from the adapter or a base checkpoint; else they are compared in the
model, through the placement (:class:`SpreadDigest`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import numpy as np

from shira_format._core import fits
from shira_format._core.arrays import Array, array_digest
from shira_format.adapter import Adapter
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.entries.loaded import LoadedAdapter, load_adapter, refuse_removed
from shira_format.entries.placer import Placer
from shira_format.errors import BaseRequired, SourceError
from shira_format.format import AdapterFile
from shira_format.format.items import SparseEntry
from shira_format.names.placement import Layout
from shira_format.tensors import DenseTensor, SparseTensor


def place_adapter(
    adapter: Adapter | str | os.PathLike[str],
    layout: Layout,
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
) -> Adapter:
    """An adapter on the parameters of a server's rank: by parameter, the flat indices and values of its entries there.

    The result is an adapter like any other, which may be saved as the rank's own file. Of a file only the blocks of
    indices that reach into the rank's rows are decoded.

    Args:
        adapter: the adapter, or the path of its file.
        layout: of the rank, such as :class:`shira_format.names.servers.ServerLayout`.
        base: the checkpoint that the adapter was made for: needed for an adapter without the base's values whose tensors
            are sliced or fused, since the base's values of a slice have no digest of their own in the file.

    Returns:
        The adapter, its tensors by the names of parameters; tensors of which the rank has no entry are not in it. A dense tensor
        that is a part of a parameter is there as entries.

    Raises:
        SourceError: a tensor that the layout does not know; one parameter with targets and deltas.
        BaseRequired: ``base`` is needed.
        BaseMismatch: ``base`` is not the adapter's base; a patch or a mask.
        FormatError: the file is damaged.

    Example:
        >>> layout = ServerLayout(num_heads=32, num_kv_heads=8, head_size=128, tp_size=4, tp_rank=1)
        >>> place_adapter("adapter.st", layout)["model.layers.0.self_attn.qkv_proj.weight"].indices
        array([...])
    """
    loaded = load_placed(adapter, layout, base=base)
    where = loaded.where
    if loaded.spread:
        spread = loaded.spread[0]
        raise _base_required(where, f"tensor {spread.tensor!r}", spread.parts[0].of.name)
    groups: dict[str, list[SparseTensor]] = {}
    for tensor in loaded.tensors:
        groups.setdefault(tensor.name, []).append(tensor)
    dense = list(loaded.dense)
    for tensor in _by_parameter(where, loaded.replaced):
        if tensor.nnz == tensor.numel:
            dense.append(_replacing(tensor))
        elif loaded.alpha == 1:
            groups.setdefault(tensor.name, []).append(tensor)
        else:
            raise SourceError(
                f"{where}tensor {tensor.name!r}: a part of it is replaced, which entries at the adapter's strength of "
                f"{loaded.alpha:g} cannot say"
            )
    manifest = {"alpha": loaded.alpha} if loaded.alpha != 1 else {}
    return Adapter([_only(where, group) for group in groups.values()], dense=dense, manifest=manifest)


def load_placed(
    source: LoadedAdapter | Adapter | str | os.PathLike[str],
    layout: Layout,
    executor: Executor | None = None,
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
) -> LoadedAdapter:
    """As :func:`shira_format.entries.loaded.load_adapter`, on the parameters of ``layout``.

    Args:
        source: an adapter, or the path of one, of which only what the layout has is decoded.
        layout: where the adapter's tensors are.
        executor: threads that decode.
        base: see :func:`place_adapter`.

    Raises:
        SourceError: the layout does not know a tensor.
        BaseRequired, BaseMismatch, FormatError, OSError: see :func:`place_adapter`.
    """
    checkpoint = None if base is None else open_checkpoint(base)
    if isinstance(source, (LoadedAdapter, Adapter)):
        return on_parameters(load_adapter(source), layout, checkpoint)
    file = AdapterFile(Path(source), base=checkpoint)
    try:
        return _from_file(file, os.fspath(source), layout, executor, checkpoint)
    finally:
        file.streams.close()


def on_parameters(
    adapter: LoadedAdapter, layout: Layout, base: Checkpoint | None = None, *, tell: bool = False
) -> LoadedAdapter:
    """An adapter that is in memory on the parameters of ``layout``; errors as for :func:`load_placed`.

    If ``tell``, a notice says that tensors lie otherwise.
    """
    placer = Placer(adapter, base)
    for tensor in adapter.tensors:
        placement = placer.placement(layout, tensor.name, tensor.shape)
        reads_base = placer.needs_base(tensor.base_digest, placement, has_values=tensor.base is not None)
        known = placer.with_base(tensor) if reads_base else tensor
        placer.add(known, placement, tensor.nnz, tensor.base_digest)
    for whole in adapter.dense:
        placer.add_dense(whole, placer.placement(layout, whole.name, whole.values.shape))
    placed = placer.placed()
    return replace(placed, notices=placer.notices()) if tell else placed


def compare_spread(adapter: LoadedAdapter, base_of: Callable[[SparseTensor], Array]) -> LoadedAdapter:
    """Compare the base's values with the digests that are spread; from then on, each parameter's entries have their own.

    Args:
        adapter: on the parameters of a model.
        base_of: the base's values at the entries of a parameter.

    Raises:
        BaseMismatch: the model holds other values.
    """
    values = {id(part.of): base_of(part.of) for one in adapter.spread for part in one.parts}
    for one in adapter.spread:
        found = np.empty(one.nnz, one.dtype)
        for part in one.parts:
            found[part.places] = values[id(part.of)][part.at]
        fits.check_values(f"{adapter.where}tensor {one.tensor!r}", one.digest, array_digest(found))

    def with_digest(tensor: SparseTensor) -> SparseTensor:
        if id(tensor) not in values:
            return tensor
        return SparseTensor(
            tensor.name, tensor.shape, tensor.indices, tensor.values, value_kind=tensor.value_kind, dtype=tensor.dtype,
            base_digest=array_digest(values[id(tensor)]),
        )  # fmt: skip

    tensors, replaced = (
        [with_digest(tensor) for tensor in group] for group in (adapter.tensors, adapter.replaced)
    )
    return replace(adapter, tensors=tensors, replaced=replaced, spread=[])


def _from_file(
    file: AdapterFile, source: str, layout: Layout, executor: Executor | None, base: Checkpoint | None
) -> LoadedAdapter:
    frame = LoadedAdapter(source, [], [], float(file.manifest.raw.get("alpha", 1.0)), file.key)
    refuse_removed(frame.where, file.manifest.removed)
    placer = Placer(frame, base)
    entries = list(file.manifest.tensors.values())
    # All names first: an adapter of another model is refused before anything is read.
    placements = {entry.name: placer.placement(layout, entry.name, entry.shape) for entry in entries}
    wholes = {name: placer.placement(layout, name, file.streams[name].shape) for name in file.manifest.whole}

    def read(entry: SparseEntry) -> tuple[SparseTensor, int]:
        if entry.is_patch or entry.values == "none":
            replace(frame, tensors=[file.sparse(entry.name)])  # refuses it
        placement = placements[entry.name]
        if placer.needs_base(entry.digests.get("base"), placement, has_values=entry.base_values):
            return placer.with_base(file.sparse(entry.name)), entry.nnz
        return file.within(entry.name, placement.ranges)

    for entry, (tensor, decoded) in zip(
        entries, map(read, entries) if executor is None else executor.map(read, entries), strict=True
    ):
        placer.decoded += decoded
        placer.add(tensor, placements[entry.name], entry.nnz, entry.digests.get("base"))
    for name, placement in wholes.items():
        placer.add_dense(file.dense(name), placement)
    return placer.placed()


def _base_required(where: str, what: str, parameter: str) -> BaseRequired:
    return BaseRequired(
        f"{where}{what} among others in {parameter!r}: the base's values at the entries are not known: pass base=, or convert "
        "with --self-contained"
    )


def _only(where: str, group: list[SparseTensor]) -> SparseTensor:
    """The entries of one parameter as one tensor.

    Raises:
        SourceError: targets and deltas, or several dtypes.
        BaseRequired: the base's values are known by several digests.
    """
    first = group[0]
    if len(group) == 1:
        return first
    if any(tensor.base is None and tensor.base_digest is not None for tensor in group):
        raise _base_required(where, "tensors", first.name)
    kinds = {(tensor.value_kind, tensor.dtype, tensor.values.dtype, tensor.base is None) for tensor in group}
    if len(kinds) > 1:
        raise SourceError(
            f"{where}parameter {first.name!r} has targets and deltas, or values of several dtypes, or the base's values of only "
            "some; one tensor has one kind"
        )
    indices = np.concatenate([tensor.indices for tensor in group])
    order = np.argsort(indices, kind="stable")
    bases = [tensor.base for tensor in group if tensor.base is not None]
    return SparseTensor(
        first.name, first.shape, indices[order], np.concatenate([tensor.values for tensor in group])[order],
        value_kind=first.value_kind, dtype=first.dtype, base=np.concatenate(bases)[order] if bases else None,
    )  # fmt: skip


def _by_parameter(where: str, tensors: Sequence[SparseTensor]) -> list[SparseTensor]:
    """Entries that are replaced, those of each parameter as one tensor."""
    groups: dict[str, list[SparseTensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.name, []).append(tensor)
    return [_only(where, group) for group in groups.values()]


def _replacing(tensor: SparseTensor) -> DenseTensor:
    """A tensor of which all entries are replaced."""
    base = None if tensor.base is None else tensor.base.reshape(tensor.shape)
    return DenseTensor(tensor.name, tensor.values.reshape(tensor.shape), base=base, base_digest=tensor.base_digest)
