"""The cache of the Hugging Face hub without a connection, laid out here as its client does: whole, in part, and damaged."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from shira_format.checkpoints import open_checkpoint
from shira_format.convert import full_to_shira
from shira_format.errors import ShiraError, SourceError
from shira_format.format import load
from shira_format.storage.hub import hub_identity

COMMIT = "c" * 40
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TENSORS = {
    name: np.random.default_rng(n).standard_normal((8, 9)).astype(np.float32) for n, name in enumerate("vw")
}
SHARDS = {
    FIRST: save({"v": TENSORS["v"]}),
    SECOND: save({"w": TENSORS["w"]}),
    "model.safetensors.index.json": json.dumps({"weight_map": {"v": FIRST, "w": SECOND}}).encode(),
    "config.json": b"{}",
}
SINGLE = {"model.safetensors": save(TENSORS), "config.json": b"{}"}


class Cache:
    """One repository in a cache."""

    def __init__(self, folder: Path, files: dict[str, bytes]) -> None:
        self.folder = folder / "models--me--it"
        self.snapshot = self.folder / "snapshots" / COMMIT
        for inner in (self.snapshot, self.folder / "blobs", self.folder / "refs"):
            inner.mkdir(parents=True)
        (self.folder / "refs" / "main").write_text(COMMIT)
        for name, data in files.items():
            self.blob(name).write_bytes(data)
            (self.snapshot / name).symlink_to(Path("..", "..", "blobs", self.blob(name).name))

    def blob(self, name: str) -> Path:
        return self.folder / "blobs" / hashlib.sha256(name.encode()).hexdigest()


@pytest.fixture(autouse=True)
def without_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()


def refused(text: str = "hf://me/it") -> str:
    with pytest.raises(ShiraError) as caught:
        open_checkpoint(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("files", [SHARDS, SINGLE])
def test_what_is_whole(files: dict[str, bytes], tmp_path: Path) -> None:
    Cache(tmp_path, files)
    checkpoint = open_checkpoint("hf://me/it")
    assert all(np.array_equal(array, checkpoint[name]) for name, array in TENSORS.items())
    assert {"id": "me/it", "revision": COMMIT} == hub_identity("hf://me/it")


def test_a_conversion_finds_the_same_as_from_a_folder(tmp_path: Path) -> None:
    cache = Cache(tmp_path, SHARDS)
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "model.safetensors").write_bytes(save({name: array + 1 for name, array in TENSORS.items()}))
    full_to_shira(tuned, "hf://me/it", tmp_path / "a.st", density=0.1)
    full_to_shira(tuned, cache.snapshot, tmp_path / "b.st", density=0.1)
    hub, folder = load(tmp_path / "a.st"), load(tmp_path / "b.st")
    assert list(hub.values()) == list(folder.values())
    assert {"id": "me/it", "revision": COMMIT} == {
        key: hub.manifest["base_model"][key] for key in ("id", "revision")
    }


@pytest.mark.parametrize("missing", [FIRST, SECOND, "model.safetensors.index.json"])
@pytest.mark.parametrize("how", ["no link", "no blob"])
def test_a_download_that_was_not_finished(missing: str, how: str, tmp_path: Path) -> None:
    """The client leaves part of a blob under another name, and makes the link when the blob is whole."""
    cache = Cache(tmp_path, SHARDS)
    blob = cache.blob(missing)
    blob.rename(f"{blob}.incomplete")
    if how == "no link":
        (cache.snapshot / missing).unlink()
    if missing in (FIRST, SECOND):
        assert f"the shard {missing} is missing" in refused()
    elif how == "no blob":
        with pytest.raises(FileNotFoundError, match=missing):
            open_checkpoint("hf://me/it")
    else:  # the names of the shards say that there are two
        assert TENSORS.keys() == open_checkpoint("hf://me/it").keys()


def test_a_download_that_did_not_come_to_the_weights(tmp_path: Path) -> None:
    cache = Cache(tmp_path, SINGLE)
    (cache.snapshot / "model.safetensors").unlink()
    reason = refused()
    assert reason.startswith("hf://me/it: no weights of a supported format there")
    assert "(in the cache; the hub cannot be reached: " in reason


@pytest.mark.parametrize("name", [SECOND, "model.safetensors.index.json"])
@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_blob_that_was_cut(name: str, kept: int, tmp_path: Path) -> None:
    cache = Cache(tmp_path, SHARDS)
    os.truncate(cache.blob(name), kept % len(SHARDS[name]))
    assert name in refused()


@pytest.mark.parametrize("name", ["config.json", FIRST, "model.safetensors.index.json"])
@pytest.mark.parametrize("far", [False, True])
def test_a_link_that_leads_elsewhere(name: str, far: bool, tmp_path: Path) -> None:
    """A cache that somebody passed on must not have us read other files of this machine."""
    cache = Cache(tmp_path, SHARDS)
    other = tmp_path / "secret"
    other.write_bytes(SHARDS[name])
    link = cache.snapshot / name
    link.unlink()
    link.symlink_to(other if far else Path("..", "..", "..", "secret"))
    assert f"hf://me/it: in the cache, {link} leads to {other}, which is not of this repository" == refused()


def test_a_folder_that_leads_elsewhere(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "elsewhere", SINGLE)
    inner = Cache(tmp_path, {"config.json": b"{}"}).snapshot / "inner"
    inner.symlink_to(cache.snapshot)
    assert "which is not of this repository" in refused("hf://me/it/inner")


def test_a_cache_on_several_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, SINGLE)
    (cache.folder / "blobs").rename(tmp_path / "large")
    (cache.folder / "blobs").symlink_to(tmp_path / "large")
    (tmp_path / "linked").symlink_to(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "linked"))
    assert TENSORS.keys() == open_checkpoint("hf://me/it").keys()


def test_files_without_links(tmp_path: Path) -> None:
    """Where the client cannot make links, as on Windows, files are in the snapshot itself."""
    cache = Cache(tmp_path, SINGLE)
    for name in SINGLE:
        (cache.snapshot / name).unlink()
        cache.blob(name).rename(cache.snapshot / name)
    assert TENSORS.keys() == open_checkpoint("hf://me/it").keys()


def test_what_is_not_in_the_cache() -> None:
    with pytest.raises(SourceError, match="^hf://me/other: not in the cache, and the hub cannot be reached: "):
        open_checkpoint("hf://me/other")
