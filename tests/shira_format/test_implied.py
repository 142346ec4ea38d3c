"""Indices that a seed or the base's magnitudes imply: written where they fit, read with the base, refused without it or with another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shira_format as shira
from shira_format._core.dtypes import FLOATS
from shira_format.entries.inspection import inspect
from shira_format.errors import BaseMismatch, BaseRequired, FormatError
from shira_format.format import AdapterFile, load, save
from shira_format.format.codecs import CODECS
from shira_format.format.codecs.magnitude import largest, magnitudes
from shira_format.format.codecs.seeded import Permutation, drawn
from spec import reader
from tests import models

SHAPE = (40, 50)


def checkpoint(folder: Path, **arrays: np.ndarray) -> Path:
    return models.save_arrays(folder / "model.safetensors", {f"{key}.weight": one for key, one in arrays.items()})


def weights(dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, SHAPE).astype(dtype)


def trained(base: np.ndarray, indices: np.ndarray, name: str = "w", **options: Any) -> shira.SparseTensor:
    own = base.reshape(-1)[indices]
    values = (own.astype(np.float64) + 1e-3).astype(base.dtype)
    return shira.SparseTensor(name, SHAPE, indices, values, base=own, **options)


def without_base(tensor: shira.SparseTensor) -> shira.SparseTensor:
    return shira.SparseTensor(
        tensor.name, tensor.shape, tensor.indices, tensor.values, base_digest=tensor.base_digest
    )


@given(st.integers(1, 5000) | st.sampled_from([2**20, 2**32 + 1, 2**53 - 1]), st.text(max_size=8))
def test_a_permutation_takes_each_number_to_another_and_back(size: int, seed: str) -> None:
    numbers = np.unique(np.linspace(0, size - 1, min(size, 60)).astype(np.int64))
    permutation = Permutation(seed, size)
    found = permutation.of(numbers)
    assert found.tolist() == [reader.permuted(seed, size, int(number)) for number in numbers]
    assert permutation.back(found).tolist() == numbers.tolist()
    if size <= 5000:
        assert np.sort(permutation.of(np.arange(size))).tolist() == list(range(size))


def test_drawn_entries_are_uniform() -> None:
    """Chi-square of 64 parts with 4096 entries: below 120 but once in 10^5 seeds; pairs of neighbours are as many as by chance."""
    for seed in ("0 a", "0 b", "1 a"):
        found = drawn(seed, 1 << 20, 1 << 12)
        counts = np.bincount(found >> 14, minlength=64)
        assert float(((counts - 64) ** 2 / 64).sum()) < 120
        assert np.unique(found).size == 1 << 12
        assert np.count_nonzero(np.diff(found) == 1) < 45  # 16 are expected


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_the_largest_are_those_of_a_stable_sort(dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 256, 600 * dtype.itemsize, np.uint8)
    bits[: 100 * dtype.itemsize] = 0  # ties of zeros
    base = bits.view(dtype)
    sizes = magnitudes(base).astype(np.uint64)
    order = np.lexsort((np.arange(600), np.iinfo(np.uint64).max - sizes))
    for count in (1, 7, 60, 300, 600):
        for band in range(min(3, 600 // count)):
            expected = np.sort(order[band * count : (band + 1) * count])
            assert expected.tolist() == largest(base, count, band).tolist()


@pytest.mark.parametrize("band", [0, 1])
def test_a_mask_of_the_largest_needs_no_bits(tmp_path: Path, band: int) -> None:
    path = tmp_path / "a.st"
    base = weights()
    tensor = without_base(trained(base, largest(base.reshape(-1), 90, band)))
    save(shira.Adapter([tensor]), path, compact=True, base={"w": base})
    file = AdapterFile(path)
    assert {"codec": "magnitude"} | ({"band": 1} if band else {}) == file.manifest.tensors["w"].indices
    assert ("1.1", ["compact", "magnitude"]) == (
        file.manifest.raw["format_version"],
        file.manifest.raw["features"],
    )
    assert ["w#values"] == list(file.streams)
    assert load(path, base={"w": base})["w"] == tensor
    assert ["w"] == file.verify()
    with pytest.raises(BaseRequired, match=r"a\.st: tensor 'w': it can be read with its base alone"):
        file.sparse("w")
    with pytest.raises(BaseRequired):
        shira.verify(path)
    plain = tmp_path / "plain.st"
    save(load(path, base={"w": base}), plain)
    assert load(plain)["w"] == tensor
    assert plain.stat().st_size > path.stat().st_size


def test_another_base_is_refused(tmp_path: Path) -> None:
    path, base = tmp_path / "a.st", weights()
    save(
        shira.Adapter([without_base(trained(base, largest(base.reshape(-1), 90)))]), path, compact=True, base={"w": base}
    )  # fmt: skip
    other = base.copy()
    other[0, np.argmin(np.abs(base[0]))] = 1
    for bad, text in (
        ({"w": other}, "do not follow from this base's values"),
        ({"v": base}, "has no 'w'"),
        ({"w": base.T.copy()}, "shape"),
        ({"w": base.astype(np.float16)}, "float16"),
    ):
        for verify in (True, False):
            with pytest.raises(BaseMismatch, match=text):
                load(path, base=bad, verify=verify)["w"]
    with pytest.raises(BaseMismatch, match="other values"):  # nor is anything written for it
        save(load(path, base={"w": base}), tmp_path / "b.st", compact=True, base={"w": other + 1})
    assert [path] == list(tmp_path.iterdir())


def test_without_the_base_the_values_can_be_read() -> None:
    vectors = Path(__file__).parents[2] / "spec" / "vectors"
    file = AdapterFile(vectors / "good" / "magnitude.st")
    whole = load(file.path, base=shira.open_checkpoint(vectors / "base" / "magnitude.safetensors"))
    assert file.values("mask") is None
    values = file.values("w")
    assert values is not None
    assert whole["w"].values.tobytes() == values.tobytes()
    assert list(whole) == file.verify()


@pytest.mark.parametrize("dtype", [np.float32, FLOATS["BF16"]])
def test_other_masks_keep_their_indices(tmp_path: Path, dtype: Any) -> None:
    base = weights(dtype)
    flat = base.reshape(-1)
    near = np.sort(np.append(largest(flat, 90)[1:], np.argmin(np.abs(flat))))
    for number, indices in enumerate((drawn("x", 2000, 90), near, np.empty(0, np.int64))):
        path = tmp_path / f"{number}.st"
        tensor = without_base(trained(base, indices))
        save(shira.Adapter([tensor]), path, compact=True, base={"w": base})
        assert load(path, base={"w": base})["w"] == tensor
        assert "magnitude" != AdapterFile(path).manifest.tensors["w"].codec
    # A file that holds the base's values is to be read without the base.
    save(shira.Adapter([trained(base, largest(flat, 90))]), path, compact=True, base={"w": base})
    assert load(path)["w"].base is not None


def test_random_masks_are_stored_as_their_seed(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, a=weights(), b=weights(seed=1))
    for options in ({}, {"seed": 3, "band": 2}, {"scope": "global"}):
        mask = shira.make_mask(model, "rand", density=0.05, **options)
        save(mask, tmp_path / "mask.st")
        file = AdapterFile(tmp_path / "mask.st")
        assert {"random"} == {entry.codec for entry in file.manifest.tensors.values()}
        assert [] == [name for name in file.streams if "#" in name]
        assert mask == load(tmp_path / "mask.st")
    save(shira.make_mask(model, "rand", density=0.05, runs=8), tmp_path / "mask.st")
    assert "random" not in {entry.codec for entry in AdapterFile(tmp_path / "mask.st").manifest.tensors.values()}


def test_a_seed_that_drew_other_entries_is_not_stored(tmp_path: Path) -> None:
    indices = drawn("0 w", 2000, 90)
    for found in (indices, np.sort(np.append(indices[1:], (set(range(2000)) - set(indices.tolist())).pop()))):
        tensor = shira.SparseTensor("w", SHAPE, found, value_kind="none")
        save(shira.Adapter([tensor], manifest={"mask": {"rule": "rand", "seed": 0}}), tmp_path / "m.st")
        assert load(tmp_path / "m.st")["w"] == tensor
        codec = AdapterFile(tmp_path / "m.st").manifest.tensors["w"].codec
        assert (codec == "random") == (found is indices)


def test_a_wrong_seed_in_a_file_is_seen_unless_it_was_checked(tmp_path: Path) -> None:
    file = Path(__file__).parents[2] / "spec" / "vectors" / "bad" / "digest-mismatch--random-other-seed.st"
    with pytest.raises(FormatError, match="digest-mismatch"):
        load(file)["w"]
    assert 4 == load(file, verify=False)["w"].nnz


def test_a_mask_file_of_magnitudes(tmp_path: Path) -> None:
    base = weights()
    indices = largest(base.reshape(-1), 90)
    mask = shira.SparseTensor("w", SHAPE, indices, value_kind="none", dtype=np.float32)
    save(shira.Adapter([mask]), tmp_path / "mask.st", compact=True, base={"w": base})
    tensor = without_base(trained(base, indices))
    save(shira.Adapter([tensor]), tmp_path / "a.st", masks=tmp_path / "mask.st", compact=True, base={"w": base})
    assert "shared" == AdapterFile(tmp_path / "a.st").manifest.tensors["w"].codec
    assert load(tmp_path / "a.st", base={"w": base})["w"] == tensor
    with pytest.raises(BaseRequired):
        load(tmp_path / "a.st")["w"]


def test_inspect_tells_what_is_needed(tmp_path: Path) -> None:
    from shira_analysis.reports.text.inspect import as_text

    base = weights()
    model = checkpoint(tmp_path, w=base)
    tensor = without_base(trained(base, largest(base.reshape(-1), 90), "w.weight"))
    save(shira.Adapter([tensor]), tmp_path / "a.st", compact=True, base={"w.weight": base})
    info = inspect(tmp_path / "a.st", verify=True)
    assert (False, ["w.weight"], 1) == (info["verified"], info["unverified"], info["needs_base"])
    assert "magnitude" == info["tensors"][0]["index_codec"]
    text = as_text(info)
    assert "the entries of 1 tensor follow from the base's values: give --base" in text
    info = inspect(tmp_path / "a.st", verify=True, base=model)
    assert (True, [], True) == (info["verified"], info["unverified"], info["base"]["fits"])
    shira.verify(tmp_path / "a.st", model)
    other = checkpoint(tmp_path, w=base + np.float32(1))
    assert not inspect(tmp_path / "a.st", base=other)["base"]["fits"]


def test_bands_that_leave_the_tensor_are_refused_at_once() -> None:
    """Nothing of the size that the manifest asks for is allocated."""
    for name in ("random", "magnitude"):
        for band in ("just", "far"):
            path = (
                Path(__file__).parents[2] / "spec" / "vectors" / "bad" / f"count-mismatch--{name}-band-{band}.st"
            )
            with pytest.raises(FormatError, match="count-mismatch"):
                load(path, base={"w": np.zeros((2, 3), FLOATS["BF16"])})["w"]


@pytest.mark.parametrize("name", ["random", "magnitude"])
def test_these_codecs_cannot_be_asked_for_alone(name: str) -> None:
    assert CODECS[name].size(np.arange(3), (5,)) is None
    with pytest.raises(ValueError, match="entries do not tell"):
        CODECS[name].encode(np.arange(3), (5,), 4096)
