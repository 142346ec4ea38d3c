"""The header of a safetensors file: read and checked, and written (spec, section 2)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import sub
from typing import Any, cast

import numpy as np

from shira_format._core.dtypes import DTYPES, dtype_name
from shira_format._core.strict_json import is_uint, parse_object
from shira_format.errors import FormatError
from shira_format.tensors import MAX_RANK, TOO_LARGE, is_too_large, numel

MAX_HEADER = 100_000_000

Form = tuple[str, tuple[int, ...]]  # dtype and shape


@dataclass(frozen=True, slots=True)
class Stream:
    """One array of a file: dtype, shape and byte range in the buffer."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.end - self.begin


class Header(Mapping[str, Stream]):
    """What a header says of the arrays, checked, in its order; a :class:`Stream` is made when it is asked for.

    Attributes:
        metadata: the strings of ``__metadata__``.
        forms: dtype and shape of each array by name.
    """

    def __init__(
        self, metadata: dict[str, str], forms: dict[str, Form], begins: Sequence[int], ends: Sequence[int]
    ) -> None:
        """Args: ``begins``: where in the buffer each array begins; ``ends``: where it ends."""
        self.metadata = metadata
        self.forms = forms
        self._begins, self._ends = begins, ends

    @cached_property
    def _spans(self) -> dict[str, tuple[int, int]]:
        return dict(zip(self.forms, zip(self._begins, self._ends, strict=True), strict=True))

    def __getitem__(self, name: str) -> Stream:
        return Stream(*self.forms[name], *self._spans[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)

    def __len__(self) -> int:
        return len(self.forms)

    def __contains__(self, name: object) -> bool:
        return name in self.forms


def parse_header(text: bytes | bytearray, buffer_size: int) -> Header:
    """Check the header of a file whose buffer has so many bytes.

    Raises:
        FormatError: a rule of section 2 is broken.
    """
    found = _parse_usual(text, buffer_size)
    return _parse_any(text, buffer_size) if found is None else found


def _parse_any(text: bytes | bytearray, buffer_size: int) -> Header:
    """Look at one array after the other."""
    header = parse_object(text, "header-json")
    metadata, streams = _metadata(header), _streams(header, buffer_size)
    forms = {name: (stream.dtype, stream.shape) for name, stream in streams.items()}
    begins, ends = [one.begin for one in streams.values()], [one.end for one in streams.values()]
    return Header(metadata, forms, begins, ends)


METADATA_KEY = "shira"  # of the metadata: an adapter's manifest
_METADATA = '{"__metadata__":'
_PAIRS = json.JSONDecoder(object_pairs_hook=list)
_UINT = "(?:0|[1-9][0-9]{0,15})"
_SHAPE = re.compile(f"(?:{_UINT}(?:,{_UINT})*)?")
_FORM = re.compile(r'([A-Z0-9_]*)","shape":\[([0-9,]*)')
# One array with the comma or brace after it, as the safetensors package and we write it; whoever else writes otherwise.
_ENTRY = re.compile(
    rf'"([^"\\\x00-\x1f]*+)":\{{"dtype":"([^\]]*+)\],"data_offsets":\[({_UINT}),({_UINT})\]\}}(?:,(?=")|\}}\Z)'
)


def _parse_usual(text: bytes | bytearray, buffer_size: int) -> Header | None:
    """Look at all arrays together; None if anything is unusual, and maybe wrong.

    A header of 25 000 arrays takes a quarter of the time that way.
    """
    try:
        usual = text.decode().rstrip(" ")
        metadata, at = _metadata_ahead(usual)
    except (ValueError, RecursionError):
        return None
    pieces = _ENTRY.split(usual[at:])
    between, names, texts, *offsets = (pieces[part::5] for part in range(5))
    if not names or any(between):
        return None
    known = {text: _form(text) for text in set(texts)}  # few: many arrays of a model are alike
    if None in known.values():
        return None
    sizes = {text: _size(form) for text, form in known.items() if form is not None}
    forms = dict(zip(names, map(known.__getitem__, texts), strict=True))
    if len(forms) != len(names) or "__metadata__" in forms:
        return None
    begins, ends = (list(map(int, column)) for column in offsets)
    if list(map(sub, ends, begins)) != list(map(sizes.__getitem__, texts)):
        return None
    if not _follow(begins, ends, buffer_size):
        ordered = sorted(zip(begins, ends, strict=True))
        if not _follow([begin for begin, _ in ordered], [end for _, end in ordered], buffer_size):
            return None
    return Header(metadata, cast(dict[str, Form], forms), begins, ends)


def _follow(begins: Sequence[int], ends: Sequence[int], size: int) -> bool:
    """Whether parts of a buffer follow one another and fill it."""
    return [*begins, size] == [0, *ends]


def _metadata_ahead(text: str) -> tuple[dict[str, str], int]:
    """The strings of ``__metadata__``, which stands first if it is there, and where the arrays begin.

    Raises:
        ValueError: it maps no strings to strings, has a key twice or half of a surrogate pair, or no arrays follow.
    """
    if not text.startswith(_METADATA + "{"):
        if not text.startswith("{"):
            raise ValueError(text[:1])
        return {}, 1
    pairs, end = _PAIRS.raw_decode(text, len(_METADATA))
    metadata = dict(pairs)
    of_strings = len(metadata) == len(pairs) and all(type(value) is str for value in metadata.values())
    if not of_strings or text[end : end + 1] != ",":
        raise ValueError(_METADATA)
    for string in (*metadata, *metadata.values()):
        string.encode()
    return metadata, end + 1


def _form(text: str) -> Form | None:
    """Dtype and shape; None if one of them breaks a rule."""
    parts = _FORM.fullmatch(text)
    if parts is None or parts[1] not in DTYPES or not _SHAPE.fullmatch(parts[2]):
        return None
    shape = tuple(map(int, parts[2].split(","))) if parts[2] else ()
    return None if len(shape) > MAX_RANK or is_too_large(shape) else (parts[1], shape)


def _size(form: Form) -> int:
    dtype, shape = form
    return numel(shape) * DTYPES[dtype].itemsize


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("header-entry", "__metadata__ does not map strings to strings")
    return metadata


def _streams(header: dict[str, Any], buffer_size: int) -> dict[str, Stream]:
    streams = {name: _stream(name, entry) for name, entry in header.items() if name != "__metadata__"}
    at = 0
    for name, stream in sorted(streams.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stream.begin != at:
            raise FormatError(
                "offsets", f"it begins at byte {stream.begin}, but the stream before it ends at {at}", tensor=name
            )
        at = stream.end
    if at > buffer_size:
        raise FormatError(
            "file-truncated", f"the streams have {at} bytes, but the file has only {buffer_size} after its header"
        )
    if at < buffer_size:
        raise FormatError("file-trailing", f"{buffer_size - at} bytes follow after the last stream")
    return streams


def _stream(name: str, entry: Any) -> Stream:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise FormatError("header-entry", "its entry is not {dtype, shape, data_offsets}", tensor=name) from None
    if not (
        len(entry) == 3
        and isinstance(dtype, str)
        and isinstance(shape, list)
        and len(shape) <= MAX_RANK
        and all(is_uint(n) for n in [*shape, begin, end])
        and begin <= end
    ):
        raise FormatError("header-entry", "its entry is not {dtype, shape, data_offsets}", tensor=name)
    if dtype not in DTYPES:
        raise FormatError("unknown-dtype", f"dtype {dtype!r} is not known", tensor=name)
    if is_too_large(tuple(shape)):
        raise FormatError("shape-overflow", f"shape {shape}: {TOO_LARGE}", tensor=name)
    stream = Stream(dtype, tuple(shape), begin, end)
    if stream.nbytes != _size((dtype, stream.shape)):
        raise FormatError("dtype-length", f"{stream.nbytes} bytes for {dtype} of shape {shape}", tensor=name)
    return stream


def file_header(streams: Mapping[str, Stream], metadata: Mapping[str, str], room: int = 0) -> bytes:
    """The beginning of a file up to its buffer: the length of the header and the header, filled up with spaces.

    Args:
        streams: the arrays by name, in the order of the header.
        metadata: strings by name; none is written if it is empty.
        room: bytes of the result; by default as few as give a multiple of 8.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, stream in streams.items():
        entries[name] = {
            "dtype": stream.dtype, "shape": stream.shape, "data_offsets": [stream.begin, stream.end],
        }  # fmt: skip
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(room - 8 if room else (len(text) + 7) & ~7)
    return len(text).to_bytes(8, "little") + text


def header_of(
    tensors: Iterable[tuple[str, np.dtype[Any], tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """:func:`file_header` of tensors that follow one another, and where in the file each tensor's bytes begin.

    Args:
        tensors: name, dtype and shape of each, in the order of the file.
        metadata: see :func:`file_header`.
    """
    streams, at = {}, 0
    for name, dtype, shape in tensors:
        stop = at + numel(shape) * dtype.itemsize
        streams[name], at = Stream(dtype_name(dtype), shape, at, stop), stop
    header = file_header(streams, metadata)
    return header, {name: len(header) + stream.begin for name, stream in streams.items()}
