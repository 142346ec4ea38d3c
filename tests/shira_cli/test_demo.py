"""The demo on the real base, short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import shira_format
from shira_analysis.measures import ways
from shira_cli import demo
from tests import models


def test_the_demo_tells_what_survives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--task", "spam", "--density", "0.02", "--cut-only", "--json", "--quiet"]
    assert 0 == demo.main([*options, "--keep", str(tmp_path)])
    (result,) = json.loads(capsys.readouterr().out)
    recorded = json.loads((models.LORAS / "spam" / "metrics.json").read_text())
    # The figures that were recorded when the LoRA was trained; another machine may round one text differently.
    assert recorded["base"] == pytest.approx(result["accuracy_base"], abs=0.01)
    assert recorded["lora"] == pytest.approx(result["accuracy_lora"], abs=0.01)
    (row,) = result["adapters"]
    assert result["accuracy_base"] < row["accuracy"] < result["accuracy_lora"]
    assert 0 < row["effect_kept"] < 0.5 < row["effect_cosine"]
    assert 36 == len(shira_format.load(tmp_path / "spam-cut-0.02.st"))


def test_adapters_are_fitted_and_trained_beside_the_cut_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models.few_held_out_texts(monkeypatch)
    monkeypatch.setattr(ways, "EPOCHS", 0.1)
    monkeypatch.setattr(ways, "STEPS", 4)
    monkeypatch.setattr(ways, "TOKENS", 16)
    assert 0 == demo.main(["--task", "genre", "--density", "0.01", "--quiet", "--keep", str(tmp_path)])
    out = capsys.readouterr().out
    for row in ("LoRA cut to 1 %", "LoRA fitted at 1 %", "trained sparse at 0.867 %"):
        assert row in out
    assert "classifier.weight" in shira_format.load(tmp_path / "genre-trained-0.01.st").dense
    cut, fitted = (shira_format.load(tmp_path / f"genre-{way}-0.01.st") for way in ("cut", "fitted"))
    assert sum(one.nnz for one in cut.values()) == sum(one.nnz for one in fitted.values())
    assert cut != fitted


def test_a_density_out_of_range(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(["--density", "2"])
    assert 2 == caught.value.code
    assert "not in (0, 1]" in capsys.readouterr().err
