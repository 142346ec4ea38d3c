"""``runs``: aligned runs of consecutive entries, a Rice code for the gap between two runs (spec, section 5.6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format.errors import FormatError
from shira_format.format.codecs.base import Encoded, IndexCodec, Streams
from shira_format.format.codecs.gaps import gaps_of
from shira_format.format.fields import need
from shira_format.tensors import MAX_NUMEL, numel

LENGTHS = tuple(2**power for power in range(1, 9))  # of a run
MAX_LOW = 45
_CHUNK = 1 << 12  # entries that are looked at before all are


class Runs(IndexCodec):
    """For masks of whole cache lines: at 1 % density and 16 entries a run, half a bit an entry."""

    name = "runs"
    feature = "runs"

    def check_params(self, params: Mapping[str, Any], tensor: str) -> None:
        if (length := need(params, "length", int, tensor)) not in LENGTHS:
            raise FormatError("manifest-schema", f"runs of length {length}", tensor=tensor)
        if not 0 <= (low := need(params, "low", int, tensor)) <= MAX_LOW:
            raise FormatError("manifest-schema", f"{low} low bits", tensor=tensor)

    def streams(self, params: Mapping[str, Any], nnz: int) -> Streams:
        return {"indices": ("U8", None)}

    def size(self, indices: Indices, shape: tuple[int, ...]) -> int | None:
        length = run_length(indices, numel(shape))
        if length is None:
            return None
        gaps = gaps_of(indices[::length] // length)
        return _bytes(gaps, _low_bits(gaps))

    def encode(self, indices: Indices, shape: tuple[int, ...], block_size: int) -> Encoded:
        length = run_length(indices, numel(shape))
        assert length is not None
        gaps = gaps_of(indices[::length] // length)
        low = _low_bits(gaps)
        planes = ((gaps[:, None] >> np.arange(low)) & 1).astype(np.uint8)
        ends = np.cumsum((gaps >> low) + 1) - 1
        unary = np.zeros(int(ends[-1]) + 1, np.uint8)
        unary[ends] = 1
        stream = [np.packbits(bits, bitorder="little") for bits in (planes.reshape(-1), unary)]
        return Encoded({"codec": self.name, "length": length, "low": low}, np.concatenate(stream))

    def decode(self, stored: Encoded, shape: tuple[int, ...], nnz: int, base: Array | None = None) -> Indices:
        stream, length, low = stored.stream, stored.params["length"], stored.params["low"]
        assert stream is not None
        elements, count = numel(shape), -(-nnz // length)
        runs = _run_numbers(stream, count, low, -(-elements // length))
        whole = count - bool(nnz % length)
        indices = np.empty(nnz, np.int64)
        indices[: whole * length] = (runs[:whole, None] * length + np.arange(length)).reshape(-1)
        if whole < count:  # the end of the tensor, where it is no multiple of the length
            indices[whole * length :] = runs[-1] * length + np.arange(nnz - whole * length)
        last = min(elements, (int(runs[-1]) + 1) * length) if count else 0
        if count and indices[-1] != last - 1:
            raise FormatError("count-mismatch", f"the runs do not have {nnz} entries")
        return indices


def run_length(indices: Indices, elements: int) -> int | None:
    """The largest length whose aligned runs make up ``indices``; None if there is none.

    Args:
        indices: int64 ``[nnz]``, strictly increasing.
        elements: of the tensor; the last run may be cut off there.
    """
    edges = _edges(indices[:_CHUNK], elements, whole=indices.size <= _CHUNK)
    if not indices.size or edges & 1:
        return None
    edges |= _edges(indices, elements, whole=True)
    edges |= LENGTHS[-1]
    length = edges & -edges
    return length if length > 1 else None


def _edges(indices: Indices, elements: int, *, whole: bool) -> int:
    """The bits that are set in the number of any first or last-plus-one entry of consecutive ones."""
    if not indices.size:
        return 0
    jumps = np.flatnonzero(np.diff(indices) != 1)
    found = int(indices[0]) | int(np.bitwise_or.reduce(indices[jumps + 1], initial=0))
    found |= int(np.bitwise_or.reduce(indices[jumps] + 1, initial=0))
    end = int(indices[-1]) + 1
    return found | end if whole and end != elements else found


def _bytes(gaps: Indices, low: int) -> int:
    return (gaps.size * low + 7) // 8 + (gaps.size + int((gaps >> low).sum()) + 7) // 8


def _low_bits(gaps: Indices) -> int:
    """How many bits of each gap are stored as they are, so that the stream is smallest."""
    middle = min(int(np.mean(gaps) + 1).bit_length() - 1, MAX_LOW)
    return min(range(max(0, middle - 1), min(MAX_LOW, middle + 1) + 1), key=lambda low: _bytes(gaps, low))


def _run_numbers(stream: Array, count: int, low: int, runs: int) -> Indices:
    """The numbers of the ``count`` runs, int64, of ``runs`` in the tensor.

    Raises:
        FormatError: the stream is too short or too long, or leads out of the tensor.
    """
    plane = (count * low + 7) // 8
    if stream.size < plane or 8 * (stream.size - plane) < count:
        raise FormatError("stream-truncated", f"{stream.size} bytes are too few for {count} runs")
    ends = np.flatnonzero(np.unpackbits(stream[plane:], bitorder="little"))
    if ends.size < count:
        raise FormatError("stream-truncated", f"the stream ends after {ends.size} of {count} runs")
    if ends.size > count or stream.size - plane > (int(ends[-1]) // 8 + 1 if count else 0):
        raise FormatError("stream-trailing", f"bits follow after the last of {count} runs")
    bits = np.unpackbits(stream[:plane], bitorder="little")
    if bits[count * low :].any():
        raise FormatError("stream-trailing", "the bits that fill the last byte of the low bits are not zero")
    high = np.diff(ends, prepend=-1) - 1
    if (high > MAX_NUMEL >> low).any():
        raise FormatError("out-of-range", f"a gap leads outside a tensor of {runs} runs")
    gaps = high << low
    for place in range(low):
        gaps |= bits[place : count * low : low].astype(np.int64) << place
    if float(np.sum(gaps, dtype=np.float64)) + count > 2.0 * runs + 2:  # before the sum could overflow
        raise FormatError("out-of-range", f"the gaps lead outside a tensor of {runs} runs")
    numbers = np.cumsum(gaps + 1) - 1
    if count and numbers[-1] >= runs:
        raise FormatError("out-of-range", f"run {numbers[-1]} of a tensor of {runs} runs")
    return numbers
