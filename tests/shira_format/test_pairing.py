"""Which tensor of a fine-tune comes from which of its base: names, prefixes, content; notices and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shira_format._core.arrays import Array
from shira_format._core.dtypes import DTYPES
from shira_format.checkpoints import Checkpoint
from shira_format.convert.pairing import Pairs, pair
from shira_format.errors import SourceError
from shira_format.names.filters import name_filter

BF16 = DTYPES["BF16"]
COUNT = np.arange(600, dtype=np.float32).reshape(30, 20)
IDS = np.arange(8)


class Memory(Checkpoint):
    """A checkpoint of arrays."""

    def __init__(self, path: str, arrays: dict[str, Array]) -> None:
        self.path, self.files, self._arrays = Path(path), [], arrays

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._arrays[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._arrays[name].dtype


def paired(
    base: dict[str, Array], tuned: dict[str, Array], *, exact: bool, include: Any = (), exclude: Any = ()
) -> Pairs:
    return pair(Memory("BASE", base), Memory("TUNED", tuned), name_filter(include, exclude), exact=exact)


def refused(base: dict[str, Array], tuned: dict[str, Array], *, exact: bool, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        paired(base, tuned, exact=exact, **options)
    return str(caught.value)


def origins(pairs: Pairs) -> dict[str, tuple[str, str]]:
    """By the result's name, those of the two it is made of."""
    return {change.name: (change.base_name, change.tuned_name) for change in pairs.sparse}


def changed(array: Array, share: float, seed: int = 0) -> Array:
    """The array with this share of its entries changed."""
    random = np.random.default_rng(seed)
    return np.where(random.random(array.shape) < share, array + 1000, array).astype(array.dtype)


# By name


@pytest.mark.parametrize("exact", [False, True])
def test_the_same_names(exact: bool) -> None:
    base = {
        "b": COUNT,
        "a": COUNT,
        "ids": IDS,
        "flags": IDS > 3,
        "other": IDS,
        "empty": COUNT[:0],
        "one": COUNT[0, 0],
    }
    tuned = {name: array + 1 if name in "ab" else array for name, array in sorted(base.items())} | {
        "other": IDS + 1
    }
    pairs = paired(base, tuned, exact=exact)
    assert ["b", "a", "empty", "one"] == list(origins(pairs))  # in the base's order
    assert all((name, name) == ends for name, ends in origins(pairs).items())
    assert [600, 600, 0, 1] == [change.size for change in pairs.sparse]
    assert ["ids", "flags"] == pairs.equal
    assert {"other": "other"} == pairs.whole
    assert ([], {}, []) == (pairs.removed, pairs.structure, pairs.notices)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rows", [0, 20, 29, 31, 40])
def test_more_rows_and_fewer(rows: int, exact: bool) -> None:
    pairs = paired({"w": COUNT, "v": COUNT}, {"w": np.ones((rows, 20), np.float32), "v": COUNT}, exact=exact)
    assert {"w": f"rows 30 -> {rows}"} == pairs.structure
    assert [min(30, rows) * 20, 600] == [change.size for change in pairs.sparse]
    assert ((30, 20), {}) == (pairs.sparse[0].shape, pairs.whole)


SHAPES = {
    "columns": (COUNT[:, 1:], "shape [30, 20] -> [30, 19]", "shape [30, 19], the base [30, 20]"),
    "rank": (COUNT.reshape(-1), "shape [30, 20] -> [600]", "shape [600], the base [30, 20]"),
    "scalar": (COUNT[0, 0], "shape [30, 20] -> []", "shape [], the base [30, 20]"),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_other_shapes(case: str) -> None:
    array, words, reason = SHAPES[case]
    base, tuned = {"w": COUNT, "v": COUNT}, {"w": np.asarray(array), "v": COUNT}
    pairs = paired(base, tuned, exact=True)
    assert ({"w": "w"}, {"w": words}, ["v"]) == (pairs.whole, pairs.structure, list(origins(pairs)))
    assert refused(base, tuned, exact=False) == (
        f"TUNED: tensor 'w' has shape {reason.removeprefix('shape ')}: only the first dimension may differ; leave it "
        "out, or take every difference (exact)"
    )
    assert ["v"] == list(origins(paired(base, tuned, exact=False, exclude=["^w$"])))


def test_another_float_dtype() -> None:
    base, tuned = {"w": COUNT, "v": COUNT}, {"w": COUNT.astype(BF16), "v": COUNT}
    pairs = paired(base, tuned, exact=True)
    assert ({"w": "w"}, {"w": "F32 -> BF16"}, ["v"]) == (pairs.whole, pairs.structure, list(origins(pairs)))
    pairs = paired(base, tuned, exact=False)  # rounded to the base's
    assert ({}, {}, ["w", "v"]) == (pairs.whole, pairs.structure, list(origins(pairs)))
    assert [np.float32, np.float32] == [change.dtype for change in pairs.sparse]
    wide = paired({"w": COUNT.astype(BF16)}, {"w": COUNT.astype(np.float64)}, exact=False).sparse[0]
    assert (np.float64, BF16) == (wide.dtype, wide.weight_dtype)


@pytest.mark.parametrize(
    ("before", "after", "words", "kinds"),
    [
        (IDS, np.arange(9), "shape [8] -> [9]", "I64[9], the base has I64[8]"),
        (IDS, IDS.astype(np.int32), "I64 -> I32", "I32[8], the base has I64[8]"),
        (IDS, IDS.astype(np.float32), "I64 -> F32", "F32[8], the base has I64[8]"),
        (IDS.astype(np.float32), IDS, "F32 -> I64", "I64[8], the base has F32[8]"),
        (IDS, IDS.astype(np.complex64), "I64 -> complex64", "complex64[8], the base has I64[8]"),
    ],
)
def test_integers_of_another_form(before: Array, after: Array, words: str, kinds: str) -> None:
    base, tuned = {"w": COUNT, "ids": before}, {"w": COUNT, "ids": after}
    pairs = paired(base, tuned, exact=True)
    assert ({"ids": "ids"}, {"ids": words}, []) == (pairs.whole, pairs.structure, pairs.equal)
    reason = f"TUNED: tensor 'ids' is {kinds}: leave it out, or take every difference (exact)"
    assert reason == refused(base, tuned, exact=False)


# What one of the two lacks


def test_a_weight_that_the_fine_tune_lacks() -> None:
    base, tuned = {"w": COUNT, "v": COUNT + 1}, {"w": COUNT}
    assert refused(base, tuned, exact=False) == (
        "TUNED: lacks tensor 'v' of the base BASE: leave it out to keep the base's, or take every difference (exact) to "
        "remove it"
    )
    assert ["w"] == list(origins(paired(base, tuned, exact=False, exclude=["v"])))
    pairs = paired(base, tuned, exact=True)
    assert (["v"], {"v": "removed"}, []) == (pairs.removed, pairs.structure, pairs.notices)
    assert [] == paired(base, tuned, exact=True, exclude=["v"]).removed


@pytest.mark.parametrize("empty", [False, True])
def test_a_tied_head_that_the_fine_tune_lacks(empty: bool) -> None:
    table = COUNT[:0] if empty else COUNT
    base = {"other": COUNT + 1, "embed": table, "again": table, "head": table.copy()}
    tuned = {name: base[name] + 1 for name in ("again", "embed", "other")}
    if empty:  # nothing tells that it is tied
        assert "lacks tensor 'head'" in refused(base, tuned, exact=False)
        return
    pairs = paired(base, tuned, exact=False)
    assert ["tensor 'head' of the base is not in the fine-tune: it is tied to 'embed'"] == pairs.notices
    assert ({}, [], {}) == (pairs.whole, pairs.removed, pairs.structure)
    assert ["head"] == paired(base, tuned, exact=True).removed


def test_weights_that_are_alike_are_not_tied() -> None:
    size = 1 << 21  # more than is looked at to tell whether two are alike
    table = np.zeros((size, 1), np.float16)
    head = table.copy()
    head[size // 2 + 300] = 1
    base = {"embed": table, "head": head, "tied": head.copy()}
    assert "lacks tensor 'head'" in refused(base, {"embed": table}, exact=False)
    pairs = paired(base, {"embed": table, "tied": head}, exact=False)
    assert ["tensor 'head' of the base is not in the fine-tune: it is tied to 'tied'"] == pairs.notices


def test_a_tied_head_that_the_base_lacks() -> None:
    base, tuned = {"other": COUNT + 7, "embed": COUNT}, {"embed": changed(COUNT, 0.1), "other": COUNT + 7}
    tuned["head"] = tuned["embed"]
    pairs = paired(base, tuned, exact=False)
    assert [
        "tensor 'head' of the fine-tune is not in the base: it is tied to 'embed', and left out"
    ] == pairs.notices
    assert ({}, {}, ["other", "embed"]) == (pairs.whole, pairs.structure, list(origins(pairs)))
    pairs = paired(base, tuned, exact=True)
    assert ("embed", "head") == origins(pairs)["head"]
    assert ({}, {"head": "from embed"}, []) == (pairs.whole, pairs.structure, pairs.removed)


@pytest.mark.parametrize("exact", [False, True])
def test_position_ids_on_one_side(exact: bool) -> None:
    pairs = paired({"w": COUNT, "position_ids": IDS}, {"w": COUNT}, exact=exact)
    notice = "tensor 'position_ids' of the base is not in the fine-tune, and stays unchanged"
    assert ([] if exact else [notice]) == pairs.notices
    assert (["position_ids"] if exact else []) == pairs.removed
    pairs = paired({"w": COUNT}, {"w": COUNT, "position_ids": IDS}, exact=exact)
    assert ({"position_ids": "position_ids"}, {"position_ids": "new"}) == (pairs.whole, pairs.structure)


@pytest.mark.parametrize("exact", [False, True])
def test_new_tensors_are_whole(exact: bool) -> None:
    tuned = {"w": COUNT, "head": COUNT[:2] - 9000, "empty": COUNT[:0], "ids": IDS}
    pairs = paired({"w": COUNT}, tuned, exact=exact)
    assert ["head", "empty", "ids"] == list(pairs.whole) == list(pairs.structure)
    assert {"new"} == set(pairs.structure.values())


@pytest.mark.parametrize("exact", [False, True])
def test_nothing_in_common(exact: bool) -> None:
    reason = "TUNED: no weight of it is in the base BASE: it has names like 'x', the base like 'w'"
    assert reason == refused({"w": COUNT}, {"x": np.ones((30, 20), np.float32)}, exact=exact)
    assert reason == refused({"w": COUNT}, {"x": COUNT[0]}, exact=exact)
    integers = refused({"ids": IDS, "w": COUNT}, {"ids": IDS}, exact=exact)  # which are no weights
    assert "no weight of it is in the base BASE: it has names like 'ids', the base like 'ids'" in integers
    assert "it has names like None, the base like 'w'" in refused({"w": COUNT}, {}, exact=exact)


@pytest.mark.parametrize("exact", [False, True])
def test_no_name_is_chosen(exact: bool) -> None:
    for options in ({"include": ["nothing"]}, {"exclude": [""]}):
        reason = refused({"w": COUNT}, {"w": COUNT}, exact=exact, **options)
        assert "TUNED: no tensor is left by the choice of names" == reason
    assert "no tensor is left" in refused({}, {}, exact=exact)


def test_names_that_are_not_chosen_stay_as_they_are() -> None:
    base = {"w": COUNT, "v": COUNT + 1, "ids": IDS, "gone": COUNT + 2}
    tuned = {"w": COUNT + 3, "v": COUNT[:, :3], "ids": IDS + 1, "new": COUNT + 4}
    for exact in (False, True):
        pairs = paired(base, tuned, exact=exact, include=["w", "ids"], exclude=["new"])
        assert (["w"], {"ids": "ids"}, []) == (list(origins(pairs)), pairs.whole, pairs.removed)
        assert {} == pairs.structure
    pairs = paired({"old": COUNT, "w": COUNT}, {"new": COUNT, "w": COUNT}, exact=True, include=["new", "w"])
    assert (["new", "w"], []) == (sorted(origins(pairs)), pairs.removed)


# By prefix


NAMES = ("layers.0.w", "layers.0.b", "layers.1.w", "embed")


@pytest.mark.parametrize("prefix", ["model.", "base.model.", "a.b.c."])
@pytest.mark.parametrize("exact", [False, True])
def test_a_prefix_of_all_names(exact: bool, prefix: str) -> None:
    plain = {name: COUNT + number for number, name in enumerate(NAMES)} | {"ids": IDS, "count": IDS}
    longer = {prefix + name: array for name, array in plain.items()}
    for base, same, words in ((plain, longer, "left out"), (longer, plain, "added")):
        tuned = {name: array + 9000 if array.dtype == np.float32 else array for name, array in same.items()}
        tuned[next(name for name in tuned if name.endswith("count"))] = IDS + 1
        pairs = paired(base, tuned, exact=exact)
        assert [f"names: the prefix {prefix!r} is {words}"] == pairs.notices
        by_name = dict(zip(base, tuned, strict=True))
        floats = [name for name in base if base[name].dtype == np.float32]
        assert {(by_name[name] if exact else name): (name, by_name[name]) for name in floats} == origins(pairs)
        count, ids = (next(n for n in base if n.endswith(end)) for end in ("count", "ids"))
        if exact:
            assert {by_name[count]: by_name[count], by_name[ids]: by_name[ids]} == pairs.whole
            assert {by_name[name]: f"renamed from {name}" for name in base} == pairs.structure
            assert list(base) == pairs.removed
        else:
            assert ({count: by_name[count]}, [ids], {}, []) == (
                pairs.whole,
                pairs.equal,
                pairs.structure,
                pairs.removed,
            )


@pytest.mark.parametrize("exact", [False, True])
def test_a_prefix_of_most_names(exact: bool) -> None:
    base = {name: COUNT + number for number, name in enumerate(NAMES)}
    tuned = {f"model.{name}": array for name, array in base.items()} | {"head.w": COUNT[:3] - 9000}
    pairs = paired(base, tuned, exact=exact)
    assert ({"head.w": "head.w"}, 4) == (pairs.whole, len(pairs.sparse))


def test_a_prefix_of_half_the_names_says_nothing() -> None:
    base = {name: COUNT + number for number, name in enumerate(NAMES)}
    tuned = {f"model.{name}": base[name] for name in NAMES[:2]} | {"embed": COUNT, "x": COUNT, "y": COUNT}
    assert "lacks tensor 'layers.0.w'" in refused(base, tuned, exact=False)
    assert 3 == len(origins(paired(base, tuned | {"model.layers.1.w": COUNT}, exact=False, exclude=["embed"])))


def test_a_prefix_takes_no_name_that_is_there() -> None:
    """``w`` is in both, so that ``model.w`` is something else."""
    base = {"w": COUNT, "v": COUNT + 1, "u": COUNT + 2}
    tuned = {"w": COUNT, "model.w": COUNT + 9000, "model.v": COUNT + 1, "model.u": COUNT + 2}
    pairs = paired(base, tuned, exact=False)
    assert {"w": ("w", "w"), "v": ("v", "model.v"), "u": ("u", "model.u")} == origins(pairs)
    assert {"model.w": "model.w"} == pairs.whole


# By content


def test_renamed_tensors_are_found_by_what_they_hold() -> None:
    base = {
        "a": COUNT,
        "b": COUNT + 1000,
        "c": COUNT.reshape(20, 30),
        "d": COUNT.astype(BF16),
        "ids": IDS,
        "keep": COUNT + 5,
    }
    tuned = {
        "D": changed(base["d"], 0.2), "C": changed(base["c"], 0.2), "B": changed(base["b"], 0.4, 1), "A": changed(COUNT, 0.4, 2),
        "keep": base["keep"], "IDS": IDS,
    }  # fmt: skip
    pairs = paired(base, tuned, exact=True)
    assert {name: (name.lower(), name) for name in "ABCD"} | {"keep": ("keep", "keep")} == origins(pairs)
    assert {f"{name}": f"renamed from {name.lower()}" for name in "ABCD"} | {
        "IDS": "new",
        "ids": "removed",
    } == pairs.structure
    assert {"a", "b", "c", "d", "ids"} == set(pairs.removed)
    assert len(pairs.removed) == len(set(pairs.removed))
    assert {"IDS": "IDS"} == pairs.whole


def test_renames_do_not_take_the_origin_of_another() -> None:
    """Each layer is much like the others; what is nearest is its own."""
    layers = {f"l{number}": changed(COUNT, 0.3, number) for number in range(6)}
    base = {"keep": COUNT - 5, **layers}
    tuned = {"keep": COUNT - 5} | {
        f"new{n[1:]}": changed(array, 0.02, 70) for n, array in reversed(layers.items())
    }
    pairs = paired(base, tuned, exact=True)
    found = {name: ends[0] for name, ends in origins(pairs).items() if name != "keep"}
    assert {f"new{number}": f"l{number}" for number in range(6)} == found
    assert set(layers) == set(pairs.removed)
    # Two with one origin, one of them with most of it changed: the other is not tied to it.
    base = {"keep": COUNT - 5, "one": COUNT}
    tuned = {"keep": COUNT - 5, "first": changed(COUNT, 0.1), "second": changed(COUNT, 0.1, 1)}
    pairs = paired(base, tuned, exact=True)
    assert {"keep", "first"} == origins(pairs).keys()
    assert ({"second": "second"}, ["one"]) == (pairs.whole, pairs.removed)


def test_a_renamed_tensor_goes_before_one_that_stays() -> None:
    base = {"stays": COUNT, "goes": COUNT.copy()}
    pairs = paired(base, {"stays": COUNT, "new": COUNT}, exact=True)
    assert ("goes", "new") == origins(pairs)["new"]
    assert (["goes"], {"new": "renamed from goes"}) == (pairs.removed, pairs.structure)


def test_many_may_be_tied_to_one() -> None:
    pairs = paired({"old": COUNT}, {"one": COUNT, "two": COUNT, "three": COUNT}, exact=True)
    assert {name: ("old", name) for name in ("one", "two", "three")} == origins(pairs)
    assert ["old"] == pairs.removed
    assert dict.fromkeys(("one", "two", "three"), "from old") == pairs.structure


def test_too_little_in_common_is_new() -> None:
    base = {"keep": COUNT - 5, "old": COUNT}
    for share, origin in ((0.45, True), (0.6, False)):
        pairs = paired(base, {"keep": COUNT - 5, "new": changed(COUNT, share)}, exact=True)
        assert origin == ("new" in origins(pairs))
        assert ({} if origin else {"new": "new"}) == pairs.whole


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), ()])
def test_tensors_without_content(shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, np.float32)
    pairs = paired({"keep": COUNT, "old": array}, {"keep": COUNT, "new": array}, exact=True)
    assert ("old", "new") == origins(pairs)["new"]
    assert ["old"] == pairs.removed


def test_content_is_compared_by_bits() -> None:
    nan, zero = np.full((4, 5), np.nan, np.float32), np.zeros((4, 5), np.float32)
    base = {"keep": COUNT, "nan": nan, "zero": zero}
    pairs = paired(base, {"keep": COUNT, "new": nan.copy(), "minus": -zero}, exact=True)
    assert {"keep", "new"} == origins(pairs).keys()
    assert ("nan", ["zero", "nan"]) == (origins(pairs)["new"][0], pairs.removed)
    assert {"minus": "minus"} == pairs.whole


def test_content_of_large_tensors_is_seen_all_over() -> None:
    """The first half of two tensors is the same; the second tells them apart."""
    size = 1 << 18
    random = np.random.default_rng(1)
    first = random.standard_normal(size).astype(np.float32)
    base = {
        f"l{n}": np.concatenate([first, random.standard_normal(size // 2).astype(np.float32)]) for n in range(3)
    }
    tuned = {f"m{n}": base[f"l{n}"] for n in reversed(range(3))} | {"keep": COUNT}
    pairs = paired(base | {"keep": COUNT}, tuned, exact=True)
    assert {f"m{n}": f"l{n}" for n in range(3)} == {k: v[0] for k, v in origins(pairs).items() if k != "keep"}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("back", [False, True])
def test_two_towers_with_two_prefixes(exact: bool, back: bool) -> None:
    """A vision-language model as transformers 5 has it in memory, and as it is on disk; heads of both as they are."""
    names = {
        "model.visual.blocks.0.q.w": "visual.blocks.0.q.w", "model.visual.merger.w": "visual.merger.w",
        "model.language_model.layers.0.q.w": "model.layers.0.q.w", "model.language_model.norm.w": "model.norm.w",
        "lm_head.w": "lm_head.w",
    }  # fmt: skip
    # All of one content, so that it is names that decide.
    base = {(theirs if back else ours): COUNT for ours, theirs in names.items()}
    tuned = {(ours if back else theirs): COUNT + 1 for ours, theirs in names.items()}
    pairs = paired(base, tuned, exact=exact)
    wanted = {theirs: ours for ours, theirs in names.items()} if not back else names
    assert {change.tuned_name: change.base_name for change in pairs.sparse} == wanted
    assert not pairs.whole
    assert any("names: of names like" in notice for notice in pairs.notices)
