"""The compact profile: lossless, as small as promised, the same bytes with numba and without, and nothing but refusals of hostile streams."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shira_format as shira
from shira_format._core import compiled
from shira_format._core.arrays import Array, Indices
from shira_format._core.dtypes import FLOATS
from shira_format.errors import BaseMismatch, BaseRequired, FormatError
from shira_format.format import AdapterFile, load, save
from shira_format.format.codecs import CODECS, Encoded
from shira_format.format.codecs.classes import encode_classes
from shira_format.format.compact.values import decode_floats, decode_steps, encode_floats, encode_steps
from tests.strategies import masks, small_shapes

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = st.sampled_from(list(FLOATS.values()))
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CODEC = CODECS["classes"]


def bits_of(seed: int, count: int, dtype: np.dtype[Any], *, wild: bool) -> Array:
    """Values of any bits, or ordinary weights."""
    rng = np.random.default_rng(seed)
    if wild:
        return rng.integers(0, 256, count * dtype.itemsize, np.uint8).view(dtype)
    return rng.normal(0, 0.02, count).astype(dtype)


def step_of(elements: int, seed: int = 0, move: float = 6e-7) -> tuple[Array, Array, Indices]:
    """A bf16 weight, what a small step of training makes of it, and the entries that change."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(0, 0.02, elements).astype(np.float32)
    base = weight.astype(BFLOAT16)
    tuned = (weight + rng.normal(0, move, elements).astype(np.float32)).astype(BFLOAT16)
    return base, tuned, np.flatnonzero(base.view(np.uint16) != tuned.view(np.uint16))


def entropy(density: float) -> float:
    """Bits that an entry of a uniform mask takes at least."""
    p = density
    return (-p * math.log2(p) - (1 - p) * math.log2(1 - p)) / p


@given(st.data(), small_shapes(), DTYPES, st.booleans(), st.integers(0, 99))
def test_indices_come_back(data: st.DataObject, shape: Any, dtype: Any, with_base: bool, seed: int) -> None:
    indices = data.draw(masks(shape))
    base = bits_of(seed, math.prod(shape), dtype, wild=bool(seed % 2)) if with_base else None
    encoded = encode_classes(indices, shape, base)
    own = base if CODEC.needs_base(encoded.params) else None
    assert indices.tolist() == CODEC.decode(encoded, shape, indices.size, own).tolist()


@pytest.mark.parametrize("shape", [(2**40,), (2**20, 2**33), (2**53 - 1,)])
def test_entries_that_are_far_apart(shape: tuple[int, ...]) -> None:
    indices = np.array([1, 17, math.prod(shape) - 2], np.int64)
    encoded = encode_classes(indices, shape)
    assert indices.tolist() == CODEC.decode(encoded, shape, indices.size).tolist()


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 9000, 70000])
@pytest.mark.parametrize("density", [0.001, 0.02, 0.5, 1.0])
def test_indices_of_several_blocks_and_any_part_of_them(size: int, density: float) -> None:
    indices = np.flatnonzero(np.random.default_rng(size).random(size) < density)
    encoded = encode_classes(indices, (size,))
    assert indices.tolist() == CODEC.decode(encoded, (size,), indices.size).tolist()
    for start, stop in ((0, size), (size // 3, size // 2), (size - 1, size), (0, 0), (size // 2, size // 2)):
        part = CODEC.decode_range(encoded, (size,), indices.size, start, stop)
        if part is not None:
            assert indices[(indices >= start) & (indices < stop)].tolist() == part.indices.tolist()
            assert int(np.searchsorted(indices, start)) == part.first
    assert (CODEC.decode_range(encoded, (size,), indices.size, 0, size) is None) == (indices.size == 0)


@given(DTYPES, st.integers(0, 300), st.integers(0, 99), st.booleans())
def test_values_come_back(dtype: Any, count: int, seed: int, wild: bool) -> None:
    values, base = bits_of(seed, count, dtype, wild=wild), bits_of(seed + 100, count, dtype, wild=wild)
    if (steps := encode_steps(values, base)) is not None:
        assert values.tobytes() == decode_steps(steps, base).tobytes()
    if (floats := encode_floats(values)) is not None:
        assert values.tobytes() == decode_floats(floats, dtype, count).tobytes()


def test_steps_of_float64_that_change_signs() -> None:
    base = bits_of(1, 5000, np.dtype(np.float64), wild=False)
    values = np.where(np.arange(5000) % 3 == 0, -base, bits_of(2, 5000, base.dtype, wild=False))
    stream = encode_steps(values, base)
    assert stream is not None
    assert values.tobytes() == decode_steps(stream, base).tobytes()


def test_steps_of_float64_with_all_exponents() -> None:
    """A second at most, where contexts of all pairs of 2047 classes would be compared in several."""
    random, count = np.random.default_rng(0), 100_000
    base = random.integers(1 << 52, 2046 << 52, count, np.uint64)
    values = base + np.exp2(random.uniform(0, 46, count)).astype(np.uint64)
    start = time.process_time()
    stream = encode_steps(values.view(np.float64), base.view(np.float64))
    assert time.process_time() - start < 2.5
    assert stream is not None
    assert values.tobytes() == decode_steps(stream, base.view(np.float64)).tobytes()


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_the_same_bytes_with_numba_and_without(dtype: np.dtype[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    base, values = bits_of(1, 20000, dtype, wild=False), bits_of(2, 20000, dtype, wild=False)
    indices = np.flatnonzero(np.abs(base.astype(float)) < 0.01)[::3]
    rows, columns = np.arange(100)[:, None], np.arange(200)
    in_lines = np.flatnonzero((values.astype(float) > 0).reshape(100, 200) & (rows % 7 == 0) & (columns % 3 > 0))

    def streams() -> list[Any]:
        found = [encode_steps(values, base), encode_steps(-values, values), encode_floats(values)]
        found += [
            encode_classes(some, (100, 200), one).stream for one in (None, base) for some in (indices, in_lines)
        ]
        return [None if one is None else one.tobytes() for one in found]

    here = streams()
    monkeypatch.setattr(compiled, "_kernels", None)
    plainly = streams()
    assert plainly == here


def test_a_step_takes_less_than_6_5_bits_an_entry() -> None:
    base, tuned, indices = step_of(1 << 20)
    assert 0.020 < indices.size / base.size < 0.024
    encoded = encode_classes(indices, (1024, 1024), base)
    steps = encode_steps(tuned[indices], base[indices])
    assert encoded.stream is not None
    assert steps is not None
    assert 8 * (encoded.stream.size + steps.size) / indices.size < 6.5


@pytest.mark.parametrize("density", [0.005, 0.01, 0.05, 0.2])
def test_indices_without_a_base_take_the_entropy_and_2_percent(density: float) -> None:
    elements = int(65536 / density)
    indices = np.flatnonzero(np.random.default_rng(3).random(elements) < density)
    encoded = encode_classes(indices, (elements,))
    assert 8 * encoded.stream_bytes / indices.size < 1.02 * entropy(indices.size / elements)


def test_rows_and_columns_are_used() -> None:
    """The largest entries of a product of random factors whose rows and columns differ in size."""
    rng = np.random.default_rng(4)
    rows, columns = rng.lognormal(0, 1, 300), rng.lognormal(0, 1, 400)
    update = np.abs(rng.normal(size=(300, 400)) * rows[:, None] * columns)
    indices = np.flatnonzero(update >= np.partition(update.reshape(-1), -1200)[-1200])
    taken = 8 * encode_classes(indices, update.shape).stream_bytes / indices.size
    assert taken < 0.75 * entropy(0.01)


def adapter_of(base: Array, tuned: Array, indices: Indices, *, self_contained: bool = False) -> shira.Adapter:
    own = base[indices]
    kept = {"base": own} if self_contained else {"base_digest": shira.SparseTensor("w", base.shape, indices, own, base=own).base_digest}  # fmt: skip
    return shira.Adapter([shira.SparseTensor("w", base.shape, indices, tuned[indices], **kept)])


@pytest.mark.parametrize("self_contained", [False, True])
def test_files_are_lossless_both_ways(tmp_path: Path, self_contained: bool) -> None:
    base, tuned, indices = step_of(20000, move=1e-5)
    adapter = adapter_of(base, tuned, indices, self_contained=self_contained)
    save(adapter, tmp_path / "plain.st")
    save(adapter, tmp_path / "compact.st", compact=True, base={"w": base})
    found = load(tmp_path / "compact.st", base=None if self_contained else {"w": base})
    assert adapter == found
    save(found, tmp_path / "again.st")
    assert (tmp_path / "plain.st").read_bytes() == (tmp_path / "again.st").read_bytes()
    save(found, tmp_path / "compact again.st", compact=True, base={"w": base})
    assert (tmp_path / "compact.st").read_bytes() == (tmp_path / "compact again.st").read_bytes()
    assert ["compact"] == AdapterFile(tmp_path / "compact.st").manifest.raw["features"]
    assert self_contained != AdapterFile(tmp_path / "compact.st").needs_base("w")


def test_deltas_and_masks(tmp_path: Path) -> None:
    base, tuned, indices = step_of(20000, move=1e-4)
    deltas = (tuned[indices].astype(np.float32) - base[indices].astype(np.float32)).astype(np.float16)
    bare = deltas.astype(BFLOAT16)
    given = shira.Adapter([
        shira.SparseTensor("on", base.shape, indices, deltas, value_kind="delta", dtype=BFLOAT16, base_digest="0" * 64),
        shira.SparseTensor("bare", base.shape, indices, bare, value_kind="delta"),
        shira.SparseTensor("mask", base.shape, indices, value_kind="none", dtype=BFLOAT16),
    ])  # fmt: skip
    save(given, tmp_path / "a.st", compact=True)
    assert given == load(tmp_path / "a.st")
    entries = AdapterFile(tmp_path / "a.st").manifest.tensors
    assert ["floats", "floats", None] == [entry.value_codec("values") for entry in entries.values()]


def test_without_the_base_a_reader_says_what_it_lacks(tmp_path: Path) -> None:
    base, tuned, indices = step_of(20000, move=1e-5)
    path = tmp_path / "a.st"
    save(adapter_of(base, tuned, indices), path, compact=True, base={"w": base})
    file = AdapterFile(path)
    with pytest.raises(BaseRequired, match=r"a\.st: tensor 'w': it can be read with its base alone"):
        file.sparse("w")
    with pytest.raises(BaseRequired):
        file.values("w")
    assert ["w"] == file.verify()
    file.base = {"w": base}
    assert tuned[indices].tobytes() == file.values("w").tobytes()  # type: ignore[union-attr]
    assert [] == file.verify()


@pytest.mark.parametrize("place", ["at an entry", "elsewhere"])
def test_another_base_is_refused(tmp_path: Path, place: str) -> None:
    base, tuned, indices = step_of(20000, move=1e-5)
    save(adapter_of(base, tuned, indices), tmp_path / "a.st", compact=True, base={"w": base})
    other = base.copy()
    at = indices[0] if place == "at an entry" else np.setdiff1d(np.arange(indices[-1]), indices)[0]
    other[at] = other[at] * BFLOAT16.type(4)
    for verify in (True, False):
        with pytest.raises(BaseMismatch):
            load(tmp_path / "a.st", base={"w": other}, verify=verify)["w"]


def test_slices_of_coded_files(tmp_path: Path) -> None:
    base, tuned, indices = step_of(20000, move=1e-5)
    save(adapter_of(base, tuned, indices), tmp_path / "a.st", compact=True, base={"w": base})
    save(adapter_of(base, tuned, indices, self_contained=True), tmp_path / "b.st", compact=True)
    for name in ("a.st", "b.st"):
        file = AdapterFile(tmp_path / name, base={"w": base} if name == "a.st" else None)
        whole = file.sparse("w")
        part, _ = file.within("w", [(500, 900), (7000, 9000)])
        inside = ((indices >= 500) & (indices < 900)) | ((indices >= 7000) & (indices < 9000))
        assert indices[inside].tolist() == part.indices.tolist()
        assert whole.values[inside].tobytes() == part.values.tobytes()
        assert file.within("w", [(0, 20000)])[0] == whole


@settings(max_examples=300)
@given(st.sampled_from(["none", "base", "lines", "steps", "floats"]), st.data())
def test_damaged_streams_are_refused_or_lead_to_other_values(kind: str, data: st.DataObject) -> None:
    """With right digests: whatever a stranger writes, there is an answer or a FormatError, and nothing else."""
    base, tuned, indices = step_of(4500, move=1e-4)
    shape = (45, 100)
    if kind in ("steps", "floats"):
        stream = encode_steps(tuned[indices], base[indices]) if kind == "steps" else encode_floats(tuned[indices])
    else:
        if kind == "lines":
            indices = np.sort(np.random.default_rng(0).choice(900, 300, replace=False))
        encoded = encode_classes(indices, shape, base if kind == "base" else None)
        stream = encoded.stream
        assert CODEC.needs_base(encoded.params) == (kind == "base")
    assert stream is not None
    changed = stream.copy()
    for at in data.draw(st.lists(st.integers(0, stream.size - 1), min_size=1, max_size=3)):
        changed[at] = data.draw(st.integers(0, 255))
    changed = changed[: data.draw(st.sampled_from([stream.size, stream.size - 1, stream.size // 2]))]
    try:
        if kind == "steps":
            assert indices.size == decode_steps(changed, base[indices]).size
        elif kind == "floats":
            assert indices.size == decode_floats(changed, BFLOAT16, indices.size).size
        else:
            found = CODEC.decode(
                Encoded(encoded.params, changed), shape, indices.size, base if kind == "base" else None
            )
            assert indices.size == found.size
            assert found.min(initial=0) >= 0
    except FormatError:
        pass


def test_nothing_is_allocated_for_counts_that_the_file_does_not_hold() -> None:
    base, tuned, indices = step_of(4500, move=1e-4)
    stream = encode_floats(tuned[indices])
    assert stream is not None
    with pytest.raises(FormatError):
        decode_floats(stream, BFLOAT16, 2**40)
    encoded = encode_classes(indices, (4500,))
    with pytest.raises(FormatError):
        CODEC.decode(encoded, (2**53 - 1,), 2**31)
