"""``shira-convert peft_to_shira`` and ``shira_to_peft`` as people call them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shira_cli import convert
from shira_format.adapter import Adapter
from shira_format.format import load, save
from shira_format.tensors import DenseTensor, SparseTensor

Capture = pytest.CaptureFixture[str]
BASE = np.arange(1, 31, dtype=np.float32).reshape(5, 6)
PAIRS = np.array([[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4], [1, 5, 0, 2, 3, 4, 0, 5, 1, 2, 3]], np.int32)
KEY = "base_model.model.a.shira_"


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    """PEFT's files of one layer of a module ``a``, and a saved module ``b``; their base beside them."""
    save_file({"a.weight": BASE, "b.bias": np.float32([1, 2])}, tmp_path / "base.safetensors")
    folder = tmp_path / "peft"
    folder.mkdir()
    values = np.linspace(0, 1, 11, dtype=np.float32)
    found = {f"{KEY}indices": PAIRS, f"{KEY}weight": values, "base_model.model.b.bias": np.float32([3, 4])}
    save_file(found, folder / "adapter_model.safetensors")
    config = {"peft_type": "SHIRA", "r": 1, "modules_to_save": ["b"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def run(*arguments: str | Path) -> int:
    return convert.main([str(argument) for argument in arguments])


def test_there_and_back(peft: Path, tmp_path: Path, capsys: Capture) -> None:
    base, file, again = tmp_path / "base.safetensors", tmp_path / "a.st", tmp_path / "again"
    assert 0 == run("peft_to_shira", peft, "--base", base, "--values", "delta", "-o", file)
    out, err = capsys.readouterr()
    assert "" == err
    assert ["a.weight", "5x6", "11", "36.67", "%", "100.0%", "0.000"] == out.splitlines()[1].split()
    assert "stored whole: b.bias" in out
    assert 0 == run("shira_to_peft", file, "--base", base, "-o", again)
    out, err = capsys.readouterr()
    assert "" == err
    assert ["a", "5x6", "11", "0", "0"] == out.splitlines()[1].split()
    assert ["r = 1", "saved whole: b"] == out.splitlines()[2:4]
    assert out.splitlines()[4].startswith(f"{again}: ")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (peft, again))
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)


def test_targets_and_padding(peft: Path, tmp_path: Path, capsys: Capture) -> None:
    base, file, again = tmp_path / "base.safetensors", tmp_path / "a.st", tmp_path / "again"
    assert 0 == run("peft_to_shira", peft, "--base", base, "--self-contained", "-o", file)
    assert "note: 1 of 11 entries do not change the base's values" in capsys.readouterr().err
    assert 10 == load(file)["a.weight"].nnz
    assert 1 == run("shira_to_peft", file, "-o", again)
    out, err = capsys.readouterr()
    assert "" == out
    assert 1 == err.count("\n")
    assert "--pad fills them up with zeros, to r = 1" in err
    assert not again.exists()
    assert 0 == run("shira_to_peft", file, "-o", again, "--pad", "--prefix", "model.", "--json")
    out, err = capsys.readouterr()
    report = json.loads(out)
    layer = {"name": "a.weight", "module": "model.a", "shape": [5, 6], "nnz": 11, "zeros": 1, "inexact": 0}
    assert ([layer], ["model.b"], 1) == (report["tensors"], report["modules_to_save"], report["rank"])
    assert sum(path.stat().st_size for path in again.iterdir()) == report["folder_bytes"]
    assert "note: --pad added 1 zeros to 10 entries, 12 bytes, for r = 1" in err
    assert "base_model.model.model.a.shira_indices" in load_file(again / "adapter_model.safetensors")
    assert 0 == run("shira_to_peft", file, "-o", again, "--pad", "--force", "--quiet", "--exclude", "b")
    assert "" == capsys.readouterr().err
    assert "base_model.model.b.bias" not in load_file(again / "adapter_model.safetensors")


def test_dry_runs(peft: Path, tmp_path: Path, capsys: Capture) -> None:
    base, file, again = tmp_path / "base.safetensors", tmp_path / "a.st", tmp_path / "again"
    assert 0 == run("peft_to_shira", peft, "--base", base, "-o", file, "--dry-run")
    assert capsys.readouterr().out.endswith("dry run: nothing was written\n")
    assert not file.exists()
    assert 0 == run("peft_to_shira", peft, "--base", base, "-o", file, "--quiet")
    capsys.readouterr()
    assert 0 == run("shira_to_peft", file, "--base", base, "-o", again, "--pad", "--dry-run", "--json")
    report = json.loads(capsys.readouterr().out)
    assert (None, None) == (report["output"], report["folder_bytes"])
    assert not again.exists()


def test_what_exists_stays(peft: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    base, file = tmp_path / "base.safetensors", tmp_path / "a.st"
    assert 0 == run("peft_to_shira", peft, "--base", base, "--self-contained", "--values", "delta", "-o", file)
    assert 1 == run("peft_to_shira", peft, "--base", base, "-o", file)
    assert "a.st: exists; --force replaces it" in capsys.readouterr().err
    assert 0 == run("peft_to_shira", peft, "--base", base, "--values", "delta", "-o", file, "--force")
    assert 1 == run("shira_to_peft", file, "-o", peft)
    assert "peft: exists; --force replaces it" in capsys.readouterr().err
    assert 1 == run("shira_to_peft", file, "-o", tmp_path, "--force")
    assert "is not replaced" in capsys.readouterr().err
    assert 1 == run("shira_to_peft", file, "-o", tmp_path / "none" / "out")
    assert "does not exist" in capsys.readouterr().err
    monkeypatch.chdir(peft)
    assert 1 == run("shira_to_peft", file, "-o", peft, "--force")
    assert "is not replaced" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    (peft / "README.md").write_text("mine")
    assert 1 == run("shira_to_peft", file, "-o", peft, "--force")
    assert "holds 'README.md', which shira_to_peft did not write" in capsys.readouterr().err
    (peft / "README.md").unlink()
    assert 0 == run("shira_to_peft", file, "-o", peft, "--force", "--quiet")


def test_bad_input_is_one_line(peft: Path, tmp_path: Path, capsys: Capture) -> None:
    (peft / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    assert 1 == run("peft_to_shira", peft, "--base", tmp_path / "base.safetensors", "-o", tmp_path / "a.st")
    out, err = capsys.readouterr()
    assert ("", 1) == (out, err.count("\n"))
    assert err.startswith("shira-convert: error: ")
    assert "peft_type is 'LORA'" in err
    assert not (tmp_path / "a.st").exists()


def test_what_is_not_known_is_said(tmp_path: Path, capsys: Capture) -> None:
    indices = np.arange(0, 22, 2)
    deltas = SparseTensor("a.weight", (5, 6), indices, np.ones(11, np.float32), value_kind="delta")
    whole = [DenseTensor("h.bias", np.float32([1]))]
    save(Adapter([deltas], dense=whole, manifest={"alpha": 0.5}), tmp_path / "a.st")
    assert 0 == run("shira_to_peft", tmp_path / "a.st", "-o", tmp_path / "out")
    out, err = capsys.readouterr()
    assert ["a", "5x6", "11", "0", "unknown"] == out.splitlines()[1].split()
    assert "note: h: PEFT needs all tensors of a saved module" in err
    assert "note: the adapter's strength 0.5 is worked into the deltas" in err
    assert [0.5] * 11 == load_file(tmp_path / "out" / "adapter_model.safetensors")[f"{KEY}weight"].tolist()


@pytest.mark.parametrize("command", ["peft_to_shira", "shira_to_peft"])
def test_help_has_an_example(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        run(command, "--help")
    assert f"example:\n  shira-convert {command} " in capsys.readouterr().out
