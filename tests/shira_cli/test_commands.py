"""The commands as people call them: results on stdout, notices on stderr, exit codes, nothing written by mistake."""

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

import shira_format
from shira_cli import convert, errors, inspect
from shira_format.lora.products import LowRank
from tests import models

POSIX = os.name == "posix"
SPAM = str(models.LORAS / "spam")
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path = tmp_path / "spam.st"
    assert 0 == convert.main(["lora_to_shira", SPAM, "--base", str(models.minilm()), "-o", str(path), "--quiet"])
    return path


def lora_to_shira(out: Path, *options: str, lora: str = SPAM, base: str | None = None) -> int:
    return convert.main(["lora_to_shira", lora, "--base", base or str(models.minilm()), "-o", str(out), *options])


def one_line(capture: Capture) -> str:
    """The error: one line on stderr, nothing on stdout."""
    out, err = capture.readouterr()
    assert "" == out
    assert 1 == err.count("\n"), err
    return err


# --- shira-convert ---


def test_the_summary_is_on_stdout_and_the_warning_on_stderr(tmp_path: Path, capsys: Capture) -> None:
    assert 0 == lora_to_shira(tmp_path / "a.st")
    out, err = capsys.readouterr()
    assert "encoder.layer.0.attention.self.query.weight" in out
    assert out.splitlines()[-3].startswith("all ")
    assert "warning: only 14.0% of the update's energy is kept" in err
    assert "'bert.' is left out" in err


def test_json_and_quiet(tmp_path: Path, capsys: Capture) -> None:
    assert 0 == lora_to_shira(tmp_path / "a.st", "--json", "--quiet", "--density", "0.02")
    out, err = capsys.readouterr()
    assert "" == err
    totals = json.loads(out)["totals"]
    assert (36, 212328, 10616832) == (totals["tensors"], totals["nnz"], totals["numel"])
    assert (tmp_path / "a.st").stat().st_size == totals["file_bytes"]
    assert 0.2 < totals["energy_kept"] < 0.25


def test_a_dry_run_writes_nothing_and_says_the_same(tmp_path: Path, capsys: Capture) -> None:
    assert 0 == lora_to_shira(tmp_path / "a.st", "--json", "--dry-run")
    dry = json.loads(capsys.readouterr().out)
    assert [] == list(tmp_path.iterdir())
    assert 0 == lora_to_shira(tmp_path / "a.st", "--json")
    wet = json.loads(capsys.readouterr().out)
    assert dry["tensors"] == wet["tensors"]


def test_force(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "a.st"
    path.write_text("mine")
    assert 1 == lora_to_shira(path)
    assert "exists; --force replaces it" in one_line(capsys)
    assert "mine" == path.read_text()
    assert 0 == lora_to_shira(path, "--force")
    assert 36 == len(shira_format.load(path))


def test_an_input_is_never_the_output(tmp_path: Path, capsys: Capture) -> None:
    base = models.save_base(models.net(), tmp_path / "base")
    lora = models.save_lora(models.random_lora(models.net(), r=2, target_modules=["head"]), tmp_path / "lora")
    weights = base / "model.safetensors"
    before = weights.read_bytes()
    assert 1 == lora_to_shira(weights, "--force", lora=str(lora), base=str(base))
    assert "is one of the inputs" in one_line(capsys)
    assert before == weights.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        ("--density", "0"), ("--density", "-1"), ("--density", "1.5"), ("--density", "nan"), ("--density", "x"),
        ("--top-k", "0"), ("--top-k", "5", "--density", "0.1"), ("--scope", "all"), ("--threads", "0"),
        ("--dialect", "none"),
    ],
)  # fmt: skip
def test_options_out_of_range_exit_with_2(options: tuple[str, ...], tmp_path: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        sys.exit(lora_to_shira(tmp_path / "a.st", *options))
    assert 2 == caught.value.code
    assert "error:" in capsys.readouterr().err
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lora", "base", "out", "reason"),
    [
        ("none", None, "a.st", "none: no such file or folder"),
        (None, "none", "a.st", "none: no such file or folder"),
        ("empty", None, "a.st", "not a LoRA that can be converted: the folder has no file that ends in"),
        (None, None, "none/a.st", "does not exist"),
        (None, None, "empty", "is a folder"),
        ("bad", None, "a.st", "unreadable JSON"),
        (None, "other", "a.st", "adapted weights are not in the base"),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(
    lora: str | None, base: str | None, out: str, reason: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "empty").mkdir()
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text("{")
    (bad / "adapter_model.safetensors").write_bytes(b"")
    models.save_base(models.net(), tmp_path / "other")
    before = sorted(tmp_path.rglob("*"))
    code = lora_to_shira(
        tmp_path / out,
        "--quiet",
        lora=str(tmp_path / lora) if lora else SPAM,
        base=str(tmp_path / base) if base else None,
    )
    assert 1 == code
    assert reason in one_line(capsys)
    assert before == sorted(tmp_path.rglob("*"))


def test_a_full_disk(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert 1 == lora_to_shira(tmp_path / "a.st", "--quiet")
    assert "No space left on device" in one_line(capsys)
    assert [] == list(tmp_path.iterdir())


def test_a_known_error_shows_its_traceback_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(errors.DEBUG, "1")
    with pytest.raises(shira_format.errors.SourceError):
        lora_to_shira(tmp_path / "a.st", lora=str(tmp_path / "none"))


_SLOW = """
import sys, time
from shira_format.lora.products import LowRank
fast = LowRank.tile
def slow(self, start, stop, out):
    time.sleep(0.2)
    print("tile", flush=True)
    fast(self, start, stop, out)
LowRank.tile = slow
from shira_cli.convert import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM] if POSIX else [])
def test_an_interrupt_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    assert LowRank.tile  # what the script slows down
    command = [
        sys.executable,
        "-c",
        _SLOW,
        "lora_to_shira",
        SPAM,
        "--base",
        str(models.minilm()),
        "-o",
        str(tmp_path / "a.st"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "tile\n" == process.stdout.readline()
        time.sleep(0.1)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert 130 == process.returncode
    assert "shira-convert: error: interrupted; nothing was written\n" == err
    assert [] == list(tmp_path.iterdir())


# --- shira-inspect ---


def test_inspect_says_what_it_is(adapter: Path, capsys: Capture) -> None:
    assert 0 == inspect.main([str(adapter), "--verify", "--base", str(models.minilm())])
    out = capsys.readouterr().out
    for text in (
        "sentence-transformers/all-MiniLM-L6-v2", "peft lora", "density 0.01", "106,176 of 10,616,832", "all digests",
        "fits the base", "yes, by shapes", "classifier.weight",
    ):  # fmt: skip
        assert text in out


def test_inspect_as_json(adapter: Path, capsys: Capture) -> None:
    assert 0 == inspect.main([str(adapter), "--json", "--sort", "nnz"])
    info = json.loads(capsys.readouterr().out)
    assert {"format_version", "base_model", "source", "selection", "totals", "tensors"} <= info.keys()
    assert {
        "tensors", "nnz", "numel", "density", "file_bytes", "index_bits_per_entry", "bits_per_entry"
    } <= info["totals"].keys()  # fmt: skip
    assert "1.0" == info["format_version"]
    assert adapter.stat().st_size == info["totals"]["file_bytes"]
    for row in info["tensors"]:
        assert {"name", "shape", "dtype", "nnz", "density", "index_codec", "values"} <= row.keys()
        assert ("F32", "target") == (row["dtype"], row["values"])
    counts = [row["nnz"] for row in info["tensors"]]
    assert sorted(counts, reverse=True) == counts


@pytest.mark.parametrize("key", ["name", "nnz", "density", "bytes", "energy", "file"])
def test_sort_and_filter(key: str, adapter: Path, capsys: Capture) -> None:
    assert 0 == inspect.main(
        [str(adapter), "--json", "--sort", key, "--include", "query", "--exclude", r"layer\.0"]
    )
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["tensors"]
    assert 5 == len(rows)
    if key == "energy":
        assert sorted(row["energy_kept"] for row in rows) == [row["energy_kept"] for row in rows]


def test_a_damaged_file_is_refused_with_its_rule(adapter: Path, capsys: Capture) -> None:
    content = bytearray(adapter.read_bytes())
    content[-1] ^= 1
    adapter.write_bytes(content)
    assert 0 == inspect.main([str(adapter)])
    capsys.readouterr()
    assert 1 == inspect.main([str(adapter), "--verify"])
    line = one_line(capsys)
    assert "digest-mismatch" in line
    assert str(adapter) in line
    adapter.write_bytes(content[:-9])
    assert 1 == inspect.main([str(adapter)])
    assert "file-truncated" in one_line(capsys)
    assert 1 == inspect.main([str(models.minilm() / "model.safetensors")])
    assert "no-manifest" in one_line(capsys)
    assert 1 == inspect.main([str(adapter.with_name("none.st"))])
    assert "No such file" in one_line(capsys)


def test_the_wrong_base_is_told(adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    other = models.save_base(models.bert(), tmp_path / "other")
    assert 1 == inspect.main([str(adapter), "--base", str(other), "--json"])
    out, err = capsys.readouterr()
    assert "does not fit" in err
    verdict = json.loads(out)["base"]
    assert not verdict["fits"]
    assert 36 == len(verdict["reasons"])


def test_names_cannot_play_with_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    name = "a\u202eb\u009b31m"
    path = tmp_path / "odd.st"
    tensor = shira_format.SparseTensor(name, (2,), [0], np.ones(1, np.float32), base=np.zeros(1, np.float32))
    shira_format.save(shira_format.Adapter([tensor]), path)
    assert 0 == inspect.main([str(path)])
    out = capsys.readouterr().out
    assert r"a\u202eb\x9b31m" in out
    assert name not in out


def test_components_are_shown(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "pipe.st"
    one = np.ones(1, np.float32)
    tensors = [
        shira_format.SparseTensor(f"{part}/w", (2,), [1], one, base=0 * one) for part in ("unet", "text_encoder")
    ]
    parts = {"unet": {"base_model": {"id": "me/unet"}}, "text_encoder": {}}
    shira_format.save(shira_format.Adapter(tensors, manifest={"components": parts}), path)
    assert 0 == inspect.main([str(path)])
    out = capsys.readouterr().out
    assert "me/unet" in out
    assert "unet/w" in out
    bad = shira_format.Adapter(tensors, manifest={"components": {"unet": {}}})
    with pytest.raises(shira_format.errors.FormatError, match="component"):
        shira_format.save(bad, path)


def test_inspect_starts_light(adapter: Path) -> None:
    script = (
        "import sys; from shira_cli.inspect import main; main(sys.argv[1:]); "
        "heavy = {'torch', 'scipy', 'matplotlib', 'transformers', 'safetensors'} & set(sys.modules); sys.exit(len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(adapter)], check=False, capture_output=True)
    assert 0 == done.returncode


@pytest.mark.parametrize("main", [convert.main, inspect.main])
def test_help_has_an_example(main: Any, capsys: Capture) -> None:
    arguments = ["lora_to_shira", "--help"] if main is convert.main else ["--help"]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert 0 == caught.value.code
    assert "example" in capsys.readouterr().out


def test_a_closed_pipe_is_no_error_message(adapter: Path) -> None:
    command = f"'{sys.executable}' -m shira_cli.inspect '{adapter}' --json | head -1"
    done = subprocess.run(command, shell=True, check=False, capture_output=True, text=True)
    assert ("{\n", "") == (done.stdout, done.stderr)
