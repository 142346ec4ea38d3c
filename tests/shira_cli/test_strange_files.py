"""Pipes, devices, oversized and forged files as inputs; names that reorder a line, as JSON; a full disk."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from shira_analysis.figures.layers import layer_grid
from shira_analysis.measures.adapter import TensorMeasures
from shira_analysis.measures.size import mask_of
from shira_cli import main as shira
from shira_cli.output import json_text
from shira_format.adapter import Adapter
from shira_format.convert.csr.matrix import read_matrix
from shira_format.errors import SourceError
from shira_format.export.csr import shira_to_csr
from shira_format.format import save
from shira_format.selection import spool
from shira_format.storage import paths
from shira_format.storage.paths import LocalFile
from shira_format.tensors import SparseTensor
from tests import models

Capture = pytest.CaptureFixture[str]
ONE, ZERO = np.ones(1, np.float32), np.zeros(1, np.float32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, a LoRA, an adapter, its CSR folder, texts."""
    models.save_base(models.net(), tmp_path / "base")
    (tmp_path / "base" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(models.net().state_dict(), "model.safetensors")})
    )
    models.save_lora(models.random_lora(models.net(), r=2, target_modules=["head"]), tmp_path / "lora")
    save(Adapter([SparseTensor("w", (2, 3), [1], ONE, base=ZERO)]), tmp_path / "a.st")
    shira_to_csr(tmp_path / "a.st", tmp_path / "csr")
    weight = models.net().head.weight.detach().numpy()
    base = weight.reshape(-1)[:1].copy()
    save(Adapter([SparseTensor("head.weight", weight.shape, [0], base + 1, base=base)]), tmp_path / "head.st")
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "vocab.txt").write_text("a")
    (tmp_path / "texts.jsonl").write_text('{"text": "a", "label": 1}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What a command reads, and the command.
READ = {
    "lora/adapter_config.json": "convert lora_to_shira lora --base base -o x.st",
    "lora/adapter_model.safetensors": "convert lora_to_shira lora/adapter_model.safetensors --base base -o x.st",
    "base/model.safetensors.index.json": "convert lora_to_shira lora --base base/model.safetensors.index.json -o x.st",
    "base/model.safetensors": "convert lora_to_shira lora --base base/model.safetensors -o x.st",
    "a.st": "inspect a.st",
    "csr/index.json": "convert csr_to_shira csr -o x.st",
    "csr/w.npz": "convert csr_to_shira csr -o x.st",
    "texts.jsonl": "moments base --texts texts.jsonl -o x.safetensors",
    "base/vocab.txt": "convert shira_to_full head.st --base base -o x.full",
}


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("read", READ)
def test_a_pipe_or_a_device_is_not_read(read: str, kind: str, folder: Path, capsys: Capture) -> None:
    """It would block, or never end."""
    assert (folder / read).is_file()
    (folder / read).unlink()
    if kind == "pipe":
        os.mkfifo(folder / read)
    else:
        (folder / read).symlink_to("/dev/zero")
    assert 1 == shira.main(READ[read].split())
    out, err = capsys.readouterr()
    assert ("", 1) == (out, err.count("\n"))
    assert not list(folder.glob("x.*"))


@pytest.mark.parametrize(
    "read", ["lora/adapter_config.json", "base/model.safetensors.index.json", "csr/index.json"]
)
def test_a_configuration_is_read_up_to_a_limit(read: str, folder: Path, capsys: Capture) -> None:
    with open(folder / read, "r+b") as file:
        file.truncate(1 << 33)  # a hole
    tracemalloc.start()
    assert 1 == shira.main(READ[read].split())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"{Path(read).name}: has {1 << 33} bytes; at most" in capsys.readouterr().err
    assert peak < 64 << 20


def test_reading_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        for read in (LocalFile, paths.read_file):
            with pytest.raises(OSError, match="not a regular file") as caught:
                read(path)
            assert str(path) == caught.value.filename
    with pytest.raises(IsADirectoryError):
        paths.read_file(tmp_path)


def test_a_small_file_does_not_fill_the_memory(tmp_path: Path) -> None:
    side = 6000
    matrix = sparse.csr_matrix(np.ones((side, side), np.float32))
    sparse.save_npz(tmp_path / "bomb.npz", matrix, compressed=True)
    assert (tmp_path / "bomb.npz").stat().st_size < 2 << 20
    del matrix
    tracemalloc.start()
    with pytest.raises(
        SourceError, match=r"bomb.npz: a file of \d+ bytes with \d+ bytes of arrays: save it with compressed=False"
    ):
        read_matrix(tmp_path / "bomb.npz", (side, side))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    small = sparse.csr_matrix(np.ones((500, 500), np.float32))
    sparse.save_npz(tmp_path / "small.npz", small, compressed=True)
    assert 250_000 == read_matrix(tmp_path / "small.npz", (500, 500))[0].size


STRANGE = "a\x1b[2Kb\x7fc\x85d\u2028e\u202ef\u200bg\ud800h\U000e0001i é 語"


def test_json_has_no_character_that_moves_a_cursor_or_reorders_a_line(folder: Path, capsys: Capture) -> None:
    description = STRANGE.replace("\ud800", "")
    save(
        Adapter([SparseTensor("w\u202e", (2,), [1], ONE, base=ZERO)], manifest={"description": description}),
        folder / "b.st",
    )
    for command in (
        "inspect b.st --json",
        "measure b.st --json",
        "diff a.st b.st --json",
        "merge b.st -o c.st --json",
    ):
        shira.main(command.split())
        out = capsys.readouterr().out
        assert all(c.isprintable() or c == "\n" for c in out)
        json.loads(out)
    assert 0 == shira.main(["inspect", "b.st", "--json"])
    assert description == json.loads(capsys.readouterr().out)["description"]
    assert 0 == shira.main(["merge", "b.st", "-o", "c.st", "--force", "--report", "r.json"])
    assert all(c.isprintable() or c == "\n" for c in (folder / "r.json").read_text("utf-8"))


@pytest.mark.parametrize("ascii_only", [False, True])
def test_escaped_json_means_the_same(ascii_only: bool) -> None:
    value = {STRANGE: [STRANGE, 1.5, None, {"é": '\\u202e " \n'}]}
    text = json_text(value, ascii_only=ascii_only)
    assert value == json.loads(text)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert ("語" in text) != ascii_only


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Full(io.RawIOBase):
    """A file on a full disk, of which what is in its buffer fails again."""

    write = seek = truncate = full


@pytest.mark.parametrize("step", ["spool", "copy", "flush"])
def test_a_full_disk_is_said_with_the_file(
    step: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    if step == "spool":
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda *_, **__: Full())
    else:
        monkeypatch.setattr(*((shutil, "copyfileobj") if step == "copy" else (os, "fsync")), full)
    assert 1 == shira.main(["merge", "a.st", "-o", "new.st"])
    assert "new.st: No space left on device\n" in capsys.readouterr().err
    assert not (folder / "new.st").exists()


def test_a_full_disk_between_two_passes_is_said_with_the_folder(tmp_path: Path) -> None:
    from shira_format.entries.changes import Entries

    with spool.Spool(tmp_path) as one:
        one._file.close()
        one._file = type("Full", (), {"seek": lambda *_: None, "write": full, "close": lambda _: None})()
        with pytest.raises(OSError, match="No space left") as caught:
            one.put(Entries(np.arange(2), np.ones(2), np.ones(2), np.ones(2), 1.0))
    assert str(tmp_path) == caught.value.filename


def test_an_error_of_reading_names_the_file_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "read").write_bytes(b"12345678")
    file = LocalFile(tmp_path / "read")

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(OSError, match="Input/output error") as caught:
        file.read_into(0, memoryview(bytearray(8)))
    assert str(tmp_path / "read") == caught.value.filename


def test_tensors_are_grouped_in_linear_time() -> None:
    mask = mask_of(SparseTensor("w", (4, 4), [1], value_kind="none"))
    tensors = [
        TensorMeasures(f"layers.{n}.mlp.weight", "other", (4, 4), "F32", mask, None, None) for n in range(20_000)
    ]
    started = time.process_time()
    assert 20_000 == len(layer_grid(tensors).blocks)
    assert time.process_time() - started < 3
