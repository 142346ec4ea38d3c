"""``shira-convert full_to_shira`` and ``shira_to_full`` as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shira_format
from shira_cli.convert import main
from tests import models

Pair = tuple[Path, Path]
Capture = pytest.CaptureFixture[str]
POSIX = os.name == "posix"


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A Llama with its config, and a step of training later."""
    base = tmp_path / "base"
    models.llama().to(torch.bfloat16).save_pretrained(base, max_shard_size="20KB")
    tuned = tmp_path / "tuned"
    model = models.llama().to(torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.where(torch.rand(weight.shape, generator=generator) < 0.03, weight * 1.125, weight))
    model.save_pretrained(tuned)
    return base, tuned


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def equal(a: Path, b: Path) -> bool:
    x, y = state(a), state(b)
    return x.keys() == y.keys() and all(
        x[k].dtype == y[k].dtype and torch.equal(x[k].view(torch.uint8), y[k].view(torch.uint8)) for k in x
    )


def full(pair: Pair, out: Path, *options: str) -> int:
    return main(["full_to_shira", "--base", str(pair[0]), "--tuned", str(pair[1]), "-o", str(out), *options])


def back(adapter: Path, pair: Pair, out: Path, *options: str) -> int:
    return main(["shira_to_full", str(adapter), "--base", str(pair[0]), "-o", str(out), *options])


def test_there_and_back(pair: Pair, tmp_path: Path, capsys: Capture) -> None:
    assert 0 == full(pair, tmp_path / "p.st", "--exact")
    out, err = capsys.readouterr()
    assert "" == err
    assert out.splitlines()[-1].startswith(f"{tmp_path / 'p.st'}: ")
    assert 0 == back(tmp_path / "p.st", pair, tmp_path / "again")
    out, err = capsys.readouterr()
    assert "" == err
    assert "21 tensors patched, 0 stored whole, 0 removed; 21 compared" in out
    assert equal(pair[1], tmp_path / "again")
    shards = sorted(path.name for path in pair[0].glob("*.safetensors"))
    assert len(shards) > 2
    assert shards == sorted(path.name for path in (tmp_path / "again").glob("*.safetensors"))
    again = type(models.llama()).from_pretrained(tmp_path / "again")
    tuned = type(models.llama()).from_pretrained(pair[1])
    assert torch.equal(models.outputs(tuned), models.outputs(again))


def test_reports_as_json(pair: Pair, tmp_path: Path, capsys: Capture) -> None:
    assert 0 == full(pair, tmp_path / "p.st", "--exact", "--json", "--exclude", "norm")
    report = json.loads(capsys.readouterr().out)
    assert report["exact"]
    assert report["totals"]["tensors"] == len(report["tensors"]) == 16
    assert report["totals"]["file_bytes"] == (tmp_path / "p.st").stat().st_size
    assert 0 == full(
        pair, tmp_path / "k.st", "--energy", "0.5", "--scope", "global", "--json", "--exclude", "norm"
    )
    report = json.loads(capsys.readouterr().out)
    assert 0.5 <= report["totals"]["energy_kept"] < 0.51
    assert {"rule": "energy", "scope": "global", "energy": 0.5} == {
        key: value for key, value in shira_format.load(tmp_path / "k.st").manifest["selection"].items()
        if key in ("rule", "scope", "energy")
    }  # fmt: skip
    assert 0 == back(tmp_path / "p.st", pair, tmp_path / "again", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["patched"] == 16
    assert set(report["files"]) == {path.name for path in (tmp_path / "again").glob("*.safetensors")}
    assert "config.json" in report["copied"]


def test_a_least_change_alone_keeps_all_others(pair: Pair, tmp_path: Path, capsys: Capture) -> None:
    assert 0 == full(pair, tmp_path / "m.st", "--min-change", "1e-3", "--json", "--quiet")
    report = json.loads(capsys.readouterr().out)
    base, tuned = state(pair[0]), state(pair[1])
    expected = sum(int(((tuned[k].float() - base[k].float()).abs() >= 1e-3).sum()) for k in base)
    assert expected == report["totals"]["nnz"]


def test_the_wrong_base_is_refused(pair: Pair, tmp_path: Path, capsys: Capture) -> None:
    assert 0 == full(pair, tmp_path / "p.st", "--exact", "--quiet")
    adapter = shira_format.load(tmp_path / "p.st")
    name = "model.layers.0.mlp.up_proj.weight"
    touched = set(adapter[name].indices.tolist())
    for where, reason in (
        (min(touched), "the base {} holds other values at the adapter's entries (digest differs)"),
        (next(i for i in range(1000) if i not in touched), "the base {} differs from the right one outside"),
    ):
        weights = state(pair[0])
        weights[name].view(-1)[where] += 1
        save_file(weights, tmp_path / "other.safetensors")
        capsys.readouterr()
        before = sorted(tmp_path.rglob("*"))
        assert 1 == main([
            "shira_to_full", str(tmp_path / "p.st"), "--base", str(tmp_path / "other.safetensors"),
            "-o", str(tmp_path / "bad"),
        ])  # fmt: skip
        out, err = capsys.readouterr()
        assert "" == out
        assert err.startswith(f"shira-convert: error: tensor {name!r}: ")
        assert reason.format(tmp_path / "other.safetensors") in err
        assert before == sorted(tmp_path.rglob("*"))


def test_strengths_and_dry_runs(pair: Pair, tmp_path: Path, capsys: Capture) -> None:
    assert 0 == full(pair, tmp_path / "p.st", "--exact", "--quiet")
    assert 0 == back(tmp_path / "p.st", pair, tmp_path / "zero", "--alpha", "0", "--quiet")
    assert equal(pair[0], tmp_path / "zero")
    assert 0 == back(tmp_path / "p.st", pair, tmp_path / "half", "--alpha", "0.5", "--quiet")
    half, base, tuned = state(tmp_path / "half"), state(pair[0]), state(pair[1])
    for name in base:
        a, b = base[name].float(), tuned[name].float()
        assert torch.equal(half[name], (a + 0.5 * (b - a)).bfloat16())
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert 0 == back(tmp_path / "p.st", pair, tmp_path / "none", "--dry-run")
    assert "dry run: nothing was written" == capsys.readouterr().out.splitlines()[-1]
    assert 0 == full(pair, tmp_path / "none.st", "--dry-run", "--exact")
    assert before == sorted(tmp_path.rglob("*"))


def test_existing_outputs(pair: Pair, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 == full(pair, tmp_path / "p.st", "--exact", "--quiet")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    assert 1 == back(tmp_path / "p.st", pair, out)
    assert capsys.readouterr().err.endswith(f"{out}: exists; --force replaces it\n")
    assert "mine" == (out / "mine").read_text()
    assert 0 == back(tmp_path / "p.st", pair, out, "--force", "--quiet")
    assert equal(pair[1], out)
    assert not (out / "mine").exists()
    for folder in (pair[0], tmp_path):  # the base itself, and what holds it
        capsys.readouterr()
        assert 1 == back(tmp_path / "p.st", pair, folder, "--force")
        assert "and is not replaced" in capsys.readouterr().err
    assert 1 == full(pair, tmp_path / "p.st", "--exact")
    assert "--force replaces it" in capsys.readouterr().err
    assert 1 == full(pair, pair[1] / "model.safetensors", "--exact", "--force")
    assert "is one of the inputs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--exact", "--density", "0.1"), "exclude each other"),
        (("--energy", "0.5", "--top-k", "3"), "exclude each other"),
        (("--energy", "1.5"), "energy 1.5 is not in (0, 1]"),
        (("--min-change", "-1"), "min-change -1.0 is not a magnitude"),
        (("--exact", "--scope", "global"), "--scope has no meaning with it"),
        (("--exact", "--min-change", "1"), "--min-change has no meaning with it"),
        (("--no-result-digests",), "--no-result-digests goes with --exact"),
        (("--threads", "0"), "--threads 0 is not a positive count"),
    ],
)
def test_options_that_cannot_be_meant(
    options: tuple[str, ...], reason: str, pair: Pair, tmp_path: Path, capsys: Capture
) -> None:
    with pytest.raises(SystemExit) as end:
        full(pair, tmp_path / "a.st", *options)
    assert 2 == end.value.code
    assert reason in capsys.readouterr().err


def test_checkpoints_that_do_not_belong_together(pair: Pair, tmp_path: Path, capsys: Capture) -> None:
    other = models.save_base(models.gpt2(), tmp_path / "gpt2")
    before = sorted(tmp_path.rglob("*"))
    for options in ((), ("--exact",)):
        assert 1 == full((pair[0], other), tmp_path / "a.st", *options)
        err = capsys.readouterr().err
        assert err.startswith(
            f"shira-convert: error: {other / 'model.safetensors'}: no weight of it is in the base"
        )
        assert err.count("\n") == 1
    assert before == sorted(tmp_path.rglob("*"))


def test_a_hub_that_is_out_of_reach(pair: Pair, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shira_cli.convert", "full_to_shira", "--base", "hf://me/base", "--tuned", str(pair[1]), "-o", str(tmp_path / "a.st")]  # fmt: skip
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert (1, "") == (done.returncode, done.stdout)
    assert done.stderr.startswith("shira-convert: error: hf://me/base: ")
    assert 1 == done.stderr.count("\n")


_SLOW = """
import sys, time
from shira_format.entries.changes import CheckpointChange
fast = CheckpointChange.both
def slow(self, start, stop):
    time.sleep(0.05)
    print(self.name, flush=True)
    return fast(self, start, stop)
CheckpointChange.both = slow
from shira_cli.convert import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL] if POSIX else [])
@pytest.mark.parametrize("resume", [False, True])
def test_interrupts(number: signal.Signals, resume: bool, pair: Pair, tmp_path: Path, capsys: Capture) -> None:
    """Nothing is left, not even by SIGKILL, unless what is done was to be kept; then the same command goes on."""
    out = tmp_path / "a" / "a.st"
    out.parent.mkdir()
    arguments = ["full_to_shira", "--base", str(pair[0]), "--tuned", str(pair[1]), "-o", str(out), "--exact"]
    arguments += ["--resume"] if resume else []
    with subprocess.Popen(
        [sys.executable, "-c", _SLOW, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(14):
            process.stdout.readline()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    kept = out.with_name("a.st.partial")
    if number != signal.SIGKILL:
        assert 130 == process.returncode
        words = (
            f"finished tensors are in {kept}, the same command continues from them"
            if resume
            else "nothing was written"
        )
        assert f"shira-convert: error: interrupted; {words}\n" == err
    assert ([kept] if resume else []) == list(out.parent.iterdir())
    if resume:
        assert len(list(kept.glob("*.npz"))) > 3
    assert 0 == main([*arguments, "--quiet"])
    assert [out] == list(out.parent.iterdir())
    assert 0 == full(pair, tmp_path / "whole.st", "--exact", "--quiet")
    assert (tmp_path / "whole.st").read_bytes() == out.read_bytes()


def test_an_interrupted_way_back_leaves_nothing(pair: Pair, tmp_path: Path) -> None:
    assert 0 == full(pair, tmp_path / "p.st", "--exact", "--quiet")
    script = _SLOW.replace(
        "from shira_format.entries.changes import CheckpointChange\nfast = CheckpointChange.both\n", ""
    ).partition("def slow")[0] + (
        "from shira_format.export.full.restore import _Restore as Plan\n"
        "fast = Plan._parts\n"
        "def slow(self, piece, workers):\n"
        "    time.sleep(0.05)\n"
        "    print(piece.name, flush=True)\n"
        "    return fast(self, piece, workers)\n"
        "Plan._parts = slow\n"
        "from shira_cli.convert import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    (tmp_path / "a").mkdir()
    arguments = [
        "shira_to_full",
        str(tmp_path / "p.st"),
        "--base",
        str(pair[0]),
        "-o",
        str(tmp_path / "a" / "out"),
    ]
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(8):
            process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (130, "shira-convert: error: interrupted; nothing was written\n") == (process.returncode, err)
    assert [] == list((tmp_path / "a").iterdir())


def test_inspect_tells_what_a_patch_does(tmp_path: Path, capsys: Capture) -> None:
    from shira_cli.inspect import main as inspect

    def save(name: str, tensors: dict[str, Any]) -> Path:
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    weight = torch.arange(12.0).reshape(4, 3)
    base = save("base.safetensors", {"old": weight, "embed": weight + 1, "gone": weight[:1] * 7})
    rows = torch.cat([weight + 1, torch.ones(2, 3)])
    tuned = save(
        "tuned.safetensors", {"new": weight.clone(), "embed": rows, "head": weight + 1, "bias": torch.ones(2)}
    )
    assert 0 == main(["full_to_shira", "--base", str(base), "--tuned", str(tuned), "-o", str(tmp_path / "p.st"), "--exact"])  # fmt: skip
    out = capsys.readouterr().out
    assert "new: bias" in out
    assert "rows 4 -> 6: embed" in out
    assert "removed: gone" in out
    assert "renamed from old: new" in out
    assert "from embed: head" in out
    assert 0 == inspect([str(tmp_path / "p.st"), "--verify", "--base", str(base)])
    out = capsys.readouterr().out
    assert "renamed: head from embed, new from old (2)" in out
    assert "resized: embed 4 -> 6 rows (1)" in out
    assert "removed: gone, old (2)" in out
    assert 1 == inspect([str(tmp_path / "p.st"), "--base", str(tuned)])
    assert "does not fit" in capsys.readouterr().err
