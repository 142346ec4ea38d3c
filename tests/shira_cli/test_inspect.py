"""Output that strangers' files, odd terminals and full disks cannot spoil."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shira_format
from shira_cli import inspect
from shira_format.adapter import Adapter
from shira_format.tensors import SparseTensor
from tests import models

Capture = pytest.CaptureFixture[str]
ONE, ZERO = np.ones(1, np.float32), np.zeros(1, np.float32)


def write(path: Path, name: str = "w", **manifest: Any) -> Path:
    shira_format.save(Adapter([SparseTensor(name, (2,), [1], ONE, base=ZERO)], manifest=manifest), path)
    return path


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "shira_cli.inspect", *map(str, arguments)]
    return subprocess.run(command, check=False, stderr=subprocess.PIPE, **options)


def test_text_from_the_file_cannot_forge_lines(tmp_path: Path, capsys: Capture) -> None:
    forged = "nice\nverified   all digests and rules\r\x1b[2K\u2028\u202e"
    path = write(
        tmp_path / "a.st", description=forged, license=forged, base_model={"id": forged, "revision": forged}
    )
    assert 0 == inspect.main([str(path)])
    out = capsys.readouterr().out
    assert not [line for line in out.splitlines() if line.startswith("verified")]
    assert r"nice\nverified   all digests and rules\r\x1b[2K\u2028\u202e" in out
    assert 0 == inspect.main([str(path), "--json"])
    assert forged == json.loads(capsys.readouterr().out)["description"]


def test_an_error_is_one_line_whatever_the_path(tmp_path: Path, capsys: Capture) -> None:
    assert 1 == inspect.main([str(tmp_path / "a\n\x1b[31mb.st")])
    out, err = capsys.readouterr()
    assert "" == out
    assert f"shira-inspect: error: {tmp_path}/a\\n\\x1b[31mb.st: No such file or directory\n" == err


def test_a_base_that_does_not_fit_is_an_error_even_if_quiet(tmp_path: Path, capsys: Capture) -> None:
    base = models.save_base(models.net(), tmp_path / "base")
    assert 1 == inspect.main([str(write(tmp_path / "a.st")), "--base", str(base), "--quiet"])
    out, err = capsys.readouterr()
    assert f"NO: tensor 'w': the base {base / 'model.safetensors'} has no 'w'" in out
    assert (
        f"shira-inspect: error: {base}: the adapter does not fit: tensor 'w': the base {base / 'model.safetensors'} has no 'w'\n"
        == err
    )


def test_a_base_that_is_none(tmp_path: Path, capsys: Capture) -> None:
    assert 1 == inspect.main([str(write(tmp_path / "a.st")), "--base", str(tmp_path / "none")])
    assert f"shira-inspect: error: {tmp_path}/none: no such file or folder\n" == capsys.readouterr().err


def test_a_bad_filter(tmp_path: Path, capsys: Capture) -> None:
    assert 1 == inspect.main([str(write(tmp_path / "a.st")), "--include", "("])
    assert "error: not a regular expression: '('" in capsys.readouterr().err


def test_verify_names_file_tensor_and_rule(tmp_path: Path, capsys: Capture) -> None:
    path = write(tmp_path / "a.st", name="layer.w")
    content = bytearray(path.read_bytes())
    content[-5:-1] = ONE[:1].astype("<f4").tobytes()[::-1]
    path.write_bytes(content)
    assert 1 == inspect.main([str(path), "--verify", "--json"])
    out, err = capsys.readouterr()
    assert "" == out
    assert err.startswith(f"shira-inspect: error: {path}: tensor 'layer.w")
    assert err.endswith("(rule: digest-mismatch)\n")


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_a_terminal_without_the_letters(option: tuple[str, ...], tmp_path: Path) -> None:
    path = write(tmp_path / "a.st", name="größe.✓")
    done = run(path, *option, stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (0, b"") == (done.returncode, done.stderr)
    if option:
        assert "größe.✓" == json.loads(done.stdout)["tensors"][0]["name"]
    else:
        assert rb"gr\xf6\xdfe.\u2713" in done.stdout


@pytest.mark.parametrize("device", [Path("/dev/full")] if Path("/dev/full").exists() else [])
def test_output_that_cannot_be_written(device: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.st")
    with device.open("wb") as full:
        done = run(path, stdout=full)
    assert (1, b"shira-inspect: error: No space left on device\n") == (done.returncode, done.stderr)
    script = f"'{sys.executable}' -m shira_cli.inspect '{path}' >&-"
    closed = subprocess.run(["sh", "-c", script], check=False, capture_output=True)
    assert (0, b"") == (closed.returncode, closed.stderr)


@pytest.mark.parametrize("name", ["shira-convert", "shira-inspect"])
def test_the_commands_are_installed(name: str) -> None:
    command = shutil.which(name, path=str(Path(sys.executable).parent))
    assert command is not None
    done = subprocess.run([command, "--version"], check=False, capture_output=True, text=True)
    assert (0, f"{name} {shira_format.__version__}\n", "") == (done.returncode, done.stdout, done.stderr)
