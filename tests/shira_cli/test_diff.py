"""``shira-diff`` as people and scripts call it: what differs on stdout, the answer in the exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shira_cli import diff
from shira_format.adapter import Adapter
from shira_format.convert import lora_to_shira
from shira_format.format import save
from shira_format.tensors import DenseTensor, SparseTensor
from tests import models

Capture = pytest.CaptureFixture[str]
BASE = np.arange(12, dtype=np.float32)


def run(*arguments: str | Path) -> int:
    return diff.main([str(argument) for argument in arguments])


def sparse(name: str, at: list[int], values: list[float]) -> SparseTensor:
    return SparseTensor(name, (3, 4), at, np.float32(values), base=BASE[at])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Three adapters: the second differs from the first in content, the third in provenance and order."""
    mine, its = sparse("x.weight", [1, 4, 5], [9, 8, 7]), sparse("x.weight", [4, 5, 6], [8, 6.5, 7])
    equal = sparse("y.weight", [2], [3])
    a = [mine, equal]
    whole = [DenseTensor("b", np.float32([1, 2]))]
    save(Adapter(a, dense=whole, manifest={"license": "mit"}), tmp_path / "a.st")
    save(Adapter([its, equal, sparse("z\u202e.weight", [0], [1])], manifest={"alpha": 0.5, "removed": ["r"]}), tmp_path / "b.st")  # fmt: skip
    save(Adapter(a[::-1], dense=whole, manifest={"license": "apache-2.0"}), tmp_path / "c.st")
    return tmp_path


def test_the_same(files: Path, capsys: Capture) -> None:
    assert 0 == run(files / "a.st", files / "a.st")
    assert ("the same content: 3 tensors\n", "") == capsys.readouterr()
    assert 0 == run(files / "a.st", files / "c.st")
    note, verdict = capsys.readouterr().out.splitlines()
    assert "provenance differs, which does not count as a difference: license" == note
    assert "the same content: 3 tensors" == verdict
    assert 0 == run(files / "a.st", files / "c.st", "--all", "--json")
    told = json.loads(capsys.readouterr().out)
    assert (True, {"license": ["mit", "apache-2.0"]}) == (told["same"], told["provenance"])
    assert ["x.weight", "y.weight", "b"] == [tensor["name"] for tensor in told["tensors"]]
    assert [True] * 3 == [tensor["same"] for tensor in told["tensors"]]
    assert {"tensors": 3, "different": 0, "only_first": 0, "only_second": 0, "equal": 6, "other": 0} == told[
        "totals"
    ]


def test_different(files: Path, capsys: Capture) -> None:
    assert 1 == run(files / "a.st", files / "b.st")
    out, err = capsys.readouterr()
    assert "" == err
    head, *lines = out.splitlines()
    columns = [
        "tensor",
        "differs in",
        "only in A",
        "only in B",
        "equal",
        "other values",
        "largest difference",
        "base",
    ]
    assert " ".join(columns).split() == head.split()
    assert ["x.weight", "entries,", "values", "1", "1", "1", "1", "0.5", "same"] == lines[0].split()
    assert ["z\\u202e.weight", "only", "in", "B", "0", "1", "0", "0"] == lines[1].split()
    assert ["b", "(whole)", "only", "in", "A", "2", "0", "0", "0"] == lines[2].split()
    assert ["all", "3", "2", "2", "1"] == lines[3].split()
    assert [
        "alpha: 1 in A, 0.5 in B",
        "removed by B alone: r",
        "provenance differs, which does not count as a difference: license",
        "different: 3 of 4 tensors",
    ] == lines[4:]
    assert 1 == run(files / "a.st", files / "b.st", "--all")
    (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("y.weight")]
    assert ["y.weight", "nothing", "0", "0", "1", "0", "0", "same"] == line.split()


def test_json_and_filters(files: Path, capsys: Capture) -> None:
    pair = (files / "a.st", files / "b.st")
    assert 1 == run(*pair, "--json", "--include", "weight", "--exclude", "^z", "--exclude", "^r$")
    told = json.loads(capsys.readouterr().out)
    assert [str(path) for path in pair] == told["files"]
    assert ([1.0, 0.5], [[], []], False) == (told["alpha"], told["removed"], told["same"])
    assert [
        {
            "name": "x.weight", "whole": False, "entries": [3, 3], "traits": [], "only_first": 1, "only_second": 1,
            "equal": 1, "other": 1, "largest": 0.5, "same_base": True, "same": False,
        }
    ] == told["tensors"]  # fmt: skip
    assert {"tensors": 2, "different": 1, "only_first": 1, "only_second": 1, "equal": 2, "other": 1} == told[
        "totals"
    ]


def test_a_value_that_json_lacks(files: Path, capsys: Capture) -> None:
    save(Adapter([sparse("x.weight", [1], [np.inf])]), files / "inf.st")
    save(Adapter([sparse("x.weight", [1], [np.nan])]), files / "nan.st")
    assert 1 == run(files / "inf.st", files / "nan.st", "--json")
    (tensor,) = json.loads(capsys.readouterr().out)["tensors"]
    assert (1, None) == (tensor["other"], tensor["largest"])


@pytest.mark.parametrize("more", [(), ("--json",), ("--all",)])
def test_quiet_says_nothing(files: Path, capsys: Capture, more: tuple[str, ...]) -> None:
    assert 0 == run(files / "a.st", files / "c.st", "--quiet", *more)
    assert 1 == run(files / "a.st", files / "b.st", "--quiet", *more)
    assert ("", "") == capsys.readouterr()


def test_trouble_is_2(files: Path, capsys: Capture) -> None:
    data = bytearray((files / "a.st").read_bytes())
    data[-1] ^= 1
    (files / "bad.st").write_bytes(data)
    (files / "text.st").write_text("no adapter")
    for arguments, told in (
        ((files / "a.st", files / "none.st"), f"{files / 'none.st'}: No such file"),
        ((files / "bad.st", files / "a.st"), f"{files / 'bad.st'}: tensor "),
        ((files / "a.st", files / "text.st"), f"{files / 'text.st'}: "),
        ((files / "a.st", files / "a.st", "--include", "("), "not a regular expression: '('"),
        ((files / "a.st", files / "a.st", "--include", "zzz"), "no tensor is left by the choice of names"),
        ((files / "a.st", files, "--quiet"), f"{files}: "),
    ):
        assert 2 == run(*arguments)
        out, err = capsys.readouterr()
        assert ("", 1) == (out, err.count("\n"))
        assert err.startswith(f"shira-diff: error: {told}")
    for wrong in ((), (files / "a.st",), ("a", "b", "c"), ("a", "b", "--sort")):
        with pytest.raises(SystemExit) as stopped:
            run(*wrong)
        assert 2 == stopped.value.code
    capsys.readouterr()


def test_as_a_program(files: Path) -> None:
    """The exit code as a shell sees it, also where the reader goes away."""
    command = [sys.executable, "-m", "shira_cli.diff", str(files / "a.st")]
    codes = [
        subprocess.run([*command, str(files / name)], capture_output=True, check=False).returncode
        for name in ("a.st", "b.st", "none.st")
    ]
    assert [0, 1, 2] == codes


@pytest.mark.skipif(os.name != "posix", reason="pipes that close are POSIX's")
def test_a_reader_that_goes_away_is_trouble(files: Path) -> None:
    command = [sys.executable, "-m", "shira_cli.diff", str(files / "a.st"), str(files / "b.st")]
    read, write = os.pipe()
    os.close(read)
    try:
        ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(write)
    assert (2, b"") == (ended.returncode, ended.stderr)


def test_real_adapters(tmp_path: Path, capsys: Capture) -> None:
    for name in ("spam", "genre"):
        lora_to_shira(models.LORAS / name, models.minilm(), tmp_path / f"{name}.st", include=["layer.0.attention"])
    lora_to_shira(
        models.LORAS / "spam", models.minilm(), tmp_path / "contained.st", include=["layer.0.attention"], self_contained=True
    )  # fmt: skip
    assert 1 == run(tmp_path / "spam.st", tmp_path / "genre.st", "--json")
    told = json.loads(capsys.readouterr().out)
    assert {(True, False, True)} == {
        (t["only_first"] > 0, t["equal"] > 0, t["other"] > 0) for t in told["tensors"]
    }  # fmt: skip
    assert 1 == run(tmp_path / "spam.st", tmp_path / "contained.st")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:5]]
    assert [["base", "values", "0", "0"]] * 4 == [row[1:5] for row in rows]


def test_help_has_an_example(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    out = capsys.readouterr().out
    assert "shira-diff old.st new.st --quiet || echo changed" in out
    assert "1 if it differs, and 2 after an error" in " ".join(out.split())
