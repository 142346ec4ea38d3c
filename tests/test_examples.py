"""The examples run, each in a process of its own as a user runs it, and check what they say; so does the notebook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples import minimal_reader

ROOT = Path(__file__).parents[1]
VECTORS = ROOT / "spec" / "vectors"
TOUR = ROOT / "examples" / "tour.ipynb"
SAYS = {
    "minimal_reader.py": ("w: shape [4, 300], entries [0, 1, 256, 1199], bits 803f00c0003f4940",),
    "transformers_switching.py": (
        "MiniLM: each answer equals that of a model patched by itself",
        "SmolLM2: each answer equals that of a copy patched by itself",
    ),
    "ship_steps.py": ("after every step the server answered as the trainer's weights do, bit for bit",),
    "diffusers_switching.py": ("each picture equals that of a pipeline of its own",),
}


def test_every_example_is_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(SAYS)
    assert [TOUR] == list((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("name", SAYS)
def test_an_example(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        check=False,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    for line in SAYS[name]:
        assert line in done.stdout


# The minimal reader


def simple(content: dict[str, Any], path: Path) -> bool:
    """Whether a vector has only what the minimal reader is for."""
    manifest, _, _ = minimal_reader.open_adapter(path.read_bytes())
    codecs = {tensor["indices"]["codec"] for tensor in manifest["tensors"]}
    values = {tensor["values"] for tensor in content["tensors"]}
    return not content["whole"] and codecs <= {"gap8", "varint", "flat"} and values <= {"target"}


def test_the_minimal_reader_finds_what_the_vectors_hold() -> None:
    read = 0
    for path in sorted((VECTORS / "good").glob("*.st")):
        content = json.loads(path.with_suffix(".json").read_text("utf-8"))
        try:
            for_it = simple(content, path)
        except ValueError:  # a feature
            with pytest.raises(ValueError, match="newer or larger reader"):
                minimal_reader.read(path)
            continue
        if not for_it:
            with pytest.raises(ValueError, match="exercise|larger reader"):
                minimal_reader.read(path)
            continue
        found = minimal_reader.read(path)
        assert list(found) == [tensor["name"] for tensor in content["tensors"]], path.name
        for tensor in content["tensors"]:
            _, where, values = found[tensor["name"]]
            assert (tensor["indices"], tensor["value_hex"]) == (where.tolist(), values.tobytes().hex()), path.name
        read += 1
    assert read >= 30


@pytest.mark.parametrize(
    "rule", ["digest-mismatch", "header-too-large", "out-of-range", "stream-truncated", "unsorted"]
)
def test_the_minimal_reader_refuses(rule: str) -> None:
    paths = sorted((VECTORS / "bad").glob(f"{rule}--*.st"))
    assert paths
    for path in paths:
        with pytest.raises((ValueError, KeyError)):
            minimal_reader.read(path)


def test_the_minimal_reader_applies() -> None:
    weight = np.zeros((4, 300), "<u2")
    weight.flat[[0, 1, 256, 1199]] = np.array([0.5, -1, 0.25, 3], "<f4").view("<u4") >> 16
    weights = {"w": weight.copy()}
    before = minimal_reader.apply(VECTORS / "good" / "example.st", weights)
    assert weights["w"].flat[[0, 1, 256, 1199]].tobytes().hex() == "803f00c0003f4940"
    np.put(weights["w"], [0, 1, 256, 1199], before["w"])
    assert (weights["w"] == weight).all()
    other = {"w": np.zeros((4, 300), "<u2")}
    with pytest.raises(ValueError, match="not of the base"):
        minimal_reader.apply(VECTORS / "good" / "example.st", other)
    assert not other["w"].any()


# The notebook


def test_the_tour_runs_and_has_its_outputs_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():  # about asyncio's event loops, on import and in use
        warnings.simplefilter("ignore", DeprecationWarning)
        import nbclient
        import nbformat

        notebook = nbformat.read(TOUR, as_version=4)
        stored = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in stored)
        assert any("image/png" in output.get("data", {}) for cell in stored for output in cell.outputs)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
        nbclient.NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
        ).execute()
