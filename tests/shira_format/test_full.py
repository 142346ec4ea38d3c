"""From two checkpoints to an adapter or a patch: the law of the round trip, the largest changes, memory, a real pair."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shira_format._core.arrays import Array, array_digest, as_bytes
from shira_format._core.dtypes import DTYPES, FLOATS, is_float, round_to, working_dtype
from shira_format.adapter import Adapter
from shira_format.convert import full_to_shira
from shira_format.convert.exact import Exact
from shira_format.convert.report import ConversionReport
from shira_format.errors import SourceError
from shira_format.export.full import shira_to_full
from shira_format.format import AdapterFile, load
from shira_format.selection import TopK
from shira_format.tensors import same_bits
from spec import reader
from tests import models
from tests.rules import arguments
from tests.strategies import Arrays, checkpoint_pairs, float_dtypes, small_shapes

BF16 = DTYPES["BF16"]


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


def converted(
    folder: Path, base: Arrays, tuned: Arrays, rule: TopK | Exact | None = None, **options: Any
) -> tuple[ConversionReport, Adapter]:
    """The report and the adapter, which is ``a.st`` in the folder, of two checkpoints beside it."""
    paths = (
        models.save_arrays(folder / f"{n}.safetensors", arrays) for n, arrays in (("tuned", tuned), ("base", base))
    )
    report = full_to_shira(*paths, folder / "a.st", **(arguments(rule) if rule else {}), **options)
    return report, load(folder / "a.st")


def save_shards(folder: Path, arrays: Arrays) -> Path:
    """The same in two files with an index; an empty checkpoint has one."""
    names = list(arrays)
    weight_map = {}
    for number, some in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        models.save_arrays(folder / file, {name: arrays[name] for name in some})
        weight_map |= dict.fromkeys(some, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# The law


@settings(max_examples=250)
@given(
    pair=checkpoint_pairs(), digests=st.booleans(), self_contained=st.booleans(), threads=st.sampled_from([1, 2]),
    sharded=st.booleans(),
)  # fmt: skip
def test_an_exact_patch_gives_the_fine_tune_bit_for_bit(
    pair: tuple[Arrays, Arrays], digests: bool, self_contained: bool, threads: int, sharded: bool
) -> None:
    base, tuned = pair
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save = save_shards if sharded else lambda path, arrays: models.save_arrays(path / "w.safetensors", arrays)
        before, after = save(folder / "base", base), save(folder / "tuned", tuned)
        report = full_to_shira(
            after,
            before,
            folder / "a.st",
            exact=True,
            digests=digests,
            self_contained=self_contained,
            threads=threads,
        )
        adapter = AdapterFile(folder / "a.st")
        adapter.verify()
        plain = reader.read(str(folder / "a.st"))
        names = {*adapter.manifest.tensors, *adapter.manifest.whole}
        assert names <= tuned.keys()
        assert set(adapter.manifest.removed) == base.keys() - tuned.keys()
        assert names == {item["name"] for kind in ("tensors", "whole") for item in plain[kind]}
        assert report.exact
        assert report.nnz == sum(len(item["indices"]) for item in plain["tensors"])
        assert (
            self_contained == all(t.base_values for t in adapter.manifest.tensors.values()) or not plain["tensors"]
        )
        restored = shira_to_full(folder / "a.st", before, folder / "out", threads=threads)
        assert models.read_arrays(after) == models.read_arrays(folder / "out")
        assert restored.verified == (len(plain["tensors"]) if digests else 0)
        shira_to_full(folder / "a.st", before, folder / "none", alpha=0)
        assert models.read_arrays(before) == models.read_arrays(folder / "none")


def test_what_an_exact_patch_holds(tmp_path: Path) -> None:
    count = np.arange(100, dtype=np.float32)
    base = {
        "same": count, "some": count, "most": count, "whole": np.arange(4), "kept": np.arange(4), "gone": count + 1,
        "old": count + 0.5, "vocabulary": count.reshape(20, 5), "type": count,
    }  # fmt: skip
    some, negative, payload = (
        count.copy(),
        np.array(-0.0, np.float32),
        np.array(0x7FC00001, np.uint32).view(np.float32),
    )
    some[[0, 7, 99]] = negative, payload, np.inf
    tuned = {
        "same": count, "some": some, "most": count + 1, "whole": np.arange(4) + 1, "kept": np.arange(4),
        "new": count + 0.5, "head": np.ones((2, 3), BF16), "vocabulary": np.ones((22, 5), np.float32), "type": count.astype(BF16),
    }  # fmt: skip
    tuned["vocabulary"][:20] = base["vocabulary"]
    report, adapter = converted(tmp_path, base, tuned, Exact())
    assert ["same", "some", "new", "vocabulary"] == list(adapter)
    assert [0, 3, 0, 0] == [tensor.nnz for tensor in adapter.values()]
    assert [0, 7, 99] == adapter["some"].indices.tolist()
    assert same_bits(some[[0, 7, 99]], adapter["some"].values)
    assert array_digest(count[[0, 7, 99]]) == adapter["some"].base_digest
    assert all(array_digest(tuned[name]) == adapter[name].result_digest for name in adapter)
    assert ("old", None) == (adapter["new"].base_name, adapter["new"].rows)
    assert 22 == adapter["vocabulary"].rows
    assert same_bits(np.ones((2, 5), np.float32), adapter["vocabulary"].new_rows)
    assert {"most", "whole", "head", "type"} == set(adapter.dense) == set(report.whole)
    digests = {name: whole.base_digest for name, whole in adapter.dense.items()}
    assert {
        "most": array_digest(count),
        "whole": array_digest(base["whole"]),
        "head": None,
        "type": None,
    } == digests
    assert {"gone", "old"} == set(adapter.removed)
    assert {
        "new": "renamed from old", "head": "new", "gone": "removed", "vocabulary": "rows 20 -> 22", "type": "F32 -> BF16",
    } == report.structure  # fmt: skip
    assert 2 == report.unchanged  # same, kept
    assert ["some", "new", "vocabulary"] == [tensor.name for tensor in report.tensors]
    assert [] == report.warnings()
    manifest = adapter.manifest
    assert ["patch"] == manifest["features"]
    assert {"rule": "exact"} == manifest["selection"]
    assert {"kind": "full"} == manifest["source"]
    assert (tmp_path / "a.st").stat().st_size == report.file_bytes


@pytest.mark.parametrize("digests", [True, False])
def test_a_patch_of_many_tiles(digests: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    base = {"w": random.standard_normal((800, 900)).astype(BF16), "v": random.standard_normal(700_000)}
    tuned = {name: np.where(random.random(w.shape) < 0.01, -w, w) for name, w in base.items()}
    tuned["w"] = np.concatenate([tuned["w"], tuned["w"][:300]])
    converted(tmp_path, base, tuned, Exact(digests), threads=2)
    shira_to_full(tmp_path / "a.st", tmp_path / "base.safetensors", tmp_path / "out", threads=2)
    assert models.read_arrays(tmp_path / "tuned.safetensors") == models.read_arrays(tmp_path / "out")


def test_without_digests_unchanged_tensors_take_nothing(tmp_path: Path) -> None:
    base = {name: np.arange(9, dtype=np.float16) for name in "abc"}
    tuned = base | {"b": base["b"].copy()}
    tuned["b"][3] = -1
    report, adapter = converted(tmp_path, base, tuned, Exact(digests=False))
    assert ["b"] == list(adapter)
    assert adapter["b"].result_digest is None
    assert 2 == report.unchanged
    report, adapter = converted(tmp_path, base, base, Exact(digests=False))
    assert ([], 3) == (list(adapter), report.unchanged)
    report, adapter = converted(tmp_path, base, base, Exact())
    assert (["a", "b", "c"], 3) == (list(adapter), report.unchanged)


@pytest.mark.parametrize("exact", [False, True])
def test_the_same_input_gives_the_same_bytes(exact: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    base = {f"w{i}": random.standard_normal((90, 70)).astype(BF16) for i in range(5)}
    tuned = {f"x.{n}": (w + (random.random(w.shape) < 0.02)).astype(w.dtype) for n, w in base.items()}
    files = []
    for threads in (1, 2, 5):
        converted(tmp_path, base, tuned, Exact() if exact else TopK(0.01, scope="global"), threads=threads)
        files.append((tmp_path / "a.st").read_bytes())
    assert files[0] == files[1] == files[2]


def test_without_a_file_there_is_the_report_alone(tmp_path: Path) -> None:
    base, tuned = {"w": f32(1, 2, 3)}, {"w": f32(1, 2, 4)}
    report, _ = converted(tmp_path, base, tuned, Exact())
    (tmp_path / "a.st").unlink()
    before = sorted(tmp_path.iterdir())
    alone = full_to_shira(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", None, exact=True)
    assert before == sorted(tmp_path.iterdir())
    assert (None, 1) == (alone.file_bytes, alone.nnz)
    assert report.tensors == alone.tensors


def test_progress_sums_to_the_work(tmp_path: Path) -> None:
    base = {"w": np.zeros((700, 800), np.float16), "v": np.zeros(3, np.float32)}
    for rule, times in ((Exact(), 1), (TopK(), 1), (TopK(scope="global"), 2), (TopK(None, energy=0.5), 2)):
        done: list[int] = []
        converted(tmp_path, base, {n: w + w.dtype.type(1) for n, w in base.items()}, rule, progress=done.append)
        assert sum(done) in (times * 560_003, 560_003)  # exact may stop early, where the whole takes fewer bytes


# The largest changes


def rounded_once(values: Array, dtype: np.dtype[Any]) -> Array:
    """Float64 to nearest, ties to even, by a table of all numbers of the type; finite results only."""
    if dtype.itemsize > 2:
        return values.astype(dtype)
    codes = np.arange(1 << (8 * dtype.itemsize - 1), dtype=f"u{dtype.itemsize}").view(dtype)
    with np.errstate(invalid="ignore"):
        table = codes.astype(np.float64)
    table = table[: int(np.flatnonzero(~np.isfinite(table))[0])]
    size = np.abs(values)
    above = np.clip(np.searchsorted(table, size), 1, table.size - 1)
    low, high = size - table[above - 1], table[above] - size
    code = np.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)
    return np.asarray(np.copysign(table[code], values).astype(dtype))


def oracle(base: Arrays, tuned: Arrays, rule: TopK) -> tuple[dict[str, tuple[Array, Array]], float, float]:
    """Indices and targets by tensor, the energy kept and the relative error: all at once in plain numpy."""
    changes = {}
    for name, before in base.items():
        work = np.result_type(working_dtype(before.dtype), working_dtype(tuned[name].dtype))
        changes[name] = (tuned[name].astype(work) - before.astype(work)).reshape(-1).astype(np.float64)
    groups = [list(changes)] if rule.scope == "global" else [[name] for name in changes]
    found, lost, kept, total = {}, 0.0, 0.0, 0.0
    for group in groups:
        joined = np.concatenate([changes[name] for name in group])
        order = np.argsort(-np.abs(joined), kind="stable")
        if rule.energy is None:
            order = order[: rule.count(joined.size)]
        else:
            sums = np.cumsum(joined[order] ** 2)
            order = order[: int(np.searchsorted(sums, rule.energy * np.sum(joined**2))) + 1]
        chosen = np.zeros(joined.size, bool)
        chosen[order] = True
        chosen &= (joined != 0) & (np.abs(joined) >= rule.min_change)
        at = 0
        for name in group:
            change, before = changes[name], base[name].reshape(-1)
            picked = np.flatnonzero(chosen[at : at + change.size])
            at += change.size
            target = rounded_once(tuned[name].reshape(-1)[picked].astype(np.float64), before.dtype)
            moved = as_bytes(target).reshape(-1, target.itemsize) != as_bytes(before[picked]).reshape(
                -1, target.itemsize
            )
            stays = moved.any(1)
            found[name] = picked[stays], target[stays]
            stored = np.zeros(change.size)
            stored[picked[stays]] = target[stays].astype(np.float64) - before[picked[stays]].astype(np.float64)
            lost += float(np.sum((change - stored) ** 2))
            kept += float(np.sum(change[picked[stays]] ** 2))
            total += float(np.sum(change**2))
    return found, kept / total if total else 1.0, (lost / total) ** 0.5 if total else 0.0


RULES = st.one_of(
    st.builds(TopK, st.sampled_from([0.01, 0.2, 0.5, 1.0]), scope=st.sampled_from(["tensor", "global"])),
    st.builds(TopK, st.none(), st.integers(1, 40), st.sampled_from(["tensor", "global"]), min_change=st.sampled_from([0.0, 0.3])),
    st.builds(TopK, st.none(), energy=st.sampled_from([0.1, 0.5, 0.9, 1.0]), scope=st.sampled_from(["tensor", "global"])),
)  # fmt: skip


@settings(max_examples=250)
@given(data=st.data(), rule=RULES, seed=st.integers(0, 2**32 - 1), coarse=st.booleans())
def test_the_largest_changes_are_those_of_plain_numpy(
    data: st.DataObject, rule: TopK, seed: int, coarse: bool
) -> None:
    random = np.random.default_rng(seed)
    coarse = coarse or rule.energy is not None  # then sums are exact, and many changes tie
    base, tuned = {}, {}
    for name in "bca"[: data.draw(st.integers(1, 3))]:
        shape = data.draw(small_shapes(max_rank=3, max_numel=400))
        one = data.draw(float_dtypes)
        other = data.draw(st.just(one) | float_dtypes)
        if coarse:
            before = random.integers(-4, 5, shape) / 4
            after = before + random.integers(-2, 3, shape) / 2 * (random.random(shape) < 0.5)
        else:
            before = random.standard_normal(shape)
            after = before + random.standard_normal(shape) * (random.random(shape) < 0.5)
        base[name] = np.asarray(before, np.float64).astype(one)
        # The values that are narrower in the base lie close to its ties.
        close = after if coarse else np.asarray(after).astype(one).astype(np.float64) * (1 + 1e-9)
        tuned[name] = np.asarray(close if random.random() < 0.5 else after, np.float64).astype(other)
    with tempfile.TemporaryDirectory() as folder:
        # Forced: a change that is lost by rounding is refused otherwise.
        report, adapter = converted(
            Path(folder), base, dict(sorted(tuned.items())), rule, threads=1 + seed % 2, force=True
        )
        adapter = Adapter(dict(adapter))
    expected, kept, error = oracle(base, tuned, rule)
    assert list(base) == list(adapter)
    for name, (indices, target) in expected.items():
        assert indices.tolist() == adapter[name].indices.tolist()
        assert same_bits(target, adapter[name].values)
        assert array_digest(base[name].reshape(-1)[indices]) == adapter[name].base_digest
        if base[name].dtype == tuned[name].dtype:
            assert same_bits(tuned[name].reshape(-1)[indices], adapter[name].values)
    assert kept == pytest.approx(report.energy_kept, rel=1e-5, abs=1e-9)
    assert error == pytest.approx(report.relative_error, rel=1e-3, abs=2e-3)


@pytest.mark.parametrize("name", sorted(FLOATS))
@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_values_are_rounded_once(name: str, seed: int) -> None:
    """A hair beside a tie of the narrow type; a detour by float32 would land on the tie."""
    dtype, random = FLOATS[name], np.random.default_rng(seed)
    exact = random.standard_normal(50).astype(dtype).astype(np.float64)
    step = np.abs(exact) * 2.0 ** -random.integers(2, 12, 50)
    for hair in (0, 1e-12, -1e-12, 1e-30):
        values = (exact + step) * (1 + hair)
        assert same_bits(rounded_once(values, dtype), round_to(values, dtype))
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 5e-324, -5e-324, 1e300, -1e300])
    with np.errstate(over="ignore", invalid="ignore"):
        plain, ours = special.astype(np.float32).astype(dtype), round_to(special, dtype)
    if name != "F64":
        assert np.array_equal(np.isnan(plain.astype(np.float32)), np.isnan(ours.astype(np.float32)))
        known = ~np.isnan(plain.astype(np.float32))
        assert same_bits(plain[known], ours[known])


def test_a_tensor_of_many_tiles(tmp_path: Path) -> None:
    random = np.random.default_rng(6)
    base = {"w": random.standard_normal((900, 700)).astype(np.float16)}
    tuned = {"w": (base["w"] + random.standard_normal((900, 700)).astype(np.float16) / 8).astype(np.float16)}
    rule = TopK(0.01)
    report, adapter = converted(tmp_path, base, tuned, rule)
    expected, kept, error = oracle(base, tuned, rule)
    assert expected["w"][0].tolist() == adapter["w"].indices.tolist()
    assert (kept, error) == pytest.approx((report.energy_kept, report.relative_error), rel=1e-4)
    assert "top-k" == adapter.manifest["selection"]["rule"]
    assert kept == pytest.approx(adapter.manifest["selection"]["energy_kept"], rel=1e-4)
    assert kept == pytest.approx(adapter.manifest["tensors"][0]["energy_kept"], rel=1e-4)


def test_other_rows_are_no_part_of_the_selection(tmp_path: Path) -> None:
    base = {"grown": np.zeros((3, 4), BF16), "shrunk": np.zeros((4, 2), np.float32)}
    tuned = {"grown": np.ones((5, 4), np.float64), "shrunk": np.ones((3, 2), np.float32)}
    tuned["grown"][1, 2] = tuned["shrunk"][2, 1] = 5
    tuned["grown"][4] += 2**-8 + 2**-40  # one hair above a tie of BF16
    report, adapter = converted(tmp_path, base, tuned, TopK(None, 1))
    assert [[6], [5]] == [t.indices.tolist() for t in adapter.values()]
    assert (5, 3) == (adapter["grown"].rows, adapter["shrunk"].rows)
    rows = adapter["grown"].new_rows
    assert rows is not None
    assert [[1.0] * 4, [1 + 2**-7] * 4] == rows.astype(float).tolist()
    assert {"grown": "rows 3 -> 5", "shrunk": "rows 4 -> 3"} == report.structure
    assert report.energy_kept == pytest.approx(50 / (50 + 11 + 5))
    assert (
        "1 tensors have another dtype in the fine-tune, 'grown' for example: they are rounded to the base's"
        in report.notices
    )


def test_integers_are_replaced_or_left(tmp_path: Path) -> None:
    base = {"w": f32(1, 2), "same": np.arange(5), "other": np.arange(5), "flag": np.array([True])}
    tuned = {f"model.{n}": v for n, v in (base | {"w": f32(1, 3), "other": np.arange(5) * 2}).items()}
    report, adapter = converted(tmp_path, base, tuned, TopK(1.0))
    assert (["w"], ["other"]) == (list(adapter), list(adapter.dense))
    assert same_bits(np.arange(5) * 2, adapter.dense["other"].values)
    assert array_digest(np.arange(5)) == adapter.dense["other"].base_digest
    assert 2 == report.unchanged
    assert ["names: the prefix 'model.' is left out"] == report.notices
    # The adapter is for the base as it stands.
    shira_to_full(tmp_path / "a.st", tmp_path / "base.safetensors", tmp_path / "out")
    assert models.read_arrays(tmp_path / "out") == {
        name: ("I64" if array.dtype == np.int64 else "F32" if is_float(array.dtype) else "BOOL", array.shape, array.tobytes())
        for name, array in (base | {"w": f32(1, 3), "other": np.arange(5) * 2}).items()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("base", "tuned", "reason"),
    [
        (f32(1, 2), f32(1, np.nan), "the update of tensor 'w' holds NaN or Inf, or overflows"),
        (f32(1, np.inf), f32(1, 2), "the update of tensor 'w' holds NaN or Inf, or overflows"),
        (f32(1, 3e38), f32(1, -3e38), "the update of tensor 'w' holds NaN or Inf, or overflows"),
        (np.array([1, 2], np.float16), f32(1, 7e4), r"tensor 'w': base \+ update overflows F16 at flat index 1"),
        (np.array([1], np.float16), f32(1, 7e4), "tensor 'w': a new row overflows F16"),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_what_cannot_be_kept_is_refused(
    base: Array, tuned: Array, reason: str, exists: bool, tmp_path: Path
) -> None:
    source = models.save_arrays(tmp_path / "tuned.safetensors", {"w": tuned})
    models.save_arrays(tmp_path / "base.safetensors", {"w": base})
    if exists:
        (tmp_path / "a.st").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*")}
    for rule in (TopK(1.0), TopK(None, energy=0.99, scope="global")):
        with pytest.raises(SourceError, match=f"^{source}: {reason}$"):
            full_to_shira(source, tmp_path / "base.safetensors", tmp_path / "a.st", **arguments(rule))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("moved", [1, 9, 40])
def test_what_is_infinite_in_both_has_not_changed(moved: int, tmp_path: Path) -> None:
    base = np.arange(50, dtype=np.float16)
    base[[3, 14, 49]] = np.inf, -np.inf, np.nan
    tuned = base.copy()
    tuned[4 : 4 + moved] -= np.float16(0.5)
    for rule in (TopK(1.0), TopK(None, 60, "global"), TopK(None, energy=1.0)):
        report, adapter = converted(tmp_path, {"w": base}, {"w": tuned}, rule)
        expected = [index for index in range(4, 4 + moved) if index != 14]
        assert expected == adapter["w"].indices.tolist()
        assert (1.0, 0.0) == (report.energy_kept, report.relative_error)


def test_an_input_is_not_written_over(tmp_path: Path) -> None:
    converted(tmp_path, {"w": f32(1)}, {"w": f32(2)})
    for out in ("base.safetensors", "tuned.safetensors"):
        before = (tmp_path / out).read_bytes()
        with pytest.raises(SourceError, match=f"{out}: is one of the inputs"):
            full_to_shira(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", tmp_path / out)
        assert before == (tmp_path / out).read_bytes()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("when", ["target_tensor", "AdapterWriter.add", "os.fsync", "os.replace"])
def test_an_interrupt_leaves_everything_as_it_was(
    when: str, exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = models.save_arrays(tmp_path / "base.safetensors", {"w": np.zeros(9, np.float32)})
    tuned = models.save_arrays(tmp_path / "tuned.safetensors", {"w": np.eye(3, dtype=np.float32).reshape(-1)})

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if when == "target_tensor":
        monkeypatch.setattr("shira_format.convert.pipeline.target_tensor", stop)
    else:
        monkeypatch.setattr(when if "os." in when else f"shira_format.convert.pipeline.{when}", stop)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        full_to_shira(tuned, base, tmp_path / "a.st", **arguments(Exact() if exact else TopK()))
    assert before == sorted(tmp_path.rglob("*"))


# Memory

_MEASURED = """\
import json, resource, sys
from pathlib import Path

import shira_format
from shira_format.convert import full_to_shira
from shira_format.export.full import shira_to_full

folder, tensors = Path(sys.argv[1]), int(sys.argv[2])
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) << 10
limit = size + (160 << 20)
elements = (limit + (64 << 20)) // 2 // tensors // 1024
header, at = {}, 0
for number in range(tensors):
    header[f"w{number}"] = {"dtype": "BF16", "shape": [elements, 1024], "data_offsets": [at, at + 2048 * elements]}
    at += 2048 * elements
text = json.dumps(header).encode()
for name, places in (("base", []), ("tuned", [0, 12_345_678, at - 2])):
    with open(folder / f"{name}.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)  # a hole: zeros that take no disk
        for place in places:
            file.seek(8 + len(text) + place)
            file.write(b"\\x80\\x3f")
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
assert limit < at
base, tuned, found = folder / "base.safetensors", folder / "tuned.safetensors", []
for options in ({"exact": True}, {"density": 1e-7}, {"density": 1e-7, "scope": "global"}):
    found.append(full_to_shira(tuned, base, folder / f"{len(found)}.st", **options, threads=2).nnz)
report = shira_to_full(folder / "0.st", base, None, threads=2)
print(json.dumps([found, report.verified]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory, and /proc, are those of Linux")
@pytest.mark.parametrize("tensors", [8, 1])
def test_memory_does_not_grow_with_the_checkpoints(tensors: int, tmp_path: Path) -> None:
    """Checkpoints, or one tensor, that are larger than all the memory there is."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(tmp_path), str(tensors)], capture_output=True, text=True,
        env=environment, check=False,
    )  # fmt: skip
    assert (0, "") == (done.returncode, done.stderr)
    assert [[3, 3, 3], tensors] == json.loads(done.stdout)


# A real pair


def test_a_real_fine_tune(tmp_path: Path) -> None:
    report = full_to_shira(models.sre(), models.minilm(), tmp_path / "a.st", exact=True)
    assert report.exact
    adapter = AdapterFile(tmp_path / "a.st")
    adapter.verify()
    restored = shira_to_full(tmp_path / "a.st", models.minilm(), tmp_path / "out")
    assert len(adapter.manifest.tensors) == restored.verified == restored.patched
    expected = {
        name: (kind, shape, hashlib.sha256(data).hexdigest())
        for name, (kind, shape, data) in models.read_arrays(models.sre()).items()
    }
    found = {
        name: (kind, shape, hashlib.sha256(data).hexdigest())
        for name, (kind, shape, data) in models.read_arrays(tmp_path / "out").items()
    }
    assert expected == found


def test_the_largest_changes_of_a_real_fine_tune(tmp_path: Path) -> None:
    report = full_to_shira(models.sre(), models.minilm(), tmp_path / "a.st")
    assert [
        "tensor 'embeddings.position_ids' of the base is not in the fine-tune, and stays unchanged"
    ] == report.notices
    assert 0.009 < report.density <= 0.011
    assert 0.01 < report.energy_kept < 0.9
    assert report.relative_error == pytest.approx((1 - report.energy_kept) ** 0.5, rel=1e-3)
    assert report.file_bytes is not None
    assert report.file_bytes < 8 * report.nnz
