"""``shira-verify`` as people call it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shira_analysis import lemmas
from shira_analysis.lemmas.report import Check
from shira_analysis.lemmas.samples import Setting
from shira_analysis.reports.text.lemmas import WIDTH
from shira_cli import demo, verify
from shira_format.adapter import Adapter
from shira_format.errors import ShiraError
from shira_format.format import save
from shira_format.tensors import SparseTensor

Capture = pytest.CaptureFixture[str]


def run(*arguments: str | Path) -> int:
    return verify.main([str(argument) for argument in arguments])


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    paths = []
    for number in range(2):
        values = np.float32([1, -2, 3, 5]) / 8
        places = np.array([0, 7, 9, 15]) + [0, 0, 0, 4 * number]
        tensor = SparseTensor("w\u202e", (5, 4), places, values, value_kind="delta")
        paths.append(tmp_path / f"{number}.st")
        save(Adapter([tensor]), paths[-1])
    return paths


def test_text(adapters: list[Path], capsys: Capture) -> None:
    assert 0 == run("--quick", *adapters)
    out, err = capsys.readouterr()
    assert "" == err
    lines = out.splitlines()
    assert "Sparse High Rank Adapters, the five lemmas by numbers; seed 0, quick; files: 0.st, 1.st" == lines[0]
    assert ["LEMMA 4.1", "LEMMA 4.2", "LEMMA 4.3", "LEMMA 4.4", "LEMMA 4.5"] == [
        line[:9] for line in lines if line.startswith("LEMMA")
    ]
    assert max(map(len, lines)) <= WIDTH
    # The matrices of a counterexample stand side by side.
    at = lines.index("             W = [0]   S1 = [1]   S2 = [ 1]")
    assert "                 [0]        [1]        [-1]" == lines[at + 1]
    assert "BROKEN" not in out
    assert "\u202e" not in out
    assert "w\\u202e with 1.st" in out
    assert 5 == lines[lines.index("SUMMARY") :].__str__().count("all hold")
    assert "found that they do not (interference.md)" in " ".join(lines)


def test_json_and_choice(adapters: list[Path], capsys: Capture) -> None:
    assert 0 == run("--quick", "--json", "--lemma", "4.5", "--lemma", "4.2", "--seed", "7", adapters[0])
    out, err = capsys.readouterr()
    assert "" == err
    report = json.loads(out)
    assert (True, True, 7) == (report["ok"], report["quick"], report["seed"])
    assert ["4.2", "4.5"] == [lemma["lemma"] for lemma in report["lemmas"]]
    for lemma in report["lemmas"]:
        assert all(check["ok"] and check["cases"] for check in lemma["checks"])
        assert any(reading["counterexample"] for reading in lemma["readings"])
        assert lemma["of_files"]
    assert 0 == run("--quick", "--json", "--lemma", "4.5", "--lemma", "4.2", "--seed", "7", adapters[0])
    assert out == capsys.readouterr().out


def test_what_does_not_hold_fails(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Setting) -> lemmas.LemmaReport:
        checks = [Check("  one = two", "=", exact=True), Check("three = three", "=", exact=True)]
        checks[0].add(1, 2, "the first case")
        checks[1].add(3, 3, "the second case")
        return lemmas.LemmaReport("4.5", "title", "printed", "true", "verdict", checks=checks)

    monkeypatch.setitem(lemmas.LEMMAS, "4.5", broken)
    assert 1 == run("--quick", "--lemma", "4.5")
    out, err = capsys.readouterr()
    assert "shira-verify: error: does not hold, lemma 4.5: one = two\n" == err
    assert "BROKEN (1) 1 off by 1 one = two -- worst: the first case" in " ".join(out.split())
    assert 1 == run("--quick", "--lemma", "4.5", "--json")
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_without_files(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise ShiraError("the base model is not installed")

    seen = []
    monkeypatch.setitem(
        lemmas.LEMMAS, "4.5", lambda setting: seen.append(setting) or lemmas.LemmaReport("4.5", "", "", "", "")
    )
    monkeypatch.setattr(verify, "find_base", missing)
    assert 0 == run("--lemma", "4.5")
    assert "note: random adapters only: the base model is not installed\n" == capsys.readouterr().err
    assert 0 == run("--lemma", "4.5", "--quiet")
    assert "" == capsys.readouterr().err
    assert [[], []] == [setting.files for setting in seen]


def test_shipped_loras(capsys: Capture) -> None:
    try:
        demo.find_base()
    except ShiraError:
        pytest.skip("the base model is not installed")
    assert 0 == run("--lemma", "4.4", "--json")
    (lemma,) = json.loads(capsys.readouterr().out)["lemmas"]
    assert all(
        row["what"].startswith("spam.st: encoder.") and row["what"].endswith(" with genre.st")
        for row in lemma["of_files"]
    )
    assert lemma["of_files"]


def test_mistakes(tmp_path: Path, adapters: list[Path], capsys: Capture) -> None:
    for wrong in (("--seed", "-1"), ("--lemma", "4.6")):
        with pytest.raises(SystemExit) as stopped:
            run(*wrong)
        assert 2 == stopped.value.code
    capsys.readouterr()
    assert 1 == run("--quick", tmp_path / "none.st")
    assert f"{tmp_path / 'none.st'}" in capsys.readouterr().err
    adapters[0].write_bytes(adapters[0].read_bytes()[:-3])
    assert 1 == run("--quick", adapters[0])
    assert capsys.readouterr().err.startswith(f"shira-verify: error: {adapters[0]}: ")
