"""Checkpoints: lazy, honest about their files, and never more than one tensor in memory."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from shira_format._core.arrays import as_array
from shira_format.checkpoints import open_checkpoint
from shira_format.errors import FormatError, SourceError
from shira_format.tensors import same_bits
from tests import models

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.bool,
]


def index(folder: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> Path:
    path = folder / name
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.arange(-6, 6).reshape(3, 4).to(dtype)
    save_torch(
        {"w": tensor, "scalar": tensor[1, 2].clone(), "empty": tensor[:0].clone()}, tmp_path / "w.safetensors"
    )
    checkpoint = open_checkpoint(tmp_path / "w.safetensors")
    assert same_bits(as_array(tensor), checkpoint["w"])
    assert same_bits(as_array(tensor[1, 2]), checkpoint["scalar"])
    assert (0, 4) == checkpoint["empty"].shape == checkpoint.shape("empty")
    assert not checkpoint["w"].flags.writeable


def test_the_real_model() -> None:
    checkpoint = open_checkpoint(models.minilm())
    assert len(checkpoint) > 100
    name = "encoder.layer.5.attention.self.query.weight"
    assert ((384, 384), np.float32) == (checkpoint.shape(name), checkpoint.dtype(name))
    assert [models.minilm() / "model.safetensors"] == checkpoint.files


def test_a_mapping(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert "a" in checkpoint
    assert "b" not in checkpoint
    assert checkpoint.get("b") is None
    with pytest.raises(KeyError):
        checkpoint["b"]


def test_the_usual_file_wins_over_others(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2)}, tmp_path / "model.safetensors")
    save_file({"other": np.zeros(2)}, tmp_path / "adapter_model.safetensors")
    assert ["a"] == list(open_checkpoint(tmp_path))
    save_file({"b": np.zeros(2)}, tmp_path / "m-1.safetensors")
    index(tmp_path, {"b": "m-1.safetensors"})
    assert ["b"] == list(open_checkpoint(tmp_path))  # an index tells more than a single file
    assert [tmp_path / "m-1.safetensors"] == open_checkpoint(tmp_path).files


def test_an_index_lists_all_tensors_of_its_shards(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2), "b": np.zeros(2)}, tmp_path / "m.safetensors")
    path = index(tmp_path, {"b": "m.safetensors"})
    with pytest.raises(SourceError, match="the index does not list all tensors of m.safetensors: 'a'") as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        (
            {"a": "../outside.safetensors"},
            "weight_map has '../outside.safetensors' for 'a', which is not a file name",
        ),
        (
            {"a": "..\\outside.safetensors"},
            r"weight_map has '..\\outside.safetensors' for 'a', which is not a file name",
        ),
        ({"a": "/etc/passwd"}, "weight_map has '/etc/passwd' for 'a', which is not a file name"),
        ({"a": "sub/m.safetensors"}, "weight_map has 'sub/m.safetensors' for 'a', which is not a file name"),
        ({"a": ".."}, "the shard .. is missing"),
        ({"a": ""}, "the shard  is missing"),
        ({"a": 3}, "weight_map has 3 for 'a', which is not a file name"),
        ({"a": "m.safetensors\0"}, None),
        ({"a": "m-2.safetensors"}, "the shard m-2.safetensors is missing"),
        ({"b": "m.safetensors"}, "the index lists 'b' in m.safetensors, which does not have it"),
        (["m.safetensors"], "weight_map is not an object"),
        (None, "weight_map is not an object"),
    ],
)
def test_an_index_must_tell_the_truth(weight_map: Any, reason: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "outside", folder / "m", folder / "sub" / "m"):
        save_file({"a": np.zeros(2)}, f"{path}.safetensors")
    path = index(folder, weight_map)
    with pytest.raises(SourceError) as caught:
        open_checkpoint(folder)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason is None or f"{path}: {reason}" == str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", "[" * 5000, "\ufeff{}"])
def test_an_index_that_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text, "utf-8")
    with pytest.raises(SourceError) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: not an index of shards: ")


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    for path in (index(tmp_path, {"a": "m.safetensors"}), tmp_path / "m.safetensors"):
        with pytest.raises(FormatError) as caught:
            open_checkpoint(path)
        assert tmp_path / "m.safetensors" == caught.value.file
        assert "file-truncated" == caught.value.rule


def test_memory_stays_at_one_tensor(tmp_path: Path) -> None:
    count, size = 24, 8 * 2**20
    rng = np.random.default_rng(0)
    for number in range(count):
        save_file({f"w{number}": rng.integers(0, 255, size, np.uint8)}, tmp_path / f"m-{number}.safetensors")
    checkpoint = open_checkpoint(index(tmp_path, {f"w{i}": f"m-{i}.safetensors" for i in range(count)}))
    process, total, most = psutil.Process(), 0, 0
    gc.collect()
    before = process.memory_info().rss
    for name in checkpoint:
        total += int(checkpoint[name].sum(dtype=np.int64))
        most = max(most, process.memory_info().rss - before)
    assert total > count * size
    assert most < 4 * size, f"{most / 2**20:.0f} MiB for tensors of 8 MiB each"


def test_arrays_outlive_the_checkpoint(tmp_path: Path) -> None:
    save_file({f"w{n}": np.full(100_000, n, np.float32) for n in range(4)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    arrays = [checkpoint[f"w{number}"] for number in range(4)]
    del checkpoint
    gc.collect()
    assert [0, 1, 2, 3] == [float(array[-1]) for array in arrays]
