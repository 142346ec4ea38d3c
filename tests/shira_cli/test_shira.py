"""The program ``shira``: every command by one name, hints for typing errors, completion."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from shira_cli import app, convert, inspect, main, measure, merge
from shira_cli.completion import PROGRAMS
from shira_format.adapter import Adapter
from shira_format.format import save
from shira_format.tensors import SparseTensor

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    values = np.ones(2, np.float32)
    save(Adapter([SparseTensor("w", (4,), [0, 3], values, base=0 * values)]), tmp_path / "a.st")
    return tmp_path / "a.st"


def commands(command: click.Command, words: tuple[str, ...]) -> list[tuple[tuple[str, ...], click.Command]]:
    """A command and all below it, with the words that call it."""
    found = [(words, command)]
    if isinstance(command, app.Group):
        ctx = click.Context(command)
        for name in command.list_commands(ctx):
            below = command.get_command(ctx, name)
            assert below is not None
            found += commands(below, (*words, name))
    return found


ALL = commands(main.command, ("shira",))


def stopped(command: Any, arguments: Sequence[str], capsys: Capture) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as end:
        command(arguments)
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_all_commands_are_there() -> None:
    assert {
        "convert",
        "inspect",
        "merge",
        "diff",
        "measure",
        "moments",
        "lemmas",
        "plot",
        "demo",
        "check-merge",
    } <= {words[1] for words, _ in ALL if len(words) == 2}
    assert 31 == len(ALL)


@pytest.mark.parametrize(("words", "command"), ALL, ids=[" ".join(words) for words, _ in ALL])
def test_help_is_complete(words: tuple[str, ...], command: click.Command, capsys: Capture) -> None:
    for option in ("-h", "--help"):
        code, out, err = stopped(main.main, [*words[1:], option], capsys)
        assert (0, "") == (code, err)
        assert "example" in out
    assert command.help
    assert command.help[0].isupper()
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.help[0].isupper(), parameter.help
            assert parameter.help.endswith("."), parameter.help


def test_one_meaning_for_an_option() -> None:
    """Where two commands have an option of one name, both take a value or both are flags, of one type."""
    kinds: dict[str, set[tuple[bool, str]]] = {}
    for _, command in ALL:
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                kinds.setdefault(parameter.opts[-1], set()).add((parameter.is_flag, parameter.type.name))
    assert {
        "--density": {(False, "share"), (False, "text")},
        "--seed": {(False, "integer range")},
    }.items() <= kinds.items()
    assert [] == [name for name, found in kinds.items() if len({flag for flag, _ in found}) > 1]


def test_names_with_dashes_and_underscores(adapter: Path, capsys: Capture) -> None:
    assert 0 == main.main(["inspect", str(adapter)])
    assert "2 of 4 (50.00 %)" in capsys.readouterr().out
    for name in ("lora-to-shira", "lora_to_shira"):
        assert "exact values of the tuned weights" in " ".join(
            stopped(convert.main, [name, "-h"], capsys)[1].split()
        )
    for name in ("check-merge", "check_merge"):
        assert "Check whether a merged checkpoint holds a LoRA" in stopped(main.main, [name, "-h"], capsys)[1]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (main.main, ["merg"], "shira: error: no such command: merg (did you mean merge?)"),
        (main.main, ["lema"], "shira: error: no such command: lema (did you mean lemmas?)"),
        (convert.main, ["lora_to_sira"], "no such command: lora_to_sira (did you mean lora_to_shira?)"),
        (convert.main, ["lora_to_shira", "x", "--densty", "1"], "no such option: --densty (did you mean --density?)"),
        (merge.main, ["a", "--max-densty", "1"], "shira-merge: error: no such option: --max-densty (did you mean --max-density?)"),
        (inspect.main, ["a", "--verfy"], "no such option: --verfy (did you mean --verify?)"),
        (measure.main, [], "missing argument 'ADAPTER...'"),
    ],
)  # fmt: skip
def test_typing_errors_get_a_hint(command: Any, arguments: list[str], message: str, capsys: Capture) -> None:
    code, out, err = stopped(command, arguments, capsys)
    assert (2, "", 1) == (code, out, err.count("\n"))
    assert message in err


def test_errors_and_exit_codes_are_those_of_the_command(adapter: Path, capsys: Capture) -> None:
    none = str(adapter.with_name("none.st"))
    assert 1 == main.main(["inspect", none])
    assert 2 == main.main(["diff", str(adapter), none])
    assert 2 == main.main(["check-merge", "--base", none, "--lora", none, "--merged", none])
    assert ["shira: error: "] * 3 == [line[:14] for line in capsys.readouterr().err.splitlines()]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, capsys: Capture) -> None:
    assert 0 == main.main(["completion", shell])
    script = capsys.readouterr().out
    for prog in PROGRAMS:
        assert f"{app.completion_variable(prog)}={shell}_complete" in script
        assert re.search(rf"complete.* {prog}\b|compdef .* {prog}\b", script), prog


def test_what_is_completed() -> None:
    words = {
        "COMP_WORDS": "shira convert lora_to_shira --de",
        "COMP_CWORD": "3",
        "_SHIRA_COMPLETE": "bash_complete",
    }
    path = os.pathsep.join(map(str, (ROOT, ROOT / "analysis", ROOT / "cli")))
    command = [sys.executable, "-m", "shira_cli"]
    done = subprocess.run(
        command, env=os.environ | words | {"PYTHONPATH": path}, capture_output=True, check=True, text=True
    )
    assert "plain,--density\n" == done.stdout


def test_starts_light() -> None:
    """The list of commands imports none of them."""
    script = (
        "import sys; from shira_cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(len({'torch', 'scipy', 'matplotlib', 'tqdm', 'shira_cli.merge', 'shira_analysis'} & set(sys.modules)))"
    )
    assert 0 == subprocess.run([sys.executable, "-c", script], check=False, capture_output=True).returncode
