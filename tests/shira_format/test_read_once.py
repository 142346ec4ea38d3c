"""What a digest covers is what is used, also if the file is replaced meanwhile; and files that fill the memory or never end."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shira_format._core.files import digested
from shira_format.adapter import Adapter
from shira_format.calibration.texts import load_model, read_texts
from shira_format.convert import lora, lora_to_shira
from shira_format.convert.fit import data
from shira_format.convert.peft_shira import peft_to_shira, read
from shira_format.errors import SourceError
from shira_format.export.peft_shira import shira_to_peft
from shira_format.format import save
from shira_format.storage.npz import read_arrays
from shira_format.sync import Publisher, Subscriber
from shira_format.sync.index import Stored
from shira_format.tensors import SparseTensor
from shira_format.training import state
from shira_format.training.sparse import sparse_parameters
from shira_format.training.texts import read_file
from tests import models


def test_a_file_that_changes_after_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one")
    with digested(path) as (file, digest):
        assert b"one" == file.read()
    assert hashlib.sha256(b"one").hexdigest() == digest
    with pytest.raises(OSError, match="has changed while it was read") as caught, digested(path):
        path.write_bytes(b"other")
    assert str(path) == caught.value.filename
    with digested(path) as (file, digest):  # another file of this name: what is open is read
        (tmp_path / "b.txt").write_bytes(b"new")
        (tmp_path / "b.txt").replace(path) if os.name != "nt" else None
        assert hashlib.sha256(file.read()).hexdigest() == digest


def test_texts_and_labels_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    lines = b'{"text": "a", "label": 1}\n{"text": " "}\n\n{"text": "b", "label": "x"}\n'
    path.write_bytes(lines)
    opened: list[Any] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda name, *more: (opened.append(name), real(name, *more))[1])
    found = read_file(path, "classify")
    assert [path] == [name for name in opened if name == path]
    assert (hashlib.sha256(lines).hexdigest(), ("1", "x")) == (found.digest, found.labels)
    read = read_texts(path, labelled=True, limit=1)
    assert (["a"], ["1"], found.digest) == (read.texts, read.labels, read.digest)
    path.write_bytes(lines + b'{"text": "c", "label": true}\n')
    with pytest.raises(SourceError, match="line 5 has no 'label' that is a text or an integer"):
        read_file(path, "classify")


@pytest.mark.parametrize("labels", [("²", "1"), ("--5", "1"), ("-", ""), ("٣", "4"), ("1" * 5000, "2")])
def test_labels_that_look_like_numbers(labels: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "a", "label": "{label}"}}\n' for label in labels), "utf-8")
    assert tuple(sorted(labels)) == read_file(path, "classify").labels


def _weights() -> dict[str, Any]:
    return {"w": np.arange(64, dtype=np.float32)}


def test_a_patch_that_is_replaced_after_its_digest_was_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entries' base values would be right, and its targets another's."""
    patches = {}
    for where, step in (("here", 1.0), ("there", 2.0)):
        weights = _weights()
        publisher = Publisher(weights, tmp_path / where)
        weights["w"][3] += step
        publisher.publish()
        (patches[where],) = (tmp_path / where / "patches").iterdir()
    live = _weights()
    subscriber = Subscriber(live, tmp_path / "here", version=0)
    read, other = Stored.read, patches["there"].read_bytes()

    def read_and_swap(stored: Stored, path: Path, where: str) -> bytes:
        found = read(stored, path, where)
        path.write_bytes(other)
        return found

    monkeypatch.setattr(Stored, "read", read_and_swap)
    assert 1 == subscriber.update().version
    assert 4.0 == live["w"][3]
    with pytest.raises(SourceError, match=r"patches/.*: damaged \(its digest differs\)"):
        Subscriber(_weights(), tmp_path / "here", version=0).update()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["structure.json", "index/0000000000.json"])
def test_a_pipe_or_a_device_in_a_place(name: str, kind: str, tmp_path: Path) -> None:
    Publisher(_weights(), tmp_path)
    (tmp_path / name).unlink()
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(OSError, match="not a regular file"):
        Subscriber(_weights(), tmp_path).update()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_in_the_folder_of_a_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(SourceError, match="config.json: not a regular file"):
        load_model(tmp_path)


# Arrays to fit on.


def _bomb(path: Path) -> None:
    np.savez_compressed(path, x=np.zeros((1 << 12, 1 << 12), np.float32))


def _forged(path: Path) -> None:
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})


def _objects(path: Path) -> None:
    np.savez(path, x=np.array([{}], object))


def _twice(path: Path) -> None:
    np.savez(path, x=np.zeros(3))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x.npy", b"")


FILES = {
    "bomb.npz": (_bomb, "bytes of arrays"),
    "forged.npy": (_forged, "which is not its size"),
    "objects.npz": (_objects, "Python objects"),
    "twice.npz": (_twice, "occurs twice"),
    "none.npz": (lambda path: path.write_bytes(b"PK\3\4" + bytes(50)), "zip"),
    "empty.npy": (lambda path: path.write_bytes(b""), "."),
    "texts.npz": (lambda path: np.savez(path, x=np.array(["a"])), "."),
    "dates.npy": (lambda path: np.save(path, np.zeros(2, "M8[s]")), "."),
}


@pytest.mark.parametrize("name", FILES)
def test_arrays_that_cannot_be_used(name: str, tmp_path: Path) -> None:
    make, reason = FILES[name]
    make(tmp_path / name)
    tracemalloc.start()
    with pytest.raises(SourceError, match=rf"{name}: .*{reason}"):
        data._items(tmp_path / name, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


def test_arrays_that_can_be_used(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.savez_compressed(tmp_path / "a.npz", x=x, y=np.arange(3))
    np.save(tmp_path / "a.npy", x)
    arrays, digest = read_arrays(tmp_path / "a.npz")
    assert hashlib.sha256((tmp_path / "a.npz").read_bytes()).hexdigest() == digest
    assert np.array_equal(x, arrays["x"])
    assert 3 == len(data._items(tmp_path / "a.npz", None)[0])
    items, source = data._items(tmp_path / "a.npy", 2)
    assert 2 == len(items)
    assert "a.npy" == source["name"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("convert", [lora_to_shira, peft_to_shira])
def test_a_lora_that_is_replaced_between_reading_and_hashing(
    convert: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its files is opened several times."""
    base = models.save_base(models.net(), tmp_path / "base")
    if convert is lora_to_shira:
        made, module, reader = models.random_lora(models.net(), r=2, target_modules=["head"]), lora, "open_lora"
        models.save_lora(made, tmp_path / "it")
    else:
        delta = SparseTensor("head.weight", (6, 40), [1], np.ones(1, np.float32), value_kind="delta")
        save(Adapter([delta]), tmp_path / "a.st")
        shira_to_peft(tmp_path / "a.st", tmp_path / "it", pad=True)
        module, reader = read, "check_all_used"
    file = tmp_path / "it" / name
    real = getattr(module, reader)

    def replacing(*given: Any, **options: Any) -> Any:
        found = real(*given, **options)
        file.write_bytes(file.read_bytes() + b" ")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(module, reader, replacing)
        with pytest.raises(SourceError, match=f"{name}: the file has changed while it was read"):
            convert(tmp_path / "it", base, tmp_path / "out.st")
    assert not (tmp_path / "out.st").exists()


def test_a_training_whose_adapter_is_replaced_while_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is loaded is another adapter than the one that belongs to the state."""
    path = tmp_path / "a.st"
    trained = sparse_parameters(models.net(), {"head.weight": np.arange(3)})
    trained.save_state(path)
    saved = path.read_bytes()
    other = models.net()
    with torch.no_grad():
        other.head.weight.add_(1)
    sparse_parameters(other, {"head.weight": np.arange(3)}).save(tmp_path / "other.st")
    path.write_bytes((tmp_path / "other.st").read_bytes())
    real = state.load

    def replacing(name: Any) -> Any:
        found = real(name)
        path.write_bytes(saved)
        return found

    monkeypatch.setattr(state, "load", replacing)
    with pytest.raises(SourceError, match=r"a\.st: the file has changed while it was read"):
        state.load_resumable(path)
