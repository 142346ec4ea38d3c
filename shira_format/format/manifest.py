"""The manifest of an adapter file (spec, sections 3 to 7), checked and typed."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from shira_format._core.dtypes import FLOATS
from shira_format._core.strict_json import is_uint, parse_object
from shira_format.errors import FormatError
from shira_format.format.codecs import CODECS
from shira_format.format.fields import (
    check_file_names,
    digests,
    flag,
    is_digest,
    is_finite,
    items,
    need,
    optional,
    strings,
)
from shira_format.format.provenance import leave_out_misfits
from shira_format.tensors import MAX_RANK, TOO_LARGE, ValueKind, is_too_large, numel

FORMAT_VERSION = "1.0"
NEWER = {
    "compact": "1.1",
    "magnitude": "1.1",
    "random": "1.1",
    "runs": "1.1",
}  # the version that brought a feature, of those that are not in FORMAT_VERSION
MAJOR = 1
METADATA_KEY = "shira"
DIGEST_KEY = "shira_digest"
# Most entries of a file: so many, and so many for each byte of its buffer. Without it a few bytes could ask for any memory.
FREE_ENTRIES, ENTRIES_PER_BYTE = 1 << 24, 64
FEATURES = frozenset({"mask-file", "patch", *NEWER})
DIGEST = "sha256"
# What a writer derives from the tensors; all other keys of a manifest are copied.
DERIVED = frozenset({"format_version", "features", "digest", "mask_files", "tensors", "whole"})
ROLES = ("indices", "blocks", "values", "base", "rows")
DIGESTS = (*ROLES, "entries", "result")

VALUE_CODECS = {"values": ("steps", "floats"), "base": ("floats",)}  # of the streams that may be coded

_VERSION = re.compile(r"(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


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


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checked manifest; ``raw`` is the JSON object, with unknown keys, without provenance of another form than section 7's."""

    raw: dict[str, Any]
    tensors: dict[str, SparseEntry]
    whole: dict[str, DenseEntry]
    removed: tuple[str, ...]

    def stream_names(self) -> Iterator[str]:
        """All streams that the file must have."""
        for entry in self.tensors.values():
            yield from (stream_name(entry.name, role) for role in entry.streams())
        for whole in self.whole.values():
            yield whole.name
            if whole.base_values:
                yield stream_name(whole.name, "base")


def stream_name(name: str, role: str) -> str:
    """The safetensors name of a stream: ``NAME#role``."""
    return f"{name}#{role}"


def parse_manifest(text: str, digest: str | None = None) -> Manifest:
    """Parse and check the manifest of a file.

    Args:
        text: the manifest.
        digest: what the file gives as the text's SHA-256; None: it is not compared.

    Raises:
        FormatError: a rule of sections 3 to 5 that can be checked without the streams is broken.
    """
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError("manifest-json", "it has lone surrogates, which UTF-8 cannot encode") from None
    raw = parse_object(data, "manifest-json")
    _check_version(raw)
    if digest is not None and digest != hashlib.sha256(data).hexdigest():
        raise FormatError("manifest-digest", f"the manifest is damaged ({DIGEST_KEY!r} is missing or differs)")
    tensors = [_sparse(item) for item in items(raw, "tensors", required=True)]
    whole = [_whole(item) for item in items(raw, "whole")]
    _check_strength(raw)
    _check_mask_files(raw)
    components = _components(raw)
    removed = tuple(strings(raw, "removed"))
    names = [entry.name for entry in tensors] + [entry.name for entry in whole] + list(removed)
    for name in (*names, *(entry.base_name for entry in tensors)):
        check_name(name, components)
    manifest = Manifest(raw, {t.name: t for t in tensors}, {w.name: w for w in whole}, removed)
    _check_distinct(names, "tensor name")
    if (removed or any(entry.is_patch for entry in tensors)) and "patch" not in raw["features"]:
        raise FormatError("manifest-schema", "'from', 'rows' or 'removed' without the feature 'patch'")
    _check_distinct(manifest.stream_names(), "stream name")
    for entry in tensors:
        if (feature := entry.feature) is not None and feature not in raw["features"]:
            raise FormatError("manifest-schema", f"the codec {entry.codec!r} without the feature {feature!r}", tensor=entry.name)  # fmt: skip
        if entry.coding and "compact" not in raw["features"]:
            raise FormatError("manifest-schema", "coded values without the feature 'compact'", tensor=entry.name)
        if entry.codec == "shared":
            _check_shared(entry, manifest)
    leave_out_misfits(raw)
    return manifest


def check_name(name: str, components: Mapping[str, Any] | None) -> None:
    """Raise FormatError unless ``name`` may name a tensor (spec, sections 3.3 and 3.4)."""
    try:
        length = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        length = 0
    if not 1 <= length <= 1024 or _CONTROL.search(name) or name == "__metadata__":
        raise FormatError("name", f"{name[:80]!r} cannot name a tensor")
    component, slash, rest = name.partition("/")
    if components is not None and not (slash and rest and component in components):
        raise FormatError(
            "component", f"the name does not start with one of the components {list(components)}", tensor=name
        )


def _check_version(raw: Mapping[str, Any]) -> None:
    version = need(raw, "format_version", str)
    if not (match := _VERSION.fullmatch(version)):
        raise FormatError("manifest-schema", f"format_version {version!r} is not MAJOR.MINOR")
    if match[1] != str(MAJOR):
        raise FormatError("unknown-major", f"format version {version}; this reader knows {MAJOR}.x")
    features = strings(raw, "features", required=True)
    if len(set(features)) != len(features):
        raise FormatError("manifest-schema", "a feature is listed twice")
    if unknown := [feature for feature in features if feature not in FEATURES]:
        raise FormatError(
            "unknown-feature", f"the file needs {', '.join(map(repr, unknown))}, which this reader does not know"
        )
    algorithm = need(raw, "digest", str)
    if algorithm != DIGEST:
        raise FormatError("unknown-digest", f"digests by {algorithm!r}; this reader knows {DIGEST}")


def _sparse(item: Any) -> SparseEntry:
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
    indices = need(item, "indices", dict, name)
    _check_indices(indices, name)
    entry = SparseEntry(
        name, shape, dtype, nnz, cast(ValueKind, values), indices,
        digests(item, name, DIGESTS), flag(item, "base_values", name),
        need(item, "from", str, name) if "from" in item else name, _rows(item, shape), _coding(item), item,
    )  # fmt: skip
    _check_digests(entry)
    return entry


def _shape(item: dict[str, Any], name: str) -> tuple[int, ...]:
    shape = need(item, "shape", list, name)
    if len(shape) > MAX_RANK or not all(is_uint(n) for n in shape):
        raise FormatError("manifest-schema", f"shape {shape} is not a list of dimensions", tensor=name)
    if is_too_large(tuple(shape)):
        raise FormatError("shape-overflow", f"shape {shape}: {TOO_LARGE}", tensor=name)
    return tuple(shape)


def _coding(item: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """How streams of values are coded (spec, section 4.3)."""
    name, found = item["name"], {}
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
        found[role] = given
    return found


def _rows(item: dict[str, Any], shape: tuple[int, ...]) -> int | None:
    if "rows" not in item:
        return None
    if not is_uint(item["rows"]) or not shape or item["values"] == "none":
        raise FormatError("manifest-schema", f"rows {item['rows']!r:.80}", tensor=item["name"])
    if is_too_large((item["rows"], *shape[1:])):
        raise FormatError("shape-overflow", f"the shape of the result: {TOO_LARGE}", tensor=item["name"])
    return int(item["rows"])


def _check_indices(indices: Mapping[str, Any], name: str) -> None:
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


def _whole(item: Any) -> DenseEntry:
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


def _check_shared(entry: SparseEntry, manifest: Manifest) -> None:
    target, file = entry.indices["tensor"], entry.indices.get("file")
    if file is not None:
        if "mask-file" not in manifest.raw["features"] or file not in manifest.raw.get("mask_files", {}):
            raise FormatError("manifest-schema", f"the mask file {file!r} is not declared", tensor=entry.name)
        return
    other = manifest.tensors.get(target)
    if other is None:
        raise FormatError("shared-target", f"no tensor {target!r} to share indices with", tensor=entry.name)
    check_shared_target(entry, other)


def check_shared_target(entry: SparseEntry, other: SparseEntry) -> None:
    """Raise FormatError unless ``entry`` can have the indices of ``other`` (spec, section 5.5)."""
    if other.codec == "shared":
        reason = f"{other.name!r} shares its own indices"
    elif (other.shape, other.nnz) != (entry.shape, entry.nnz):
        reason = f"{other.name!r} has shape {list(other.shape)} and {other.nnz} entries"
    else:
        return
    raise FormatError("shared-target", reason, tensor=entry.name)


def _components(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if "components" not in raw:
        return None
    components = cast(dict[str, Any], need(raw, "components", dict))
    check_file_names(components, "a component")
    for name, value in components.items():
        if not isinstance(value, dict):
            raise FormatError("manifest-schema", f"the component {name!r} is not an object")
    return components


def _check_strength(raw: Mapping[str, Any]) -> None:
    if "alpha" in raw and not (type(raw["alpha"]) in (int, float) and is_finite(raw["alpha"])):
        raise FormatError("manifest-schema", "'alpha' is not a finite number")


def _check_mask_files(raw: Mapping[str, Any]) -> None:
    files = optional(raw, "mask_files", dict) or {}
    check_file_names(files, "a mask file")
    for name, digest in files.items():
        if not is_digest(digest):
            raise FormatError("manifest-schema", f"the digest of the mask file {name!r} is not 64 hex digits")


def _check_distinct(names: Any, what: str) -> None:
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise FormatError("duplicate-name", f"the {what} {twice!r} occurs twice", tensor=twice)
