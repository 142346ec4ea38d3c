"""What ``--json`` prints fits the schema in the docs, for every command."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification

from shira_cli import convert, demo, diff, inspect, main, mask, measure, merge, moments, plot, train, verify
from shira_cli.convert import COMMANDS
from shira_format.calibration.moments import Moment, Moments
from tests import models

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"
Capture = pytest.CaptureFixture[str]


def schema(name: str) -> Any:
    return json.loads((SCHEMAS / f"{name}.schema.json").read_text("utf-8"))


def check(name: str, value: Any) -> None:
    jsonschema.Draft202012Validator(schema(name)).validate(value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tune, a LoRA merged and not, two adapters with all that they need, and moments."""
    found = tmp_path_factory.mktemp("schemas")
    shutil.copytree(models.minilm(), found / "base")
    shutil.copytree(models.LORAS / "spam", found / "lora")
    for name, task in (("a", "spam"), ("b", "genre")):
        arguments = [
            "lora_to_shira",
            str(models.LORAS / task),
            "--base",
            str(found / "base"),
            "-o",
            str(found / f"{name}.st"),
        ]
        options = ["--include", r"layer\.0\.", "--self-contained", "--quiet"]
        assert 0 == convert.main([*arguments, *options])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForSequenceClassification.from_pretrained(found / "base")
    models.load_lora(model, found / "lora").merge_and_unload().save_pretrained(found / "merged")
    (found / "texts.txt").write_text("one text\nanother text\n")
    Moments([
        Moment(f"encoder.layer.0.attention.self.{part}.weight", np.eye(384)[None, None], 384, 10)
        for part in ("query", "key", "value")
    ]).save(found / "m.safetensors")  # fmt: skip
    return found


def run(
    command: Any, arguments: Sequence[object], folder: Path, capsys: Capture, codes: tuple[int, ...] = (0,)
) -> Any:
    capsys.readouterr()
    words = [str(folder / word[1:]) if str(word).startswith("@") else str(word) for word in map(str, arguments)]
    assert command([*words, "--json", "--quiet"]) in codes
    return json.loads(capsys.readouterr().out)


def test_every_command_has_a_schema() -> None:
    found = {path.name.removesuffix(".schema.json") for path in SCHEMAS.iterdir()}
    others = set(main.COMMANDS) - {"convert", "completion", "check-merge"}
    assert found == set(COMMANDS) | others | {"merge_check"}
    for name in found:
        jsonschema.Draft202012Validator.check_schema(schema(name))


@pytest.mark.parametrize("extra", [(), ("--dry-run",)])
def test_conversions(extra: tuple[str, ...], folder: Path, tmp_path: Path, capsys: Capture) -> None:
    def converted(name: str, *arguments: object, codes: tuple[int, ...] = (0,)) -> None:
        check(name, run(convert.main, [name, *arguments], folder, capsys, codes))

    converted("lora_to_shira", "@lora", "--base", "@base", "-o", tmp_path / "l.st", *extra)
    some = ("--include", r"layer\.0\.output")
    converted("full_to_shira", "--base", "@base", "--tuned", "@merged", "-o", tmp_path / "f.st", *some, *extra)
    converted(
        "full_to_shira", "--base", "@base", "--tuned", "@merged", "-o", tmp_path / "e.st", "--exact", *some, *extra
    )
    converted("shira_to_full", "@a.st", "--base", "@base", "-o", tmp_path / "full", *extra)
    only = ("--exclude", "classifier")
    converted("shira_to_lora", "@a.st", "--base", "@base", "--rank", "2", *only, "-o", tmp_path / "lora", *extra)
    converted("shira_to_csr", "@a.st", "-o", tmp_path / "csr", *extra)
    converted("shira_to_peft", "@a.st", "--pad", *only, "-o", tmp_path / "peft", *extra)
    if not extra:
        converted("repack", "@a.st", "--base", "@base", "--compact", "-o", tmp_path / "r.st")
        converted("csr_to_shira", tmp_path / "csr", "-o", tmp_path / "c.st")
        converted("peft_to_shira", tmp_path / "peft", "--base", "@base", "-o", tmp_path / "p.st")


def test_check_merge(folder: Path, capsys: Capture) -> None:
    for merged, code in (("@merged", 0), ("@base", 1)):
        arguments = ("check_merge", "--base", "@base", "--lora", "@lora", "--merged", merged)
        found = run(convert.main, arguments, folder, capsys, (0, 1))
        check("check_merge", found)
        assert found["exit_code"] in {code, 1}


def test_looks(folder: Path, capsys: Capture) -> None:
    check("inspect", run(inspect.main, ("@a.st", "--verify", "--base", "@base"), folder, capsys))
    check("inspect", run(inspect.main, ("@a.st", "@b.st"), folder, capsys))
    check("diff", run_diff(folder, capsys))
    arguments = ("@a.st", "@b.st", "--moments", "@m.safetensors", "--spectrum", "--transposed", "--spectral")
    some = ("--include", "layer.0.attention.self")
    check("measure", run(measure.main, (*arguments, *some), folder, capsys))
    check("measure", run(measure.main, ("@a.st", "--base", "@base", "--lora", "@lora", *some), folder, capsys))


def run_diff(folder: Path, capsys: Capture) -> Any:
    capsys.readouterr()
    assert 1 == diff.main([str(folder / "a.st"), str(folder / "b.st"), "--json", "--all"])
    return json.loads(capsys.readouterr().out)


def test_merges(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    both = ("@a.st", "@b.st", "--exclude", "classifier")
    report = tmp_path / "report.json"
    arguments = (*both, "-o", tmp_path / "ab.st", "--max-density", "0.005", "--report", report)
    check("merge", run(merge.main, arguments, folder, capsys))
    check("merge_check", json.loads(report.read_text("utf-8")))
    check(
        "merge_check", run(merge.main, (*both, "--check", "--method", "ties", "--density", "0.5"), folder, capsys)
    )
    check("merge", run(merge.main, ("@a.st", "--method", "invert", "-o", tmp_path / "i.st"), folder, capsys))


def test_pictures(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    both = ("@a.st", "@b.st")
    for kind, *arguments in (
        ("mask", "@a.st"), ("layers", *both), ("overlap", *both), ("orthogonality", *both),
        ("spectrum", "@a.st", "--tensor", "encoder.layer.0.attention.self.query.weight"),
    ):  # fmt: skip
        check("plot", run(plot.main, (kind, *arguments, "-o", tmp_path / f"{kind}.png"), folder, capsys))


def test_moments_and_lemmas(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ("@base", "--texts", "@texts.txt", "--include", r"layer\.0\.", "-o", tmp_path / "m.safetensors")
    for extra in (("--dry-run",), ()):
        check("moments", run(moments.main, (*arguments, *extra), folder, capsys))
    check("lemmas", run(verify.main, ("@a.st", "--quick", "--lemma", "4.5"), folder, capsys))


def test_masks(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    some = ("--base", "@base", "--include", r"layer\.0\.attention")
    for number, extra in enumerate(
        ((), ("--dry-run",), ("--rule", "rand", "--runs", "16", "--band", "1", "--rank", "2"))
    ):
        check("mask", run(mask.main, (*some, "-o", tmp_path / f"{number}.st", *extra), folder, capsys))
    texts = (
        "--rule",
        "snip",
        "--task",
        "classify",
        "--data",
        models.LORAS.parent / "text" / "spam.jsonl",
        "--limit",
        "4",
    )
    check("mask", run(mask.main, (*some, *texts, "-o", tmp_path / "s.st", "--max-length", "16"), folder, capsys))
    check("inspect", run(inspect.main, (tmp_path / "2.st", "--verify"), folder, capsys))


def test_demo(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    models.few_held_out_texts(monkeypatch)
    arguments = ("--task", "spam", "--density", "0.01", "--base", "@base", "--cut-only")
    check("demo", run(demo.main, arguments, folder, capsys))


def test_train(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    texts = [{"text": f"{word} text", "label": word} for word in ("good", "bad") for _ in range(6)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in texts))
    few = (
        "--include",
        r"layer\.0\.attention\.self\.query",
        "--steps",
        "2",
        "--evaluations",
        "1",
        "--compare",
        "lora",
    )
    arguments = ("--base", "@base", "--data", tmp_path / "texts.jsonl", "--task", "classify", *few)
    for extra in (("--dry-run",), ()):
        check("train", run(train.main, (*arguments, "-o", tmp_path / "a.st", *extra), folder, capsys))
