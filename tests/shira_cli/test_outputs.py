"""No command replaces what it reads: every option that names a file or folder to write, against every input."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click
import numpy as np
import pytest

from shira_cli import main as shira
from shira_format.adapter import Adapter
from shira_format.errors import SourceError
from shira_format.format import save
from shira_format.storage.outputs import check_output_files, check_output_folder
from shira_format.tensors import SparseTensor
from tests import models

Capture = pytest.CaptureFixture[str]

# Each command with all its inputs, relative to a folder that has them; and the options that name what it writes.
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "convert lora_to_shira": ("lora/adapter_model.safetensors --base model --fit distill --texts texts.jsonl --test test.jsonl", ("-o", "--picture")),
    "convert full_to_shira": (
        "--tuned tuned/model.safetensors --base model --fit distill --texts texts.jsonl --test test.jsonl", ("-o", "--picture"),
    ),
    "convert refit": ("a.st b.st --base model --texts texts.jsonl --test test.jsonl", ("-o", "--picture")),
    "convert peft_to_shira": ("lora/adapter_model.safetensors --base model", ("-o",)),
    "convert csr_to_shira": ("csr --base model", ("-o",)),
    "convert shira_to_full": ("a.st --base model --files-from tuned", ("-o",)),
    "convert shira_to_lora": ("a.st --base model --rank 2", ("-o",)),
    "convert shira_to_csr": ("a.st --base model", ("-o",)),
    "convert shira_to_peft": ("a.st --base model", ("-o",)),
    "convert repack": ("a.st --base model", ("-o",)),
    "inspect": ("a.st b.st --base model --moments moments.safetensors", ("--html",)),
    "merge": ("a.st b.st --base model --moments moments.safetensors", ("-o", "--report")),
    "mask": ("--base model --rule grad --data texts.jsonl", ("-o",)),
    "moments": ("model --texts texts.jsonl", ("-o",)),
    "train": ("--base model --data texts.jsonl --test test.jsonl --mask m.masks --task classify --checkpoints kept", ("-o", "--picture")),
    "plot mask": ("a.st --base model", ("-o", "--csv")),
    "plot layers": ("a.st --base model", ("-o", "--csv")),
    "plot spectrum": ("a.st --base model --lora lora/adapter_model.safetensors", ("-o", "--csv")),
    "plot overlap": ("a.st b.st --base model", ("-o", "--csv")),
    "plot orthogonality": ("a.st b.st --base model --moments moments.safetensors", ("-o", "--csv")),
    "plot dimension": ("--quick", ("-o", "--csv")),
    "demo": ("--base model", ("--keep",)),
}  # fmt: skip
# Options and arguments that name what is read; checkpoints of a training are its own.
_READ = {
    "files", "file", "adapters", "adapter", "lora", "loras", "base", "tuned", "folder", "model", "texts", "data", "test", "mask",
    "masks", "within", "without", "moments", "files_from", "first", "second", "merged", "checkpoints",
}  # fmt: skip


REFUSED = re.compile(
    "is one of the inputs|is in the folder of the model|is the file of texts|is a folder, not a file|is a file, not a folder|"
    "holds .*, and is not replaced|not a folder that .* wrote"
)


def leaves(command: click.Command, name: str = "") -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for part in command.list_commands(context):
            found = command.get_command(context, part)
            assert found is not None
            yield from leaves(found, f"{name} {part}".strip())
    else:
        yield name, command


def test_all_commands_that_write_are_here() -> None:
    found = {}
    for name, command in leaves(shira.command):
        written = [p for p in command.params if isinstance(p.type, click.Path) and p.name not in _READ]
        if written:
            found[name] = {option.opts[0] for option in written}
    assert {name: set(outputs) for name, (_, outputs) in COMMANDS.items()} == found


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    base = models.save_base(models.net(), folder / "model")
    (base / "config.json").write_text("{}")
    (base / "picture.png").write_text("of the model")
    shutil.copytree(base, folder / "tuned")
    models.save_lora(models.random_lora(models.net(), r=2, target_modules=["head"]), folder / "lora")
    change = SparseTensor("head.weight", (6, 40), [1], np.ones(1, np.float32), value_kind="delta")
    for name in ("a.st", "b.st", "m.masks", "moments.safetensors"):
        save(Adapter([change]), folder / name)
    for name in ("csr", "kept"):
        (folder / name).mkdir()
        (folder / name / "index.json").write_text("{}")
    for name in ("texts.jsonl", "test.jsonl"):
        (folder / name).write_text('{"text": "a", "label": 0}\n')
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


CASES = [(name, output) for name, (_, outputs) in COMMANDS.items() for output in outputs if name != "demo"]


@pytest.mark.parametrize(("name", "output"), CASES)
def test_an_input_is_never_replaced(
    name: str, output: str, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    folder = Path(shutil.copytree(template, tmp_path / "inputs"))
    monkeypatch.chdir(folder)
    given, outputs = COMMANDS[name]
    before = content(folder)
    inputs = [word for word in given.split() if (folder / word).exists()]
    targets = [*inputs, *(f"{word}/{p.name}" for word in inputs for p in sorted((folder / word).glob("*")))]
    Path("linked.st").symlink_to("a.st")
    targets += ["linked.st"] if "a.st" in inputs else []
    others = {
        "-o": "new.png" if name.startswith("plot") else "new.st",
        "--csv": "new.csv",
        "--report": "new.html",
        "--picture": "new.png",
    }
    for target in targets:
        if target == "model/picture.png":
            continue  # in the folder, but no part of a model
        words = [*name.split(), *given.split()]
        for one in outputs:
            words += [one, target if one == output else others[one]]
        try:
            code = shira.main([*words, "--force"])
        except SystemExit as end:  # the ending is wrong, too
            code = end.code
        err = capsys.readouterr().err
        assert code == 2 or (code == 1 and REFUSED.search(err)), (target, err)
        (folder / "linked.st").unlink()
        assert before == content(folder), target
        (folder / "linked.st").symlink_to("a.st")


def test_what_is_refused_is_said(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    folder = Path(shutil.copytree(template, tmp_path / "inputs"))
    monkeypatch.chdir(folder)
    assert 1 == shira.main(["inspect", "a.st", "b.st", "--html", "a.st", "--force"])
    assert "a.st: is one of the inputs\n" in capsys.readouterr().err
    assert 1 == shira.main(
        ["plot", "mask", "a.st", "--base", "model", "-o", "x.png", "--csv", "model/config.json", "--force"]
    )
    assert (
        "model/config.json: is in model, which is one of the inputs, and is not replaced\n"
        in capsys.readouterr().err
    )


def test_the_demo_keeps_what_is_there(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "genre-cut-0.01.st").write_text("mine")
    assert 1 == shira.main(["demo", "--density", "0.01", "--keep", str(tmp_path), "--base", str(models.minilm())])
    assert "genre-cut-0.01.st: exists; --force replaces it" in capsys.readouterr().err
    assert "mine" == (tmp_path / "genre-cut-0.01.st").read_text()


def test_files_that_may_be_written(tmp_path: Path) -> None:
    model = models.save_base(models.net(), tmp_path / "model")
    (model / "a.st").write_text("an adapter of the last time")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    check_output_files(
        model / "a.st", None, model / "new.safetensors", inputs=[model, "hf://me/it", None], force=True
    )
    for out, inputs, reason in (
        (model / "a.st", [model / "a.st"], "is one of the inputs"),
        (model / "model.safetensors", [model], "is in .*model, which is one of the inputs"),
        (model / "model.safetensors", [str(model)], "is in .*model, which is one of the inputs"),
        (tmp_path / "config.json", [], "is a part of a model"),
        (tmp_path / "model.safetensors.index.json", [], "is a part of a model"),
        (model, [], "is a folder"),
        (tmp_path / "none" / "a.st", [], "does not exist"),
    ):
        with pytest.raises(SourceError, match=reason):
            check_output_files(out, inputs=inputs, force=True)
    with pytest.raises(SourceError, match="exists; --force replaces it"):
        check_output_files(model / "a.st", inputs=[], force=False)
    (tmp_path / "dangling.st").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="exists; --force replaces it"):
        check_output_files(tmp_path / "dangling.st", inputs=[], force=False)
    with pytest.raises(SourceError, match="two files to write need two names"):
        check_output_files(tmp_path / "x.st", tmp_path / "model" / ".." / "x.st", inputs=[], force=True)


def test_a_folder_in_an_input_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "pipeline" / "tokenizer").mkdir(parents=True)
    with pytest.raises(SourceError, match="tokenizer: is in .*pipeline, which is one of the inputs"):
        check_output_folder(tmp_path / "pipeline" / "tokenizer", [tmp_path / "pipeline"], force=True)
    check_output_folder(tmp_path / "pipeline" / "new", [tmp_path / "pipeline"], force=True)


def test_a_mask_file_that_an_input_needs(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """It is named by the adapter alone, and without it the adapter cannot be read."""
    folder = Path(shutil.copytree(template, tmp_path / "inputs"))
    monkeypatch.chdir(folder)
    one = np.ones(1, np.float32)
    save(Adapter([SparseTensor("head.weight", (6, 40), [1], value_kind="none")]), Path("own.st"))
    save(Adapter([SparseTensor("head.weight", (6, 40), [1], one, base=one)]), Path("s.st"), masks="own.st")
    Path("other.html").hardlink_to("own.st")
    before = content(folder)
    for words in (
        "merge s.st a.st --base model -o own.st",
        "convert repack s.st -o own.st",
        "convert refit s.st --base model --texts texts.jsonl -o own.st",
        "plot layers s.st -o x.png --csv other.html",
        "inspect s.st --html other.html",
        "merge s.st a.st --base model -o x.st --report other.html",
    ):
        with suppress(SystemExit):  # the ending is wrong, too
            assert 1 == shira.main([*words.split(), "--force"])
            assert "is a mask file of s.st, and is not replaced\n" in capsys.readouterr().err
        assert before == content(folder), words


@pytest.mark.parametrize(
    "name", ["model-00002-of-00003.safetensors", "m-00002-of-00002.gguf", "a-00001-of-00002.fp16.bin"]
)
def test_a_part_of_a_model_that_is_not_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(SourceError, match="is a part of a model"):
        check_output_files(tmp_path / name, inputs=[], force=True)
