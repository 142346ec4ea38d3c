"""Every vector through both readers, the checker of readers, and the program that writes the vectors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors

from fuzz.content import content
from shira_format.adapter import Adapter
from shira_format.checkpoints import open_checkpoint
from shira_format.errors import BaseMismatch, FormatError
from shira_format.format import AdapterFile, load, save
from spec import reader, run_vectors

ROOT = Path(__file__).parents[2]
GOOD = [file for file in run_vectors.vectors() if run_vectors.is_good(file)]
BAD = [file for file in run_vectors.vectors() if not run_vectors.is_good(file)]


def opened(path: Path) -> Adapter:
    base = run_vectors.base_of(path)
    return load(path, base=None if base is None else open_checkpoint(base))


def read_all(path: Path) -> dict[str, Any]:
    return content(opened(path))


def plainly(path: Path) -> Any:
    base = run_vectors.base_of(path)
    return reader.read(str(path), base=None if base is None else str(base))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("file", GOOD, ids=lambda file: file.stem)
def test_the_library_finds_the_content(file: Path) -> None:
    assert run_vectors.difference(read_all(file), run_vectors.expected_content(file)) is None


@pytest.mark.parametrize("file", GOOD, ids=lambda file: file.stem)
def test_the_plain_reader_finds_the_content(file: Path) -> None:
    assert run_vectors.difference(plainly(file), run_vectors.expected_content(file)) is None


@pytest.mark.parametrize("file", GOOD, ids=lambda file: file.stem)
def test_any_safetensors_reader_opens_it(file: Path) -> None:
    """The official library, which knows nothing of adapters."""
    ours = AdapterFile(file).streams
    found = dict(safetensors.deserialize(file.read_bytes()))
    assert found.keys() == ours.keys()
    for name, stream in ours.items():
        assert (stream.dtype, list(stream.shape)) == (found[name]["dtype"], found[name]["shape"])
        assert ours.read(name).tobytes() == bytes(found[name]["data"])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("file", BAD, ids=lambda file: file.stem)
def test_the_library_refuses(file: Path) -> None:
    with pytest.raises((FormatError, BaseMismatch)) as caught:
        read_all(file)
    assert run_vectors.expected_rule(file) == caught.value.rule
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", BAD, ids=lambda file: file.stem)
def test_the_plain_reader_refuses(file: Path) -> None:
    with pytest.raises(reader.Refused) as caught:
        plainly(file)
    assert run_vectors.expected_rule(file) == caught.value.rule


@pytest.mark.parametrize("file", [f for f in GOOD if f.stem != "name-like-stream"], ids=lambda file: file.stem)
def test_good_vectors_can_be_written_again(file: Path, tmp_path: Path) -> None:
    """Another codec, alignment and order of the streams, but the same content, and the keys that nobody knows."""
    path = tmp_path / "again.st"
    save(opened(file), path)
    version = "1.1" if "runs" in load(path).manifest["features"] else "1.0"
    expected = run_vectors.expected_content(file) | {"format_version": version}
    assert run_vectors.difference(reader.read(str(path)), expected) is None
    derived = {"format_version", "features", "digest", "tensors", "whole", "mask_files", "writer"}
    before, after = load(file).manifest, load(path).manifest
    kept = [{key: value for key, value in m.items() if key not in derived} for m in (before, after)]
    assert kept[0] == kept[1]
    assert opened(file) == load(path)
    once = path.read_bytes()
    save(load(path), path)
    assert once == path.read_bytes()


def test_a_name_that_takes_the_stream_of_the_codec_we_choose_is_refused(tmp_path: Path) -> None:
    """The vector is good because its tensor `w` has no stream `w#indices`; with another codec it needs one."""
    with pytest.raises(FormatError) as caught:
        save(load(run_vectors.VECTORS / "good" / "name-like-stream.st"), tmp_path / "again.st")
    assert "duplicate-name" == caught.value.rule
    assert [] == list(tmp_path.iterdir())


def test_the_vectors_are_those_that_the_program_writes(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "old.st").write_bytes(b"")
    subprocess.run([sys.executable, ROOT / "spec" / "make_vectors.py", tmp_path], check=True, capture_output=True)
    expected = {
        file.relative_to(run_vectors.VECTORS): file.read_bytes() for file in run_vectors.VECTORS.glob("*/*")
    }
    assert expected == {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.glob("*/*")}


def test_vectors_are_complete() -> None:
    assert len(GOOD) >= 110
    assert len(BAD) >= 600
    assert {file.with_suffix(".json") for file in GOOD} == set((run_vectors.VECTORS / "good").glob("*.json"))
    assert {"--" in file.stem for file in BAD} == {True}


# run_vectors.py itself


def test_the_plain_reader_passes_as_a_command() -> None:
    command = [sys.executable, str(ROOT / "spec" / "reader.py")]
    results = run_vectors.run(
        command, "/(example|masks?|names|varint--endless|mask-file--missing|unsorted--flat)[.]"
    )
    assert 7 == len(results)
    assert {None} == {text for _, text in results}


def test_the_command_line_reports_failures() -> None:
    program = [sys.executable, str(ROOT / "spec" / "run_vectors.py"), "--only", "/(example|unsorted--flat)[.]"]
    reads = [sys.executable, str(ROOT / "spec" / "reader.py")]
    passed = subprocess.run([*program, *reads], capture_output=True, text=True, check=False)
    assert (0, "2 passed, 0 failed\n") == (passed.returncode, passed.stdout)
    refuses = [sys.executable, "-c", "import sys; sys.exit('refused: unsorted: always')"]
    failed = subprocess.run([*program, *refuses], capture_output=True, text=True, check=False)
    lines = failed.stdout.splitlines()
    assert (1, "1 passed, 1 failed") == (failed.returncode, lines[-1])
    assert lines[0].startswith("good/example.st: exit 1 for a good file")
    quiet = subprocess.run([*program, "--quiet", *refuses], capture_output=True, text=True, check=False)
    assert "1 passed, 1 failed\n" == quiet.stdout
    nothing = subprocess.run([*program[:3], "^$", *reads], capture_output=True, text=True, check=False)
    assert (1, "0 passed, 0 failed\n") == (nothing.returncode, nothing.stdout)


@pytest.mark.parametrize(
    ("script", "vector", "pattern"),
    [
        ("pass", "good/example", "stdout is not JSON"),
        ("print('{}')", "good/example", "content lacks the key 'alpha'"),
        ("sys.exit(2)", "good/example", "exit 2 for a good file"),
        ("sys.exit(0)", "bad/unsorted--flat", "exit 0 instead of 1"),
        ("sys.exit(2)", "bad/unsorted--flat", "exit 2 instead of 1"),
        ("sys.exit('refused: duplicate: x')", "bad/unsorted--flat", "refused for duplicate instead of unsorted"),
        ("sys.exit('sorry')", "bad/unsorted--flat", "refused for None instead of unsorted"),
        ("import time; time.sleep(9)", "good/example", "no answer within"),
    ],
)
def test_wrong_answers_are_seen(script: str, vector: str, pattern: str) -> None:
    command = [sys.executable, "-c", f"import sys; {script}"]
    found = run_vectors.check(command, run_vectors.VECTORS / f"{vector}.st", 0.5 if "sleep" in script else 60)
    assert found is not None
    assert re.search(pattern, found)


@pytest.mark.parametrize(
    ("found", "expected", "text"),
    [
        (1, 1.0, None),
        (1, True, "content is 1 instead of True"),
        ({"a": [1, 2]}, {"a": [1, 3]}, "content.a[1] is 2 instead of 3"),
        ({"a": 1, "b": 2}, {"a": 1}, "content has the key 'b'"),
        ({}, {"a": 1}, "content lacks the key 'a'"),
        ([1], [1, 2], "content has 1 items instead of 2"),
        (None, "x", "content is None instead of 'x'"),
    ],
)
def test_differences(found: Any, expected: Any, text: str | None) -> None:
    assert text == run_vectors.difference(found, expected)


def test_the_plain_reader_as_a_program(tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, str(ROOT / "spec" / "reader.py"), *map(str, arguments)]
        return subprocess.run(program, capture_output=True, text=True, check=False)

    good = run_vectors.VECTORS / "good" / "example.st"
    printed = run(good)
    assert (0, "") == (printed.returncode, printed.stderr)
    assert run_vectors.expected_content(good) == json.loads(printed.stdout)
    refused = run(run_vectors.VECTORS / "bad" / "unsorted--flat.st")
    assert (1, "") == (refused.returncode, refused.stdout)
    assert refused.stderr.startswith("refused: unsorted: ")
    missing = run(tmp_path / "missing.st")
    assert 2 == missing.returncode
    assert missing.stderr.startswith("error: ")
    masked = run_vectors.VECTORS / "good" / "mask-file.st"
    assert 1 == run(masked, "--masks", tmp_path).returncode
    assert 0 == run(masked, "--masks", masked.parent).returncode
