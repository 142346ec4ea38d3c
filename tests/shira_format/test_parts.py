"""Conversions that are cut off, and go on: what is done is not done again, and the bytes are those of one run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shira_format._core.dtypes import FLOATS
from shira_format.convert import full_to_shira, lora_to_shira
from shira_format.convert import resume as parts
from shira_format.convert.exact import DifferingEntries, Exact
from shira_format.entries.changes import Entries
from shira_format.errors import SourceError, WorkError
from shira_format.selection import TopK
from shira_format.selection.radix import Survey
from shira_format.storage import owners
from shira_format.tensors import same_bits
from tests import models
from tests.rules import arguments

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # of fork

RULES = {
    "exact": Exact(),
    "tensor": TopK(0.02),
    "global": TopK(0.02, scope="global"),
    "energy of all": TopK(None, energy=0.8, scope="global"),
}
Tune = tuple[Path, Path]


class Cut(BaseException):
    """Stands for Ctrl-C, a crash or a power cut."""


@pytest.fixture
def tune(tmp_path: Path) -> Tune:
    base = models.save_base(models.llama(), tmp_path / "base", torch.bfloat16)
    state = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    tuned = {
        n: torch.where(torch.rand(t.shape, generator=generator) < 0.1, t * 1.125, t) for n, t in state.items()
    }
    (tmp_path / "tuned").mkdir()
    save_file(tuned, tmp_path / "tuned" / "model.safetensors")
    return tmp_path / "tuned", base


def cut_after(calls: int) -> Any:
    done = []

    def progress(_: int) -> None:
        done.append(None)
        if len(done) > calls:
            raise Cut

    return progress


@pytest.mark.parametrize("after", [0, 1, 7, 15])
@pytest.mark.parametrize("rule", RULES)
def test_it_goes_on_where_it_was_cut_off(rule: str, after: int, tune: Tune, tmp_path: Path) -> None:
    whole, out, folder = tmp_path / "whole.st", tmp_path / "a.st", tmp_path / "a.st.partial"
    expected = full_to_shira(*tune, whole, **arguments(RULES[rule]))
    with pytest.raises(Cut):
        full_to_shira(*tune, out, **arguments(RULES[rule]), resume=True, progress=cut_after(after))
    assert not out.exists()
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    assert len(kept) >= max(0, after - 4)
    with pytest.raises(Cut):  # once more, a bit further
        full_to_shira(*tune, out, **arguments(RULES[rule]), resume=True, progress=cut_after(after + 3))
    again = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    assert kept.items() <= again.items()  # nothing is computed twice
    report = full_to_shira(*tune, out, **arguments(RULES[rule]), resume=True)
    assert whole.read_bytes() == out.read_bytes()
    assert expected.tensors == report.tensors
    assert not folder.exists()


def test_progress_counts_what_was_there(tune: Tune, tmp_path: Path) -> None:
    done: list[int] = []
    full_to_shira(*tune, None, progress=done.append)
    with pytest.raises(Cut):
        full_to_shira(*tune, tmp_path / "a.st", resume=True, progress=cut_after(5))
    again: list[int] = []
    full_to_shira(*tune, tmp_path / "a.st", resume=True, progress=again.append)
    assert sum(done) == sum(again)


def test_a_lora_goes_on_too(tmp_path: Path) -> None:
    lora, base = models.LORAS / "spam", models.minilm()
    lora_to_shira(lora, base, tmp_path / "whole.st")
    with pytest.raises(Cut):
        lora_to_shira(lora, base, tmp_path / "a.st", resume=True, progress=cut_after(4))
    lora_to_shira(lora, base, tmp_path / "a.st", resume=True)
    assert (tmp_path / "whole.st").read_bytes() == (tmp_path / "a.st").read_bytes()


def test_without_resuming_nothing_is_kept(tune: Tune, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Cut):
        full_to_shira(*tune, tmp_path / "a.st", progress=cut_after(5))
    assert before == sorted(tmp_path.rglob("*"))


def test_parts_of_something_else_are_not_used(tune: Tune, tmp_path: Path) -> None:
    out = tmp_path / "a.st"
    with pytest.raises(Cut):
        full_to_shira(*tune, out, resume=True, progress=cut_after(5))
    reason = rf"^{tmp_path}/a\.st\.partial: holds parts of a conversion of other inputs or by another rule"
    for other in ({"density": 0.5}, {"exact": True}, {"include": ["mlp"]}):
        with pytest.raises(WorkError, match=reason):
            full_to_shira(*tune, out, resume=True, **other)
    state = load_file(tune[0] / "model.safetensors")
    save_file(
        state, tune[0] / "model.safetensors"
    )  # the same content, but nobody can know that without reading it
    with pytest.raises(WorkError, match=reason):
        full_to_shira(*tune, out, resume=True)
    assert not out.exists()


def test_a_folder_that_is_not_ours(tune: Tune, tmp_path: Path) -> None:
    folder = tmp_path / "a.st.partial"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(WorkError, match="is no folder of a conversion's parts"):
        full_to_shira(*tune, tmp_path / "a.st", resume=True)
    assert "mine" == (folder / "thesis.txt").read_text()


# At each of these steps of the work with the folder a run may be killed: nothing after it is done, nothing is tidied up.
STEPS = {
    "the folder is made": (Path, "mkdir"),
    "the note is flushed": (os, "fsync"),
    "the note is renamed": (os, "replace"),
    "the folder is renamed": (Path, "rename"),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_is_killed_while_it_begins(step: str, when: str, tune: Tune, tmp_path: Path) -> None:
    full_to_shira(*tune, tmp_path / "whole.st", density=0.05)
    out = tmp_path / "a.st"
    _kill_at(*STEPS[step], when, 1, lambda: full_to_shira(*tune, out, density=0.05, resume=True))
    _is_finished_by_the_next(tune, tmp_path)


@pytest.mark.parametrize("nth", range(1, 12))
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_is_killed_at_any_rename(nth: int, when: str, tune: Tune, tmp_path: Path) -> None:
    full_to_shira(*tune, tmp_path / "whole.st", density=0.05, include=["mlp"])
    out = tmp_path / "a.st"
    _kill_at(
        os, "replace", when, nth, lambda: full_to_shira(*tune, out, density=0.05, include=["mlp"], resume=True)
    )
    _is_finished_by_the_next(tune, tmp_path, include=["mlp"])


@pytest.mark.parametrize("nth", [1, 3])
def test_a_run_that_is_killed_while_it_removes_the_parts(nth: int, tune: Tune, tmp_path: Path) -> None:
    full_to_shira(*tune, tmp_path / "whole.st", density=0.05)
    out = tmp_path / "a.st"
    _kill_at(os, "unlink", "after", nth, lambda: full_to_shira(*tune, out, density=0.05, resume=True))
    assert (tmp_path / "whole.st").read_bytes() == out.read_bytes()
    _is_finished_by_the_next(tune, tmp_path)


def _kill_at(holder: Any, name: str, when: str, nth: int, work: Callable[[], object]) -> None:
    """Run ``work`` in a process that ends, as if killed, at the ``nth`` call of a function; or to its end."""
    process = os.fork()
    if not process:
        real, calls = getattr(holder, name), []

        def last(*arguments: Any, **options: Any) -> Any:
            calls.append(None)
            if len(calls) == nth and when == "before":
                os._exit(9)
            result = real(*arguments, **options)
            if len(calls) == nth:
                os._exit(9)
            return result

        setattr(holder, name, last)
        try:
            work()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) in (0, 9)


def _is_finished_by_the_next(tune: Tune, folder: Path, **options: Any) -> None:
    owners._cleaned.clear()  # the next run is another process
    full_to_shira(*tune, folder / "a.st", density=0.05, resume=True, **options)
    assert (folder / "whole.st").read_bytes() == (folder / "a.st").read_bytes()
    assert ["a.st", "base", "tuned", "whole.st"] == sorted(path.name for path in folder.iterdir())


def test_two_runs_at_once(tune: Tune, tmp_path: Path) -> None:
    full_to_shira(*tune, tmp_path / "whole.st", density=0.05)
    out, refused = tmp_path / "a.st", []

    def second(_: int) -> None:
        if not refused:
            with pytest.raises(
                WorkError, match=r"a\.st\.partial: another conversion to this file is running"
            ) as caught:
                full_to_shira(*tune, out, density=0.05, resume=True)
            refused.append(caught)

    full_to_shira(*tune, out, density=0.05, resume=True, progress=second)
    assert refused
    assert (tmp_path / "whole.st").read_bytes() == out.read_bytes()
    assert not (tmp_path / "a.st.partial").exists()
    full_to_shira(*tune, out, density=0.05, resume=True)  # and it may be done again


def test_an_empty_folder_is_used(tune: Tune, tmp_path: Path) -> None:
    (tmp_path / "a.st.partial").mkdir()
    full_to_shira(*tune, tmp_path / "a.st", resume=True)
    assert not (tmp_path / "a.st.partial").exists()
    (tmp_path / "a.st.partial").write_text("mine")
    with pytest.raises(WorkError, match="is no folder of a conversion's parts"):
        full_to_shira(*tune, tmp_path / "a.st", resume=True)
    assert "mine" == (tmp_path / "a.st.partial").read_text()


@pytest.mark.parametrize("damage", [b"", b"PK\3\4 nonsense", None])
def test_a_damaged_part_is_named(damage: bytes | None, tune: Tune, tmp_path: Path) -> None:
    with pytest.raises(Cut):
        full_to_shira(*tune, tmp_path / "a.st", resume=True, progress=cut_after(5))
    part = min((tmp_path / "a.st.partial").glob("*.npz"))
    if damage is None:
        np.savez(part, text=np.array([object()], object))  # a pickle
    else:
        part.write_bytes(damage)
    with pytest.raises(WorkError, match=rf"^{part}: a damaged part: "):
        full_to_shira(*tune, tmp_path / "a.st", resume=True)
    assert not (tmp_path / "a.st").exists()


@given(
    dtype=st.sampled_from(list(FLOATS.values())), size=st.integers(0, 50), energy=st.floats(allow_nan=False),
    whole=st.booleans(),
)  # fmt: skip
def test_results_survive_the_disk(
    dtype: np.dtype[Any], size: int, energy: float, whole: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(size)
    column = np.frombuffer(rng.bytes(size * dtype.itemsize), dtype)
    entries = Entries(np.arange(size), rng.standard_normal(size), column, column[::-1].copy(), energy)
    found = DifferingEntries(None if whole else entries, "0" * 64)
    survey = Survey(np.arange(9), None if whole else np.ones(9), energy)
    path = tmp_path_factory.mktemp("parts") / "part.npz"
    for value in (found, survey):
        path.write_bytes(parts._packed(value))
        assert same(value, parts._read(path))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return same_bits(a, b)
    if hasattr(a, "__dict__"):
        return type(a) is type(b) and all(same(value, getattr(b, key)) for key, value in vars(a).items())
    return bool(a == b)


@pytest.mark.parametrize("late", [False, True])
def test_files_of_others_among_the_parts_stay(late: bool, tune: Tune, tmp_path: Path) -> None:
    folder, out = tmp_path / "a.st.partial", tmp_path / "a.st"
    with pytest.raises(Cut):
        full_to_shira(*tune, out, resume=True, progress=cut_after(5))

    def put(_: int = 0) -> None:
        (folder / "notes.txt").write_text("mine")

    if late:
        full_to_shira(*tune, out, resume=True, progress=put)
        assert out.exists()
        assert ["notes.txt"] == [path.name for path in folder.iterdir()]
    else:
        put()
        with pytest.raises(WorkError, match=r"notes.txt: not a part of a conversion"):
            full_to_shira(*tune, out, resume=True)
        assert not out.exists()
    assert "mine" == (folder / "notes.txt").read_text()


def test_an_input_among_the_parts_is_not_removed(tune: Tune, tmp_path: Path) -> None:
    with pytest.raises(Cut):
        full_to_shira(*tune, tmp_path / "a.st", resume=True, progress=cut_after(5))
    moved = tune[0].rename(tmp_path / "a.st.partial" / "tuned")
    with pytest.raises(SourceError, match=r"a.st.partial: holds .*tuned"):
        full_to_shira(moved, tune[1], tmp_path / "a.st", resume=True)
    assert (moved / "model.safetensors").is_file()
