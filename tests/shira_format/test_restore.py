"""From an adapter and its base back to a checkpoint: every layout, what is refused, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from shira_format._core.arrays import Array, array_digest, as_array
from shira_format._core.dtypes import DTYPES, dtype_name
from shira_format.adapter import Adapter
from shira_format.checkpoints import open_checkpoint
from shira_format.convert import full_to_shira
from shira_format.convert.exact import Exact
from shira_format.errors import BaseMismatch, FormatError, ShiraError, SourceError
from shira_format.export.full import layout as restore_layout
from shira_format.export.full import shira_to_full
from shira_format.format import save
from shira_format.selection import TopK
from shira_format.storage.safetensors_file import SafetensorsFile
from shira_format.tensors import DenseTensor, SparseTensor
from tests import models
from tests.rules import arguments
from tests.shira_format.test_checkpoints_diffusers import pipeline
from tests.strategies import Arrays, any_bits, float_dtypes

BF16 = DTYPES["BF16"]
COUNT = np.arange(60, dtype=np.float32).reshape(12, 5)


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


def described(arrays: Arrays) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """As :func:`tests.models.read_arrays` has it."""
    return {name: (dtype_name(a.dtype), a.shape, a.tobytes()) for name, a in arrays.items()}


def listing(folder: Path) -> dict[str, bytes]:
    """Every file within, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def target(name: str, base: Array, indices: list[int], values: Any, **more: Any) -> SparseTensor:
    places = np.array(indices, np.int64)
    at = base.reshape(-1)[places]
    return SparseTensor(
        name, base.shape, places, np.asarray(values, base.dtype), base_digest=array_digest(at), **more
    )


def patch(folder: Path, base: Arrays, *tensors: SparseTensor | DenseTensor, **manifest: Any) -> tuple[Path, Path]:
    """An adapter file and a base beside it."""
    sparse = [t for t in tensors if isinstance(t, SparseTensor)]
    whole = [t for t in tensors if isinstance(t, DenseTensor)]
    save(Adapter(sparse, dense=whole, manifest=manifest), folder / "a.st")
    return folder / "a.st", models.save_arrays(folder / "base.safetensors", base)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder for input, beside that for output."""
    (tmp_path / "out").mkdir()
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def refused(adapter: Path, base: Path, kind: type[ShiraError] = BaseMismatch, **options: Any) -> str:
    """What is said, of writing and of checking alike, with nothing left in the folder of the output."""
    folder = adapter.parent.parent / "out"
    before = listing(folder)
    said = []
    for out in (folder / "result", None):
        with pytest.raises(kind) as caught:
            shira_to_full(adapter, base, out, **options)
        said.append(str(caught.value))
    assert before == listing(folder)
    assert [] == [path for path in folder.iterdir() if path.name not in {name.split("/")[0] for name in before}]
    assert said[0] == said[1]
    assert "\n" not in said[0]
    return said[0]


# Strength


@settings(max_examples=120)
@given(data=st.data(), dtype=float_dtypes, alpha=st.sampled_from([0.0, 0.5, -1.0, 1.0, 2.5]))
def test_the_result_is_the_formula_at_each_entry(
    data: st.DataObject, dtype: Any, alpha: float, tmp_path: Path
) -> None:
    weight = data.draw(any_bits(dtype, (9, 4)))
    flat, indices = weight.reshape(-1), [0, 3, 4, 30, 35]
    tensor = target("w", weight, indices, data.draw(any_bits(dtype, (5,))))
    delta = SparseTensor("v", (9, 4), indices, data.draw(any_bits(np.dtype(np.float16), (5,))), value_kind="delta", dtype=dtype, base=flat[indices])  # fmt: skip
    adapter, base = patch(
        tmp_path, {"v": weight, "w": weight, "x": COUNT}, tensor, delta, DenseTensor("x", COUNT + 1, base=COUNT)
    )
    report = shira_to_full(adapter, base, tmp_path / "out", alpha=alpha)
    expected = {"v": weight.copy(), "w": weight.copy(), "x": COUNT + (alpha != 0)}
    if alpha:
        for one in (tensor, delta):
            expected[one.name].reshape(-1)[indices] = one.applied(flat[indices], alpha)
    assert described(expected) == models.read_arrays(tmp_path / "out")
    assert ((2, 1) if alpha else (0, 0)) == (report.patched, report.whole)
    shutil.rmtree(tmp_path / "out")


def test_an_adapters_own_strength_is_the_default(work: Path, tmp_path: Path) -> None:
    adapter, base = patch(work, {"w": f32(0, 0)}, target("w", f32(0, 0), [1], [2]), alpha=0.25)
    shira_to_full(adapter, base, tmp_path / "out")
    assert described({"w": f32(0, 0.5)}) == models.read_arrays(tmp_path / "out")
    for alpha in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"alpha {alpha} is not a finite number"):
            shira_to_full(adapter, base, tmp_path / "other", alpha=alpha)


def test_further_rows_at_other_strengths(work: Path, tmp_path: Path) -> None:
    tensor = target("w", COUNT, [1], [-5], rows=13, new_rows=np.ones((1, 5), np.float32), result_digest="0" * 64)
    adapter, base = patch(work, {"w": COUNT, "v": COUNT}, tensor, removed=["v"])
    result = np.concatenate([COUNT, np.ones((1, 5), np.float32)])
    result[0, 1] = -2
    report = shira_to_full(adapter, base, tmp_path / "half", alpha=0.5)  # the digest is of strength 1
    assert described({"w": result}) == models.read_arrays(tmp_path / "half")
    assert (1, 0, 1, 0) == (report.patched, report.whole, report.removed, report.verified)
    report = shira_to_full(adapter, base, tmp_path / "none", alpha=0)
    assert described({"w": COUNT, "v": COUNT}) == models.read_arrays(tmp_path / "none")
    assert (0, 0, 0) == (report.patched, report.whole, report.removed)
    assert "outside the adapter's entries" in refused(adapter, base)


def test_deltas_without_a_digest_fit_any_float(work: Path, tmp_path: Path) -> None:
    for dtype in DTYPES.values():
        delta = SparseTensor("w", (3,), [1], f32(0.5), value_kind="delta")
        adapter, base = patch(work, {"w": np.ones(3, dtype)}, delta)
        if dtype_name(dtype)[0] in "FB" and dtype != np.bool_:
            shira_to_full(adapter, base, tmp_path / "result", alpha=2)
            assert described({"w": np.array([1, 2, 1], dtype)}) == models.read_arrays(tmp_path / "result")
            shutil.rmtree(tmp_path / "result")
        else:
            assert (
                f"tensor 'w': the adapter is for float32, the base {base} has {dtype}: integer and quantised weights cannot "
                "take an adapter"
            ) == refused(adapter, base)
    grown = SparseTensor("w", (3,), [1], f32(1), value_kind="delta", rows=4, new_rows=f32(1))
    adapter, base = patch(work, {"w": np.ones(3, np.float16)}, grown)
    assert f"tensor 'w': the adapter is for float32, the base {base} has float16" == refused(adapter, base)


# What a patch does to names and sizes


def test_patches(work: Path, tmp_path: Path) -> None:
    base = {"a": COUNT, "b": COUNT + 1, "c": COUNT.astype(BF16), "d": f32(1), "i": np.arange(3)}
    tensors = [
        target("b", base["a"], [0], [-1], base_name="a"),  # each from the other's
        target("a", base["b"], [], [], base_name="b"),
        target("tied", base["a"], [], [], base_name="a"),
        target("c", base["c"], [0], [7], rows=2),
        DenseTensor("i", np.arange(5)), DenseTensor("new", np.array([True, False, True])), DenseTensor("last", np.float64(3)),
    ]  # fmt: skip
    adapter, path = patch(work, base, *tensors, removed=["d"])
    shira_to_full(adapter, path, tmp_path / "result")
    changed = COUNT.copy()
    changed[0, 0] = -1
    expected: Arrays = {
        "b": changed, "a": base["b"], "tied": COUNT, "c": base["c"][:2].copy(), "i": np.arange(5),
        "new": np.array([True, False, True]), "last": np.array(3.0),
    }  # fmt: skip
    expected["c"][0, 0] = 7
    assert described(expected) == models.read_arrays(tmp_path / "result")
    streams = SafetensorsFile(tmp_path / "result" / "base.safetensors")
    for stream in streams.values():  # whoever maps the file can use each tensor where it is
        assert 0 == (streams._start + stream.begin) % DTYPES[stream.dtype].itemsize
    assert all(
        np.array_equal(expected[n], t)
        for n, t in load_file(tmp_path / "result" / "base.safetensors").items()
        if n != "c"
    )


def test_only_chosen_tensors_are_applied(work: Path, tmp_path: Path) -> None:
    base = {"a": COUNT, "b": COUNT, "c": COUNT}
    adapter, path = patch(work, base, target("a", COUNT, [0], [9]), target("b", COUNT, [0], [9]), DenseTensor("n", COUNT), removed=["c"])  # fmt: skip
    report = shira_to_full(adapter, path, tmp_path / "one", include=["[ab]"], exclude=["a"])
    assert (1, 0, 0) == (report.patched, report.whole, report.removed)
    changed = COUNT.copy()
    changed[0, 0] = 9
    assert described(base | {"b": changed}) == models.read_arrays(tmp_path / "one")
    said = refused(adapter, path, SourceError, include=["nothing"])
    assert f"{adapter}: no tensor is left by the choice of names" == said


def test_a_patch_of_nothing(work: Path, tmp_path: Path) -> None:
    adapter, path = patch(work, {"w": COUNT})
    shira_to_full(adapter, path, tmp_path / "result")
    assert described({"w": COUNT}) == models.read_arrays(tmp_path / "result")


# What is refused


SPARSE = target("w", COUNT, [0, 59], [5, 6])
MISFITS: dict[str, tuple[Arrays, Any, str]] = {
    "missing": ({"v": COUNT}, SPARSE, "tensor 'w': the base {base} has no 'w'"),
    "missing origin": ({"w": COUNT}, target("w", COUNT, [0], [5], base_name="v"), "tensor 'w': the base {base} has no 'v'"),
    "shape": ({"w": COUNT.reshape(5, 12)}, SPARSE, "tensor 'w': the adapter is for shape [12, 5], the base {base} has [5, 12]"),
    "more rows": ({"w": np.ones((13, 5), np.float32)}, SPARSE, "tensor 'w': the adapter is for shape [12, 5], the base {base} has [13, 5]"),
    "dtype": ({"w": COUNT.astype(np.float16)}, SPARSE, "tensor 'w': the adapter is for float32, the base {base} has float16"),
    "entries": ({"w": COUNT + 1}, SPARSE, "tensor 'w': the base {base} holds other values at the adapter's entries (digest differs)"),
    "bits": ({"w": -COUNT}, target("w", COUNT, [0], [5]), "tensor 'w': the base {base} holds other values at the adapter's entries (digest differs)"),
    "mask": ({"w": COUNT}, SparseTensor("w", (12, 5), [1], value_kind="none"), "tensor 'w' is a mask, without values to apply"),
    "whole": ({"w": COUNT + 1}, DenseTensor("w", COUNT, base=COUNT), "tensor 'w': the base {base} holds another tensor (digest differs)"),
    "whole shape": ({"w": COUNT.T}, DenseTensor("w", COUNT, base=COUNT), "tensor 'w': the base {base} holds another tensor (digest differs)"),
    "whole missing": ({"v": COUNT}, DenseTensor("w", COUNT, base=COUNT), "tensor 'w': the base {base} has no 'w'"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_another_base_is_refused(case: str, work: Path) -> None:
    arrays, tensor, reason = MISFITS[case]
    adapter, base = patch(work, arrays | {"a": COUNT}, target("a", COUNT, [3], [0]), tensor)
    assert reason.format(base=base) == refused(adapter, base)


def test_what_shall_go_must_be_there(work: Path) -> None:
    adapter, base = patch(work, {"w": COUNT}, SPARSE, removed=["v"])
    assert f"tensor 'v': the adapter removes it, and the base {base} has none" == refused(adapter, base)


@pytest.mark.parametrize("where", ["sparse", "unchanged", "rows"])
def test_a_base_that_differs_elsewhere_is_known_by_the_result_alone(
    where: str, work: Path, tmp_path: Path
) -> None:
    base = {"sparse": COUNT, "unchanged": COUNT + 1, "rows": COUNT.astype(BF16)}
    tuned = {
        "sparse": COUNT.copy(),
        "unchanged": COUNT + 1,
        "rows": np.concatenate([base["rows"], base["rows"][:1]]),
    }
    tuned["sparse"][3, 3] = -0.5
    before, after = (
        models.save_arrays(work / f"{n}.safetensors", a) for n, a in (("base", base), ("tuned", tuned))
    )
    other = {name: array.copy() for name, array in base.items()}
    other[where][7, 2] += 1
    wrong = models.save_arrays(work / "other.safetensors", other)
    full_to_shira(after, before, work / "a.st", exact=True)
    assert 3 == shira_to_full(work / "a.st", before, None).verified
    assert refused(work / "a.st", wrong) == (
        f"tensor {where!r}: the base {wrong} differs from the right one outside the adapter's entries: the result is not what "
        "it should be (digest differs)"
    )
    shira_to_full(work / "a.st", wrong, tmp_path / "half", alpha=0.5)  # nothing tells it
    full_to_shira(after, before, work / "b.st", exact=True, digests=False)
    report = shira_to_full(work / "b.st", wrong, tmp_path / "result")
    assert 0 == report.verified
    found = models.read_arrays(tmp_path / "result")
    assert [where] == [name for name, content in described(tuned).items() if found[name] != content]


@pytest.mark.parametrize("stream", ["w#values", "w#indices", "w#rows", "x"])
def test_a_damaged_adapter_is_refused(stream: str, work: Path) -> None:
    tensor = target("w", COUNT, [0, 59], [5, 6], rows=13, new_rows=np.ones((1, 5), np.float32))
    adapter, base = patch(work, {"w": COUNT, "a": COUNT}, tensor, DenseTensor("x", np.ones(600_000, np.float32)))
    streams = SafetensorsFile(adapter)
    data = bytearray(adapter.read_bytes())
    data[streams._start + streams[stream].begin] ^= 1
    adapter.write_bytes(data)
    said = refused(adapter, base, FormatError)
    assert said.startswith(f"{adapter}: tensor '{stream[0]}': ")
    assert said.endswith("is damaged (its digest differs) (rule: digest-mismatch)")
    adapter.write_bytes(bytes(data[:-1]))
    assert "file-truncated" in refused(adapter, base, FormatError)


def test_a_component_that_the_base_lacks(work: Path) -> None:
    base = work / "pipe"
    models.save_arrays(base / "unet" / "diffusion_pytorch_model.safetensors", {"w": COUNT})
    (base / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    for component, kind in (("unet", None), ("vae", BaseMismatch)):
        save(
            Adapter(dense=[DenseTensor(f"{component}/n", COUNT)], manifest={"components": {component: {}}}),
            work / "a.st",
        )
        if kind is None:
            shira_to_full(work / "a.st", base, None)
        else:
            assert "tensor 'vae/n': the base has no component 'vae'" == refused(work / "a.st", base)


# The folder that is written


def test_without_a_folder_nothing_is_written(work: Path) -> None:
    adapter, base = patch(work, {"w": COUNT}, SPARSE)
    (work / "config.json").write_text("{}")
    before = listing(work.parent)
    report = shira_to_full(adapter, base, None)
    assert before == listing(work.parent)
    assert ({}, [], 1) == (report.files, report.copied, report.patched)


def test_the_folder_that_is_there_is_replaced_as_a_whole(work: Path, tmp_path: Path) -> None:
    adapter, base = patch(work, {"w": COUNT}, SPARSE)
    out = tmp_path / "out" / "result"
    models.save_arrays(out / "inner" / "old.safetensors", {"x": COUNT})
    (work / "other.safetensors").write_bytes(base.read_bytes()[:-1] + b"!")
    refused(adapter, work / "other.safetensors")  # leaves it
    shira_to_full(adapter, base, out)
    assert ["base.safetensors"] == list(listing(out))
    assert ["result"] == [path.name for path in (tmp_path / "out").iterdir()]


def test_a_folder_that_holds_an_input_is_not_replaced(work: Path, tmp_path: Path) -> None:
    adapter, base = patch(work, {"w": COUNT}, SPARSE)
    before = listing(tmp_path)
    for out in (work, work.parent, work / ".." / "in"):
        with pytest.raises(SourceError, match=r"holds .*, and is not replaced"):
            shira_to_full(adapter, base, out)
    (tmp_path / "elsewhere").mkdir()
    moved = adapter.rename(tmp_path / "elsewhere" / "a.st")
    with pytest.raises(SourceError, match=r"holds .*a\.st, and is"):
        shira_to_full(moved, base, moved.parent)
    moved.rename(adapter)
    with pytest.raises(SourceError, match=r"a\.st: is a file, not a folder to write"):
        shira_to_full(adapter, base, adapter)
    assert before == listing(tmp_path)
    shira_to_full(adapter, base, work / "within")
    assert ["base.safetensors"] == list(listing(work / "within"))


def test_a_folder_that_cannot_be_made(work: Path, tmp_path: Path) -> None:
    adapter, base = patch(work, {"w": COUNT}, SPARSE)
    before = listing(tmp_path)
    with pytest.raises(SourceError, match="the folder .*missing does not exist"):
        shira_to_full(adapter, base, tmp_path / "missing" / "result")
    assert before == listing(tmp_path)


@pytest.mark.parametrize(
    "when",
    ["restore.SparseTensor.applied", "restore.write_indexes", "other_files._parts", "os.fsync", "os.replace"],
)
@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupt_leaves_everything_as_it_was(
    when: str, exists: bool, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, base = patch(work, {"w": COUNT}, SPARSE)
    (work / "config.json").write_text("{}")
    out = tmp_path / "out" / "result"
    if exists:
        models.save_arrays(out / "old.safetensors", {"x": COUNT})

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(when if when.startswith("os.") else f"shira_format.export.full.{when}", stop)
    before = listing(tmp_path), sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        shira_to_full(adapter, base, out)
    assert before == (listing(tmp_path), sorted(tmp_path.rglob("*")))


def test_an_interrupt_between_the_files(work: Path, tmp_path: Path) -> None:
    """While the second tensor is written; by whoever is told of progress."""
    adapter, base = patch(work, {"v": COUNT, "w": COUNT}, SPARSE)
    done: list[int] = []

    def progress(count: int) -> None:
        done.append(count)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shira_to_full(adapter, base, tmp_path / "out" / "result", progress=progress)
    assert [] == list((tmp_path / "out").iterdir())
    done = []
    shira_to_full(adapter, base, tmp_path / "out" / "result", progress=done.append)
    assert 2 * COUNT.nbytes == sum(done)


# Other files of the model


WEIGHTS = ("model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "x.gguf", "tf_model.h5",
           "flax_model.msgpack", "onnx/model.onnx", "onnx/model.onnx_data", "old.st", "consolidated.00.pth", "a.ckpt",
           "w.pt", "__0_0.distcp", ".metadata", "model.safetensors.index.fp16.json")  # fmt: skip
TAKEN = (
    "config.json",
    "tokenizer.json",
    "generation_config.json",
    "1_Pooling/config.json",
    "README.md",
    "vocab.txt",
    "deep/er/x.py",
)
HIDDEN = (".gitattributes", ".cache/x.json", "1_Pooling/.hidden")


def test_other_files_are_taken_over(work: Path, tmp_path: Path) -> None:
    adapter, _ = patch(work, {"w": COUNT}, SPARSE)
    base = work / "model"
    models.save_arrays(base / "model.safetensors", {"w": COUNT})
    for name in (*WEIGHTS, *TAKEN, *HIDDEN):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    if os.name == "posix":  # others allow no links, or not to everybody
        (base / "link.txt").symlink_to(base / "vocab.txt")
    else:
        shutil.copy(base / "vocab.txt", base / "link.txt")
    report = shira_to_full(adapter, base / "model.safetensors", tmp_path / "result")
    assert {*TAKEN, "link.txt"} == set(report.copied)
    found = listing(tmp_path / "result")
    assert {"model.safetensors", "link.txt", *TAKEN} == set(found)
    assert all(name.encode() == found[name] for name in TAKEN)
    assert (b"vocab.txt", False) == (found["link.txt"], (tmp_path / "result" / "link.txt").is_symlink())
    assert {"model.safetensors": len(found["model.safetensors"])} == report.files
    assert [] == report.notices


def test_files_of_another_folder(work: Path, tmp_path: Path) -> None:
    rows = target("w", COUNT, [], [], rows=13, new_rows=np.ones((1, 5), np.float32))
    adapter, base = patch(work, {"w": COUNT}, rows)
    (work / "config.json").write_text("mine")
    (tmp_path / "tuned").mkdir()
    for folder, reason in (("missing", "no such folder"), ("tuned", "not the folder of a model: it has neither config.json nor model_index.json")):  # fmt: skip
        with pytest.raises(SourceError) as caught:
            shira_to_full(adapter, base, tmp_path / "out" / "result", files_from=tmp_path / folder)
        assert f"{tmp_path / folder}: {reason}" == str(caught.value)
        assert [] == list((tmp_path / "out").iterdir())
    (tmp_path / "tuned" / "config.json").write_text("theirs")
    report = shira_to_full(adapter, base, tmp_path / "theirs", files_from=tmp_path / "tuned")
    assert (b"theirs", []) == (listing(tmp_path / "theirs")["config.json"], report.notices)
    report = shira_to_full(adapter, base, tmp_path / "mine")
    assert b"mine" == listing(tmp_path / "mine")["config.json"]
    notice = (
        "tensor 'w' now has 13 rows, the base 12: config and tokenizer are those of the base, and may need the "
        "fine-tune's (--files-from)"
    )
    assert [notice] == report.notices


def test_a_file_alone_has_no_other_files(work: Path, tmp_path: Path) -> None:
    adapter, base = patch(work, {"w": COUNT}, SPARSE)
    (work / "notes.txt").write_text("not a model's")
    report = shira_to_full(adapter, base, tmp_path / "result")
    assert ["the base has no folder with a config: only weights were written"] == report.notices
    assert ["base.safetensors"] == list(listing(tmp_path / "result"))


# Layouts, as their libraries load them


def tuned_llama() -> LlamaForCausalLM:
    model = models.llama()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(torch.where(noise.abs() > 2, noise / 10, 0))
    return model


def save_safetensors(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def save_sharded(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def save_bin(model: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def save_sharded_bin(model: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    state = model.state_dict()
    names, weight_map = list(state), {}
    for number, some in enumerate((names[:9], names[9:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name] for name in some}, folder / file)
        weight_map |= dict.fromkeys(some, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


LAYOUTS: dict[str, Callable[[Any, Path], None]] = {
    "safetensors": save_safetensors,
    "sharded": save_sharded,
    "bin": save_bin,
    "sharded bin": save_sharded_bin,
}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("base", "tuned"), [("sharded", "bin"), ("sharded", "safetensors"), ("bin", "sharded"), ("sharded bin", "sharded"), ("safetensors", "sharded bin")])  # fmt: skip
def test_transformers_loads_the_result(base: str, tuned: str, exact: bool, tmp_path: Path) -> None:
    for name, model, layout in (("base", models.llama(), base), ("tuned", tuned_llama(), tuned)):
        LAYOUTS[layout](model, tmp_path / name)
    rule = Exact() if exact else TopK(1.0)
    full_to_shira(tmp_path / "tuned", tmp_path / "base", tmp_path / "a.st", **arguments(rule))
    report = shira_to_full(tmp_path / "a.st", tmp_path / "base", tmp_path / "out")
    assert [] == report.notices
    files = {path.name for path in (tmp_path / "out").iterdir()}
    if base == "sharded":
        assert {path.name for path in (tmp_path / "base").iterdir()} == files
        old, new = (
            json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())
            for folder in ("base", "out")
        )
        assert old["weight_map"] == new["weight_map"]
        assert old["metadata"]["total_size"] == new["metadata"]["total_size"]
    elif base == "sharded bin":
        shards = {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
        assert (
            {*shards, "model.safetensors.index.json", "config.json", "generation_config.json"} >= files >= shards
        )
    else:
        assert {"model.safetensors", "config.json", "generation_config.json"} >= files
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected = tuned_llama()
    assert {n: as_array(t).tobytes() for n, t in expected.state_dict().items()} == {
        n: as_array(t).tobytes() for n, t in found.state_dict().items()
    }
    assert torch.equal(models.outputs(expected), models.outputs(found))


def test_shards_of_any_name_and_a_new_tensor(work: Path, tmp_path: Path) -> None:
    """An index of files without numbers; its copy needs one too. What is new comes last, what is gone leaves no file."""
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "three.safetensors"}
    for name, file in weight_map.items():
        models.save_arrays(work / "base" / file, {name: COUNT}, about=name)
    (work / "base" / "my.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    adapter, _ = patch(work, {}, target("a", COUNT, [3], [7]), DenseTensor("new", COUNT), removed=["b"])
    report = shira_to_full(adapter, work / "base", tmp_path / "result")
    assert {"one.safetensors", "three.safetensors"} == set(report.files)
    found = open_checkpoint(tmp_path / "result")
    assert {"a", "c", "new"} == set(found)
    assert {"one.safetensors": ["a"], "three.safetensors": ["c", "new"]} == found.shards
    assert {"about": "a"} == found.metadata("one.safetensors")
    assert 7 == found["a"][0, 3]


def test_a_base_that_is_not_divided_is_divided_by_size(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = gguf.GGUFWriter(work / "base.gguf", "llama")
    names = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight", "output_norm.weight": "model.norm.weight"}  # fmt: skip
    arrays = {name: np.random.default_rng(2).standard_normal((6, 32)).astype(np.float32) for name in names}
    arrays["output_norm.weight"] = arrays["output_norm.weight"][0]
    writer.add_uint32("llama.attention.head_count", 4)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = open_checkpoint(work / "base.gguf")
    assert base.shards is None
    tuned = {name: array.copy() for name, array in base.items()}
    assert set(names.values()) == set(tuned)
    tuned["lm_head.weight"][2, 7] += 1
    models.save_arrays(work / "tuned.safetensors", tuned)
    full_to_shira(work / "tuned.safetensors", work / "base.gguf", work / "a.st", exact=True)
    shira_to_full(work / "a.st", work / "base.gguf", tmp_path / "one")
    assert ["model.safetensors"] == list(listing(tmp_path / "one"))
    assert described(tuned) == models.read_arrays(tmp_path / "one")
    monkeypatch.setattr(restore_layout, "SHARD_BYTES", 6 * 32 * 4)
    report = shira_to_full(work / "a.st", work / "base.gguf", tmp_path / "many")
    assert len(report.files) in (2, 3)
    assert all(name.endswith(f"-of-{len(report.files):05d}.safetensors") for name in report.files)
    assert described(tuned) == models.read_arrays(tmp_path / "many")
    assert set(tuned) == set(open_checkpoint(tmp_path / "many"))


@pytest.mark.parametrize(
    "options", [{}, {"max_shard_size": "10KB"}, {"variant": "fp16"}, {"safe_serialization": False}]
)
def test_diffusers_loads_the_result(options: dict[str, Any], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = pipeline()
        pipe.save_pretrained(tmp_path / "base", **options)
        with torch.no_grad():
            for part in (pipe.unet, pipe.vae, pipe.text_encoder):
                for parameter in part.parameters():
                    parameter.view(-1)[::7] += 0.125
        pipe.save_pretrained(tmp_path / "tuned")
    full_to_shira(tmp_path / "tuned", tmp_path / "base", tmp_path / "a.st", exact=True)
    report = shira_to_full(tmp_path / "a.st", tmp_path / "base", tmp_path / "out")
    assert {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json"} <= set(report.copied)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known: dict[str, Any] = {"variant": "fp16"} if "variant" in options else {}
        known |= dict.fromkeys(("tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
        found = StableDiffusionPipeline.from_pretrained(tmp_path / "out", **known)
    assert isinstance(found.unet, UNet2DConditionModel)
    assert isinstance(found.vae, AutoencoderKL)
    for part in ("unet", "vae", "text_encoder"):
        expected, actual = getattr(pipe, part).state_dict(), getattr(found, part).state_dict()
        assert expected.keys() == actual.keys()
        for name, tensor in expected.items():
            assert as_array(tensor).tobytes() == as_array(actual[name]).tobytes()
