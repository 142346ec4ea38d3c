"""check_merge: whose names an adapter's tensors are, and files that it does not use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shira_cli.convert import main
from shira_format._core.arrays import Array
from shira_format.adapter import Adapter
from shira_format.format import save
from shira_format.tensors import SparseTensor
from tests.models import save_arrays
from tests.shira_format.test_quantised import X, save_lora
from tests.shira_format.test_quantised import save as save_model

NAME = "layers.0.q.weight"
NEW = np.linspace(3, 5, 64).astype(np.float32)
Capture = pytest.CaptureFixture[str]


def adapter(folder: Path, weight: Array, *, name: str = NAME) -> Path:
    """Sets the first elements."""
    tensor = SparseTensor(name, weight.shape, np.arange(64), NEW, base=weight.reshape(-1)[:64])
    save(Adapter([tensor]), folder / "a.st")
    return folder / "a.st"


def merged(folder: Path, base: dict[str, Array], name: str) -> Path:
    weight = base[name].copy()
    weight.reshape(-1)[:64] = NEW
    return save_arrays(folder / "model.safetensors", base | {name: weight})


def towers(text: float, vision: float) -> dict[str, Array]:
    return {
        f"text_model.{NAME}": np.full((16, 16), text, np.float32),
        f"vision_model.{NAME}": np.full((16, 16), vision, np.float32),
    }


def check(base: Path, source: Path, result: Path, *options: str) -> int:
    return main(["check_merge", "--base", str(base), "--lora", str(source), "--merged", str(result), *options])


def test_the_base_s_values_tell_the_tower(tmp_path: Path, capsys: Capture) -> None:
    arrays = towers(1, 2)
    base = save_arrays(tmp_path / "base" / "model.safetensors", arrays)
    source = adapter(tmp_path, arrays[f"vision_model.{NAME}"])
    assert check(base, source, merged(tmp_path / "vision", arrays, f"vision_model.{NAME}")) == 0
    assert "names of the adapter are not those of the base" in capsys.readouterr().err
    assert check(base, source, merged(tmp_path / "text", arrays, f"text_model.{NAME}")) == 1
    assert check(base, source, tmp_path / "vision", "--prefix", "text_model.") == 2
    assert f"tensor {NAME!r}" in capsys.readouterr().err


def test_towers_alike_are_refused_and_the_user_chooses(tmp_path: Path, capsys: Capture) -> None:
    arrays = towers(1, 1)
    base = save_arrays(tmp_path / "base" / "model.safetensors", arrays)
    source = adapter(tmp_path, arrays[f"text_model.{NAME}"])
    text = merged(tmp_path / "text", arrays, f"text_model.{NAME}")
    assert check(base, source, text) == 2
    assert "--prefix text_model. or --prefix vision_model." in capsys.readouterr().err
    assert check(base, source, text, "--prefix", "text_model.") == 0
    assert check(base, source, text, "--prefix", "vision_model.") == 1
    assert check(base, source, text, "--prefix", "audio.") == 2


def test_names_that_are_the_base_s_are_kept(tmp_path: Path) -> None:
    arrays = towers(1, 1)
    base = save_arrays(tmp_path / "base" / "model.safetensors", arrays)
    source = adapter(tmp_path, arrays[f"text_model.{NAME}"], name=f"text_model.{NAME}")
    assert check(base, source, merged(tmp_path / "text", arrays, f"text_model.{NAME}")) == 0
    assert check(base, source, tmp_path / "text", "--prefix", "text_model.") == 0


@pytest.mark.parametrize("folder", ["lora", "merged"])
def test_files_that_are_not_used(folder: str, tmp_path: Path, capsys: Capture) -> None:
    weight = np.eye(16, dtype=np.float32)
    base = save_model(tmp_path / "base", {f"{X}.weight": weight})
    source, result = (
        save_lora(tmp_path / "lora"),
        save_model(tmp_path / "merged", {f"{X}.weight": weight + 2}).parent,
    )
    assert check(base, source, result) == 0
    save_arrays(tmp_path / folder / "head.safetensors", {"a": np.ones(2, np.float32)})
    capsys.readouterr()
    assert check(base, source, result) == 2
    error = capsys.readouterr().err
    assert "head.safetensors" in error and "--allow-unused" in error
    assert check(base, source, result, "--allow-unused", "--json") == 0
    assert any("head.safetensors" in notice for notice in json.loads(capsys.readouterr().out)["notices"])
