"""Absurd numbers, patterns, names and shapes give one line or a result, and never a traceback."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shira_cli import main as shira
from shira_format.adapter import Adapter
from shira_format.errors import SourceError
from shira_format.export.lora import shira_to_lora
from shira_format.export.peft_shira import shira_to_peft
from shira_format.format import save
from shira_format.format.manifest import DIGEST_KEY, METADATA_KEY
from shira_format.names.filters import name_filter
from shira_format.names.patterns import PatternError, is_inside_for_peft
from shira_format.storage.safetensors_file import SafetensorsFile
from shira_format.storage.safetensors_header import file_header
from shira_format.tensors import DenseTensor, SparseTensor
from tests import models

Capture = pytest.CaptureFixture[str]
ONE, ZERO = np.ones(1, np.float32), np.zeros(1, np.float32)
BIG = "9" * 399  # an integer that Python reads and no float64 holds
NUMBERS = [BIG, f"-{BIG}", "1e999", "-1e999"]


def adapter(path: Path, shape: tuple[int, ...] = (2, 3)) -> Path:
    save(Adapter([SparseTensor("w", shape, [1], ONE, base=ZERO)]), path)
    return path


def with_numbers(path: Path, number: str) -> Path:
    """An adapter with a number in each place of its provenance that is shown."""
    file = SafetensorsFile(adapter(path))
    buffer = path.read_bytes()[-sum(stream.nbytes for stream in file.values()) :]
    manifest = json.loads(file.metadata[METADATA_KEY])
    amounts = dict.fromkeys(("density", "energy", "energy_kept", "min_change", "relative_error"), "#")
    manifest |= {"selection": amounts, "source": {"r": "#", "list": ["#", 1]}, "mine": "#"}
    manifest["tensors"][0] |= {"energy_kept": "#", "relative_error": "#"}
    text = json.dumps(manifest).replace('"#"', number)
    path.write_bytes(
        file_header(dict(file), {METADATA_KEY: text, DIGEST_KEY: hashlib.sha256(text.encode()).hexdigest()})
        + buffer
    )
    return path


COMMANDS = [
    "inspect A", "inspect A --json", "inspect A --sort energy", "inspect A B --html new.html", "diff A B", "diff A B --json",
    "measure A --ranks --json", "merge A B -o new.st", "merge A B -o new.st --json", "merge A B -o new.st --report new.json",
    "merge A B -o new.st --report new.html", "merge A B --check", "convert shira_to_csr A -o csr",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("number", NUMBERS, ids=lambda text: text[:6])
def test_numbers_that_no_float_holds(
    command: str, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    with_numbers(tmp_path / "a.st", number)
    adapter(tmp_path / "b.st")
    code = shira.main(command.replace("A", "a.st").replace("B", "b.st").split())
    out, err = capsys.readouterr()
    assert code == 0 or command.startswith("diff") or (code == 1 and 1 == err.count("\n") and out == "")
    if "--json" in command and code == 0:
        json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_what_cannot_be_shown_is_left_out(tmp_path: Path, capsys: Capture) -> None:
    path = with_numbers(tmp_path / "a.st", "1e999")
    assert 0 == shira.main(["inspect", str(path), "--json"])
    info = json.loads(capsys.readouterr().out)
    assert ({}, {"list": [None, 1]}) == (info["selection"], info["source"])
    assert info["tensors"][0]["energy_kept"] is None


PATTERNS = ["(", "a{1,4294967295}", "a{99999999999}", "(" * 5000 + "a" + ")" * 5000, "[b-a]", "*"]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda text: text[:8])
@pytest.mark.parametrize(
    "command",
    [
        "inspect a.st --include", "measure a.st --exclude", "merge a.st a.st -o x.st --include",
        "convert shira_to_lora a.st --rank 1 -o x --embedding", "convert shira_to_lora a.st --rank 1 -o x --fan-in-fan-out",
    ],
)  # fmt: skip
def test_patterns_that_are_none(
    command: str, pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter(tmp_path / "a.st")
    assert 1 == shira.main([*command.split(), pattern])
    out, err = capsys.readouterr()
    assert ("", 1) == (out, err.count("\n"))
    assert "not a regular expression: " in err
    assert len(err) < 600
    assert ["a.st"] == [path.name for path in tmp_path.iterdir()]


def test_a_pattern_of_a_layer(tmp_path: Path, capsys: Capture) -> None:
    path = str(adapter(tmp_path / "a.st"))
    for pattern in PATTERNS:
        assert 1 == shira.main(["merge", path, path, "--check", "--layer", f"{pattern}:weights=1,0"])
        assert "not a regular expression: " in capsys.readouterr().err
    with pytest.raises(SourceError, match="too large"):
        name_filter(["a{99999999999}"], [])


@pytest.mark.parametrize("side", [2**52, 2**53 - 1])
@pytest.mark.parametrize(
    "command",
    ["measure a.st --ranks", "measure a.st --spectrum --json", "plot spectrum a.st -o x.png", "inspect a.st"],
)
@pytest.mark.parametrize("turned", [False, True])
def test_shapes_of_an_enormous_side(
    side: int, command: str, turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter(tmp_path / "a.st", (side, 1) if turned else (1, side))
    code = shira.main(command.split())
    out, err = capsys.readouterr()
    assert code == 0 or (turned and code == 1 and 1 == err.count("\n"))
    if not turned and "--json" in command:
        assert '"numerical_rank": 1' in out


# Names are never patterns.

ODD = ["head(x", "head[", "a*", "+", "head|body", "he\\ad", "x{9}", "$", "^"]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("export", ["lora", "peft"])
def test_names_are_no_patterns(name: str, export: str, tmp_path: Path) -> None:
    net = models.net()
    base = net.state_dict() | {f"{name}.weight": net.head.weight.detach().clone()}
    models.save_arrays(tmp_path / "base.safetensors", {key: value.numpy() for key, value in base.items()})
    weight = base["wide.weight"].numpy()
    sparse = SparseTensor(
        "wide.weight",
        weight.shape,
        np.arange(2 * sum(weight.shape)),
        weight.reshape(-1)[: 2 * sum(weight.shape)] + 1,
        base=weight.reshape(-1)[: 2 * sum(weight.shape)],
    )
    dense = DenseTensor(f"{name}.weight", base[f"{name}.weight"].numpy() + 1, base=base[f"{name}.weight"].numpy())
    save(Adapter([sparse], dense=[dense]), tmp_path / "a.st")
    run: Callable[..., Any] = shira_to_lora if export == "lora" else shira_to_peft
    options = {"rank": 2} if export == "lora" else {}
    with pytest.raises(SourceError, match="PEFT takes the name for a regular expression"):
        run(tmp_path / "a.st", out=tmp_path / "out", base=tmp_path / "base.safetensors", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(PatternError, match="takes the name"):
        is_inside_for_peft(name, "x")


def test_what_peft_takes_for_a_part_of_a_saved_module() -> None:
    assert is_inside_for_peft("head", "head")
    assert is_inside_for_peft("head", "model.head.dense")
    assert is_inside_for_peft("a.head", "x.a_head")  # to PEFT, a dot is any character
    assert not is_inside_for_peft("head", "overhead")
    assert not is_inside_for_peft("head", "model.heads")


def test_a_name_of_megabytes_in_a_message(tmp_path: Path, capsys: Capture) -> None:
    models.save_base(models.net(), tmp_path / "base")
    models.save_lora(models.random_lora(models.net(), r=2, target_modules=["head"]), tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bias": "x\u202e" * 1_000_000}))
    words = [
        "convert",
        "lora_to_shira",
        str(tmp_path / "lora"),
        "--base",
        str(tmp_path / "base"),
        "-o",
        str(tmp_path / "x.st"),
    ]
    assert 1 == shira.main(words)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "adapter_config.json: bias must be" in err
    assert len(err) < 20_000
