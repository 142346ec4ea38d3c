"""Checks of all sparse tensors of a manifest together: a file of 10 000 tensors opens several times as fast.

Items that differ in name, shape, number of entries and digests alone are alike: the first of them is checked as any item is, and of the
others only these four are, column by column. Nothing is refused here: where anything is unusual, and maybe wrong, the items are to be
looked at one by one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter, le
from typing import Any

from shira_format._core.dtypes import FLOATS
from shira_format.errors import FormatError
from shira_format.format.codecs import CODECS
from shira_format.format.codecs.base import Streams
from shira_format.format.items import CONTROL, DIGESTS, SparseEntry, check_indices, parse_sparse, stream_name
from shira_format.tensors import MAX_NUMEL, MAX_RANK

_SHORT = 256  # characters of a name, which take 1024 bytes at most


@dataclass(frozen=True, slots=True)
class Alike:
    """Items that are alike.

    Attributes:
        first: the first of them.
        names: of all.
        nnz: of all.
        streams: those of the index codec, by number of entries.
    """

    first: SparseEntry
    names: list[str]
    nnz: list[int]
    streams: Mapping[int, Streams]

    def fitting(self, found: Mapping[str, tuple[str, tuple[int, ...]]]) -> int | None:
        """How many streams they have, if each of these is there as it should be; else None.

        Args:
            found: dtype and shape of each array of the file.
        """
        number = 0
        for name, dtypes, shape in self._expected():
            form = found.get(name)
            if form is None or form[0] not in dtypes:
                return None
            if form[1] != shape if shape is not None else len(form[1]) != 1:
                return None
            number += 1
        return number

    def _expected(self) -> Iterator[tuple[str, Collection[str], tuple[int, ...] | None]]:
        """Name, dtypes and shape (None: one dimension of any size) of each stream."""
        first = self.first
        for name, count in zip(self.names, self.nnz, strict=True):
            for role, (dtype, shape) in self.streams[count].items():
                yield stream_name(name, role), (dtype,), shape
        guarded = first.values == "delta" and "base" in first.digests  # deltas may have another dtype then
        for role, there in (("values", first.values != "none"), ("base", first.base_values)):
            if role in first.coding:
                fits = guarded or first.coding[role].get("dtype", first.dtype) == first.dtype
                for name in self.names:
                    yield stream_name(name, role), ("U8",) if fits else (), None
            elif there:
                dtypes: Collection[str] = FLOATS if guarded and role == "values" else (first.dtype,)
                for name, count in zip(self.names, self.nnz, strict=True):
                    yield stream_name(name, role), dtypes, (count,)
        if first.new_rows:  # a patch, which is alone
            yield stream_name(first.name, "rows"), (first.dtype,), (first.new_rows, *first.shape[1:])


def alike(raw: Mapping[str, Any]) -> list[Alike] | None:
    """The items of ``tensors`` by kind, if nothing can be wrong with them but that names lack a component; else None.

    Args:
        raw: the manifest, of which version and features have been checked.
    """
    kinds: dict[Any, list[dict[str, Any]]] = {}
    try:
        items = raw["tensors"]
        for kind, item in zip(_kinds(items), items, strict=True):
            kinds.setdefault(kind, []).append(item)
        found = [_checked(some) for some in kinds.values()]
        known = [one for one in found if one is not None]
        names = [name for one in known for name in one.names]
        good = len(known) == len(found) and _are_names(names) and _features_fit(known, raw)
    except (AttributeError, FormatError, KeyError, TypeError):
        return None
    return known if good else None


_OWN = {"shared": "tensor"} | {codec.name: codec.own_text for codec in CODECS.values() if codec.own_text}


def _kinds(items: list[dict[str, Any]]) -> Iterable[tuple[Any, ...]]:
    """The same of items that are alike, of no other.

    As text where JSON has values that are equal in Python alone.
    """
    indices = list(map(itemgetter("indices"), items))
    told = [
        repr(one if (own := _OWN.get(one["codec"])) is None else {k: v for k, v in one.items() if k != own})
        for one in indices
    ]
    more = [[repr(item[key]) if key in item else None for item in items] for key in ("base_values", "coding")]
    patches = [item["name"] if "from" in item or "rows" in item else None for item in items]
    columns = (map(itemgetter(key), items) for key in ("dtype", "values"))
    return zip(*columns, told, map(tuple, map(itemgetter("digests"), items)), *more, patches, strict=True)


def _checked(items: list[dict[str, Any]]) -> Alike | None:
    """Items of one kind; None if anything is unusual.

    Raises:
        FormatError: something is wrong.
    """
    first = parse_sparse(items[0])
    names, shapes, nnz, digests = (
        list(map(itemgetter(key), items)) for key in ("name", "shape", "nnz", "digests")
    )
    if not (_are(str, names) and _are(list, shapes) and _are(int, nnz) and _are(dict, digests)):
        return None
    if not _are(int, chain.from_iterable(shapes)) or min(chain.from_iterable(shapes), default=1) < 1:
        return None
    sizes = list(map(math.prod, shapes))
    if max(map(len, shapes)) > MAX_RANK or max(sizes) > MAX_NUMEL or min(nnz) < 0 or not all(map(le, nnz, sizes)):
        return None
    codec = CODECS.get(first.codec)
    of_count: dict[int, Streams] = {n: {} if codec is None else codec.streams(first.indices, n) for n in set(nnz)}
    if codec is None or codec.own_text is not None:
        for item in items:
            check_indices(item["indices"], item["name"])
    given = first.digests.keys() & set(DIGESTS)
    if not set(chain.from_iterable(of_count.values())) <= given:
        return None
    good = all(_are_digests(list(map(itemgetter(role), digests))) for role in given)
    return Alike(first, names, nnz, of_count) if good else None


def _are(kind: type, values: Iterable[Any]) -> bool:
    return set(map(type, values)) <= {kind}


def _are_digests(values: list[Any]) -> bool:
    hexadecimal = _are(str, values) and not "".join(values).encode().translate(None, b"0123456789abcdef")
    return hexadecimal and set(map(len, values)) == {64}


def _are_names(names: list[str]) -> bool:
    """Whether they can name tensors of a file without components, and none is there twice."""
    distinct, lengths = set(names), set(map(len, names))
    return (
        len(distinct) == len(names)
        and "__metadata__" not in distinct
        and min(lengths, default=1) > 0
        and max(lengths, default=1) <= _SHORT
        and not CONTROL.search("".join(names))
    )


def _features_fit(kinds: list[Alike], raw: Mapping[str, Any]) -> bool:
    """Whether the features that they need are listed, and those that share indices may."""
    features, items = raw["features"], {item["name"]: item for item in raw["tensors"]}
    for kind in kinds:
        first = kind.first
        if first.feature is not None and first.feature not in features:
            return False
        if (first.coding and "compact" not in features) or (first.is_patch and "patch" not in features):
            return False
        if first.codec == "shared" and not all(_may_share(items[name], items, raw) for name in kind.names):
            return False
    return True


def _may_share(item: dict[str, Any], items: Mapping[str, dict[str, Any]], raw: Mapping[str, Any]) -> bool:
    indices = item["indices"]
    if "file" in indices:
        return "mask-file" in raw["features"] and indices["file"] in raw["mask_files"]
    other = items[indices["tensor"]]
    same = other["shape"] == item["shape"] and other["nnz"] == item["nnz"]
    return bool(same and other["indices"]["codec"] != "shared")
