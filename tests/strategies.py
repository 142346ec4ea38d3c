"""Hypothesis strategies for what an adapter holds: any dtype, meaning, shape, mask and bit pattern."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

from shira_format import Adapter, SparseTensor, WholeTensor
from shira_format.arrays import Array
from shira_format.codecs import Indices
from shira_format.dtypes import DTYPES, FLOATS
from shira_format.tensors import MAX_NUMEL, Meaning, matrix_view, numel

Shape = tuple[int, ...]
Part = dict[str, Any]

HUGE_SHAPES: list[Shape] = [
    (2**31 + 11,),
    (2**32, 3),
    (65537, 65539),
    (3, 2**40),
    (2**20, 2**10, 2**20),
    (2**26 - 1, 2**27),
    (MAX_NUMEL,),
]
NAMES = st.one_of(
    st.sampled_from(["w", "b", "encoder.layer.0.weight", "a/b", "#", "é", "\u202ex", "shira", "w#v"]),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12),
)


def small_shapes(min_rank: int = 0, max_rank: int = 5, max_numel: int = 4096) -> st.SearchStrategy[Shape]:
    """Shapes of any of these ranks, some of them without elements."""
    dimensions = st.integers(0, 12) | st.sampled_from([1, 16, 64, 300])
    shapes = st.lists(dimensions, min_size=min_rank, max_size=max_rank).map(tuple)
    return shapes.filter(lambda shape: numel(shape) <= max_numel)


@st.composite
def patterns(draw: st.DrawFn, shape: Shape, max_diagonals: int = 3) -> list[Part]:
    """Rows, columns and diagonals, each of which lies in the matrix view of ``shape``."""
    rows, columns = matrix_view(shape)
    pattern: list[Part] = []
    for kind, along in (("rows", rows), ("columns", columns)):
        if along and draw(st.booleans()):
            step = draw(st.integers(2, max(2, along + 3)))
            pattern.append({"kind": kind, "step": step, "offset": draw(st.integers(0, min(step, along) - 1))})
    if rows and columns:
        offsets = draw(st.lists(st.integers(1 - rows, columns - 1), max_size=max_diagonals))
        pattern += [{"kind": "diagonal", "offset": offset} for offset in offsets]
    return pattern


def pattern_indices(pattern: list[Part], shape: Shape) -> Indices:
    """The union of the parts, element by element as section 5.4 defines it."""
    rows, columns = matrix_view(shape)
    r, c = np.divmod(np.arange(rows * columns, dtype=np.int64), max(1, columns))
    chosen = np.zeros(rows * columns, bool)
    for part in pattern:
        if part["kind"] == "diagonal":
            chosen |= c - r == part["offset"]
        else:
            chosen |= (r if part["kind"] == "rows" else c) % part["step"] == part["offset"]
    return np.flatnonzero(chosen).astype(np.int64)


@st.composite
def masks(draw: st.DrawFn, shape: Shape) -> Indices:
    """Strictly increasing indices into ``shape``: none, one, all, runs, scattered or structured."""
    size = numel(shape)
    if size == 0:
        return np.empty(0, np.int64)
    if size > 1 << 20:
        picked = draw(st.sets(st.integers(0, size - 1) | st.sampled_from([0, size - 1]), max_size=12))
        start = draw(st.integers(0, size - 40))
        run = range(start, start + draw(st.integers(0, 40)))
        return np.array(sorted({*picked, *run}), np.int64)
    how = draw(st.sampled_from(["none", "one", "all", "picked", "scattered", "structured"]))
    if how == "one":
        return np.array([draw(st.integers(0, size - 1))], np.int64)
    if how == "all":
        return np.arange(size, dtype=np.int64)
    if how == "picked":
        return np.array(sorted(draw(st.sets(st.integers(0, size - 1), max_size=40))), np.int64)
    if how == "scattered":
        random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        return np.flatnonzero(random.random(size) < draw(st.sampled_from([0.004, 0.05, 0.5]))).astype(np.int64)
    if how == "structured":
        return pattern_indices(draw(patterns(shape)), shape)
    return np.empty(0, np.int64)


@st.composite
def any_bits(draw: st.DrawFn, dtype: np.dtype[Any], shape: Shape) -> Array:
    """An array of any bits: numbers of every size, payloads of NaN, infinities and -0.0 among them."""
    count = numel(shape)
    if dtype == np.dtype("?"):
        raw = bytes(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))
    elif count <= 8:
        raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    else:
        raw = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).bytes(count * dtype.itemsize)
    array = np.frombuffer(raw, dtype).copy()
    if count and dtype in FLOATS.values():
        special = np.array([math.nan, math.inf, -math.inf, -0.0, 0.0, 1.0, -2.5], np.float32).astype(dtype)
        for value in draw(st.lists(st.sampled_from(list(special)), max_size=3)):
            array[draw(st.integers(0, count - 1))] = value
    return array.reshape(shape)


float_dtypes: st.SearchStrategy[np.dtype[Any]] = st.sampled_from(list(FLOATS.values()))
meanings: st.SearchStrategy[Meaning] = st.sampled_from(["target", "delta", "none"])


@st.composite
def sparse_tensors(
    draw: st.DrawFn,
    name: str = "w",
    *,
    shapes: st.SearchStrategy[Shape] | None = None,
    meaning: st.SearchStrategy[Meaning] = meanings,
    dtypes: st.SearchStrategy[np.dtype[Any]] = float_dtypes,
) -> SparseTensor:
    """A tensor of any dtype and meaning; targets with base values or their digest alone."""
    shape = draw(small_shapes() | st.sampled_from(HUGE_SHAPES) if shapes is None else shapes)
    indices, dtype, kind = draw(masks(shape)), draw(dtypes), draw(meaning)
    if kind == "none":
        return SparseTensor(name, shape, indices, meaning="none", dtype=dtype)
    with_base = draw(st.sampled_from(["values", "digest"] if kind == "target" else ["values", "digest", "no"]))
    value_dtype = draw(dtypes) if kind == "delta" and with_base != "no" else dtype
    values = draw(any_bits(value_dtype, indices.shape))
    if with_base == "no":
        return SparseTensor(name, shape, indices, values, meaning=kind, dtype=dtype)
    base = draw(any_bits(dtype, indices.shape))
    tensor = SparseTensor(name, shape, indices, values, meaning=kind, dtype=dtype, base=base)
    if with_base == "values":
        return tensor
    return SparseTensor(name, shape, indices, values, meaning=kind, dtype=dtype, base_digest=tensor.base_digest)


@st.composite
def whole_tensors(draw: st.DrawFn, name: str = "b") -> WholeTensor:
    """A whole tensor of any dtype and small shape, with its base, the base's digest or neither."""
    dtype, shape = draw(st.sampled_from(list(DTYPES.values()))), draw(small_shapes(max_numel=64))
    values = draw(any_bits(dtype, shape))
    how = draw(st.sampled_from(["values", "digest", "no"]))
    if how == "no":
        return WholeTensor(name, values)
    tensor = WholeTensor(name, values, base=draw(any_bits(dtype, shape)))
    return tensor if how == "values" else WholeTensor(name, values, base_digest=tensor.base_digest)


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abé#/", max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def adapters(draw: st.DrawFn, max_tensors: int = 4) -> Adapter:
    """Sparse and whole tensors with provenance, keys that nobody knows, and tensors that share their indices."""
    names = draw(st.lists(NAMES, max_size=max_tensors, unique=True))
    names = [name for name in names if not any(name.startswith(f"{other}#") for other in names)]
    tensors: list[SparseTensor] = []
    whole: list[WholeTensor] = []
    for name in names:
        if draw(st.integers(0, 3)) == 0:
            whole.append(draw(whole_tensors(name)))
        elif len(tensors) > 0 and draw(st.booleans()):
            twin = draw(st.sampled_from(tensors))
            values = draw(any_bits(twin.dtype, twin.indices.shape))
            tensors.append(SparseTensor(name, twin.shape, twin.indices, values, base=values))
        else:
            tensors.append(draw(sparse_tensors(name)))
    manifest: dict[str, Any] = {}
    if draw(st.booleans()):
        manifest["alpha"] = draw(st.floats(-1e6, 1e6) | st.integers(-3, 3))
    if draw(st.booleans()):
        manifest["description"] = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
    if draw(st.booleans()):
        manifest["x-extra"] = draw(json_values)
    return Adapter(tensors, whole=whole, manifest=manifest)
