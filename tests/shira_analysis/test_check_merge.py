"""Laws of strengths that explain a merged weight, and the verdicts that follow from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from shira_analysis.merging.check import check_merge
from shira_analysis.merging.check.check import MergeCheck
from shira_analysis.merging.check.report import LayerVerdict, MergeVerdict, as_json
from shira_analysis.merging.check.sources import ExpectedChange, Source
from shira_analysis.merging.check.stored import float_info, held_dtype
from shira_format._core.arrays import Array, as_array
from shira_format._core.dtypes import FLOATS, round_to
from shira_format.adapter import Adapter
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.format import save
from shira_format.lora.decomposed import Decomposed
from shira_format.lora.products import LowRank
from shira_format.tensors import SparseTensor
from tests import models

F16, BF16, F32, F64 = (FLOATS[name] for name in ("F16", "BF16", "F32", "F64"))
NAME = "layer.weight"


class Held(Checkpoint):
    """A checkpoint in memory."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self.path, self.files, self.arrays = Path("held"), [], arrays

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self.arrays[name].dtype


@dataclass(frozen=True)
class Pair:
    """A weight and an update of it."""

    base: Array
    update: LowRank

    @property
    def dense(self) -> Array:
        return self.update.up.astype(np.float64) @ self.update.down.astype(np.float64)

    def merged(self, dtype: np.dtype[Any], strength: float = 1.0) -> Array:
        """Merged as it should be: the exact sum, rounded once."""
        return round_to(self.base.astype(np.float64) + strength * self.dense, dtype)

    def check(self, merged: Array, strength: float | None = None, **options: Any) -> MergeVerdict:
        source = Source([ExpectedChange("weight", self.update, NAME)])
        return MergeCheck(Held({NAME: self.base}), source, Held({NAME: merged}), strength=strength, **options).run(
            2
        )

    def layer(self, merged: Array, strength: float | None = None) -> LayerVerdict:
        return self.check(merged, strength).layers[0]


def pair(
    size: float, dtype: np.dtype[Any] = F32, seed: int = 0, shape: tuple[int, int] = (60, 50), rank: int = 4
) -> Pair:
    """Weights of about 0.05, and an update of about ``size``."""
    rng = np.random.default_rng(seed)
    up, down = rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, shape[1]))
    update = LowRank(NAME, shape, np.float32(up * size / rank**0.5), np.float32(down))
    return Pair(round_to(0.05 * rng.standard_normal(shape), dtype), update)


PAIRS = st.builds(
    pair, st.floats(-5, -1.3).map(lambda x: 10**x), st.sampled_from([F16, BF16, F32, F64]), st.integers(0, 99),
    st.sampled_from([(60, 50), (1, 400), (400, 1), (30, 2000)]),
)  # fmt: skip
DTYPES = st.sampled_from([F16, BF16, F32, F64])
STRENGTHS = st.floats(-3, 3).filter(lambda s: abs(s) > 0.05)


@given(PAIRS, DTYPES, STRENGTHS)
def test_a_right_merge_is_verified_or_hidden(made: Pair, dtype: np.dtype[Any], strength: float) -> None:
    merged = made.merged(dtype, strength)
    layer = made.layer(merged, strength)
    assert layer.verdict in ("verified", "unclear"), layer
    assert layer.low is not None
    assert layer.high is not None
    assert layer.low <= strength <= layer.high
    plain = round_to(made.base.astype(np.float64), dtype)
    moved = np.count_nonzero(merged != plain)
    # Where most entries have moved by more than rounding leaves open, the merge can be detected.
    ulp = np.spacing(np.abs(merged.astype(F32))) * 2.0 ** (23 - float_info(dtype).nmant) if dtype != F64 else 0
    if moved > 30 and np.median(np.abs(strength * made.dense) / np.maximum(ulp, 1e-30)) > 4:
        assert layer.verdict == "verified"
        assert layer.strength == pytest.approx(strength, rel=0.05)


@given(PAIRS, DTYPES, STRENGTHS)
def test_an_unmerged_base_is_never_verified(made: Pair, dtype: np.dtype[Any], strength: float) -> None:
    merged = round_to(made.base.astype(np.float64), dtype)
    report = made.check(merged, strength)
    assert report.layers[0].verdict in ("absent", "unclear"), report.layers
    assert report.answer in ("no", "inconclusive")
    if np.count_nonzero(made.merged(dtype, strength) != merged) == 0:
        assert report.answer == "inconclusive"


@given(PAIRS, DTYPES, STRENGTHS, STRENGTHS)
def test_another_strength_is_never_verified(
    made: Pair, dtype: np.dtype[Any], strength: float, other: float
) -> None:
    assume(abs(strength - other) > 0.05 * abs(other))
    layer = made.layer(made.merged(dtype, strength), other)
    # Both fit where rounding hides which it was: then not enough is known of either.
    if layer.verdict == "verified":
        assert layer.low is not None
        assert layer.high is not None
        assert layer.low <= strength <= layer.high
    if layer.verdict == "strength":
        assert layer.strength == pytest.approx(strength, rel=0.5)
        assert layer.low <= strength <= layer.high  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_strengths_are_found(dtype: np.dtype[Any]) -> None:
    made = pair(0.01, dtype, shape=(200, 300))
    for strength in (0.25, 0.9, 1.03, 2.0, -1.0, 16.0):
        report = made.check(made.merged(dtype, strength))
        assert report.answer == "no"
        assert report.layers[0].verdict == "strength"
        assert report.strength == pytest.approx(strength, rel=2e-3)
        assert made.check(made.merged(dtype, strength), strength).answer == "yes"


def test_the_smallest_update_that_can_be_told() -> None:
    """A tenth of an ulp moves one entry in twenty or so, and these tell."""
    made = pair(0.00002, BF16, shape=(300, 300))
    merged = made.merged(BF16)
    share = np.mean(merged != made.base)
    assert 0.001 < share < 0.1
    assert made.layer(merged).verdict == "verified"
    assert made.layer(made.base).verdict == "absent"
    assert made.layer(made.merged(BF16, 1.5)).verdict == "strength"
    assert made.layer(made.merged(BF16, 0.25)).verdict != "verified"


def test_the_base_rounded_before_or_after() -> None:
    made = pair(0.0003, F32, shape=(200, 200))
    after = made.merged(BF16)
    before = round_to(round_to(made.base, BF16).astype(F32) + made.dense.astype(F32), BF16)
    assert np.count_nonzero(after != before) > 1000
    assert (made.layer(after).verdict, made.layer(after).reason) == ("verified", "")
    assert (made.layer(before).verdict, made.layer(before).reason) == ("verified", "base rounded first")


def test_the_update_in_16_bits() -> None:
    made = pair(0.02, F32)
    merged = made.base + round_to(made.dense, BF16).astype(F32)
    layer = made.layer(merged)
    assert (layer.verdict, layer.reason) == ("verified", "update in 16 bits")
    assert layer.equal is not None
    assert layer.equal < 0.9
    scaled = round_to(made.update.up, BF16).astype(F32) @ round_to(made.update.down, BF16).astype(F32)
    assert made.layer(made.base + scaled).verdict == "verified"


def test_cut_off_instead_of_rounded() -> None:
    """Casts that drop bits are off by up to an ulp, as what was rounded twice is."""
    made = pair(0.0005, F32)
    exact = np.ascontiguousarray(made.base + made.dense.astype(F32))
    cut = (exact.view(np.uint32) & np.uint32(0xFFFF0000)).view(F32)
    layer = made.layer(round_to(cut, BF16))
    assert (layer.verdict, layer.reason) == ("verified", "rounded twice")
    assert (
        made.layer(round_to((made.base.view(np.uint32) & np.uint32(0xFFFF0000)).view(F32), BF16)).verdict
        != "verified"
    )


def test_few_entries_say_little() -> None:
    """An update of one to sixteen entries that move by an ulp each."""
    base = np.full((40, 50), 1.5, BF16)
    up, down = np.zeros((40, 1), F32), np.zeros((1, 50), F32)
    up[3] = 0.006
    for count, verdict in ((1, "unclear"), (15, "unclear"), (16, "verified"), (50, "verified")):
        down[0, :count] = 1
        made = Pair(base, LowRank(NAME, (40, 50), up, down))
        assert count == np.count_nonzero(made.merged(BF16) != base)
        assert verdict == made.layer(made.merged(BF16)).verdict
        assert made.layer(base).verdict == "absent"


def test_a_little_more_everywhere() -> None:
    """Small enough for each entry, if the arithmetic is of 16 bits; but roundings go either way."""
    made = pair(0.02, F32)
    right = made.base + round_to(made.dense, BF16).astype(F32)
    assert made.layer(right).verdict == "verified"
    more = 0.011 * np.abs(made.dense).astype(F32)
    assert made.layer(right + more).verdict == "different"


def test_rows_of_one_entry() -> None:
    """What is left of a sum says nothing of how far it may be off."""
    made = pair(0.001, F16, 2, (400, 1))
    layer = made.layer(made.merged(F64))
    assert (layer.verdict, layer.reason) == ("verified", "")


def test_bf16_in_a_float32_file() -> None:
    made = pair(0.002, BF16)
    assert made.layer(made.merged(BF16).astype(F32)).verdict == "verified"
    assert made.layer(made.merged(F32)).verdict == "verified"
    # A sample says bfloat16, and one entry elsewhere proves it wrong.
    large = pair(0.002, BF16, shape=(100, 200))
    merged = large.merged(BF16).astype(F32)
    merged[41, 100] = large.merged(F32)[41, 100]
    assert large.merged(F32)[41, 100] != large.merged(BF16)[41, 100]
    assert held_dtype(Held({NAME: merged}), NAME) == BF16
    assert large.layer(merged).verdict == "different"


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_one_entry_more(dtype: np.dtype[Any]) -> None:
    """A single entry that is off by two ulps and a twentieth of the update fails the layer."""
    made = pair(0.01, dtype)
    for place in ((0, 0), (59, 49), (31, 7)):
        merged = made.merged(dtype)
        step = 0.05 * np.abs(made.dense).max() + 2.1 * float(np.spacing(np.abs(merged[place])))
        merged[place] = merged[place].astype(F64) + step
        report = made.check(merged)
        assert report.layers[0].verdict == "different", place
        assert report.answer == "no"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_entries_that_are_no_numbers(value: float) -> None:
    made = pair(0.01)
    merged = made.merged(F32)
    merged[3, 4] = value
    layer = made.layer(merged)
    assert layer.verdict == "different"
    assert layer.reason == "1 entries are Inf or NaN, or were in the base"
    bad = LowRank(NAME, made.update.shape, made.update.up * np.float32(value), made.update.down)
    with pytest.raises(SourceError, match="the update of tensor 'layer.weight' holds NaN or Inf"):
        Pair(made.base, bad).check(made.merged(F32))


def test_an_update_of_zero() -> None:
    made = pair(0.0)
    assert made.layer(made.base).reason == "the update is zero"
    assert made.check(made.base).answer == "inconclusive"
    changed = made.base.copy()
    changed[2, 2] += 1
    assert made.layer(changed).verdict == "different"


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_a_row_of_zeros_that_does_not_change(dtype: np.dtype[Any]) -> None:
    """Such as that of a padding token: there, neither rounding nor the update has any size."""
    made = pair(0.01, dtype)
    made.base[5] = 0
    made.update.up[5] = 0
    made = Pair(made.base, made.update)
    assert made.layer(made.merged(dtype)).verdict == "verified"
    moved = made.merged(dtype)
    moved[5, 3] = 1e-2
    assert made.layer(moved).verdict == "different"


def test_rows_and_columns_of_other_sizes() -> None:
    """Massive columns and tiny rows keep the tolerance of other entries where it was."""
    rng = np.random.default_rng(3)
    up, down = rng.standard_normal((80, 4)), rng.standard_normal((4, 300))
    down[:, 7] *= 300
    up[11] /= 300
    made = Pair(np.float32(0.05 * rng.standard_normal((80, 300))), LowRank(NAME, (80, 300), np.float32(up * 1e-3), np.float32(down)))  # fmt: skip
    low = round_to(made.update.up, BF16).astype(F32) @ round_to(made.update.down, BF16).astype(F32)
    assert made.layer(made.merged(F32)).verdict == "verified"
    assert made.layer(made.base + low).verdict == "verified"
    merged = made.merged(F32)
    merged[40, 100] += np.float32(1e-3)  # as large as the update there, and a hundredth of its largest
    assert made.layer(merged).verdict == "different"


def test_other_tensors() -> None:
    made = pair(0.01)
    rng = np.random.default_rng(1)
    base = {NAME: made.base, "norm": np.ones(5, F32), "ids": np.arange(4), "embed": np.float32(rng.random((6, 3)))}

    def check(merged: Mapping[str, Array], **options: Any) -> MergeVerdict:
        source = Source([ExpectedChange("weight", made.update, NAME)])
        return MergeCheck(Held(base), source, Held(merged), **options).run(1)

    right = base | {NAME: made.merged(F32)}
    assert check(right).answer == "yes"
    assert check(right).others.compared == 3  # type: ignore[union-attr]
    for name, changed in (
        ("norm", np.ones(5, F32) * 2), ("norm", np.ones(6, F32)), ("ids", np.arange(4) + 1),
        ("embed", base["embed"] + np.float32(1e-7)),
    ):  # fmt: skip
        report = check(right | {name: changed})
        assert (report.answer, report.others.changed) == ("no", [name])  # type: ignore[union-attr]
        assert "one tensor that the LoRA does not change differs from the base" in report.sentence
        assert check(right | {name: changed}, others=False).answer == "yes"
        assert check(right | {name: changed}, chosen=lambda n, name=name: n != name).answer == "yes"
    assert (
        check(right | {"norm": round_to(base["norm"], BF16), "embed": round_to(base["embed"], BF16)}).answer
        == "yes"
    )
    report = check({name: array for name, array in right.items() if name != "ids"} | {"new": np.ones(2)})
    assert report.others is not None
    assert (report.answer, report.others.missing, report.others.new) == ("yes", ["ids"], ["new"])


@pytest.mark.parametrize("shipped", ["both", "embedding", "head"])
def test_tied_weights(shipped: str) -> None:
    """An update of a head that is tied to the embedding changes both, whichever is written."""
    made = pair(0.01)
    base = {NAME: made.base, "embed": made.base.copy(), "other": np.ones(3, F32)}
    merged = {NAME: made.merged(F32), "embed": made.merged(F32), "other": base["other"]}
    if shipped != "both":
        del merged[NAME if shipped == "embedding" else "embed"]
    source = Source([ExpectedChange("weight", made.update, NAME)])
    report = MergeCheck(Held(base), source, Held(merged)).run(1)
    assert report.answer == "yes"
    assert report.others is not None
    assert report.others.tied == ([] if shipped == "head" else ["embed"])
    if shipped == "both":
        report = MergeCheck(Held(base), source, Held(merged | {"embed": made.base})).run(1)
        assert (report.answer, report.others.changed) == ("yes", [])  # type: ignore[union-attr]
        report = MergeCheck(Held(base), source, Held(merged | {"embed": made.merged(F32, 2)})).run(1)
        assert report.answer == "no"


def test_names() -> None:
    made = pair(0.01)
    base = {"model.layer.weight": made.base, "model.norm.weight": np.ones(3, F32), "head.weight": np.ones(2, F32)}
    source = Source(
        [ExpectedChange("weight", LowRank("model.layer.weight", *_rest(made.update)), "model.layer.weight")]
    )
    merged = made.merged(F32)
    for names, words in (
        (("model.layer.weight", "model.norm.weight", "head.weight"), None),
        (("layer.weight", "norm.weight", "head.weight"), "the prefix 'model.' is added"),
        (
            ("base_model.model.model.layer.weight", "base_model.model.model.norm.weight", "base_model.model.head.weight"),
            "the prefix 'base_model.model.' is left out",
        ),
        (("unet/model.layer.weight", "unet/model.norm.weight", "unet/head.weight"), "the prefix 'unet/' is left out"),
    ):  # fmt: skip
        arrays = [merged, base["model.norm.weight"], base["head.weight"]]
        report = MergeCheck(Held(base), source, Held(dict(zip(names, arrays, strict=True)))).run(1)
        assert (report.answer, report.others.compared) == ("yes", 2)  # type: ignore[union-attr]
        assert report.notices == (
            [f"names of the merged checkpoint are not those of the base: {words}"] if words else []
        )
    with pytest.raises(SourceError, match="no tensor of the base is in it"):
        MergeCheck(Held(base), source, Held({"something.else": merged}))


def _rest(update: LowRank) -> tuple[tuple[int, ...], Array, Array]:
    return update.shape, update.up, update.down


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dora(dtype: torch.dtype, cast: bool) -> None:
    """Against what PEFT merges; a merge without the magnitudes is something else."""
    made = models.net().to(dtype)
    base = Held({name: as_array(tensor).copy() for name, tensor in made.state_dict().items()})
    peft = models.random_lora(made, r=4, use_dora=True, target_modules=["wide", "square"])
    if cast:
        peft = peft.to(dtype)
    changes, plain = [], []
    for module, layer in models.layers(peft).items():
        name = f"{module}.weight"
        up, down = (as_array(factor["default"].weight.float()) for factor in (layer.lora_B, layer.lora_A))
        update = LowRank(name, base.shape(name), up * np.float32(layer.scaling["default"]), down)
        magnitude = as_array(layer.lora_magnitude_vector["default"].weight.float()).copy()
        changes.append(ExpectedChange("weight", Decomposed(update, base, magnitude), name))
        plain.append(ExpectedChange("weight", update, name))
    merged = Held({name: as_array(t) for name, t in peft.merge_and_unload().state_dict().items()})
    report = MergeCheck(base, Source(changes), merged).run(1)
    assert report.answer == "yes", report
    assert {layer.verdict for layer in report.layers} == {"verified"}
    assert MergeCheck(base, Source(plain), merged).run(1).answer == "no"
    assert MergeCheck(base, Source(changes), base).run(1).answer == "no"
    report = MergeCheck(base, Source(changes), merged, strength=0.5).run(1)
    assert (report.answer, report.sentence) == (
        "inconclusive", "a weight-decomposed update can be checked at strength 1 only in all of 2 adapted tensors",
    )  # fmt: skip
    assert as_json(report)["layers"][0]["energy"] is None


def test_repeated_layers() -> None:
    """An update of a name that the base has under another one."""
    made = pair(0.01)
    source = Source([ExpectedChange("weight", made.update, "first.weight")])
    report = MergeCheck(Held({"first.weight": made.base}), source, Held({NAME: made.merged(F32), "first.weight": made.base})).run(1)  # fmt: skip
    assert report.answer == "yes"


def test_threads_do_not_matter() -> None:
    made = pair(0.01, BF16, shape=(300, 400))
    merged = made.merged(BF16, 1.3)
    source = Source([ExpectedChange("weight", made.update, NAME)])
    one, four = (MergeCheck(Held({NAME: made.base}), source, Held({NAME: merged})).run(n) for n in (1, 4))
    assert one == four


def test_what_cannot_be_asked() -> None:
    made = pair(0.01)
    for strength in (0.0, np.nan, np.inf):
        with pytest.raises(SourceError, match="must be a number other than 0"):
            made.check(made.base, strength)
    with pytest.raises(SourceError, match="no adapted tensor is left"):
        made.check(made.base, chosen=lambda _: False)
    with pytest.raises(SourceError, match="is of dtype int32, not a float"):
        made.check(np.ones(made.base.shape, np.int32))
    assert made.layer(made.base[:7]).reason == "has shape [7, 50], not [60, 50]"


def test_progress_is_the_size() -> None:
    made = pair(0.01)
    base = Held({NAME: made.base, "norm": np.ones(5, F32)})
    check = MergeCheck(base, Source([ExpectedChange("weight", made.update, NAME)]), base)
    done: list[int] = []
    check.run(1, done.append)
    assert check.size == sum(done) == made.base.size + 5


def test_one_call(tmp_path: Path) -> None:
    """The verb, on checkpoints in memory and an adapter file; it takes an adapter or a LoRA, not both."""
    base = {"w": np.float32([[1, 2], [3, 4]]), "norm": np.ones(2, F32)}
    merged = {"w": np.float32([[1, 7], [3, 4]]), "norm": base["norm"]}
    tensor = SparseTensor("w", (2, 2), [1], np.float32([7]), base=np.float32([2]))
    save(Adapter([tensor]), tmp_path / "a.st")
    total: list[int] = []
    done: list[int] = []
    report = check_merge(
        Held(merged), Held(base), adapter=tmp_path / "a.st", progress=done.append, on_start=total.append
    )
    assert 4 + 2 == sum(total) == sum(done)
    assert [7.0] == [merged["w"][0, 1]]
    assert report.layers[0].name == "w"
    assert report == check_merge(Held(merged), Held(base), lora=tmp_path / "a.st")
    assert "absent" == check_merge(Held(base), Held(base), adapter=tmp_path / "a.st").layers[0].verdict
    assert check_merge(Held(merged), Held(base), adapter=tmp_path / "a.st", layers_only=True).others is None
    for given_ in ({}, {"adapter": "a.st", "lora": "b"}):
        with pytest.raises(SourceError, match="either adapter or lora"):
            check_merge(Held(merged), Held(base), **given_)
