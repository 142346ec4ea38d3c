"""``shira-measure`` as people call it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shira_cli import measure
from shira_format._core.arrays import array_digest
from shira_format.adapter import Adapter
from shira_format.convert import lora_to_shira
from shira_format.format import save
from shira_format.tensors import DenseTensor, SparseTensor
from tests import models

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
    save(Adapter(own, dense=[DenseTensor("b", np.float32([1]))]), tmp_path / "a.st")
    needy = SparseTensor(QUERY, (3, 4), [1, 6], values, base_digest=array_digest(np.float32([1, 6])))
    save(Adapter([needy]), tmp_path / "b.st")
    return tmp_path


def test_one_adapter(files: Path, capsys: Capture) -> None:
    assert 0 == run(files / "a.st")
    out, err = capsys.readouterr()
    assert "" == err
    lines = out.splitlines()
    assert (
        f"{files / 'a.st'}: 4 entries of 24 in 2 tensors; 1 tensor is replaced as a whole, and not measured"
        == lines[0]
    )
    assert ["query", "mlp up", "all"] == [line[:8].strip() for line in lines[2:5]]
    row = ["query", "2", "16.67", "%", "6.083", "50.00", "%", "3.5", "6", "66.67", "%", "50.00", "%"]
    assert row == lines[2].split()[:13]
    assert "exact rank" not in out


def test_ranks_tensors_and_json(files: Path, capsys: Capture) -> None:
    assert 0 == run(files / "a.st", "--ranks", "--tensors", "--include", "mlp")
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith(UP)]
    assert [[UP, "2", "16.67"], [UP, "3", "2"]] == [row[:3] for row in rows]
    assert 0 == run(files / "a.st", "--ranks", "--json")
    (found,) = json.loads(capsys.readouterr().out)["adapters"]
    assert [2, 2] == [tensor["rank"]["exact_rank"] for tensor in found["tensors"]]
    assert [{"from": 1.0, "count": 1}, {"from": 4.0, "count": 1}] == found["kinds"]["query"]["norms"]["histogram"]


def test_histogram(tmp_path: Path, capsys: Capture) -> None:
    deltas = np.float32([0, 1, -1.5, 1, 1, 8])
    save(Adapter([SparseTensor("w", (3, 4), range(6), deltas, value_kind="delta")]), tmp_path / "a.st")
    assert 0 == run(tmp_path / "a.st", "--histogram")
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("|delta| from  entries    share")
    bar = "#" * 40
    assert [
        "0                   1  16.67 %",
        f"2^0 = 1             4  66.67 %  {bar}",
        f"2^3 = 8             1  16.67 %  {bar[:10]}",
    ] == lines[at + 1 : at + 4]


def test_spectrum(files: Path, capsys: Capture) -> None:
    assert 0 == run(files / "a.st", "--spectrum", "--include", "mlp")
    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if "99 %" in line and "50 %" in line)
    # Two entries, in rows and columns of their own: their magnitudes are the singular values, 36 and 1 the squares.
    assert [UP, "6", "1", "1", "1", "1", "1", "2"] == lines[at + 1].split()
    assert 0 == run(files / "a.st", "--spectrum", "--json")
    (found,) = json.loads(capsys.readouterr().out)["adapters"]
    assert [[6, 1]] * 2 == [pytest.approx(tensor["rank"]["singular_values"]) for tensor in found["tensors"]]
    assert 0 == run(files / "a.st", "--ranks", "--json")
    assert "singular_values" not in capsys.readouterr().out


def test_lora_beside_it(tmp_path: Path, capsys: Capture) -> None:
    base, lora = models.minilm(), models.LORAS / "spam"
    lora_to_shira(lora, base, tmp_path / "a.st", density=0.01)
    arguments = (tmp_path / "a.st", "--base", base, "--lora", lora, "--include", r"layer\.0.*(query|key)")
    assert 0 == run(*arguments, "--json", "--spectrum", "--quiet")
    told = json.loads(capsys.readouterr().out)
    (found,) = told["loras"]
    assert [tensor["name"] for tensor in told["adapters"][0]["tensors"]] == sorted(
        tensor["name"] for tensor in found["tensors"]
    )
    factors = load_file(lora / "adapter_model.safetensors")
    scale = json.loads((lora / "adapter_config.json").read_text())["lora_alpha"] / 8
    squares = 0.0
    for tensor in found["tensors"]:
        module = f"base_model.model.bert.{tensor['name'].removesuffix('.weight')}"
        down, up = (factors[f"{module}.lora_{part}.weight"].astype(np.float64) for part in "AB")
        dense = scale * up @ down
        assert np.linalg.norm(dense) == pytest.approx(tensor["frobenius"])
        expected = np.linalg.svd(dense, compute_uv=False)[:8]
        np.testing.assert_allclose(tensor["rank"]["singular_values"], expected, rtol=1e-6)
        assert [8, 384] == [tensor["rank"]["exact_rank"], tensor["rank"]["full_rank"]]
        squares += float(np.sum(dense**2))
    assert np.sqrt(squares) == pytest.approx(found["total"]["frobenius"])
    assert {"query", "key"} == set(found["kinds"])
    assert 0 == run(*arguments, "--tensors")
    out, err = capsys.readouterr()
    assert f"{lora}: LoRA, updates of 2 tensors" in out
    assert "note: names of the LoRA" in err
    assert 2 == out.count("exact rank  numerical")  # of the LoRA and of the adapter
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "a.st", "--lora", lora)
    assert "--lora needs --base" in capsys.readouterr().err
    assert 1 == run(*arguments[:-1], "classifier")
    assert f"{lora}: no update is left" in capsys.readouterr().err


def test_whole_tensors_of_both_are_told(files: Path, capsys: Capture) -> None:
    at, one = [1, 11], np.float32([1, 1])
    other = SparseTensor("b", (2, 6), at, one, value_kind="delta")
    save(Adapter([other, SparseTensor(UP, (3, 4), at, one, value_kind="delta")]), files / "c.st")
    assert 0 == run(files / "a.st", files / "c.st")
    assert "not both at once, since one replaces them whole: b\n" in capsys.readouterr().out
    assert 0 == run(files / "a.st", files / "c.st", "--json")
    (pair,) = json.loads(capsys.readouterr().out)["pairs"]
    assert ["b"] == pair["replaced"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory")
def test_wide_weights_take_little_memory(tmp_path: Path) -> None:
    for seed in (1, 2):
        places = np.unique(np.random.default_rng(seed).integers(0, 1 << 32, 50))
        deltas = np.ones(places.size, np.float32)
        save(
            Adapter([SparseTensor("w", (4, 1 << 30), places, deltas, value_kind="delta")]), tmp_path / f"{seed}.st"
        )
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)); "
        "from shira_cli.measure import main; sys.exit(main(sys.argv[1:]))"
    )
    files = [str(tmp_path / f"{seed}.st") for seed in (1, 2)]
    options = ["--ranks", "--transposed", "--spectral", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *files, *options], capture_output=True, text=True, check=True
    )
    (pair,) = json.loads(done.stdout)["pairs"]
    assert 1 << 60 == pair["whole"]["product"]["cells"]
    assert 0 < pair["whole"]["product"]["reached"] <= 2500


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
