"""``shira-convert shira_to_csr`` and ``csr_to_shira`` as people call them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy import sparse

from shira_cli import convert
from shira_format._core.arrays import array_digest
from shira_format.adapter import Adapter
from shira_format.format import load, save
from shira_format.tensors import DenseTensor, SparseTensor

Capture = pytest.CaptureFixture[str]
BASE = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter with two sparse tensors and a whole one, and its base beside it."""
    save_file({"w": BASE, "v": BASE}, tmp_path / "base.safetensors")
    seen = array_digest(np.float32([1, 11]))
    tensors = [SparseTensor(n, (3, 4), [1, 11], np.float32([2, 5]), base_digest=seen) for n in ("w", "v")]
    save(Adapter(tensors, dense=[DenseTensor("b", np.float32([1]))]), tmp_path / "a.st")
    return tmp_path / "a.st"


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run(*arguments: str | Path) -> int:
    return convert.main([str(argument) for argument in arguments])


def test_there_and_back(adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    base, folder, again = tmp_path / "base.safetensors", tmp_path / "csr", tmp_path / "b.st"
    assert 0 == run("shira_to_csr", adapter, "--base", base, "-o", folder)
    out, err = capsys.readouterr()
    assert "" == err
    assert ["w", "3x4", "2", "delta", "w.npz"] == out.splitlines()[1].split()
    assert "stored whole: 1 tensors" == out.splitlines()[-2]
    assert out.splitlines()[-1].startswith(f"{folder}: ")
    assert [1, -6] == sparse.load_npz(folder / "w.npz").data.tolist()
    assert 0 == run("csr_to_shira", folder, "-o", again)
    out, err = capsys.readouterr()
    assert "" == err
    assert ["w", "3x4", "2", "target", "as", "it", "was"] == out.splitlines()[1].split()
    assert adapter.read_bytes() == again.read_bytes()
    assert 0 == run("csr_to_shira", folder, "-o", again, "--force", "--base", base, "--self-contained", "--quiet")
    assert [1, 11] == load(again)["w"].base.tolist()


def test_changes_are_told(adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "csr"
    assert 0 == run("shira_to_csr", adapter, "--base", tmp_path / "base.safetensors", "-o", folder, "--quiet")
    sparse.save_npz(folder / "w.npz", sparse.load_npz(folder / "w.npz") * 2)
    capsys.readouterr()
    assert 0 == run("csr_to_shira", folder, "-o", tmp_path / "b.st")
    out, err = capsys.readouterr()
    assert ["w", "3x4", "2", "delta", "changed"] == out.splitlines()[1].split()
    assert err.startswith("note: 1 changed tensors, 'w' for example, hold deltas")
    assert 0 == run("csr_to_shira", folder, "-o", tmp_path / "c.st", "--quiet")
    assert "" == capsys.readouterr().err


def test_json_and_filters(adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "csr"
    options = ("--values", "target", "--include", "w|b", "--exclude", "b", "--json")
    assert 0 == run("shira_to_csr", adapter, "-o", folder, *options)
    report = json.loads(capsys.readouterr().out)
    item = {"name": "w", "file": "w.npz", "shape": [3, 4], "dtype": "F32", "nnz": 2, "values": "target"}
    assert ([item], [], str(folder)) == (report["tensors"], report["whole"], report["output"])
    assert sum(path.stat().st_size for path in folder.iterdir()) == report["folder_bytes"]
    assert 0 == run("csr_to_shira", folder, "-o", tmp_path / "b.st", "--json", "--include", "w")
    report = json.loads(capsys.readouterr().out)
    del item["file"]
    assert [item | {"changed": False}] == report["tensors"]
    assert (tmp_path / "b.st").stat().st_size == report["file_bytes"]


def test_a_dry_run_writes_nothing(adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    before = listing(tmp_path)
    assert 0 == run("shira_to_csr", adapter, "-o", tmp_path / "no" / "csr", "--values", "target", "--dry-run")
    assert "dry run: nothing was written" == capsys.readouterr().out.splitlines()[-1]
    assert before == listing(tmp_path)
    assert 0 == run("shira_to_csr", adapter, "-o", tmp_path / "csr", "--values", "target", "--quiet")
    capsys.readouterr()
    assert 0 == run("csr_to_shira", tmp_path / "csr", "-o", tmp_path / "no" / "b.st", "--dry-run", "--json")
    assert json.loads(capsys.readouterr().out)["output"] is None
    assert sorted([*before, "csr"]) == listing(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("shira_to_csr", "a.st", "-o", "new"), "a.st: tensor 'w': holds target values without those of the base: pass --base for deltas, or take --values target"),
        (("shira_to_csr", "a.st", "-o", "there", "--values", "target"), "there: exists; --force replaces it"),
        (("shira_to_csr", "a.st", "-o", "there", "--values", "target", "--force"), "there: not a folder that shira_to_csr wrote, and so not replaced (there: not a folder of shira_to_csr: it has no index.json)"),
        (("shira_to_csr", "a.st", "-o", "no/new", "--values", "target"), "no/new: the folder no does not exist"),
        (("shira_to_csr", "a.st", "-o", ".", "--values", "target", "--force"), None),
        (("shira_to_csr", "a.st", "-o", "new", "--values", "target", "--include", "("), None),
        (("shira_to_csr", "none.st", "-o", "new"), "none.st: No such file or directory"),
        (("csr_to_shira", "there", "-o", "b.st"), "there: not a folder of shira_to_csr: it has no index.json"),
        (("csr_to_shira", "none", "-o", "b.st"), "none: no such folder"),
        (("csr_to_shira", "there", "-o", "a.st"), "a.st: exists; --force replaces it"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_write_nothing(
    arguments: tuple[str, ...], reason: str | None, adapter: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert 1 == run(*arguments)
    out, err = capsys.readouterr()
    assert ("", 1) == (out, err.count("\n"))
    if reason is not None:
        assert f"shira-convert: error: {reason}\n" == err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_force_replaces_an_export(adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    options = ("-o", tmp_path / "csr", "--values", "target", "--quiet")
    assert 0 == run("shira_to_csr", adapter, *options, "--include", "w")
    assert 0 == run("shira_to_csr", adapter, *options, "--force", "--include", "v")
    assert ["index.json", "original.st", "v.npz"] == listing(tmp_path / "csr")
