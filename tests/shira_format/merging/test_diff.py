"""What differs between two adapters: every kind of difference is told, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shira_format._core.arrays import array_digest
from shira_format.adapter import Adapter
from shira_format.convert import lora_to_shira
from shira_format.errors import FormatError, SourceError
from shira_format.format import load, save
from shira_format.merging.diff import Differences, TensorDifference, diff
from shira_format.tensors import DenseTensor, SparseTensor
from tests import models, strategies

BASE = np.arange(24, dtype=np.float32)
pytestmark = pytest.mark.usefixtures("kernels")  # everything here holds with numba and without


def sparse(at: list[int], values: list[float], name: str = "w", **more: Any) -> SparseTensor:
    known = {} if more.get("value_kind") in ("delta", "none") or "base_digest" in more else {"base": BASE[at]}
    return SparseTensor(name, (4, 6), at, np.float32(values), **(known | more))


def one(a: SparseTensor | DenseTensor, b: SparseTensor | DenseTensor) -> TensorDifference:
    """The difference of two adapters of one tensor."""
    first, second = (Adapter([t]) if isinstance(t, SparseTensor) else Adapter(dense=[t]) for t in (a, b))
    found = diff(first, second)
    (tensor,) = found.tensors
    assert (first == second) == found.same == tensor.same
    turned = diff(second, first).tensors[0]
    assert (tensor.only_first, tensor.only_second, tensor.equal, tensor.other, tensor.largest, tensor.same_base) == (
        turned.only_second, turned.only_first, turned.equal, turned.other, turned.largest, turned.same_base,
    )  # fmt: skip
    return tensor


def test_entries() -> None:
    found = one(sparse([1, 4, 7, 9, 20], [0, 1, 2, 3, 4]), sparse([0, 4, 7, 9], [0, 1, 2.5, -3]))
    expected = TensorDifference(
        "w", False, (5, 4), only_first=2, only_second=1, equal=1, other=2, largest=6.0, same_base=True
    )
    assert expected == found
    same = one(sparse([1, 4], [0, 1]), sparse([1, 4], [0, 1]))
    assert TensorDifference("w", False, (2, 2), equal=2, largest=0.0, same_base=True) == same
    apart = one(sparse([1], [0]), sparse([2], [0]))
    assert TensorDifference("w", False, (1, 1), only_first=1, only_second=1) == apart


def test_bits_count_not_values() -> None:
    assert (1, 0, 0.0) == values(one(sparse([1, 2], [0.0, np.nan]), sparse([1, 2], [-0.0, np.nan])))
    assert (1, 0, None) == values(one(sparse([1, 2], [np.inf, 1]), sparse([1, 2], [1, 1])))
    half = SparseTensor("w", (4, 6), [3], np.array([1], ml_dtypes.bfloat16))
    other = SparseTensor("w", (4, 6), [3], np.array([1.5], ml_dtypes.bfloat16))
    assert (1, 0, 0.5) == values(one(half, other))


def values(found: TensorDifference) -> tuple[int, int, float | None]:
    return found.other, found.only_first, found.largest


def test_meanings_are_compared_where_the_base_is_known() -> None:
    delta = sparse([1, 4], [2, 3], value_kind="delta")
    found = one(sparse([1, 4], [3, 8]), delta)  # deltas 2 and 4
    assert (("meaning", "base values", "base"), 2, 1.0, None) == (
        found.traits, found.other, found.largest, found.same_base,
    )  # fmt: skip
    assert one(sparse([1, 4], [3, 8], base_digest=array_digest(BASE[[1, 4]])), delta).largest is None
    mask = SparseTensor("w", (4, 6), [1, 5], value_kind="none")
    assert TensorDifference("w", False, (2, 2), equal=2) == one(mask, mask)
    found = one(mask, delta)
    assert (("meaning",), 1, 1, 1, None) == (
        found.traits, found.only_first, found.only_second, found.other, found.largest,
    )  # fmt: skip


def test_bases() -> None:
    known = array_digest(BASE[[1, 4]])
    here = sparse([1, 4], [0, 1])
    assert ((), True) == traits(
        one(sparse([1, 4], [0, 1], base_digest=known), sparse([1, 4], [0, 1], base_digest=known))
    )
    assert (("base values",), True) == traits(one(here, sparse([1, 4], [0, 1], base_digest=known)))
    assert (("base values", "base"), False) == traits(one(here, sparse([1, 4], [0, 1], base_digest="0" * 64)))
    assert (("base",), False) == traits(one(here, sparse([1, 4], [0, 1], base=np.float32([1, 5]))))
    # With other entries, values at those that are shared tell, and digests do not.
    assert ((), True) == traits(one(here, sparse([1, 5], [0, 1])))
    assert (("base",), False) == traits(one(here, sparse([1, 5], [0, 1], base=np.float32([7, 5]))))
    assert (("base values",), None) == traits(one(here, sparse([1, 5], [0, 1], base_digest="0" * 64)))


def traits(found: TensorDifference) -> tuple[tuple[str, ...], bool | None]:
    return found.traits, found.same_base


def test_frames() -> None:
    wide = SparseTensor("w", (4, 7), [1], np.float32([0]), base=BASE[[1]])
    found = one(sparse([1], [0]), wide)
    assert (("shape",), 1, 1, 0, None) == (
        found.traits, found.only_first, found.only_second, found.equal, found.same_base,
    )  # fmt: skip
    double = SparseTensor("w", (4, 6), [1], np.array([0.25]), base=np.array([1.0]))
    found = one(sparse([1], [0]), double)
    assert (("dtype", "base"), 1, 0.25, False) == (found.traits, found.other, found.largest, found.same_base)
    more = sparse([1], [0], rows=5, new_rows=np.ones((1, 6), np.float32))
    assert ("patch",) == one(sparse([1], [0]), more).traits
    assert ("patch",) == one(more, sparse([1], [0], rows=5, new_rows=np.zeros((1, 6), np.float32))).traits
    assert ("patch",) == one(sparse([1], [0]), sparse([1], [0], base_name="v")).traits
    assert () == one(sparse([1], [0]), sparse([1], [0], rows=4)).traits
    assert ("result",) == one(sparse([1], [0]), sparse([1], [0], result_digest="0" * 64)).traits
    wide_delta = SparseTensor(
        "w", (4, 6), [1], np.array([0.0]), value_kind="delta", dtype=np.float32, base=BASE[[1]]
    )
    found = one(sparse([1], [0], value_kind="delta", base=BASE[[1]]), wide_delta)
    assert (("dtype of values",), 1, 0.0, True) == (found.traits, found.other, found.largest, found.same_base)


def test_whole_tensors() -> None:
    def whole(numbers: list[float], dtype: Any = np.float32, **more: Any) -> DenseTensor:
        return DenseTensor("b", np.array(numbers, dtype), **more)

    assert TensorDifference("b", True, (2, 2), equal=2, largest=0.0) == one(whole([1, 2]), whole([1, 2]))
    assert TensorDifference("b", True, (2, 2), equal=1, other=1, largest=3.0) == one(whole([1, 2]), whole([1, 5]))
    longer = one(whole([1, 2]), whole([1, 2, 3]))
    assert TensorDifference("b", True, (2, 3), ("shape",), only_first=2, only_second=3) == longer
    found = one(whole([1, 2], np.int64), whole([1, 2]))
    assert (("dtype",), 2, 0.0) == (found.traits, found.other, found.largest)
    base = np.float32([0, 0])
    assert (("base values", "base"), None) == traits(one(whole([1, 2], base=base), whole([1, 2])))
    assert (("base",), False) == traits(one(whole([1, 2], base=base), whole([1, 2], base=base + 1)))
    assert (("base values",), True) == traits(
        one(whole([1, 2], base=base), whole([1, 2], base_digest=array_digest(base)))
    )
    assert one(whole([]), whole([])).largest is None


def test_adapters() -> None:
    a = Adapter([sparse([1], [0], "a"), sparse([2], [0], "x")], manifest={"alpha": 2, "license": "mit", "k": [1]})
    b = Adapter(
        [sparse([2], [0], "x")], dense=[DenseTensor("a", BASE)], manifest={"alpha": 1, "removed": ["r"], "k": [1], "n": None}
    )  # fmt: skip
    found = diff(a, b)
    assert (2.0, 1.0) == found.alpha
    assert ((), ("r",)) == found.removed
    assert {"license": ("mit", None), "n": (None, None)} == found.provenance
    lone, both, whole = found.tensors
    assert TensorDifference("a", False, (1, None), only_first=1) == lone
    assert both.same
    assert TensorDifference("a", True, (None, 24), only_second=24) == whole
    assert [lone, whole] == found.different
    assert not diff(a, b, include=["x"]).same  # the strength is the whole adapter's
    alike = Adapter(dict(a), manifest={"alpha": 2.0, "source": {}})
    done: list[str] = []
    found = diff(a, alike, exclude=["^a"], progress=done.append)
    assert (["x"], True) == (done, found.same)
    assert {"license", "k", "source"} == set(found.provenance)
    taken = Adapter(dict(b), dense=dict(b.dense), manifest={"removed": ["r", "s"]})
    assert not diff(b, taken).same
    assert diff(b, taken, exclude=["^s$"]).same


@given(strategies.adapters(), st.data())
def test_same_is_what_equality_says(a: Adapter, data: st.DataObject) -> None:
    assert diff(a, a).same
    b = data.draw(strategies.adapters())
    mixed = Adapter(
        {name: data.draw(st.sampled_from([tensor, b.get(name, tensor)])) for name, tensor in a.items()},
        dense=data.draw(st.sampled_from([dict(a.dense), dict(b.dense)])), manifest=data.draw(st.sampled_from([a, b])).manifest,
    )  # fmt: skip
    for other in (b, mixed):
        found = diff(a, other)
        assert (a == other) == found.same == diff(other, a).same
        for tensor in found.tensors:
            for size, lone in zip(tensor.entries, (tensor.only_first, tensor.only_second), strict=True):
                assert (size or 0) == lone + (tensor.equal + tensor.other if size is not None else 0)


def test_files(tmp_path: Path) -> None:
    paths = []
    for number, options in enumerate(({}, {"self_contained": True}, {"density": 0.02})):
        path = tmp_path / f"{number}.st"
        lora_to_shira(models.LORAS / "spam", models.minilm(), path, include=["layer.0.attention"], **options)
        paths.append(path)
    assert Differences(tensors=diff(paths[0], paths[0]).tensors) == diff(paths[0], str(paths[0]))
    contained = diff(paths[0], paths[1])
    assert {("base values",)} == {tensor.traits for tensor in contained.tensors}
    assert {True} == {tensor.same_base for tensor in contained.tensors}
    more = diff(load(paths[0]), paths[2])
    adapter, other = load(paths[0]), load(paths[2])
    assert more.tensors
    for tensor in more.tensors:
        a, b = adapter[tensor.name].indices, other[tensor.name].indices
        assert (0, b.size - a.size, a.size, 0) == (
            tensor.only_first, tensor.only_second, tensor.equal, tensor.other,
        )  # the larger choice holds the smaller one  # fmt: skip


def test_bad_input(tmp_path: Path) -> None:
    save(Adapter([sparse([1], [0])]), tmp_path / "a.st")
    data = bytearray((tmp_path / "a.st").read_bytes())
    data[-1] ^= 1
    (tmp_path / "bad.st").write_bytes(data)
    with pytest.raises(FormatError, match=r"bad\.st: tensor 'w.*digest differs"):
        diff(tmp_path / "a.st", tmp_path / "bad.st")
    with pytest.raises(SourceError, match="not a regular expression"):
        diff(tmp_path / "a.st", tmp_path / "a.st", include=["("])
    with pytest.raises(OSError, match="none"):
        diff(tmp_path / "a.st", tmp_path / "none.st")
