"""``shira-measure`` as people call it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from shira_cli import measure
from shira_format import Adapter, SparseTensor, WholeTensor, save
from shira_format.arrays import digest

Capture = pytest.CaptureFixture[str]
BASE = np.arange(12, dtype=np.float32).reshape(3, 4)
QUERY, UP = "layers.0.self_attn.q_proj.weight", "layers.0.mlp.up_proj.weight"


def run(*arguments: str | Path) -> int:
    return measure.main([str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two adapters, of which the second is not self-contained, and their base."""
    save_file({QUERY: BASE, UP: BASE}, tmp_path / "base.safetensors")
    at, values = [1, 11], np.float32([2, 5])
    own = [SparseTensor(name, (3, 4), at, values, base=np.float32([1, 11])) for name in (QUERY, UP)]
    save(Adapter(own, whole=[WholeTensor("b", np.float32([1]))]), tmp_path / "a.st")
    needy = SparseTensor(QUERY, (3, 4), [1, 6], values, base_digest=digest(np.float32([1, 6])))
    save(Adapter([needy]), tmp_path / "b.st")
    return tmp_path


def test_one_adapter(files: Path, capsys: Capture) -> None:
    assert 0 == run(files / "a.st")
    out, err = capsys.readouterr()
    assert "" == err
    lines = out.splitlines()
    assert (
        f"{files / 'a.st'}: 4 entries of 24 in 2 tensors; 1 tensors are replaced as a whole, and not measured"
        == lines[0]
    )
    assert ["query", "mlp up", "all"] == [line[:8].strip() for line in lines[2:5]]
    assert ["query", "2", "16.67", "%", "6.083", "3.5", "6", "66.67", "%", "50.00", "%"] == lines[2].split()[:11]
    assert "exact rank" not in out


def test_ranks_tensors_and_json(files: Path, capsys: Capture) -> None:
    assert 0 == run(files / "a.st", "--rank", "--tensors", "--include", "mlp")
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith(UP)]
    assert [[UP, "2", "16.67"], [UP, "3", "2"]] == [row[:3] for row in rows]
    assert 0 == run(files / "a.st", "--rank", "--json")
    (found,) = json.loads(capsys.readouterr().out)["adapters"]
    assert [2, 2] == [tensor["rank"]["exact_rank"] for tensor in found["tensors"]]
    assert [{"from": 1.0, "count": 1}, {"from": 4.0, "count": 1}] == found["kinds"]["query"]["norms"]["histogram"]


def test_two_adapters(files: Path, capsys: Capture) -> None:
    assert 0 == run(files / "a.st", files / "b.st", "--base", files / "base.safetensors", "--json")
    found = json.loads(capsys.readouterr().out)
    assert 2 == len(found["adapters"])
    assert 1 == len(found["pairs"])
    assert 0 == run(files / "a.st", files / "b.st", "--base", files / "base.safetensors")
    assert "a.st and " in capsys.readouterr().out


def test_errors(files: Path, capsys: Capture) -> None:
    assert 1 == run(files / "b.st")
    out, err = capsys.readouterr()
    assert "" == out
    assert err.startswith(f"shira-measure: error: {files / 'b.st'}: tensor '{QUERY}' holds target values")
    assert 1 == err.count("\n")
    assert 1 == run(files / "a.st", "--include", "nothing")
    assert "no tensor is left" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(files / "a.st", "--transposed")
    assert "two adapters" in capsys.readouterr().err
