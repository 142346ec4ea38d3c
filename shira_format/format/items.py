"""The items of a manifest's ``tensors`` and ``whole`` (spec, sections 3.3 to 5), checked one by one and typed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shira_format._core.dtypes import FLOATS
from shira_format._core.strict_json import is_uint
from shira_format.errors import FormatError
from shira_format.format.codecs import CODECS
from shira_format.format.fields import digests, flag, need
from shira_format.tensors import MAX_RANK, TOO_LARGE, ValueKind, is_too_large, numel

ROLES = ("indices", "blocks", "values", "base", "rows")
DIGESTS = (*ROLES, "entries", "result")

VALUE_CODECS = {"values": ("steps", "floats"), "base": ("floats",)}  # of the streams that may be coded

CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class SparseEntry:
    """One item of ``tensors``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nnz: int
    values: ValueKind
    indices: Mapping[str, Any]
    digests: Mapping[str, str]
    base_values: bool
    base_name: str
    rows: int | None
    coding: Mapping[str, Mapping[str, Any]]
    raw: Mapping[str, Any]

    @property
    def is_patch(self) -> bool:
        """Whether the item needs the feature ``patch``."""
        return "from" in self.raw or self.rows is not None

    @property
    def result_shape(self) -> tuple[int, ...]:
        """The shape of the result; see :attr:`SparseTensor.result_shape`."""
        return self.shape if self.rows is None else (self.rows, *self.shape[1:])

    @property
    def new_rows(self) -> int:
        """The number of rows in the stream ``#rows``."""
        return max(0, self.rows - self.shape[0]) if self.rows is not None else 0

    @property
    def codec(self) -> str:
        """The index codec's name."""
        return str(self.indices["codec"])

    @property
    def needs_base(self) -> bool:
        """Whether the base is needed to read its own indices or its values; indices that it shares are not looked at."""
        codec = CODECS.get(self.codec)
        steps = self.value_codec("values") == "steps" and not self.base_values
        return steps or (codec is not None and codec.needs_base(self.indices))

    def value_codec(self, role: str) -> str | None:
        """By which codec the stream of values is coded; None: not at all."""
        return str(self.coding[role]["codec"]) if role in self.coding else None

    @property
    def feature(self) -> str | None:
        """The feature that the index codec needs."""
        codec = CODECS.get(self.codec)
        return None if codec is None else codec.feature

    @property
    def is_implied(self) -> bool:
        """Whether something else than the file says what the indices are; see :class:`IndexCodec`."""
        codec = CODECS.get(self.codec)
        return codec is not None and codec.is_implied(self.indices)

    def index_streams(self) -> dict[str, tuple[str, tuple[int, ...] | None]]:
        """The streams of the index codec, if it has any; see :meth:`IndexCodec.streams`."""
        codec = CODECS.get(self.codec)
        return {} if codec is None else codec.streams(self.indices, self.nnz)

    def streams(self) -> Iterator[str]:
        """The roles of this tensor's streams, as in ``NAME#role``."""
        yield from self.index_streams()
        if self.values != "none":
            yield "values"
        if self.base_values:
            yield "base"
        if self.new_rows:
            yield "rows"


@dataclass(frozen=True, slots=True)
class DenseEntry:
    """One item of ``whole``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    digests: Mapping[str, str]
    base_values: bool
    raw: Mapping[str, Any]


def stream_name(name: str, role: str) -> str:
    """The safetensors name of a stream: ``NAME#role``."""
    return f"{name}#{role}"


def check_name(name: str, components: Mapping[str, Any] | None) -> None:
    """Raise FormatError unless ``name`` may name a tensor (spec, sections 3.3 and 3.4)."""
    try:
        length = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        length = 0
    if not 1 <= length <= 1024 or CONTROL.search(name) or name == "__metadata__":
        raise FormatError("name", f"{name[:80]!r} cannot name a tensor")
    component, slash, rest = name.partition("/")
    if components is not None and not (slash and rest and component in components):
        raise FormatError(
            "component", f"the name does not start with one of the components {list(components)}", tensor=name
        )


def parse_sparse(item: Any) -> SparseEntry:
    """Check an item of ``tensors``, as far as other items do not matter.

    Raises:
        FormatError: a rule of sections 3 to 5 is broken.
    """
    if not isinstance(item, dict):
        raise FormatError("manifest-schema", "an item of 'tensors' is not an object")
    name = need(item, "name", str)
    shape = _shape(item, name)
    dtype = need(item, "dtype", str, name)
    if dtype not in FLOATS:
        raise FormatError("sparse-dtype", f"dtype {dtype!r} is not a float dtype", tensor=name)
    nnz = need(item, "nnz", int, name)
    if nnz < 0:
        raise FormatError("manifest-schema", f"nnz {nnz}", tensor=name)
    if nnz > numel(shape):
        raise FormatError("count-mismatch", f"nnz {nnz} in a tensor of {numel(shape)}", tensor=name)
    values = need(item, "values", str, name)
    if values not in ("target", "delta", "none"):
        raise FormatError("manifest-schema", f"values {values!r}", tensor=name)
    check_indices(need(item, "indices", dict, name), name)
    digests(item, name, DIGESTS)
    flag(item, "base_values", name)
    if "from" in item:
        need(item, "from", str, name)
    _check_rows(item, shape)
    _check_coding(item)
    entry = sparse_entry(item)
    _check_digests(entry)
    return entry


def sparse_entry(item: dict[str, Any]) -> SparseEntry:
    """An item of ``tensors`` that has been checked, typed."""
    coding = item.get("coding", {})
    return SparseEntry(
        item["name"], tuple(item["shape"]), item["dtype"], item["nnz"], item["values"], item["indices"], item["digests"],
        item.get("base_values", False), item.get("from", item["name"]), item.get("rows"),
        {role: coding[role] for role in VALUE_CODECS if role in coding}, item,
    )  # fmt: skip


def _shape(item: dict[str, Any], name: str) -> tuple[int, ...]:
    shape = need(item, "shape", list, name)
    if len(shape) > MAX_RANK or not all(is_uint(n) for n in shape):
        raise FormatError("manifest-schema", f"shape {shape} is not a list of dimensions", tensor=name)
    if is_too_large(tuple(shape)):
        raise FormatError("shape-overflow", f"shape {shape}: {TOO_LARGE}", tensor=name)
    return tuple(shape)


def _check_coding(item: dict[str, Any]) -> None:
    """How streams of values are coded (spec, section 4.3)."""
    name = item["name"]
    for role, given in (need(item, "coding", dict, name) if "coding" in item else {}).items():
        if role not in VALUE_CODECS:
            continue
        if not isinstance(given, dict):
            raise FormatError("manifest-schema", f"the coding of {role} is not an object", tensor=name)
        if (codec := need(given, "codec", str, name)) not in VALUE_CODECS[role]:
            raise FormatError("unknown-codec", f"{role} by the codec {codec!r}", tensor=name)
        there = item["values"] != "none" if role == "values" else item.get("base_values") is True
        if not there or (codec == "steps" and item["values"] != "target"):
            raise FormatError("manifest-schema", f"the codec {codec!r} for {role} that are not there or no targets", tensor=name)  # fmt: skip
        if "dtype" in given and need(given, "dtype", str, name) not in FLOATS:
            raise FormatError("manifest-schema", f"values of dtype {given['dtype']!r}", tensor=name)


def _check_rows(item: dict[str, Any], shape: tuple[int, ...]) -> None:
    if "rows" not in item:
        return
    if not is_uint(item["rows"]) or not shape or item["values"] == "none":
        raise FormatError("manifest-schema", f"rows {item['rows']!r:.80}", tensor=item["name"])
    if is_too_large((item["rows"], *shape[1:])):
        raise FormatError("shape-overflow", f"the shape of the result: {TOO_LARGE}", tensor=item["name"])


def check_indices(indices: Mapping[str, Any], name: str) -> None:
    """Check the object ``indices`` of the tensor ``name``, as far as no stream is needed; raises FormatError."""
    codec = need(indices, "codec", str, name)
    if codec == "shared":
        need(indices, "tensor", str, name)
        if "file" in indices:
            need(indices, "file", str, name)
        return
    if codec not in CODECS:
        raise FormatError("unknown-codec", f"index codec {codec!r}; known: {', '.join([*CODECS, 'shared'])}", tensor=name)  # fmt: skip
    CODECS[codec].check_params(indices, name)


def _check_digests(entry: SparseEntry) -> None:
    needed = set(entry.streams())
    if entry.values == "target":
        needed.add("base")
    if entry.is_implied:
        needed.add("entries")
    if missing := needed - entry.digests.keys():
        raise FormatError("manifest-schema", f"digests lack {', '.join(sorted(missing))}", tensor=entry.name)
    if entry.values == "none" and (entry.base_values or {"values", "base"} & entry.digests.keys()):
        raise FormatError("manifest-schema", "a mask with values", tensor=entry.name)
    if entry.values != "target" and "result" in entry.digests:
        raise FormatError("manifest-schema", "a result digest without target values", tensor=entry.name)


def parse_whole(item: Any) -> DenseEntry:
    """Check an item of ``whole``; see :func:`parse_sparse`."""
    if not isinstance(item, dict):
        raise FormatError("manifest-schema", "an item of 'whole' is not an object")
    name = need(item, "name", str)
    entry = DenseEntry(
        name, _shape(item, name), need(item, "dtype", str, name), digests(item, name, ("values", "base")),
        flag(item, "base_values", name), item,
    )  # fmt: skip
    needed = {"values", "base"} if entry.base_values else {"values"}
    if missing := needed - entry.digests.keys():
        raise FormatError("manifest-schema", f"digests lack {', '.join(sorted(missing))}", tensor=name)
    return entry


def check_shared_target(entry: SparseEntry, other: SparseEntry) -> None:
    """Raise FormatError unless ``entry`` can have the indices of ``other`` (spec, section 5.5)."""
    if other.codec == "shared":
        reason = f"{other.name!r} shares its own indices"
    elif (other.shape, other.nnz) != (entry.shape, entry.nnz):
        reason = f"{other.name!r} has shape {list(other.shape)} and {other.nnz} entries"
    else:
        return
    raise FormatError("shared-target", reason, tensor=entry.name)
