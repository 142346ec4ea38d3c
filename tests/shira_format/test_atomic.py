"""Files appear whole or not at all: exceptions, Ctrl-C, a killed process, a full disk."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from shira_format._core import system
from shira_format.adapter import Adapter
from shira_format.format import AdapterWriter, load, save
from shira_format.storage import atomic, owners
from shira_format.tensors import SparseTensor


def tensor(name: str = "w", count: int = 1000) -> SparseTensor:
    values = np.arange(count, dtype=np.float32)
    return SparseTensor(name, (count, 7), np.arange(count) * 3, values, base=values)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("old", [None, b"old"])
def test_an_exception_while_adding_changes_nothing(
    tmp_path: Path, error: type[BaseException], old: bytes | None
) -> None:
    path = tmp_path / "a.st"
    if old is not None:
        path.write_bytes(old)

    def write() -> None:
        with AdapterWriter(path) as writer:
            writer.add(tensor())
            raise error

    with pytest.raises(error):
        write()
    assert ([] if old is None else ["a.st"]) == names(tmp_path)
    assert old is None or old == path.read_bytes()


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["copyfileobj", "fsync", "replace"])
def test_an_exception_while_finishing_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], step: str
) -> None:
    def fail(*_: object) -> None:
        assert 2 == len(names(tmp_path))  # the old file and the hidden new one
        raise error

    path = tmp_path / "a.st"
    save(Adapter([tensor("old")]), path)
    before = path.read_bytes()
    monkeypatch.setattr(shutil if step == "copyfileobj" else os, step, fail)
    with pytest.raises(error):
        save(Adapter([tensor()]), path)
    assert ["a.st"] == names(tmp_path)
    assert before == path.read_bytes()


def test_nothing_is_seen_before_the_end(tmp_path: Path) -> None:
    with AdapterWriter(tmp_path / "a.st") as writer:
        writer.add(tensor())
        assert [] == [name for name in names(tmp_path) if sys.platform == "linux" or not name.startswith("tmp")]
    assert ["a.st"] == names(tmp_path)
    assert tensor() == load(tmp_path / "a.st")["w"]


def test_readers_see_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a.st"
    save(Adapter([tensor("old")]), path)
    opened = load(path)
    save(Adapter([tensor("new")]), path)
    assert tensor("old") == opened["old"]
    assert ["new"] == list(load(path))


def test_long_names_leave_room_for_the_hidden_one(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 120 + ".st")
    save(Adapter([tensor()]), path)
    assert tensor() == load(path)["w"]


class Full:
    """A file on a disk that is full after some bytes; what is left in its buffer fails again when it is closed."""

    def __init__(self, file: Any, room: int) -> None:
        self._file = file
        self._room = room

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self._room -= size
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._file.write(data))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("room", [0, 100, 4000, 5000])
@pytest.mark.parametrize("where", ["spool", "file"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, room: int
) -> None:
    def full(make: Callable[..., Any]) -> Callable[..., Full]:
        return lambda *arguments, **options: Full(make(*arguments, **options), room)

    path = tmp_path / "a.st"
    path.write_bytes(b"old")
    if where == "spool":
        monkeypatch.setattr(tempfile, "TemporaryFile", full(tempfile.TemporaryFile))
    else:
        monkeypatch.setattr(atomic, "open", full(open), raising=False)
    with pytest.raises(OSError, match="No space left") as caught:
        save(Adapter([tensor()]), path)
    assert errno.ENOSPC == caught.value.errno
    monkeypatch.undo()
    assert ["a.st"] == names(tmp_path)
    assert b"old" == path.read_bytes()


if Path("/dev/full").exists():

    def test_a_full_device_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The buffered bytes fail when they are flushed."""
        monkeypatch.setattr(
            atomic, "open", lambda *_: os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb"), raising=False
        )
        with pytest.raises(OSError, match="No space left"):
            save(Adapter([tensor(count=3)]), tmp_path / "a.st")
        assert [] == names(tmp_path)


KILLED = """
import sys, time
import numpy as np
from shira_format.format import AdapterWriter
from shira_format.tensors import SparseTensor

with AdapterWriter(sys.argv[1]) as writer:
    for k in range(10**6):
        values = np.arange(100_000, dtype=np.float32)
        writer.add(SparseTensor(f"w{k}", (300_000,), np.arange(100_000) * 3 + k % 2, values, base=values))
        if k == 3:
            print("added", flush=True)
            time.sleep(0 if sys.argv[2] == "busy" else 60)
"""

if os.name == "posix":

    @pytest.mark.parametrize("how", ["busy", "asleep"])
    def test_a_killed_process_leaves_nothing_in_sight(tmp_path: Path, how: str) -> None:
        (tmp_path / "a.st").write_bytes(b"old")
        command = [sys.executable, "-c", KILLED, str(tmp_path / "a.st"), how]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert b"added\n" == process.stdout.readline()
            process.kill()
            assert -signal.SIGKILL == process.wait()
        assert ["a.st"] == names(tmp_path)
        assert b"old" == (tmp_path / "a.st").read_bytes()

    @pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o000])
    def test_permissions_follow_the_umask(tmp_path: Path, mask: int) -> None:
        before = os.umask(mask)
        try:
            save(Adapter([tensor()]), tmp_path / "a.st")
        finally:
            os.umask(before)
        assert 0o666 & ~mask == (tmp_path / "a.st").stat().st_mode & 0o777


@pytest.fixture(params=["exchange", "two renames"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With a system call that exchanges two names, and as if there were none."""
    if request.param == "two renames":
        monkeypatch.setattr(system, "exchange", lambda *_: False)
    elif system._exchange() is None:
        pytest.skip("this system has none")
    return str(request.param)


def fill(folder: Path, text: str) -> None:
    (folder / "file").write_text(text)
    (folder / "inner").mkdir()
    (folder / "inner" / "more").write_text(text)


def test_a_folder_replaces_another(tmp_path: Path, exchange: str) -> None:
    path = tmp_path / "f"
    for text in ("old", "new"):
        with atomic.atomic_folder(path) as folder:
            fill(folder, text)
            assert text == "old" or "old" == (path / "file").read_text()
        assert ["f"] == names(tmp_path)
        assert [text, text] == [(path / "file").read_text(), (path / "inner" / "more").read_text()]


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_a_folder_that_fails_changes_nothing(tmp_path: Path, exchange: str, error: type[BaseException]) -> None:
    path = tmp_path / "f"
    path.mkdir()
    fill(path, "old")
    with pytest.raises(error), atomic.atomic_folder(path) as folder:
        fill(folder, "new")
        raise error
    assert ["f"] == names(tmp_path)
    assert "old" == (path / "file").read_text()


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path, exchange: str) -> None:
    (tmp_path / "there").mkdir()
    fill(tmp_path / "there", "mine")
    (tmp_path / "f").symlink_to("there")
    with atomic.atomic_folder(tmp_path / "f") as folder:
        fill(folder, "new")
    assert ["f", "there"] == names(tmp_path)
    assert ["mine", "new"] == [(tmp_path / name / "file").read_text() for name in ("there", "f")]


if os.name == "posix":
    pytestmark = pytest.mark.filterwarnings(
        "ignore:This process .* is multi-threaded:DeprecationWarning"
    )  # of fork

    def killed(work: Callable[[], None], *points: tuple[Any, str], nth: int = 1, after: bool = False) -> bool:
        """Run ``work`` in a process that ends, as if killed, at the ``nth`` call of one of these; whether it got there."""
        process = os.fork()
        if not process:
            calls: list[None] = []

            def stopping(real: Callable[..., Any]) -> Callable[..., Any]:
                def last(*arguments: Any, **options: Any) -> Any:
                    calls.append(None)
                    if len(calls) == nth and not after:
                        os._exit(9)
                    result = real(*arguments, **options)
                    if len(calls) == nth:
                        os._exit(9)
                    return result

                return last

            for holder, name in points:
                setattr(holder, name, stopping(getattr(holder, name)))
            try:
                work()
            finally:
                os._exit(0)
        owners._cleaned.clear()  # the next writer is another process
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9

    STEPS = [
        (Path, "mkdir"),
        (os, "fsync"),
        (os, "replace"),
        (system, "exchange"),
        (os, "unlink"),
        (os, "rmdir"),
        (shutil, "rmtree"),
    ]

    @pytest.mark.parametrize("after", [False, True])
    def test_a_folder_whose_writer_is_killed_at_any_step(tmp_path: Path, exchange: str, after: bool) -> None:
        """What is there is the old one or the new one, whole; and the next writer leaves nothing else behind."""
        path = tmp_path / "f"

        def write(text: str) -> None:
            with atomic.atomic_folder(path) as folder:
                fill(folder, text)

        for nth in range(1, 40):
            write("old")
            got_there = killed(lambda: write("new"), *STEPS, nth=nth, after=after)
            atomic.restore(path)  # as every command does before it looks whether something is there
            found = {(path / "file").read_text(), (path / "inner" / "more").read_text()}
            assert found in ({"old"}, {"new"}), nth
            assert exchange != "exchange" or path.is_dir()
            write("next")
            assert ["f"] == names(tmp_path), nth
            assert "next" == (path / "file").read_text()
            if not got_there:
                break
        assert 5 < nth < 39

    def test_what_a_killed_writer_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
        for step in ("replace", "fsync"):
            assert killed(lambda: save(Adapter([tensor()]), tmp_path / "a.st"), (os, step))
            (left,) = names(tmp_path)  # that of this one: it has removed the one before
            assert left.startswith(".a.st.") and left.endswith(".tmp")
        save(Adapter([tensor()]), tmp_path / "c.st")
        assert ["c.st"] == names(tmp_path)

    def test_what_a_living_writer_writes_is_not_removed(tmp_path: Path) -> None:
        with atomic.atomic_file(tmp_path / "a") as file, atomic.atomic_folder(tmp_path / "f") as folder:
            owners._cleaned.clear()
            assert not killed(lambda: save(Adapter([tensor()]), tmp_path / "b.st"), (os, "abort"))
            file.write(b"mine")
            fill(folder, "mine")
        assert ["a", "b.st", "f"] == names(tmp_path)

    def test_only_what_is_certainly_left_behind_is_removed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        process = os.fork()
        if not process:
            os._exit(0)
        os.waitpid(process, 0)
        mine = owners.hidden(tmp_path / "a").name
        dead = mine.replace(f"-{os.getpid()}-", f"-{process}-")
        earlier = mine.replace(f"-{system.started(os.getpid())}-", "-1-")  # of an earlier process with this number
        elsewhere = dead.replace(system.host(), "elsewhere")
        others = [".a.0123456789ab.tmp", ".a.tmp", "a.tmp", dead[1:], dead + "x", elsewhere, mine]
        for name in (dead, earlier, *others):
            (tmp_path / name).write_text("x")
        locked = dead.replace(".a.", ".locked.")
        with open(tmp_path / locked, "wb") as handle:
            assert system.lock(handle.fileno())  # as a process does that another container runs
            owners.clean(tmp_path)
            kept = [earlier] if sys.platform != "linux" else []  # elsewhere it is not known when a process began
            assert sorted([*others, locked, *kept]) == names(tmp_path)
        owners.clean(tmp_path)  # once a minute is enough, for a folder of many files
        assert locked in names(tmp_path)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 61)
        owners.clean(tmp_path)  # it may be another folder meanwhile, and a writer may have died
        assert locked not in names(tmp_path)
