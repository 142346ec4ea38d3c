"""What must not be overwritten, and what a conversion says when it cannot go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import shira_format
from shira_cli import convert
from tests import models

Capture = pytest.CaptureFixture[str]
Pair = tuple[Path, Path]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """The folders of a LoRA and of its base, which is sharded."""
    base = models.save_base(models.net(), tmp_path / "base")
    state = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    save_file(state, base / "m-1.safetensors")
    index = {"weight_map": dict.fromkeys(state, "m-1.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    lora = models.random_lora(models.net(), r=2, target_modules=["wide", "square"])
    return models.save_lora(lora, tmp_path / "lora"), base


def arguments(pair: Pair, out: Path, *options: str) -> list[str]:
    return ["lora_to_shira", str(pair[0]), "--base", str(pair[1]), "-o", str(out), *options]


@pytest.mark.parametrize(
    "name",
    [
        "base/model.safetensors.index.json",
        "base/m-1.safetensors",
        "lora/adapter_model.safetensors",
        "lora/adapter_config.json",
        "link",
        "lora/../base/m-1.safetensors",
    ],
)
def test_no_input_is_replaced(name: str, pair: Pair, tmp_path: Path, capsys: Capture) -> None:
    os.link(tmp_path / "base" / "m-1.safetensors", tmp_path / "link")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert 1 == convert.main(arguments(pair, tmp_path / name, "--force"))
    out, err = capsys.readouterr()
    assert "" == out
    assert err.startswith(f"shira-convert: error: {tmp_path / name}: is ")
    assert "one of the inputs" in err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_dry_run_does_not_mind_the_output(pair: Pair, tmp_path: Path, capsys: Capture) -> None:
    assert 0 == convert.main(arguments(pair, tmp_path / "none" / "a.st", "--dry-run", "--quiet"))
    out, err = capsys.readouterr()
    assert "dry run: nothing was written" == out.splitlines()[-1]
    assert "" == err
    assert not (tmp_path / "none").exists()


def test_errors_name_file_and_tensor(pair: Pair, tmp_path: Path, capsys: Capture) -> None:
    models.edit_config(pair[0], lora_alpha=1e300)
    assert 1 == convert.main(arguments(pair, tmp_path / "a.st", "--include", "wide"))
    weights = pair[0] / "adapter_model.safetensors"
    reason = "the update of tensor 'wide.weight' holds NaN or Inf, or overflows"
    assert ("", f"shira-convert: error: {weights}: {reason}\n") == capsys.readouterr()
    weights.write_bytes(b"\1\0")
    assert 1 == convert.main(arguments(pair, tmp_path / "a.st"))
    out, err = capsys.readouterr()
    assert err.startswith(f"shira-convert: error: {weights}: ")
    assert err.endswith("(rule: file-truncated)\n")


def test_global_top_k_and_filters(pair: Pair, tmp_path: Path, capsys: Capture) -> None:
    options = ("--top-k", "77", "--scope", "global", "--self-contained", "--json", "--quiet")
    assert 0 == convert.main(arguments(pair, tmp_path / "a.st", *options))
    report = json.loads(capsys.readouterr().out)
    assert 77 == report["totals"]["nnz"] == sum(row["nnz"] for row in report["tensors"])
    assert str(tmp_path / "a.st") == report["output"]
    adapter = shira_format.load(tmp_path / "a.st")
    assert all(tensor.base is not None for tensor in adapter.values())
    assert 0 == convert.main(arguments(pair, tmp_path / "b.st", "--exclude", "square", "--json", "--quiet"))
    assert ["wide.weight"] == [row["name"] for row in json.loads(capsys.readouterr().out)["tensors"]]


@pytest.mark.parametrize("limit", [1500] if os.name == "posix" else [])
def test_a_file_beyond_the_limit_leaves_nothing(limit: int, pair: Pair, tmp_path: Path) -> None:
    """The size limit of the process stands for a full disk: the write itself fails, in the middle."""
    script = (
        "import resource, signal, sys; from shira_cli.convert import main; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        "sys.exit(main(sys.argv[1:]))"
    )
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-c", script, *arguments(pair, tmp_path / "a.st", "--quiet", "--density", "0.2")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (1, "", 1) == (done.returncode, done.stdout, done.stderr.count("\n"))
    assert done.stderr.startswith("shira-convert: error: ")
    assert "File too large" in done.stderr
    assert before == sorted(tmp_path.rglob("*"))
