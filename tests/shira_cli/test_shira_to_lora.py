"""``shira-convert shira_to_lora`` as people call it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shira_cli import convert
from shira_format._core.arrays import array_digest
from shira_format._core.text import file_size
from shira_format.adapter import Adapter
from shira_format.format import save
from shira_format.tensors import DenseTensor, SparseTensor

Capture = pytest.CaptureFixture[str]
BASE = np.zeros((3, 4), np.float32)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of one matrix with the singular values 3, 2 and 1, and its base beside it."""
    save_file({"w.weight": BASE, "n.weight": np.ones(2, np.float32)}, tmp_path / "base.safetensors")
    seen = array_digest(np.zeros(3, np.float32))
    tensor = SparseTensor("w.weight", (3, 4), [1, 4, 11], np.float32([3, 2, 1]), base_digest=seen)
    save(Adapter([tensor], dense=[DenseTensor("n.weight", np.float32([5, 6]))]), tmp_path / "a.st")
    return tmp_path / "a.st"


def run(*arguments: str | Path | int) -> int:
    return convert.main([str(argument) for argument in arguments])


def test_text(adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    base, folder = tmp_path / "base.safetensors", tmp_path / "lora"
    assert 0 == run("shira_to_lora", adapter, "--base", base, "--rank", 2, "-o", folder)
    out, err = capsys.readouterr()
    assert "" == err
    head, layer, total, saved, size = out.splitlines()
    assert ["tensor", "shape", "entries", "rank", "numbers", "kept", "error", "bound", "spectral", "sigma", "next"] == head.split()  # fmt: skip
    # The energy is 9 + 4 + 1, of which 1 is lost.
    assert ["w.weight", "3x4", "3", "2", "14", "92.9%", "0.2673", "0.2673", "1", "1"] == layer.split()
    assert ["all", "3", "14", "92.9%", "0.2673", "0.2673"] == total.split()
    assert "replaced with their modules: n.weight" == saved
    assert size.startswith(f"{folder}: ")
    assert f"; the adapter: {file_size(adapter.stat().st_size)}" in size
    assert [5, 6] == load_file(folder / "adapter_model.safetensors")["base_model.model.n.weight"].tolist()


def test_energy_json_and_warnings(adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    base, folder = tmp_path / "base.safetensors", tmp_path / "lora"
    arguments = ("shira_to_lora", adapter, "--base", base, "-o", folder, "--json")
    assert 0 == run(*arguments, "--energy", 0.8)
    out, err = capsys.readouterr()
    assert "" == err
    report = json.loads(out)
    assert str(folder) == report["output"]
    (layer,) = report["layers"]
    assert (2, 3, 14, "linear") == (layer["rank"], layer["full_rank"], layer["parameters"], layer["kind"])
    assert pytest.approx(1) == layer["frobenius_bound"] == layer["spectral_bound"]
    assert pytest.approx(1) == layer["error"]
    assert pytest.approx(1) == layer["spectral_error"]
    totals = report["totals"]
    assert pytest.approx(13 / 14) == totals["energy_kept"]
    assert (adapter.stat().st_size, sum(p.stat().st_size for p in folder.iterdir())) == (
        totals["adapter_bytes"], totals["folder_bytes"],
    )  # fmt: skip
    assert ["n.weight"] == report["modules_to_save"]
    flat = SparseTensor("w.weight", (9, 9), np.arange(9) * 10, np.ones(9, np.float32), value_kind="delta")
    save(Adapter([flat]), tmp_path / "flat.st")
    arguments = ("shira_to_lora", tmp_path / "flat.st", "--rank", 2, "-o", folder, "--dry-run")
    assert 0 == run(*arguments)
    out, err = capsys.readouterr()
    assert "dry run: nothing was written" == out.splitlines()[-1]
    note, warning = err.splitlines()
    assert note.startswith("note: taken as [out, in], as torch.nn.Linear stores them")
    assert warning.startswith(
        "warning: only 22.2% of the update's energy is kept (relative error 0.88): the LoRA will do"
    )
    assert 0 == run(*arguments, "--quiet", "--json")
    out, err = capsys.readouterr()
    assert "" == err
    assert 1 == len(json.loads(out)["warnings"])


def test_choices_and_options(adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    base, folder = tmp_path / "base.safetensors", tmp_path / "lora"
    options = ("--base", base, "--rank", 1, "-o", folder, "--quiet", "--exclude", "^n")
    assert 0 == run("shira_to_lora", adapter, *options, "--prefix", "model.", "--embedding", "^w")
    assert {"base_model.model.model.w.lora_embedding_A", "base_model.model.model.w.lora_embedding_B"} == set(
        load_file(folder / "adapter_model.safetensors")
    )
    assert 0 == run("shira_to_lora", adapter, *options, "--force", "--fan-in-fan-out", "^w")
    factors = load_file(folder / "adapter_model.safetensors")
    assert (1, 3) == factors["base_model.model.w.lora_A.weight"].shape
    capsys.readouterr()
    assert 1 == run("shira_to_lora", adapter, *options)
    assert f"shira-convert: error: {folder}: exists; --force replaces it\n" == capsys.readouterr().err
    (folder / "mine").touch()
    assert 1 == run("shira_to_lora", adapter, *options, "--force")
    assert "holds 'mine', which shira_to_lora did not write" in capsys.readouterr().err


def test_mistakes(adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ("shira_to_lora", adapter, "-o", tmp_path / "lora")
    for wrong in ((), ("--rank", 1, "--energy", 0.5), ("--rank", 0), ("--energy", 2), ("--energy", "nan")):
        with pytest.raises(SystemExit) as stopped:
            run(*command, *wrong)
        assert 2 == stopped.value.code
    capsys.readouterr()
    assert 1 == run(*command, "--rank", 1)
    assert (
        "tensor 'w.weight' holds target values without those of the base: pass --base" in capsys.readouterr().err
    )
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "a.st").write_bytes(adapter.read_bytes())
    assert 1 == run("shira_to_lora", inside / "a.st", "--rank", 1, "-o", inside, "--force")
    assert f"{inside}: holds {inside / 'a.st'}, and is not replaced" in capsys.readouterr().err
    assert not (tmp_path / "lora").exists()


def test_help_has_an_example(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        run("shira_to_lora", "--help")
    assert (
        "shira-convert shira_to_lora adapter.st --base my-model/ --rank 32 -o my-lora/" in capsys.readouterr().out
    )
