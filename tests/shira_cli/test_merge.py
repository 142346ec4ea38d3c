"""``shira-merge`` as people call it: adapters in, one adapter out, and nothing written by mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shira_cli import convert, merge
from shira_cli.merge import ALGEBRA
from shira_format._core.arrays import array_digest
from shira_format.adapter import Adapter
from shira_format.convert import lora_to_shira
from shira_format.format import load, save
from shira_format.live import apply
from shira_format.merging import METHODS
from shira_format.merging import merge as merge_files
from shira_format.merging.diff import diff
from shira_format.tensors import DenseTensor, SparseTensor
from tests import models

Capture = pytest.CaptureFixture[str]
POSIX = os.name == "posix"
X, Y = "h.0.x.weight", "h.1.y.weight"
BASE = {X: np.arange(12, dtype=np.float32).reshape(3, 4), Y: np.ones((3, 4), np.float32)}


def run(*arguments: str | Path | float) -> int:
    return merge.main([str(argument) for argument in arguments])


def sparse(name: str, at: list[int], deltas: list[float], *, known: bool = True) -> SparseTensor:
    base = BASE[name].reshape(-1)[at]
    more: dict[str, Any] = {"base": base} if known else {"base_digest": array_digest(base)}
    return SparseTensor(name, (3, 4), at, base + np.float32(deltas), **more)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two self-contained adapters, one that needs the base, and the base."""
    folder = tmp_path / "work"
    folder.mkdir()
    save_file(BASE, folder / "base.safetensors")
    save(Adapter([sparse(X, [1, 4, 5], [1, 2, 3]), sparse(Y, [0], [4])]), folder / "a.st")
    save(Adapter([sparse(X, [4, 6], [4, -8])]), folder / "b.st")
    save(Adapter([sparse(X, [4, 6], [4, -8], known=False)]), folder / "needy.st")
    return folder


def listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in listed(folder) if path.is_file()}


def deltas(path: Path, name: str = X) -> dict[int, float]:
    tensor = load(path)[name]
    return dict(zip(tensor.indices.tolist(), tensor.delta().tolist(), strict=True))


def test_the_table(files: Path, capsys: Capture) -> None:
    out = files / "ab.st"
    assert 0 == run(files / "a.st", files / "b.st", "-o", out, "--weights", "0.5,2")
    text, err = capsys.readouterr()
    assert "" == err
    head, x, y, total, size = text.splitlines()
    assert ["tensor", "a.st", "b.st", "shared", "result", "density"] == head.split()
    assert [X, "3", "2", "1", "4", "33.33", "%"] == x.split()
    assert [Y, "1", "0", "0", "1", "8.33", "%"] == y.split()
    assert ["all", "4", "2", "1", "5", "20.83", "%"] == total.split()
    assert f"{out}: {out.stat().st_size / 1000:.2f} kB" == size
    assert {1: 0.5, 4: 9.0, 5: 1.5, 6: -16.0} == deltas(out)
    assert {0: 2.0} == deltas(out, Y)


def test_json(files: Path, capsys: Capture) -> None:
    out = files / "ab.st"
    assert 0 == run(files / "a.st", files / "b.st", "-o", out, "--weights=-1,1", "--json", "--max-density", "0.25")
    told = json.loads(capsys.readouterr().out)
    assert (str(out), None, "linear", [-1.0, 1.0]) == (
        told["output"], told["report"], told["method"], told["weights"],
    )  # fmt: skip
    assert [str(files / "a.st"), str(files / "b.st")] == told["inputs"]
    # Of X: -1, -2 + 4, -3, -8, of which the first is lost.
    first = told["tensors"][0]
    assert {"name": X, "shape": [3, 4], "inputs": [3, 2], "shared": 1, "nnz": 3, "numel": 12, "density": 0.25} == {
        key: value for key, value in first.items() if key != "energy_kept"
    }
    assert pytest.approx(77 / 78) == first["energy_kept"]
    totals = told["totals"]
    assert {
        "tensors": 2, "inputs": [4, 2], "shared": 1, "nnz": 4, "numel": 24, "density": 4 / 24, "whole_tensors": 0,
        "file_bytes": out.stat().st_size,
    } == {key: value for key, value in totals.items() if key != "energy_kept"}  # fmt: skip
    assert pytest.approx(93 / 94) == totals["energy_kept"]
    assert ([], []) == (told["whole"], told["notices"])


def test_energy_lost(files: Path, capsys: Capture) -> None:
    assert 0 == run(files / "a.st", files / "b.st", "--dry-run", "--max-density", 0.1, "--include", "x")
    head, x, total, verdict = capsys.readouterr().out.splitlines()
    assert head.endswith("energy lost")  # 1, 6, 3, -8: what is left is 64 of 110
    assert ["1", "8.33", "%", "41.82", "%"] == x.split()[-5:] == total.split()[-5:]
    assert "dry run: nothing was written" == verdict


def test_options_and_layers_mean_the_same_as_in_python(files: Path) -> None:
    pair = [files / "a.st", files / "b.st"]
    for number, (words, meant) in enumerate(
        [
            (["--option", "normalize=yes"], {"options": {"normalize": True}}),
            (["--method", "overwrite", "--option", "priority=first"], {"method": "overwrite", "options": {"priority": "first"}}),
            (["--layer", "(?:x)\\.w:normalize=true"], {"layers": [("(?:x)\\.w", {"normalize": True})]}),
            (["--layer", "^h.0:weights=0.25,0", "--layer", "1:weights=-2,1"], {"layers": [("^h.0", {"weights": [0.25, 0]}), ("1", {"weights": [-2, 1]})]}),
            (["--layer", ":normalize=no"], {"layers": [("", {"normalize": False})]}),
            (["--exclude", "y", "--include", "h"], {"include": ["h"], "exclude": ["y"]}),
            (["--no-self-contained"], {"self_contained": False}),
            (["--threads", "1"], {}),
            (["--method", "ties", "--option", "density=0.5,0.25"], {"method": "ties", "options": {"density": [0.5, 0.25]}}),
            (["--method", "ties", "--layer", "x:density=0.5,0.25"], {"method": "ties", "layers": [("x", {"density": (0.5, 0.25)})]}),
            (["--method", "mean", "--weights", "1,3"], {"method": "mean", "weights": [1, 3]}),
        ]
    ):  # fmt: skip
        out, expected = files / f"{number}.st", files / f"{number}.expected.st"
        assert 0 == run(*pair, "-o", out, *words)
        merge_files(pair, expected, **meant)
        assert expected.read_bytes() == out.read_bytes(), words  # the manifest, which says the options, as well
    assert {0.25, 0.5, 0.75} == set(deltas(files / "3.st").values())
    assert {"x": 3, "y": 1} == {name[4]: tensor.nnz for name, tensor in load(files / "3.st").items()}


def test_the_base(files: Path, capsys: Capture) -> None:
    out = files / "ab.st"
    pair = (files / "a.st", files / "needy.st")
    before = listed(files)
    assert 1 == run(*pair, "-o", out)
    assert one_line(capsys).startswith(
        f"shira-merge: error: {files / 'needy.st'}: tensor '{X}': the base's values"
    )
    assert before == listed(files)
    base = ("--base", files / "base.safetensors")
    assert 0 == run(*pair, "-o", out, *base)
    assert load(out)[X].base is None
    assert 0 == run(*pair, "-o", out, *base, "--self-contained", "--force")
    assert {1: 1, 4: 6, 5: 3, 6: -8} == deltas(out)
    save_file({name: array + 1 for name, array in BASE.items()}, files / "other.safetensors")
    assert 1 == run(*pair, "-o", out, "--base", files / "other.safetensors", "--force")
    assert "holds other values" in capsys.readouterr().err
    assert {1: 1, 4: 6, 5: 3, 6: -8} == deltas(out)


def test_one_adapter_alone(files: Path) -> None:
    assert 0 == run(files / "a.st", "-o", files / "half.st", "--weights", "0.5", "--quiet")
    assert {1: 0.5, 4: 1.0, 5: 1.5} == deltas(files / "half.st")
    assert 0 == run(files / "a.st", "-o", files / "same.st", "--quiet")
    assert diff(files / "a.st", files / "same.st").same


def test_notes_and_whole_tensors(files: Path, capsys: Capture) -> None:
    for name, license_ in (("a", "mit"), ("b", "apache-2.0")):
        one = load(files / f"{name}.st")
        whole = [DenseTensor("b\u202e", np.float32([1]))]
        save(Adapter(dict(one), dense=whole, manifest={"license": license_}), files / f"{name}2.st")
    arguments = (files / "a2.st", files / "b2.st", "-o", files / "ab.st", "--force")
    assert 0 == run(*arguments)
    out, err = capsys.readouterr()
    assert "stored whole: b\\u202e" in out.splitlines()
    assert err == "note: the adapters' licences differ (apache-2.0, mit): the result has none\n"
    assert 0 == run(*arguments, "--quiet", "--json")
    out, err = capsys.readouterr()
    assert "" == err
    told = json.loads(out)
    assert (["b\u202e"], 1, 1) == (told["whole"], told["totals"]["whole_tensors"], len(told["notices"]))


def test_equal_names_are_told_apart(files: Path, capsys: Capture) -> None:
    (files / "more").mkdir()
    other = files / "more" / "a.st"
    other.write_bytes((files / "b.st").read_bytes())
    assert 0 == run(files / "a.st", other, "--dry-run")
    assert ["tensor", str(files / "a.st"), str(other)] == capsys.readouterr().out.split()[:3]


# --- real adapters ---


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LoRAs that ship here, as adapters of MiniLM's first layer."""
    folder = tmp_path_factory.mktemp("real")
    for name in ("spam", "genre"):
        lora_to_shira(
            models.LORAS / name, models.minilm(), folder / f"{name}.st", include=[r"layer\.0\."], self_contained=True
        )  # fmt: skip
    return folder


def test_a_merge_of_real_adapters_applied(real: Path, tmp_path: Path) -> None:
    out, full = tmp_path / "ab.st", tmp_path / "full"
    assert 0 == run(real / "spam.st", real / "genre.st", "-o", out, "--weights", "0.7,0.3", "--quiet")
    base = load_file(models.minilm() / "model.safetensors")
    expected = {name: array.copy() for name, array in base.items()}
    spam, genre = load(real / "spam.st"), load(real / "genre.st")
    for name in spam:
        wide = base[name].astype(np.float64).reshape(-1)
        for weight, tensor in ((0.7, spam[name]), (0.3, genre[name])):
            wide[tensor.indices] += weight * (tensor.values.astype(np.float64) - tensor.base)
        expected[name] = wide.astype(np.float32).reshape(base[name].shape)
    live = {name: array.copy() for name, array in base.items()}
    apply(load(out), live)
    assert 6 == len(spam)
    for name, array in live.items():
        np.testing.assert_allclose(array, expected[name], rtol=2e-7, atol=1e-9, err_msg=name)
        assert (name in spam) == (not np.array_equal(array, base[name]))
    assert 0 == convert.main(
        ["shira_to_full", str(out), "--base", str(models.minilm()), "-o", str(full), "--quiet"]
    )
    written = models.read_arrays(full)
    assert {name: array.tobytes() for name, array in live.items()} == {
        name: data for name, (_, _, data) in written.items() if name in live
    }


def test_disjoint_real_adapters(real: Path, tmp_path: Path) -> None:
    out = tmp_path / "ab.st"
    assert 0 == run(real / "spam.st", real / "genre.st", "-o", out, "--method", "disjoint", "--quiet")
    found = diff(real / "spam.st", out).tensors
    assert all(tensor.other == 0 < tensor.equal for tensor in found)


# --- the report ---


def test_check_prints_the_report_and_writes_nothing(files: Path, capsys: Capture) -> None:
    before = listed(files)
    assert 0 == run(files / "a.st", files / "b.st", "--check")
    out, err = capsys.readouterr()
    assert "" == err
    assert X in out
    assert 0 == run(files / "a.st", files / "b.st", "-o", files / "ab.st", "--check", "--json")
    assert X in json.dumps(json.loads(capsys.readouterr().out))
    assert before == listed(files)


def test_reports_in_files(files: Path, capsys: Capture) -> None:
    page, numbers = files / "ab.html", files / "AB.JSON"
    pair = (files / "a.st", files / "b.st")
    assert 0 == run(*pair, "--check", "--report", page)
    assert page.read_text("utf-8").lower().startswith("<!doctype html")
    assert 0 == run(*pair, "-o", files / "ab.st", "--report", numbers, "--json")
    capsys.readouterr()
    assert 0 == run(*pair, "--check", "--json")
    assert json.loads(numbers.read_text("utf-8")) == json.loads(capsys.readouterr().out)
    before = contents(files)
    assert 1 == run(*pair, "-o", files / "new.st", "--report", page)
    assert f"shira-merge: error: {page}: exists; --force replaces it\n" == one_line(capsys)
    assert 0 == run(*pair, "-o", files / "new.st", "--report", files / "new.html", "--dry-run")
    assert before == contents(files)
    page.write_text("old")
    assert 0 == run(*pair, "-o", files / "ab.st", "--report", page, "--force")
    assert page.read_bytes() == before[page]


def test_a_report_does_not_come_without_its_merge(
    files: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listed(files)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shira_format.merging.run.Merge.write", stop)
    assert 130 == run(files / "a.st", files / "b.st", "-o", files / "ab.st", "--report", files / "ab.html")
    assert "shira-merge: error: interrupted; nothing was written\n" == one_line(capsys)
    assert before == listed(files)


def test_moments(real: Path, tmp_path: Path, capsys: Capture) -> None:
    from shira_format.calibration.moments import Moment, Moments

    name = "encoder.layer.0.attention.self.query.weight"
    width = load(real / "spam.st")[name].shape[1]
    inputs = np.random.default_rng(0).standard_normal((50, width))
    square = (inputs.T @ inputs / 50)[None, None]
    Moments([Moment(name, square, width, 50)]).save(tmp_path / "moments.st")
    pair = (real / "spam.st", real / "genre.st")
    assert 0 == run(*pair, "--check", "--json")
    without = json.loads(capsys.readouterr().out)
    assert 0 == run(*pair, "--check", "--json", "--moments", tmp_path / "moments.st")
    assert without != json.loads(capsys.readouterr().out)
    assert 1 == run(*pair, "--check", "--moments", real / "spam.st")
    assert f"{real / 'spam.st'}: " in one_line(capsys)


# --- subtract, compose, invert ---


def test_algebra(files: Path, capsys: Capture) -> None:
    a, b = files / "a.st", files / "b.st"
    assert 0 == run(a, "-o", files / "undo.st", "--method", "invert")
    live = {name: array.copy() for name, array in BASE.items()}
    apply(load(a), live)
    apply(load(files / "undo.st"), live)
    assert all(np.array_equal(live[name], array) for name, array in BASE.items())
    head, x, *_, total, _ = capsys.readouterr().out.splitlines()
    assert ["tensor", "a.st", "shared", "result", "density"] == head.split()
    assert [X, "3", "0", "3", "25.00", "%"] == x.split()
    assert ["all", "4", "0", "4", "16.67", "%"] == total.split()

    assert 0 == run(a, b, "-o", files / "less.st", "--method", "subtract", "--json")
    told = json.loads(capsys.readouterr().out)
    assert ("subtract", None) == (told["method"], told["weights"])
    assert [[3, 2], [1, 0]] == [tensor["inputs"] for tensor in told["tensors"]]
    assert [1, 0] == [tensor["shared"] for tensor in told["tensors"]]
    assert {1: 1, 4: -2, 5: 3, 6: 8} == deltas(files / "less.st")


def after(name: str, adapter: Path, at: list[int], new: list[float]) -> SparseTensor:
    """Targets for what ``adapter`` makes of the base."""
    live = {key: array.copy() for key, array in BASE.items()}
    apply(load(adapter), live)
    return SparseTensor(name, (3, 4), at, np.float32(new), base=live[name].reshape(-1)[at])


def test_compose_in_the_order_given(files: Path, capsys: Capture) -> None:
    a, b, c, out = (files / f"{name}.st" for name in ("a", "second", "third", "abc"))
    save(Adapter([after(X, a, [4, 7], [50, 70])]), b)
    assert 0 == run(a, b, "-o", out, "--method", "compose")
    save(Adapter([after(X, out, [7, 8], [71, 80])]), c)
    assert 0 == run(a, b, c, "-o", out, "--method", "compose", "--force")
    live = {name: array.copy() for name, array in BASE.items()}
    apply(load(out), live)
    one_by_one = {name: array.copy() for name, array in BASE.items()}
    for path in (a, b, c):
        apply(load(path), one_by_one)
    assert all(np.array_equal(live[name], array) for name, array in one_by_one.items())
    assert 71 == live[X].reshape(-1)[7]
    capsys.readouterr()
    before = listed(files)
    assert 1 == run(b, a, "-o", files / "ba.st", "--method", "compose")  # b is made for what a gives
    assert one_line(capsys).startswith("shira-merge: error: ")
    assert before == listed(files)


def test_algebra_with_names_chosen(files: Path, capsys: Capture) -> None:
    out = files / "out.st"
    assert 0 == run(files / "a.st", "-o", out, "--method", "invert", "--include", "y", "--quiet")
    assert [Y] == list(load(out))
    capsys.readouterr()
    assert 1 == run(files / "a.st", "-o", files / "new.st", "--method", "invert", "--include", "z")
    assert "no tensor is left by the choice of names" in one_line(capsys)
    assert 0 == run(files / "a.st", "-o", files / "new.st", "--method", "invert", "--dry-run")
    assert not (files / "new.st").exists()
    capsys.readouterr()
    assert 1 == run(files / "needy.st", "-o", files / "new.st", "--method", "invert")
    assert str(files / "needy.st") in one_line(capsys)
    base = ("--base", files / "base.safetensors")
    assert 0 == run(files / "needy.st", "-o", files / "new.st", "--method", "invert", *base)


def test_what_an_inverse_removes(files: Path) -> None:
    new = [DenseTensor(name, np.float32([1])) for name in ("new", "more")]
    save(Adapter(dict(load(files / "a.st")), dense=new), files / "grown.st")
    assert 0 == run(files / "grown.st", "-o", files / "undo.st", "--method", "invert", "--quiet")
    assert ("new", "more") == load(files / "undo.st").removed
    assert 0 == run(
        files / "grown.st", "-o", files / "one.st", "--method", "invert", "--include", "new", "--quiet"
    )
    assert (("new",), []) == (load(files / "one.st").removed, list(load(files / "one.st")))


@pytest.mark.parametrize("method", list(ALGEBRA))
@pytest.mark.parametrize(
    "option",
    [
        ("--weights", "1,1"), ("--option", "normalize=1"), ("--layer", "x:weights=1,1"), ("--density", "0.5"), ("--max-density", "0.5"),
        ("--self-contained",), ("--no-self-contained",), ("--threads", "2"), ("--report", "r.html"), ("--check",),
    ],
)  # fmt: skip
def test_what_algebra_does_not_take(method: str, option: tuple[str, ...], capsys: Capture, files: Path) -> None:
    adapters = ["a.st"] if method == "invert" else ["a.st", "b.st"]
    with pytest.raises(SystemExit, match="2"):
        run(*(files / name for name in adapters), "-o", files / "out.st", "--method", method, *option)
    assert f"shira-merge: error: {option[0]} does not go with --method {method}\n" == one_line(capsys)


# --- refusals ---


def one_line(capture: Capture) -> str:
    """The error: one line on stderr, nothing on stdout."""
    out, err = capture.readouterr()
    assert "" == out
    assert 1 == err.count("\n"), err
    return err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("a.st", "b.st"), "-o is missing"),
        (("a.st", "-o", "x.st", "--weights", "1;2"), "--weights 1;2: not numbers with commas between"),
        (("a.st", "-o", "x.st", "--weights", "1,"), "--weights 1,: not numbers"),
        (("a.st", "b.st", "-o", "x.st", "--weights", "1"), "--weights: 1 for 2 adapters"),
        (("a.st", "-o", "x.st", "--threads", "0"), "--threads 0 is not a positive count"),
        (("a.st", "-o", "x.st", "--max-density", "0"), "--max-density 0.0 is not in (0, 1]"),
        (("a.st", "-o", "x.st", "--max-density", "nan"), "--max-density nan is not in (0, 1]"),
        (("a.st", "-o", "x.st", "--density", "0.5"), "--density 0.5: the method 'linear' has no option 'density'"),
        (("a.st", "b.st", "-o", "x.st", "--method", "ties", "--density", "1,1,1"), "density: 3 values for 2 adapters"),
        (("a.st", "-o", "x.st", "--method", "ties", "--density", "2"), "density='2': not from 0 to 1"),
        (("a.st", "-o", "x.st", "--method", "ties", "--density", "1", "--option", "density=1"), "--option density: given twice"),
        (("a.st", "-o", "x.st", "--report", "r.pdf"), "--report r.pdf: a report ends in .html or .json"),
        (("a.st", "-o", "x.st", "--moments", "m"), "--moments is about the report"),
        (("a.st", "-o", "x.st", "--option", "normalize"), "--option normalize: not KEY=VALUE"),
        (("a.st", "-o", "x.st", "--option", "=1"), "--option =1: not KEY=VALUE"),
        (("a.st", "-o", "x.st", "--option", "p=1"), "the method 'linear' has no option 'p'; it has normalize"),
        (("a.st", "-o", "x.st", "--option", "normalize=2"), "normalize='2': not true or false"),
        (("a.st", "-o", "x.st", "--option", "normalize=no", "--option", "normalize=yes"), "--option normalize: given twice"),
        (("a.st", "b.st", "-o", "x.st", "--method", "ties", "--option", "density=1,1,1"), "density: 3 values for 2 adapters"),
        (("a.st", "-o", "x.st", "--method", "ties", "--option", "density=1,"), "density='': not a number"),
        (("a.st", "-o", "x.st", "--method", "ties", "--option", "density=2,1"), "density='2': not from 0 to 1"),
        (("a.st", "b.st", "-o", "x.st", "--layer", "x:weights=1"), "weights: 1 values for 2 adapters"),
        (("a.st", "-o", "x.st", "--layer", "normalize=1"), "--layer normalize=1: not REGEX:KEY=VALUE"),
        (("a.st", "-o", "x.st", "--layer", "x:y:z"), "--layer x:y:z: not REGEX:KEY=VALUE"),
        (("a.st", "-o", "x.st", "--layer", "x:p=1"), "--layer x:p=1: the method 'linear' has no option 'p'"),
        (("a.st", "-o", "x.st", "--layer", "x:weights=a"), "--layer x:weights a: not numbers"),
        (("a.st", "b.st", "-o", "x.st", "--method", "invert"), "--method invert takes 1 adapter, not 2"),
        (("a.st", "-o", "x.st", "--method", "subtract"), "--method subtract takes 2 adapters, not 1"),
        (("a.st", "b.st", "c.st", "-o", "x.st", "--method", "subtract"), "takes 2 adapters, not 3"),
        (("a.st", "-o", "x.st", "--method", "compose"), "--method compose takes 2 adapters or more, not 1"),
    ],
)  # fmt: skip
def test_usage(arguments: tuple[str, ...], reason: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)
    assert reason in one_line(capsys)


def test_an_unknown_method(capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("a.st", "-o", "x.st", "--method", "magic")
    assert "'magic' is not one of" in capsys.readouterr().err


def test_refusals(files: Path, capsys: Capture) -> None:
    a, b, out = files / "a.st", files / "b.st", files / "out.st"
    (files / "more").mkdir()
    (files / "old.st").write_bytes(b"mine")
    (files / "text.st").write_text("no adapter")
    data = bytearray(a.read_bytes())
    data[-1] ^= 1
    (files / "bad.st").write_bytes(data)
    save(Adapter([SparseTensor(X, (3, 5), [1], np.float32([1]), base=np.float32([1]))]), files / "wide.st")
    save(Adapter([SparseTensor(X, (3, 4), [1], np.float32([1]), base=np.float32([7]))]), files / "else.st")
    save(Adapter([SparseTensor(X, (3, 4), [1], value_kind="none", dtype=np.float32)]), files / "mask.st")
    before = contents(files)
    none = files / "none" / "x.st"
    for arguments, reason in (
        ((a, b, "-o", files / "old.st"), f"{files / 'old.st'}: exists; --force replaces it"),
        ((a, b, "-o", b, "--force"), f"{b}: is one of the inputs"),
        ((a, b, "-o", files / "more" / ".." / "b.st", "--force"), "is one of the inputs"),
        ((a, b, "-o", files / "base.safetensors", "--base", files / "base.safetensors", "--force"), f"{files / 'base.safetensors'}: is one of the inputs"),
        ((a, "-o", a, "--force", "--method", "invert"), f"{a}: is one of the inputs"),
        ((a, b, "-o", out, "--report", files / "no" / "r.html"), "the folder"),
        ((a, b, "-o", files / "r.json", "--report", files / "r.json"), f"{files / 'r.json'}: two files to write need two names"),
        ((a, b, "-o", files), "is a folder, not a file to write"),
        ((a, b, "-o", none), f"{none}: the folder {none.parent} does not exist"),
        ((a, files / "none.st", "-o", out), f"{files / 'none.st'}: No such file"),
        ((a, files / "text.st", "-o", out), f"{files / 'text.st'}: "),
        ((files / "bad.st", b, "-o", out), f"{files / 'bad.st'}: tensor '"),
        ((a, files / "wide.st", "-o", out), f"{files / 'wide.st'}: tensor '{X}' has shape [3, 5]"),
        ((a, files / "else.st", "-o", out), f"{files / 'else.st'}: tensor '{X}': its base values differ"),
        ((a, files / "mask.st", "-o", out), f"{files / 'mask.st'}: tensor '{X}' is a mask"),
        ((a, b, "-o", out, "--weights", "1,nan"), "are not all finite"),
        ((a, b, "-o", out, "--layer", "(:weights=1,1"), "not a regular expression: '('"),
        ((a, b, "-o", out, "--layer", "zzz:weights=1,1"), "the pattern 'zzz' matches no tensor's name"),
        ((a, b, "-o", out, "--method", "overwrite", "--weights", "0.5,1"), "copies entries unscaled"),
        ((a, b, "-o", out, "--method", "refuse"), f"tensor '{X}': {b} and {a} set 1 entries to different values"),
        ((a, b, "-o", out, "--include", "zzz"), "no tensor is left by the choice of names"),
        ((a, b, "-o", out, "--exclude", "["), "not a regular expression: '['"),
        ((a, b, "-o", out, "--base", files / "none.safetensors"), "none.safetensors"),
    ):  # fmt: skip
        assert 1 == run(*arguments), arguments
        assert reason in (err := one_line(capsys)), err
        assert err.startswith("shira-merge: error: ")
        assert before == contents(files), arguments


@pytest.mark.parametrize("method", ["linear", "compose"])
def test_no_file_of_the_base_is_written_over(method: str, files: Path, capsys: Capture) -> None:
    folder = files / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    (files / "base.safetensors").rename(weights)
    before = weights.read_bytes()
    arguments = [files / "a.st", files / "b.st", "--base", folder, "--method", method, "--force", "-o", weights]
    assert 1 == run(*arguments)
    assert f"shira-merge: error: {weights}: is one of the inputs\n" == one_line(capsys)
    assert before == weights.read_bytes()


def test_a_report_over_an_input(files: Path, capsys: Capture) -> None:
    inside = files / "adapter.json"
    inside.write_bytes((files / "a.st").read_bytes())
    before = contents(files)
    assert 1 == run(inside, files / "b.st", "-o", files / "ab.st", "--report", inside, "--force")
    assert f"shira-merge: error: {inside}: is one of the inputs\n" == one_line(capsys)
    assert before == contents(files)


_SLOW = """
import sys, time
from shira_format.merging.run import Merge
fast = Merge.tensor
def slow(self, name):
    time.sleep(0.2)
    print("tensor", flush=True)
    return fast(self, name)
Merge.tensor = slow
from shira_cli.merge import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_report_on_what_the_method_refuses(files: Path, capsys: Capture) -> None:
    arguments = (files / "a.st", files / "b.st", "--method", "refuse")
    before = listed(files)
    assert 1 == run(*arguments, "-o", files / "ab.st", "--report", files / "ab.html")
    assert "set 1 entries to different values" in one_line(capsys)
    assert before == listed(files)
    assert 0 == run(*arguments, "--check", "--report", files / "ab.html")
    assert "set 1 entries to different values" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM] if POSIX else [])
def test_an_interrupt_leaves_nothing(number: signal.Signals, real: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _SLOW, *(str(real / f"{name}.st") for name in ("spam", "genre")), "-o"]
    with subprocess.Popen(
        [*command, str(tmp_path / "ab.st"), "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert "tensor\n" == process.stdout.readline()
        time.sleep(0.1)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert 130 == process.returncode
    assert "shira-merge: error: interrupted; nothing was written\n" == err
    assert [] == listed(tmp_path)


def test_help_lists_every_method_and_option(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    out = capsys.readouterr().out
    assert "shira-merge a.st b.st -o ab.st --weights 0.7,0.3" in out
    lines = [line.split() for line in out.splitlines()]
    for name, method in METHODS.items():
        at = lines.index([name, *method.about.split()])
        defaults = dict(pair.split("=") for pair in lines[at + 1]) if method.options else {}
        assert method.options.keys() == defaults.keys()
        for key, option in method.options.items():
            assert option.default == option.parsed(key, defaults[key])
            assert any([key] == line[:1] and option.about in " ".join(line) for line in lines)
    for name, (about, _, _) in ALGEBRA.items():
        assert [name, *about.split()] in lines
