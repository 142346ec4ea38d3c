"""Adapters on live models: exact, safe, on whatever people hold; against a plain dense oracle."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira_format._core import compiled
from shira_format._core.arrays import as_array, as_bytes
from shira_format._core.dtypes import working_dtype
from shira_format.adapter import Adapter
from shira_format.errors import BaseMismatch, FormatError
from shira_format.format import load, save
from shira_format.live import AdapterPool, Switcher
from shira_format.live.weights import ArrayWeight, DeviceWeight
from shira_format.tensors import DenseTensor, SparseTensor, same_bits
from tests import models

Weights = dict[str, np.ndarray[Any, Any]]
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
SHAPES = {"a.weight": (6, 9), "b.weight": (40,), "c.weight": (3, 4, 5), "d.weight": (64, 33)}


pytestmark = pytest.mark.usefixtures("kernels")  # everything here holds with numba and without


def make_base(seed: int, dtype: Any, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Weights:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def make_adapter(base: Weights, seed: int, density: float = 0.2, **manifest: Any) -> Adapter:
    """Random targets at random entries of some weights; digests of the base, no base values."""
    rng = np.random.default_rng(seed)
    tensors = []
    for name, weight in base.items():
        if rng.random() < 0.8:
            indices = np.flatnonzero(rng.random(weight.size) < density)
            flat = weight.reshape(-1)[indices]
            values = (flat.astype(np.float64) + rng.standard_normal(indices.size)).astype(weight.dtype)
            made = SparseTensor(name, weight.shape, indices, values, base=flat)
            tensors.append(SparseTensor(name, weight.shape, indices, values, base_digest=made.base_digest))
    return Adapter(tensors, manifest=manifest)


def oracle(base: Weights, wanted: list[tuple[Adapter, float]]) -> Weights:
    """Dense and slow: one adapter by the formula of the specification, several by an exact sum that is rounded once."""
    result = {}
    for name, weight in base.items():
        flat = weight.reshape(-1)
        new = flat.copy()
        steps: dict[int, list[tuple[float, SparseTensor, int]]] = {}
        for adapter, alpha in wanted:
            if alpha != 0 and name in adapter:
                for k, i in enumerate(adapter[name].indices):
                    steps.setdefault(int(i), []).append((alpha, adapter[name], k))
        for i, found in steps.items():
            if len(found) == 1:
                alpha, tensor, k = found[0]
                new[i] = one(flat[i], tensor.values[k], alpha)
            else:
                parts = sorted(a * (float(t.values[k]) - float(flat[i])) for a, t, k in found)
                new[i] = rounded_once(float(flat[i]) + added(0.0, parts), weight.dtype)
        result[name] = new.reshape(weight.shape)
    return result


def added(start: float, parts: list[float]) -> float:
    for part in parts:
        start += part
    return start


def one(base: Any, target: Any, alpha: float) -> Any:
    if alpha == 1:
        return target
    work = working_dtype(base.dtype)
    origin = base.astype(work)
    return (origin + work.type(alpha) * (target.astype(work) - origin)).astype(base.dtype)


def rounded_once(value: float, dtype: Any) -> Any:
    """Nearest of all values of the dtype, ties to the even pattern, by torch for what numpy would round twice."""
    if dtype in (np.float64, np.float32, np.float16):
        return np.float64(value).astype(dtype)
    table = all_values(np.dtype(dtype))
    exact = table.astype(np.float64)
    at = int(np.searchsorted(exact, value))
    if at == exact.size:
        at -= 1
    if at and abs(value - exact[at - 1]) <= abs(value - exact[at]):
        tie = abs(value - exact[at - 1]) == abs(value - exact[at])
        if not tie or even(table[at - 1]):
            at -= 1
    return table[at]


_TABLES: dict[Any, Any] = {}


def all_values(dtype: np.dtype[Any]) -> Any:
    if dtype not in _TABLES:
        patterns = np.arange(1 << (8 * dtype.itemsize), dtype=np.uint32).astype(f"u{dtype.itemsize}").view(dtype)
        with np.errstate(invalid="ignore"):
            wide = patterns.astype(np.float64)
        keep = np.isfinite(wide) & ~((wide == 0) & np.signbit(wide))
        _TABLES[dtype] = patterns[keep][np.argsort(wide[keep])]
    return _TABLES[dtype]


def even(value: Any) -> bool:
    return not int(np.asarray(value).view(f"u{value.dtype.itemsize}")) & 1


def check(weights: Weights, expected: Weights) -> None:
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert same_bits(weight, expected[name]), name


def copied(weights: Weights) -> Weights:
    return {name: weight.copy() for name, weight in weights.items()}


ALPHAS = [1.0, 1.0, 0.5, -2.0, 0.7, 0.0, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=[np.dtype(d).name for d in DTYPES])
def test_random_sequences_leave_nothing_behind(dtype: Any, tmp_path: Path) -> None:
    """Hundreds of random steps in each dtype, failing ones among them; the oracle says what must be there after each."""
    base = make_base(1, dtype)
    adapters = [make_adapter(base, seed, density) for seed, density in enumerate((0.2, 0.2, 0.6, 0.01))]
    adapters.append(make_adapter(base, 7, 0.3, alpha=0.25))
    paths = []
    for number, adapter in enumerate(adapters):
        save(adapter, tmp_path / f"{number}.st")
        paths.append(tmp_path / f"{number}.st")
    foreign = make_adapter(make_base(2, dtype), 9)
    weights = copied(base)
    switcher = Switcher(weights)
    rng = np.random.default_rng(5)
    active: list[tuple[Adapter, float]] = []

    def pick() -> tuple[Any, Adapter, float | None, float]:
        k = int(rng.integers(len(adapters)))
        alpha = ALPHAS[rng.integers(len(ALPHAS))]
        source = [adapters[k], paths[k], str(paths[k])][rng.integers(3)]
        return source, adapters[k], alpha, adapters[k].alpha if alpha is None else alpha

    for _ in range(400):
        step = rng.integers(7)
        if step == 0:
            source, adapter, alpha, strength = pick()
            switcher.load(source, alpha)
            active = [*active, (adapter, strength)]
        elif step in (1, 2):
            source, adapter, alpha, strength = pick()
            switcher.switch(source, alpha)
            active = [(adapter, strength)]
        elif step == 3:
            picked = [pick() for _ in range(rng.integers(4))]
            switcher.set([(source, alpha) for source, _, alpha, _ in picked])
            active = [(adapter, strength) for _, adapter, _, strength in picked]
        elif step == 4:
            switcher.revert()
            active = []
        elif step == 5:
            with pytest.raises(BaseMismatch):
                switcher.set([pick()[::2], (foreign, 1.0)])
        else:
            source, adapter, alpha, strength = pick()
            with pytest.raises(ZeroDivisionError), switcher.applied(source, alpha):
                check(weights, oracle(base, [*active, (adapter, strength)]))
                raise ZeroDivisionError
        check(weights, oracle(base, active))
        report = switcher.report
        touched = [
            np.concatenate([a[name].indices for a, alpha in active if alpha != 0 and name in a] or [[]])
            for name in base
        ]
        unique = [np.unique(indices, return_counts=True)[1] for indices in touched]
        assert report.entries == sum(counts.size for counts in unique)
        assert report.overlapping == sum(int(np.count_nonzero(counts > 1)) for counts in unique)
        assert len(report.adapters) == len(active)
    switcher.revert()
    check(weights, base)


@pytest.mark.parametrize("dtype", DTYPES, ids=[np.dtype(d).name for d in DTYPES])
def test_thousands_of_sequences(dtype: Any, kernels: str) -> None:
    """Short ones, each from the base to the base, on few elements that adapters often share."""
    base = make_base(20, dtype, {"a.weight": (2, 5), "b.weight": (3,)})
    adapters = [make_adapter(base, seed, 0.5) for seed in range(30, 36)]
    foreign = make_adapter(make_base(21, dtype, {"a.weight": (2, 5), "b.weight": (3,)}), 37, 0.9)
    weights = copied(base)
    switcher = Switcher(weights, threads=1)
    rng = np.random.default_rng(6)
    for _ in range(2000 if kernels == "machine code" else 200):
        active: list[tuple[Adapter, float]] = []
        for _ in range(rng.integers(1, 5)):
            picked = adapters[rng.integers(6)], float(rng.choice([1.0, 1.0, 0.5, -1.5, 0.0]))
            match rng.integers(4):
                case 0:
                    switcher.load(*picked)
                    active.append(picked)
                case 1:
                    switcher.switch(*picked)
                    active = [picked]
                case 2:
                    with pytest.raises(BaseMismatch):
                        switcher.load(foreign)
                case _:
                    active = [picked, picked, (adapters[0], 1.0)]
                    switcher.set(active)
        check(weights, oracle(base, active))
        switcher.revert()
        check(weights, base)


@given(st.permutations(range(4)), st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.integers(0, 99))
@settings(max_examples=25)
def test_the_order_of_adapters_does_not_matter(order: list[int], alphas: list[float], seed: int) -> None:
    base = make_base(seed, ml_dtypes.bfloat16)
    adapters = [make_adapter(base, seed + k, 0.5) for k in range(4)]
    one, other = copied(base), copied(base)
    Switcher(one).set([(adapters[k], alphas[k]) for k in range(4)])
    Switcher(other).set([(adapters[k], alphas[k]) for k in order])
    check(one, other)


def test_strength_one_gives_the_target_bits_and_special_values_stay() -> None:
    base = np.array([0.0, -0.0, np.nan, np.inf, 1.0], np.float32)
    base.view(np.uint32)[2] = 0xFFC0_1234
    new = np.array([-0.0, np.nan, 1, -np.inf, 3], np.float32)
    adapter = Adapter([SparseTensor("w", (5,), [0, 1, 2, 3, 4], new, base=base)])
    weights = {"w": base.copy()}
    switcher = Switcher(weights)
    switcher.load(adapter)
    assert same_bits(weights["w"], new)
    switcher.revert()
    assert same_bits(weights["w"], base)


def test_the_same_adapter_twice_counts_twice() -> None:
    base = {"w": np.zeros(4, np.float32)}
    adapter = Adapter([SparseTensor("w", (4,), [1, 3], np.float32([1, 2]), base=np.zeros(2, np.float32))])
    weights = copied(base)
    switcher = Switcher(weights)
    switcher.load(adapter)
    report = switcher.load(adapter, 0.5)
    assert [0, 1.5, 0, 3] == weights["w"].tolist()
    assert (2, 2) == (report.entries, report.overlapping)
    switcher.unload(adapter)
    assert [0, 1, 0, 2] == weights["w"].tolist()
    switcher.unload(adapter)
    check(weights, base)
    with pytest.raises(KeyError):
        switcher.unload(adapter)


# What is refused


class Watched(dict[str, Any]):
    """Weights that cannot be written without being noticed."""

    def __init__(self, weights: Weights) -> None:
        super().__init__({name: torch.from_numpy(w.copy()) for name, w in weights.items()})

    def versions(self) -> list[int]:
        return [tensor._version for tensor in self.values()]


F32 = np.float32
BASE = {"v": np.arange(6, dtype=F32).reshape(2, 3), "w": np.arange(6, dtype=F32).reshape(2, 3) + 1}


def entry(name: str, base: Any, index: int = 1, value: float = 9) -> SparseTensor:
    flat = base.reshape(-1)
    return SparseTensor(name, base.shape, [index], np.array([value], base.dtype), base=flat[[index]])


REFUSED = {
    "another base": ([entry("w", BASE["w"] + 1)], "holds other values at the adapter's entries"),
    "another shape": ([entry("w", BASE["w"].T.copy())], r"is for shape \[3, 2\], the weight has \[2, 3\]"),
    "another dtype": ([entry("w", BASE["w"].astype(np.float16))], "is for float16, the weight has float32"),
    "no such module": ([entry("x.y", BASE["w"])], "the model has no 'x.y'"),
    "a mask": ([SparseTensor("w", (2, 3), [1], value_kind="none")], "is a mask"),
    "a patch": ([SparseTensor("w", (2, 3), [1], F32([9]), base=F32([2]), base_name="v")], "renames or resizes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_a_weight_changes(case: str) -> None:
    tensors, reason = REFUSED[case]
    weights = Watched(BASE)
    switcher = Switcher(weights)
    good = Adapter([entry("v", BASE["v"])])
    switcher.load(good)
    before, versions = copied({n: as_array(t) for n, t in weights.items()}), weights.versions()
    adapter = Adapter([entry("v", BASE["v"], 2), *tensors])
    for attempt in (lambda: switcher.load(adapter), lambda: switcher.switch(adapter)):
        with pytest.raises(BaseMismatch, match=reason):
            attempt()
        check({n: as_array(t) for n, t in weights.items()}, before)
        assert weights.versions() == versions
        assert switcher.report.entries == 1
    switcher.revert()
    check({n: as_array(t) for n, t in weights.items()}, BASE)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_a_strength_is_finite(alpha: float) -> None:
    weights = copied(BASE)
    with pytest.raises(ValueError, match="finite"):
        Switcher(weights).load(Adapter([entry("w", BASE["w"])]), alpha)
    check(weights, BASE)


class Subclass(torch.Tensor):
    """As quantised and distributed tensors are."""


LIVE = {
    "integers": (torch.ones(2, 3, dtype=torch.int8), "quantised"),
    "a subclass": (torch.ones(2, 3).as_subclass(Subclass), "Subclass: quantised and distributed"),
    "no data": (torch.ones(2, 3, device="meta"), "meta device"),
    "sparse": (torch.ones(2, 3).to_sparse(), "sparse"),
    "complex": (torch.ones(2, 3, dtype=torch.complex64), "complex64"),
    "a list": ([1.0], "is a list"),
}


@pytest.mark.parametrize("case", LIVE)
def test_weights_that_cannot_take_exact_values(case: str) -> None:
    weight, reason = LIVE[case]
    with pytest.raises(BaseMismatch, match=f"tensor 'w': .*{reason}"):
        Switcher({"w": weight}).load(Adapter([entry("w", BASE["w"])]))


def test_models_that_are_none() -> None:
    with pytest.raises(TypeError, match="int is not a model"):
        Switcher(3)
    with pytest.raises(TypeError, match="not both"):
        Switcher({}, prefix="x", rename=str)


def test_an_adapter_that_fitted_before_fits_no_more() -> None:
    weights = copied(BASE)
    switcher = Switcher(weights)
    path_less = Adapter([entry("v", BASE["v"]), entry("w", BASE["w"])])
    switcher.load(path_less)
    switcher.revert()
    weights["w"][0, 1] = 77
    changed = copied(weights)
    with pytest.raises(BaseMismatch, match="tensor 'w': the base holds other values"):
        switcher.load(path_less)
    check(weights, changed)


def test_a_known_file_on_a_changed_base_is_taken_off_again(tmp_path: Path) -> None:
    """The second time a file is compared as it is written, so that it has to be undone."""
    base = make_base(3, F32)
    other, known = make_adapter(base, 1), make_adapter(base, 2, 0.5)
    save(known, tmp_path / "a.st")
    weights = copied(base)
    switcher = Switcher(weights)
    switcher.switch(tmp_path / "a.st")
    switcher.switch(other, 0.5)
    on = set(known["d.weight"].indices) - set(other["d.weight"].indices)
    weights["d.weight"].reshape(-1)[min(on)] += 1
    before = copied(weights)
    with pytest.raises(BaseMismatch, match=r"a\.st: tensor 'd\.weight': the base holds other values"):
        switcher.switch(tmp_path / "a.st")
    check(weights, before)
    assert switcher.report.adapters == (("adapter", 0.5),)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("nth", range(1, 9))
def test_a_failure_in_the_middle_is_undone(
    nth: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(4, F32)
    adapters = [make_adapter(base, seed, 0.4) for seed in (11, 12)]
    weights = copied(base)
    switcher = Switcher(weights, threads=2)
    switcher.set([(adapters[0], 1.0), (adapters[1], 0.3)])
    before = copied(weights)
    real, calls = ArrayWeight.put, [0]

    def failing(self: ArrayWeight, indices: Any, values: Any) -> None:
        calls[0] += 1
        if calls[0] == nth:
            raise error("in the middle")
        real(self, indices, values)

    with monkeypatch.context() as patched:
        patched.setattr(ArrayWeight, "put", failing)
        if nth <= 2 * len(base) - 1:
            with pytest.raises(error, match="in the middle"):
                switcher.set([(adapters[1], 2.0)])
            check(weights, before)
            assert len(switcher.report.adapters) == 2
    switcher.revert()
    check(weights, base)


# Files


def test_a_damaged_file_changes_nothing(tmp_path: Path) -> None:
    base = make_base(5, F32)
    save(make_adapter(base, 1), tmp_path / "a.st")
    data = bytearray((tmp_path / "a.st").read_bytes())
    data[-3] ^= 1
    (tmp_path / "a.st").write_bytes(data)
    weights = copied(base)
    with pytest.raises(FormatError, match="digest"):
        Switcher(weights).load(tmp_path / "a.st")
    check(weights, base)
    with pytest.raises(FileNotFoundError):
        Switcher(weights).load(tmp_path / "none.st")


def test_what_happens_to_the_file_of_an_adapter_that_is_on(tmp_path: Path) -> None:
    base = make_base(6, F32)
    one, two = make_adapter(base, 1), make_adapter(base, 2)
    path = tmp_path / "a.st"
    save(one, path)
    weights = copied(base)
    switcher = Switcher(weights)
    switcher.load(path)
    with open(path, "r+b") as file:  # in place: a file that is mapped would kill the process
        file.truncate(10)
    switcher.load(two, 0.5)
    check(weights, oracle(base, [(one, 1.0), (two, 0.5)]))
    with pytest.raises(FormatError, match=str(path)):
        switcher.load(path)
    check(weights, oracle(base, [(one, 1.0), (two, 0.5)]))
    save(two, tmp_path / "new.st")
    os.replace(tmp_path / "new.st", path)
    switcher.switch(path)
    check(weights, oracle(base, [(two, 1.0)]))
    switcher.revert()
    check(weights, base)


def test_an_opened_adapter_that_is_on_is_independent_of_its_file_and_of_arrays(tmp_path: Path) -> None:
    base = make_base(8, F32)
    one, two = make_adapter(base, 1), make_adapter(base, 2)
    path, dense = tmp_path / "a.st", np.ones((6, 9), F32)
    save(one, path)
    opened, weights = load(path), copied(base)
    switcher = Switcher(weights)
    switcher.load(opened)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    switcher.load(two, 0.5)
    check(weights, oracle(base, [(one, 1.0), (two, 0.5)]))
    with pytest.raises(OSError, match="has become shorter"):
        switcher.switch(opened)
    check(weights, oracle(base, [(one, 1.0), (two, 0.5)]))
    whole = Adapter(dense=[DenseTensor("a.weight", dense, base=base["a.weight"])])
    switcher.switch(whole)
    dense[:] = 7
    assert (weights["a.weight"] == 1).all()
    with pytest.raises(BaseMismatch):  # undoes and does again
        switcher.load(Adapter([entry("a.weight", base["a.weight"])]))
    assert (weights["a.weight"] == 1).all()
    switcher.revert()
    check(weights, base)


# Threads


def test_threads_that_switch_and_one_that_looks() -> None:
    base = make_base(7, F32)
    adapters = [make_adapter(base, seed, 0.3) for seed in range(3)]
    states = [oracle(base, [])] + [oracle(base, [(adapter, 1.0)]) for adapter in adapters]
    weights = copied(base)
    switcher = Switcher(weights)
    wrong: list[str] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            with switcher.serving() as report, switcher.serving():
                seen = copied(weights)
                if switcher.report != report:
                    wrong.append("the report changed")
            if not any(all(same_bits(seen[n], state[n]) for n in seen) for state in states):
                wrong.append("a mixture was seen")

    def turn(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            switcher.switch(adapters[rng.integers(3)])
            switcher.revert()

    lookers = [threading.Thread(target=look) for _ in range(2)]
    turners = [threading.Thread(target=turn, args=(seed,)) for seed in range(3)]
    for thread in (*lookers, *turners):
        thread.start()
    for thread in turners:
        thread.join()
    stop.set()
    for thread in lookers:
        thread.join()
    assert not wrong
    check(weights, base)


@pytest.mark.parametrize("pooled", [False, True])
def test_a_dropped_switcher_takes_its_threads_with_it(pooled: bool, tmp_path: Path) -> None:
    """Also after a refusal, and at once: an error that held what raised it would keep the threads until the next collection."""
    index, other = np.array([1]), np.ones(1, np.float32)
    save(Adapter([SparseTensor("w", (4,), index, other, base=other)]), tmp_path / "other.st")
    damaged = bytearray((tmp_path / "other.st").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "damaged.st").write_bytes(damaged)
    pool = AdapterPool({path.stem: path for path in tmp_path.iterdir()})
    before = threading.active_count()
    gc.disable()
    try:
        for name in ("other", "damaged"):
            switcher = Switcher({"w": np.zeros(4, np.float32)}, prefix="", pool=pool, threads=1)
            with pytest.raises((BaseMismatch, FormatError)):
                switcher.load(name if pooled else tmp_path / f"{name}.st")
            threads = weakref.ref(switcher._threads.executor)
            del switcher
            assert threads() is None
        for _ in range(100):
            if threading.active_count() == before:
                break
            time.sleep(0.05)
        assert threading.active_count() == before
    finally:
        gc.enable()


def test_no_change_within_serving_of_the_same_thread() -> None:
    switcher = Switcher(copied(BASE))
    with switcher.serving(), pytest.raises(RuntimeError, match="serving"):
        switcher.revert()
    switcher.load(Adapter([entry("w", BASE["w"])]))
    with switcher.applied(Adapter([entry("v", BASE["v"])])) as report:
        assert report.entries == 2
    assert switcher.report.entries == 1


# Whatever people hold


def adapter_of(state: dict[str, Any], names: list[str], seed: int = 1, density: float = 0.3) -> Adapter:
    return make_adapter({name: as_array(state[name]).copy() for name in names}, seed, density)


def patched(module: torch.nn.Module, adapter: Adapter, prefix: str = "") -> torch.nn.Module:
    state = module.state_dict()
    with torch.no_grad():
        for name, tensor in adapter.items():
            flat = as_array(state[prefix + name]).reshape(-1)
            flat[tensor.indices] = tensor.values
    return module


@pytest.mark.parametrize("kind", models.MODELS)
def test_transformers_models(kind: str) -> None:
    model = models.MODELS[kind]()
    names = [n for n, p in model.named_parameters() if p.ndim > 1]
    adapters = [adapter_of(model.state_dict(), names, seed) for seed in (1, 2)]
    before = models.outputs(model)
    expected = [models.outputs(patched(models.MODELS[kind](), adapter)) for adapter in adapters]
    switcher = Switcher(model)
    for _ in range(3):
        for adapter, wanted in zip(adapters, expected, strict=True):
            switcher.switch(adapter)
            assert torch.equal(wanted, models.outputs(model))
    switcher.revert()
    assert torch.equal(before, models.outputs(model))


def test_a_prefix_that_the_checkpoint_lacks() -> None:
    model = models.bert()
    inner = {n.removeprefix("bert."): t for n, t in model.state_dict().items() if n.startswith("bert.")}
    adapter = adapter_of(
        inner, ["encoder.layer.0.attention.self.query.weight", "embeddings.word_embeddings.weight"]
    )
    head = DenseTensor("classifier.weight", torch.ones(3, 32))
    whole = Adapter(adapter, dense=[head])
    expected = patched(models.bert(), adapter, "bert.")
    with torch.no_grad():
        expected.classifier.weight.fill_(1)
    for options in (
        {},
        {"prefix": "bert."},
        {"rename": lambda n: n if n.startswith("classifier") else f"bert.{n}"},
    ):
        before = models.outputs(model)
        switcher = Switcher(model, **options)
        report = switcher.load(whole)
        assert report.whole == 1
        assert torch.equal(models.outputs(expected), models.outputs(model))
        switcher.revert()
        assert torch.equal(before, models.outputs(model))
    with pytest.raises(BaseMismatch, match="the model has no"):
        Switcher(model, prefix="").load(whole)


def test_names_of_old_checkpoints() -> None:
    """TensorFlow's names of norms, which transformers maps when it loads them."""
    model = models.bert()
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in model.state_dict().items()
    }
    adapter = adapter_of(old, [n for n in old if n.endswith(("gamma", "beta"))])
    before = models.outputs(model)
    with pytest.raises(BaseMismatch, match="LayerNorm.gamma.*map them"):
        Switcher(model).load(adapter)
    switcher = Switcher(model, rename=lambda n: n.replace("gamma", "weight").replace("beta", "bias"))
    switcher.load(adapter)
    assert not torch.equal(before, models.outputs(model))
    switcher.revert()
    assert torch.equal(before, models.outputs(model))


def test_a_new_tensor_needs_a_place() -> None:
    adapter = Adapter([], dense=[DenseTensor("other.weight", torch.ones(2))])
    with pytest.raises(BaseMismatch, match="'other.weight' is new to the base, and the model has no such tensor"):
        Switcher(models.net()).load(adapter)
    weights: dict[str, Any] = {"w": np.zeros(3)}
    switcher = Switcher(weights)
    switcher.load(adapter)
    assert [1, 1] == weights["other.weight"].tolist()
    switcher.switch(adapter)
    switcher.revert()
    assert list(weights) == ["w"]


def test_tied_weights_change_together_and_once() -> None:
    model = models.gpt2()
    state = model.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    base = as_array(state["lm_head.weight"]).copy()
    one = make_adapter({"lm_head.weight": base}, 1)
    two = make_adapter({"transformer.wte.weight": base}, 2)
    switcher = Switcher(model)
    switcher.switch(one)
    switcher.switch(two)
    switcher.load(one, 0.5)
    expected = oracle({"x": base}, [(renamed(two, "x"), 1.0), (renamed(one, "x"), 0.5)])["x"]
    assert same_bits(as_array(model.lm_head.weight), expected)
    twins = Adapter([*one.values(), *renamed(one, "transformer.wte.weight").values()])
    assert switcher.switch(twins).entries == one["lm_head.weight"].nnz
    with pytest.raises(BaseMismatch, match="are tied in the model, and the adapter changes them differently"):
        switcher.switch(Adapter([*one.values(), *two.values()]))
    switcher.revert()
    assert same_bits(as_array(model.lm_head.weight), base)


def renamed(adapter: Adapter, name: str) -> Adapter:
    (tensor,) = adapter.values()
    return Adapter(
        [SparseTensor(name, tensor.shape, tensor.indices, tensor.values, base_digest=tensor.base_digest)]
    )


class Kinds(torch.nn.Module):
    """Layers of other kinds, a parameter of three dimensions, one that is not contiguous, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.conv1 = torch.nn.Conv1d(4, 4, 3, groups=2)
        self.embedding = torch.nn.Embedding(7, 5)
        self.experts = torch.nn.Parameter(torch.randn(4, 3, 5))
        self.turned = torch.nn.Parameter(torch.randn(5, 7).t())
        self.register_buffer("scale", torch.randn(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_all_kinds(dtype: torch.dtype) -> None:
    model = Kinds().to(dtype)
    assert not model.turned.is_contiguous()
    base = {name: as_array(t).copy() for name, t in model.state_dict().items()}
    adapters = [make_adapter(base, seed, 0.4) for seed in (1, 2)]
    switcher = Switcher(model)
    for wanted in ([(adapters[0], 1.0)], [(adapters[1], 1.0)], [(adapters[0], 0.5), (adapters[1], 1.0)], []):
        switcher.set(wanted)
        check({n: as_array(t) for n, t in model.state_dict().items()}, oracle(base, wanted))


def test_a_compiled_model_is_not_compiled_again() -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    model = models.net()
    adapters = [adapter_of(model.state_dict(), ["wide.weight", "head.weight"], seed) for seed in (1, 2)]
    expected = [models.outputs(patched(models.net(), adapter)) for adapter in adapters]
    compiled_model = torch.compile(model, backend=counter)
    x = fixed_input()
    with torch.no_grad():
        compiled_model(x)
        switcher = Switcher(compiled_model)
        for adapter, wanted in zip(adapters, expected, strict=True):
            switcher.switch(adapter)
            assert torch.equal(wanted, compiled_model(x))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def fixed_input() -> torch.Tensor:
    torch.manual_seed(9)
    return torch.randn(5, 24)


def test_a_model_that_peft_has_wrapped(tmp_path: Path) -> None:
    model = models.bert()
    adapter = adapter_of(model.state_dict(), ["bert.encoder.layer.0.attention.self.query.weight"])
    peft = models.random_lora(model, r=2, target_modules=["query"], modules_to_save=["classifier"])
    before = models.outputs(peft)
    switcher = Switcher(peft)
    switcher.load(adapter)
    layer = peft.base_model.model.bert.encoder.layer[0].attention.self.query.base_layer
    tensor = adapter["bert.encoder.layer.0.attention.self.query.weight"]
    assert same_bits(as_array(layer.weight).reshape(-1)[tensor.indices], tensor.values)
    assert not torch.equal(before, models.outputs(peft))
    head = DenseTensor("classifier.bias", torch.zeros(3))
    with pytest.raises(BaseMismatch, match="PEFT uses a trained copy"):
        switcher.load(Adapter([], dense=[head]))
    switcher.revert()
    assert torch.equal(before, models.outputs(peft))


def test_a_model_that_is_cast_or_moved_meanwhile() -> None:
    model = models.net()
    adapter = adapter_of(model.state_dict(), ["wide.weight"])
    base = model.wide.weight.detach().clone()
    switcher = Switcher(model)
    switcher.load(adapter)
    model.wide.weight.data = model.wide.weight.data.clone()  # as a move does
    switcher.revert()
    assert torch.equal(base, model.wide.weight)
    switcher.load(adapter)
    model.half()
    with pytest.raises(BaseMismatch, match="cast to float16 after an adapter was applied in float32"):
        switcher.revert()


def test_autograd_notices() -> None:
    model = models.net()
    adapter = adapter_of(model.state_dict(), ["head.weight"])
    loss = model(fixed_input()).square().sum()
    Switcher(model).load(adapter)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
def test_tensors_on_a_device_by_the_same_interface(dtype: torch.dtype, turned: bool) -> None:
    """Without an accelerator at hand, the path for one on a CPU tensor."""
    tensor = torch.randn(6, 5).to(dtype)
    tensor = tensor.t() if turned else tensor
    one, other = DeviceWeight(tensor), ArrayWeight(as_array(tensor.clone()))
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    indices = np.array([0, 3, 7, 29])
    assert same_bits(one.get(indices), other.get(indices))
    values = np.arange(4).astype(one.dtype)
    for place in (one, other):
        place.put(indices, values)
    assert same_bits(one.whole(), other.whole())
    for place in (one, other):
        place.fill(np.full(place.shape, 3, place.dtype))
    assert same_bits(one.whole(), other.whole())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    base = make_base(8, ml_dtypes.bfloat16)
    weights = {n: torch.from_numpy(w.view(np.int16)).view(torch.bfloat16).cuda() for n, w in base.items()}
    adapters = [make_adapter(base, seed) for seed in (1, 2)]
    switcher = Switcher(weights)
    for wanted in ([(adapters[0], 1.0)], [(adapters[1], 0.5), (adapters[0], 1.0)], []):
        switcher.set(wanted)
        check({n: as_array(t.cpu()) for n, t in weights.items()}, oracle(base, wanted))


def test_a_diffusers_pipeline(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )  # fmt: skip
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    names = [n for n, p in unet.named_parameters() if p.ndim == 4]
    base = {f"unet/{n}": as_array(unet.state_dict()[n]).copy() for n in names}
    adapter = make_adapter(base, 1)
    switcher = Switcher(pipeline)
    switcher.load(adapter)
    now = {name: as_array(unet.state_dict()[name.removeprefix("unet/")]) for name in base}
    check(now, oracle(base, [(adapter, 1.0)]))
    switcher.revert()
    check({name: as_array(unet.state_dict()[name.removeprefix("unet/")]) for name in base}, base)


# Pools


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, Weights, list[Adapter]]:
    base = make_base(9, F32)
    adapters = [make_adapter(base, seed, 0.3) for seed in range(5)]
    for number, adapter in enumerate(adapters):
        save(adapter, tmp_path / f"{number}.st")
    (tmp_path / "notes.txt").write_text("not an adapter")
    return tmp_path, base, adapters


def test_a_pool_keeps_what_was_used_last(folder: tuple[Path, Weights, list[Adapter]]) -> None:
    path, base, adapters = folder
    pool = AdapterPool(path)
    assert list(pool) == ["0", "1", "2", "3", "4"]
    size = max(pool.get_adapter(name).nbytes for name in pool)
    assert pool.statistics.held == 5
    sizes = {name: pool.get_adapter(name).nbytes for name in pool}
    pool = AdapterPool(path, budget=2 * size)
    weights = copied(base)
    switcher = Switcher(weights, pool=pool)
    held: list[str] = []
    hits = evicted = read = 0
    for name in "012020131130442":
        switcher.switch(name)
        check(weights, oracle(base, [(adapters[int(name)], 1.0)]))
        if name in held:
            hits += 1
            held.remove(name)
        else:
            read += (path / f"{name}.st").stat().st_size
        held.append(name)
        while sum(sizes[n] for n in held) > 2 * size:
            held.pop(0)
            evicted += 1
        assert pool.statistics.held_bytes == sum(sizes[n] for n in held)
    counted = pool.statistics
    assert (hits, 15 - hits, evicted) == (counted.hits, counted.misses, counted.evicted)
    assert read == counted.read_bytes
    assert hits > 2
    assert evicted > 2
    assert counted.read_seconds > 0
    switcher.revert()
    check(weights, base)
    with pytest.raises(KeyError, match="no adapter 'x' in the pool of 5"):
        switcher.switch("x")


def test_a_pool_reads_ahead_and_reads_what_was_replaced(folder: tuple[Path, Weights, list[Adapter]]) -> None:
    path, base, adapters = folder
    pool = AdapterPool(path)
    pool.prefetch("1").result()
    pool.get_adapter("1")
    assert (pool.statistics.hits, pool.statistics.misses, pool.statistics.prefetched) == (1, 0, 1)
    save(adapters[4], path / "new.tmp")
    os.replace(path / "new.tmp", path / "1.st")
    weights = copied(base)
    Switcher(weights, pool=pool).switch("1")
    check(weights, oracle(base, [(adapters[4], 1.0)]))
    (path / "2.st").write_bytes(b"damaged")
    with pytest.raises(FormatError):
        pool.prefetch("2").result()
    with pytest.raises(FormatError):
        pool.get_adapter("2")
    save(adapters[2], path / "2.st")
    pool.get_adapter("2")
    (path / "0.st").unlink()
    save(adapters[0], path / "9.st")
    pool.refresh()
    assert list(pool) == ["1", "2", "3", "4", "9"]
    (path / "9.safetensors").write_bytes((path / "9.st").read_bytes())
    with pytest.raises(ValueError, match="both named '9'"):
        pool.refresh()
    with pytest.raises(ValueError, match="negative"):
        AdapterPool(path, budget=-1)


def test_several_threads_ask_and_one_reads(folder: tuple[Path, Weights, list[Adapter]]) -> None:
    path, _, _ = folder
    pool = AdapterPool({"x": path / "0.st"})
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(pool.get_adapter("x"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(adapter) for adapter in found}) == 1
    assert pool.statistics.read_bytes == (path / "0.st").stat().st_size


def open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_a_thousand_adapters_hold_no_more_than_the_budget(tmp_path: Path) -> None:
    base = make_base(10, F32)
    save(make_adapter(base, 1), tmp_path / "first.st")
    data = (tmp_path / "first.st").read_bytes()
    paths = {}
    for number in range(1000):
        paths[f"{number:04}"] = path = tmp_path / f"{number:04}.st"
        path.write_bytes(data)
    pool = AdapterPool(paths, budget=100_000)
    weights = copied(base)
    switcher = Switcher(weights, pool=pool)
    switcher.switch("0000")
    before = open_files()
    for name in pool:
        switcher.switch(name)
        assert pool.statistics.held_bytes <= 100_000
    assert open_files() <= before
    assert pool.statistics.evicted > 900
    switcher.revert()
    check(weights, base)


def test_loading_by_the_library_gives_the_same(folder: tuple[Path, Weights, list[Adapter]]) -> None:
    path, base, adapters = folder
    weights = copied(base)
    Switcher(weights).load(load(path / "3.st"))
    check(weights, oracle(base, [(adapters[3], 1.0)]))


# Machine code and numpy

UNSIGNED = st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64])


@given(UNSIGNED, st.integers(1, 300), st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60)
def test_machine_code_and_numpy_agree(dtype: Any, size: int, seed: int, one: float, two: float) -> None:
    compiled.load()
    kernels = compiled._kernels
    rng = np.random.default_rng(seed)
    flat = rng.integers(0, 255, size).astype(dtype)
    old, new = (np.flatnonzero(rng.random(size) < share) for share in (one, two))
    old_base, values = (rng.integers(0, 255, at.size).astype(dtype) for at in (old, new))
    results = []
    for use in (kernels, None):
        compiled._kernels = use
        try:
            here = flat.copy()
            taken = compiled.take(here, new)
            met = taken.copy()
            count = compiled.overlay(met, new, old, old_base)
            base = compiled.exchange(here, old, old_base, new, values)
            results.append((as_bytes(taken), as_bytes(met), count, as_bytes(base), as_bytes(here)))
        finally:
            compiled._kernels = kernels
    for a, b in zip(*results, strict=True):
        assert np.array_equal(a, b)
    assert results[0][2] == np.intersect1d(old, new).size
