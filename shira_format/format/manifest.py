"""The manifest of an adapter file (spec, sections 3 to 7), checked and typed."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from shira_format._core.strict_json import parse_object
from shira_format.adapter import LazyMapping
from shira_format.errors import FormatError
from shira_format.format.alike import Alike, alike
from shira_format.format.fields import check_file_names, is_digest, is_finite, items, need, optional, strings
from shira_format.format.items import (
    DenseEntry,
    SparseEntry,
    check_name,
    check_shared_target,
    parse_sparse,
    parse_whole,
    sparse_entry,
    stream_name,
)
from shira_format.format.provenance import leave_out_misfits
from shira_format.storage import safetensors_header

FORMAT_VERSION = "1.0"
NEWER = {
    "compact": "1.1",
    "magnitude": "1.1",
    "random": "1.1",
    "runs": "1.1",
}  # the version that brought a feature, of those that are not in FORMAT_VERSION
MAJOR = 1
METADATA_KEY = safetensors_header.METADATA_KEY
DIGEST_KEY = "shira_digest"
# Most entries of a file: so many, and so many for each byte of its buffer. Without it a few bytes could ask for any memory.
FREE_ENTRIES, ENTRIES_PER_BYTE = 1 << 24, 64
FEATURES = frozenset({"mask-file", "patch", *NEWER})
DIGEST = "sha256"
# What a writer derives from the tensors; all other keys of a manifest are copied.
DERIVED = frozenset({"format_version", "features", "digest", "mask_files", "tensors", "whole"})

_VERSION = re.compile(r"(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checked manifest.

    Attributes:
        raw: the JSON object, with unknown keys, without provenance of another form than section 7's.
        tensors: the items of ``tensors`` by name.
        whole: those of ``whole``.
        removed: as listed.
        kinds: the items of ``tensors`` by kind, if they could be checked together.
        digest: SHA-256 of the text.
    """

    raw: dict[str, Any]
    tensors: Mapping[str, SparseEntry]
    whole: Mapping[str, DenseEntry]
    removed: tuple[str, ...]
    kinds: list[Alike] | None
    digest: str

    def stream_names(self) -> Iterator[str]:
        """All streams that the file must have."""
        for entry in self.tensors.values():
            yield from (stream_name(entry.name, role) for role in entry.streams())
        for whole in self.whole.values():
            yield whole.name
            if whole.base_values:
                yield stream_name(whole.name, "base")

    @property
    def nnz(self) -> int:
        """Entries of all sparse tensors."""
        if self.kinds is not None:
            return sum(sum(kind.nnz) for kind in self.kinds)
        return sum(entry.nnz for entry in self.tensors.values())


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
    own_digest = hashlib.sha256(data).hexdigest()
    if digest is not None and digest != own_digest:
        raise FormatError("manifest-digest", f"the manifest is damaged ({DIGEST_KEY!r} is missing or differs)")
    listed = items(raw, "tensors", required=True)
    kinds = alike(raw)
    # One by one, unless they were checked together; then one of each kind stands for all.
    entries = [parse_sparse(item) for item in listed] if kinds is None else [kind.first for kind in kinds]
    whole = [parse_whole(item) for item in items(raw, "whole")]
    _check_strength(raw)
    _check_mask_files(raw)
    components = _components(raw)
    removed = tuple(strings(raw, "removed"))
    names = [item["name"] for item in listed] + [entry.name for entry in whole] + list(removed)
    for name in names[len(listed) if kinds is not None and components is None else 0 :]:
        check_name(name, components)
    for entry in entries:
        check_name(entry.base_name, components)
    _check_distinct(names, "tensor name")
    if (removed or any(entry.is_patch for entry in entries)) and "patch" not in raw["features"]:
        raise FormatError("manifest-schema", "'from', 'rows' or 'removed' without the feature 'patch'")
    tensors: Mapping[str, SparseEntry] = {entry.name: entry for entry in entries}
    if kinds is not None:
        by_name = {item["name"]: item for item in listed}
        tensors = LazyMapping(by_name, lambda name: sparse_entry(by_name[name]))
    manifest = Manifest(raw, tensors, {entry.name: entry for entry in whole}, removed, kinds, own_digest)
    if kinds is None or any("#" in entry.name for entry in whole):  # else streams differ as tensors do
        _check_distinct(list(manifest.stream_names()), "stream name")
    if kinds is None:
        for entry in entries:
            _check_features(entry, manifest)
    leave_out_misfits(raw)
    return manifest


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


def _check_features(entry: SparseEntry, manifest: Manifest) -> None:
    features = manifest.raw["features"]
    if (feature := entry.feature) is not None and feature not in features:
        raise FormatError("manifest-schema", f"the codec {entry.codec!r} without the feature {feature!r}", tensor=entry.name)  # fmt: skip
    if entry.coding and "compact" not in features:
        raise FormatError("manifest-schema", "coded values without the feature 'compact'", tensor=entry.name)
    if entry.codec == "shared":
        _check_shared(entry, manifest)


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


def _check_distinct(names: list[str], what: str) -> None:
    if len(set(names)) == len(names):
        return
    twice = next(name for name, count in Counter(names).items() if count > 1)
    raise FormatError("duplicate-name", f"the {what} {twice!r} occurs twice", tensor=twice)
