"""``shira-plot`` as people call it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from shira_analysis.figures.records import from_csv
from shira_analysis.measures.adapter import measure
from shira_analysis.measures.deltas import open_deltas
from shira_analysis.measures.pairs import measure_pairs
from shira_cli import plot
from shira_format._core.arrays import array_digest
from shira_format.adapter import Adapter
from shira_format.calibration.moments import Moment, Moments
from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.format import save
from shira_format.tensors import SparseTensor
from tests import models

Capture = pytest.CaptureFixture[str]
NAME = "h.3.mlp.up_proj.weight"


def run(*arguments: str | Path) -> int:
    return plot.main([str(argument) for argument in arguments])


def numbers(path: Path) -> list[dict[str, object]]:
    return from_csv(path.read_text("utf-8"))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two adapters that need their base."""
    random = np.random.default_rng(0)
    base = random.standard_normal((30, 20)).astype(np.float32)
    save_file({NAME: base}, tmp_path / "base.safetensors")
    for name in "ab":
        indices = np.sort(random.choice(600, 60, replace=False))
        values = random.standard_normal(60).astype(np.float32)
        known = array_digest(base.reshape(-1)[indices])
        save(Adapter([SparseTensor(NAME, (30, 20), indices, values, base_digest=known)]), tmp_path / f"{name}.st")
    return tmp_path


def test_mask_needs_no_base(files: Path, capsys: Capture) -> None:
    out = files / "out.png"
    assert 0 == run("mask", files / "a.st", files / "b.st", "-o", out)
    assert ("", f"{out}: drawn; its numbers are in {files / 'out.csv'} (1200 rows)\n") == capsys.readouterr()[::-1]
    assert b"\x89PNG" == out.read_bytes()[:4]
    drawn = numbers(files / "out.csv")
    assert {"a.st": 60, "b.st": 60} == {
        path: sum(r["entries"] for r in drawn if r["adapter"] == path)  # type: ignore[misc]
        for path in {str(r["adapter"]) for r in drawn}
    }
    assert 0 == run("mask", files / "a.st", "-o", out, "--cells", "4", "--force", "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["records"] == numbers(files / "out.csv")
    assert 12 == len(told["records"])


def test_layers_and_spectrum(files: Path) -> None:
    base = ("--base", files / "base.safetensors")
    assert 0 == run("layers", files / "a.st", *base, "-o", files / "l.svg", "--csv", files / "numbers.csv")
    assert (files / "l.svg").read_text("utf-8").startswith("<?xml")
    assert not (files / "l.csv").exists()
    (record,) = numbers(files / "numbers.csv")
    found = measure(files / "a.st", open_checkpoint(files / "base.safetensors"), rank=True)
    assert (NAME, "mlp up", 60, 1) == (
        found.tensors[0].name,
        record["kind"],
        record["entries"],
        record["energy_share"],
    )
    assert "h.3" == record["block"]
    assert 0 == run("spectrum", files / "a.st", *base, "-o", files / "s.png", "--tensor", NAME)
    rank = found.tensors[0].rank
    assert rank is not None
    assert rank.spectrum is not None
    values = rank.spectrum.values[: rank.spectrum.numerical_rank]
    assert values.tolist() == [record["singular_value"] for record in numbers(files / "s.csv")]


def test_pairs(files: Path) -> None:
    adapters = (files / "a.st", files / "b.st")
    base = ("--base", files / "base.safetensors")
    assert 0 == run("overlap", *adapters, "-o", files / "o.png")
    assert 0 == run("orthogonality", *adapters, *base, "-o", files / "w.png")
    opened = open_checkpoint(files / "base.safetensors")
    (pair,) = measure_pairs([open_deltas(path, opened) for path in adapters])
    (overlap,), (product,) = numbers(files / "o.csv"), numbers(files / "w.csv")
    assert (pair.whole.overlap.shared, pair.whole.overlap.jaccard) == (overlap["shared"], overlap["jaccard"])
    assert pair.whole.product is not None
    assert (pair.whole.product.awor, pair.whole.product.awom) == (product["awor"], product["awom"])


def test_pairs_by_choice(files: Path, capsys: Capture) -> None:
    adapters = (files / "a.st", files / "b.st", "--base", files / "base.safetensors")
    Moments([Moment(NAME, np.eye(20)[None, None], 20, 5)]).save(files / "moments.safetensors")
    assert 0 == run("orthogonality", *adapters, "--moments", files / "moments.safetensors", "-o", files / "m.png")
    (product,) = numbers(files / "m.csv")
    assert -1 < product["inputs_cosine"] < 1  # type: ignore[operator]
    assert 0 == run("orthogonality", *adapters, "--transposed", "--include", "up_proj", "-o", files / "t.png")
    (turned,) = numbers(files / "t.csv")
    assert product["awom"] != turned["awom"]
    capsys.readouterr()
    for kind in ("overlap", "orthogonality"):
        assert 1 == run(kind, *adapters, "--exclude", "up_proj", "-o", files / "none.png")
        assert "shira-plot: error: " in capsys.readouterr().err
        assert not (files / "none.png").exists()


def test_a_real_lora(tmp_path: Path, capsys: Capture) -> None:
    base, lora = models.minilm(), models.LORAS / "spam"
    lora_to_shira(lora, base, tmp_path / "a.st", include=["layer.0.attention.self.query"], self_contained=True)
    out = tmp_path / "out.png"
    assert 0 == run("spectrum", tmp_path / "a.st", "--base", base, "--lora", lora, "-o", out)
    assert "note: names of the LoRA" in capsys.readouterr().err
    drawn = numbers(tmp_path / "out.csv")
    assert 8 == sum(record["change"] == "LoRA spam" for record in drawn)
    assert 30 < sum(record["change"] == "a.st" for record in drawn)


def test_dimension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shira_analysis.figures import dimensions

    monkeypatch.setattr(dimensions, "QUICK", (128,))
    assert 0 == run("dimension", "--quick", "--seeds", "2", "-o", tmp_path / "out.png")
    drawn = numbers(tmp_path / "out.csv")
    assert list(dimensions.SERIES) == [record["adapter"] for record in drawn]
    assert {(128, 2)} == {(record["dimension"], record["pairs"]) for record in drawn}


def test_nothing_is_replaced_or_written_half(files: Path, capsys: Capture) -> None:
    (files / "out.csv").write_text("mine")
    before = sorted(files.iterdir())
    assert 1 == run("mask", files / "a.st", "-o", files / "out.png")
    assert f"shira-plot: error: {files / 'out.csv'}: exists; --force replaces it\n" == capsys.readouterr().err
    assert 1 == run("mask", files / "a.st", "-o", files / "new.png", "--csv", files / "new.png")
    assert "two files to write need two names" in capsys.readouterr().err
    assert 1 == run("layers", files / "a.st", "-o", files / "new.png")  # needs the base
    out, err = capsys.readouterr()
    assert ("", 1) == (out, err.count("\n"))
    assert f"{files / 'a.st'}: tensor '{NAME}' holds target values" in err
    assert 1 == run("mask", files / "a.st", "--tensor", "x", "-o", files / "new.png")
    assert f"{files / 'a.st'}: has no sparse tensor 'x'" in capsys.readouterr().err
    assert 1 == run("mask", files / "a.st", "--cells", "0", "-o", files / "new.png")
    assert "a grid of 0 cells: 1 to 512" in capsys.readouterr().err
    assert before == sorted(files.iterdir())
    assert "mine" == (files / "out.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("mask", "a.st", "-o", "out.gif"), "a picture ends in .png or .svg"),
        (("overlap", "a.st", "-o", "out.png"), "two adapters or more"),
        (("spectrum", "a.st", "--lora", "l", "-o", "out.png"), "--lora needs --base"),
        (("dimension", "--seeds", "0", "-o", "out.png"), "not a positive count"),
    ],
)
def test_usage(arguments: tuple[str, ...], reason: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)
    assert reason in capsys.readouterr().err
