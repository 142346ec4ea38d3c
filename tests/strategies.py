"""Hypothesis strategies: what an adapter holds (any dtype, meaning, shape, mask and bit pattern), and pairs of checkpoints."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

from shira_format._core.arrays import Array, Indices
from shira_format._core.dtypes import DTYPES, FLOATS
from shira_format.adapter import Adapter
from shira_format.tensors import MAX_NUMEL, DenseTensor, SparseTensor, ValueKind, matrix_shape, numel

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
    rows, columns = matrix_shape(shape)
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
    rows, columns = matrix_shape(shape)
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
meanings: st.SearchStrategy[ValueKind] = st.sampled_from(["target", "delta", "none"])


@st.composite
def sparse_tensors(
    draw: st.DrawFn,
    name: str = "w",
    *,
    shapes: st.SearchStrategy[Shape] | None = None,
    value_kind: st.SearchStrategy[ValueKind] = meanings,
    dtypes: st.SearchStrategy[np.dtype[Any]] = float_dtypes,
) -> SparseTensor:
    """A tensor of any dtype and meaning; targets with base values or their digest alone."""
    shape = draw(small_shapes() | st.sampled_from(HUGE_SHAPES) if shapes is None else shapes)
    indices, dtype, kind = draw(masks(shape)), draw(dtypes), draw(value_kind)
    if kind == "none":
        return SparseTensor(name, shape, indices, value_kind="none", dtype=dtype)
    with_base = draw(st.sampled_from(["values", "digest"] if kind == "target" else ["values", "digest", "no"]))
    value_dtype = draw(dtypes) if kind == "delta" and with_base != "no" else dtype
    values = draw(any_bits(value_dtype, indices.shape))
    if with_base == "no":
        return SparseTensor(name, shape, indices, values, value_kind=kind, dtype=dtype)
    base = draw(any_bits(dtype, indices.shape))
    tensor = SparseTensor(name, shape, indices, values, value_kind=kind, dtype=dtype, base=base)
    if with_base == "values":
        return tensor
    return SparseTensor(name, shape, indices, values, value_kind=kind, dtype=dtype, base_digest=tensor.base_digest)


@st.composite
def as_patch(draw: st.DrawFn, tensor: SparseTensor) -> SparseTensor:
    """The same tensor from one of another name or size, or with a digest of the result; sometimes as it is."""
    more: dict[str, Any] = {"base_name": draw(st.just(tensor.name) | NAMES)}
    if tensor.value_kind == "target" and draw(st.booleans()):
        more["result_digest"] = draw(st.sampled_from(["0" * 64, "0123456789abcdef" * 4]))
    if tensor.shape and tensor.value_kind != "none" and draw(st.booleans()):
        more |= draw(_rows(tensor))
    return SparseTensor(
        tensor.name, tensor.shape, tensor.indices, tensor.values if tensor.value_kind != "none" else None,
        value_kind=tensor.value_kind, dtype=tensor.dtype, base=tensor.base, base_digest=tensor.base_digest, **more,
    )  # fmt: skip


@st.composite
def _rows(draw: st.DrawFn, tensor: SparseTensor) -> Part:
    """More rows, fewer than there were but not than have entries, or just as many."""
    count, columns = tensor.shape[0], numel(tensor.shape[1:])
    needed = int(tensor.indices[-1]) // columns + 1 if tensor.nnz else 0
    rows = draw(st.sampled_from([count, needed, count + 1, count + 3]) | st.integers(needed, count))
    more = max(0, rows - count)
    if more * columns > 4096 or rows * columns > MAX_NUMEL:
        return {}
    new_rows = draw(any_bits(tensor.dtype, (more, *tensor.shape[1:]))) if more else None
    return {"rows": rows, "new_rows": new_rows}


@st.composite
def whole_tensors(draw: st.DrawFn, name: str = "b") -> DenseTensor:
    """A whole tensor of any dtype and small shape, with its base, the base's digest or neither."""
    dtype, shape = draw(st.sampled_from(list(DTYPES.values()))), draw(small_shapes(max_numel=64))
    values = draw(any_bits(dtype, shape))
    how = draw(st.sampled_from(["values", "digest", "no"]))
    if how == "no":
        return DenseTensor(name, values)
    tensor = DenseTensor(name, values, base=draw(any_bits(dtype, shape)))
    return tensor if how == "values" else DenseTensor(name, values, base_digest=tensor.base_digest)


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
    """Sparse and whole tensors with provenance, keys that nobody knows, and tensors that share their indices; patches too."""
    names = draw(st.lists(NAMES, max_size=max_tensors, unique=True))
    patch = draw(st.booleans())
    names = [name for name in names if not any(name.startswith(f"{other}#") for other in names)]
    tensors: list[SparseTensor] = []
    whole: list[DenseTensor] = []
    for name in names:
        if draw(st.integers(0, 3)) == 0:
            whole.append(draw(whole_tensors(name)))
        elif len(tensors) > 0 and draw(st.booleans()):
            twin = draw(st.sampled_from(tensors))
            values = draw(any_bits(twin.dtype, twin.indices.shape))
            tensors.append(SparseTensor(name, twin.shape, twin.indices, values, base=values))
        else:
            tensors.append(draw(sparse_tensors(name)))
        if patch and tensors and tensors[-1].name == name:
            tensors[-1] = draw(as_patch(tensors[-1]))
    manifest: dict[str, Any] = {}
    if draw(st.booleans()):
        manifest["alpha"] = draw(st.floats(-1e6, 1e6) | st.integers(-3, 3))
    if draw(st.booleans()):
        manifest["description"] = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
    if draw(st.booleans()):
        manifest["x-extra"] = draw(json_values)
    if patch and draw(st.booleans()):
        removed = draw(st.lists(NAMES, max_size=3, unique=True))
        manifest["removed"] = [name for name in removed if name not in names]
    return Adapter(tensors, dense=whole, manifest=manifest)


Arrays = dict[str, Array]

_CHANGES = ("keep", "flip", "whole", "dtype", "reshape", "rows", "remove", "rename", "tie")


@st.composite
def flipped(draw: st.DrawFn, array: Array) -> Array:
    """The array with some of its elements changed: by a bit each, to NaNs and to -0.0 among them."""
    changed = array.copy()
    flat = changed.reshape(-1)
    if flat.size == 0:
        return changed
    places = st.integers(0, flat.size - 1)
    if array.dtype == np.dtype("?"):
        for place in draw(st.lists(places, max_size=4)):
            flat[place] = not flat[place]
        return changed
    unsigned = flat.view(f"u{array.dtype.itemsize}")
    for place in draw(st.lists(places, max_size=max(1, min(8, flat.size // 4)))):
        unsigned[place] ^= unsigned.dtype.type(1 << draw(st.integers(0, 8 * array.dtype.itemsize - 1)))
    if array.dtype in FLOATS.values() and draw(st.booleans()):
        flat[draw(places)] = draw(st.sampled_from([-0.0, math.nan]))
    return changed


@st.composite
def checkpoint_pairs(draw: st.DrawFn, max_tensors: int = 5) -> tuple[Arrays, Arrays]:
    """A base and a fine-tune of it in which anything may have happened but to one weight, that has some of its values."""
    kinds = st.sampled_from(list(DTYPES.values())) | float_dtypes
    names = draw(st.lists(st.sampled_from([f"{a}.{b}.w" for a in "abc" for b in "xyz"]), unique=True, max_size=max_tensors))  # fmt: skip
    base = {name: draw(any_bits(draw(kinds), draw(small_shapes(max_rank=3, max_numel=300)))) for name in names}
    anchor = np.arange(40, dtype=np.float32).reshape(8, 5) / 7
    base["a.anchor"] = anchor
    tuned: Arrays = {}
    for name, array in base.items():
        change = draw(st.sampled_from(_CHANGES)) if name != "a.anchor" else draw(st.sampled_from(["keep", "flip"]))
        if change == "remove":
            continue
        tuned[f"renamed.{name}" if change == "rename" else name] = draw(_changed(array, change, kinds))
        if change == "tie":
            tuned[f"tied.{name}"] = draw(st.just(array) | flipped(array))
    for name in draw(st.lists(st.sampled_from(["new.w", "a.new"]), unique=True)):
        tuned[name] = draw(any_bits(draw(kinds), draw(small_shapes(max_rank=2, max_numel=40))))
    if draw(st.integers(0, 4)) == 0:  # each name has the content of another
        tuned = dict(zip(tuned, draw(st.permutations(list(tuned.values()))), strict=True))
    prefix = draw(st.sampled_from(["", "", "", "model.", "module.model."]))
    if draw(st.booleans()):
        return base, {prefix + name: array for name, array in tuned.items()}
    return {prefix + name: array for name, array in base.items()}, tuned


@st.composite
def _changed(draw: st.DrawFn, array: Array, change: str, kinds: st.SearchStrategy[np.dtype[Any]]) -> Array:
    if change == "whole":
        return draw(any_bits(array.dtype, array.shape))
    if change == "dtype":
        with np.errstate(all="ignore"):
            return array.astype(draw(kinds))
    if change == "reshape":
        return draw(any_bits(array.dtype, draw(small_shapes(max_rank=3, max_numel=60))))
    if change == "rows" and array.ndim:
        rows = draw(st.integers(0, array.shape[0] + 2))
        more = draw(any_bits(array.dtype, (max(0, rows - array.shape[0]), *array.shape[1:])))
        return np.concatenate([draw(flipped(array[:rows])), more])
    return array if change == "keep" else draw(flipped(array))
