"""What Linux, macOS and Windows do differently, simulated on this one: the result is the same, or one clear error."""

from __future__ import annotations

import builtins
import errno
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from shira_format._core import system
from shira_format.adapter import Adapter
from shira_format.checkpoints import open_checkpoint
from shira_format.convert import full_to_shira
from shira_format.errors import SourceError
from shira_format.export import full as export
from shira_format.export.full.other_files import copy_model_files
from shira_format.format import load, save
from shira_format.storage.atomic import atomic_file, atomic_folder, create_file
from shira_format.storage.output_folder import new_file
from shira_format.storage.outputs import check_output_files, check_output_folder
from shira_format.sync import Publisher
from shira_format.sync.restore import restore
from shira_format.tensors import SparseTensor

if os.name == "posix":
    import fcntl

Patch = pytest.MonkeyPatch


def no_preadv(patch: Patch) -> None:
    """Windows and older macOS."""
    patch.delattr(os, "preadv", raising=False)


def no_exchange(patch: Patch) -> None:
    """Windows, and file systems such as NFS."""
    patch.setattr(system, "_exchange", lambda: None)


def refused_exchange(patch: Patch) -> None:
    """The system call is there, and the file system does not know it."""
    patch.setattr(system, "_exchange", lambda: lambda *_: -1)


def no_locks(patch: Patch) -> None:
    """Windows has no fcntl."""
    find = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "fcntl":
            raise ImportError(name)
        return find(name, *rest)

    patch.setattr(builtins, "__import__", without)


def no_flags(patch: Patch) -> None:
    """Windows has none of these, and links are followed."""
    for name in ("O_NONBLOCK", "O_NOFOLLOW"):
        patch.delattr(os, name, raising=False)


def no_open_folders(patch: Patch) -> None:
    """Windows opens no folder, neither to flush nor to lock it."""
    real = os.open

    def opened(path: Any, *rest: Any, **options: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return real(path, *rest, **options)

    patch.setattr(os, "open", opened)
    patch.setattr(shutil, "_use_fd_functions", False, raising=False)  # what rmtree does there


def no_folder_flush(patch: Patch) -> None:
    """Some file systems flush files only; Windows flushes none that was opened to read."""
    real = os.fsync

    def flush(handle: int) -> None:
        if _is_read_only(handle):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(handle)

    patch.setattr(os, "fsync", flush)


def _is_read_only(handle: int) -> bool:
    return fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def no_process_facts(patch: Patch) -> None:
    """macOS does not say when a process began, nor which cores are ours."""
    patch.setattr(sys, "platform", "darwin")
    patch.setattr(system, "_exchange", lambda: None)
    patch.delattr(os, "sched_getaffinity", raising=False)


def no_renames_of_open_folders(patch: Patch) -> None:
    """Windows renames no folder of which a file is open."""
    patch.setattr(system, "MOVES_OPEN_FILES", False)
    real = os.replace

    def replaced(source: Any, target: Any, **options: Any) -> None:
        source = Path(source).resolve()
        held = [Path(f"/proc/self/fd/{fd}").resolve() for fd in names(Path("/proc/self/fd"))]
        if source.is_dir() and any(source in path.parents for path in held):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(source), None, str(target))
        real(source, target, **options)

    patch.setattr(os, "replace", replaced)


LACKS: list[Callable[[Patch], None]] = [
    no_preadv, no_exchange, refused_exchange, no_locks, no_flags, no_open_folders, no_folder_flush, no_process_facts,
    no_renames_of_open_folders,
]  # fmt: skip
if not Path("/proc/self/fd").exists():
    LACKS = [no_preadv, no_exchange, refused_exchange, no_locks, no_flags, no_open_folders]


# What asks which system this is, or calls what not every system has.
_ASKS = re.compile(
    r"\b(sys\.platform|os\.name|os\.replace|os\.link|os\.kill|hasattr\(os|preadv|fcntl|msvcrt|ctypes|O_NO\w+|sched_\w+|posix_\w+)\b"
)


def test_nothing_else_asks_which_system_this_is() -> None:
    root = Path(system.__file__).parents[1]
    asking = {
        path.relative_to(root).as_posix() for path in root.rglob("*.py") if _ASKS.search(path.read_text("utf-8"))
    }
    assert {"_core/system.py"} == asking


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="module")
def tune(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    base = {f"layers.{n}.weight": rng.standard_normal((24, 30)).astype(np.float32) for n in range(3)}
    folders = tmp_path_factory.mktemp("tuned"), tmp_path_factory.mktemp("base")
    for folder, move in zip(folders, (0.1, 0.0), strict=True):
        moved = {
            name: array + move * rng.standard_normal(array.shape).astype(np.float32)
            for name, array in base.items()
        }
        save_file(moved, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "none"}')
    return folders


def work(tune: tuple[Path, Path], folder: Path) -> dict[str, bytes]:
    """A conversion with parts on disk, and a checkpoint of it that replaces another; what then is in the folder."""
    for _ in range(2):
        full_to_shira(*tune, folder / "a.st", density=0.1, resume=True)
        export.shira_to_full(folder / "a.st", tune[1], folder / "model", force=True)
    return content(folder)


@pytest.mark.parametrize("lack", LACKS, ids=lambda lack: lack.__name__)
def test_what_a_system_lacks_changes_nothing(
    lack: Callable[[Patch], None], tune: tuple[Path, Path], tmp_path: Path, monkeypatch: Patch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    expected = work(tune, tmp_path / "here")
    lack(monkeypatch)
    assert expected == work(tune, tmp_path / "there")
    assert ["a.st", "model"] == names(tmp_path / "there")


def test_all_at_once(tune: tuple[Path, Path], tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    expected = work(tune, tmp_path / "here")
    for lack in LACKS:
        lack(monkeypatch)
    assert expected == work(tune, tmp_path / "there")


# Files that are open


@pytest.fixture
def open_elsewhere(monkeypatch: Patch) -> Callable[[Path], None]:
    """As on Windows, where nothing takes the place of a file that a program has open."""
    held: set[Path] = set()
    real = os.replace

    def replaced(source: Any, target: Any) -> None:
        if held & {Path(source), Path(target)}:
            raise PermissionError(errno.EACCES, "Access is denied", str(source), None, str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(system, "MOVES_OPEN_FILES", False)
    monkeypatch.setattr(system, "_exchange", lambda: None)
    return held.add


REASON = "Access is denied: a program has it open, or it is protected"


def adapter(value: float) -> Adapter:
    return Adapter([SparseTensor("w", (2, 3), [1], np.array([value], np.float32), value_kind="delta")])


def test_a_file_that_is_open_is_kept(tmp_path: Path, open_elsewhere: Callable[[Path], None]) -> None:
    path = tmp_path / "a.st"
    save(adapter(1), path)
    open_elsewhere(path)
    with pytest.raises(PermissionError, match=REASON) as caught:
        save(adapter(2), path)
    assert (str(path), None) == (caught.value.filename, caught.value.filename2)
    assert ["a.st"] == names(tmp_path)
    assert adapter(1) == load(path)


def test_a_folder_in_which_a_file_is_open_is_kept(tmp_path: Path, open_elsewhere: Callable[[Path], None]) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "weights").write_text("old")
    open_elsewhere(path)
    with pytest.raises(PermissionError, match=REASON), atomic_folder(path) as folder:
        (folder / "weights").write_text("new")
    assert {"model/weights": b"old"} == content(tmp_path)


def test_a_permission_that_lacks_is_said_as_it_is(tmp_path: Path, monkeypatch: Patch) -> None:
    def refused(source: Any, target: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(source), None, str(target))

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(PermissionError) as caught, atomic_file(tmp_path / "a") as file:
        file.write(b"new")
    expected = os.strerror(errno.EACCES) + (
        "" if os.name == "posix" else ": a program has it open, or it is protected"
    )
    assert (expected, str(tmp_path / "a")) == (caught.value.strerror, caught.value.filename)
    assert [] == names(tmp_path)


def test_checkpoints_are_not_kept_mapped(tune: tuple[Path, Path], tmp_path: Path) -> None:
    """A file that is mapped cannot be replaced on Windows, and kills whoever reads it if it is cut."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((tune[0] / "model.safetensors").read_bytes())
    checkpoint = open_checkpoint(tmp_path)
    name = "layers.0.weight"
    whole = checkpoint[name]
    before = whole.copy()
    os.truncate(path, 100)
    assert np.array_equal(before, whole)
    for read in (
        lambda: checkpoint[name],
        lambda: checkpoint.part(name, 3, 9),
        lambda: checkpoint.at(name, np.array([1, 700])),
    ):
        with pytest.raises(OSError, match="has become shorter") as caught:
            read()
        assert str(path) == caught.value.filename


def test_a_version_is_not_kept_mapped(tune: tuple[Path, Path], tmp_path: Path, monkeypatch: Patch) -> None:
    Publisher(tune[1] / "model.safetensors", tmp_path / "run")
    if no_renames_of_open_folders in LACKS:
        no_renames_of_open_folders(monkeypatch)
    restore(tmp_path / "run", tmp_path / "out")
    expected, found = open_checkpoint(tune[1]), open_checkpoint(tmp_path / "out")
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


# Names


@pytest.fixture
def folding(monkeypatch: Patch) -> None:
    """A file system on which names that differ in case only are one: macOS and Windows."""

    def exists(path: Any) -> bool:
        folder, name = os.path.split(os.fspath(path))
        return name.casefold() in {other.casefold() for other in names(Path(folder))}

    monkeypatch.setattr(os.path, "lexists", exists)


def test_two_files_of_a_result_are_not_one(folding: None, tmp_path: Path) -> None:
    new_file(tmp_path, "A.safetensors").write_text("first")
    new_file(tmp_path, "inner/a.safetensors").write_text("elsewhere")
    with pytest.raises(SourceError, match=r"^a.safetensors: two files to write have this name; "):
        new_file(tmp_path, "a.safetensors")
    assert "first" == (tmp_path / "A.safetensors").read_text()


def test_shards_whose_names_differ_in_case(folding: None, tmp_path: Path, monkeypatch: Patch) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name, file in (("v", "A.safetensors"), ("w", "a.safetensors")):
        save_file({name: np.ones((2, 3), np.float32)}, base / file)
    if len(names(base)) < 2:
        pytest.skip("this file system folds case itself")
    (base / "model.safetensors.index.json").write_text(
        '{"weight_map": {"v": "A.safetensors", "w": "a.safetensors"}}'
    )
    save(adapter(1), tmp_path / "a.st")
    with pytest.raises(SourceError, match=r"^a.safetensors: two files to write have this name; "):
        export.shira_to_full(tmp_path / "a.st", base, tmp_path / "out")
    assert ["a.st", "base"] == names(tmp_path)
    monkeypatch.undo()
    export.shira_to_full(tmp_path / "a.st", base, tmp_path / "out")
    assert ["v", "w"] == sorted(open_checkpoint(tmp_path / "out"))


def test_copies_whose_names_differ_in_case(folding: None, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    for name in ("config.json", "Config.json"):
        (base / name).write_text("{}")
    if len(names(base)) < 2:
        pytest.skip("this file system folds case itself")
    with pytest.raises(SourceError, match=r"^config.json: two files to write have this name; "):
        copy_model_files(out, base, None)


def test_two_outputs_whose_names_differ_in_case(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="two files to write need two names"):
        check_output_files(tmp_path / "a.ST", tmp_path / "A.st", inputs=[], force=True)


@pytest.mark.parametrize("name", ["nul", "AUX.st", "com1.safetensors", "a.st.", "a.st "])
def test_names_that_windows_takes_for_something_else(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    path = tmp_path / name
    if os.name == "posix":
        check_output_files(path, inputs=[], force=False)
    monkeypatch.setattr(system, "IS_WINDOWS", True)
    with pytest.raises(SourceError, match=f"{name}: Windows allows no file of this name$"):
        check_output_files(path, inputs=[], force=True)
    with pytest.raises(SourceError, match=f"{name}: Windows allows no file of this name$"):
        check_output_folder(path, [], force=True)
    check_output_files(tmp_path / f"x{name.strip('. ')}", inputs=[], force=True)


# Single calls


def no_fallocate(patch: Patch) -> None:
    """macOS and Windows."""
    patch.delattr(os, "posix_fallocate", raising=False)


def refused_fallocate(patch: Patch) -> None:
    """The file system does not know it."""

    def refused(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    patch.setattr(os, "posix_fallocate", refused, raising=False)


@pytest.mark.parametrize("lack", [lambda _: None, no_fallocate, refused_fallocate])
def test_room_for_a_file(lack: Callable[[Patch], None], tmp_path: Path, monkeypatch: Patch) -> None:
    lack(monkeypatch)
    with open(tmp_path / "a", "wb") as file:
        file.write(b"head")
        file.flush()
        system.allocate(file.fileno(), 3_000_000)
    assert b"head" + bytes(2_999_996) == (tmp_path / "a").read_bytes()


def test_no_room_for_a_file(tmp_path: Path, monkeypatch: Patch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with open(tmp_path / "a", "wb") as file, pytest.raises(OSError, match="No space left"):
        system.allocate(file.fileno(), 10)


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_only_one_writes(links: bool, tmp_path: Path, monkeypatch: Patch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr(os, "link", refused)
    create_file(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError) as caught:
        create_file(tmp_path / "a", b"second")
    assert (str(tmp_path / "a"), None) == (caught.value.filename, caught.value.filename2)
    assert {"a": b"first"} == content(tmp_path)


def test_a_disk_that_fails_while_it_is_flushed(tmp_path: Path, monkeypatch: Patch) -> None:
    """A file that was written whole may be lost on the way to the disk; what cannot be flushed at all is no failure."""
    codes: list[int] = []

    def fail(handle: int) -> None:
        raise OSError(codes[0], os.strerror(codes[0]))

    path = tmp_path / "model"
    monkeypatch.setattr(os, "fsync", fail)
    for code in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
        codes[:] = [code]
        with pytest.raises(OSError) as caught, atomic_folder(path) as folder:
            (folder / "weights").write_text("new")
        assert code == caught.value.errno
        assert str(caught.value.filename).endswith("weights")
        assert [] == names(tmp_path)
    codes[:] = [errno.EINVAL]
    with atomic_folder(path) as folder:
        (folder / "weights").write_text("new")
    assert {"model/weights": b"new"} == content(tmp_path)


@pytest.mark.parametrize("lack", [None, no_preadv])
def test_reading_at_a_place(lack: Callable[[Patch], None] | None, tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    if lack is not None:
        lack(monkeypatch)
    with FileIO(tmp_path / "a") as file:
        out = bytearray(10)
        assert 10 == system.read_at(file, 20, memoryview(out), threading.Lock())
        assert bytes(range(20, 30)) == out
        assert 5 == system.read_at(file, 95, memoryview(out), threading.Lock())
        assert 0 == system.read_at(file, 100, memoryview(out), threading.Lock())


def test_processes(monkeypatch: Patch) -> None:
    mine = os.getpid()
    assert system.is_running(mine, system.started(mine))
    assert 1 <= system.usable_cores()
    monkeypatch.setattr(system, "IS_WINDOWS", True)
    monkeypatch.setattr(os, "kill", None)  # which would end the process there
    assert system.is_running(1 << 30, 1)
