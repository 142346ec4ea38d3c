"""Cases of applying, through the plain reader and through both ways of the library: live weights and checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shira_format._core.dtypes import DTYPES, dtype_name
from shira_format.errors import ShiraError
from shira_format.export.full import shira_to_full
from shira_format.format import AdapterFile
from shira_format.live.switcher import Switcher
from shira_format.storage.safetensors_file import SafetensorsFile, SafetensorsWriter
from spec import reader, run_vectors

ROOT = Path(__file__).parents[2]
CASES = run_vectors.cases()


def case_of(file: Path) -> Any:
    return json.loads(file.read_text("utf-8"))


def is_patch(file: Path) -> bool:
    return any(
        "patch" in AdapterFile(file.parent / one["file"]).manifest.raw["features"]
        for one in case_of(file)["adapters"]
    )


LIVE = [file for file in CASES if not is_patch(file)]
ALONE = [file for file in CASES if len(case_of(file)["adapters"]) == 1]


def arrays(tensors: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {
        name: np.frombuffer(bytes.fromhex(one["hex"]), DTYPES[one["dtype"]]).reshape(one["shape"]).copy()
        for name, one in tensors.items()
    }


def as_json(weights: Any) -> Any:
    return {
        name: {"dtype": dtype_name(array.dtype), "shape": list(array.shape), "hex": array.tobytes().hex()}
        for name, array in weights.items()
    }


def test_the_cases_are_found() -> None:
    assert len(CASES) >= 100
    assert len(LIVE) >= 90
    assert len(ALONE) >= 80
    assert {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"} <= case_of(
        run_vectors.VECTORS / "apply" / "two.json"
    )["result"].keys()


@pytest.mark.parametrize("file", CASES, ids=lambda file: file.stem)
def test_the_plain_reader(file: Path) -> None:
    case = case_of(file)
    if "refused" in case:
        with pytest.raises(reader.Refused) as caught:
            reader.run_case(str(file))
        assert case["refused"] == caught.value.rule
    else:
        assert run_vectors.difference(reader.run_case(str(file)), run_vectors.expected_outcome(case)) is None


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("file", LIVE, ids=lambda file: file.stem)
def test_live_weights(file: Path) -> None:
    case = case_of(file)
    weights = arrays(case["base"])
    switcher = Switcher(weights)
    wanted = [(str(file.parent / one["file"]), one.get("alpha")) for one in case["adapters"]]
    if "refused" in case:
        with pytest.raises((ShiraError, ValueError)):
            switcher.set(wanted)
    else:
        switcher.set(wanted)
        assert run_vectors.difference(as_json(weights), case["result"]) is None
        for part in case.get("slices", []):
            found = weights[part["name"]].reshape(-1)[part["begin"] : part["end"]]
            assert part["hex"] == found.tobytes().hex()
        switcher.revert()
    assert run_vectors.difference(as_json(weights), case["base"]) is None


@pytest.mark.parametrize("file", ALONE, ids=lambda file: file.stem)
def test_checkpoints(file: Path, tmp_path: Path) -> None:
    case = case_of(file)
    (one,) = case["adapters"]
    weights, base, out = arrays(case["base"]), tmp_path / "base.safetensors", tmp_path / "out"
    with open(base, "wb") as opened:
        writer = SafetensorsWriter(
            opened, {name: (array.dtype, array.shape) for name, array in weights.items()}, {}
        )
        for name, array in weights.items():
            writer.add(name, array)
        writer.finish()
    if "refused" in case:
        with pytest.raises((ShiraError, ValueError)):
            shira_to_full(file.parent / one["file"], base, out, alpha=one.get("alpha"))
        assert not out.exists()
        return
    shira_to_full(file.parent / one["file"], base, out, alpha=one.get("alpha"))
    (path,) = out.glob("*.safetensors")
    result = SafetensorsFile(path)
    assert run_vectors.difference(as_json({name: result.read(name) for name in result}), case["result"]) is None


def test_the_command_line() -> None:
    program = [
        sys.executable,
        str(ROOT / "spec" / "run_vectors.py"),
        "--apply",
        "--only",
        "/(plain|refused-mask|whole-undone)[.]",
    ]
    reads = [sys.executable, str(ROOT / "spec" / "reader.py")]
    passed = subprocess.run([*program, *reads, "--apply"], capture_output=True, text=True, check=False)
    assert (0, "3 passed, 0 failed\n") == (passed.returncode, passed.stdout)
    other = subprocess.run(
        [*program, sys.executable, "-c", "print('{}')"], capture_output=True, text=True, check=False
    )
    assert (1, "0 passed, 3 failed") == (other.returncode, other.stdout.splitlines()[-1])


def test_a_reader_of_some_features_conforms_if_it_refuses_the_others() -> None:
    """A reader that knows patches alone: ours, made to know no more."""
    script = "import reader, sys; reader.KNOWN_FEATURES &= {'patch'}; sys.exit(reader.main())"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'spec')!r}); {script}"]
    only = "/(example|mask-file|runs-of-page|patch-swap|mask-file--missing|pattern--step-0|unknown-feature--second)[.]"
    results = run_vectors.run(command, only, known={"patch"})
    assert 7 == len(results)
    assert {None} == {text for _, text in results}
    beyond = [text for _, text in run_vectors.run(command, "/(mask-file|runs-of-page)[.]")]
    assert all(text is not None and "exit 1 for a good file" in text for text in beyond)
    whole = [sys.executable, str(ROOT / "spec" / "reader.py")]
    too_many = [text for _, text in run_vectors.run(whole, "/(mask-file|runs-of-page)[.]", known=set())]
    assert all(text is not None and "exit 0 instead of 1" in text for text in too_many)
