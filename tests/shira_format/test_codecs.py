"""The index codecs against plain reference coders, and the sizes that the format promises."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shira_format._core.arrays import Indices, distinct, distinct_counts
from shira_format.adapter import Adapter
from shira_format.errors import FormatError
from shira_format.format import load, save
from shira_format.format.codecs import BLOCK_SIZE, CODECS, Encoded, encode_smallest, stored_bytes
from shira_format.format.codecs.runs import run_length
from shira_format.format.codecs.structured import MAX_LISTED, find_pattern, list_pattern, part_size
from shira_format.tensors import MAX_NUMEL, SparseTensor, matrix_shape, numel
from tests.strategies import HUGE_SHAPES, Part, Shape, masks, pattern_indices, patterns, small_shapes

pytestmark = pytest.mark.usefixtures("kernels")

SHAPES = small_shapes() | st.sampled_from(HUGE_SHAPES)
BLOCK_SIZES = st.sampled_from([16, 17, 64, BLOCK_SIZE])


@st.composite
def indexed(draw: st.DrawFn) -> tuple[Indices, Shape]:
    shape = draw(SHAPES)
    return draw(masks(shape)), shape


def decode(encoded: Encoded, shape: Shape, nnz: int) -> Indices:
    codec = CODECS[encoded.params["codec"]]
    return codec.decode(encoded, shape, nnz)


def can_hold(name: str, indices: Indices, shape: Shape) -> bool:
    """gap8 writes a byte for every 255 positions: not for a few entries of a huge tensor."""
    size = CODECS[name].size(indices, shape)
    return size is not None and size < 1 << 20


def gaps(indices: Iterable[int]) -> list[int]:
    before, found = -1, []
    for index in indices:
        found.append(index - before - 1)
        before = index
    return found


def gap8_code(gap: int) -> bytes:
    return b"\xff" * (gap // 255) + bytes([gap % 255])


def varint_code(gap: int) -> bytes:
    code = bytearray()
    while gap >= 128:
        code.append(gap % 128 + 128)
        gap //= 128
    return bytes([*code, gap])


REFERENCE: dict[str, Callable[[int], bytes]] = {"gap8": gap8_code, "varint": varint_code}


def reference_blocks(codes: list[bytes], indices: list[int], block_size: int) -> list[list[int]] | None:
    if len(indices) <= block_size:
        return None
    return [[indices[k], sum(map(len, codes[:k]))] for k in range(0, len(indices), block_size)]


@given(indexed(), BLOCK_SIZES)
def test_every_codec_gives_back_what_it_was_given(case: tuple[Indices, Shape], block_size: int) -> None:
    indices, shape = case
    for name, codec in CODECS.items():
        if can_hold(name, indices, shape):
            encoded = codec.encode(indices, shape, block_size)
            assert name == encoded.params["codec"]
            assert indices.tolist() == decode(encoded, shape, indices.size).tolist()
            assert np.int64 == decode(encoded, shape, indices.size).dtype
            if name != "structured":
                expected = 0 if encoded.stream is None else encoded.stream.nbytes
                assert expected == codec.size(indices, shape)


@pytest.mark.parametrize("name", sorted(REFERENCE))
@given(case=indexed(), block_size=BLOCK_SIZES)
def test_gap_codecs_equal_the_reference(name: str, case: tuple[Indices, Shape], block_size: int) -> None:
    indices, shape = case
    if not can_hold(name, indices, shape):
        indices = indices[:0]
    codes = [REFERENCE[name](gap) for gap in gaps(indices.tolist())]
    encoded = CODECS[name].encode(indices, shape, block_size)
    assert encoded.stream is not None
    assert b"".join(codes) == encoded.stream.tobytes()
    blocks = None if encoded.blocks is None else encoded.blocks.tolist()
    assert reference_blocks(codes, indices.tolist(), block_size) == blocks
    assert {"codec": name, "block_size": block_size} == encoded.params


@pytest.mark.parametrize("k", range(54))
def test_varint_at_every_power_of_two(k: int) -> None:
    shape = (MAX_NUMEL,)
    for first in {2**k - 1, 2**k, 2**k + 1}:
        if first < MAX_NUMEL:
            indices = np.array([first], np.int64)
            encoded = CODECS["varint"].encode(indices, shape, BLOCK_SIZE)
            assert encoded.stream is not None
            assert varint_code(first) == encoded.stream.tobytes()
            assert [first] == decode(encoded, shape, 1).tolist()


@pytest.mark.parametrize("gap", [0, 1, 126, 127, 128, 253, 254, 255, 256, 509, 510, 511, 65535, 65536])
@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_gaps_at_the_edges_of_a_code(name: str, gap: int) -> None:
    indices = np.cumsum(np.array([gap, gap, 0, gap], np.int64) + 1) - 1
    encoded = CODECS[name].encode(indices, (10**6,), 16)
    assert encoded.stream is not None
    assert b"".join(REFERENCE[name](g) for g in [gap, gap, 0, gap]) == encoded.stream.tobytes()
    assert indices.tolist() == decode(encoded, (10**6,), 4).tolist()


def test_gap8_beyond_two_to_the_31() -> None:
    size = 2**31 + 2**20
    indices = np.array([7, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 300, size - 1], np.int64)
    encoded = CODECS["gap8"].encode(indices, (size,), BLOCK_SIZE)
    assert indices.tolist() == decode(encoded, (size,), indices.size).tolist()


@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_long_streams_cross_every_chunk(name: str) -> None:
    random = np.random.default_rng(3)
    indices = np.flatnonzero(random.random(3_000_000) < 0.02).astype(np.int64)
    encoded = CODECS[name].encode(indices, (3000, 1000), 16)
    assert np.array_equal(indices, decode(encoded, (3000, 1000), indices.size))


@given(indexed(), BLOCK_SIZES)
def test_the_smallest_is_never_larger_than_any(case: tuple[Indices, Shape], block_size: int) -> None:
    indices, shape = case
    encoded = encode_smallest(indices, shape, block_size)
    assert indices.tolist() == decode(encoded, shape, indices.size).tolist()
    sizes = {name: codec.size(indices, shape) for name, codec in CODECS.items()}
    chosen = sizes[encoded.params["codec"]]
    assert chosen is not None
    # Old readers lack `runs`, which is written only where it saves much.
    assert chosen <= min(size for name, size in sizes.items() if size is not None and name != "runs")
    assert encoded.stream_bytes - (0 if encoded.blocks is None else encoded.blocks.nbytes) <= 8 * indices.size
    assert encode_smallest(indices, shape).stream_bytes <= 8 * indices.size


def test_ties_go_to_the_first_codec() -> None:
    assert "gap8" == encode_smallest(np.empty(0, np.int64), (4, 4)).params["codec"]
    assert "gap8" == encode_smallest(np.array([0, 2, 5], np.int64), (4, 4)).params["codec"]


def test_one_percent_costs_under_nine_bits() -> None:
    random = np.random.default_rng(0)
    shape = (4096, 4096)
    indices = np.sort(random.choice(numel(shape), numel(shape) // 100, replace=False)).astype(np.int64)
    encoded = encode_smallest(indices, shape)
    assert "gap8" == encoded.params["codec"]
    assert encoded.blocks is not None
    assert stored_bytes(encoded) * 8 / indices.size <= 8.8


def test_ten_entries_in_half_a_billion_cost_under_100_bytes() -> None:
    shape = (500_000, 1000)
    indices = np.sort(np.random.default_rng(1).integers(0, numel(shape), 10))
    encoded = encode_smallest(indices, shape)
    assert "varint" == encoded.params["codec"]
    assert stored_bytes(encoded) < 100


@st.composite
def structured(draw: st.DrawFn) -> tuple[list[Part], Shape]:
    """Patterns in matrices where a few diagonals and columns cannot fill a line by chance."""
    shape = draw(st.sampled_from([(24, 31), (40, 25), (30, 5, 6), (64, 64), (23, 2, 3, 4)]))
    return draw(patterns(shape).filter(bool)), shape


@settings(max_examples=300)
@given(structured())
@example(([{"kind": "rows", "step": 2, "offset": 1}, {"kind": "columns", "step": 2, "offset": 0}], (24, 31)))
@example(([{"kind": "diagonal", "offset": k} for k in (-23, 0, 30)], (24, 31)))
def test_unions_of_lines_and_diagonals_are_found(case: tuple[list[Part], Shape]) -> None:
    pattern, shape = case
    indices = pattern_indices(pattern, shape)
    found = find_pattern(indices, shape)
    assert found is not None
    assert len(found) <= len(pattern)
    assert indices.tolist() == list_pattern(found, shape, indices.size).tolist()
    rows, columns = matrix_shape(shape)
    for part in found:
        assert pattern_indices([part], shape).size == part_size(part, rows, columns)
    if indices.size > 1000:  # then the pattern is smaller than any stream
        assert "structured" == encode_smallest(indices, shape).params["codec"]


@given(structured(), st.data())
def test_an_entry_more_or_less_is_not_structured(case: tuple[list[Part], Shape], data: st.DataObject) -> None:
    pattern, shape = case
    indices = pattern_indices(pattern, shape)
    changed = np.setxor1d(indices, [data.draw(st.integers(0, numel(shape) - 1))]).astype(np.int64)
    found = find_pattern(changed, shape)
    if found is not None:  # short diagonals are structured again
        assert changed.tolist() == list_pattern(found, shape, changed.size).tolist()


def test_a_union_of_large_parts_takes_no_longer_than_to_list_them() -> None:
    """A few bytes in a file: hashed, these took a minute and a gigabyte."""
    side = 2048
    pattern = [
        {"kind": "rows", "step": 2, "offset": 0},
        {"kind": "columns", "step": 2, "offset": 1},
        *({"kind": "diagonal", "offset": k} for k in range(6)),
    ]
    row, column = np.indices((side, side), np.int32)
    expected = np.flatnonzero((row % 2 == 0) | (column % 2 == 1) | ((column - row >= 0) & (column - row < 6)))
    started = time.process_time()
    tracemalloc.start()
    found = list_pattern(pattern, (side, side), expected.size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - started < 3
    assert peak < 6 * found.nbytes
    assert np.array_equal(expected, found)
    with pytest.raises(FormatError, match="the pattern has"):
        list_pattern(pattern, (side, side), expected.size - 1)


@given(st.lists(st.integers(-5, 5)))
def test_distinct_values_and_their_counts(values: list[int]) -> None:
    expected, counts = np.unique(np.array(values, np.int64), return_counts=True)
    assert expected.tolist() == distinct(np.array(values, np.int64)).tolist()
    assert [expected.tolist(), counts.tolist()] == [
        a.tolist() for a in distinct_counts(np.array(values, np.int64))
    ]


@pytest.mark.parametrize("shape", [(1000, 1000), (100, 10_000), (1, 5000), (5000,), (10_000, 3)])
def test_random_masks_are_not_structured(shape: Shape) -> None:
    random = np.random.default_rng(5)
    for density in (0.01, 0.3):
        indices = np.flatnonzero(random.random(numel(shape)) < density).astype(np.int64)
        found = find_pattern(indices, shape)
        assert found is None


@pytest.mark.parametrize(
    ("shape", "pattern", "nnz", "rule"),
    [
        ((3, 4), [{"kind": "rows", "step": 0, "offset": 0}], 4, "pattern"),
        ((3, 4), [{"kind": "rows", "step": 4, "offset": 3}], 4, "pattern"),
        ((3, 4), [{"kind": "columns", "step": 2, "offset": 2}], 4, "pattern"),
        ((3, 4), [{"kind": "columns", "step": 2, "offset": -1}], 4, "pattern"),
        ((3, 4), [{"kind": "diagonal", "offset": 4}], 4, "pattern"),
        ((3, 4), [{"kind": "diagonal", "offset": -3}], 4, "pattern"),
        ((3, 4), [{"kind": "diagonal", "offset": 0}] * 9, 3, "pattern"),
        ((3, 4), [{"kind": "diagonal", "offset": 0}], 2, "count-mismatch"),
        ((3, 4), [{"kind": "diagonal", "offset": 0}], 4, "count-mismatch"),
        ((3, 4), [], 1, "count-mismatch"),
        ((2**27, 2**26 - 1), [{"kind": "rows", "step": 1, "offset": 0}], 5, "count-mismatch"),
        ((2**20, 2**20), [{"kind": "rows", "step": 2**8, "offset": 0}], MAX_LISTED * 2, "count-mismatch"),
        ((2**64 - 1, 0), [{"kind": "rows", "step": 1, "offset": 0}], 1, "count-mismatch"),
        ((0, 4), [{"kind": "diagonal", "offset": 0}], 0, "pattern"),
    ],
)
def test_patterns_are_refused(shape: Shape, pattern: list[Part], nnz: int, rule: str) -> None:
    with pytest.raises(FormatError) as caught:
        list_pattern(pattern, shape, nnz)
    assert rule == caught.value.rule


@pytest.mark.parametrize("shape", [(2**64 - 1, 0), (0, 2**64 - 1), (2**70, 0, 3)])
def test_lines_without_elements_are_empty(shape: Shape) -> None:
    kind = "columns" if shape[0] == 0 else "rows"
    assert [] == list_pattern([{"kind": kind, "step": 1, "offset": 0}], shape, 0).tolist()


def test_offsets_whose_differences_overflow_are_refused() -> None:
    indices = np.arange(80, dtype=np.int64)
    for name in ("gap8", "varint"):
        encoded = CODECS[name].encode(indices, (80,), 16)
        assert encoded.blocks is not None
        encoded.blocks[:, 1] = [0, 2**63 - 1, -(2**63), -1, 5]
        with pytest.raises(FormatError) as caught:
            decode(encoded, (80,), 80)
        assert "block-directory" == caught.value.rule


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, int]:
    """Streams that are often wrong: random bytes, or codes that were cut, extended or changed."""
    codes = draw(
        st.lists(st.sampled_from([b"\x00", b"\x05", b"\xff", b"\x80", b"\x81\x00", b"\xff\x7f"]), max_size=12)
    )
    return b"".join(codes) + draw(st.binary(max_size=12)), draw(st.integers(0, 14))


@pytest.mark.parametrize("name", sorted(REFERENCE))
@settings(max_examples=300)
@given(case=streams(), size=st.sampled_from([1, 300, 2**40, MAX_NUMEL]))
def test_any_stream_is_decoded_to_its_only_meaning_or_refused(
    name: str, case: tuple[bytes, int], size: int
) -> None:
    stream, nnz = case
    nnz = min(nnz, size)
    params = {"codec": name, "block_size": BLOCK_SIZE}
    try:
        found = CODECS[name].decode(Encoded(params, np.frombuffer(stream, np.uint8)), (size,), nnz)
    except FormatError as error:
        assert error.rule in {"stream-truncated", "stream-trailing", "varint", "out-of-range"}
        return
    assert nnz == found.size
    assert np.all(np.diff(found) > 0)
    assert stream == b"".join(REFERENCE[name](gap) for gap in gaps(found.tolist()))


@given(st.sampled_from([2, 8, 16, 256]), st.integers(0, 40), st.integers(0, 2**31))
def test_runs_are_found_and_decoded(length: int, runs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    elements = int(rng.integers(1, 200)) * length + int(rng.integers(0, length))
    chosen = np.sort(rng.permutation(-(-elements // length))[:runs])
    indices = (chosen[:, None] * length + np.arange(length)).reshape(-1)
    indices = indices[indices < elements]
    found = run_length(indices, elements)
    if not indices.size:
        assert found is None
        return
    assert found is not None
    assert found >= length
    codec = CODECS["runs"]
    encoded = codec.encode(indices, (elements,), BLOCK_SIZE)
    assert encoded.stream is not None
    assert codec.size(indices, (elements,)) == encoded.stream.size
    assert indices.tolist() == codec.decode(encoded, (elements,), indices.size).tolist()


@pytest.mark.parametrize(("indices", "elements", "length"), [
    ([0, 1], 9, 2), ([1, 2], 9, None), ([0, 1, 2], 9, None), ([0, 1, 2], 3, 256), ([8], 9, 8), ([], 9, None), ([2, 3, 4, 5], 8, 2),
    ([0, 1, 2, 3, 7], 8, None), ([4, 5, 6, 7], 8, 4), ([0, 1, 2, 3, 4, 5, 6, 7], 64, 8),
])  # fmt: skip
def test_lengths_of_runs(indices: list[int], elements: int, length: int | None) -> None:
    assert length == run_length(np.array(indices, np.int64), elements)


@pytest.mark.parametrize("length", [8, 16, 32])
def test_runs_cost_about_a_bit_an_entry_or_less(length: int) -> None:
    """Within 1 % of the entropy of where the runs are; at 1 % density 1.01, 0.51 and 0.25 bits an entry."""
    shape, rng = (1024, 4096), np.random.default_rng(length)
    for density in (0.001, 0.01, 0.02):
        count = int(density * 2**22 / length)
        chosen = np.sort(rng.choice(2**22 // length, count, replace=False))
        indices = (chosen[:, None] * length + np.arange(length)).reshape(-1)
        encoded = encode_smallest(indices, shape)
        assert ("runs", length) == (encoded.params["codec"], encoded.params["length"])
        entropy = -np.log2(density) - (1 / density - 1) * np.log2(1 - density)
        assert 8 * encoded.stream_bytes / indices.size < 1.03 * entropy / length
        if length > 8:
            assert 8 * encoded.stream_bytes < indices.size


def test_tensors_share_runs_only_if_they_are_the_same(tmp_path: Path) -> None:
    """Runs of two lengths can have one stream."""

    def mask(name: str, length: int) -> SparseTensor:
        indices = (np.arange(0, 128, 2)[:, None] * length + np.arange(length)).reshape(-1)
        return SparseTensor(name, (128 * 256,), indices, value_kind="none")

    masks = Adapter([mask("a", 16), mask("b", 32), mask("c", 16)])
    save(masks, tmp_path / "m.st")
    again = load(tmp_path / "m.st")
    assert masks == again
    assert ("1.1", ["runs"]) == (again.manifest["format_version"], again.manifest["features"])
    assert ["runs", "runs", "shared"] == [item["indices"]["codec"] for item in again.manifest["tensors"]]
