"""A reader of SHiRA adapter files 1.1 in plain Python, written from SPEC.md alone.

    python reader.py FILE [--masks DIR] [--base FILE]
    python reader.py --apply CASE

prints the content of a file, or what adapters make of a base (SPEC.md, section 11), and exits with 0, or prints
`refused: RULE: text` and exits with 1. What cannot be read at all gives `error: text` and exit 2.

It aims to be read, not to be fast: container, manifest, streams, indices, content, then applying.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import mmap
import os
import re
import stat
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate
from typing import Any

MAX_HEADER = 100_000_000
MAX_NUMEL = 2**53 - 1
MAX_DEPTH = 32
FREE_ENTRIES, ENTRIES_PER_BYTE = (
    2**24,
    64,
)  # most entries of a file: so many, and so many for each byte of its buffer
HUGE = 10**400

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
SIZES = FLOATS | {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
KNOWN_FEATURES = {"compact", "magnitude", "mask-file", "patch", "random", "runs"}
CODECS_WITH_STREAM = {"gap8", "varint", "flat", "runs", "classes"}
IMPLIED_CODECS = {"random", "magnitude"}
EXPONENT_BITS = {"F64": 11, "F32": 8, "F16": 5, "BF16": 8, "F8_E4M3": 4, "F8_E5M2": 5}

Item = dict[str, Any]


class Refused(Exception):
    """The file breaks a rule of section 10."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule = rule
        self.message = message


class BaseNeeded(Exception):
    """The file breaks no rule, but the base is needed to read it."""


def shown(name: str) -> str:
    """A name for people: strangers choose names, so no control characters, surrogates or endless lines."""
    return ascii(name if len(name) <= 80 else name[:77] + "...")


@dataclass
class Stream:
    dtype: str
    shape: list[int]
    begin: int
    end: int


Base = dict[str, tuple[str, list[int], memoryview]]  # tensors of the base by name: dtype, shape, bytes


@dataclass
class File:
    """An open file that keeps all rules of the file."""

    buffer: memoryview
    streams: dict[str, Stream]
    manifest: Item
    tensors: dict[str, Item]
    base: Base | None = None
    indices: dict[str, list[int]] = field(default_factory=dict)  # what has been decoded so far

    def bytes_of(self, name: str, digest: str) -> memoryview:
        """A stream's bytes, of which none is used before the digest is right."""
        stream = self.streams[name]
        data = self.buffer[stream.begin : stream.end]
        if hashlib.sha256(data).hexdigest() != digest:
            raise Refused("digest-mismatch", f"stream {shown(name)} has another digest")
        return data


# JSON (section 2.1)


def check_depth(text: str) -> None:
    """Count brackets before parsing, because json recurses. The quantifiers are possessive: linear time."""
    depth = 0
    for token in re.finditer(r'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', text, re.DOTALL):
        if token[0] in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"nested more than {MAX_DEPTH} deep")
        elif token[0] in "]}":
            depth -= 1


def unique_keys(pairs: list[tuple[str, Any]]) -> Item:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in an object")
    return result


def no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def integer(text: str) -> int | float:
    """int() takes quadratic time and fails above 4300 digits. No rule tells such large numbers apart."""
    if text == "-0":
        return -0.0  # a number, but no integer
    if len(text) <= 400:
        return int(text)
    return -HUGE if text.startswith("-") else HUGE


def check_unicode(text: str, value: Any) -> None:
    """Half of a surrogate pair can come from an escape alone, and then has no UTF-8."""
    if re.search(r"\\u[dD][89a-fA-F]", text):
        json.dumps(value, ensure_ascii=False).encode("utf-8")


def parse_object(data: bytes, rule: str, where: str) -> Item:
    if not (data.startswith(b"{") and data.rstrip(b" ").endswith(b"}")):
        raise Refused(rule, f"{where} does not start with {{, or more than spaces follow its }}")
    try:
        text = data.decode("utf-8")
        check_depth(text)
        value: Item = json.loads(
            text, object_pairs_hook=unique_keys, parse_constant=no_constant, parse_int=integer
        )
        check_unicode(text, value)
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError and UnicodeEncodeError are ValueErrors
        raise Refused(rule, f"{where}: {error}") from None
    return value


# The container (section 2)


def map_file(path: str, *, regular: bool = False) -> memoryview:
    """The bytes of a file; with `regular`, of nothing else: a pipe may never end."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | (getattr(os, "O_NONBLOCK", 0) if regular else 0)
    try:
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if regular and not stat.S_ISREG(status.st_mode):
                raise OSError(f"{path} is no regular file")
            if status.st_size == 0:
                return memoryview(b"")  # which cannot be mapped
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError as error:  # a zero byte or a lone surrogate in the path
        raise OSError(str(error)) from None


def split_file(data: memoryview) -> tuple[Item, memoryview]:
    """The header, parsed, and the buffer."""
    if len(data) < 8:
        raise Refused("file-truncated", f"{len(data)} bytes are too few for a header")
    (size,) = struct.unpack("<Q", data[:8])
    if size > MAX_HEADER:
        raise Refused("header-too-large", f"the header is said to have {size} bytes")
    if len(data) < 8 + size:
        raise Refused("file-truncated", f"the header has {size} bytes, the file {len(data)}")
    return parse_object(bytes(data[8 : 8 + size]), "header-json", "the header"), data[8 + size :]


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # not isinstance: True is an int


def is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 64 and all(is_count(dimension) for dimension in value)


def count_elements(shape: list[int], where: str) -> int:
    product = 1
    for dimension in shape:
        product *= max(dimension, 1)  # zeros are left out
        if product > MAX_NUMEL:
            raise Refused("shape-overflow", f"the dimensions of {where} have a product above 2^53 - 1")
    return 0 if 0 in shape else product


def read_stream_entry(name: str, entry: Any) -> Stream:
    where = f"stream {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Refused("header-entry", f"{where} is not an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not is_shape(shape):
        raise Refused("header-entry", f"{where}: dtype or shape has the wrong form")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(is_count(offset) for offset in offsets)):
        raise Refused("header-entry", f"{where}: data_offsets are not two integers >= 0")
    begin, end = offsets
    if begin > end:
        raise Refused("header-entry", f"{where}: data_offsets end before they begin")
    if dtype not in SIZES:
        raise Refused("unknown-dtype", f"{where} has the dtype {shown(dtype)}")
    if end - begin != count_elements(shape, where) * SIZES[dtype]:
        raise Refused("dtype-length", f"{where}: data_offsets do not fit dtype and shape")
    return Stream(dtype, shape, begin, end)


def check_tiling(streams: dict[str, Stream], length: int) -> None:
    at = 0
    for name, stream in sorted(streams.items(), key=lambda pair: (pair[1].begin, pair[1].end)):
        if stream.begin != at:
            raise Refused("offsets", f"stream {shown(name)} does not begin where the one before it ends")
        at = stream.end
    if length < at:
        raise Refused("file-truncated", f"the streams have {at} bytes, the buffer {length}")
    if length > at:
        raise Refused("file-trailing", f"the streams have {at} bytes, the buffer {length}")


def read_container(data: memoryview) -> tuple[dict[str, Stream], Item, memoryview]:
    header, buffer = split_file(data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Refused("header-entry", "__metadata__ does not map strings to strings")
    streams = {name: read_stream_entry(name, entry) for name, entry in header.items()}
    check_tiling(streams, len(buffer))
    return streams, metadata, buffer


# The manifest's form (section 3 and manifest.schema.json)

Form = Any  # see conform


def schema_error(text: str) -> Refused:
    return Refused("manifest-schema", text)


def conform(form: Form, value: Any, where: str) -> None:
    """A form is an object's keys (`?` marks optional ones), a list of one form, or a test with its text."""
    if isinstance(form, tuple):
        test, text = form
        if not test(value):
            raise schema_error(f"{where} is not {text}")
    elif isinstance(form, list):
        conform(LIST, value, where)
        for number, element in enumerate(value):
            conform(form[0], element, f"{where}[{number}]")
    else:
        conform(OBJECT, value, where)
        for key, inner in form.items():
            name = key.removesuffix("?")
            if name in value:
                conform(inner, value[name], f"{where}.{name}")
            elif name == key:
                raise schema_error(f"{where} lacks the key {name}")


def is_finite(value: Any) -> bool:
    """A JSON number such as 1e999, or one of 400 digits, is beyond binary64 and no strength."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_seed(text: str) -> bool:
    try:
        return len(text.encode("utf-8")) <= 4096
    except UnicodeEncodeError:
        return False


OBJECT = (lambda value: isinstance(value, dict), "an object")
LIST = (lambda value: isinstance(value, list), "a list")
TEXT = (lambda value: isinstance(value, str), "a string")
BOOLEAN = (lambda value: isinstance(value, bool), "a boolean")
INTEGER = (lambda value: type(value) is int, "an integer")
NATURAL = (is_count, "an integer >= 0")
SHAPE = (is_shape, "a list of at most 64 integers >= 0")
STRENGTH = (is_finite, "a finite number")
DIGEST = (is_digest, "a SHA-256 digest")
VALUES = (lambda value: value in ("target", "delta", "none"), "target, delta or none")
BLOCK_SIZE = (lambda value: is_count(value) and 16 <= value < 2**31, "an integer from 16 to 2^31 - 1")
FLOAT = (lambda value: isinstance(value, str) and value in FLOATS, "a float dtype")
LENGTH = (
    lambda value: value in (2, 4, 8, 16, 32, 64, 128, 256) and is_count(value),
    "a power of two from 2 to 256",
)
LOW = (lambda value: is_count(value) and value <= 45, "an integer from 0 to 45")
SEED = (lambda value: isinstance(value, str) and is_seed(value), "a string of at most 4096 bytes of UTF-8")
BAND = (lambda value: is_count(value) and value <= MAX_NUMEL, "an integer from 0 to 2^53 - 1")
KIND = (lambda value: value in ("rows", "columns", "diagonal"), "rows, columns or diagonal")

SPARSE_DIGESTS = {"indices?": DIGEST, "blocks?": DIGEST, "values?": DIGEST, "base?": DIGEST}
SPARSE_DIGESTS |= {"rows?": DIGEST, "result?": DIGEST, "entries?": DIGEST}
SPARSE = {
    "name": TEXT,
    "shape": SHAPE,
    "dtype": TEXT,
    "nnz": NATURAL,
    "values": VALUES,
    "indices": {"codec": TEXT},
    "digests": SPARSE_DIGESTS,
    "base_values?": BOOLEAN,
    "coding?": {"values?": {"codec": TEXT, "dtype?": FLOAT}, "base?": {"codec": TEXT}},
    "from?": TEXT,
    "rows?": NATURAL,
}
WHOLE = {
    "name": TEXT,
    "shape": SHAPE,
    "dtype": TEXT,
    "digests": {"values": DIGEST, "base?": DIGEST},
    "base_values?": BOOLEAN,
}
MANIFEST = {
    "tensors": [SPARSE],
    "whole?": [WHOLE],
    "alpha?": STRENGTH,
    "components?": OBJECT,
    "removed?": [TEXT],
    "mask_files?": OBJECT,
}
PARAMETERS: dict[str, Form] = {
    "gap8": {"block_size?": BLOCK_SIZE},
    "varint": {"block_size?": BLOCK_SIZE},
    "flat": {},
    "structured": {"pattern": [{"kind": KIND, "offset": INTEGER, "step?": INTEGER}]},
    "shared": {"tensor": TEXT, "file?": TEXT},
    "runs": {"length": LENGTH, "low": LOW},
    "random": {"seed": SEED, "band?": BAND},
    "magnitude": {"band?": BAND},
    "classes": {"base?": BOOLEAN},
}


DEVICES = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(COM|LPT)[0-9\u00b9\u00b2\u00b3]) *(\..*)?", re.I | re.A)


def check_file_names(names: Item, what: str) -> None:
    """Names that every common system allows for a file, and tells apart (section 3.4)."""
    for name in names:
        fits = 1 <= len(name.encode("utf-8")) <= 255 and not re.search(r'[\x00-\x1f\x7f<>:"/\\|?*]', name)
        if not fits or name[-1] in ". " or DEVICES.fullmatch(name):
            raise schema_error(f"{shown(name)} cannot name {what}")
    if len({name.encode("utf-8").lower() for name in names}) < len(names):  # of bytes, lower() changes ASCII alone
        raise schema_error(f"two names of {what} differ in case alone")


def check_maps(manifest: Item) -> None:
    """The two objects whose keys are names."""
    components, mask_files = manifest.get("components", {}), manifest.get("mask_files", {})
    check_file_names(components, "a component")
    for name, component in components.items():
        conform(OBJECT, component, f"component {shown(name)}")
    check_file_names(mask_files, "a mask file")
    for name, digest in mask_files.items():
        conform(DIGEST, digest, f"mask file {shown(name)}")


def check_parameters(item: Item, where: str) -> None:
    codec = item["indices"]["codec"]
    if codec not in PARAMETERS:
        raise Refused("unknown-codec", f"{where} has the codec {shown(codec)}")
    conform(PARAMETERS[codec], item["indices"], f"{where}: indices")
    for part in item["indices"]["pattern"] if codec == "structured" else []:
        if part["kind"] != "diagonal" and "step" not in part:
            raise schema_error(f"{where}: a part of the pattern lacks the key step")


def has_directory(item: Item) -> bool:
    indices = item["indices"]
    return indices["codec"] in ("gap8", "varint") and item["nnz"] > indices.get("block_size", math.inf)


def further_rows(item: Item) -> int:
    """How many rows the result has beyond those of the base; below 0 if rows are dropped."""
    return item["rows"] - item["shape"][0] if "rows" in item else 0


def check_version(manifest: Item) -> None:
    """What must be understood before anything else is read, in the order of section 3."""
    conform({"format_version": TEXT}, manifest, "manifest")
    version = re.fullmatch(r"(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)", manifest["format_version"])
    if version is None:
        raise schema_error("manifest.format_version is not MAJOR.MINOR")
    if version[1] != "1":
        raise Refused("unknown-major", f"format version {shown(version[0])}")
    conform({"features": [TEXT]}, manifest, "manifest")
    features = manifest["features"]
    if len(set(features)) != len(features):
        raise schema_error("manifest.features names a feature twice")
    for feature in features:
        if feature not in KNOWN_FEATURES:
            raise Refused("unknown-feature", f"feature {shown(feature)}")
    conform({"digest": TEXT}, manifest, "manifest")
    if manifest["digest"] != "sha256":
        raise Refused("unknown-digest", f"digest {shown(manifest['digest'])}")


def is_implied(item: Item) -> bool:
    return item["indices"]["codec"] in IMPLIED_CODECS or item["indices"].get("base") is True


def codec_of(item: Item, role: str) -> str | None:
    """How a stream of values is coded; None: not at all."""
    given = item.get("coding", {}).get(role)
    return None if given is None else str(given["codec"])


def check_coding(item: Item, manifest: Item, where: str) -> None:
    """Section 4.3."""
    for role, there in (("values", item["values"] != "none"), ("base", item.get("base_values", False))):
        codec = codec_of(item, role)
        if codec is None:
            continue
        if codec not in ("steps", "floats")[role == "base" :]:
            raise Refused("unknown-codec", f"{where}: {role} by the codec {shown(codec)}")
        if not there or (codec == "steps" and item["values"] != "target"):
            raise schema_error(f"{where}: {role} are not there, or no targets, and are coded")
    if item.get("coding", {}).keys() & {"values", "base"} and "compact" not in manifest["features"]:
        raise schema_error(f"{where} needs the feature compact")


def check_digest_keys(item: Item, where: str) -> None:
    """Section 4 and 6: which digests a sparse tensor must have, and must not."""
    digests, kind, with_base = item["digests"], item["values"], item.get("base_values", False)
    needed = {
        "indices": item["indices"]["codec"] in CODECS_WITH_STREAM,
        "blocks": has_directory(item),
        "values": kind != "none",
        "base": kind == "target" or with_base,
        "rows": further_rows(item) > 0,
        "entries": is_implied(item),
    }
    for role, wanted in needed.items():
        if wanted and role not in digests:
            raise schema_error(f"{where}.digests lacks {role}")
    if kind == "none" and (with_base or "values" in digests or "base" in digests):
        raise schema_error(f"{where} is a mask and has values or base values")
    if kind != "target" and "result" in digests:
        raise schema_error(f"{where} has the digest of a result, but no targets")


def check_patch(item: Item, manifest: Item, where: str) -> None:
    if ("from" in item or "rows" in item) and "patch" not in manifest["features"]:
        raise schema_error(f"{where} needs the feature patch")
    if "rows" in item:
        if item["values"] == "none":
            raise schema_error(f"{where} is a mask and has rows")
        if item["shape"] == []:
            raise schema_error(f"{where} has rows, but no dimension")
        count_elements([item["rows"], *item["shape"][1:]], f"the result of {where}")


def check_mask_reference(item: Item, manifest: Item, where: str) -> None:
    indices = item["indices"]
    if indices["codec"] == "shared" and "file" in indices:
        if "mask-file" not in manifest["features"]:
            raise schema_error(f"{where} needs the feature mask-file")
        if indices["file"] not in manifest.get("mask_files", {}):
            raise schema_error(f"{where}: mask_files lacks {shown(indices['file'])}")


def check_sparse(item: Item, manifest: Item) -> None:
    where = f"tensor {shown(item['name'])}"
    check_parameters(item, where)
    check_patch(item, manifest, where)
    check_digest_keys(item, where)
    check_mask_reference(item, manifest, where)
    check_coding(item, manifest, where)
    codec = item["indices"]["codec"]
    feature = "compact" if codec == "classes" else codec
    if codec in ("runs", "random", "magnitude", "classes") and feature not in manifest["features"]:
        raise schema_error(f"{where} needs the feature {feature}")
    if item["dtype"] not in FLOATS:
        raise Refused("sparse-dtype", f"{where} has the dtype {shown(item['dtype'])}")
    if item["nnz"] > count_elements(item["shape"], where):
        raise Refused("count-mismatch", f"{where} has more entries than elements")


def check_name(name: str, manifest: Item) -> None:
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        raise Refused("name", f"tensor {shown(name)}: a lone surrogate has no UTF-8") from None
    if not 1 <= size <= 1024 or name == "__metadata__" or re.search("[\x00-\x1f\x7f]", name):
        raise Refused("name", f"{shown(name)} cannot name a tensor")
    if "components" in manifest:
        component, _, rest = name.partition("/")
        if not rest or component not in manifest["components"]:
            raise Refused("component", f"tensor {shown(name)} belongs to no component")


def check_names(manifest: Item) -> None:
    names = [item["name"] for item in manifest["tensors"] + manifest["whole"]] + manifest.get("removed", [])
    seen: set[str] = set()
    for name in names:
        check_name(name, manifest)
        if name in seen:
            raise Refused("duplicate-name", f"tensor {shown(name)} occurs twice")
        seen.add(name)
    for item in manifest["tensors"]:
        check_name(item.get("from", item["name"]), manifest)


def check_shared_target(item: Item, tensors: dict[str, Item]) -> None:
    name = item["indices"]["tensor"]
    where = f"tensor {shown(item['name'])}: the tensor {shown(name)} whose indices it shares"
    target = tensors.get(name)
    if target is None:
        raise Refused("shared-target", f"{where} does not exist")
    if target["indices"]["codec"] == "shared":
        raise Refused("shared-target", f"{where} shares indices itself")
    if target["shape"] != item["shape"] or target["nnz"] != item["nnz"]:
        raise Refused("shared-target", f"{where} has another shape or nnz")


def read_manifest(metadata: Item) -> Item:
    if "shira" not in metadata:
        raise Refused("no-manifest", "__metadata__ has no key shira")
    text: str = metadata["shira"]
    manifest = parse_object(text.encode("utf-8"), "manifest-json", "the manifest")
    check_version(manifest)
    if metadata.get("shira_digest") != hashlib.sha256(text.encode("utf-8")).hexdigest():
        raise Refused("manifest-digest", "shira_digest is not there, or is not the digest of the manifest")
    conform(MANIFEST, manifest, "manifest")
    check_maps(manifest)
    manifest.setdefault("whole", [])
    if manifest.get("removed", []) and "patch" not in manifest["features"]:
        raise schema_error("manifest.removed needs the feature patch")
    for item in manifest["tensors"]:
        check_sparse(item, manifest)
    for item in manifest["whole"]:
        count_elements(item["shape"], f"whole tensor {shown(item['name'])}")
        if item.get("base_values", False) and "base" not in item["digests"]:
            raise schema_error(f"whole tensor {shown(item['name'])}: digests lacks base")
    check_names(manifest)
    return manifest


# The manifest against the streams (section 3.1)


@dataclass
class Expected:
    name: str
    dtypes: set[str]
    shape: list[int | None]  # None: any length
    rule: str = "count-mismatch"  # what another length breaks


def value_dtype(item: Item) -> str:
    """Of coded values."""
    return str(item["coding"]["values"].get("dtype", item["dtype"]))


def expected_of_sparse(item: Item) -> Iterator[Expected]:
    name, nnz, codec, dtype = item["name"], item["nnz"], item["indices"]["codec"], item["dtype"]
    if codec == "flat":
        yield Expected(name + "#indices", {"I64"}, [nnz])
    elif codec in CODECS_WITH_STREAM:
        yield Expected(name + "#indices", {"U8"}, [None])
    if has_directory(item):
        blocks = -(-nnz // item["indices"]["block_size"])
        yield Expected(name + "#blocks", {"I64"}, [blocks, 2], "block-directory")
    if codec_of(item, "values") is not None:
        yield Expected(name + "#values", {"U8"}, [None])
        if value_dtype(item) != dtype and not (item["values"] == "delta" and "base" in item["digests"]):
            raise Refused("stream-dtype", f"tensor {shown(name)}: values of dtype {value_dtype(item)}")
    elif item["values"] != "none":
        any_float = item["values"] == "delta" and "base" in item["digests"]
        yield Expected(name + "#values", set(FLOATS) if any_float else {dtype}, [nnz])
    if codec_of(item, "base") is not None:
        yield Expected(name + "#base", {"U8"}, [None])
    elif item.get("base_values", False):
        yield Expected(name + "#base", {dtype}, [nnz])
    if further_rows(item) > 0:
        yield Expected(name + "#rows", {dtype}, [further_rows(item), *item["shape"][1:]])


def expected_of_whole(item: Item) -> Iterator[Expected]:
    yield Expected(item["name"], {item["dtype"]}, item["shape"])
    if item.get("base_values", False):
        yield Expected(item["name"] + "#base", {item["dtype"]}, item["shape"])


def check_stream(expected: Expected, stream: Stream | None) -> None:
    where = f"stream {shown(expected.name)}"
    if stream is None:
        raise Refused("missing-stream", f"{where} is not in the file")
    if stream.dtype not in expected.dtypes or len(stream.shape) != len(expected.shape):
        raise Refused("stream-dtype", f"{where} has dtype {stream.dtype} and {len(stream.shape)} dimensions")
    if any(want not in (None, have) for want, have in zip(expected.shape, stream.shape, strict=True)):
        raise Refused(expected.rule, f"{where} has the shape {stream.shape} instead of {expected.shape}")


def check_streams(manifest: Item, streams: dict[str, Stream]) -> None:
    expected = [e for item in manifest["tensors"] for e in expected_of_sparse(item)]
    expected += [e for item in manifest["whole"] for e in expected_of_whole(item)]
    names: set[str] = set()
    for one in expected:
        if one.name in names:
            raise Refused("duplicate-name", f"two tensors need the stream {shown(one.name)}")
        names.add(one.name)
    for one in expected:
        check_stream(one, streams.get(one.name))
    for name in streams:
        if name not in names:
            raise Refused("stray-stream", f"stream {shown(name)} belongs to nothing in the manifest")


def check_limit(manifest: Item, size: int) -> None:
    """Nothing else bounds the entries of a mask without a stream: a few bytes could ask for any memory (section 8)."""
    entries, most = sum(item["nnz"] for item in manifest["tensors"]), FREE_ENTRIES + ENTRIES_PER_BYTE * size
    if entries > most:
        raise Refused("limit", f"{entries} entries, of which a buffer of {size} bytes may have {most}")


def open_file(data: memoryview, base: Base | None = None) -> File:
    """Check all rules of the file."""
    streams, metadata, buffer = read_container(data)
    manifest = read_manifest(metadata)
    tensors = {item["name"]: item for item in manifest["tensors"]}
    for item in manifest["tensors"]:
        if item["indices"]["codec"] == "shared" and "file" not in item["indices"]:
            check_shared_target(item, tensors)
    check_streams(manifest, streams)
    check_limit(manifest, len(buffer))
    return File(buffer, streams, manifest, tensors, base)


# Indices (section 5)


def gap_of_gap8(data: bytes, at: int) -> tuple[int, int]:
    """The gap whose code begins at `at`, and where the code ends."""
    gap = 0
    while at < len(data):
        byte = data[at]
        gap += byte
        at += 1
        if byte < 255:
            return gap, at
    raise Refused("stream-truncated", "ends before the last entry is complete")


def gap_of_varint(data: bytes, at: int) -> tuple[int, int]:
    gap = 0
    for place in range(8):
        if at + place >= len(data):
            raise Refused("stream-truncated", "ends before the last entry is complete")
        byte = data[at + place]
        gap |= (byte & 127) << (7 * place)
        if byte < 128:
            if byte == 0 and place > 0:
                raise Refused("varint", f"the code at {at} is longer than it must be")
            return gap, at + place + 1
    raise Refused("varint", f"the code at {at} has more than 8 bytes")


def decode_gaps(item: Item, stream: memoryview, directory: memoryview | None) -> list[int]:
    data = bytes(stream)
    gap_of = gap_of_gap8 if item["indices"]["codec"] == "gap8" else gap_of_varint
    numel = count_elements(item["shape"], "")
    block_size: int = item["indices"]["block_size"] if directory is not None else MAX_NUMEL
    indices: list[int] = []
    rows: list[bytes] = []
    position = at = 0
    while len(indices) < item["nnz"]:
        start = at
        gap, at = gap_of(data, at)
        index = position + gap
        if index >= numel:
            raise Refused("out-of-range", f"entry {len(indices)} is at {index} of {numel}")
        if len(indices) % block_size == 0:
            rows.append(struct.pack("<qq", index, start))
        indices.append(index)
        position = index + 1
    if at < len(data):
        raise Refused("stream-trailing", f"{len(data) - at} bytes follow the last entry")
    if directory is not None and b"".join(rows) != directory:
        raise Refused("block-directory", "the block directory does not fit the stream")
    return indices


def decode_flat(item: Item, stream: memoryview) -> list[int]:
    indices = [index for (index,) in struct.iter_unpack("<q", stream)]
    numel = count_elements(item["shape"], "")
    before = -1
    for index in indices:
        if not 0 <= index < numel:
            raise Refused("out-of-range", f"index {index} of {numel}")
        if index <= before:
            raise Refused("duplicate" if index == before else "unsorted", f"index {index} follows {before}")
        before = index
    return indices


def decode_runs(item: Item, stream: memoryview) -> list[int]:
    data, nnz, length, low = bytes(stream), item["nnz"], item["indices"]["length"], item["indices"]["low"]
    numel = count_elements(item["shape"], "")
    count = -(-nnz // length)
    plane = -(-count * low // 8)  # bytes of the low bits

    def bit(at: int) -> int:
        return data[at // 8] >> at % 8 & 1

    if len(data) < plane:
        raise Refused("stream-truncated", "ends within the low bits")
    if any(bit(at) for at in range(count * low, 8 * plane)):
        raise Refused("stream-trailing", "a bit follows the last low bit")
    indices: list[int] = []
    run, at = -1, 8 * plane
    for number in range(count):
        high = 0
        while at < 8 * len(data) and not bit(at):
            high, at = high + 1, at + 1
        if at == 8 * len(data):
            raise Refused("stream-truncated", f"ends after {number} of {count} runs")
        at += 1
        run += 1 + (high << low) + sum(bit(number * low + place) << place for place in range(low))
        if run * length >= numel:
            raise Refused("out-of-range", f"run {run} of {-(-numel // length)}")
        indices.extend(range(run * length, min((run + 1) * length, numel)))
    if any(bit(place) for place in range(at, 8 * len(data))) or len(data) > -(-at // 8):
        raise Refused("stream-trailing", "bits follow the last run")
    if len(indices) != nnz:
        raise Refused("count-mismatch", f"the runs have {len(indices)} entries, nnz is {nnz}")
    return indices


def list_part(part: Item, rows: int, columns: int, nnz: int) -> Iterator[int]:
    """The flat indices of one part, of which there are at most nnz."""
    kind, offset, step = part["kind"], part["offset"], part.get("step", 1)
    if kind == "diagonal":
        if not -rows < offset < columns:
            raise Refused("pattern", f"there is no diagonal {offset}")
        first = max(0, -offset)
        size = max(0, min(rows, columns - offset) - first)
    else:
        count = rows if kind == "rows" else columns
        if not (1 <= step <= MAX_NUMEL and 0 <= offset < step and offset < count):
            raise Refused("pattern", f"there are no {kind} from {offset} in steps of {step}")
        chosen = range(offset, count, step)
        size = -(-(count - offset) // step) * (columns if kind == "rows" else rows)
    if size > nnz:
        raise Refused("count-mismatch", f"a part of the pattern has {size} entries, nnz is {nnz}")
    if size == 0:  # a loop over rows of no columns could last for years
        return iter(())
    if kind == "diagonal":
        return (row * columns + row + offset for row in range(first, first + size))
    if kind == "rows":
        return (row * columns + column for row in chosen for column in range(columns))
    return (row * columns + column for row in range(rows) for column in chosen)


def list_pattern(item: Item) -> list[int]:
    shape, nnz, pattern = item["shape"], item["nnz"], item["indices"]["pattern"]
    if len(pattern) > 8:
        raise Refused("pattern", f"the pattern has {len(pattern)} parts")
    rows = shape[0] if shape else 1
    columns = count_elements(shape[1:], "")
    parts = [list_part(part, rows, columns, nnz) for part in pattern]
    union: set[int] = set()
    for part in parts:
        union.update(part)
    if len(union) != nnz:
        raise Refused("count-mismatch", f"the pattern has {len(union)} entries, nnz is {nnz}")
    return sorted(union)


def mixed(word: int) -> int:
    """The finaliser of SplitMix64, on 64 bits."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def permuted(seed: str, size: int, number: int) -> int:
    """Where the permutation of section 5.7 takes a number below `size`."""
    keys = struct.unpack("<4Q", hashlib.sha256(seed.encode("utf-8")).digest())
    bits = max(2, (size - 1).bit_length())
    b = bits // 2
    a = bits - b
    while True:
        left, right = number >> b, number % 2**b
        for key, width in zip(keys, (a, b, a, b), strict=True):
            left, right = right, left ^ mixed((right + key) % 2**64) >> 64 - width
        number = left << b | right
        if number < size:
            return number


def magnitude(bits: bytes) -> int:
    """The bits of a float without the sign, as an integer."""
    return int.from_bytes(bits, "little") & (1 << 8 * len(bits) - 1) - 1


def implied_indices(file: File, item: Item) -> list[int]:
    numel, nnz, reference = count_elements(item["shape"], ""), item["nnz"], item["indices"]
    first = reference.get("band", 0) * nnz
    if first + nnz > numel:
        raise Refused("count-mismatch", f"the band ends at {first + nnz} of {numel}")
    if reference["codec"] == "random":
        indices = sorted(permuted(reference["seed"], numel, number) for number in range(first, first + nnz))
        rule = "digest-mismatch"
    else:
        values = base_tensor(file, item)
        ranked = sorted(range(numel), key=lambda index: (-magnitude(values[index]), index))
        indices = sorted(ranked[first : first + nnz])
        rule = "base-mismatch"
    check_entries(item, indices, rule)
    return indices


def check_entries(item: Item, indices: list[int], rule: str) -> None:
    if hashlib.sha256(struct.pack(f"<{len(indices)}q", *indices)).hexdigest() != item["digests"]["entries"]:
        raise Refused(rule, "the entries are not those of the digest")


def base_tensor(file: File, item: Item) -> list[bytes]:
    """The elements of the base's tensor that the item is about."""
    if file.base is None:
        raise BaseNeeded(f"tensor {shown(item['name'])}: its entries follow from the base: give --base")
    found = file.base.get(str(item.get("from", item["name"])))
    if found is None or (found[0], found[1]) != (item["dtype"], item["shape"]):
        raise Refused("base-mismatch", "the base has no such tensor, or of another dtype or shape")
    width = SIZES[item["dtype"]]
    return [bytes(found[2][at : at + width]) for at in range(0, len(found[2]), width)]


def open_base(path: str) -> Base:
    streams, _, buffer = read_container(map_file(path))
    return {name: (one.dtype, one.shape, buffer[one.begin : one.end]) for name, one in streams.items()}


# The coder (section 5.10)


class Front:
    """The bits in front of a coded stream, the counts and the words after them."""

    def __init__(self, data: memoryview) -> None:
        self.data = bytes(data)
        self.at = 0  # in bits, and from the counts on in bytes
        self.split = self.take(3)

    def take(self, width: int) -> int:
        value = 0
        for place in range(width):
            if self.at == 8 * len(self.data):
                raise Refused("stream-truncated", "ends in its front")
            value |= (self.data[self.at // 8] >> self.at % 8 & 1) << place
            self.at += 1
        return value

    def bounds(self) -> list[int]:
        count = self.take(6)
        bounds = [self.take(12) for _ in range(count + 1)]
        if count == 0 or any(one >= other for one, other in zip(bounds, bounds[1:], strict=False)):
            raise Refused("coder", "the bounds do not increase")
        return bounds

    def table(self) -> list[tuple[int, int, int]]:
        """Of each of the 4096 places the token, its frequency and the place's number within the token."""
        first, count = self.take(12), self.take(8) + 1
        frequencies = []
        for _ in range(count):
            length = self.take(4)
            kept = min(max(length - 1, 0), 3)
            frequencies.append((1 << kept | self.take(kept)) << length - 1 - kept if length else 0)
        last = first + count - 1
        if not 1 <= sum(frequencies) <= 4096 or last >= 4096 or (last >> self.split) - 1 + self.split > 61:
            raise Refused("coder", "a table has a wrong sum or too large tokens")
        frequencies[frequencies.index(max(frequencies))] += 4096 - sum(frequencies)
        return [
            (first + token, frequency, place)
            for token, frequency in enumerate(frequencies)
            for place in range(frequency)
        ]

    def counts(self, blocks: int, more: int = 0) -> list[int]:
        """How many words each block has, and the further counts; the words are split to :attr:`blocks`."""
        if self.take(-self.at % 8):
            raise Refused("coder", "the front is not filled up with zeros")
        at = self.at // 8
        if len(self.data) - at < blocks + more:
            raise Refused("stream-truncated", "ends in its counts")
        counts = []
        for _ in range(blocks + more):
            count, end = gap_of_varint(self.data, at)
            if end - at > 5:
                raise Refused("varint", "a count of more than 5 bytes")
            counts.append(count)
            at = end
        if any(count < 2 for count in counts[:blocks]):
            raise Refused("coder-state", "a block has fewer than two words")
        left, expected = len(self.data) - at, 2 * sum(counts[:blocks])
        if left != expected:
            rule = "stream-truncated" if left < expected else "stream-trailing"
            raise Refused(rule, f"has {left} bytes of words instead of {expected}")
        words = struct.unpack(f"<{left // 2}H", self.data[at:])
        ends = list(accumulate(counts[:blocks]))
        self.blocks = [words[end - count : end] for end, count in zip(ends, counts, strict=False)]
        return counts[blocks:]


class Block:
    def __init__(self, words: tuple[int, ...], split: int) -> None:
        self.words, self.split, self.at = words, split, 2
        self.x = words[0] + words[1] * 2**16
        self.wrong = False
        if self.x < 2**16:
            raise Refused("coder-state", "a block begins in a state that no step leaves")

    def refill(self) -> None:
        if self.x < 2**16:
            self.wrong |= self.at >= len(self.words)
            self.x = self.x * 2**16 + (0 if self.wrong else self.words[self.at])
            self.at += 1

    def bits(self, width: int) -> int:
        value = 0
        for place in range(0, width, 16):
            some = min(width - place, 16)
            value |= self.x % 2**some << place
            self.x >>= some
            self.refill()
        return value

    def number(self, table: list[tuple[int, int, int]]) -> int:
        token, frequency, place = table[self.x % 4096]
        self.x = frequency * (self.x // 4096) + place
        self.refill()
        if token < 2 ** (self.split + 1):
            return token
        rest = (token >> self.split) - 1
        return (1 << self.split | token & (1 << self.split) - 1) << rest | self.bits(rest)

    def end(self) -> None:
        if self.wrong or self.x != 2**16 or self.at != len(self.words):
            raise Refused("coder-state", "a block does not end as it should")


def exponent_class(value: bytes, dtype: str) -> int:
    bits = EXPONENT_BITS[dtype]
    return (1 << bits) - 1 - (magnitude(value) >> 8 * len(value) - 1 - bits)


def context_of(bounds: list[int], number: int) -> int | None:
    for context in range(len(bounds) - 1):
        if bounds[context] <= number < bounds[context + 1]:
            return context
    return None


def decode_classes(item: Item, stream: memoryview, base: list[bytes] | None) -> list[int]:
    nnz, shape, numel = item["nnz"], item["shape"], count_elements(item["shape"], "")
    if nnz == 0:
        if len(stream):
            raise Refused("stream-trailing", "has bytes for no entries")
        return []
    front = Front(stream)
    power, lines = front.take(6), front.take(1)
    if not 12 <= power <= (45 if base is None and not lines else 20):
        raise Refused("coder", f"blocks of 2^{power} elements")
    rows = shape[0] if shape else 1
    columns = count_elements(shape[1:], "")
    if lines and rows + columns > 2**24:
        raise Refused("coder", f"{rows} rows and {columns} columns")
    bounds = front.bounds()
    line_tables = [front.table() for _ in range(2 * lines)]
    tables = [front.table() for _ in bounds[1:]]
    ahead, blocks = -(-(rows + columns) // 4096) * lines, -(-numel // 2**power)
    entries = front.counts(ahead + blocks, blocks)
    if sum(entries) != nnz:
        raise Refused("count-mismatch", f"the blocks have {sum(entries)} entries, nnz is {nnz}")
    numbers = decode_lines(front, line_tables, rows, columns) if lines else []
    indices: list[int] = []
    for number, words in enumerate(front.blocks[ahead:]):
        members: list[list[int]] = [[] for _ in tables]
        start, stop = number * 2**power, min((number + 1) * 2**power, numel)
        scanned = base is not None or lines
        for index in range(start, stop) if scanned else ():
            of = 0 if base is None else exponent_class(base[index], item["dtype"])
            if lines:
                row, column = numbers[index // columns], numbers[rows + index % columns]
                if row == 0 or column == 0:
                    continue
                of += row + column
            context = context_of(bounds, of)
            if context is not None:
                members[context].append(index)
        block = Block(words, front.split)
        found: list[int] = []
        for table, inside in zip(tables, members, strict=True):
            rank = -1
            while step := block.number(table):
                rank += step
                if len(found) == entries[number]:
                    raise Refused("count-mismatch", "a block has more entries than its count says")
                found.append(start + rank if not scanned else inside[rank] if rank < len(inside) else numel)
        if len(found) != entries[number]:
            raise Refused("count-mismatch", "a block has fewer entries than its count says")
        block.end()
        if any(index >= stop for index in found):
            raise Refused("impossible" if base is None else "base-mismatch", "a rank beyond the last element")
        indices += sorted(found)
    if base is not None:
        check_entries(item, indices, "base-mismatch")
    return indices


def decode_lines(front: Front, tables: list[list[tuple[int, int, int]]], rows: int, columns: int) -> list[int]:
    numbers: list[int] = []
    while len(numbers) < rows + columns:
        block = Block(front.blocks[len(numbers) // 4096], front.split)
        for at in range(len(numbers), min(len(numbers) + 4096, rows + columns)):
            numbers.append(block.number(tables[at >= rows]))
        block.end()
    if max(numbers, default=0) > 63:
        raise Refused("coder", "a row or column has a number above 63")
    return numbers


def decode_steps(item: Item, stream: memoryview, base: list[bytes]) -> bytes:
    """The targets; the base's values are at the entries."""
    front, width, nnz = Front(stream), SIZES[item["dtype"]], item["nnz"]
    power = block_power(front)
    bounds = front.bounds()
    tables = [front.table() for _ in bounds[1:]]
    front.counts(-(-nnz // 2**power))
    top, found = 2 ** (8 * width - 1), []
    for number, words in enumerate(front.blocks):
        block = Block(words, front.split)
        for own in base[number * 2**power : (number + 1) * 2**power]:
            context = context_of(bounds, exponent_class(own, item["dtype"]))
            if context is None:
                raise Refused("impossible", "a base value is in no context")
            size = magnitude(own)
            sign = int.from_bytes(own, "little") - size
            step = block.number(tables[context])
            if step == 0:
                sign = top - sign
                step = block.number(tables[context])
                if step == 0:
                    raise Refused("impossible", "a sign changes twice")
            if step > 1:
                size += 1 - step if block.bits(1) else step - 1
            if not 0 <= size < top:
                raise Refused("impossible", "a step leads to no float")
            found.append((sign + size).to_bytes(width, "little"))
        block.end()
    return b"".join(found)


def decode_floats(stream: memoryview, dtype: str, nnz: int) -> bytes:
    front, width = Front(stream), SIZES[dtype]
    power, table = block_power(front), front.table()
    mantissa = 8 * width - 1 - EXPONENT_BITS[dtype]
    front.counts(-(-nnz // 2**power))
    if nnz * (mantissa + 1) > 16 * sum(map(len, front.blocks)):
        raise Refused("coder-state", "too few words")
    found = []
    for number, words in enumerate(front.blocks):
        block = Block(words, front.split)
        for _ in range(min(2**power, nnz - number * 2**power)):
            exponent, low = block.number(table), block.bits(mantissa + 1)
            if exponent >= 2 ** EXPONENT_BITS[dtype]:
                raise Refused("impossible", f"an exponent of {exponent}")
            sign, low = low >> mantissa, low % 2**mantissa
            found.append((sign << 8 * width - 1 | exponent << mantissa | low).to_bytes(width, "little"))
        block.end()
    return b"".join(found)


def block_power(front: Front) -> int:
    power = front.take(5)
    if not 4 <= power <= 20:
        raise Refused("coder", f"blocks of 2^{power} values")
    return power


def base_bytes(file: File, item: Item) -> bytes:
    """The base's values that the file holds."""
    name, digest = item["name"] + "#base", item["digests"]["base"]
    if codec_of(item, "base") is None:
        return bytes(file.bytes_of(name, digest))
    stream = file.streams[name]
    data = file.buffer[stream.begin : stream.end]
    if item["nnz"] == 0 and len(data):
        raise Refused("stream-trailing", "has bytes for no values")
    found = decode_floats(data, item["dtype"], item["nnz"]) if item["nnz"] else b""
    if hashlib.sha256(found).hexdigest() != digest:
        raise Refused("digest-mismatch", "the base's values have another digest")
    return found


def value_bytes(file: File, item: Item, indices: list[int], base: bytes | None) -> bytes:
    stream = file.bytes_of(item["name"] + "#values", item["digests"]["values"])
    codec = codec_of(item, "values")
    if codec is None:
        return bytes(stream)
    if item["nnz"] == 0:
        if len(stream):
            raise Refused("stream-trailing", "has bytes for no values")
        return b""
    if codec == "floats":
        return decode_floats(stream, value_dtype(item), item["nnz"])
    if base is None:
        tensor = base_tensor(file, item)
        base = b"".join(tensor[index] for index in indices)
        if hashlib.sha256(base).hexdigest() != item["digests"]["base"]:
            raise Refused("base-mismatch", "the base has other values at the entries")
    width = SIZES[item["dtype"]]
    return decode_steps(item, stream, [base[at : at + width] for at in range(0, len(base), width)])


def own_indices(file: File, item: Item) -> list[int]:
    """The indices of a tensor that is not `shared`; each tensor is decoded once."""
    name, codec, digests = item["name"], item["indices"]["codec"], item["digests"]
    if name not in file.indices:
        if codec == "structured":
            file.indices[name] = list_pattern(item)
        elif codec in IMPLIED_CODECS:
            file.indices[name] = implied_indices(file, item)
        else:
            stream = file.bytes_of(name + "#indices", digests["indices"])
            if codec == "flat":
                file.indices[name] = decode_flat(item, stream)
            elif codec == "runs":
                file.indices[name] = decode_runs(item, stream)
            elif codec == "classes":
                base = base_tensor(file, item) if item["indices"].get("base", False) else None
                file.indices[name] = decode_classes(item, stream, base)
            else:
                blocks = file.bytes_of(name + "#blocks", digests["blocks"]) if has_directory(item) else None
                file.indices[name] = decode_gaps(item, stream, blocks)
    return file.indices[name]


def open_mask_file(file: File, name: str, folder: str) -> File:
    where = f"mask file {shown(name)}"
    try:
        data = map_file(os.path.join(folder, name), regular=True)
    except OSError as error:
        raise Refused("mask-file", f"{where}: {error}") from None
    if hashlib.sha256(data).hexdigest() != file.manifest["mask_files"][name]:
        raise Refused("mask-file", f"{where} has another digest")
    try:
        return open_file(data, file.base)
    except Refused as refused:
        raise Refused(refused.rule, f"{where}: {refused.message}") from None


def find_indices(file: File, item: Item, folder: str, masks: dict[str, File]) -> list[int]:
    reference = item["indices"]
    if reference["codec"] != "shared":
        return own_indices(file, item)
    if "file" in reference:
        if reference["file"] not in masks:
            masks[reference["file"]] = open_mask_file(file, reference["file"], folder)
        file = masks[reference["file"]]
        check_shared_target(item, file.tensors)
    return own_indices(file, file.tensors[reference["tensor"]])


def check_dropped(item: Item, indices: list[int]) -> None:
    """No entry may lie in a row that the result lacks. The indices increase, so the last one decides."""
    if further_rows(item) < 0 and indices:
        limit = count_elements([item["rows"], *item["shape"][1:]], "")
        if indices[-1] >= limit:
            raise Refused("out-of-range", f"index {indices[-1]}, of which the result keeps {limit}")


# The content (section 11)


def hex_of(file: File, name: str, digest: str) -> str:
    return file.bytes_of(name, digest).hex()


def dtype_of_values(file: File, item: Item) -> str:
    return value_dtype(item) if codec_of(item, "values") else file.streams[item["name"] + "#values"].dtype


def sparse_content(file: File, item: Item, folder: str, masks: dict[str, File]) -> Item:
    name, digests = item["name"], item["digests"]
    with_values, with_base = item["values"] != "none", item.get("base_values", False)
    try:
        base = base_bytes(file, item) if with_base else None
        rows = hex_of(file, name + "#rows", digests["rows"]) if further_rows(item) > 0 else None
        indices = find_indices(file, item, folder, masks)
        check_dropped(item, indices)
        values = value_bytes(file, item, indices, base) if with_values else None
    except Refused as refused:
        raise Refused(refused.rule, f"tensor {shown(name)}: {refused.message}") from None
    content = {
        "name": name,
        "shape": item["shape"],
        "dtype": item["dtype"],
        "values": item["values"],
        "nnz": item["nnz"],
        "indices": indices,
        "value_dtype": dtype_of_values(file, item) if with_values else None,
        "value_hex": None if values is None else values.hex(),
        "base_hex": None if base is None else base.hex(),
        "base_digest": digests.get("base"),
    }
    if rows is not None:
        content["rows_hex"] = rows
    if "result" in digests:
        content["result_digest"] = digests["result"]
    if item.get("from", name) != name:
        content["from"] = item["from"]
    if "rows" in item:
        content["rows"] = item["rows"]
    return content


def whole_content(file: File, item: Item) -> Item:
    name, digests = item["name"], item["digests"]
    stream = file.streams[name]
    return {
        "name": name,
        "shape": stream.shape,
        "dtype": stream.dtype,
        "value_hex": hex_of(file, name, digests["values"]),
        "base_hex": hex_of(file, name + "#base", digests["base"]) if item.get("base_values", False) else None,
        "base_digest": digests.get("base"),
    }


def read(path: str, masks: str | None = None, base: str | None = None) -> Item:
    """The content of the file, after all rules; `masks` is the folder of its mask files, if not its own, and `base` a
    safetensors file with the tensors that it was made for."""
    folder = os.path.dirname(path) if masks is None else masks
    opened: dict[str, File] = {}
    data = map_file(path)
    try:
        file = open_file(data, None if base is None else open_base(base))
        content = {
            "format_version": file.manifest["format_version"],
            "alpha": file.manifest.get("alpha", 1),
            "tensors": [sparse_content(file, item, folder, opened) for item in file.manifest["tensors"]],
            "whole": [whole_content(file, item) for item in file.manifest["whole"]],
        }
        if "removed" in file.manifest:
            content["removed"] = file.manifest["removed"]
        return content
    except Refused as refused:
        raise Refused(refused.rule, f"{path}: {refused.message}") from None


# Applying (section 4.1)

Number = int | float
Weight = tuple[str, list[int], bytes]  # dtype, shape, bytes
MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E5M2": 2}  # bits
BIAS = {"F64": 1023, "F32": 127, "F16": 15, "BF16": 127, "F8_E4M3": 7, "F8_E5M2": 15}
NAN = {"F64": 0x7FF8 << 48, "F32": 0x7FC0 << 16, "F16": 0x7E00, "BF16": 0x7FC0, "F8_E4M3": 0x7F, "F8_E5M2": 0x7E}
LARGEST = {"F8_E4M3": Fraction(448)}  # its last code is NaN's; of the others the last exponent is that of infinity


def working_type(dtype: str) -> str:
    return "F64" if dtype == "F64" else "F32"


def decoded(bits: int, dtype: str) -> float:
    """The value of these bits; each is a binary64 number."""
    mantissa, width = MANTISSA[dtype], 8 * FLOATS[dtype]
    sign = -1.0 if bits >> (width - 1) else 1.0
    exponent, fraction = bits >> mantissa & (1 << (width - 1 - mantissa)) - 1, bits & (1 << mantissa) - 1
    if dtype == "F8_E4M3":
        if bits & 0x7F == 0x7F:
            return math.nan
    elif exponent == (1 << (width - 1 - mantissa)) - 1:
        return math.nan if fraction else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(fraction, 1 - BIAS[dtype] - mantissa)
    return sign * math.ldexp(fraction + (1 << mantissa), exponent - BIAS[dtype] - mantissa)


def rounded(exact: Fraction, dtype: str) -> float:
    """The nearest value of the dtype, of two the one whose last bit is 0; beyond the largest an infinity, or NaN without one."""
    mantissa, least = MANTISSA[dtype], 1 - BIAS[dtype]
    size, sign = abs(exact), -1.0 if exact < 0 else 1.0
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, least) - mantissa)
    near = round(size / unit) * unit  # Python rounds ties to even
    largest = LARGEST.get(dtype, (2 - Fraction(1, 2**mantissa)) * 2 ** BIAS[dtype])
    if near > largest:
        return math.nan if dtype in LARGEST else sign * math.inf
    return sign * float(near)


def encoded(value: float, dtype: str) -> int:
    """The bits of a value that the dtype holds exactly."""
    mantissa, width = MANTISSA[dtype], 8 * FLOATS[dtype]
    if math.isnan(value):
        return NAN[dtype]
    sign = (1 << (width - 1)) if math.copysign(1.0, value) < 0 else 0
    if math.isinf(value):
        return sign | ((1 << (width - 1 - mantissa)) - 1) << mantissa
    units = Fraction(abs(value)) / Fraction(2) ** (1 - BIAS[dtype] - mantissa)  # of the smallest value
    exponent: int = max(0, units.numerator.bit_length() - 1 - mantissa)
    return sign | (exponent << mantissa) + (units.numerator >> exponent)


def fl_add(a: float, b: float, work: str) -> float:
    """The sum, rounded; infinities, NaN and the signs of zeros are those of binary64."""
    plain = a + b
    if not (math.isfinite(a) and math.isfinite(b)) or Fraction(a) + Fraction(b) == 0:
        return plain
    return rounded(Fraction(a) + Fraction(b), work)


def fl_times(a: float, b: float, work: str) -> float:
    plain = a * b
    if not (math.isfinite(a) and math.isfinite(b)) or a == 0 or b == 0:
        return plain
    return rounded(Fraction(a) * Fraction(b), work)


def fl(value: float, dtype: str) -> float:
    """A binary64 value in another dtype."""
    if math.isinf(value) and dtype in LARGEST:
        return math.nan
    return value if value == 0 or not math.isfinite(value) else rounded(Fraction(value), dtype)


@dataclass
class Change:
    """What one adapter does to a tensor at a strength that is not 0."""

    kind: str
    strength: float
    dtype: str  # of the values
    values: dict[int, int]  # bits by index


def applied_bits(base: int, dtype: str, change: Change, index: int) -> int:
    """What an element becomes under one adapter alone."""
    work = working_type(dtype)
    strength, value = fl(change.strength, work), change.values[index]
    if strength == 0:
        return base
    if change.kind == "target" and strength == 1:
        return value
    b, v = decoded(base, dtype), decoded(value, change.dtype)
    step = fl_add(v, -b, work) if change.kind == "target" else fl(v, work)
    return encoded(fl(fl_add(b, fl_times(strength, step, work), work), dtype), dtype)


def mixed_bits(base: int, dtype: str, changes: list[Change], index: int) -> int:
    """What an element becomes under several adapters; Python's floats are binary64."""
    steps = []
    b = decoded(base, dtype)
    for change in changes:
        v = decoded(change.values[index], change.dtype)
        steps.append(change.strength * (v - b if change.kind == "target" else v))
    total = 0.0
    for step in sorted(steps, key=lambda step: math.inf if math.isnan(step) else step):
        total += step
    return encoded(fl(b + total, dtype), dtype)


def split(data: bytes, size: int) -> list[int]:
    return [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]


def misfit(text: str) -> Refused:
    return Refused("base-mismatch", text)


def base_weight(item: Item, indices: list[int], base: dict[str, Weight]) -> Weight:
    """The base's tensor that an item of `tensors` starts from, after all checks."""
    name = str(item.get("from", item["name"]))
    digests = item["digests"]
    if name not in base:
        raise misfit(f"the base has no tensor {shown(name)}")
    dtype, shape, data = base[name]
    any_float = item["values"] == "delta" and "base" not in digests and further_rows(item) <= 0
    if shape != item["shape"] or not (dtype == item["dtype"] or (any_float and dtype in FLOATS)):
        raise misfit(f"tensor {shown(name)} has the dtype {dtype} and the shape {shape}")
    size = FLOATS[dtype]
    entries = b"".join(data[index * size : (index + 1) * size] for index in indices)
    if "base" in digests and hashlib.sha256(entries).hexdigest() != digests["base"]:
        raise misfit(f"tensor {shown(name)} has other values at the entries")
    return base[name]


def applied_rows(file: File, item: Item, weight: Weight) -> Weight:
    """A tensor with the rows that a patch adds, and without those that it drops."""
    if "rows" not in item:
        return weight
    dtype, shape, data = weight
    kept = [item["rows"], *shape[1:]]
    data = data[: count_elements(kept, "") * FLOATS[dtype]]
    if further_rows(item) > 0:
        data += file.bytes_of(item["name"] + "#rows", item["digests"]["rows"])
    return dtype, kept, data


def check_whole(item: Item, base: dict[str, Weight]) -> None:
    if "base" in item["digests"]:
        dtype, shape, data = base.get(item["name"], ("", [], b""))
        alike = dtype == item["dtype"] and shape == item["shape"]
        if not alike or hashlib.sha256(data).hexdigest() != item["digests"]["base"]:
            raise misfit(f"the base has another tensor {shown(item['name'])}, or none")


def apply(adapters: list[tuple[File, float]], base: dict[str, Weight], folder: str = "") -> dict[str, Weight]:
    """The base under adapters, each with its strength; everything is checked before anything is computed."""
    changes: dict[str, list[Change]] = {}
    wholes: dict[str, Weight] = {}
    patched: list[tuple[File, Item]] = []
    for file, strength in adapters:
        if not is_finite(strength):
            raise Refused("strength", f"{strength} is not finite")
        if strength == 0:
            continue
        is_patch = any("from" in item or "rows" in item for item in file.manifest["tensors"])
        if (is_patch or file.manifest.get("removed")) and len(adapters) > 1:
            raise Refused("conflict", "a patch is applied alone")
        for item in file.manifest["tensors"]:
            if item["values"] == "none":
                raise Refused("not-applicable", f"tensor {shown(item['name'])} is a mask")
            indices = find_indices(file, item, folder, {})
            check_dropped(item, indices)
            dtype = base_weight(item, indices, base)[0]
            if math.isinf(fl(float(strength), working_type(dtype))):
                raise Refused("strength", f"{strength} is infinite in {working_type(dtype)}")
            stored = base_bytes(file, item) if item.get("base_values", False) else None
            of_values = dtype_of_values(file, item)
            values = split(bytes(value_bytes(file, item, indices, stored)), FLOATS[of_values])
            change = Change(item["values"], float(strength), of_values, dict(zip(indices, values, strict=True)))
            changes.setdefault(item["name"], []).append(change)
            patched.append((file, item))
        for item in file.manifest["whole"]:
            check_whole(item, base)
            new = (item["dtype"], item["shape"], bytes(file.bytes_of(item["name"], item["digests"]["values"])))
            if wholes.setdefault(item["name"], new) != new:
                raise Refused("conflict", f"two adapters replace {shown(item['name'])} by other values")
        for name in file.manifest.get("removed", []):
            if name not in base:
                raise misfit(f"the base has no tensor {shown(name)} to remove")
    if both := changes.keys() & wholes.keys():
        raise Refused("conflict", f"one adapter changes {shown(min(both))}, another one replaces it")
    result = dict(base) | wholes
    for name in (name for file, strength in adapters if strength for name in file.manifest.get("removed", [])):
        del result[name]
    for file, item in patched:
        origin = str(item.get("from", item["name"]))
        dtype, shape, data = base[origin]
        bits = split(data, FLOATS[dtype])
        own = changes[item["name"]]
        for index in {index for change in own for index in change.values}:
            here = [change for change in own if index in change.values]
            new_bits = (
                applied_bits(bits[index], dtype, here[0], index)
                if len(here) == 1
                else mixed_bits(bits[index], dtype, here, index)
            )
            data = (
                data[: index * FLOATS[dtype]]
                + new_bits.to_bytes(FLOATS[dtype], "little")
                + data[(index + 1) * FLOATS[dtype] :]
            )
        result[item["name"]] = applied_rows(file, item, (dtype, shape, data))
    return result


def undo(result: dict[str, Weight], file: File, folder: str = "") -> dict[str, Weight]:
    """The base from what one adapter made of it, by the base's values in the file; nothing is computed."""
    base = dict(result)
    for item in file.manifest["tensors"]:
        dtype, shape, data = base[item["name"]]
        size, values = FLOATS[dtype], base_bytes(file, item)
        changed = bytearray(data)
        for place, index in enumerate(find_indices(file, item, folder, {})):
            changed[index * size : (index + 1) * size] = values[place * size : (place + 1) * size]
        base[item["name"]] = dtype, shape, bytes(changed)
    for item in file.manifest["whole"]:
        if item.get("base_values", False):
            stored = file.bytes_of(item["name"] + "#base", item["digests"]["base"])
            base[item["name"]] = item["dtype"], item["shape"], bytes(stored)
        else:
            del base[item["name"]]  # the base had none
    return base


def weights_of(tensors: Item) -> dict[str, Weight]:
    return {name: (one["dtype"], one["shape"], bytes.fromhex(one["hex"])) for name, one in tensors.items()}


def as_json(weights: dict[str, Weight]) -> Item:
    return {name: {"dtype": w[0], "shape": w[1], "hex": w[2].hex()} for name, w in weights.items()}


def run_case(path: str) -> Item:
    """A case of `vectors/apply` (section 11): what the adapters make of the base, parts of it, and the base again."""
    with open(path, "rb") as text:
        case = json.load(text)
    folder = os.path.dirname(path)
    base = weights_of(case["base"])
    views = {name: (dtype, shape, memoryview(data)) for name, (dtype, shape, data) in base.items()}
    files = [open_file(map_file(os.path.join(folder, one["file"])), views) for one in case["adapters"]]
    strengths = [
        one.get("alpha", file.manifest.get("alpha", 1)) for one, file in zip(case["adapters"], files, strict=True)
    ]
    result = apply(list(zip(files, strengths, strict=True)), base, folder)
    found: Item = {"result": as_json(result), "slices": []}
    for part in case.get("slices", []):
        dtype, _, data = result[part["name"]]
        found["slices"].append(data[part["begin"] * SIZES[dtype] : part["end"] * SIZES[dtype]].hex())
    undone = undo(result, files[0], folder) if case.get("undo_from_file") else base
    return found | {"undone": as_json(undone)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Print the content of a SHiRA adapter file as JSON.")
    parser.add_argument("file")
    parser.add_argument("--base", metavar="FILE", help="safetensors file of the base, if it is needed")
    parser.add_argument("--masks", metavar="DIR", help="where the mask files are; default: beside FILE")
    parser.add_argument(
        "--apply", action="store_true", help="FILE is a case of vectors/apply: print what it asks for"
    )
    arguments = parser.parse_args()
    try:
        case = arguments.apply
        content = run_case(arguments.file) if case else read(arguments.file, arguments.masks, arguments.base)
    except Refused as refused:
        print(f"refused: {refused}", file=sys.stderr)
        return 1
    except (OSError, BaseNeeded) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
