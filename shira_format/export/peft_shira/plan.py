"""What PEFT would hold of an adapter, and whether it can: decided from the manifest and the base's names before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from shira_format.checkpoints import Checkpoint
from shira_format.errors import BaseMismatch, SourceError
from shira_format.format import AdapterFile
from shira_format.format.items import SparseEntry
from shira_format.names.patterns import PatternError, is_inside_for_peft
from shira_format.tensors import numel

_MOST_SIDE = 2**31 - 1  # PEFT's indices are int32
_LISTED = 6  # layers that a message names

# Modules of this name are embeddings in the models that have them, and PEFT's SHiRA takes nn.Linear only.
_EMBEDDINGS = {
    "embed_in", "embed_positions", "embed_tokens", "position_embedding", "position_embeddings", "relative_attention_bias",
    "shared", "tok_embeddings", "token_embedding", "token_type_embeddings", "word_embeddings", "wpe", "wte",
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One adapted layer: its entry in the manifest, and its module's name in PEFT's model."""

    entry: SparseEntry
    module: str

    @property
    def side(self) -> int:
        """Rows plus columns: PEFT holds so many entries for each 1 of ``r``."""
        return sum(self.entry.shape)


@dataclass
class PeftPlan:
    """An adapter as PEFT can hold it.

    Attributes:
        targets: the adapted layers.
        rank: PEFT's ``r``.
        saved: modules that are saved whole, by their names in PEFT's model.
        whole: tensors of these that the adapter has, by their names there, from their names there to those in the adapter.
        filled: tensors of these that the base has and the adapter leaves alone, likewise.
        notices: what a user should know.
    """

    targets: list[Target]
    rank: int
    saved: list[str] = field(default_factory=list)
    whole: dict[str, str] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def entries_of(self, target: Target) -> int:
        """How many entries PEFT holds of a layer."""
        return self.rank * target.side


def make_plan(
    source: AdapterFile, chosen: Callable[[str], bool], base: Checkpoint | None, prefix: str, *, pad: bool
) -> PeftPlan:
    """Plan an export.

    Args:
        source: the adapter.
        chosen: whether a tensor is taken, by name.
        base: the base, if it is at hand.
        prefix: what names in PEFT's model have before those in the adapter.
        pad: whether layers may be filled up.

    Raises:
        SourceError: PEFT cannot hold it.
        BaseMismatch: the base lacks a tensor.
    """
    path, manifest = source.path, source.manifest
    if manifest.raw.get("components"):
        raise SourceError(f"{path}: an adapter of a pipeline: PEFT adapts one model at a time")
    if removed := [name for name in manifest.removed if chosen(name)]:
        raise SourceError(f"{path}: a patch that removes {removed[0]!r}, which PEFT cannot")
    entries = [entry for name, entry in manifest.tensors.items() if chosen(name)]
    for entry in entries:
        try:
            _check(entry, base)
        except SourceError as error:
            raise SourceError(f"{path}: tensor {entry.name!r}: {error}") from None
    empty = [entry.name for entry in entries if entry.nnz == 0]
    targets = [Target(e, prefix + e.name.removesuffix(".weight")) for e in entries if e.nnz]
    if not targets:
        raise SourceError(f"{path}: no sparse tensor with an entry to export: PEFT's SHiRA needs an adapted layer")
    plan = PeftPlan(targets, _rank(targets, path, pad=pad))
    if empty:
        plan.notices.append(f"{len(empty)} tensors without entries are left out, {empty[0]!r} for example")
    _plan_saved(plan, [name for name in manifest.whole if chosen(name)], base, prefix, path)
    return plan


def _check(entry: SparseEntry, base: Checkpoint | None) -> None:
    """Whether one tensor can be an adapted layer."""
    module = entry.name.removesuffix(".weight")
    if entry.values == "none":
        raise SourceError("a mask, without values")
    if entry.is_patch:
        raise SourceError("part of a patch that renames or resizes it, which PEFT cannot")
    if module == entry.name or not module:
        raise SourceError("not the 'weight' of a module, and PEFT adapts modules")
    if len(entry.shape) != 2:
        raise SourceError(f"has shape {list(entry.shape)}, and PEFT's SHiRA adapts nn.Linear only")
    if module.rpartition(".")[2] in _EMBEDDINGS:
        raise SourceError("an embedding by its name, and PEFT's SHiRA adapts nn.Linear only")
    if max(entry.shape) > _MOST_SIDE:
        raise SourceError(f"has shape {list(entry.shape)}, and PEFT's indices are int32")
    if entry.values == "target" and not entry.base_values and base is None:
        raise SourceError("holds target values without those of the base, and PEFT adds: pass --base")
    if base is None:
        return
    if entry.name not in base:
        raise BaseMismatch(f"tensor {entry.name!r}: the base {base.path} has none of this name")
    bias = f"{module}.bias"
    rows, columns = entry.shape
    if rows != columns and bias in base and base.shape(bias) == (columns,):
        raise SourceError(
            f"its bias has {columns} elements, one a column: the module is Conv1D, and PEFT's SHiRA adapts nn.Linear only"
        )


def _rank(targets: list[Target], path: Path, *, pad: bool) -> int:
    """PEFT's ``r``, the same for all layers."""
    whole = {target.entry.nnz // target.side for target in targets}
    if len(whole) == 1 and all(target.entry.nnz % target.side == 0 for target in targets):
        return whole.pop()
    largest = max(targets, key=lambda target: math.ceil(target.entry.nnz / target.side))
    rank = math.ceil(largest.entry.nnz / largest.side)
    small = next((target for target in targets if rank * target.side > numel(target.entry.shape)), None)
    rule = "PEFT's SHiRA holds r * (rows + columns) entries of every layer, with one r for all"
    if small is not None and (pad or small is largest):
        raise SourceError(
            f"{path}: {rule}. {_count(largest)} needs r = {rank}, under which {_count(small)} would have more entries than "
            "elements, which PEFT refuses: nothing can be padded there; export fewer tensors (--include, --exclude)"
        )
    if pad:
        return rank
    listed = ", ".join(map(_count, targets[:_LISTED]))
    more = f", ... ({len(targets)} layers)" if len(targets) > _LISTED else ""
    way = f"--pad fills them up with zeros, to r = {rank}"
    if small is not None:
        way = f"--pad cannot help, as {_count(small)} would have more entries than elements with r = {rank}"
    raise SourceError(f"{path}: {rule}; here {listed}{more}. {way}")


def _count(target: Target) -> str:
    rows, columns = target.entry.shape
    exact = target.entry.nnz / target.side
    return f"{target.entry.name!r} has {target.entry.nnz} (r * ({rows} + {columns}), r = {exact:.4g})"


def _plan_saved(plan: PeftPlan, names: list[str], base: Checkpoint | None, prefix: str, path: Path) -> None:
    """Dense tensors as PEFT's ``modules_to_save``, each of which holds all tensors of a module."""
    owners = {name: name.rpartition(".")[0] for name in names}
    if rootless := [name for name, owner in owners.items() if not owner]:
        raise SourceError(
            f"{path}: whole tensor {rootless[0]!r} is in no module, and PEFT saves whole modules (modules_to_save)"
        )
    # A module inside another one is saved with it.
    modules = sorted({owner for owner in owners.values() if not any(_inside(owner, o) for o in owners.values())})
    adapted = {target.module: target.entry.name for target in plan.targets}
    for module in modules:
        own = next(name for name, owner in owners.items() if owner == module)
        try:
            _check_saved(prefix + module, adapted)
            if base is not None:
                _check_alone(prefix + module, {prefix + name for name in _modules(base).difference(modules)})
        except SourceError as error:
            raise SourceError(f"{path}: whole tensor {own!r}: {error}") from None
    plan.saved = [prefix + module for module in modules]
    plan.whole = {prefix + name: name for name in names}
    if modules and base is None:
        plan.notices.append(
            f"{', '.join(modules)}: PEFT needs all tensors of a saved module, and without --base it is not known whether the "
            "adapter has them; if one is missing, PEFT fails as it loads"
        )
    if base is not None:
        held = tuple(f"{module}." for module in modules)
        plan.filled = {
            prefix + name: name for name in base if name.startswith(held) and prefix + name not in plan.whole
        }


def _inside(module: str, other: str) -> bool:
    return module.startswith(f"{other}.")


def _check_saved(module: str, adapted: dict[str, str]) -> None:
    """Whether PEFT can save a whole module next to the adapted ones (``check_target_module_exists``, ``_set_trainable``)."""
    for target, name in adapted.items():
        try:
            is_adapted = is_inside_for_peft(module, target) or target.endswith(module)
        except PatternError as error:
            raise SourceError(f"PEFT cannot save a module of the name {module!r} whole: {error}") from None
        if is_adapted:
            raise SourceError(
                f"PEFT saves whole modules (modules_to_save) only if it does not adapt them; {name!r} is adapted"
            )


def _check_alone(module: str, others: Iterable[str]) -> None:
    """PEFT matches the name with the end of a module's name, and could save modules that the file lacks."""
    if also := sorted(other for other in others if other.endswith(module)):
        raise SourceError(
            f"PEFT would save {also[0]!r} whole too, as its name ends in {module!r}, and fail as the adapter lacks it"
        )


def _modules(base: Checkpoint) -> set[str]:
    """Names of the modules that the base's tensors are in."""
    found: set[str] = set()
    for name in base:
        owner = name.rpartition(".")[0]
        while owner and owner not in found:
            found.add(owner)
            owner = owner.rpartition(".")[0]
    return found
