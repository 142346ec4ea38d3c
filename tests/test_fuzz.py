"""A few fuzzed cases of each target, the cases that were violations once, and that violations are seen at all."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fuzz import __main__ as fuzz_main
from fuzz import oracle, report, runner, system
from fuzz.guard import Guards
from fuzz.targets import MEGABYTE, TARGETS, Target
from shira_format.errors import SourceError

ROOT = Path(__file__).parents[1]
STORED = sorted(runner.FOUND.glob("*/*"))


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, int]], str]:
    """The rows of a quick run, and what it printed."""
    folder = tmp_path_factory.mktemp("fuzz")
    options = ["--quick", "--found", str(folder / "found"), "--results", str(folder / "results.json")]
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    rows = json.loads((folder / "results.json").read_text("utf-8"))["targets"]
    return {row["target"]: row for row in rows}, done.stdout + done.stderr


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_cases(name: str, campaign: tuple[dict[str, dict[str, int]], str]) -> None:
    rows, printed = campaign
    assert 0 == rows[name]["violation"], printed
    assert rows[name]["cases"] == TARGETS[name].quick
    assert rows[name]["accepted"] > 0, "no case gets through: the mutations are too wild"


@pytest.mark.parametrize("case", STORED, ids=lambda case: f"{case.parent.name}/{case.name}")
def test_what_was_a_violation_once(case: Path) -> None:
    outcome, why = runner.replay(case)
    assert outcome != oracle.VIOLATION, why


def test_the_same_seed_makes_the_same_cases(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        runner._make(TARGETS["adapters"], 7, 3, tmp_path / name)
        made.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert made[0] == made[1]


# What a case does, and what is said of it.


def broken() -> None:
    raise KeyError("x")


def refused() -> None:
    raise SourceError("no")


def slow() -> None:
    end = time.process_time() + 0.4
    while time.process_time() < end:
        pass


def large() -> None:
    bytearray(b"\1") * (200 * MEGABYTE)


@dataclass(frozen=True)
class Fake(Target):
    work: Callable[[], None] = broken

    def check(self, folder: Path) -> None:
        self.work()


@pytest.mark.parametrize(
    ("work", "outcome", "why"),
    [
        (lambda: None, "accepted", ""), (refused, "refused", ""), (broken, "violation", "KeyError"),
        (slow, "violation", "0.2 are allowed"),
        pytest.param(large, "violation", "MiB for files of", marks=pytest.mark.skipif(sys.platform == "win32", reason="not measured")),
    ],
)  # fmt: skip
def test_what_is_a_violation(work: Callable[[], None], outcome: str, why: str, tmp_path: Path) -> None:
    found = oracle.judge(Fake("fake", "", seconds=0.2, room=8 * MEGABYTE, work=work), tmp_path)
    assert outcome == found[0]
    assert why in found[1]


def test_what_is_aside_does_not_count(tmp_path: Path) -> None:
    def work() -> None:
        with oracle.aside():
            slow()

    assert ("accepted", "") == oracle.judge(Fake("fake", "", seconds=0.2, work=work), tmp_path)


ENDS = """
import os, sys
from pathlib import Path
from fuzz import runner
from fuzz.targets import Target

class Ending(Target):
    def module(self):
        return None
    def make(self, random, folder):
        (folder / "case").write_text(folder.name)
    def check(self, folder):
        if folder.name == "1":
            {what}

runner._HANGS = 0
tally = runner.run(Ending("ending", "", seconds=1), seed=0, cases=3, found=Path(sys.argv[1]))
print(dict(tally.outcomes), [why for _, why in tally.found])
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="a class of a script is in its children only if they are forked"
)
@pytest.mark.parametrize(
    ("what", "why"),
    [("os.abort()", "SIGABRT"), ("os._exit(3)", "exit code 3"), ("while True: pass", "too many CPU seconds")],
)
def test_the_end_of_a_process_is_a_result(what: str, why: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDS.format(what=what), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "'accepted': 2" in done.stdout
    assert why in done.stdout
    assert "1" == (tmp_path / "ending" / "0-1" / "case").read_text()


TOO_FAR = """
import sys
from dataclasses import replace
from pathlib import Path
from numba import njit
from fuzz import runner
from fuzz.targets import TARGETS
from shira_format._core import kernels

@njit
def take(flat, indices, out):
    seen = 0
    for i in range(indices.size):
        seen ^= indices[i + 1]  # what comes next is prefetched, one too far at the end
        out[i] = flat[indices[i]]
    return seen

kernels.take = take
target = replace(TARGETS[sys.argv[1]], environment={}, name="kernels")
tally = runner.run(target, seed=0, cases=40, found=Path(sys.argv[2]))
print(len(tally.found), [why for _, why in tally.found])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="as above")
@pytest.mark.parametrize(("name", "why"), [("kernels", "IndexError"), ("kernels_as_shipped", "SIGSEGV")])
def test_one_element_too_far_is_seen(name: str, why: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TOO_FAR, name, str(tmp_path)],
        env=os.environ | TARGETS[name].environment,
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert why in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize(("shape", "dtype"), [((), "f4"), (0, "u1"), (5, "i8"), ((3, 700), "u2"), (4096, "u1")])
def test_guarded_arrays(shape: Any, dtype: str, at_end: bool) -> None:
    guards = Guards()
    array = guards.copy(np.ones(shape, dtype), at_end=at_end)
    assert array.dtype == dtype
    assert (array == 1).all()
    array[...] = 3
    assert guards.are_whole()
    start = array.ctypes.data
    assert (start + array.nbytes if at_end else start) % mmap.PAGESIZE == 0
    if array.nbytes % mmap.PAGESIZE:
        ctypes.memset(start - 1 if at_end else start + array.nbytes, 0, 1)
        assert not guards.are_whole()


def test_an_interrupt_keeps_the_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> int:
        tally = next(one for one in arguments if isinstance(one, runner.Tally))
        tally.outcomes["accepted"] += 3
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_run_child", interrupted)
    results = tmp_path / "results.json"
    monkeypatch.setattr(
        sys, "argv", ["fuzz", "--target", "loras", "--target", "folders", "--results", str(results)]
    )
    assert 130 == fuzz_main.main()
    assert [("loras", 3)] == [(row["target"], row["cases"]) for row in json.loads(results.read_text())["targets"]]


def test_this_machine_has_a_name() -> None:
    assert "Python" in system.machine()


def test_the_page_has_the_results() -> None:
    assert report.table() in (ROOT / "docs" / "security.md").read_text("utf-8")
