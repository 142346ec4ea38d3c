"""Every writer: a full disk is an error that names the file, and what a killed one left behind is removed by the next."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import shira_format as shira
from shira_cli import main as command
from shira_cli import plot
from shira_format._core import compiled
from shira_format.calibration.moments import Moment, Moments
from shira_format.storage import owners
from shira_format.storage.places import open_place
from shira_format.sync.restore import restore
from shira_format.training.state import write_state

NAMES = ("first.weight", "second.weight")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a tune, two adapters of it, and a place with two versions of it."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal((24, 30)).astype(np.float32) for name in NAMES}
    for kind, move in (("base", 0.0), ("tuned", 0.1)):
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text('{"model_type": "none"}' + " " * 9000)
        moved = {
            name: array + np.float32(move) * rng.random(array.shape, np.float32) for name, array in base.items()
        }
        save_file(moved, folder / kind / "model.safetensors")
    for name, density in (("a.st", 0.2), ("b.st", 0.1)):
        shira.full_to_shira(folder / "tuned", folder / "base", folder / name, density=density)
    publisher = shira.Publisher(folder / "base" / "model.safetensors", folder / "run")
    publisher.publish(folder / "tuned" / "model.safetensors")
    return folder


def convert(given: Path, out: Path) -> None:
    shira.full_to_shira(given / "tuned", given / "base", out / "new.st", density=0.2)


def convert_resumable(given: Path, out: Path) -> None:
    shira.full_to_shira(given / "tuned", given / "base", out / "new.st", density=0.2, resume=True)


def pack_again(given: Path, out: Path) -> None:
    shira.repack(given / "a.st", out / "new.st")


def merge(given: Path, out: Path) -> None:
    shira.merge([given / "a.st", given / "b.st"], out / "new.st", base=given / "base")


def mask(given: Path, out: Path) -> None:
    shira.save(shira.make_mask(given / "base", "wm", density=0.1), out / "new.masks")


def full(given: Path, out: Path) -> None:
    shira.shira_to_full(given / "a.st", given / "base", out / "new", force=True)


def full_of_another_folder(given: Path, out: Path) -> None:
    shira.shira_to_full(given / "a.st", given / "base", out / "new", files_from=given / "tuned", force=True)


def lora(given: Path, out: Path) -> None:
    shira.shira_to_lora(given / "a.st", given / "base", out / "new", rank=2, force=True)


def csr(given: Path, out: Path) -> None:
    shira.shira_to_csr(given / "a.st", out / "new", base=given / "base", force=True)


def peft(given: Path, out: Path) -> None:
    shira.shira_to_peft(given / "a.st", out / "new", base=given / "base", pad=True, force=True)


def moments(given: Path, out: Path) -> None:
    Moments([Moment(NAMES[0], np.eye(30)[None, None], 30, 50)]).save(out / "new.safetensors")


def state_of_a_training(given: Path, out: Path) -> None:
    if not (out / "a.st").exists():
        shutil.copy(given / "a.st", out / "a.st")
    write_state(out / "a.st", {"step": 3, "text": "x" * 3000}, None)


def versions(given: Path, out: Path) -> None:
    weights = load_file(given / "base" / "model.safetensors")
    shira.Publisher(weights, out / "run", snapshot_every=1).publish(given / "tuned")


def copy_of_a_version(given: Path, out: Path) -> None:
    (out / "last.safetensors").unlink(missing_ok=True)
    shira.Publisher(given / "tuned" / "model.safetensors", given / "run", copy=out / "last.safetensors")


def version(given: Path, out: Path) -> None:
    restore(given / "run", out / "new", force=True)


def small_file_of_a_place(given: Path, out: Path) -> None:
    place = open_place(out / "place")
    place.remove("index.json")
    place.create("index.json", b"x" * 3000)


def page(given: Path, out: Path) -> None:
    run("inspect", given / "a.st", "--html", out / "new.html", "--force")


def report(given: Path, out: Path) -> None:
    run(
        "merge",
        given / "a.st",
        given / "b.st",
        "-o",
        out / "new.st",
        "--base",
        given / "base",
        "--report",
        out / "new.html",
        "--force",
    )


def picture(given: Path, out: Path) -> None:
    drawn: Any = SimpleNamespace(records=[{"row": row} for row in range(900)], image=b"x" * 3000)
    plot._write(drawn, out / "new.png", out / "new.csv")


def run(*words: Any) -> None:
    """A command; its error is raised."""
    assert command.main([str(word) for word in words]) == 0


# Without torch's autograd or a live model: those write by the same functions (`save`, `write_state`).
WRITERS: list[Callable[[Path, Path], None]] = [
    convert, convert_resumable, pack_again, merge, mask, full, full_of_another_folder, lora, csr, peft, moments, state_of_a_training,
    versions, copy_of_a_version, version, small_file_of_a_place, page, report, picture,
]  # fmt: skip
each_writer = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def listed(folder: Path) -> list[str]:
    """All files and folders, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """The system refuses to write more, as it does when a disk is full: an error of the same kind, from the same calls."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


if os.name == "posix":
    pytestmark = pytest.mark.filterwarnings(
        "ignore:This process .* is multi-threaded:DeprecationWarning"
    )  # of fork

    @each_writer
    def test_a_full_disk_is_said_with_the_file(
        write: Callable[[Path, Path], None],
        inputs: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: Any,
    ) -> None:
        # Commands raise their errors, and what they print goes to no file, which would be limited, too.
        monkeypatch.setenv("SHIRA_DEBUG", "1")
        monkeypatch.setattr(compiled, "load", lambda: False)  # numba writes a cache
        write(inputs, tmp_path)
        there = listed(tmp_path)
        content = {name: (tmp_path / name).read_bytes() for name in there if (tmp_path / name).is_file()}
        largest = 7000 if write in (full, full_of_another_folder) else 1000
        for size in (10, largest):
            with no_file_larger_than(size), pytest.raises(OSError, match="File too large") as caught:
                write(inputs, tmp_path)
            named = Path(str(caught.value.filename))
            assert named.is_relative_to(tmp_path) or named.is_relative_to(inputs / "run")
            assert ".tmp" not in str(named), "a hidden name, which the user does not know"
        kept = {name for name in listed(tmp_path) if "new.st.partial" not in name}  # to be resumed
        assert kept <= set(there)
        if write not in (copy_of_a_version, small_file_of_a_place):  # which begin by removing theirs
            assert content == {name: (tmp_path / name).read_bytes() for name in content}

    def killed(work: Callable[[], None], holder: Any, name: str, nth: int) -> bool:
        """Run ``work`` in a process that ends at the ``nth`` call of a function; whether it got there."""
        process = os.fork()
        if not process:
            real, calls = getattr(holder, name), []

            def last(*arguments: Any, **options: Any) -> Any:
                calls.append(None)
                if len(calls) == nth:
                    os._exit(9)
                return real(*arguments, **options)

            setattr(holder, name, last)
            try:
                work()
            finally:
                os._exit(0)
        owners._cleaned.clear()  # the next writer is another process
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9

    @each_writer
    def test_what_a_killed_writer_leaves_is_removed_by_the_next(
        write: Callable[[Path, Path], None], inputs: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        out.mkdir()
        write(inputs, out)
        expected = listed(out)
        left = 0
        for step, nth in (("fsync", 1), ("fsync", 3), ("replace", 1), ("link", 1)):
            if killed(lambda: write(inputs, out), os, step, nth):
                left += any(is_hidden(name) for name in listed(out))
                write(inputs, out)
                assert not [name for name in listed(out) if is_hidden(name)], (step, nth)
                assert write is versions or expected == listed(out), (step, nth)
        assert left, "no kill left anything"
