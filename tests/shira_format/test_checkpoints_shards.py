"""Shards: read together whatever was named, and refused if some are missing or an index contradicts them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from shira_format.checkpoints import open_checkpoint
from shira_format.errors import SourceError
from shira_format.storage.hub import needed_files

ENDINGS = pytest.mark.parametrize(("stem", "ending"), [("model", ".safetensors"), ("pytorch_model", ".bin")])


def save(path: Path, *names: str) -> Path:
    arrays = {name: np.full(2, float(place)) for place, name in enumerate(names)}
    if path.suffix == ".safetensors":
        save_file(arrays, path)
    else:
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    return path


def shards(folder: Path, stem: str, ending: str, *parts: tuple[str, ...]) -> list[Path]:
    count = len(parts)
    return [
        save(folder / f"{stem}-{number:05}-of-{count:05}{ending}", *names) for number, names in enumerate(parts, 1)
    ]


def index(folder: Path, stem: str, ending: str, weight_map: dict[str, str]) -> Path:
    path = folder / f"{stem}{ending}.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


def refused(path: Path, *reasons: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_checkpoint(path)
    for reason in reasons:
        assert reason in str(caught.value)


@ENDINGS
def test_an_index_that_leaves_tensors_out(stem: str, ending: str, tmp_path: Path) -> None:
    first, second = shards(tmp_path, stem, ending, ("a", "b", "c"), ("d", "e", "f"))
    path = index(tmp_path, stem, ending, {"a": first.name, "b": first.name, "d": second.name, "e": second.name})
    for named in (path, tmp_path, first):
        refused(named, str(path), first.name, "'c'")
    path = index(tmp_path, stem, ending, dict.fromkeys("abc", first.name))
    for named in (path, tmp_path, first, second):
        refused(named, str(path), f"all tensors of {second.name}: 'd', 'e', 'f'")
    second.unlink()
    refused(path, str(path), first.name, f"missing: {second.name}")


def test_a_shard_that_the_index_beside_it_does_not_list(tmp_path: Path) -> None:
    (path,) = shards(tmp_path, "model", ".safetensors", ("a",))
    save(tmp_path / "other.safetensors", "a")
    index(tmp_path, "model", ".safetensors", {"a": "other.safetensors"})
    refused(path, str(path), "model.safetensors.index.json beside it does not list it")


@ENDINGS
def test_a_tensor_in_two_shards_of_an_index(stem: str, ending: str, tmp_path: Path) -> None:
    first, second = shards(tmp_path, stem, ending, ("a", "b"), ("b", "c"))
    path = index(tmp_path, stem, ending, {"a": first.name, "b": first.name, "c": second.name})
    refused(path, str(path), second.name, "'b'")


@ENDINGS
def test_a_shard_is_read_with_its_siblings(stem: str, ending: str, tmp_path: Path) -> None:
    parts = shards(tmp_path, stem, ending, ("a",), ("b", "c"), ("d",))
    for named in (*parts, tmp_path):
        checkpoint = open_checkpoint(named)
        assert list("abcd") == list(checkpoint)
        assert parts == checkpoint.files
        assert not checkpoint.notices
        assert 1.0 == checkpoint["c"][0]
    index(tmp_path, stem, ending, {"a": parts[0].name} | dict.fromkeys("bc", parts[1].name) | {"d": parts[2].name})
    for named in (*parts, tmp_path):
        assert list("abcd") == list(open_checkpoint(named))


@ENDINGS
def test_a_shard_without_its_siblings(stem: str, ending: str, tmp_path: Path) -> None:
    first, second, third = shards(tmp_path, stem, ending, ("a",), ("b",), ("c",))
    second.unlink()
    for named in (first, third, tmp_path):
        refused(named, "one of 3 shards", f"missing: {second.name}")
    refused(save(tmp_path / f"{stem}-00004-of-00003{ending}", "d"), "shard 4 of 3")


@ENDINGS
def test_two_shards_with_the_same_tensor(stem: str, ending: str, tmp_path: Path) -> None:
    first, second = shards(tmp_path, stem, ending, ("a", "b"), ("b",))
    for named in (tmp_path, first, second):
        refused(named, first.name, second.name, "'b'")


def test_names_of_shards(tmp_path: Path) -> None:
    for names in (
        ("x.fp16-00001-of-00002.safetensors", "x.fp16-00002-of-00002.safetensors"),
        ("x-00001-of-00002.fp16.safetensors", "x-00002-of-00002.fp16.safetensors"),
        ("x-1-of-2.safetensors", "x-2-of-2.safetensors"),
    ):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in names:
            save(folder / name, name)
        assert list(names) == list(open_checkpoint(folder)) == list(open_checkpoint(folder / names[1]))
    one = tmp_path / "one"
    one.mkdir()
    assert ["a"] == list(open_checkpoint(*shards(one, "model", ".safetensors", ("a",))))


def test_two_sets_of_shards_are_two_checkpoints(tmp_path: Path) -> None:
    shards(tmp_path, "a", ".safetensors", ("a",), ("b",))
    shards(tmp_path, "b", ".safetensors", ("a",), ("b",))
    refused(tmp_path, "several checkpoints", "name one")


def test_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    shards(tmp_path, "model", ".safetensors", ("a",), ("b",))
    save(tmp_path / "model.safetensors", "a", "b")
    (notice,) = open_checkpoint(tmp_path).notices
    assert "not read: model-00001-of-00002.safetensors, model-00002-of-00002.safetensors" in notice


@pytest.mark.parametrize("names", [("consolidated.00.pth", "consolidated.01.pth"), ("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt")])  # fmt: skip
def test_tensor_parallel_parts_are_no_checkpoint(names: tuple[str, str], tmp_path: Path) -> None:
    first = save(tmp_path / names[0], "a")
    assert ["a"] == list(open_checkpoint(first))
    save(tmp_path / names[1], "a")
    refused(first, names[1], "tensor-parallel")


def test_the_hub_gives_all_shards() -> None:
    names = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert names == needed_files(names, "", lambda _: None, "hf://a/b")
    assert names[1:] == needed_files(names, names[2], lambda _: None, "hf://a/b")
