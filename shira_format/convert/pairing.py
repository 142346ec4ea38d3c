"""Pairs each tensor of a fine-tune with one of its base: by name, by a common prefix, or by content."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from shira_format._core.arrays import Array, as_bytes
from shira_format._core.dtypes import dtype_name, is_float
from shira_format._core.notices import NamesNotice
from shira_format.checkpoints import Checkpoint
from shira_format.checkpoints.same import same_bits
from shira_format.checkpoints.wrapped import unwrapped_names
from shira_format.entries.changes import CheckpointChange
from shira_format.errors import SourceError
from shira_format.names.located import LocatedCheckpoint
from shira_format.names.prefixes import (
    AmbiguousNames,
    Renaming,
    leading_parts_by_name,
    match_names,
    only_one,
    renamings,
)
from shira_format.names.row_blocks import Location
from shira_format.names.spaces import other_names
from shira_format.tensors import numel

_RUNS, _RUN = 16, 256  # where and how much of two tensors is compared to tell whether one comes from the other
_ALIKE = 0.5  # share of equal elements from which on it does


@dataclass
class Pairs:
    """The tensors of two checkpoints, paired.

    Attributes:
        sparse: float tensors that have a base, in the base's order; ``name`` is the result's.
        whole: tensors that are stored whole: their names in ``tuned`` by those in the result.
        removed: names in ``base`` that the result lacks.
        equal: names in the result of non-float tensors with the same bits in both.
        structure: what changes beyond entries, by the result's name.
        left_out: names in ``tuned`` of tensors that are used under another name, by the reason.
        notices: what a user should know.
    """

    base: Checkpoint
    tuned: Checkpoint
    sparse: list[CheckpointChange] = field(default_factory=list)
    whole: dict[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    equal: list[str] = field(default_factory=list)
    structure: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def pair(base: Checkpoint, tuned: Checkpoint, chosen: Callable[[str], bool], *, exact: bool) -> Pairs:
    """Pair the tensors whose names are chosen.

    With ``exact`` the result is ``tuned`` itself: names are those of ``tuned``, base tensors that it lacks are removed, and a
    new tensor may start from a base tensor with much the same content. Otherwise the adapter applies to the base: names are
    those of the base, and a weight of the base that ``tuned`` lacks is an error.

    Raises:
        SourceError: the checkpoints do not belong together, or one has a weight that cannot be paired.
    """
    elsewhere = _elsewhere(base, tuned)
    form = []
    if elsewhere and not exact:
        tuned = _as_base(base, tuned, elsewhere)
    if elsewhere:
        name, location = next(iter(elsewhere.items()))
        form = [f"{len(elsewhere)} tensors of the base are in others of the fine-tune, {name!r} in {location.blocks[0].name!r} for example"]  # fmt: skip
        form = (
            [f"{form[0]}: these are stored whole, as new tensors; for a small patch save both in one form"]
            if exact
            else form
        )
    origins = {name: name for name in tuned if name in base and chosen(name)}
    new = [name for name in tuned if name not in base and chosen(name)]
    taken = set(origins.values())
    gone = [name for name in base if name not in taken and name not in tuned and chosen(name)]
    pairs = Pairs(base, tuned, notices=form)
    if not origins and not new and not gone:
        raise SourceError(f"{tuned.path}: no tensor is left by the choice of names")
    if new and exact and (found := _by_words(new, gone, base, tuned)):
        told = f"names: {next(iter(found))!r} is {next(iter(found.values()))!r} of the base but for the words of wrappers"
        pairs.notices.append(NamesNotice(told))
        origins |= found
        taken = set(found.values())
        new, gone = [n for n in new if n not in found], [n for n in gone if n not in taken]
    if new and (rename := _renaming(new, gone, base, tuned, exact=exact)):
        missing = set(gone)
        found = {name: rename(name) for name in new if rename(name) in missing}
        pairs.notices.append(NamesNotice(f"names: {rename.words}"))
        origins |= found
        missing -= set(found.values())
        new, gone = [n for n in new if n not in found], [n for n in gone if n in missing]
    if new and exact:
        origins |= _by_content(new, gone, base, tuned)
    new = [name for name in new if name not in origins]
    used = set(origins.values())
    gone = [name for name in gone if name not in used]
    if not any(is_float(tuned.dtype(name)) for name in origins):
        raise SourceError(
            f"{tuned.path}: no weight of it is in the base {base.path}: it has names like {next(iter(tuned), None)!r}, "
            f"the base like {next(iter(base), None)!r}"
        )
    order = {name: place for place, name in enumerate(base)}
    for name, origin in sorted(origins.items(), key=lambda item: order[item[1]]):
        _add_pair(pairs, name, origin, exact=exact)
    _add_new(pairs, new, origins, exact=exact)
    _add_missing(pairs, gone, sorted(used, key=order.__getitem__), exact=exact)
    if exact:
        uses = Counter(origins.values())
        for name, origin in origins.items():
            if name != origin:
                kept = origin in tuned or uses[origin] > 1
                words = f"from {origin}" if kept else f"renamed from {origin}"
                pairs.structure[name] = "; ".join(filter(None, [words, pairs.structure.get(name)]))
        # What was only renamed still has to go under its old name.
        pairs.removed += [o for o in dict.fromkeys(origins.values()) if o not in tuned and chosen(o)]
    return pairs


def _elsewhere(base: Checkpoint, tuned: Checkpoint) -> dict[str, Location]:
    """The tensors of the base that the fine-tune has in tensors of other names, such as single experts in 3-D tensors."""
    lacking = [name for name in base if name not in tuned]
    if not lacking or all(name in base for name in tuned):
        return {}
    known = other_names(tuned, tuned.shape)
    rename = Renaming()
    if known and not any(name in known for name in lacking):  # the prefix may differ, too
        try:
            rename = match_names(lacking, {*tuned, *known}, tuned.path)
        except SourceError:
            return {}
    found = {name: known[new] for name in lacking if (new := rename(name)) in known and new not in tuned}
    return {
        name: location
        for name, location in found.items()
        if not any(block.name in base for block in location.blocks)
    }


def _as_base(base: Checkpoint, tuned: Checkpoint, elsewhere: Mapping[str, Location]) -> Checkpoint:
    """The fine-tune with the base's tensors in place of those that hold them.

    Raises:
        SourceError: rows are left over, or are in two tensors of the base.
    """
    rows: dict[str, list[tuple[int, int]]] = defaultdict(list)
    columns: dict[str, int] = {}
    for location in elsewhere.values():
        height = sum(block.height for block in location.blocks)
        for block in location.blocks:
            rows[block.name].append((block.start, block.start + block.height))
            columns[block.name] = numel(location.shape) // height
    for name, ranges in rows.items():
        end = 0
        for start, stop in sorted(ranges):
            if start != end:
                break
            end = stop
        if end * columns[name] != numel(tuned.shape(name)):
            raise SourceError(
                f"{tuned.path}: tensor {name!r} of shape {list(tuned.shape(name))} holds tensors of the base in its rows, but not "
                f"in all of them and each in one place: the base {base.path} has another number of experts"
            )
    return LocatedCheckpoint(tuned, elsewhere, hidden=rows)


def _add_pair(pairs: Pairs, name: str, origin: str, *, exact: bool) -> None:
    base, tuned = pairs.base, pairs.tuned
    result = name if exact else origin
    here, there = base.dtype(origin), tuned.dtype(name)
    before, after = base.shape(origin), tuned.shape(name)
    where = f"{tuned.path}: tensor {name!r}"
    if not is_float(here) or not is_float(there):
        if not exact and (before != after or here != there):
            raise SourceError(f"{where} is {_dtype(there)}{list(after)}, the base has {_dtype(here)}{list(before)}: leave it out, or take every difference (exact)")  # fmt: skip
        if result == origin and here == there and before == after and same_bits(base, origin, tuned, name):
            pairs.equal.append(result)
            return
        pairs.whole[result] = name
        if here != there:
            pairs.structure[result] = f"{_dtype(here)} -> {_dtype(there)}"
        elif before != after:
            pairs.structure[result] = f"shape {list(before)} -> {list(after)}"
        return
    if here != there and exact:
        pairs.whole[name] = name
        pairs.structure[name] = f"{dtype_name(here)} -> {dtype_name(there)}"
        return
    if before == after:
        size = numel(before)
    elif before and after and before[1:] == after[1:]:
        pairs.structure[result] = f"rows {before[0]} -> {after[0]}"
        size = min(before[0], after[0]) * numel(before[1:])
    elif exact:
        pairs.whole[name] = name
        pairs.structure[name] = f"shape {list(before)} -> {list(after)}"
        return
    else:
        raise SourceError(
            f"{where} has shape {list(after)}, the base {list(before)}: only the first dimension may differ; leave "
            "it out, or take every difference (exact)"
        )
    pairs.sparse.append(CheckpointChange(result, base, origin, tuned, name, size))


def _add_new(pairs: Pairs, new: list[str], origins: dict[str, str], *, exact: bool) -> None:
    """Tensors of the fine-tune that the base lacks."""
    tuned = pairs.tuned
    for name in new:
        twin = None if exact else _twin(tuned, name, origins)
        if twin is not None:
            pairs.notices.append(f"tensor {name!r} of the fine-tune is not in the base: it is tied to {twin!r}, and left out")  # fmt: skip
            pairs.left_out.setdefault(f"tied to {twin}", []).append(name)
            continue
        pairs.whole[name] = name
        pairs.structure[name] = "new"


def _add_missing(pairs: Pairs, gone: list[str], used: list[str], *, exact: bool) -> None:
    """Tensors of the base that the fine-tune lacks."""
    if exact:
        pairs.removed += gone
        pairs.structure |= dict.fromkeys(gone, "removed")
        return
    base = pairs.base
    for name in gone:
        twin = _twin(base, name, used)
        if twin is not None:
            pairs.notices.append(f"tensor {name!r} of the base is not in the fine-tune: it is tied to {twin!r}")
        elif not is_float(base.dtype(name)):
            pairs.notices.append(f"tensor {name!r} of the base is not in the fine-tune, and stays unchanged")
        else:
            raise SourceError(
                f"{pairs.tuned.path}: lacks tensor {name!r} of the base {base.path}: leave it out to keep the "
                "base's, or take every difference (exact) to remove it"
            )


def _renaming(
    new: list[str], gone: list[str], base: Checkpoint, tuned: Checkpoint, *, exact: bool
) -> Renaming | None:
    """One prefix, left out of or added to all new names, that brings most of them to names of the base.

    If several bring equally many there, shapes decide. If these do not, there is none with ``exact``, for which content is
    compared; else it is an error.
    """
    missing = set(gone)
    ways: dict[tuple[str, ...], Renaming] = {}  # renamings that find the same tensors are one
    most = len(new) // 2
    for rename in renamings(leading_parts_by_name(new), leading_parts_by_name(gone)):
        names = tuple(name if (name := rename(old)) in missing else "" for old in new)
        if (hits := sum(map(bool, names))) > most:
            ways, most = {}, hits
        if hits == most and hits > len(new) / 2:
            ways.setdefault(names, rename)
    if most < len(new) and (several := _in_groups(new, missing, base, tuned)) is not None:
        return several
    if not ways:
        return None
    found = [rename for rename in ways.values() if rename == Renaming()] or list(ways.values())
    paired = [name for name in new if all(rename(name) in missing for rename in found)]
    try:
        return only_one(
            found, paired or new, tuned.path, option="",
            fits=lambda name, origin: origin not in missing or base.shape(origin) == tuned.shape(name),
        )  # fmt: skip
    except AmbiguousNames as error:
        if exact:
            return None
        raise AmbiguousNames(f"{error}; to compare contents instead, take every difference (exact)") from None


def _in_groups(new: list[str], missing: set[str], base: Checkpoint, tuned: Checkpoint) -> Renaming | None:
    """The renaming of each tower or other group of names that brings all new names to names of the base, if there is one."""
    try:
        return match_names(
            new, missing, tuned.path, fits=lambda name, origin: base.shape(origin) == tuned.shape(name)
        )
    except SourceError:
        return None


def _by_words(new: list[str], gone: list[str], base: Checkpoint, tuned: Checkpoint) -> dict[str, str]:
    """For new names the base's, if the words of wrappers are all that differs."""
    try:
        names = unwrapped_names(new, base, tuned.path)
    except SourceError:  # two are one: contents decide
        return {}
    missing = set(gone)
    return {name: short for short, name in names.items() if short in missing}


def _by_content(new: list[str], gone: list[str], base: Checkpoint, tuned: Checkpoint) -> dict[str, str]:
    """For each new name the base tensor with much the same content; renamed tensors before tied ones."""
    kinds: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    missing = set(gone)
    for name in (*gone, *(name for name in base if name not in missing)):
        if is_float(base.dtype(name)):
            kinds[base.dtype(name).name, base.shape(name)].append(name)
    origins: dict[str, str] = {}
    samples: dict[str, Array] = {}
    taken: set[str] = set()
    for name in new:
        sample = _sample(tuned, name)
        best, origin = 0.0, None
        for candidate in kinds.get((tuned.dtype(name).name, tuned.shape(name)), ()):
            if candidate not in samples:
                samples[candidate] = _sample(base, candidate)
            share = float((samples[candidate] == sample).mean()) if sample.size else 1.0
            # A renamed tensor has one new name; only tied weights, which are equal, have several.
            if share > best and not (candidate in taken and share < 1.0):
                best, origin = share, candidate
        if origin is not None and best >= _ALIKE:
            origins[name] = origin
            taken.add(origin)
    return origins


def _sample(checkpoint: Checkpoint, name: str) -> Array:
    """The bits of some elements, ``[n]`` unsigned."""
    size, width = numel(checkpoint.shape(name)), checkpoint.dtype(name).itemsize
    length = min(_RUN, size)
    starts = sorted({i * (size - length) // (_RUNS - 1) for i in range(_RUNS)}) if length else []
    parts = [checkpoint.part(name, start, start + length).copy() for start in starts]
    flat = as_bytes(np.concatenate(parts)) if parts else np.empty(0, np.uint8)
    return np.ascontiguousarray(flat).view(f"u{width}")


def _twin(checkpoint: Checkpoint, name: str, others: Iterable[str]) -> str | None:
    """The first of ``others`` that holds the same float values as ``name``, as tied weights do."""
    dtype, shape = checkpoint.dtype(name), checkpoint.shape(name)
    if not is_float(dtype) or numel(shape) == 0:
        return None
    sample = _sample(checkpoint, name)
    for other in others:
        alike = (checkpoint.dtype(other), checkpoint.shape(other)) == (dtype, shape)
        if (
            alike
            and np.array_equal(sample, _sample(checkpoint, other))
            and same_bits(checkpoint, name, checkpoint, other)
        ):
            return other
    return None


def _dtype(dtype: np.dtype[np.generic]) -> str:
    try:
        return dtype_name(dtype)
    except TypeError:
        return str(dtype)
