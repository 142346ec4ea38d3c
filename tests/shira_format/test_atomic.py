"""Files appear whole or not at all: exceptions, Ctrl-C, a killed process, a full disk."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from shira_format.adapter import Adapter
from shira_format.format import AdapterWriter, load, save
from shira_format.storage import atomic
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
